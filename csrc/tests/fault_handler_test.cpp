// SPDX-License-Identifier: Apache-2.0
// Raw touches: many threads, two pagers, accesses that cross pages, and addresses that are nobody's.
#include "pager/fault_handler.hpp"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <csignal>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "pager/pager.hpp"
#include "test_files.hpp"

namespace tp {
namespace {

using test::pattern;
using test::PatternFile;

constexpr std::size_t kPage = kPageBytesMin;
constexpr std::size_t kWordsPerPage = kPage / 8;

PagerOptions options(std::size_t frames) {
  PagerOptions result;
  result.budget_bytes = frames * kPage;
  result.spill_directory = "/var/tmp";
  return result;
}

std::uint64_t word(const Region& region, std::size_t index) {
  return reinterpret_cast<const std::uint64_t*>(region.address)[index];
}

TEST(FaultHandlerTest, four_threads_touch_at_once_and_each_sees_the_file) {
  const PatternFile file(24 * kPage);
  Pager pager(options(16));
  const Region region = pager.map_file(file.path());
  std::vector<std::uint64_t> wrong(4);
  std::vector<std::thread> threads;
  for (std::size_t thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      for (std::size_t i = thread; i < 24 * kWordsPerPage; i += 509) wrong[thread] += word(region, i) != pattern(i);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<std::uint64_t>(4));
  EXPECT_GE(pager.residency().counters().page_ins, 24u);
  EXPECT_LE(pager.bytes_in_use_max(), 16 * kPage);
}

TEST(FaultHandlerTest, two_pagers_serve_their_own_addresses) {
  const PatternFile first(12 * kPage, 1), second(12 * kPage, 2);
  Pager a(options(8)), b(options(8));
  const Region of_a = a.map_file(first.path()), of_b = b.map_file(second.path());
  for (std::size_t i = 0; i < 12 * kWordsPerPage; i += 1021) {
    ASSERT_EQ(word(of_a, i), pattern(i, 1)) << i;
    ASSERT_EQ(word(of_b, i), pattern(i, 2)) << i;
  }
  EXPECT_EQ(a.residency().counters().page_ins, 12u);
  EXPECT_EQ(b.residency().counters().page_ins, 12u);
}

TEST(FaultHandlerTest, an_unaligned_access_across_two_absent_pages) {
  const PatternFile file(4 * kPage);
  Pager pager(options(8));
  const Region region = pager.map_file(file.path());
  std::uint64_t got = 0;
  std::memcpy(&got, region.address + 2 * kPage - 4, sizeof got);
  const std::uint64_t before = pattern(2 * kWordsPerPage - 1), after = pattern(2 * kWordsPerPage);
  EXPECT_EQ(got, before >> 32 | after << 32);
  EXPECT_EQ(pager.residency().counters().page_ins, 2u);
}

TEST(FaultHandlerTest, copies_between_absent_ranges_and_fills_of_absent_pages_last) {
  const PatternFile file(20 * kPage);
  Pager pager(options(8));
  const Region from = pager.map_file(file.path()), to = pager.map_spill(20 * kPage);
  std::memcpy(to.address, from.address, 20 * kPage);
  for (std::size_t i = 0; i < 20 * kWordsPerPage; i += 127) ASSERT_EQ(word(to, i), pattern(i)) << i;
  std::memset(from.address + 3 * kPage, 0x5a, 12 * kPage);
  for (std::size_t i = 0; i < 20 * kWordsPerPage; i += 127) {
    const bool filled = i >= 3 * kWordsPerPage && i < 15 * kWordsPerPage;
    ASSERT_EQ(word(from, i), filled ? 0x5a5a5a5a5a5a5a5aull : pattern(i)) << i;
  }
}

TEST(FaultHandlerTest, closed_pagers_give_way_to_open_ones) {
  std::vector<std::unique_ptr<Pager>> closed;
  for (int i = 0; i < 70; ++i) {
    closed.push_back(std::make_unique<Pager>(options(8)));
    closed.back()->close();
  }
  const PatternFile file(2 * kPage);
  Pager pager(options(8));
  const Region region = pager.map_file(file.path());
  EXPECT_EQ(word(region, 5), pattern(5));
}

TEST(FaultHandlerDeathTest, an_address_of_nobody_reaches_the_handler_before) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";  // the handler is installed once in a process
  const auto touch_nobody = [] {
    struct sigaction action = {};
    action.sa_handler = [](int) { _exit(77); };
    sigaction(SIGSEGV, &action, nullptr);
    Pager pager(options(8));
    void* const hole = mmap(nullptr, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *static_cast<volatile char*>(hole) = 1;
  };
  EXPECT_EXIT(touch_nobody(), testing::ExitedWithCode(77), "");
}

TEST(FaultHandlerDeathTest, a_touch_after_close_ends_the_process) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  const auto touch_closed = [] {
    const PatternFile file(2 * kPage);
    Pager pager(options(8));
    const Region region = pager.map_file(file.path());
    unlink(file.path().c_str());
    pager.close();
    static_cast<void>(*reinterpret_cast<const volatile char*>(region.address));
  };
  EXPECT_EXIT(touch_closed(), testing::KilledBySignal(SIGSEGV), "accessed directly.*the pager is closed");
}

}  // namespace
}  // namespace tp
