// SPDX-License-Identifier: Apache-2.0
#include "io/locked_memory.hpp"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include "base/limits.hpp"
#include "tests/child_process.hpp"

namespace tp {
namespace {

std::uintptr_t number(const std::byte* address) { return reinterpret_cast<std::uintptr_t>(address); }

TEST(LockedMemoryTest, starts_at_a_huge_page_and_is_used_again) {
  LockedMemory memory;
  const std::span<std::byte> first = memory.take(5 * kMiB + 1);
  EXPECT_EQ(number(first.data()) % kPageBytesMin, 0u);
  EXPECT_EQ(first.size(), 6 * kMiB);
  first.back() = std::byte{1};
  memory.put(first.data());
  EXPECT_EQ(memory.counters().bytes_free, 6 * kMiB);
  const std::span<std::byte> again = memory.take(4 * kMiB);
  EXPECT_EQ(again.data(), first.data());
  EXPECT_EQ(memory.counters().blocks_made, 1u);
  EXPECT_EQ(memory.counters().bytes_taken, 6 * kMiB);
  memory.put(again.data());
}

TEST(LockedMemoryTest, the_smallest_that_fits_is_taken_and_none_twice_as_large) {
  LockedMemory memory;
  std::byte* large = memory.take(8 * kMiB).data();
  std::byte* small = memory.take(4 * kMiB).data();
  memory.put(large);
  memory.put(small);
  EXPECT_EQ(memory.take(4 * kMiB).data(), small);
  std::byte* another = memory.take(2 * kMiB).data();  // not the 8 MiB that somebody may want whole
  EXPECT_NE(another, large);
  EXPECT_EQ(memory.take(6 * kMiB).data(), large);
  EXPECT_EQ(memory.counters().blocks_made, 3u);
  for (std::byte* each : {large, small, another}) memory.put(each);
}

TEST(LockedMemoryTest, small_memory_takes_little) {
  LockedMemory memory;
  const std::span<std::byte> small = memory.take(100);
  EXPECT_EQ(small.size(), 4096u);
  EXPECT_EQ(number(small.data()) % 4096, 0u);
  memory.put(small.data());
}

TEST(LockedMemoryTest, no_more_is_kept_than_was_said_the_oldest_goes_first) {
  LockedMemory memory(6 * kMiB);
  std::byte* first = memory.take(4 * kMiB).data();
  std::byte* second = memory.take(2 * kMiB).data();
  std::byte* third = memory.take(4 * kMiB).data();
  memory.put(first);
  memory.put(second);
  EXPECT_EQ(memory.counters().bytes_free, 6 * kMiB);
  memory.put(third);
  EXPECT_EQ(memory.counters().bytes_free, 6 * kMiB);
  EXPECT_EQ(memory.take(2 * kMiB).data(), second);
  EXPECT_EQ(memory.take(4 * kMiB).data(), third);
  EXPECT_EQ(memory.counters().bytes_free, 0u);
  EXPECT_EQ(memory.counters().blocks_made, 3u);
  memory.put(second);
  memory.put(third);
}

TEST(LockedMemoryTest, knows_what_lies_in_it) {
  LockedMemory memory;
  const std::span<std::byte> block = memory.take(2 * kMiB);
  EXPECT_TRUE(memory.contains(block.data(), 2 * kMiB));
  EXPECT_TRUE(memory.contains(block.data() + 5, 2 * kMiB - 5));
  EXPECT_FALSE(memory.contains(block.data() + 5, 2 * kMiB));
  EXPECT_FALSE(memory.contains(block.data() - 1, 1));
  EXPECT_TRUE(memory.starts_at(block.data()));
  EXPECT_FALSE(memory.starts_at(block.data() + 4096));
  memory.put(block.data());
  EXPECT_FALSE(memory.contains(block.data(), 1));
}

TEST(LockedMemoryTest, works_where_nothing_may_be_locked_and_says_so) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer makes nothing of mlock()";
#endif
  const test::ChildResult child = test::run_in_child([] {
    const rlimit none{0, 0};
    if (setrlimit(RLIMIT_MEMLOCK, &none) != 0) return std::string("setrlimit");
    test::deny_system_call(SYS_mlock, EPERM);
    LockedMemory memory;
    const std::span<std::byte> block = memory.take(2 * kMiB);
    block.front() = std::byte{1};
    return std::to_string(memory.counters().bytes_locked) + " locked";
  });
  EXPECT_EQ(child.text, "0 locked");
}

TEST(LockedMemoryTest, a_child_of_fork_has_one_of_its_own) {
  LockedMemory& parents = locked_memory();
  std::byte* block = parents.take(2 * kMiB).data();
  const test::ChildResult child = test::run_in_child([&parents] {
    LockedMemory& own = locked_memory();
    if (&own == &parents) return std::string("the parent's");
    own.take(kMiB).front() = std::byte{1};
    return std::to_string(own.counters().bytes_taken);
  });
  EXPECT_EQ(child.text, std::to_string(kMiB));
  EXPECT_EQ(&locked_memory(), &parents);
  parents.put(block);
}

}  // namespace
}  // namespace tp
