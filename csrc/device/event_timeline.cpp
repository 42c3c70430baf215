// SPDX-License-Identifier: Apache-2.0
#include "device/event_timeline.hpp"

#include "base/check.hpp"

namespace tp {

EventTimeline::~EventTimeline() {
  const CudaDevice::Current current(*device_);
  const CudaDriver& driver = device_->driver();
  // Allowed while an event is pending: the driver frees it once it is reached.
  for (const Point& point : pending_) {
    if (point.event != nullptr) driver.cuEventDestroy.result(point.event);
  }
  for (const cuda::Event event : unused_) driver.cuEventDestroy.result(event);
  if (never_recorded_ != nullptr) driver.cuEventDestroy.result(never_recorded_);
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
  pending_.push_back({event, nullptr});
  return recorded_.fetch_add(1, std::memory_order_acq_rel) + 1;
}

std::uint64_t EventTimeline::record_mark(const std::uint32_t* mark) {
  const std::lock_guard lock(mutex_);
  if (never_recorded_ == nullptr) device_->driver().cuEventCreate(&never_recorded_, cuda::kEventDisableTiming);
  pending_.push_back({nullptr, mark});
  return recorded_.fetch_add(1, std::memory_order_acq_rel) + 1;
}

void EventTimeline::wait(cuda::Stream stream, std::uint64_t point) {
  if (point <= reached()) return;
  const std::lock_guard lock(mutex_);
  const std::uint64_t reached = reached_.load(std::memory_order_relaxed);
  if (point <= reached) return;
  TP_CHECK(point <= reached + pending_.size());
  const Point& pending = pending_[point - reached - 1];
  TP_CHECK(pending.event != nullptr);
  device_->driver().cuStreamWaitEvent(stream, pending.event, 0u);
}

std::uint64_t EventTimeline::poll() {
  const std::lock_guard lock(mutex_);
  while (!pending_.empty()) {
    const Point& point = pending_.front();
    if (point.mark != nullptr) {
      if (std::atomic_ref(*const_cast<std::uint32_t*>(point.mark)).load(std::memory_order_acquire) == 0) {
        throw_if_lost();
        break;
      }
    } else {
      const cuda::Result result = device_->driver().cuEventQuery.result(point.event);
      if (result == cuda::kErrorNotReady) break;
      if (result != cuda::kSuccess) throw device_->driver().error("cuEventQuery", result);
    }
    collect(point);
    pending_.pop_front();
    reached_.fetch_add(1, std::memory_order_acq_rel);
  }
  return reached();
}

// Nothing sets a mark any more when the context is lost, and a mark itself does not say so.
void EventTimeline::throw_if_lost() {
  const cuda::Result result = device_->driver().cuEventQuery.result(never_recorded_);
  if (context_is_lost(result)) throw device_->driver().error("cuEventQuery", result);
}

// A stream that was told to wait for an event has remembered the record, so that it may be recorded anew
// (cuStreamWaitEvent: "the most recent call to cuEventRecord" at the time of the call).
void EventTimeline::collect(const Point& point) {
  if (point.event != nullptr) unused_.push_back(point.event);
}

void EventTimeline::all_reached() {
  const std::lock_guard lock(mutex_);
  for (const Point& point : pending_) collect(point);
  reached_.fetch_add(pending_.size(), std::memory_order_acq_rel);
  pending_.clear();
}

}  // namespace tp
