// SPDX-License-Identifier: Apache-2.0
// The thread that carries out the schedule. It alone moves frames and talks to the IoQueue; clients only change
// Residency and wake it.
//
// One round:  decide (under the lock, no system call)  ->  carry out (no lock: unmap victims, submit reads and writes)
//             ->  wait for completions or a wake       ->  finish (map the frame, then, under the lock, tell the
//             waiters).
// Order of service: 1. demand: pages that somebody waits for and the schedule does not bring next; 2. the schedule's
// actions, in order, with
//   at most inflight_bytes of prefetch in flight, so that a fault never queues behind more than that.
// A clean victim is dropped in the round that takes its frame. A dirty one is written back first; its frame is free
// when the write is finished.
//
// Threads: start() and stop() by the owner. No GIL: nothing here knows Python. Errors: start() rethrows what setting up
// the engine threw;
//   a failed page-in fails those who wait for the page; a failed writeback puts the page back at its address, still
//   dirty, and from then on only clean pages are evicted: who needs a frame that only a writeback could free gets the
//   spill's error.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "device/copy_queue.hpp"
#include "io/file.hpp"
#include "io/io_queue.hpp"
#include "mem/address_space.hpp"
#include "mem/frame_pool.hpp"
#include "pager/residency.hpp"
#include "pager/spill.hpp"
#include "pager/transfer.hpp"

namespace tp {

struct ExecutorOptions {
  std::function<std::unique_ptr<IoQueue>()> make_queue;  // called on the executor thread, which is the queue's owner
  std::uint64_t inflight_bytes = 0;                      // of prefetch
  std::string spill_directory;
};

class Executor {
 public:
  Executor(Residency& residency, AddressSpace& space, FramePool& pool, ExecutorOptions options);
  ~Executor();  // stops
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  void start();
  // Stops starting transfers, waits for those in flight, fails every waiter with Error(closed), joins the thread.
  // Idempotent.
  void stop() noexcept;
  // In a child of fork() the thread does not exist: forget it.
  void abandon() noexcept;

  // Files of checkpoints; the returned index goes into PageEntry::file. Under the residency's lock.
  std::uint16_t add_file(File file);
  IoQueueFacts io_facts() const;
  IoQueueCounters io_counters() const;
  std::uint64_t spill_bytes() const noexcept { return spill_bytes_.load(); }

 private:
  struct Job {      // decided under the lock, carried out without it
    PageId victim;  // leaves its address first, if valid
    PageId page;    // comes in, if valid; else the victim is written back
    FrameId frame;
    PageSource source;
  };
  enum class Start : std::uint8_t { started, no_room, no_frame };
  enum class Purpose : std::uint8_t { demand, prefetch };
  enum class Follow : std::uint8_t {
    next,     // this one is done with, look at the next
    idle,     // nothing that may start now
    full,     // enough in flight
    blocked,  // the next one can't start although its turn has come
  };

  void run(std::function<void(std::exception_ptr)> ready);
  bool round();
  bool decide();  // false once the pager is closing
  void serve_waiters(Purpose purpose, bool also_scheduled);
  bool serve_waiter(Waiter& waiter, Purpose purpose, bool also_scheduled);
  bool scheduled_soon(PageId page, std::int64_t step) const;
  Follow follow_schedule();
  Follow follow_initial();
  Follow follow_catch_up();
  Follow follow_action();
  // `planned_victim` if it can go; else any page that is next used after step `used_after`.
  Start start_page_in(PageId page, Purpose purpose, PageId planned_victim, std::int64_t used_after);
  std::optional<FrameId> free_a_frame(PageId planned_victim, std::int64_t used_after, PageId& dropped);
  void begin_writeback(PageId victim);
  bool evictable(PageId page) const;
  PageSource source_of(const PageEntry& entry) const;
  void carry_out();
  void carry_out_writeback(const Job& job);
  void finish(FinishedTransfer& transfer);
  void finish_page_in(const FinishedTransfer& transfer);
  void finish_writeback(const FinishedTransfer& transfer);
  void writeback_failed(PageId page, FrameId frame, const Error& error);
  void fatal(const Error& error);

  Residency& residency_;
  AddressSpace& space_;
  FramePool& pool_;
  ExecutorOptions options_;
  std::deque<File> files_;  // stable addresses
  Spill spill_;
  std::optional<Error> spill_error_;
  std::unique_ptr<TransferQueue> transfers_;
  std::unique_ptr<CopyQueue> copies_;
  std::vector<Job> jobs_;
  std::vector<FinishedTransfer> finished_;
  std::vector<CopyCompletion> copied_;
  std::size_t writebacks_in_flight_ = 0;
  std::size_t prefetch_transfers_max_ = 1;
  bool decide_again_ = false;  // carrying out changed what was decided: don't wait
  std::atomic<std::uint64_t> spill_bytes_{0};
  std::unique_ptr<std::thread> thread_;
};

}  // namespace tp
