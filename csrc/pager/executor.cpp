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

constexpr std::chrono::nanoseconds kUntilWoken = std::chrono::hours(1);

}  // namespace

Executor::Executor(Residency& residency, std::unique_ptr<PageMover> mover)
    : residency_(residency), mover_(std::move(mover)) {}

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
  mover_->abandon();
}

// ---------------------------------------------------------------- the thread

void Executor::run(std::function<void(std::exception_ptr)> ready) {
  try {
    mover_->open();
  } catch (...) {
    ready(std::current_exception());
    return;
  }
  residency_.set_waker(&mover_->io());
  ready(nullptr);
  while (round()) {
  }
  residency_.set_waker(nullptr);
}

bool Executor::round() {
  bool open = true;
  try {
    open = decide();
    mover_->carry_out();
  } catch (const Error& error) {
    fatal(error);
  }
  try {
    if (!open) mover_->wait_for_device();
    if (!open && mover_->drained()) return false;
    mover_->poll(mover_->take_decide_again() ? std::chrono::nanoseconds(0) : kUntilWoken);
  } catch (const Error& error) {
    fatal(error);
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
  mover_->begin_round();
  serve_waiters(Purpose::demand, false);
  const Follow outcome = follow_schedule();
  // Pages that the schedule was to bring, but does not: its turn has come and it can't (a victim still in use), it
  // passed the page over (no frame was worth less), or another thread has moved it back. Then on demand like any other.
  // While it is full, it goes on with the next completion; when there is none to come (a small host tier is full of
  // pages that somebody waits for, and the next one is none of them), only those waiters can make room.
  const bool stuck = outcome == Follow::full && !mover_->working();
  if (outcome != Follow::full || stuck) serve_waiters(Purpose::demand, true);
  mover_->read_ahead();
  serve_waiters(Purpose::prefetch, true);
  residency_.hungry = outcome == Follow::blocked || outcome == Follow::idle || stuck;
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
    if (!mover_->can_start(residency_.table.at(page).state)) continue;
    if (!also_scheduled && scheduled_soon(page, waiter.step)) continue;
    const Start outcome = mover_->start(page, purpose, PageId{}, kAnyUse);
    if (outcome == Start::no_room) return false;
    if (outcome != Start::no_frame) continue;
    if (mover_->working()) return false;  // a frame will come free
    residency_.fail_waiter(waiter, mover_->spill_error() ? *mover_->spill_error()
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
  if (mover_->can_start(residency_.table.at(page).state)) {
    const std::int64_t use =
        tape.schedule().next_use(page, tape.position()).value_or(std::numeric_limits<std::int64_t>::max() / 2);
    const Start outcome = mover_->start(page, Purpose::prefetch, PageId{}, use);
    if (outcome == Start::no_room) return Follow::full;
    if (outcome == Start::under_way) return Follow::full;
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
  bool under_way = false;
  for (const PageId page : residency_.known_set(schedule.set_of(step)).pages) {
    if (!mover_->can_start(residency_.table.at(page).state)) continue;
    const std::optional<std::int64_t> action = schedule.next_page_in(page, tape.next_action);
    if (action && schedule.action(*action).deadline <= step) continue;
    const Start outcome = mover_->start(page, Purpose::prefetch, PageId{}, step);
    under_way = under_way || outcome == Start::under_way;
    if (outcome == Start::no_room) return Follow::full;
    // Everything resident is in use or needed sooner: tried again with each release, until the step has passed.
    if (outcome == Start::no_frame) return Follow::blocked;
  }
  if (under_way) return Follow::full;
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
  const bool needed = mover_->can_start(entry.state) && !(late && entry.pins == 0);
  if (!needed) {
    ++tape.next_action;
    return Follow::next;
  }
  if (action.evict.valid() && !mover_->frame_free()) {
    // Still in use, or asked for and on its way: it goes when it is released. (Absent already: any other will do.)
    const PageEntry& victim = residency_.table.at(action.evict);
    if (!late && victim.pins > 0) return Follow::blocked;
    // A host that runs ahead of its device is always late by the schedule. The device gets there; any other victim
    // would be one that the schedule keeps.
    const bool wait = !late || mover_->runs_behind();
    if (wait && victim.pins == 0 && mover_->victim_busy(victim)) return Follow::full;
  }
  const Start outcome =
      mover_->start(action.page_in, Purpose::prefetch, action.evict, late ? kAnyUse : action.deadline);
  if (outcome == Start::no_room) return Follow::full;
  if (outcome == Start::under_way) return Follow::full;
  if (outcome == Start::no_frame) return Follow::blocked;
  ++tape.next_action;
  return Follow::next;
}

}  // namespace tp
