// SPDX-License-Identifier: Apache-2.0
#include "pager/residency.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <ctime>
#include <limits>

#include "base/check.hpp"
#include "base/limits.hpp"

namespace tp {
namespace {

constexpr std::uint32_t kWaiting = 0, kResident = 1, kFailed = 2;

// A futex rather than a condition variable: the wait also runs inside the fault handler, where nothing may allocate,
// and ends at a signal.
void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t expected) noexcept {
  const timespec timeout{0, 50'000'000};
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAIT_PRIVATE, expected, &timeout, nullptr, 0);
}

void finish(Waiter& waiter, std::uint32_t outcome) noexcept {
  std::atomic<std::uint32_t>& word = waiter.outcome;
  word.store(outcome, std::memory_order_release);  // from here on the waiter may be gone; its address is only a key
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}

std::string mebibytes(std::uint64_t bytes) { return std::to_string((bytes + kMiB - 1) / kMiB) + " MiB"; }

}  // namespace

Residency::Residency(AddressSpace& space, std::size_t frame_count, std::size_t event_capacity, int tiers)
    : table(tiers),
      frame_page(frame_count),
      space_(space),
      frame_count_(frame_count),
      fault_frames_(tiers == 1 ? kFaultFrames : 0),
      ring_(event_capacity) {
  TP_CHECK(frame_count > fault_frames_);
}

// ---------------------------------------------------------------- clients

void Residency::append_pages(std::span<const PageEntry> entries) {
  const std::lock_guard lock(mutex);
  for (const PageEntry& entry : entries) table.append(entry);
  TP_CHECK(table.size() <= space_.page_count());
}

SetId Residency::add_set(std::string name, std::vector<PageId> pages) {
  const std::lock_guard lock(mutex);
  TP_CHECK(std::is_sorted(pages.begin(), pages.end()));
  TP_CHECK(pages.empty() || pages.back().value < table.size());
  sets_.push_back(std::make_unique<PageSet>(PageSet{std::move(name), std::move(pages)}));
  return SetId{static_cast<std::uint32_t>(sets_.size() - 1)};
}

const PageSet& Residency::set(SetId id) const {
  const std::lock_guard lock(mutex);
  if (id.value >= sets_.size()) throw Error(ErrorKind::invalid, "no set has the id " + std::to_string(id.value));
  return *sets_[id.value];
}

std::size_t Residency::set_count() const {
  const std::lock_guard lock(mutex);
  return sets_.size();
}

void Residency::throw_if_closing() const {
  if (poison) throw *poison;
  if (closing)
    throw Error(ErrorKind::closed, "the pager is closed: its model's weights are no longer in memory; load it again");
}

void Residency::pin_all(const PageSet& set) {
  std::size_t newly_pinned = 0;
  for (const PageId page : set.pages) newly_pinned += table.at(page).pins == 0;
  if (pinned_pages_ + newly_pinned > pinnable_pages()) {
    const std::uint64_t page_bytes = space_.page_bytes();
    const std::uint64_t needed = (pinned_pages_ + newly_pinned + fault_frames_) * page_bytes;
    throw Error(
        ErrorKind::budget,
        "step '" + set.name + "' needs " + mebibytes(set.pages.size() * page_bytes) + " resident at once" +
            (pinned_pages_ > 0 ? ", beside " + mebibytes(pinned_pages_ * page_bytes) + " that other open steps hold"
                               : "") +
            ", but the budget is " + mebibytes(frame_count_ * page_bytes) + "; give at least " + mebibytes(needed));
  }
  for (const PageId page : set.pages) {
    PageEntry& entry = table.at(page);
    ++entry.pins;
    dead_pages -= entry.dead;
    entry.dead = false;
    if (entry.state == PageState::failed) table.set_state(page, PageState::absent);  // this access tries again
  }
  pinned_pages_ += newly_pinned;
  counts.pinned_pages_max = std::max<std::uint64_t>(counts.pinned_pages_max, pinned_pages_);
}

