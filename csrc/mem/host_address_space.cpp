// SPDX-License-Identifier: Apache-2.0
#include "mem/host_address_space.hpp"

#include <sys/mman.h>

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

HostAddressSpace::~HostAddressSpace() {
  for (const Region& region : regions()) munmap(region.reservation, region.reservation_bytes);
}

AddressSpace::Region HostAddressSpace::reserve_region(std::size_t bytes) {
  const std::size_t reservation_bytes = bytes + page_bytes();  // so that the first page can start at a multiple
  void* memory = mmap(nullptr, reservation_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    throw Error(ErrorKind::memory,
                "could not reserve " + std::to_string(reservation_bytes / kMiB) +
                    " MiB of addresses (no memory is taken): " + describe_errno(errno) +
                    "; an address-space limit (ulimit -v) is the usual cause",
                errno);
  }
  if (madvise(memory, reservation_bytes, MADV_DONTFORK) != 0) {
    const int error_number = errno;
    munmap(memory, reservation_bytes);
    throw Error(ErrorKind::memory, "MADV_DONTFORK on the address space failed: " + describe_errno(error_number),
                error_number);
  }
  auto* reservation = static_cast<std::byte*>(memory);
  const auto address = reinterpret_cast<std::uintptr_t>(reservation);
  return {reservation, reservation_bytes, reservation + (page_bytes() - address % page_bytes()) % page_bytes(), {}};
}

void HostAddressSpace::map(FramePool& pool, FrameId frame, PageId page) {
  std::byte* target = address(page);
  // The access that the slot has travels with the mapping. Inaccessible: move, then open. Writable: close to reading
  // first, so that no write can slip in unseen between the move and the protection.
  if (pool.access(frame) == SlotAccess::read_write) pool.set_access(frame, SlotAccess::read);
  const bool open_after = pool.access(frame) == SlotAccess::none;
  move_mapping(pool.slot(frame), target, page_bytes(), page);
  pool.note_access(frame, SlotAccess::none);
  if (open_after && mprotect(target, page_bytes(), PROT_READ) != 0) throw_mapping_error("mprotect", page, errno);
}

void HostAddressSpace::unmap(FramePool& pool, FrameId frame, PageId page, SlotAccess slot_access) {
  std::byte* source = address(page);
  if (mprotect(source, page_bytes(), PROT_NONE) != 0) throw_mapping_error("mprotect", page, errno);
  move_mapping(source, pool.slot(frame), page_bytes(), page);
  pool.note_access(frame, SlotAccess::none);
  pool.set_access(frame, slot_access);
}

void HostAddressSpace::forbid_write(PageId page) {
  if (mprotect(address(page), page_bytes(), PROT_READ) != 0) throw_mapping_error("mprotect", page, errno);
}

void HostAddressSpace::allow_write(PageId page) {
  if (mprotect(address(page), page_bytes(), PROT_READ | PROT_WRITE) != 0) throw_mapping_error("mprotect", page, errno);
}

void HostAddressSpace::discard() noexcept {
  for (const Region& region : regions()) {
    void* result = mmap(region.reservation, region.reservation_bytes, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    TP_CHECK(result == region.reservation);
    madvise(region.reservation, region.reservation_bytes, MADV_DONTFORK);
  }
}

}  // namespace tp
