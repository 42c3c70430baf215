// SPDX-License-Identifier: Apache-2.0
// How page operations are ordered with what callers' streams of a device do: a stream waits for copies, and marks where
// it lets pages go. And what that means in a capture.
//
// A stream that is captured into a CUDA graph does nothing now, so it can neither wait for a copy of now nor mark a
// point that anybody will come past. An acquire there is refused, by refuse_capture(). A release must not fail: it is
// kept until the stream is not captured any more, and until then the pages stay held. settle() ends such releases.
//
// Threads: any. Blocking: release() waits for its stream where no event can be had, else never. Ownership: what it is
// made of outlives it. Errors: Error(device).
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "device/copy_queue.hpp"
#include "pager/residency.hpp"
#include "pager/ticket.hpp"

namespace tp {

class StreamOrder {
 public:
  StreamOrder(std::shared_ptr<const CudaDevice> device, CopyQueue& copies, EventTimeline& releases,
              Residency& residency)
      : device_(std::move(device)), copies_(copies), releases_(releases), residency_(residency) {}
  StreamOrder(const StreamOrder&) = delete;
  StreamOrder& operator=(const StreamOrder&) = delete;

  // Error(device) when the stream is captured, or can't be used because another one is.
  void refuse_capture(cuda::Stream stream);
  // What the stream gets from now on starts when the copies up to that point are done.
  void wait_for_copies(cuda::Stream stream, std::uint64_t copy_point);
  void release(SetId set, cuda::Stream stream);
  void release(Ticket& ticket, cuda::Stream stream);
  // Makes up for releases in captures that are over. Called by the other methods.
  void settle();
  // In a child of fork(), and once the device is closed: forgets them.
  void forget() noexcept;

 private:
  struct Postponed {
    cuda::Stream stream = nullptr;
    std::unique_ptr<Ticket> pins;
  };
  enum class Capture : std::uint8_t { none, active, forbids_stream };
  Capture capture_of(cuda::Stream stream) const;
  std::uint64_t release_point(cuda::Stream stream);
  bool postpone(SetId set, cuda::Stream stream);

  std::shared_ptr<const CudaDevice> device_;
  CopyQueue& copies_;
  EventTimeline& releases_;
  Residency& residency_;
  std::atomic<bool> any_postponed_{false};
  std::mutex mutex_;  // over those below
  std::vector<Postponed> postponed_;
};

}  // namespace tp