void Residency::unpin_all(const PageSet& set, std::uint64_t release_point) {
  ++tick_;
  for (const PageId page : set.pages) {
    PageEntry& entry = table.at(page);
    TP_CHECK(entry.pins > 0);
    entry.last_use = tick_;
    entry.release_point = std::max(entry.release_point, release_point);
    if (--entry.pins == 0) --pinned_pages_;
  }
}

std::uint64_t Residency::copy_point(const PageSet& set) const {
  std::uint64_t point = 0;
  if (table.tiers() == 1) return point;
  for (const PageId page : set.pages) point = std::max(point, table.at(page).copy_point);
  return point;
}

std::uint64_t Residency::acquire(SetId id, AcquireKind kind, const Interrupted& interrupted) {
  std::unique_lock lock(mutex);
  throw_if_closing();
  if (id.value >= sets_.size()) throw Error(ErrorKind::invalid, "no set has the id " + std::to_string(id.value));
  const PageSet& set = *sets_[id.value];
  pin_all(set);
  const std::optional<std::int64_t> step = match(id, kind);
  event_step_ = step.value_or(-1);
  ++counts.acquires;
  ring_.add(EventKind::acquire_begin, -1, -1, event_step_, static_cast<std::int32_t>(id.value));
  std::uint32_t missing = 0;
  for (const PageId page : set.pages) missing += !table.resident(page);
  counts.page_accesses += set.pages.size();
  counts.page_accesses_resident += set.pages.size() - missing;
  if (missing > 0) {
    Waiter waiter;
    waiter.pages = set.pages;
    waiter.step = step.value_or(-1);
    waiter.missing = missing;
    try {
      wait(waiter, lock, interrupted);
    } catch (...) {
      if (!lock.owns_lock()) lock.lock();
      unpin_all(set);
      wake_if_hungry();
      throw;
    }
  }
  ring_.add(EventKind::acquire_end, -1, -1, step.value_or(-1), static_cast<std::int32_t>(id.value));
  wake_if_hungry();
  return copy_point(set);
}

std::size_t Residency::discard(std::span<const PageId> pages) {
  const std::lock_guard lock(mutex);
  throw_if_closing();
  if (table.tiers() != 1) return 0;
  std::size_t discarded = 0;
  for (const PageId page : pages) {
    PageEntry& entry = table.at(page);
    if (entry.pins > 0 || entry.waiters > 0) continue;
    if (entry.state != PageState::absent && entry.state != PageState::device) continue;
    if (entry.backing != Backing::zero && entry.backing != Backing::spill) continue;
    if (entry.dirty) {
      if (!entry.dead) ++dead_pages;
      entry.dead = true;
    } else {
      forget_content(page);
    }
    ++discarded;
  }
  return discarded;
}

void Residency::wanted(std::span<const PageId> pages) {
  const std::lock_guard lock(mutex);
  throw_if_closing();
  for (const PageId page : pages) {
    PageEntry& entry = table.at(page);
    dead_pages -= entry.dead;
    entry.dead = false;
  }
}

void Residency::hand_back_discarded(PageStore& store) {
  for (const auto& [page, extent] : discarded_extents_) store.discard(page, extent);
  discarded_extents_.clear();
}

void Residency::forget_content(PageId page) {
  PageEntry& entry = table.at(page);
  if (entry.backing == Backing::spill) discarded_extents_.emplace_back(page, entry.stored_at());
  if (entry.dead) --dead_pages;
  entry.backing = Backing::zero;
  entry.dirty = entry.dead = false;
  entry.lead_bytes = 0;
}

std::vector<PageId> Residency::modified_pages() const {
  const std::lock_guard lock(mutex);
  std::vector<PageId> pages;
  for (std::uint32_t page = 0; page < table.size(); ++page) {
    const PageEntry& entry = table.at(PageId{page});
    if (entry.dirty && !entry.dead) pages.push_back(PageId{page});
  }
  return pages;
}

