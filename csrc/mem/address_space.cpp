// SPDX-License-Identifier: Apache-2.0
#include "mem/address_space.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <string>

#include "base/check.hpp"
#include "base/error.hpp"
#include "base/limits.hpp"

namespace tp {
namespace {

[[noreturn]] void throw_mapping_error(const char* call, PageId page, int error_number) {
  std::string message =
      std::string(call) + " of page " + std::to_string(page.value) + " failed: " + describe_errno(error_number);
  if (error_number == ENOMEM) {
    message += "; the process may have reached vm.max_map_count: raise it, or use larger pages (page_bytes)";
  } else if (error_number == EINVAL) {
    message += "; moving frames needs Linux 5.7 or newer (MREMAP_DONTUNMAP)";
  }
  throw Error(ErrorKind::memory, std::move(message), error_number);
}

void move_mapping(std::byte* from, std::byte* to, std::size_t bytes, PageId page) {
  void* result = mremap(from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to);
  if (result == MAP_FAILED) throw_mapping_error("mremap", page, errno);
  TP_CHECK(result == to);
}

}  // namespace

AddressSpace::AddressSpace(std::size_t page_bytes)
    : page_bytes_(page_bytes), storage_(std::make_unique<Region[]>(kFilesMax)) {
  TP_CHECK(page_bytes >= kPageBytesMin && page_bytes <= kPageBytesMax);
}

AddressSpace::~AddressSpace() {
  for (const Region& region : regions()) munmap(region.reservation, region.reservation_bytes);
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
  const std::size_t bytes = (page_count + 1) * page_bytes_;
  void* memory = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    throw Error(ErrorKind::memory,
                "could not reserve " + std::to_string(bytes / kMiB) + " MiB of addresses (no memory is taken): " +
                    describe_errno(errno) + "; an address-space limit (ulimit -v) is the usual cause",
                errno);
  }
  if (madvise(memory, bytes, MADV_DONTFORK) != 0) {
    const int error_number = errno;
    munmap(memory, bytes);
    throw Error(ErrorKind::memory, "MADV_DONTFORK on the address space failed: " + describe_errno(error_number),
                error_number);
  }
  auto* reservation = static_cast<std::byte*>(memory);
  const auto address = reinterpret_cast<std::uintptr_t>(reservation);
  const PageRange pages{static_cast<std::uint32_t>(first_page), static_cast<std::uint32_t>(page_count)};
  storage_[region] = {reservation, bytes, reservation + (page_bytes_ - address % page_bytes_) % page_bytes_, pages};
  region_count_.store(region + 1, std::memory_order_release);
  page_count_.store(first_page + page_count, std::memory_order_release);
  return pages;
}

std::byte* AddressSpace::address(PageId page) const {
  const std::span<const Region> all = regions();
  const auto after =
      std::upper_bound(all.begin(), all.end(), page.value,
                       [](std::uint32_t value, const Region& region) { return value < region.pages.first; });
  TP_CHECK(after != all.begin());
  const Region& region = *(after - 1);
  TP_CHECK(page.value - region.pages.first < region.pages.count);
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

void AddressSpace::map(FramePool& pool, FrameId frame, PageId page) {
  std::byte* target = address(page);
  // The access that the slot has travels with the mapping. Inaccessible: move, then open. Writable: close to reading
  // first, so that no write can slip in unseen between the move and the protection.
  if (pool.access(frame) == SlotAccess::read_write) pool.set_access(frame, SlotAccess::read);
  const bool open_after = pool.access(frame) == SlotAccess::none;
  move_mapping(pool.slot(frame), target, page_bytes_, page);
  pool.note_access(frame, SlotAccess::none);
  if (open_after && mprotect(target, page_bytes_, PROT_READ) != 0) throw_mapping_error("mprotect", page, errno);
}

void AddressSpace::unmap(FramePool& pool, FrameId frame, PageId page, SlotAccess slot_access) {
  std::byte* source = address(page);
  if (mprotect(source, page_bytes_, PROT_NONE) != 0) throw_mapping_error("mprotect", page, errno);
  move_mapping(source, pool.slot(frame), page_bytes_, page);
  pool.note_access(frame, SlotAccess::none);
  pool.set_access(frame, slot_access);
}

void AddressSpace::allow_write(PageId page) {
  if (mprotect(address(page), page_bytes_, PROT_READ | PROT_WRITE) != 0) throw_mapping_error("mprotect", page, errno);
}

void AddressSpace::discard() noexcept {
  for (const Region& region : regions()) {
    void* result = mmap(region.reservation, region.reservation_bytes, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    TP_CHECK(result == region.reservation);
    madvise(region.reservation, region.reservation_bytes, MADV_DONTFORK);
  }
}

}  // namespace tp
