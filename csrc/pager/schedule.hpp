// SPDX-License-Identifier: Apache-2.0
// A schedule is data: one cycle of steps and the page-ins and evictions that go with it, repeated for ever. Computed by
// tensorpager/plan.py, which defines the arrays; checked here; carried out by the executor.
//
// Absolute numbers run on across cycles: step s of cycle c is c * step_count + s, and likewise for actions.
//
// Threads: under the lock of Residency. Blocking: never. Errors: Error(invalid) from the constructor, naming array and
// index.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/ids.hpp"

namespace tp {

struct ScheduleArrays {
  std::span<const std::int32_t> step_set;         // [S] set acquired by each step
  std::span<const std::int32_t> initial_pages;    // resident at the start of the cycle
  std::span<const std::int32_t> action_step;      // [A] not before this many steps of the cycle have been acquired
  std::span<const std::int32_t> action_deadline;  // [A] step that needs the page; >= S: of the next cycle
  std::span<const std::int32_t> action_page_in;   // [A]
  std::span<const std::int32_t> action_evict;     // [A] page whose frame is reused, -1: a free frame
};

struct Action {
  std::int64_t step;      // absolute
  std::int64_t deadline;  // absolute
  PageId page_in;
  PageId evict;  // may be invalid
};

class Schedule {
 public:
  // set_pages[i]: sorted pages of set i. host_frame_count: frames of the tier beneath a device that may keep pages.
  Schedule(const ScheduleArrays& arrays, std::span<const std::vector<PageId>> set_pages, std::size_t page_count,
           std::size_t frame_count, std::size_t host_frame_count = 0);

  std::int64_t step_count() const noexcept { return static_cast<std::int64_t>(step_set_.size()); }
  std::int64_t action_count() const noexcept { return static_cast<std::int64_t>(actions_.size()); }
  std::span<const PageId> initial_pages() const noexcept { return initial_pages_; }
  // Place of the page in initial_pages(), or its size when it is not one of them.
  std::size_t initial_rank(PageId page) const;
  SetId set_of(std::int64_t absolute_step) const;
  Action action(std::int64_t absolute_action) const;

  // First absolute step at or after `from` that acquires the set / uses the page; nothing when no step ever does.
  std::optional<std::int64_t> next_step_of(SetId set, std::int64_t from) const;
  std::optional<std::int64_t> next_use(PageId page, std::int64_t from) const;
  // First absolute action at or after `from` that brings the page in.
  std::optional<std::int64_t> next_page_in(PageId page, std::int64_t from) const;
  // Whether the host tier is to keep the page of this action from its page-in before it (host_tier_plan.hpp).
  bool host_hit(std::int64_t absolute_action) const;
  // First absolute action of the first cycle whose deadline is `step` or later; action_count() when there is none.
  std::int64_t first_action_due_at(std::int64_t step) const;
  // How many steps of one cycle of `other` are the first steps of this one, repeated for ever. O(steps of other).
  std::int64_t common_prefix(const Schedule& other) const;

 private:
  // For each key, the ascending positions at which it occurs in one cycle, as compressed rows.
  struct Occurrences {
    std::vector<std::uint32_t> row;  // [keys + 1]
    std::vector<std::int32_t> position;
    void build(std::size_t keys, const std::vector<std::pair<std::uint32_t, std::int32_t>>& pairs);
    std::optional<std::int64_t> next(std::uint32_t key, std::int64_t from, std::int64_t cycle_length) const;
  };

  std::vector<SetId> step_set_;
  std::vector<PageId> initial_pages_;
  std::vector<std::uint32_t> initial_rank_;  // by page
  std::vector<Action> actions_;
  std::vector<bool> host_hits_;  // by action
  Occurrences steps_by_set_, uses_by_page_, actions_by_page_;
};

}  // namespace tp