Residency::FlushedPage Residency::begin_flush(PageId page) {
  const std::lock_guard lock(mutex);
  TP_CHECK(table.tiers() == 1);
  throw_if_closing();
  PageEntry& entry = table.at(page);
  if (!entry.dirty || entry.dead) return {};
  if (entry.state != PageState::device) return {FlushOutcome::on_its_way, 0, {}};
  if (entry.pins == 0 && pinned_pages_ >= pinnable_pages()) return {FlushOutcome::no_room, 0, {}};
  space_.forbid_write(page);
  if (entry.pins++ == 0) ++pinned_pages_;
  entry.dirty = false;
  ++counts.writebacks;
  ring_.add(EventKind::writeback_begin, static_cast<std::int32_t>(page.value),
            static_cast<std::int32_t>(entry.frame.value), event_step_, -1);
  return {FlushOutcome::begun, entry.generation, entry.stored_at()};
}

bool Residency::flush_undisturbed(PageId page) const {
  const std::lock_guard lock(mutex);
  return !table.at(page).dirty;
}

void Residency::end_flush(PageId page, const PageRecord* stored) noexcept {
  const std::lock_guard lock(mutex);
  PageEntry& entry = table.at(page);
  TP_CHECK(entry.pins > 0 && entry.state == PageState::device);
  if (--entry.pins == 0) --pinned_pages_;
  ring_.add(EventKind::writeback_end, static_cast<std::int32_t>(page.value),
            static_cast<std::int32_t>(entry.frame.value), event_step_, -1);
  if (stored != nullptr) {
    entry.set_stored(*stored);  // written to since its last byte left: modified again, and rightly so
  } else if (!entry.dirty) {
    try {
      space_.allow_write(page);
    } catch (const Error& error) {
      if (!poison) poison = error;  // the next write to it would trap for ever
    }
    entry.dirty = true;
  }
  wake_if_hungry();
}

void Residency::mark_written(SetId id) {
  const std::lock_guard lock(mutex);
  throw_if_closing();
  if (id.value >= sets_.size()) throw Error(ErrorKind::invalid, "no set has the id " + std::to_string(id.value));
  for (const PageId page : sets_[id.value]->pages) {
    PageEntry& entry = table.at(page);
    if (entry.pins == 0 || entry.state != PageState::device) {
      throw Error(ErrorKind::invalid, "mark_written of set '" + sets_[id.value]->name +
                                          "', which is not acquired: pages are written to between acquire and release");
    }
  }
  for (const PageId page : sets_[id.value]->pages) {
    PageEntry& entry = table.at(page);
    if (!entry.dirty) space_.allow_write(page);
    entry.dirty = true;
    if (!entry.host_frame.valid() || entry.host_stale) continue;
    entry.host_stale = true;
    stale_host_pages.push_back(page);
  }
}

std::optional<std::int64_t> Residency::match(SetId id, AcquireKind kind) {
  if (!tape) return std::nullopt;
  const std::uint64_t switches = tape->switches;
  const std::optional<std::int64_t> step = tape->match(id, kind);
  if (tape->switches != switches) {  // other actions may start now, and pages be missing that nobody waits for yet
    hungry = false;
    wake();
  }
  return step;
}

void Residency::enlist(Waiter& waiter) {
  Waiter** tail = &waiters;
  while (*tail != nullptr) tail = &(*tail)->next;
  *tail = &waiter;
  wake();
}

void Residency::wait(Waiter& waiter, std::unique_lock<std::mutex>& lock, const Interrupted& interrupted) {
  enlist(waiter);
  try {
    await(waiter, lock, interrupted);
  } catch (...) {
    if (!lock.owns_lock()) lock.lock();
    if (waiter.outcome.load(std::memory_order_acquire) == kWaiting) unlink(waiter);
    throw;
  }
}

