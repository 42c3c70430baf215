// SPDX-License-Identifier: Apache-2.0
// Where the run is, and on which of the known schedules.
//
// An acquire that is the expected next step moves the position by one. Anything else means that the pass is not the one
// expected, and in this order:
//   switch: another known schedule begins with exactly the steps that this pass took so far and this one: it is
//     followed from here on. Of several, the one that was followed last.
//   jump: the step is found a little further on (the model left steps out): the position goes there.
//   off schedule: served on demand, and the position stays.
// A pass goes from one begin_pass (or follow) to the next. Once it took a step that no schedule has there, none begins
// with its steps, so it switches no more: whether it may is one flag, and while it may, the steps it took are those of
// the followed schedule. Stray accesses are no steps: they never switch, nor keep a pass from switching.
//
// [Note: catching up]
// The schedule switched to counts on pages that its own earlier actions and those of the pass before have brought in or
// kept. Those that are absent are brought in too, in the order of the steps that use them: once around the cycle, a
// cursor goes over the steps in turn with the actions of the same deadlines, and takes every absent page that no
// remaining action brings in by then.
//
// Threads: under the lock of Residency. Blocking: never. Cost: match on schedule is O(1); a switch looks at each known
// schedule once; add compares the new schedule with each. Errors: Error(invalid) for an id that is not known, and from
// add when kSchedulesMax are.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "base/ids.hpp"
#include "base/limits.hpp"
#include "pager/schedule.hpp"

namespace tp {

enum class AcquireKind : std::uint8_t { step, stray };  // a module's window, or an access outside of any

// exact: the steps of a pass that was seen. common: what several passes have in common; that a pass takes other steps
// beside them is expected, so no such step switches away from it.
enum class ScheduleKind : std::uint8_t { exact, common };

class Tape {
 public:
  // Knows one schedule, and follows it.
  Tape(ScheduleId id, Schedule schedule, ScheduleKind kind = ScheduleKind::exact);

  void add(ScheduleId id, Schedule schedule, ScheduleKind kind = ScheduleKind::exact);
  // From the start of its cycle, its initial pages first.
  void follow(ScheduleId id);
  // The followed one too, if it is not the last: then the one followed before it is followed.
  void forget(ScheduleId id);
  std::size_t known_count() const noexcept { return known_.size(); }
  ScheduleId followed() const noexcept { return current_->id; }
  const Schedule& schedule() const noexcept { return current_->schedule; }
  std::int64_t position() const noexcept { return position_; }  // steps acquired so far; the next one's number

  // The absolute step that this acquire is, and the position moves behind it; nothing when off schedule. After a switch
  // the numbers are those of the new schedule's first cycle.
  std::optional<std::int64_t> match(SetId set, AcquireKind kind);
  void begin_pass() noexcept;

  // Whether the cursor's step comes before the next action; see [Note: catching up].
  bool catch_up_is_next() const;

  std::int64_t next_action = 0;    // absolute; the executor's
  std::size_t next_initial = 0;    // into initial_pages; the executor's
  std::int64_t catch_up_step = 0;  // absolute; the executor's
  std::int64_t catch_up_end = 0;   // nothing to catch up from this step on
  std::uint64_t switches = 0;      // acquires at which another schedule was switched to
  std::uint64_t jumps = 0;         // acquires found further on
  std::uint64_t off_schedule = 0;  // acquires not found

 private:
  struct Known {
    ScheduleId id;
    ScheduleKind kind;
    Schedule schedule;
    std::uint64_t followed_at = 0;                           // larger: later
    std::size_t slot = 0;                                    // its row and column below
    std::array<std::int64_t, kSchedulesMax> prefix_of = {};  // by slot: schedule.common_prefix(that one)
  };

  Known& find(ScheduleId id);
  std::size_t free_slot() const;
  Known* continuation(SetId set) const;
  void start(Known& known) noexcept;
  void switch_to(Known& known, std::int64_t offset);

  std::vector<std::unique_ptr<Known>> known_;
  Known* current_ = nullptr;
  std::int64_t position_ = 0;
  std::int64_t pass_start_ = 0;
  bool may_switch_ = true;  // every step of this pass so far was the followed schedule's
  std::uint64_t follow_count_ = 0;
};

}  // namespace tp
