// SPDX-License-Identifier: Apache-2.0
// A fixed number of frames of device memory: the hard byte budget of the device tier. Physical memory without an
// address; DeviceAddressSpace puts it under one.
//
// Threads: the executor thread owns it after construction; counters from any. Blocking: the constructor allocates
// everything. Errors: Error(memory) when the device has not so much free, Error(budget) when the budget is less than
// kFramesMin frames, Error(device). take() on an empty pool is an assertion.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/ids.hpp"
#include "device/cuda_device.hpp"

namespace tp {

class DeviceFramePool {
 public:
  DeviceFramePool(std::shared_ptr<const CudaDevice> device, std::uint64_t budget_bytes, std::size_t page_bytes);
  ~DeviceFramePool();
  DeviceFramePool(const DeviceFramePool&) = delete;
  DeviceFramePool& operator=(const DeviceFramePool&) = delete;

  std::size_t page_bytes() const noexcept { return page_bytes_; }
  std::size_t frame_count() const noexcept { return handles_.size(); }
  std::size_t free_count() const noexcept { return free_.size(); }
  cuda::AllocationHandle handle(FrameId frame) const;
  FrameId take();
  void put(FrameId frame);
  std::uint64_t bytes_in_use_max() const noexcept { return frames_in_use_max_.load() * page_bytes_; }

 private:
  void release_all() noexcept;
  std::shared_ptr<const CudaDevice> device_;
  std::size_t page_bytes_;
  std::vector<cuda::AllocationHandle> handles_;
  std::vector<FrameId> free_;
  std::vector<bool> taken_;
  std::atomic<std::uint64_t> frames_in_use_max_{0};
};

}  // namespace tp
