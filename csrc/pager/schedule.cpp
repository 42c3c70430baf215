// SPDX-License-Identifier: Apache-2.0
#include "pager/schedule.hpp"

#include <algorithm>
#include <string>

#include "base/check.hpp"
#include "base/error.hpp"
#include "pager/host_tier_plan.hpp"

namespace tp {
namespace {

[[noreturn]] void refuse(const std::string& what) {
  throw Error(ErrorKind::invalid,
              "schedule refused: " + what + "; schedules come from tensorpager.pass_plan.plan_pass()");
}

void check_range(const char* array, std::span<const std::int32_t> values, std::int64_t low, std::int64_t end) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (values[i] < low || values[i] >= end) {
      refuse(std::string(array) + "[" + std::to_string(i) + "] is " + std::to_string(values[i]) + ", outside [" +
             std::to_string(low) + ", " + std::to_string(end) + ")");
    }
  }
}

void check_ascending(const char* array, std::span<const std::int32_t> values) {
  const auto drop = std::adjacent_find(values.begin(), values.end(), std::greater<>());
  if (drop != values.end())
    refuse(std::string(array) + " descends after index " + std::to_string(drop - values.begin()));
}

void check_arrays(const ScheduleArrays& arrays, std::size_t set_count, std::size_t page_count,
                  std::size_t frame_count) {
  const auto steps = static_cast<std::int64_t>(arrays.step_set.size());
  const std::size_t actions = arrays.action_page_in.size();
  if (steps == 0) refuse("it has no steps");
  if (arrays.action_step.size() != actions || arrays.action_deadline.size() != actions ||
      arrays.action_evict.size() != actions) {
    refuse("the action arrays differ in length");
  }
  const auto pages = static_cast<std::int64_t>(page_count);
  check_range("step_set", arrays.step_set, 0, static_cast<std::int64_t>(set_count));
  check_range("initial_pages", arrays.initial_pages, 0, pages);
  check_range("action_step", arrays.action_step, 0, steps + 1);
  check_range("action_deadline", arrays.action_deadline, 0, 2 * steps);
  check_range("action_page_in", arrays.action_page_in, 0, pages);
  check_range("action_evict", arrays.action_evict, -1, pages);
  check_ascending("action_step", arrays.action_step);
  check_ascending("action_deadline", arrays.action_deadline);
  if (arrays.initial_pages.size() > frame_count) refuse("initial_pages holds more pages than there are frames");
}

}  // namespace

void Schedule::Occurrences::build(std::size_t keys, const std::vector<std::pair<std::uint32_t, std::int32_t>>& pairs) {
  row.assign(keys + 1, 0);
  for (const auto& [key, where] : pairs) ++row[key + 1];
  for (std::size_t key = 0; key < keys; ++key) row[key + 1] += row[key];
  position.resize(pairs.size());
  std::vector<std::uint32_t> fill(row.begin(), row.end() - 1);
  for (const auto& [key, where] : pairs) position[fill[key]++] = where;  // pairs come in ascending order of `where`
}

std::optional<std::int64_t> Schedule::Occurrences::next(std::uint32_t key, std::int64_t from,
                                                        std::int64_t cycle_length) const {
  TP_DCHECK(from >= 0 && cycle_length > 0);
  if (key + 1 >= row.size() || row[key] == row[key + 1]) return std::nullopt;
  const std::int64_t cycle = from / cycle_length;
  const auto within = static_cast<std::int32_t>(from % cycle_length);
  const auto begin = position.begin() + row[key];
  const auto end = position.begin() + row[key + 1];
  const auto found = std::lower_bound(begin, end, within);
  if (found != end) return cycle * cycle_length + *found;
  return (cycle + 1) * cycle_length + *begin;
}

