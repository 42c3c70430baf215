// SPDX-License-Identifier: Apache-2.0
#include "pager/tape.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "base/check.hpp"
#include "base/error.hpp"

namespace tp {

Tape::Tape(ScheduleId id, Schedule schedule, ScheduleKind kind) {
  add(id, std::move(schedule), kind);
  start(*known_.front());
}

Tape::Known& Tape::find(ScheduleId id) {
  const auto found = std::find_if(known_.begin(), known_.end(), [id](const auto& known) { return known->id == id; });
  if (found == known_.end())
    throw Error(ErrorKind::invalid, "no known schedule has the id " + std::to_string(id.value));
  return **found;
}

std::size_t Tape::free_slot() const {
  std::size_t slot = 0;
  const auto taken = [&slot](const auto& known) { return known->slot == slot; };
  while (std::any_of(known_.begin(), known_.end(), taken)) ++slot;
  return slot;
}

void Tape::add(ScheduleId id, Schedule schedule, ScheduleKind kind) {
  if (known_.size() >= kSchedulesMax) {
    throw Error(ErrorKind::invalid, "at most " + std::to_string(kSchedulesMax) +
                                        " schedules can be known at a time; forget one with forget_schedule()");
  }
  auto added = std::make_unique<Known>(Known{id, kind, std::move(schedule)});
  added->slot = free_slot();
  for (const auto& known : known_) {
    known->prefix_of[added->slot] = known->schedule.common_prefix(added->schedule);
    added->prefix_of[known->slot] = added->schedule.common_prefix(known->schedule);
  }
  known_.push_back(std::move(added));
}

void Tape::follow(ScheduleId id) { start(find(id)); }

void Tape::forget(ScheduleId id) {
  const Known* const forgotten = &find(id);
  TP_CHECK(known_.size() > 1);
  const bool followed = forgotten == current_;
  std::erase_if(known_, [forgotten](const auto& known) { return known.get() == forgotten; });
  if (!followed) return;
  const auto earlier = [](const auto& one, const auto& other) { return one->followed_at < other->followed_at; };
  start(**std::max_element(known_.begin(), known_.end(), earlier));
}

void Tape::start(Known& known) noexcept {
  current_ = &known;
  known.followed_at = ++follow_count_;
  position_ = pass_start_ = 0;
  may_switch_ = true;
  next_action = 0;
  next_initial = 0;
  catch_up_step = catch_up_end = 0;
}

Tape::Known* Tape::continuation(SetId set) const {
  const std::int64_t offset = position_ - pass_start_;
  Known* best = nullptr;
  for (const auto& known : known_) {
    const bool continues = known.get() != current_ && offset < known->schedule.step_count() &&
                           current_->prefix_of[known->slot] >= offset && known->schedule.set_of(offset) == set;
    if (continues && (best == nullptr || known->followed_at > best->followed_at)) best = known.get();
  }
  return best;
}

void Tape::switch_to(Known& known, std::int64_t offset) {
  start(known);
  ++switches;
  position_ = offset + 1;
  next_initial = known.schedule.initial_pages().size();
  next_action = known.schedule.first_action_due_at(position_);
  catch_up_step = position_;
  catch_up_end = position_ + known.schedule.step_count();
}

std::optional<std::int64_t> Tape::match(SetId set, AcquireKind kind) {
  const Schedule& schedule = current_->schedule;
  if (schedule.set_of(position_) == set) return position_++;
  if (kind == AcquireKind::step) {
    if (may_switch_ && current_->kind == ScheduleKind::exact) {
      if (Known* known = continuation(set)) {
        switch_to(*known, position_ - pass_start_);
        return position_ - 1;
      }
    }
    may_switch_ = false;
    // Further on in this pass: the model left steps out (an expert not chosen, an early exit). Far ahead means that it
    // went back instead (recomputation, a module called again), and the schedule stays where it is.
    const std::optional<std::int64_t> found = schedule.next_step_of(set, position_);
    if (found && *found - position_ <= schedule.step_count() / 2) {
      ++jumps;
      position_ = *found + 1;
      return found;
    }
  }
  ++off_schedule;
  return std::nullopt;
}

void Tape::begin_pass() noexcept {
  const std::int64_t steps = schedule().step_count();
  position_ = (position_ + steps - 1) / steps * steps;
  pass_start_ = position_;
  may_switch_ = true;
}

bool Tape::catch_up_is_next() const {
  if (catch_up_step >= catch_up_end) return false;
  if (schedule().action_count() == 0) return true;
  return catch_up_step <= schedule().action(next_action).deadline;
}

}  // namespace tp