// Until the waiter's outcome is known. Leaves it on the list when `interrupted` throws: it may go on waiting.
void Residency::await(Waiter& waiter, std::unique_lock<std::mutex>& lock, const Interrupted& interrupted) {
  const std::uint64_t begin_ns = monotonic_ns();
  ++counts.stalls;
  ring_.add(EventKind::stall_begin, -1, -1, waiter.step, -1);
  lock.unlock();
  while (waiter.outcome.load(std::memory_order_acquire) == kWaiting) {
    futex_wait(waiter.outcome, kWaiting);
    if (interrupted && waiter.outcome.load(std::memory_order_acquire) == kWaiting) interrupted();
  }
  lock.lock();
  counts.stall_ns += monotonic_ns() - begin_ns;
  ring_.add(EventKind::stall_end, -1, -1, waiter.step, -1);
  if (waiter.outcome.load(std::memory_order_acquire) == kFailed) {
    throw Error(waiter.error_kind, waiter.error_message, waiter.error_number);
  }
}

void Residency::begin_ticket(SetId id, Waiter& waiter) {
  const std::lock_guard lock(mutex);
  throw_if_closing();
  if (id.value >= sets_.size()) throw Error(ErrorKind::invalid, "no set has the id " + std::to_string(id.value));
  const PageSet& set = *sets_[id.value];
  pin_all(set);
  waiter.pages = set.pages;
  for (const PageId page : set.pages) waiter.missing += !table.resident(page);
  if (waiter.missing == 0) {
    waiter.outcome.store(kResident, std::memory_order_release);
  } else {
    enlist(waiter);
  }
}

std::uint64_t Residency::finish_ticket(SetId id, Waiter& waiter, const Interrupted& interrupted) {
  std::unique_lock lock(mutex);
  TP_CHECK(id.value < sets_.size());
  const PageSet& set = *sets_[id.value];
  if (waiter.outcome.load(std::memory_order_acquire) == kResident) return copy_point(set);
  if (waiter.prefetch && waiter.outcome.load(std::memory_order_acquire) == kWaiting) {
    waiter.prefetch = false;  // somebody waits now: it is demand
    wake();
  }
  await(waiter, lock, interrupted);
  return copy_point(set);
}

void Residency::end_ticket(SetId id, Waiter& waiter, std::uint64_t release_point) noexcept {
  const std::lock_guard lock(mutex);
  TP_CHECK(id.value < sets_.size());
  if (waiter.outcome.load(std::memory_order_acquire) == kWaiting) unlink(waiter);
  unpin_all(*sets_[id.value], release_point);
  wake_if_hungry();
}

void Residency::release(SetId id, std::uint64_t release_point) {
  const std::lock_guard lock(mutex);
  if (id.value >= sets_.size()) throw Error(ErrorKind::invalid, "no set has the id " + std::to_string(id.value));
  const PageSet& set = *sets_[id.value];
  unpin_all(set, release_point);
  ++counts.releases;
  ring_.add(EventKind::release, -1, -1, event_step_, static_cast<std::int32_t>(id.value));
  wake_if_hungry();
}

bool Residency::try_fit(std::size_t page_count) const {
  const std::lock_guard lock(mutex);
  return pinned_pages_ + page_count <= pinnable_pages();
}

bool Residency::touch(PageId page, bool write, const char** reason) noexcept {
  std::unique_lock lock(mutex);
  if (closing || poison || page.value >= table.size()) {
    *reason = closing || poison ? "the pager is closed" : "the address lies outside every mapped region";
    return false;
  }
  ++counts.touches;
  PageEntry& entry = table.at(page);
  if (entry.state == PageState::failed) table.set_state(page, PageState::absent);
  if (entry.state != PageState::device) {
    // Not pinned: many threads may fault at once, and a page evicted before its reader runs simply faults again.
    Waiter waiter;
    waiter.pages = std::span<const PageId>(&page, 1);
    waiter.missing = 1;
    try {
      wait(waiter, lock, Interrupted{});
    } catch (const std::exception&) {
      *reason = waiter.error_message;
      return false;
    }
  }
  if (entry.state == PageState::device && write && !entry.dirty) {
    try {
      space_.allow_write(page);
    } catch (const std::exception&) {
      *reason = "the page could not be opened for writing";
      return false;
    }
    entry.dirty = true;
  }
  return true;
}

