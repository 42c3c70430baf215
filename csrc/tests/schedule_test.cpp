// SPDX-License-Identifier: Apache-2.0
#include "pager/schedule.hpp"

#include <gtest/gtest.h>

#include <string>

#include "base/error.hpp"

namespace tp {
namespace {

using Ints = std::vector<std::int32_t>;

// Three sets of one page each, used in the order 0 1 2 1; frames for two pages.
struct Example {
  std::vector<std::vector<PageId>> sets{{PageId{0}}, {PageId{1}}, {PageId{2}}};
  Ints step_set{0, 1, 2, 1}, initial{0, 1}, step{1, 3}, deadline{2, 4}, page_in{2, 0}, evict{0, 2};
  Schedule build(std::size_t frames = 2) const {
    return Schedule({step_set, initial, step, deadline, page_in, evict}, sets, 3, frames);
  }
};

std::string refusal(const Example& example) {
  try {
    example.build();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::invalid);
    return error.what();
  }
  return "accepted";
}

TEST(Schedule, numbers_run_on_across_cycles) {
  const Schedule schedule = Example{}.build();
  EXPECT_EQ(schedule.set_of(6), SetId{2});
  EXPECT_EQ(schedule.next_step_of(SetId{1}, 0), 1);
  EXPECT_EQ(schedule.next_step_of(SetId{1}, 2), 3);
  EXPECT_EQ(schedule.next_step_of(SetId{1}, 4), 5);
  EXPECT_EQ(schedule.next_use(PageId{0}, 1), 4);
  EXPECT_EQ(schedule.next_page_in(PageId{2}, 1), 2);  // the action of the next cycle
  const Action action = schedule.action(3);           // second action of the second cycle
  EXPECT_EQ(action.step, 7);
  EXPECT_EQ(action.deadline, 8);
  EXPECT_EQ(action.page_in, PageId{0});
  EXPECT_EQ(schedule.initial_rank(PageId{1}), 1u);
  EXPECT_EQ(schedule.initial_rank(PageId{2}), 2u);   // none
  EXPECT_EQ(schedule.initial_rank(PageId{99}), 2u);  // mapped later
}

TEST(Schedule, finds_what_is_due_and_what_two_have_in_common) {
  const Schedule schedule = Example{}.build();
  EXPECT_EQ(schedule.first_action_due_at(0), 0);
  EXPECT_EQ(schedule.first_action_due_at(3), 1);
  EXPECT_EQ(schedule.first_action_due_at(5), 2);
  Example other;
  other.step_set = {0, 1, 2, 1, 0, 1, 0};  // goes on into the second cycle
  EXPECT_EQ(schedule.common_prefix(other.build()), 6);
  EXPECT_EQ(other.build().common_prefix(schedule), 4);
  other.step_set = {1};
  other.step = other.deadline = other.page_in = other.evict = {};
  EXPECT_EQ(schedule.common_prefix(other.build()), 0);
}

TEST(Schedule, refuses_each_broken_rule_by_name) {
  Example example;
  example.step_set.clear();
  EXPECT_NE(refusal(example).find("no steps"), std::string::npos);
  example = Example{};
  example.step_set[2] = 3;
  EXPECT_NE(refusal(example).find("step_set[2] is 3"), std::string::npos);
  example = Example{};
  example.page_in[0] = -1;
  EXPECT_NE(refusal(example).find("action_page_in[0]"), std::string::npos);
  example = Example{};
  example.evict[1] = 3;
  EXPECT_NE(refusal(example).find("action_evict[1]"), std::string::npos);
  example = Example{};
  example.deadline[1] = 8;
  EXPECT_NE(refusal(example).find("action_deadline[1]"), std::string::npos);
  example = Example{};
  example.step = {3, 1};
  EXPECT_NE(refusal(example).find("descends"), std::string::npos);
  example = Example{};
  example.step[1] = 4;
  example.deadline[1] = 3;
  EXPECT_NE(refusal(example).find("after its deadline"), std::string::npos);
  example = Example{};
  example.page_in.pop_back();
  EXPECT_NE(refusal(example).find("differ in length"), std::string::npos);
  example = Example{};
  example.initial = {0, 1, 2};
  EXPECT_NE(refusal(example).find("more pages than there are frames"), std::string::npos);
}

}  // namespace
}  // namespace tp
