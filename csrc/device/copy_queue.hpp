// SPDX-License-Identifier: Apache-2.0
// Copies between host and device frames, on two streams of its own, one for each direction, so that both of the
// device's copy engines work at once.
//
// A copy is issued in pieces (to_device, zero, to_host) and closed by end_...(), which numbers it. It is done when that
// point of its timeline is reached: arrivals() for copies to the device, departures() for those to the host.
//
// Threads: the executor thread; the timelines from any. Blocking: never, once the device works: a stream takes about a
// thousand operations before the driver makes its caller wait, and the caller bounds what is in flight. Ownership: host
// memory and device addresses belong to the queue from the call until the point is reached. Errors: Error(device).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "device/cuda_device.hpp"
#include "device/event_timeline.hpp"
#include "device/kernels.hpp"
#include "device/quantised_page.hpp"

namespace tp {

class CopyQueue {
 public:
  explicit CopyQueue(std::shared_ptr<const CudaDevice> device);
  ~CopyQueue();
  CopyQueue(const CopyQueue&) = delete;
  CopyQueue& operator=(const CopyQueue&) = delete;

  void to_device(std::byte* device_address, const std::byte* host, std::size_t size_bytes);
  void zero(std::byte* device_address, std::size_t size_bytes);
  // The numbers of a page, out of its record in registered host memory (device/quantised_page.hpp).
  void dequantise(const Kernels& kernels, std::byte* device_address, const std::byte* record,
                  const QuantisedLayout& layout, std::size_t page_bytes);
  std::uint64_t end_to_device() { return arrivals_.record(to_device_); }
  void to_host(std::byte* host, const std::byte* device_address, std::size_t size_bytes);
  std::uint64_t end_to_host() { return departures_.record(to_host_); }

  // For what has to come behind copies; not to be waited in.
  cuda::Stream stream_to_device() const noexcept { return to_device_; }
  cuda::Stream stream_to_host() const noexcept { return to_host_; }

  EventTimeline& arrivals() noexcept { return arrivals_; }
  const EventTimeline& arrivals() const noexcept { return arrivals_; }
  const EventTimeline& departures() const noexcept { return departures_; }
  EventTimeline& departures() noexcept { return departures_; }
  std::uint64_t bytes_to_device() const noexcept { return bytes_to_device_.load(std::memory_order_relaxed); }
  std::uint64_t bytes_to_host() const noexcept { return bytes_to_host_.load(std::memory_order_relaxed); }

 private:
  std::shared_ptr<const CudaDevice> device_;
  cuda::Stream to_device_ = nullptr;
  cuda::Stream to_host_ = nullptr;
  EventTimeline arrivals_, departures_;
  std::atomic<std::uint64_t> bytes_to_device_{0}, bytes_to_host_{0};
};

}  // namespace tp
