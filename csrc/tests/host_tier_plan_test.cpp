// SPDX-License-Identifier: Apache-2.0
#include "pager/host_tier_plan.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

namespace tp {
namespace {

// From each page-in to the next one of the same page, around the cycle; the last place of both counts.
struct Stay {
  std::size_t begin, end;  // end: the page-in that would find it, end > begin, may lie in the next cycle
};

std::vector<Stay> stays_of(const std::vector<PageId>& page_ins) {
  std::vector<Stay> stays;
  for (std::size_t i = 0; i < page_ins.size(); ++i) {
    std::size_t next = i + 1;
    while (page_ins[next % page_ins.size()] != page_ins[i]) ++next;
    stays.push_back({i, next});
  }
  return stays;
}

// Pages kept between page-in t and the one after it.
std::size_t kept_after(const std::vector<Stay>& stays, unsigned chosen, std::size_t t) {
  std::size_t kept = 0;
  for (std::size_t i = 0; i < stays.size(); ++i) {
    if ((chosen >> i & 1u) == 0) continue;
    const Stay& stay = stays[i];
    const bool now = stay.begin <= t && t < stay.end;
    const bool from_before = stay.begin <= t + stays.size() && t + stays.size() < stay.end;
    kept += now + from_before;
  }
  return kept;
}

std::size_t most_hits(const std::vector<PageId>& page_ins, std::size_t frames) {
  const std::vector<Stay> stays = stays_of(page_ins);
  std::size_t best = 0;
  for (unsigned chosen = 0; chosen < 1u << stays.size(); ++chosen) {
    bool fits = true;
    for (std::size_t t = 0; t < stays.size() && fits; ++t) fits = kept_after(stays, chosen, t) <= frames;
    if (fits) best = std::max<std::size_t>(best, static_cast<std::size_t>(__builtin_popcount(chosen)));
  }
  return best;
}

TEST(HostTierPlan, keeps_within_one_page_in_of_the_most_that_any_choice_keeps) {
  std::mt19937_64 random(1);
  std::size_t optimal = 0, cases = 0;
  for (int round = 0; round < 400; ++round) {
    std::vector<PageId> page_ins(1 + random() % 9);
    for (PageId& page : page_ins) page = PageId{static_cast<std::uint32_t>(random() % 5)};
    const std::size_t frames = random() % 4;
    const std::vector<bool> hits = plan_host_hits(page_ins, frames);
    ASSERT_EQ(hits.size(), page_ins.size());
    // Never more pages at once than there are frames.
    const std::vector<Stay> stays = stays_of(page_ins);
    unsigned chosen = 0;
    for (std::size_t i = 0; i < stays.size(); ++i) chosen |= hits[stays[i].end % hits.size()] ? 1u << i : 0u;
    const auto found = static_cast<std::size_t>(std::count(hits.begin(), hits.end(), true));
    const std::size_t most = most_hits(page_ins, frames);
    ASSERT_LE(found, most);
    ASSERT_GE(found + 1, most);  // around a cycle, MIN is not optimal to the last page
    for (std::size_t t = 0; t < stays.size(); ++t) ASSERT_LE(kept_after(stays, chosen, t), frames);
    optimal += found == most;
    ++cases;
  }
  EXPECT_GE(optimal, cases * 9 / 10);
}

TEST(HostTierPlan, of_a_sweep_keeps_as_many_pages_as_there_are_frames) {
  std::vector<PageId> page_ins;
  for (std::uint32_t page = 0; page < 10; ++page) page_ins.push_back(PageId{page});
  const std::vector<bool> hits = plan_host_hits(page_ins, 4);
  EXPECT_EQ(std::count(hits.begin(), hits.end(), true), 4);
  EXPECT_TRUE(plan_host_hits({}, 4).empty());
  const std::vector<bool> none = plan_host_hits(page_ins, 0);
  EXPECT_EQ(std::count(none.begin(), none.end(), true), 0);
}

}  // namespace
}  // namespace tp
