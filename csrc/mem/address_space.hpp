// SPDX-License-Identifier: Apache-2.0
// Virtual addresses that never change. Each page of the model has its own address for ever; being resident means that
// a frame's memory stands there. An absent page is PROT_NONE, a resident clean one PROT_READ (so that the first write
// is seen, fault_handler.hpp), a dirty one readable and writable.
//
// How a frame moves: mremap carries its page-table entries to the new address (no copy, no zeroing; about 10 us for 2
// MiB). MREMAP_DONTUNMAP leaves the old range reserved: with a plain mremap another thread's mmap could take the hole
// before we close it. Data appear at an address at one instant, whole: the transfer runs while the frame is at its
// slot, and the address becomes readable after.
//
// Threads: reserve() by one thread at a time, under the pager's lock; map/unmap/allow_write by the executor thread
// (allow_write also by a faulting thread, under the pager's lock, for a page that is resident). address()/find() from
// any thread once reserved. Blocking: system calls only. Errors: Error(memory). Ownership: regions are unmapped by the
// destructor; tensors over them keep a shared_ptr to the space. After discard() no page is resident and no frame may be
// mapped any more.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "base/ids.hpp"
#include "mem/frame_pool.hpp"

namespace tp {

struct PageRange {
  std::uint32_t first = 0;
  std::uint32_t count = 0;
};

class AddressSpace {
 public:
  explicit AddressSpace(std::size_t page_bytes);
  ~AddressSpace();
  AddressSpace(const AddressSpace&) = delete;
  AddressSpace& operator=(const AddressSpace&) = delete;

  // Reserves addresses for page_count pages in one contiguous run that starts at a multiple of the page size.
  PageRange reserve(std::size_t page_count);
  std::size_t page_count() const noexcept { return page_count_.load(std::memory_order_acquire); }
  std::size_t page_bytes() const noexcept { return page_bytes_; }
  std::byte* address(PageId page) const;
  // The page at an address, or an invalid id when it lies outside every region.
  PageId find(const void* address) const noexcept;

  // The frame's memory goes from its slot to the page's address, readable.
  void map(FramePool& pool, FrameId frame, PageId page);
  // Back to its slot, where it will have the given access. The page is absent from the first instant.
  void unmap(FramePool& pool, FrameId frame, PageId page, SlotAccess slot_access);
  void allow_write(PageId page);
  // Frees the memory of everything that is still mapped here; every page is absent.
  void discard() noexcept;

 private:
  struct Region {
    std::byte* reservation = nullptr;
    std::size_t reservation_bytes = 0;
    std::byte* base = nullptr;
    PageRange pages;
  };
  std::span<const Region> regions() const noexcept;

  // Fixed storage, published by the count: the executor and the fault handler look addresses up while another
  // thread reserves the next region.
  std::size_t page_bytes_;
  std::unique_ptr<Region[]> storage_;  // in order of their pages
  std::atomic<std::size_t> region_count_{0};
  std::atomic<std::size_t> page_count_{0};
};

}  // namespace tp
