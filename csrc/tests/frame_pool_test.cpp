// SPDX-License-Identifier: Apache-2.0
#include "mem/frame_pool.hpp"

#include <gtest/gtest.h>

#include <set>

#include "base/error.hpp"
#include "base/limits.hpp"

namespace tp {
namespace {

TEST(FramePool, gives_as_many_frames_as_fit_the_budget_and_no_more) {
  FramePool pool(11 * kMiB, kPageBytesMin);  // five whole frames; the odd MiB is not used
  EXPECT_EQ(pool.frame_count(), 5u);
  std::set<std::byte*> slots;
  for (int i = 0; i < 5; ++i) slots.insert(pool.slot(pool.take()));
  EXPECT_EQ(slots.size(), 5u);
  EXPECT_EQ(pool.free_count(), 0u);
  EXPECT_EQ(pool.bytes_in_use(), 10 * kMiB);
  EXPECT_DEATH(pool.take(), "assertion failed");
}

TEST(FramePool, slots_are_aligned_writable_and_reused) {
  FramePool pool(8 * kMiB, kPageBytesMin);
  const FrameId first = pool.take();
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(pool.slot(first)) % kPageBytesMin, 0u);
  pool.slot(first)[0] = std::byte{7};
  pool.put(first);
  EXPECT_EQ(pool.take(), first);
  EXPECT_EQ(pool.slot(first)[0], std::byte{7});
  EXPECT_EQ(pool.bytes_in_use_max(), 2 * kMiB);
}

TEST(FramePool, refuses_a_frame_given_back_twice) {
  FramePool pool(8 * kMiB, kPageBytesMin);
  const FrameId frame = pool.take();
  pool.put(frame);
  EXPECT_DEATH(pool.put(frame), "assertion failed");
}

TEST(FramePool, access_is_enforced_by_the_processor) {
  FramePool pool(8 * kMiB, kPageBytesMin);
  const FrameId frame = pool.take();
  pool.set_access(frame, SlotAccess::read);
  EXPECT_EQ(pool.access(frame), SlotAccess::read);
  EXPECT_EXIT(pool.slot(frame)[0] = std::byte{1}, testing::KilledBySignal(SIGSEGV), "");
}

TEST(FramePool, refuses_budgets_that_hold_too_few_frames_or_more_than_the_machine) {
  try {
    FramePool pool(2 * kMiB, kPageBytesMin);
    FAIL() << "a budget of one frame was accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::budget);
    EXPECT_NE(std::string(error.what()).find("at least 4"), std::string::npos) << error.what();
  }
  try {
    FramePool pool(1ull << 50, kPageBytesMin);
    FAIL() << "a budget of a pebibyte was accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::memory);
    EXPECT_NE(std::string(error.what()).find("available"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace tp
