// SPDX-License-Identifier: Apache-2.0
// The CopyQueue contract: the second half of a page's way, between its host frame and its device frame.
//
// Every page-in passes READING -> HOST -> COPYING_IN -> DEVICE and every eviction the way back, on every device, so
// that the executor is written once. On the host device the two frames are one: HostCopyQueue completes a request at
// the next poll() and moves no byte. A CUDA queue issues the copy on a stream of its own and completes when its event
// has.
//
// Threads: the executor thread only. Blocking: never. Ownership: both frames belong to the queue from submit() to the
// completion.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace tp {

enum class CopyDirection : std::uint8_t { to_device, to_host };

struct CopyRequest {
  std::uint64_t token = 0;  // the caller's; comes back in the completion
  CopyDirection direction = CopyDirection::to_device;
  std::byte* host = nullptr;
  std::uintptr_t device = 0;
  std::size_t size_bytes = 0;
};

struct CopyCompletion {
  std::uint64_t token = 0;
  int error = 0;  // 0, or the device's own error number
};

class CopyQueue {
 public:
  virtual ~CopyQueue() = default;
  virtual void submit(const CopyRequest& request) = 0;
  virtual std::size_t poll(std::vector<CopyCompletion>& completions) = 0;  // appends; returns how many
};

std::unique_ptr<CopyQueue> make_host_copy_queue();

}  // namespace tp
