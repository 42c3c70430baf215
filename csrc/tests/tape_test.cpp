// SPDX-License-Identifier: Apache-2.0
#include "pager/tape.hpp"

#include <gtest/gtest.h>

#include <algorithm>

#include "base/error.hpp"

namespace tp {
namespace {

using Ints = std::vector<std::int32_t>;

// Three sets of one page each, used in the order 0 1 2 1; frames for two pages.
struct Example {
  std::vector<std::vector<PageId>> sets{{PageId{0}}, {PageId{1}}, {PageId{2}}};
  Ints step_set{0, 1, 2, 1}, initial{0, 1}, step{1, 3}, deadline{2, 4}, page_in{2, 0}, evict{0, 2};
  Schedule build() const { return Schedule({step_set, initial, step, deadline, page_in, evict}, sets, 3, 2); }
};

// Sets and pages 0 to 9, one page each.
Schedule of_steps(const Ints& step_set) {
  std::vector<std::vector<PageId>> sets;
  for (std::uint32_t page = 0; page < 10; ++page) sets.push_back({PageId{page}});
  return Schedule({step_set, {}, {}, {}, {}, {}}, sets, 10, 10);
}

std::optional<std::int64_t> step(Tape& tape, std::uint32_t set) { return tape.match(SetId{set}, AcquireKind::step); }

void steps(Tape& tape, std::initializer_list<std::uint32_t> sets) {
  for (const std::uint32_t set : sets) step(tape, set);
}

TEST(Tape, follows_the_expected_steps_for_ever) {
  Tape tape(ScheduleId{0}, Example{}.build());
  for (const std::int32_t set : {0, 1, 2, 1, 0, 1, 2, 1}) {
    const std::int64_t expected = tape.position();
    EXPECT_EQ(tape.match(SetId{static_cast<std::uint32_t>(set)}, AcquireKind::step), expected);
  }
  EXPECT_EQ(tape.position(), 8);
  EXPECT_EQ(tape.jumps + tape.off_schedule, 0u);
}

TEST(Tape, jumps_over_steps_left_out_but_not_back_or_for_stray_accesses) {
  Tape tape(ScheduleId{0}, Example{}.build());
  EXPECT_EQ(tape.match(SetId{2}, AcquireKind::step), 2);  // 0 and 1 left out
  EXPECT_EQ(tape.position(), 3);
  EXPECT_EQ(tape.jumps, 1u);
  EXPECT_EQ(tape.match(SetId{2}, AcquireKind::step), std::nullopt);  // 3 steps ahead in the next cycle: a repetition
  EXPECT_EQ(tape.match(SetId{0}, AcquireKind::stray), std::nullopt);
  EXPECT_EQ(tape.position(), 3);
  EXPECT_EQ(tape.off_schedule, 2u);
  EXPECT_EQ(tape.match(SetId{1}, AcquireKind::stray), 3);  // a stray access that the trace had seen here
}

TEST(Tape, begin_pass_goes_to_the_next_start_of_the_cycle) {
  Tape tape(ScheduleId{0}, Example{}.build());
  tape.begin_pass();
  EXPECT_EQ(tape.position(), 0);
  tape.match(SetId{0}, AcquireKind::step);
  tape.begin_pass();
  EXPECT_EQ(tape.position(), 4);
}

TEST(Tape, switches_where_another_schedule_begins_with_the_steps_of_this_pass) {
  Tape tape(ScheduleId{7}, of_steps({0, 1, 2, 3}));
  tape.add(ScheduleId{8}, of_steps({0, 1, 5, 6, 7}));
  for (int pass = 0; pass < 3; ++pass) {
    tape.follow(ScheduleId{7});
    tape.begin_pass();
    steps(tape, {0, 1});
    EXPECT_EQ(tape.followed(), ScheduleId{7});
    EXPECT_EQ(step(tape, 5), 2);
    EXPECT_EQ(tape.followed(), ScheduleId{8});
    EXPECT_EQ(step(tape, 6), 3);
    EXPECT_EQ(step(tape, 7), 4);
  }
  EXPECT_EQ(tape.switches, 3u);
  tape.begin_pass();  // goes on with the one switched to, from which the first is switched to in turn
  EXPECT_EQ(tape.position(), 5);
  EXPECT_EQ(step(tape, 0), 5);
  EXPECT_EQ(step(tape, 1), 6);
  EXPECT_EQ(step(tape, 2), 2);
  EXPECT_EQ(tape.followed(), ScheduleId{7});
  EXPECT_EQ(tape.jumps + tape.off_schedule, 0u);
}

TEST(Tape, switches_at_the_first_step_and_more_than_once_in_a_pass) {
  Tape tape(ScheduleId{0}, of_steps({0, 1, 2}));
  tape.add(ScheduleId{1}, of_steps({4, 1, 2}));
  tape.add(ScheduleId{2}, of_steps({4, 1, 3}));
  EXPECT_EQ(step(tape, 4), 0);
  EXPECT_EQ(tape.followed(), ScheduleId{1});
  EXPECT_EQ(step(tape, 1), 1);
  EXPECT_EQ(step(tape, 3), 2);
  EXPECT_EQ(tape.followed(), ScheduleId{2});
  EXPECT_EQ(tape.switches, 2u);
}

TEST(Tape, of_several_the_one_followed_last_is_switched_to) {
  Tape tape(ScheduleId{0}, of_steps({0, 1}));
  tape.add(ScheduleId{1}, of_steps({0, 2, 3}));
  tape.add(ScheduleId{2}, of_steps({0, 2, 4}));
  for (const std::uint32_t latest : {1u, 2u, 1u}) {
    tape.follow(ScheduleId{latest});
    tape.follow(ScheduleId{0});
    steps(tape, {0, 2});
    EXPECT_EQ(tape.followed(), ScheduleId{latest});
  }
}

TEST(Tape, does_not_switch_without_the_whole_prefix_or_after_leaving_it) {
  Tape tape(ScheduleId{0}, of_steps({0, 1, 2, 3, 4, 5}));
  tape.add(ScheduleId{1}, of_steps({0, 9, 7}));
  tape.add(ScheduleId{2}, of_steps({0, 3, 8}));
  steps(tape, {0, 1, 7});  // 7 is the third step of schedule 1, after another second one
  EXPECT_EQ(tape.off_schedule, 1u);
  tape.begin_pass();
  steps(tape, {0, 6, 9});  // 6 is no schedule's; 9 would have continued
  EXPECT_EQ(tape.off_schedule, 3u);
  tape.begin_pass();
  steps(tape, {0, 2, 3});  // a jump leaves steps out
  EXPECT_EQ(tape.jumps, 1u);
  EXPECT_EQ(tape.switches, 0u);
  EXPECT_EQ(tape.followed(), ScheduleId{0});
  tape.begin_pass();
  steps(tape, {0, 3});  // could be jumped to: what was seen goes first
  EXPECT_EQ(tape.followed(), ScheduleId{2});
  EXPECT_EQ(tape.jumps, 1u);
}

TEST(Tape, stray_accesses_neither_switch_nor_keep_from_switching) {
  Tape tape(ScheduleId{0}, of_steps({0, 1}));
  tape.add(ScheduleId{1}, of_steps({0, 2, 3}));
  step(tape, 0);
  EXPECT_EQ(tape.match(SetId{2}, AcquireKind::stray), std::nullopt);
  EXPECT_EQ(tape.match(SetId{9}, AcquireKind::stray), std::nullopt);
  EXPECT_EQ(tape.followed(), ScheduleId{0});
  EXPECT_EQ(step(tape, 2), 1);
  EXPECT_EQ(tape.followed(), ScheduleId{1});
}

TEST(Tape, a_pass_that_goes_on_past_the_end_switches_to_the_longer_one) {
  Tape tape(ScheduleId{0}, of_steps({0, 1}));
  tape.add(ScheduleId{1}, of_steps({0, 1, 0, 1, 5}));
  steps(tape, {0, 1, 0, 1});
  EXPECT_EQ(tape.followed(), ScheduleId{0});
  EXPECT_EQ(step(tape, 5), 4);
  EXPECT_EQ(tape.followed(), ScheduleId{1});
  tape.follow(ScheduleId{0});
  steps(tape, {0, 1, 0, 1, 0, 1, 5});  // beyond the end of the other: nothing to continue with
  EXPECT_EQ(tape.followed(), ScheduleId{0});
}

TEST(Tape, what_passes_have_in_common_is_not_left_but_may_be_switched_to) {
  Tape tape(ScheduleId{0}, of_steps({0, 1, 2}), ScheduleKind::common);
  tape.add(ScheduleId{1}, of_steps({0, 5, 1}));
  steps(tape, {0, 5, 1, 2});
  EXPECT_EQ(tape.followed(), ScheduleId{0});
  EXPECT_EQ(tape.off_schedule, 1u);
  tape.follow(ScheduleId{1});
  steps(tape, {0, 1});
  EXPECT_EQ(tape.followed(), ScheduleId{0});
}

TEST(Tape, forgets_and_refuses) {
  Tape tape(ScheduleId{0}, of_steps({0, 1}));
  for (std::uint32_t id = 1; id < kSchedulesMax; ++id) tape.add(ScheduleId{id}, of_steps({0, 2}));
  EXPECT_THROW(tape.add(ScheduleId{99}, of_steps({0})), Error);
  EXPECT_THROW(tape.follow(ScheduleId{99}), Error);
  EXPECT_THROW(tape.forget(ScheduleId{99}), Error);
  tape.follow(ScheduleId{3});
  tape.follow(ScheduleId{5});
  tape.forget(ScheduleId{5});
  EXPECT_EQ(tape.followed(), ScheduleId{3});
  tape.add(ScheduleId{99}, of_steps({0, 7}));  // in the place of the one forgotten, with its own prefixes
  steps(tape, {0, 7});
  EXPECT_EQ(tape.followed(), ScheduleId{99});
  EXPECT_EQ(tape.known_count(), kSchedulesMax);
}

TEST(Tape, after_a_switch_what_is_due_comes_next_and_the_rest_is_caught_up_with) {
  Example other;
  other.step_set = {0, 2, 1, 2};
  other.deadline = {1, 4};
  other.step = {1, 3};
  Tape tape(ScheduleId{0}, Example{}.build());
  tape.add(ScheduleId{1}, other.build());
  steps(tape, {0, 2});
  EXPECT_EQ(tape.followed(), ScheduleId{1});
  EXPECT_EQ(tape.position(), 2);
  EXPECT_EQ(tape.next_initial, 2u);  // its initial pages were for the start of the pass
  EXPECT_EQ(tape.next_action, 1);    // the first was due at step 1
  EXPECT_EQ(tape.catch_up_step, 2);
  EXPECT_EQ(tape.catch_up_end, 6);
  EXPECT_TRUE(tape.catch_up_is_next());
  tape.catch_up_step = 5;  // the action due at step 4 goes first
  EXPECT_FALSE(tape.catch_up_is_next());
  tape.next_action = 2;
  EXPECT_TRUE(tape.catch_up_is_next());
}

}  // namespace
}  // namespace tp