void Residency::begin_pass() {
  const std::lock_guard lock(mutex);
  ++counts.passes;
  if (!tape) return;
  tape->begin_pass();
  wake_if_hungry();
}

void Residency::set_schedule(std::optional<Schedule> schedule) {
  const std::lock_guard lock(mutex);
  tape = schedule ? std::make_unique<Tape>(ScheduleId{schedules_added_++}, *std::move(schedule)) : nullptr;
  hungry = false;
  wake();
}

ScheduleId Residency::add_schedule(Schedule schedule, ScheduleKind kind) {
  const std::lock_guard lock(mutex);
  const ScheduleId id{schedules_added_};
  if (tape) {
    tape->add(id, std::move(schedule), kind);
  } else {
    tape = std::make_unique<Tape>(id, std::move(schedule), kind);
    hungry = false;
    wake();
  }
  ++schedules_added_;
  return id;
}

void Residency::follow_schedule(ScheduleId id) {
  const std::lock_guard lock(mutex);
  if (!tape) throw Error(ErrorKind::invalid, "no schedule is known");
  tape->follow(id);
  hungry = false;
  wake();
}

void Residency::forget_schedule(ScheduleId id) {
  const std::lock_guard lock(mutex);
  if (!tape) throw Error(ErrorKind::invalid, "no schedule is known");
  if (tape->known_count() == 1 && tape->followed() == id) {
    tape = nullptr;
  } else {
    tape->forget(id);
  }
  hungry = false;
  wake();
}

std::optional<ScheduleId> Residency::followed_schedule() const {
  const std::lock_guard lock(mutex);
  return tape ? std::optional(tape->followed()) : std::nullopt;
}

std::optional<SetId> Residency::next_set() const {
  const std::lock_guard lock(mutex);
  return tape ? std::optional(tape->schedule().set_of(tape->position())) : std::nullopt;
}

Counters Residency::counters() const {
  const std::lock_guard lock(mutex);
  return counts;
}

std::vector<Event> Residency::events() const {
  const std::lock_guard lock(mutex);
  return ring_.snapshot();
}

std::uint64_t Residency::events_overwritten() const {
  const std::lock_guard lock(mutex);
  return ring_.overwritten();
}

void Residency::reset_statistics() {
  const std::lock_guard lock(mutex);
  counts = Counters{};
  if (tape) tape->switches = tape->jumps = tape->off_schedule = 0;
  ring_.clear();
}

std::vector<std::uint8_t> Residency::page_states() const {
  const std::lock_guard lock(mutex);
  std::vector<std::uint8_t> states(table.size());
  for (std::uint32_t page = 0; page < states.size(); ++page)
    states[page] = static_cast<std::uint8_t>(table.at(PageId{page}).state);
  return states;
}

std::size_t Residency::pinned_pages() const {
  const std::lock_guard lock(mutex);
  return pinned_pages_;
}

bool Residency::is_poisoned() const {
  const std::lock_guard lock(mutex);
  return poison.has_value();
}

TapeCounters Residency::tape_counters() const {
  const std::lock_guard lock(mutex);
  if (!tape) return {};
  return {tape->position(), tape->switches, tape->jumps, tape->off_schedule};
}

// ---------------------------------------------------------------- the executor's side

void Residency::wake() noexcept {
  IoQueue* queue = waker_.load();
  if (queue != nullptr) queue->wake();
}

void Residency::wake_if_hungry() {
  if (!hungry || !tape) return;
  const bool initial_is_next = tape->next_initial < tape->schedule().initial_pages().size();
  if (initial_is_next || tape->catch_up_is_next()) {  // for want of a frame, which a release may have freed
    hungry = false;
    wake();
    return;
  }
  if (tape->schedule().action_count() == 0) return;
  const Action action = tape->schedule().action(tape->next_action);
  if (action.step > tape->position()) return;
  if (action.evict.valid() && table.at(action.evict).pins > 0) return;
  hungry = false;
  wake();
}

