// SPDX-License-Identifier: Apache-2.0
#include "mem/address_space.hpp"

#include <algorithm>
#include <string>

#include "base/check.hpp"
#include "base/error.hpp"
#include "base/limits.hpp"

namespace tp {

AddressSpace::AddressSpace(std::size_t page_bytes)
    : page_bytes_(page_bytes), storage_(std::make_unique<Region[]>(kFilesMax)) {
  TP_CHECK(page_bytes >= kPageBytesMin && page_bytes <= kPageBytesMax);
}

std::span<const AddressSpace::Region> AddressSpace::regions() const noexcept {
  return {storage_.get(), region_count_.load(std::memory_order_acquire)};
}

PageRange AddressSpace::reserve(std::size_t page_count) {
  TP_CHECK(page_count > 0);
  const std::size_t region = region_count_.load(std::memory_order_relaxed);
  if (region == kFilesMax) {
    throw Error(ErrorKind::invalid, "an address space holds at most " + std::to_string(kFilesMax) + " regions (files)");
  }
  const std::size_t first_page = this->page_count();
  if (page_count > 0x7fffffffu - first_page) {
    throw Error(ErrorKind::invalid, "an address space holds at most 2^31 pages; use larger pages (page_bytes)");
  }
  Region reserved = reserve_region(page_count * page_bytes_);
  TP_CHECK(reinterpret_cast<std::uintptr_t>(reserved.base) % page_bytes_ == 0);
  reserved.pages = PageRange{static_cast<std::uint32_t>(first_page), static_cast<std::uint32_t>(page_count)};
  storage_[region] = reserved;
  region_count_.store(region + 1, std::memory_order_release);
  page_count_.store(first_page + page_count, std::memory_order_release);
  return reserved.pages;
}

const AddressSpace::Region& AddressSpace::region_of(PageId page) const {
  const std::span<const Region> all = regions();
  const auto after =
      std::upper_bound(all.begin(), all.end(), page.value,
                       [](std::uint32_t value, const Region& region) { return value < region.pages.first; });
  TP_CHECK(after != all.begin());
  const Region& region = *(after - 1);
  TP_CHECK(page.value - region.pages.first < region.pages.count);
  return region;
}

std::byte* AddressSpace::address(PageId page) const {
  const Region& region = region_of(page);
  return region.base + static_cast<std::size_t>(page.value - region.pages.first) * page_bytes_;
}

PageId AddressSpace::find(const void* address) const noexcept {
  const auto* byte = static_cast<const std::byte*>(address);
  for (const Region& region : regions()) {
    if (byte < region.base) continue;
    const auto index = static_cast<std::size_t>(byte - region.base) / page_bytes_;
    if (index < region.pages.count) return PageId{region.pages.first + static_cast<std::uint32_t>(index)};
  }
  return PageId{};
}

}  // namespace tp
