// SPDX-License-Identifier: Apache-2.0
#include "mem/device_frame_pool.hpp"

#include <algorithm>
#include <string>

#include "base/check.hpp"
#include "base/error.hpp"
#include "base/limits.hpp"

namespace tp {
namespace {

std::string mebibytes(std::uint64_t bytes) { return std::to_string(bytes / kMiB) + " MiB"; }

}  // namespace

DeviceFramePool::DeviceFramePool(std::shared_ptr<const CudaDevice> device, std::uint64_t budget_bytes,
                                 std::size_t page_bytes)
    : device_(std::move(device)), page_bytes_(page_bytes) {
  const std::size_t frame_count = budget_bytes / page_bytes;
  TP_CHECK(page_bytes % device_->facts().granularity_bytes == 0);
  if (frame_count < kFramesMin) {
    throw Error(ErrorKind::budget, "the device budget of " + mebibytes(budget_bytes) + " holds " +
                                       std::to_string(frame_count) + " frames of " + mebibytes(page_bytes) +
                                       "; at least " + std::to_string(kFramesMin) + " are needed (" +
                                       mebibytes(kFramesMin * page_bytes) + ")");
  }
  const CudaDevice::Current current(*device_);
  const cuda::MemAllocationProp prop = device_->allocation_prop();
  handles_.reserve(frame_count);
  for (std::size_t frame = 0; frame < frame_count; ++frame) {
    cuda::AllocationHandle handle = 0;
    const cuda::Result result = device_->driver().cuMemCreate.result(&handle, page_bytes_, &prop, 0ull);
    if (result == cuda::kSuccess) {
      handles_.push_back(handle);
      continue;
    }
    const std::uint64_t got_bytes = frame * page_bytes_;
    release_all();
    const Error error = device_->driver().error("cuMemCreate", result);
    throw Error(error.kind(),
                "the device budget of " + mebibytes(budget_bytes) + " could not be allocated on '" +
                    device_->facts().name + "' (" + mebibytes(got_bytes) + " could): " + error.what(),
                result);
  }
  taken_.assign(frame_count, false);
  for (std::size_t frame = frame_count; frame-- > 0;) free_.push_back(FrameId{static_cast<std::uint32_t>(frame)});
}

DeviceFramePool::~DeviceFramePool() {
  const CudaDevice::Current current(*device_);
  release_all();
}

void DeviceFramePool::release_all() noexcept {
  for (const cuda::AllocationHandle handle : handles_) device_->driver().cuMemRelease.result(handle);
  handles_.clear();
}

cuda::AllocationHandle DeviceFramePool::handle(FrameId frame) const {
  TP_CHECK(frame.value < handles_.size());
  return handles_[frame.value];
}

FrameId DeviceFramePool::take() {
  TP_CHECK(!free_.empty());
  const FrameId frame = free_.back();
  free_.pop_back();
  TP_CHECK(!taken_[frame.value]);
  taken_[frame.value] = true;
  frames_in_use_max_ = std::max<std::uint64_t>(frames_in_use_max_.load(), handles_.size() - free_.size());
  return frame;
}

void DeviceFramePool::put(FrameId frame) {
  TP_CHECK(frame.value < handles_.size() && taken_[frame.value]);
  taken_[frame.value] = false;
  free_.push_back(frame);
}

}  // namespace tp
