// SPDX-License-Identifier: Apache-2.0
#include "device/event_timeline.hpp"

#include "base/check.hpp"

namespace tp {

EventTimeline::~EventTimeline() {
  const CudaDevice::Current current(*device_);
  const CudaDriver& driver = device_->driver();
  // Allowed while an event is pending: the driver frees it once it is reached.
  for (const cuda::Event event : pending_) driver.cuEventDestroy.result(event);
  for (const cuda::Event event : unused_) driver.cuEventDestroy.result(event);
}

std::uint64_t EventTimeline::record(cuda::Stream stream) {
  const std::lock_guard lock(mutex_);
  const CudaDriver& driver = device_->driver();
  if (unused_.empty()) {
    cuda::Event made = nullptr;
    driver.cuEventCreate(&made, cuda::kEventDisableTiming);
    unused_.push_back(made);
  }
  const cuda::Event event = unused_.back();
  driver.cuEventRecord(event, stream);
  unused_.pop_back();
  pending_.push_back(event);
  return recorded_.fetch_add(1, std::memory_order_acq_rel) + 1;
}

void EventTimeline::wait(cuda::Stream stream, std::uint64_t point) {
  if (point <= reached()) return;
  const std::lock_guard lock(mutex_);
  const std::uint64_t reached = reached_.load(std::memory_order_relaxed);
  if (point <= reached) return;
  TP_CHECK(point <= reached + pending_.size());
  device_->driver().cuStreamWaitEvent(stream, pending_[point - reached - 1], 0u);
}

std::uint64_t EventTimeline::poll() {
  const std::lock_guard lock(mutex_);
  while (!pending_.empty()) {
    const cuda::Result result = device_->driver().cuEventQuery.result(pending_.front());
    if (result == cuda::kErrorNotReady) break;
    if (result != cuda::kSuccess) throw device_->driver().error("cuEventQuery", result);
    // A stream that was told to wait for it has remembered the record, so that it may be recorded anew
    // (cuStreamWaitEvent: "the most recent call to cuEventRecord" at the time of the call).
    unused_.push_back(pending_.front());
    pending_.pop_front();
    reached_.fetch_add(1, std::memory_order_acq_rel);
  }
  return reached();
}

void EventTimeline::all_reached() {
  const std::lock_guard lock(mutex_);
  unused_.insert(unused_.end(), pending_.begin(), pending_.end());
  reached_.fetch_add(pending_.size(), std::memory_order_acq_rel);
  pending_.clear();
}

}  // namespace tp
