// SPDX-License-Identifier: Apache-2.0
// Strong integer ids: a page number can't be passed where a frame number is meant.
#pragma once

#include <compare>
#include <cstdint>
#include <functional>

namespace tp {

template <class Tag>
struct Id {
  std::uint32_t value = 0xffffffffu;
  constexpr bool valid() const noexcept { return value != 0xffffffffu; }
  friend constexpr auto operator<=>(Id, Id) = default;
};

using PageId = Id<struct PageTag>;          // a page of the address space
using FrameId = Id<struct FrameTag>;        // a slot of physical memory that holds one page
using FileId = Id<struct FileTag>;          // a file added to an IoQueue
using SetId = Id<struct SetTag>;            // pages that a step needs together
using ScheduleId = Id<struct ScheduleTag>;  // a schedule that the core knows; never used again for another

}  // namespace tp

template <class Tag>
struct std::hash<tp::Id<Tag>> {
  std::size_t operator()(tp::Id<Tag> id) const noexcept { return std::hash<std::uint32_t>{}(id.value); }
};
