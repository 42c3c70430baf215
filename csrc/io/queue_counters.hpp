// SPDX-License-Identifier: Apache-2.0
// IoQueueCounters that any thread may read while the engine counts.
#pragma once

#include <atomic>
#include <cstdint>

#include "io/io_queue.hpp"
#include "io/transfer_progress.hpp"

namespace tp {

class QueueCounters {
 public:
  void count_request() noexcept { add(requests_, 1); }
  void count_system_call() noexcept { add(system_calls_, 1); }
  void count_result(const TransferProgress& progress) noexcept {
    if (progress.last_was_short()) add(short_transfers_, 1);
    if (progress.last_was_retry()) add(retries_, 1);
  }
  void count_completion(IoOp op, const IoCompletion& completion) noexcept {
    add(completions_, 1);
    add(op == IoOp::read ? bytes_read_ : bytes_written_, completion.transferred_bytes);
  }

  IoQueueCounters snapshot() const noexcept {
    IoQueueCounters counters;
    counters.requests = requests_.load(std::memory_order_relaxed);
    counters.completions = completions_.load(std::memory_order_relaxed);
    counters.bytes_read = bytes_read_.load(std::memory_order_relaxed);
    counters.bytes_written = bytes_written_.load(std::memory_order_relaxed);
    counters.short_transfers = short_transfers_.load(std::memory_order_relaxed);
    counters.retries = retries_.load(std::memory_order_relaxed);
    counters.system_calls = system_calls_.load(std::memory_order_relaxed);
    return counters;
  }

 private:
  using Count = std::atomic<std::uint64_t>;
  static void add(Count& count, std::uint64_t by) noexcept { count.fetch_add(by, std::memory_order_relaxed); }

  Count requests_{0}, completions_{0}, bytes_read_{0}, bytes_written_{0};
  Count short_transfers_{0}, retries_{0}, system_calls_{0};
};

}  // namespace tp
