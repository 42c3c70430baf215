// SPDX-License-Identifier: Apache-2.0
#include "pager/executor.hpp"

#include <algorithm>
#include <exception>
#include <future>
#include <limits>
#include <utility>

#include "base/check.hpp"

namespace tp {
namespace {

constexpr std::size_t kWritebacksInFlightMax = 2;
constexpr std::int64_t kAnyUse = -1;  // any victim will do
constexpr std::chrono::nanoseconds kUntilWoken = std::chrono::hours(1);

}  // namespace

Executor::Executor(Residency& residency, AddressSpace& space, FramePool& pool, ExecutorOptions options)
    : residency_(residency),
      space_(space),
      pool_(pool),
      options_(std::move(options)),
      spill_(options_.spill_directory, pool.page_bytes()),
      copies_(make_host_copy_queue()) {
  prefetch_transfers_max_ = std::max<std::size_t>(1, options_.inflight_bytes / pool.page_bytes());
}

Executor::~Executor() { stop(); }

void Executor::start() {
  TP_CHECK(thread_ == nullptr);
  std::promise<void> ready;
  std::future<void> is_ready = ready.get_future();
  thread_ = std::make_unique<std::thread>([this, &ready] {
    run([&ready](std::exception_ptr failure) {
      if (failure)
        ready.set_exception(failure);
      else
        ready.set_value();
    });
  });
  try {
    is_ready.get();
  } catch (...) {
    thread_->join();
    thread_.reset();
    throw;
  }
}

void Executor::stop() noexcept {
  if (thread_ == nullptr) return;
  {
    const std::lock_guard lock(residency_.mutex);
    residency_.closing = true;
    residency_.wake();
  }
  thread_->join();
  thread_.reset();
}

void Executor::abandon() noexcept {
  // The handle of a thread that this process never had: neither joined nor destroyed.
  static_cast<void>(thread_.release());
  static_cast<void>(transfers_.release());
}

std::uint16_t Executor::add_file(File file) {
  TP_CHECK(files_.size() < kFilesMax);
  files_.push_back(std::move(file));
  return static_cast<std::uint16_t>(files_.size() - 1);
}

IoQueueFacts Executor::io_facts() const { return transfers_->io().facts(); }

IoQueueCounters Executor::io_counters() const { return transfers_->io().counters(); }

// ---------------------------------------------------------------- the thread

void Executor::run(std::function<void(std::exception_ptr)> ready) {
  try {
    transfers_ = std::make_unique<TransferQueue>(options_.make_queue(), pool_);
  } catch (...) {
    ready(std::current_exception());
    return;
  }
  TP_CHECK(transfers_->capacity() > prefetch_transfers_max_);  // room for demand beside prefetches
  residency_.set_waker(&transfers_->io());
  ready(nullptr);
  while (round()) {
  }
  residency_.set_waker(nullptr);
}

bool Executor::round() {
  bool open = true;
  try {
    open = decide();
    carry_out();
  } catch (const Error& error) {
    fatal(error);
  }
  if (!open && transfers_->in_flight() == 0) return false;
  finished_.clear();
  transfers_->poll(finished_, std::exchange(decide_again_, false) ? std::chrono::nanoseconds(0) : kUntilWoken);
  for (FinishedTransfer& transfer : finished_) {
    try {
      finish(transfer);
    } catch (const Error& error) {
      fatal(error);
    }
  }
  return true;
}

void Executor::fatal(const Error& error) {
  // A mapping call failed half-way (vm.max_map_count, memory): which address shows what is no longer certain, so
  // nothing is shown.
  const std::lock_guard lock(residency_.mutex);
  if (!residency_.poison) residency_.poison = error;
  residency_.fail_all_waiters(error);
}

// ---------------------------------------------------------------- decide: under the lock

bool Executor::decide() {
  const std::lock_guard lock(residency_.mutex);
  jobs_.clear();
  residency_.hungry = false;
  if (residency_.poison) {
    residency_.fail_all_waiters(*residency_.poison);
    return !residency_.closing;
  }
  if (residency_.closing) {
    residency_.fail_all_waiters(
        Error(ErrorKind::closed, "the pager was closed while this access waited for its pages"));
    return false;
  }
  serve_waiters(Purpose::demand, false);
  const Follow outcome = follow_schedule();
  // Pages that the schedule was to bring, but does not: its turn has come and it can't (a victim still in use), it
  // passed the page over (no frame was worth less), or another thread has moved it back. Then on demand like any other.
  // While it is full, it goes on with the next completion.
  if (outcome != Follow::full) serve_waiters(Purpose::demand, true);
  serve_waiters(Purpose::prefetch, true);
  residency_.hungry = outcome == Follow::blocked || outcome == Follow::idle;
  return true;
}

void Executor::serve_waiters(Purpose purpose, bool also_scheduled) {
  for (Waiter* waiter = residency_.waiters; waiter != nullptr;) {
    Waiter* next = waiter->next;  // serving may fail the waiter and take it off the list
    const bool of_this_purpose = waiter->prefetch == (purpose == Purpose::prefetch);
    if (of_this_purpose && !serve_waiter(*waiter, purpose, also_scheduled)) return;
    waiter = next;
  }
}

// False when nothing more can be started in this round.
bool Executor::serve_waiter(Waiter& waiter, Purpose purpose, bool also_scheduled) {
  for (const PageId page : waiter.pages) {
    if (residency_.table.at(page).state != PageState::absent) continue;
    if (!also_scheduled && scheduled_soon(page, waiter.step)) continue;
    const Start outcome = start_page_in(page, purpose, PageId{}, kAnyUse);
    if (outcome == Start::no_room) return false;
    if (outcome == Start::started) continue;
    if (transfers_->in_flight() > 0 || !jobs_.empty()) return false;  // a frame will come free
    residency_.fail_waiter(waiter, spill_error_ ? *spill_error_
                                                : Error(ErrorKind::budget,
                                                        "every frame of the budget is in use by open steps; "
                                                        "give a larger budget or use fewer threads"));
    break;
  }
  return true;
}

bool Executor::scheduled_soon(PageId page, std::int64_t step) const {
  const Tape* tape = residency_.tape.get();
  if (tape == nullptr || step < 0) return false;
  const std::size_t rank = tape->schedule().initial_rank(page);
  if (rank >= tape->next_initial && rank < tape->schedule().initial_pages().size()) return true;
  if (step >= tape->catch_up_step && step < tape->catch_up_end) return true;
  const auto action = tape->schedule().next_page_in(page, tape->next_action);
  return action && tape->schedule().action(*action).deadline <= step;
}

Executor::Follow Executor::follow_schedule() {
  if (residency_.tape == nullptr) return Follow::idle;
  Follow outcome = Follow::next;
  while (outcome == Follow::next) {
    const bool initial = residency_.tape->next_initial < residency_.tape->schedule().initial_pages().size();
    if (initial) {
      outcome = follow_initial();
    } else {
      outcome = residency_.tape->catch_up_is_next() ? follow_catch_up() : follow_action();
    }
  }
  return outcome;
}

Executor::Follow Executor::follow_initial() {
  Tape& tape = *residency_.tape;
  const PageId page = tape.schedule().initial_pages()[tape.next_initial];
  if (residency_.table.at(page).state == PageState::absent) {
    const std::int64_t use =
        tape.schedule().next_use(page, tape.position()).value_or(std::numeric_limits<std::int64_t>::max() / 2);
    const Start outcome = start_page_in(page, Purpose::prefetch, PageId{}, use);
    if (outcome == Start::no_room) return Follow::full;
    // no_frame: everything resident is needed sooner than this page; it comes when it is asked for.
  }
  ++tape.next_initial;
  return Follow::next;
}

// One step of the cursor; see [Note: catching up] in tape.hpp.
Executor::Follow Executor::follow_catch_up() {
  Tape& tape = *residency_.tape;
  const Schedule& schedule = tape.schedule();
  // The step acquired last may be waiting for its pages; those before it have theirs.
  const std::int64_t step = std::max(tape.catch_up_step, tape.position() - 1);
  tape.catch_up_step = step;
  for (const PageId page : residency_.known_set(schedule.set_of(step)).pages) {
    if (residency_.table.at(page).state != PageState::absent) continue;
    const std::optional<std::int64_t> action = schedule.next_page_in(page, tape.next_action);
    if (action && schedule.action(*action).deadline <= step) continue;
    const Start outcome = start_page_in(page, Purpose::prefetch, PageId{}, step);
    if (outcome == Start::no_room) return Follow::full;
    // Everything resident is in use or needed sooner: tried again with each release, until the step has passed.
    if (outcome == Start::no_frame) return Follow::blocked;
  }
  ++tape.catch_up_step;
  return Follow::next;
}

Executor::Follow Executor::follow_action() {
  Tape& tape = *residency_.tape;
  if (tape.schedule().action_count() == 0) return Follow::idle;
  const Action action = tape.schedule().action(tape.next_action);
  if (action.step > tape.position()) return Follow::idle;
  const PageEntry& entry = residency_.table.at(action.page_in);
  if (entry.state == PageState::copying_out || entry.state == PageState::writing) return Follow::blocked;
  const bool late = action.deadline < tape.position();
  const bool needed = entry.state == PageState::absent && !(late && entry.pins == 0);
  if (!needed) {
    ++tape.next_action;
    return Follow::next;
  }
  if (!late && action.evict.valid() && pool_.free_count() == 0) {
    // Still in use, or asked for and on its way: it goes when it is released. (Absent already: any other will do.)
    const PageEntry& victim = residency_.table.at(action.evict);
    if (victim.pins > 0 || (victim.state != PageState::device && victim.state != PageState::absent))
      return Follow::blocked;
  }
  const Start outcome =
      start_page_in(action.page_in, Purpose::prefetch, action.evict, late ? kAnyUse : action.deadline);
  if (outcome == Start::no_room) return Follow::full;
  if (outcome == Start::no_frame) return Follow::blocked;
  ++tape.next_action;
  return Follow::next;
}

bool Executor::evictable(PageId page) const {
  if (!page.valid()) return false;
  const PageEntry& entry = residency_.table.at(page);
  return entry.state == PageState::device && entry.pins == 0 && !(entry.dirty && spill_error_);
}

Executor::Start Executor::start_page_in(PageId page, Purpose purpose, PageId planned_victim, std::int64_t used_after) {
  const std::size_t limit = purpose == Purpose::prefetch ? prefetch_transfers_max_ : transfers_->capacity();
  if (transfers_->in_flight() + jobs_.size() >= limit) return Start::no_room;
  PageId dropped;
  const std::optional<FrameId> frame = free_a_frame(planned_victim, used_after, dropped);
  if (!frame) return Start::no_frame;
  PageEntry& entry = residency_.table.at(page);
  TP_CHECK(entry.state == PageState::absent);
  entry.frame = *frame;
  residency_.table.set_state(page, entry.backing == Backing::zero ? PageState::host : PageState::reading);
  Counters& counts = residency_.counts;
  ++counts.page_ins;
  ++(purpose == Purpose::prefetch ? counts.prefetches : counts.faults);
  if (entry.backing == Backing::zero) ++counts.zero_fills;
  if (purpose == Purpose::demand) residency_.record(EventKind::fault, page, *frame);
  residency_.record(EventKind::page_in_begin, page, *frame);
  jobs_.push_back({dropped, page, *frame, source_of(entry)});
  return Start::started;
}

std::optional<FrameId> Executor::free_a_frame(PageId planned_victim, std::int64_t used_after, PageId& dropped) {
  if (pool_.free_count() > 0) return pool_.take();
  const PageId victim =
      evictable(planned_victim) ? planned_victim : residency_.choose_victim(used_after, spill_error_.has_value());
  if (!victim.valid()) return std::nullopt;
  PageEntry& entry = residency_.table.at(victim);
  if (entry.dirty) {
    if (writebacks_in_flight_ < kWritebacksInFlightMax) begin_writeback(victim);
    return std::nullopt;
  }
  // Clean: the bytes are on the drive. Its address keeps showing them, read-only, until carry_out unmaps it.
  const FrameId frame = entry.frame;
  residency_.table.set_state(victim, PageState::copying_out);
  residency_.table.set_state(victim, PageState::host);
  entry.frame = FrameId{};
  residency_.table.set_state(victim, PageState::absent);
  residency_.frame_page[frame.value] = PageId{};
  ++residency_.counts.evictions;
  residency_.record(EventKind::evict, victim, frame);
  dropped = victim;
  return frame;
}

void Executor::begin_writeback(PageId victim) {
  PageEntry& entry = residency_.table.at(victim);
  TP_CHECK(entry.dirty && entry.pins == 0);
  residency_.table.set_state(victim, PageState::copying_out);
  residency_.frame_page[entry.frame.value] = PageId{};
  ++writebacks_in_flight_;
  residency_.record(EventKind::writeback_begin, victim, entry.frame);
  jobs_.push_back({victim, PageId{}, entry.frame, PageSource{}});
}

PageSource Executor::source_of(const PageEntry& entry) const {
  PageSource source{entry.backing, nullptr, entry.offset_bytes, entry.valid_bytes, entry.generation, entry.checksum};
  if (entry.backing == Backing::checkpoint) source.file = &files_[entry.file];
  if (entry.backing == Backing::spill) source.file = &spill_.file();
  if (entry.backing == Backing::spill) source.valid_bytes = static_cast<std::uint32_t>(pool_.page_bytes());
  if (entry.backing == Backing::zero) source.valid_bytes = 0;
  return source;
}

// ---------------------------------------------------------------- carry out: no lock

void Executor::carry_out() {
  for (const Job& job : jobs_) {
    if (!job.page.valid()) {
      carry_out_writeback(job);
      continue;
    }
    if (job.victim.valid()) space_.unmap(pool_, job.frame, job.victim, transfers_->slot_access());
    transfers_->start_page_in(job.page, job.frame, job.source);
  }
  jobs_.clear();
}

void Executor::carry_out_writeback(const Job& job) {
  // From the unmap on nobody can write to the page, so what is summed is what is written.
  space_.unmap(pool_, job.frame, job.victim, SlotAccess::read_write);
  std::unique_lock lock(residency_.mutex);
  PageEntry& entry = residency_.table.at(job.victim);
  residency_.table.set_state(job.victim, PageState::host);
  const bool has_extent = entry.backing == Backing::spill;
  std::uint64_t extent = entry.offset_bytes;
  lock.unlock();
  if (!has_extent) {
    try {
      extent = spill_.take_extent();
    } catch (const Error& error) {
      writeback_failed(job.victim, job.frame, error);
      return;
    }
    spill_bytes_ = spill_.allocated_bytes();
  }
  const std::uint32_t generation = entry.generation + 1;
  const std::uint64_t checksum = page_checksum(pool_.slot(job.frame), pool_.page_bytes(), job.victim, generation);
  lock.lock();
  entry.backing = Backing::spill;
  entry.offset_bytes = extent;
  entry.generation = generation;
  entry.checksum = checksum;
  residency_.table.set_state(job.victim, PageState::writing);
  ++residency_.counts.writebacks;
  lock.unlock();
  transfers_->start_writeback(job.victim, job.frame, spill_.file(), extent);
}

// ---------------------------------------------------------------- finish

void Executor::finish(FinishedTransfer& transfer) {
  if (transfer.kind == TransferKind::writeback) return finish_writeback(transfer);
  if (!transfer.error) return finish_page_in(transfer);
  const std::lock_guard lock(residency_.mutex);
  residency_.table.at(transfer.page).frame = FrameId{};
  residency_.table.set_state(transfer.page, PageState::failed);
  pool_.put(transfer.frame);
  residency_.page_failed(transfer.page, *transfer.error);
}

void Executor::finish_page_in(const FinishedTransfer& transfer) {
  {
    const std::lock_guard lock(residency_.mutex);
    PageEntry& entry = residency_.table.at(transfer.page);
    if (entry.state == PageState::reading) residency_.table.set_state(transfer.page, PageState::host);
    residency_.table.set_state(transfer.page, PageState::copying_in);
  }
  std::byte* frame_memory = pool_.slot(transfer.frame);
  copies_->submit({transfer.page.value, CopyDirection::to_device, frame_memory,
                   reinterpret_cast<std::uintptr_t>(frame_memory), pool_.page_bytes()});
  copied_.clear();
  copies_->poll(copied_);
  for (const CopyCompletion& copied : copied_) {
    TP_CHECK(copied.error == 0);  // the host's copy queue moves no byte and can't fail
    const PageId page{static_cast<std::uint32_t>(copied.token)};
    TP_CHECK(page == transfer.page);
    space_.map(pool_, transfer.frame, page);
    const std::lock_guard lock(residency_.mutex);
    residency_.table.at(page).dirty = false;
    residency_.record(EventKind::page_in_end, page, transfer.frame);
    residency_.page_arrived(page, transfer.frame);
  }
}

void Executor::finish_writeback(const FinishedTransfer& transfer) {
  if (transfer.error) return writeback_failed(transfer.page, transfer.frame, *transfer.error);
  const std::lock_guard lock(residency_.mutex);
  --writebacks_in_flight_;
  PageEntry& entry = residency_.table.at(transfer.page);
  entry.dirty = false;
  entry.frame = FrameId{};
  residency_.table.set_state(transfer.page, PageState::absent);
  pool_.put(transfer.frame);
  ++residency_.counts.evictions;
  residency_.record(EventKind::writeback_end, transfer.page, transfer.frame);
}

void Executor::writeback_failed(PageId page, FrameId frame, const Error& error) {
  // The only copy of these bytes is the frame: it goes back to its address, still dirty, and nothing is lost.
  {
    const std::lock_guard lock(residency_.mutex);
    if (residency_.table.at(page).state == PageState::writing) residency_.table.set_state(page, PageState::host);
    residency_.table.set_state(page, PageState::copying_in);
    --writebacks_in_flight_;
    ++residency_.counts.failures;
    spill_error_ = error;
    decide_again_ = true;  // who waits for this frame must look for another
  }
  space_.map(pool_, frame, page);
  space_.allow_write(page);
  const std::lock_guard lock(residency_.mutex);
  residency_.page_arrived(page, frame);
}

}  // namespace tp
