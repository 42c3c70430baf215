// SPDX-License-Identifier: Apache-2.0
// Records which sets one thread acquires and releases: the steps of a run. Dry, it replaces paging altogether, so that
// a run on fake tensors (no memory) leaves the same record as a real one.
//
// Threads: begin and end by the recorded thread; other threads are neither recorded nor dry. Blocking: never.
// Errors: Error(invalid) for begin without end, or end without begin.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "base/ids.hpp"

namespace tp {

class Recorder {
 public:
  void begin(bool dry);
  // +(set + 1) for an acquire, -(set + 1) for a release, in order.
  std::vector<std::int32_t> end();
  // Nothing is being recorded on this thread: the usual case, one relaxed load.
  bool off() const noexcept {
    return !on_.load(std::memory_order_relaxed) || thread_.load() != std::this_thread::get_id();
  }
  bool dry() const noexcept { return dry_; }
  void acquired(SetId set);
  void released(SetId set);

 private:
  std::atomic<bool> on_{false};
  std::atomic<std::thread::id> thread_{};
  bool dry_ = false;
  std::vector<std::int32_t> events_;
};

}  // namespace tp
