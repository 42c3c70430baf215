// SPDX-License-Identifier: Apache-2.0
// Virtual addresses that never change. Each page of the model has its own address for ever; being resident means that
// a frame's memory stands there. This is what the host's and the device's address spaces have in common: which page
// lies where.
//
// Threads: reserve() by one thread at a time, under the pager's lock. address()/find() from any thread once reserved.
// Blocking: system or driver calls only. Errors: Error(memory), Error(device), Error(invalid). Ownership: regions are
// given back by the destructor; tensors over them keep a shared_ptr to the space.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "base/ids.hpp"

namespace tp {

struct PageRange {
  std::uint32_t first = 0;
  std::uint32_t count = 0;
};

class AddressSpace {
 public:
  explicit AddressSpace(std::size_t page_bytes);
  virtual ~AddressSpace() = default;
  AddressSpace(const AddressSpace&) = delete;
  AddressSpace& operator=(const AddressSpace&) = delete;

  // Reserves addresses for page_count pages in one contiguous run that starts at a multiple of the page size.
  PageRange reserve(std::size_t page_count);
  std::size_t page_count() const noexcept { return page_count_.load(std::memory_order_acquire); }
  std::size_t page_bytes() const noexcept { return page_bytes_; }
  // Of a device: not to be dereferenced by the host.
  std::byte* address(PageId page) const;
  // The page at an address, or an invalid id when it lies outside every region.
  PageId find(const void* address) const noexcept;

  // A resident page may be written to from now on.
  virtual void allow_write(PageId page) = 0;
  virtual void forbid_write(PageId page) = 0;  // until allow_write: the next write traps

 protected:
  struct Region {
    std::byte* reservation = nullptr;
    std::size_t reservation_bytes = 0;
    std::byte* base = nullptr;
    PageRange pages;
  };
  // Addresses for `bytes` from Region::base on, a multiple of the page size. Region::pages is filled in by reserve().
  virtual Region reserve_region(std::size_t bytes) = 0;
  std::span<const Region> regions() const noexcept;
  const Region& region_of(PageId page) const;

 private:
  // Fixed storage, published by the count: the executor and the fault handler look addresses up while another
  // thread reserves the next region.
  std::size_t page_bytes_;
  std::unique_ptr<Region[]> storage_;  // in order of their pages
  std::atomic<std::size_t> region_count_{0};
  std::atomic<std::size_t> page_count_{0};
};

}  // namespace tp
