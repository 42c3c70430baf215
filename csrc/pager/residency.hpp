// SPDX-License-Identifier: Apache-2.0
// The state that clients and the executor share, under one lock: page table, sets, pins, the schedule's tape, the
// threads that wait, counters and events. Clients come in by acquire / release / touch; the executor decides with the
// members below the line.
//
// Threads: any. The lock is held for table updates only, never across a system call that can block (waking the executor
// and opening one
//   page for writing are the two short ones).
// Blocking: acquire and touch wait until the pages are resident; acquire calls `interrupted` at least every 50 ms, and
// what it throws
//   leaves nothing acquired. Everything else returns at once.
// Ownership: a pinned page stays at its address until the last release. Pages can be pinned before they arrive.
// Errors: acquire throws Error(budget) when the pins would leave no frame to fault with, Error(io) when a page can't be
// read, Error(closed).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "base/ids.hpp"
#include "io/io_queue.hpp"
#include "mem/address_space.hpp"
#include "pager/event_ring.hpp"
#include "pager/page_store.hpp"
#include "pager/page_table.hpp"
#include "pager/tape.hpp"

namespace tp {

// Frames that no pin may take on the host, so that a stray access always finds room: one instruction can touch two
// addresses, each across a page border. On a device nothing faults, and pins may take every frame.
inline constexpr std::size_t kFaultFrames = 4;

struct PageSet {
  std::string name;
  std::vector<PageId> pages;  // ascending
};

struct Counters {
  std::uint64_t acquires = 0, releases = 0;
  std::uint64_t page_accesses = 0;           // pages over all acquires
  std::uint64_t page_accesses_resident = 0;  // of these, resident at once
  std::uint64_t page_ins = 0;                // pages brought in
  std::uint64_t prefetches = 0;              // of these, by the schedule
  std::uint64_t faults = 0;                  // of these, on demand
  std::uint64_t zero_fills = 0;              // of these, without I/O
  std::uint64_t host_hits = 0;               // of these, from the host tier of a device, without a read
  std::uint64_t reads = 0;                   // pages read into the host tier of a device
  std::uint64_t direct_reads = 0;            // pages read straight into a device
  std::uint64_t copies_out = 0;              // pages copied from a device to its host tier
  std::uint64_t dequantised = 0;             // pages made of their codes
  std::uint64_t dequantised_on_device = 0;   // of these, on their way into a device
  std::uint64_t evictions = 0;
  std::uint64_t writebacks = 0;
  std::uint64_t stalls = 0;  // acquires and touches that had to wait
  std::uint64_t stall_ns = 0;
  std::uint64_t touches = 0;   // raw accesses that trapped
  std::uint64_t failures = 0;  // transfers that failed
  std::uint64_t passes = 0;
  std::uint64_t pinned_pages_max = 0;
};

struct TapeCounters {
  std::int64_t position = 0;
  std::uint64_t switches = 0, jumps = 0, off_schedule = 0;
};

// One thread that waits for pages. Lives on that thread's stack, linked under the lock, unlinked before it is told.
struct Waiter {
  std::span<const PageId> pages;  // ascending
  std::int64_t step = -1;         // absolute, -1: off schedule
  std::uint32_t missing = 0;
  bool prefetch = false;                  // a ticket: served after demand
  std::atomic<std::uint32_t> outcome{0};  // 0: waits; 1: all resident; 2: failed (residency has the error)
  ErrorKind error_kind = ErrorKind::io;
  int error_number = 0;
  const char* error_message = nullptr;  // owned by Residency, for the life of it
  Waiter* next = nullptr;
};

// How far a device's timelines are, as last seen by the executor.
struct ReachedPoints {
  std::uint64_t copies_in = 0, copies_out = 0, releases = 0;
};

class Residency {
 public:
  using Interrupted = std::function<void()>;  // throws to stop the wait

  // tiers: 1 on the host, 2 on a device. frame_count: of the upper tier.
  Residency(AddressSpace& space, std::size_t frame_count, std::size_t event_capacity, int tiers = 1);

