// SPDX-License-Identifier: Apache-2.0
// A thread with an IoQueue of its own, which takes blocks of pending transfers as long as there are any and keeps as
// many of them in flight as the queue is deep. Bounced blocks are copied on this thread, while others are in flight.
//
// Threads: made, woken and destroyed by anybody, destroyed when no transfer is pending; the queue is the thread's own
// once it runs. Blocking: nothing but the destructor, for the thread's end. Errors: what a block fails with goes to its
// transfer. When the kernel refuses the queue itself, every transfer fails with that, from now on.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "base/huge_memory.hpp"
#include "io/io_queue.hpp"
#include "io/pending_transfers.hpp"

namespace tp {

class TransferWorker {
 public:
  // one_at_a_time: a system call for each block, instead of one for as many as there are.
  TransferWorker(std::unique_ptr<IoQueue> queue, PendingTransfers& pending, std::uint32_t block_bytes,
                 bool one_at_a_time);
  ~TransferWorker();
  TransferWorker(const TransferWorker&) = delete;
  TransferWorker& operator=(const TransferWorker&) = delete;

  // Makes the memory that blocks are bounced through, once. Before the first transfer that needs it is pending; one
  // thread at a time. Error(memory).
  void make_bounce_memory();
  void wake() noexcept;  // there are blocks to take, perhaps
  IoQueueCounters counters() const;
  std::uint64_t bounced_bytes() const noexcept { return bounced_bytes_.load(std::memory_order_relaxed); }

 private:
  struct Flight {
    PendingTransfers::Pointer transfer;
    TransferBlock block;
    std::byte* bounce = nullptr;  // where the block is instead, when it is bounced
  };
  // A transfer that this queue has the files of.
  struct Joined {
    PendingTransfers::Pointer transfer;
    FileId file, cached;
    unsigned in_flight = 0;
  };

  void run();
  bool round();
  void take_blocks();
  void send(PendingTransfers::Taken taken);
  void submit();
  void land(const IoCompletion& completion);
  void copy_arrivals();
  Joined& join(const PendingTransfers::Pointer& transfer);
  FileId file_of(Joined& joined, TransferBlock::Way way);
  void leave_transfers();
  void give_up(const Error& error);

  PendingTransfers& pending_;
  const std::uint32_t bounce_bytes_;  // of one block
  const std::size_t bounce_slots_;
  const bool one_at_a_time_;
  HugeMemory bounce_memory_;
  std::atomic<std::uint64_t> bounced_bytes_{0};
  std::atomic<bool> looking_{false};  // has room for blocks, and may find none
  std::atomic<bool> stopping_{false};

  mutable std::mutex queue_mutex_;  // of the pointer, which give_up() takes from who would wake
  std::unique_ptr<IoQueue> queue_;
  IoQueueCounters last_counters_;  // when the queue is no more

  // The thread's own.
  std::vector<Flight> flights_;  // by token
  std::vector<std::uint64_t> free_tokens_;
  std::vector<std::byte*> free_bounces_;
  std::size_t bounces_made_ = 0;
  std::vector<IoRequest> requests_;
  std::vector<IoCompletion> completions_;
  std::vector<Flight> arrivals_;  // read, not yet copied to where they belong
  std::vector<Joined> joined_;

  std::thread thread_;
};

}  // namespace tp
