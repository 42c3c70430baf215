// SPDX-License-Identifier: Apache-2.0
// The thread that carries out the schedule. It alone moves frames and talks to the IoQueue; clients only change
// Residency and wake it. This file decides when a page moves; page_mover.hpp is how.
//
// One round:  decide (under the lock, no system call)  ->  carry out (no lock: unmap victims, submit reads, writes and
//             copies)  ->  wait for completions or a wake  ->  finish (map the frame, then, under the lock, tell the
//             waiters).
// Order of service: 1. demand: pages that somebody waits for and the schedule does not bring next; 2. the schedule's
// actions, in order, with at most inflight_bytes of prefetch in flight, so that a fault never queues behind more than
// that.
//
// Threads: start() and stop() by the owner. No GIL: nothing here knows Python. Errors: start() rethrows what setting up
// the mover threw.
#pragma once

#include <functional>
#include <memory>
#include <thread>

#include "pager/page_mover.hpp"
#include "pager/residency.hpp"

namespace tp {

class Executor {
 public:
  Executor(Residency& residency, std::unique_ptr<PageMover> mover);
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
  std::uint16_t add_file(File file, std::optional<QuantisedLayout> layout = std::nullopt) {
    return mover_->add_file(std::move(file), layout);
  }
  // See PageMover::read_backing. Any thread.
  void read_backing(const PageEntry& entry, PageId page, std::byte* destination) const {
    mover_->read_backing(entry, page, destination);
  }
  IoQueueFacts io_facts() const { return mover_->io().facts(); }
  IoQueueCounters io_counters() const { return mover_->io().counters(); }
  std::uint64_t spill_bytes() const noexcept { return mover_->spill_bytes(); }

 private:
  enum class Follow : std::uint8_t {
    next,     // this one is done with, look at the next
    idle,     // nothing that may start now
    full,     // enough in flight, or the next one can start when something in flight is done
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
  void fatal(const Error& error);

  Residency& residency_;
  std::unique_ptr<PageMover> mover_;
  std::unique_ptr<std::thread> thread_;
};

}  // namespace tp
