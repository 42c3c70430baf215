// SPDX-License-Identifier: Apache-2.0
// The device's address space: private addresses for every page, under which frames are mapped by the driver's virtual
// memory management (CUDA driver API, "Virtual Memory Management"). An absent page has nothing behind its address: a
// kernel that touches it ends with an illegal address.
//
// Mapping is not ordered with streams: whoever unmaps a page has seen that no work that uses it is left, and whoever
// maps one does so before the copy into it is issued. Consecutive pages are unmapped and opened by one call for the
// whole run; no call here waits for the device.
//
// Threads: beside AddressSpace's: map/unmap/discard by the executor thread, or with it stopped. Blocking: driver calls
// only. Errors: Error(device), Error(memory).
#pragma once

#include <memory>
#include <span>

#include "mem/address_space.hpp"
#include "mem/device_frame_pool.hpp"

namespace tp {

struct PageMapping {
  PageId page;
  FrameId frame;
};

class DeviceAddressSpace final : public AddressSpace {
 public:
  DeviceAddressSpace(std::shared_ptr<const CudaDevice> device, std::size_t page_bytes);
  ~DeviceAddressSpace() override;  // nothing may be mapped any more

  const CudaDevice& device() const noexcept { return *device_; }
  // In any order; sorts them.
  void map(const DeviceFramePool& pool, std::span<PageMapping> mappings);
  void unmap(std::span<PageId> pages);
  // Every mapping there is, whatever the driver answers: for the end.
  void discard() noexcept;
  // Pages are always writable for the device; who writes to one says so (Pager::mark_written).
  void allow_write(PageId) override {}
  void forbid_write(PageId) override {}

  std::uint64_t driver_calls() const noexcept { return driver_calls_.load(std::memory_order_relaxed); }

 private:
  Region reserve_region(std::size_t bytes) override;
  std::size_t run_length(std::span<const PageId> pages) const;

  std::shared_ptr<const CudaDevice> device_;
  std::vector<bool> mapped_;  // by page
  std::atomic<std::uint64_t> driver_calls_{0};
};

}  // namespace tp