  // -- clients
  void append_pages(std::span<const PageEntry> entries);
  SetId add_set(std::string name, std::vector<PageId> pages);
  const PageSet& set(SetId id) const;  // stays valid
  std::size_t set_count() const;
  // The point of the copies to the device behind which all pages are there; 0 on the host.
  std::uint64_t acquire(SetId id, AcquireKind kind, const Interrupted& interrupted);
  // release_point: what the device has to reach before a frame of these pages may be taken.
  void release(SetId id, std::uint64_t release_point = 0);
  // The device writes to the pages, which are acquired.
  void mark_written(SetId id);
  // The three moments of a Ticket. end_ticket takes the waiter off the list if it still waits.
  void begin_ticket(SetId id, Waiter& waiter);
  std::uint64_t finish_ticket(SetId id, Waiter& waiter, const Interrupted& interrupted);  // as acquire
  void end_ticket(SetId id, Waiter& waiter, std::uint64_t release_point) noexcept;
  bool try_fit(std::size_t page_count) const;  // could so many pages be pinned now?
  // Nobody wants what these pages hold: what is dirty need not be written, and what was spilled need not be read. Until
  // they are acquired, or wanted() again, they show zeros or what they held, and what is written to them may be lost.
  // Returns how many; pages in use or on their way, those of files, and all on a device stay as they are.
  std::size_t discard(std::span<const PageId> pages);
  // Ends that, without bringing anything in: from now on what is written to the pages is kept.
  void wanted(std::span<const PageId> pages);
  // For PageFlush, on the host. A flushed page is pinned, clean, and traps writes from begin_flush() on; end_flush()
  // gives it its new record, or without one makes it modified again.
  enum class FlushOutcome : std::uint8_t { begun, nothing_to_write, on_its_way, no_room };
  struct FlushedPage {
    FlushOutcome outcome = FlushOutcome::nothing_to_write;
    std::uint32_t generation = 0;
    Extent extent;  // where it is stored so far
  };
  std::vector<PageId> modified_pages() const;
  FlushedPage begin_flush(PageId page);  // Error(closed), Error(memory)
  bool flush_undisturbed(PageId page) const;
  void end_flush(PageId page, const PageRecord* stored) noexcept;
  // A raw access trapped: waits until the page is resident (and writable). False: it can't be had, `reason` says why.
  bool touch(PageId page, bool write, const char** reason) noexcept;
  void begin_pass();
  // The only known schedule from now on, followed from its start; nothing: none is known.
  void set_schedule(std::optional<Schedule> schedule);
  // Known beside the others. The first is followed at once, any other when follow_schedule says so or a pass turns out
  // to take its steps. Error(invalid) when kSchedulesMax are known.
  ScheduleId add_schedule(Schedule schedule, ScheduleKind kind);
  void follow_schedule(ScheduleId id);  // from its start; Error(invalid)
  void forget_schedule(ScheduleId id);  // Error(invalid)
  std::optional<ScheduleId> followed_schedule() const;
  std::optional<SetId> next_set() const;  // what the followed schedule expects to be acquired next
  Counters counters() const;
  std::vector<Event> events() const;
  std::uint64_t events_overwritten() const;
  void reset_statistics();
  std::vector<std::uint8_t> page_states() const;
  std::size_t pinned_pages() const;
  bool is_poisoned() const;
  std::size_t pinnable_pages() const noexcept { return frame_count_ - fault_frames_; }
  TapeCounters tape_counters() const;  // zeros while no schedule is known

  // ---- the executor's side: call with `mutex` held ----
  mutable std::mutex mutex;
  PageTable table;
  Counters counts;
  std::unique_ptr<Tape> tape;
  std::vector<PageId> frame_page;  // by frame: the page that is resident in it, or invalid
  ReachedPoints reached;
  bool store_may_have_room = false;  // what a writeback failed for may be over
  std::size_t dead_pages = 0;
  // What a page without content becomes when it leaves, or was all along: zeros.
  void forget_content(PageId page);
  // What was discarded goes back to the store: before any of these pages is written again.
  void hand_back_discarded(PageStore& store);
  std::vector<PageId> stale_host_pages;  // written on the device while they had a host frame
  Waiter* waiters = nullptr;             // first come, first served
  bool closing = false;
  std::optional<Error> poison;  // the executor met an error it can't undo: every later access gets it
  bool hungry = false;          // the executor could start the next action if its victim were released

  void set_waker(IoQueue* queue) noexcept { waker_.store(queue); }
  void wake() noexcept;
  void record(EventKind kind, PageId page, FrameId frame);
  // Nothing on the device uses the page's frames any more.
  bool quiet(const PageEntry& entry) const noexcept {
    return entry.copy_point <= reached.copies_in && entry.release_point <= reached.releases;
  }
  void page_arrived(PageId page, FrameId frame);
  void page_failed(PageId page, const Error& error);
  void fail_all_waiters(const Error& error);
  // Any thread, without the lock: every acquire from now on, and those that wait, get the error.
  void device_lost(const Error& error);
  void fail_waiter(Waiter& waiter, const Error& error);
  const PageSet& known_set(SetId id) const { return *sets_[id.value]; }
  // The unpinned resident page with the furthest next use (least recently used without a schedule); only one that is
  // used after step `used_after`, if given, and only a clean one when clean_only. Invalid when there is none.
  PageId choose_victim(std::int64_t used_after, bool clean_only) const;

 private:
  // Larger goes first; nothing for a page that is used too soon to go.
  std::optional<std::int64_t> eviction_rank(PageId page, std::int64_t used_after) const;
  void throw_if_closing() const;
  std::optional<std::int64_t> match(SetId id, AcquireKind kind);
  void pin_all(const PageSet& set);
  void unpin_all(const PageSet& set, std::uint64_t release_point = 0);
  std::uint64_t copy_point(const PageSet& set) const;
  void enlist(Waiter& waiter);
  void wait(Waiter& waiter, std::unique_lock<std::mutex>& lock, const Interrupted& interrupted);
  void await(Waiter& waiter, std::unique_lock<std::mutex>& lock, const Interrupted& interrupted);
  void unlink(Waiter& waiter);
  void wake_if_hungry();
  const char* keep_message(std::string message);

  AddressSpace& space_;
  std::size_t frame_count_;
  std::size_t fault_frames_;
  std::vector<std::unique_ptr<PageSet>> sets_;
  EventRing ring_;
  std::vector<std::pair<PageId, Extent>> discarded_extents_;
  std::size_t pinned_pages_ = 0;
  std::uint64_t tick_ = 0;
  std::atomic<IoQueue*> waker_{nullptr};
  std::vector<std::unique_ptr<std::string>> messages_;
  std::int64_t event_step_ = -1;
  std::uint32_t schedules_added_ = 0;
};

}  // namespace tp