Schedule::Schedule(const ScheduleArrays& arrays, std::span<const std::vector<PageId>> set_pages, std::size_t page_count,
                   std::size_t frame_count, std::size_t host_frame_count) {
  check_arrays(arrays, set_pages.size(), page_count, frame_count);
  std::vector<std::pair<std::uint32_t, std::int32_t>> by_set, by_page, by_action;
  for (std::size_t step = 0; step < arrays.step_set.size(); ++step) {
    const auto set = static_cast<std::uint32_t>(arrays.step_set[step]);
    step_set_.push_back(SetId{set});
    by_set.emplace_back(set, static_cast<std::int32_t>(step));
    for (const PageId page : set_pages[set]) by_page.emplace_back(page.value, static_cast<std::int32_t>(step));
  }
  initial_rank_.assign(page_count, static_cast<std::uint32_t>(arrays.initial_pages.size()));
  for (const std::int32_t page : arrays.initial_pages) {
    initial_rank_[static_cast<std::size_t>(page)] = static_cast<std::uint32_t>(initial_pages_.size());
    initial_pages_.push_back(PageId{static_cast<std::uint32_t>(page)});
  }
  for (std::size_t i = 0; i < arrays.action_page_in.size(); ++i) {
    const auto page = static_cast<std::uint32_t>(arrays.action_page_in[i]);
    const PageId evict =
        arrays.action_evict[i] < 0 ? PageId{} : PageId{static_cast<std::uint32_t>(arrays.action_evict[i])};
    if (arrays.action_deadline[i] < arrays.action_step[i])
      refuse("action " + std::to_string(i) + " may start only after its deadline");
    actions_.push_back({arrays.action_step[i], arrays.action_deadline[i], PageId{page}, evict});
    by_action.emplace_back(page, static_cast<std::int32_t>(i));
  }
  steps_by_set_.build(set_pages.size(), by_set);
  uses_by_page_.build(page_count, by_page);
  actions_by_page_.build(page_count, by_action);
  std::vector<PageId> page_ins;
  for (const Action& action : actions_) page_ins.push_back(action.page_in);
  host_hits_ = plan_host_hits(page_ins, host_frame_count);
}

std::size_t Schedule::initial_rank(PageId page) const {
  // Pages mapped after the schedule was made are in none of its lists.
  return page.value < initial_rank_.size() ? initial_rank_[page.value] : initial_pages_.size();
}

bool Schedule::host_hit(std::int64_t absolute_action) const {
  return host_hits_[static_cast<std::size_t>(absolute_action % action_count())];
}

SetId Schedule::set_of(std::int64_t absolute_step) const {
  TP_DCHECK(absolute_step >= 0);
  return step_set_[static_cast<std::size_t>(absolute_step % step_count())];
}

Action Schedule::action(std::int64_t absolute_action) const {
  TP_CHECK(absolute_action >= 0 && !actions_.empty());
  Action action = actions_[static_cast<std::size_t>(absolute_action % action_count())];
  const std::int64_t first_step = absolute_action / action_count() * step_count();
  action.step += first_step;
  action.deadline += first_step;
  return action;
}

std::optional<std::int64_t> Schedule::next_step_of(SetId set, std::int64_t from) const {
  return steps_by_set_.next(set.value, from, step_count());
}

std::optional<std::int64_t> Schedule::next_use(PageId page, std::int64_t from) const {
  return uses_by_page_.next(page.value, from, step_count());
}

std::optional<std::int64_t> Schedule::next_page_in(PageId page, std::int64_t from) const {
  if (actions_.empty()) return std::nullopt;
  return actions_by_page_.next(page.value, from, action_count());
}

std::int64_t Schedule::first_action_due_at(std::int64_t step) const {
  const auto due = [](const Action& action, std::int64_t at) { return action.deadline < at; };
  return std::lower_bound(actions_.begin(), actions_.end(), step, due) - actions_.begin();
}

std::int64_t Schedule::common_prefix(const Schedule& other) const {
  std::int64_t length = 0;
  while (length < other.step_count() && set_of(length) == other.set_of(length)) ++length;
  return length;
}

}  // namespace tp