void Residency::record(EventKind kind, PageId page, FrameId frame) {
  ring_.add(kind, static_cast<std::int32_t>(page.value), static_cast<std::int32_t>(frame.value),
            tape ? tape->position() - 1 : -1, -1);
}

void Residency::unlink(Waiter& waiter) {
  Waiter** link = &waiters;
  while (*link != &waiter) {
    TP_CHECK(*link != nullptr);
    link = &(*link)->next;
  }
  *link = waiter.next;
  waiter.next = nullptr;
}

void Residency::page_arrived(PageId page, FrameId frame) {
  table.set_state(page, PageState::device);
  frame_page[frame.value] = page;
  table.at(page).last_use = ++tick_;
  for (Waiter* waiter = waiters; waiter != nullptr;) {
    Waiter* next = waiter->next;
    if (std::binary_search(waiter->pages.begin(), waiter->pages.end(), page) && --waiter->missing == 0) {
      unlink(*waiter);
      finish(*waiter, kResident);
    }
    waiter = next;
  }
}

const char* Residency::keep_message(std::string message) {
  // Messages outlive their waiters; equal ones are kept once, and there are as many as there are ways to fail.
  for (const auto& kept : messages_) {
    if (*kept == message) return kept->c_str();
  }
  messages_.push_back(std::make_unique<std::string>(std::move(message)));
  return messages_.back()->c_str();
}

void Residency::fail_waiter(Waiter& waiter, const Error& error) {
  waiter.error_kind = error.kind();
  waiter.error_number = error.error_number();
  waiter.error_message = keep_message(error.what());
  unlink(waiter);
  finish(waiter, kFailed);
}

void Residency::page_failed(PageId page, const Error& error) {
  ++counts.failures;
  for (Waiter* waiter = waiters; waiter != nullptr;) {
    Waiter* next = waiter->next;
    if (std::binary_search(waiter->pages.begin(), waiter->pages.end(), page)) fail_waiter(*waiter, error);
    waiter = next;
  }
}

void Residency::fail_all_waiters(const Error& error) {
  while (waiters != nullptr) fail_waiter(*waiters, error);
}

void Residency::device_lost(const Error& error) {
  {
    const std::lock_guard lock(mutex);
    if (!poison) poison = error;
  }
  wake();  // the executor tells those who wait
}

std::optional<std::int64_t> Residency::eviction_rank(PageId page, std::int64_t used_after) const {
  const PageEntry& entry = table.at(page);
  const auto age = -static_cast<std::int64_t>(entry.last_use);
  if (!tape) return age;
  constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max() / 2;
  const Schedule& schedule = tape->schedule();
  const std::optional<std::int64_t> use = schedule.next_use(page, tape->position());
  if (!use) return kNever + age;  // never used by the schedule: first to go, least recently used first
  if (*use <= used_after) return std::nullopt;
  // A page that the schedule brings in again before its next use is one that it does without meanwhile. Evicting one
  // that it keeps instead would leave the two exchanged for ever: equal bytes, but a fault in every pass.
  const std::optional<std::int64_t> reload = schedule.next_page_in(page, tape->next_action);
  const bool done_without = reload && schedule.action(*reload).deadline <= *use;
  return done_without ? *use + kNever / 2 : *use;
}

PageId Residency::choose_victim(std::int64_t used_after, bool clean_only) const {
  PageId best;
  std::int64_t best_rank = std::numeric_limits<std::int64_t>::min();
  for (const PageId page : frame_page) {
    if (!page.valid()) continue;
    const PageEntry& entry = table.at(page);
    if (entry.state != PageState::device || entry.pins > 0 || (clean_only && entry.dirty && !entry.dead) ||
        !quiet(entry))
      continue;
    if (entry.dead) return page;  // costs nothing, now or later
    const std::optional<std::int64_t> rank = eviction_rank(page, used_after);
    if (rank && (!best.valid() || *rank > best_rank)) {
      best = page;
      best_rank = *rank;
    }
  }
  return best;
}

}  // namespace tp
