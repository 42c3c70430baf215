// SPDX-License-Identifier: Apache-2.0
// Points in the work of streams, numbered 1, 2, 3, ... A point is *reached* when the device has done everything that
// its stream held when it was recorded, or, of a mark, when the mark is set. reached() counts the points before which
// all are: with several streams a later point may be there already while an earlier one is not, and is then not counted
// yet.
//
// Threads: any; one lock, held for a driver call that does not wait. Blocking: never: wait() makes the stream wait, not
// the caller. Errors: Error(device). The stream's context is current for the calling thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "device/cuda_device.hpp"

namespace tp {

class EventTimeline {
 public:
  explicit EventTimeline(std::shared_ptr<const CudaDevice> device) : device_(std::move(device)) {}
  ~EventTimeline();
  EventTimeline(const EventTimeline&) = delete;
  EventTimeline& operator=(const EventTimeline&) = delete;

  // A point behind all that the stream holds now; its number.
  std::uint64_t record(cuda::Stream stream);
  // A point that is reached when the device has written something else than 0 there. The mark stays until then, and is
  // cleared by its owner afterwards.
  std::uint64_t record_mark(const std::uint32_t* mark);
  // What the stream gets from now on starts after that point, which is no mark. Nothing for points that are reached.
  void wait(cuda::Stream stream, std::uint64_t point);
  std::uint64_t reached() const noexcept { return reached_.load(std::memory_order_acquire); }
  std::uint64_t recorded() const noexcept { return recorded_.load(std::memory_order_acquire); }
  // Asks the device; returns reached().
  std::uint64_t poll();
  // The context was synchronised since the last record(): every point is reached.
  void all_reached();

 private:
  struct Point {
    cuda::Event event = nullptr;
    const std::uint32_t* mark = nullptr;  // instead
  };
  void collect(const Point& point);
  void throw_if_lost();

  std::shared_ptr<const CudaDevice> device_;
  std::mutex mutex_;
  std::deque<Point> pending_;  // the points after reached_, in order
  std::vector<cuda::Event> unused_;
  cuda::Event never_recorded_ = nullptr;  // to ask for the context's error by, while a mark is waited for
  std::atomic<std::uint64_t> recorded_{0};
  std::atomic<std::uint64_t> reached_{0};
};

}  // namespace tp
