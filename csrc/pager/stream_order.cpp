// SPDX-License-Identifier: Apache-2.0
#include "pager/stream_order.hpp"

#include <algorithm>

namespace tp {
namespace {

// Of releases: a call to the driver for each is enough, and no list of events grows without end.
constexpr std::uint64_t kReleasesUncollectedMax = 256;

}  // namespace

StreamOrder::Capture StreamOrder::capture_of(cuda::Stream stream) const {
  int status = cuda::kStreamCaptureStatusNone;
  const cuda::Result result = device_->driver().cuStreamIsCapturing.result(stream, &status);
  if (result == cuda::kErrorStreamCaptureImplicit) return Capture::forbids_stream;
  // Any other error comes again from the call that this one is made for.
  return result == cuda::kSuccess && status != cuda::kStreamCaptureStatusNone ? Capture::active : Capture::none;
}

void StreamOrder::refuse_capture(cuda::Stream stream) {
  settle();
  const CudaDevice::Current current(*device_);
  if (capture_of(stream) == Capture::none) return;
  throw Error(ErrorKind::device,
              "paged tensors are used while a CUDA graph is captured: a graph would read their addresses when it is "
              "replayed, and nobody would bring the pages in. Capture the step with Pager.capture(), which brings them "
              "in between the pieces of a graph, or run it without a graph",
              cuda::kErrorStreamCaptureUnsupported);
}

void StreamOrder::wait_for_copies(cuda::Stream stream, std::uint64_t copy_point) {
  if (copy_point <= copies_.arrivals().reached()) return;
  const CudaDevice::Current current(*device_);
  copies_.arrivals().wait(stream, copy_point);
}

// The point of the releases after which the frames may be taken; 0, that is now, on a device that is lost: nothing
// there will read them, and whoever acquires next gets the error.
std::uint64_t StreamOrder::release_point(cuda::Stream stream) {
  const CudaDevice::Current current(*device_);
  try {
    const std::uint64_t point = releases_.record(stream);
    // The executor sleeps while all is resident; the events that are reached are its to collect.
    if ((point - releases_.reached()) % kReleasesUncollectedMax == 0) residency_.wake();
    return point;
  } catch (const Error& error) {
    if (context_is_lost(error.error_number())) {
      residency_.device_lost(error);
      return 0;
    }
    // No event could be had: wait for the stream instead.
    device_->driver().cuStreamSynchronize(stream);
    return 0;
  }
}

void StreamOrder::release(SetId set, cuda::Stream stream) {
  settle();
  // Throws when the point can't be told: then nothing has been released.
  residency_.release(set, postpone(set, stream) ? 0 : release_point(stream));
}

void StreamOrder::release(Ticket& ticket, cuda::Stream stream) {
  settle();
  ticket.release(postpone(ticket.set(), stream) ? 0 : release_point(stream));
}

// Holds the pages once more while the stream is captured.
bool StreamOrder::postpone(SetId set, cuda::Stream stream) {
  {
    const CudaDevice::Current current(*device_);
    if (capture_of(stream) == Capture::none) return false;
  }
  auto pins = std::make_unique<Ticket>(residency_, set);
  const std::lock_guard lock(mutex_);
  postponed_.push_back({stream, std::move(pins)});
  any_postponed_.store(true, std::memory_order_relaxed);
  return true;
}

void StreamOrder::settle() {
  if (!any_postponed_.load(std::memory_order_relaxed)) return;
  const CudaDevice::Current current(*device_);
  const std::lock_guard lock(mutex_);
  const auto settled = [this](Postponed& each) {
    if (capture_of(each.stream) != Capture::none) return false;
    each.pins->release(release_point(each.stream));
    return true;
  };
  postponed_.erase(std::remove_if(postponed_.begin(), postponed_.end(), settled), postponed_.end());
  any_postponed_.store(!postponed_.empty(), std::memory_order_relaxed);
}

void StreamOrder::forget() noexcept {
  const std::lock_guard lock(mutex_);
  for (Postponed& each : postponed_) static_cast<void>(each.pins.release());
  postponed_.clear();
  any_postponed_.store(false, std::memory_order_relaxed);
}

}  // namespace tp
