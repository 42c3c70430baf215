// SPDX-License-Identifier: Apache-2.0
#include "pager/page_table.hpp"

#include <gtest/gtest.h>

#include <string>

namespace tp {
namespace {

constexpr PageId kPage{0};

PageTable one_page() {
  PageTable table;
  table.append(PageEntry{});
  return table;
}

TEST(PageTable, a_page_in_passes_every_state_and_counts_as_resident) {
  PageTable table = one_page();
  table.at(kPage).frame = FrameId{1};
  for (const PageState state : {PageState::reading, PageState::host, PageState::copying_in}) {
    table.set_state(kPage, state);
    EXPECT_FALSE(table.resident(kPage));
  }
  table.set_state(kPage, PageState::device);
  EXPECT_TRUE(table.resident(kPage));
  EXPECT_EQ(table.resident_count(), 1u);
  table.set_state(kPage, PageState::copying_out);
  EXPECT_EQ(table.resident_count(), 0u);
}

TEST(PageTable, allows_exactly_the_transitions_of_the_life_of_a_page) {
  const std::pair<PageState, PageState> allowed[] = {
      {PageState::absent, PageState::reading},     {PageState::absent, PageState::host},
      {PageState::reading, PageState::host},       {PageState::reading, PageState::failed},
      {PageState::host, PageState::absent},        {PageState::host, PageState::copying_in},
      {PageState::host, PageState::writing},       {PageState::host, PageState::failed},
      {PageState::copying_in, PageState::device},  {PageState::copying_in, PageState::failed},
      {PageState::device, PageState::copying_out}, {PageState::copying_out, PageState::host},
      {PageState::absent, PageState::copying_in},  {PageState::device, PageState::absent},
      {PageState::device, PageState::host},        {PageState::writing, PageState::absent},
      {PageState::writing, PageState::host},       {PageState::failed, PageState::absent}};
  std::size_t count = 0;
  for (std::size_t from = 0; from < kPageStateCount; ++from) {
    for (std::size_t to = 0; to < kPageStateCount; ++to) {
      count += page_transition_allowed(static_cast<PageState>(from), static_cast<PageState>(to));
    }
  }
  EXPECT_EQ(count, std::size(allowed));
  for (const auto& [from, to] : allowed) {
    EXPECT_TRUE(page_transition_allowed(from, to)) << page_state_name(from) << " -> " << page_state_name(to);
  }
}

TEST(PageTable, refuses_a_skipped_state_a_missing_frame_and_the_eviction_of_a_pinned_page) {
  PageTable table = one_page();
  EXPECT_DEATH(table.set_state(kPage, PageState::device), "assertion failed");
  EXPECT_DEATH(table.set_state(kPage, PageState::reading), "assertion failed");  // without a frame
  table.at(kPage).frame = FrameId{1};
  table.set_state(kPage, PageState::reading);
  table.set_state(kPage, PageState::host);
  table.set_state(kPage, PageState::copying_in);
  table.set_state(kPage, PageState::device);
  table.at(kPage).pins = 1;
  EXPECT_DEATH(table.set_state(kPage, PageState::copying_out), "assertion failed");
}

TEST(PageTable, of_two_tiers_checks_both_frames) {
  PageTable table(2);
  table.append(PageEntry{});
  PageEntry& entry = table.at(kPage);
  EXPECT_DEATH(table.set_state(kPage, PageState::reading), "assertion failed");  // without a host frame
  entry.host_frame = FrameId{1};
  table.set_state(kPage, PageState::reading);
  table.set_state(kPage, PageState::host);
  EXPECT_DEATH(table.set_state(kPage, PageState::copying_in), "assertion failed");  // without a device frame
  entry.frame = FrameId{0};
  table.set_state(kPage, PageState::copying_in);
  table.set_state(kPage, PageState::device);
  EXPECT_DEATH(table.set_state(kPage, PageState::absent), "assertion failed");  // with both
  entry.frame = FrameId{};
  table.set_state(kPage, PageState::host);
  entry.host_frame = FrameId{};
  table.set_state(kPage, PageState::absent);
}

TEST(PageTable, every_state_has_a_name) {
  for (std::size_t state = 0; state < kPageStateCount; ++state) {
    EXPECT_STRNE(page_state_name(static_cast<PageState>(state)), "unknown");
  }
}

}  // namespace
}  // namespace tp
