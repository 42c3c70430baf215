// SPDX-License-Identifier: Apache-2.0
// The host's address space. An absent page is PROT_NONE, a resident clean one PROT_READ (so that the first write is
// seen, fault_handler.hpp), a dirty one readable and writable.
//
// How a frame moves: mremap carries its page-table entries to the new address (no copy, no zeroing; about 10 us for 2
// MiB). MREMAP_DONTUNMAP leaves the old range reserved: with a plain mremap another thread's mmap could take the hole
// before we close it. Data appear at an address at one instant, whole: the transfer runs while the frame is at its
// slot, and the address becomes readable after.
//
// Threads: beside AddressSpace's: map/unmap/allow_write by the executor thread (allow_write also by a faulting thread,
// and both it and forbid_write by one that flushes, under the pager's lock, for a page that is resident). Blocking:
// system calls only. Errors: Error(memory). After discard() no page is resident and no frame may be mapped any more.
#pragma once

#include "mem/address_space.hpp"
#include "mem/frame_pool.hpp"

namespace tp {

class HostAddressSpace final : public AddressSpace {
 public:
  using AddressSpace::AddressSpace;
  ~HostAddressSpace() override;

  // The frame's memory goes from its slot to the page's address, readable.
  void map(FramePool& pool, FrameId frame, PageId page);
  // Back to its slot, where it will have the given access. The page is absent from the first instant.
  void unmap(FramePool& pool, FrameId frame, PageId page, SlotAccess slot_access);
  void allow_write(PageId page) override;
  void forbid_write(PageId page) override;
  // Frees the memory of everything that is still mapped here; every page is absent.
  void discard() noexcept;

 private:
  Region reserve_region(std::size_t bytes) override;
};

}  // namespace tp
