// SPDX-License-Identifier: Apache-2.0
// The pager over real files, once per engine, and on the stand-in device: residency, budget, sets, recording, spill,
// fork, close. On a device nothing traps: there what would be touched raw is held while it is looked at.
#include "pager/pager.hpp"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "base/error.hpp"
#include "io/probe.hpp"
#include "sim/standin_cufile.hpp"
#include "standin_fixture.hpp"
#include "test_files.hpp"

namespace tp {
namespace {

using test::pattern;
using test::PatternFile;

constexpr std::size_t kPage = kPageBytesMin;
constexpr std::size_t kWordsPerPage = kPage / 8;

const std::uint64_t* words(const Region& region) { return reinterpret_cast<const std::uint64_t*>(region.address); }
std::uint64_t* writable_words(const Region& region) { return reinterpret_cast<std::uint64_t*>(region.address); }

template <class Call>
Error error_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error;
  }
  return Error(ErrorKind::invalid, "nothing was thrown");
}

class PagerTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (reads_direct()) tensorpager_standin_cufile()->reset();
    if (on_device()) standin_ = std::make_unique<test::StandinDevice>(StandinOptions{});
    for (const EngineCandidate& candidate : probe_engines()) {
      if (candidate.engine == GetParam() && !candidate.usable) GTEST_SKIP() << candidate.reason;
    }
  }
  void TearDown() override {
    if (standin_ != nullptr) EXPECT_TRUE(standin_->standin().violations().empty());
  }
  bool on_device() const { return std::string(GetParam()).starts_with("device"); }
  bool reads_direct() const { return GetParam() == std::string("device_cufile"); }
  PagerOptions options(std::size_t frames) const {
    if (on_device()) {
      PagerOptions device = reads_direct() ? test::device_options(frames, 4, Transport::cufile)
                                           : test::device_options(frames, frames + 4);
      device.spill_directory = "/var/tmp";
      return device;
    }
    PagerOptions result;
    result.budget_bytes = frames * kPage;
    result.engine = GetParam();
    result.spill_directory = "/var/tmp";
    return result;
  }
  // A kernel here is this thread, once it has waited for the stream that waits for the copies.
  static void acquire(Pager& pager, SetId set) {
    pager.acquire(set, {});
    pager.synchronize(nullptr);
  }
  // What looks at, or changes, a page without an acquire of its own: raw on the host.
  void touch(Pager& pager, std::byte* page, const std::function<void()>& look, bool writes = false) const {
    if (!on_device()) return look();
    const std::optional<SetId> held = pager.hold({page, kPage}, {});
    ASSERT_TRUE(held.has_value());
    pager.synchronize(nullptr);
    look();
    if (writes) pager.mark_written(*held);
    pager.release(*held);
  }
  void put(Pager& pager, const Region& region, std::size_t word, std::uint64_t value) const {
    touch(pager, region.address + word / kWordsPerPage * kPage, [&] { writable_words(region)[word] = value; }, true);
  }

 private:
  std::unique_ptr<test::StandinDevice> standin_;
};

TEST_P(PagerTest, acquired_pages_show_the_file_whatever_its_size) {
  const PatternFile file(5 * kPage + 1'000'003);
  Pager pager(options(16));
  const Region region = pager.map_file(file.path());
  EXPECT_EQ(region.size_bytes, file.size_bytes());
  EXPECT_EQ(region.pages.count, 6u);
  const SetId all = pager.add_set({{region.address, region.size_bytes}}, "all");
  acquire(pager, all);
  for (std::size_t i = 0; i < region.size_bytes / 8; ++i) ASSERT_EQ(words(region)[i], pattern(i)) << i;
  // What the file does not cover is zero, not what the frame held before.
  EXPECT_EQ(region.address[6 * kPage - 1], std::byte{0});
  pager.release(all);
  const Counters counts = pager.residency().counters();
  EXPECT_EQ(counts.page_ins, 6u);
  EXPECT_EQ(counts.faults, 6u);
  EXPECT_EQ(counts.page_accesses, 6u);
  EXPECT_EQ(counts.page_accesses_resident, 0u);
  if (reads_direct()) {
    EXPECT_EQ(counts.reads + counts.direct_reads, 6u);
    EXPECT_GE(counts.direct_reads, 3u);
  } else {
    EXPECT_EQ(pager.io_counters().bytes_read, file.size_bytes());
  }
}

TEST_P(PagerTest, several_files_have_addresses_of_their_own) {
  const PatternFile first(3 * kPage, 1), second(2 * kPage + 8, 2);
  Pager pager(options(16));
  const Region a = pager.map_file(first.path()), b = pager.map_file(second.path());
  const SetId both = pager.add_set({{a.address, a.size_bytes}, {b.address, b.size_bytes}}, "both");
  acquire(pager, both);
  EXPECT_EQ(words(a)[17], pattern(17, 1));
  EXPECT_EQ(words(b)[2 * kWordsPerPage], pattern(2 * kWordsPerPage, 2));
  pager.release(both);
}

TEST_P(PagerTest, the_budget_is_a_bound_and_a_page_in_use_never_leaves) {
  const PatternFile file(40 * kPage);
  Pager pager(options(8));
  const Region region = pager.map_file(file.path());
  const SetId held = pager.add_set({{region.address, 2 * kPage}}, "held");
  acquire(pager, held);
  for (std::size_t page = 2; page < 40; ++page) {
    const SetId one = pager.add_set({{region.address + page * kPage, kPage}}, "one");
    acquire(pager, one);
    ASSERT_EQ(words(region)[page * kWordsPerPage + 5], pattern(page * kWordsPerPage + 5));
    pager.release(one);
  }
  acquire(pager, held);  // still there: nothing to read
  EXPECT_EQ(pager.residency().counters().page_accesses_resident, 2u);
  pager.release(held);
  pager.release(held);
  EXPECT_EQ(pager.residency().counters().page_ins, 40u);
  EXPECT_EQ(pager.bytes_in_use_max(), 8 * kPage);
}

TEST_P(PagerTest, a_step_too_large_for_the_budget_is_named_with_what_it_needs) {
  const PatternFile file(20 * kPage);
  Pager pager(options(8));
  const Region region = pager.map_file(file.path());
  const std::size_t pinnable = pager.residency().pinnable_pages();
  const SetId big = pager.add_set({{region.address, (pinnable + 1) * kPage}}, "model.layers.7.mlp");
  const Error error = error_of([&] { acquire(pager, big); });
  EXPECT_EQ(error.kind(), ErrorKind::budget);
  EXPECT_NE(std::string(error.what()).find("model.layers.7.mlp"), std::string::npos) << error.what();
  const std::string enough = "give at least " + std::to_string(2 * (8 + 1)) + " MiB";
  EXPECT_NE(std::string(error.what()).find(enough), std::string::npos) << error.what();
  const SetId fits = pager.add_set({{region.address, pinnable * kPage}}, "fits");
  acquire(pager, fits);  // nothing stayed pinned
  pager.release(fits);
  EXPECT_EQ(pager.residency().pinned_pages(), 0u);
}

TEST_P(PagerTest, equal_pages_are_one_set) {
  const PatternFile file(4 * kPage);
  Pager pager(options(8));
  const Region region = pager.map_file(file.path());
  const SetId a = pager.add_set({{region.address, 100}}, "a");
  EXPECT_EQ(pager.add_set({{region.address + 200, 100}}, "b"), a);
  EXPECT_EQ(pager.set(a).name, "a");
  EXPECT_NE(pager.add_set({{region.address, kPage + 1}}, "c"), a);
  EXPECT_EQ(error_of([&] { pager.add_set({{region.address - kPage, 8}}, "outside"); }).kind(), ErrorKind::invalid);
  EXPECT_EQ(error_of([&] { acquire(pager, SetId{1000}); }).kind(), ErrorKind::invalid);
}

// Until no page is on its way: a write that a page-in asked for may end after it.
void settle(const Pager& pager) {
  const auto under_way = [](std::uint8_t state) {
    return static_cast<PageState>(state) != PageState::absent && static_cast<PageState>(state) != PageState::device;
  };
  for (;;) {
    const std::vector<std::uint8_t> states = pager.residency().page_states();
    if (std::none_of(states.begin(), states.end(), under_way)) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

TEST_P(PagerTest, discarded_pages_are_neither_written_nor_read) {
  if (on_device()) GTEST_SKIP() << "on a device nothing is discarded";
  constexpr std::size_t kFrames = 8;
  Pager pager(options(kFrames));
  const Region region = pager.map_spill(20 * kPage);
  const auto fill = [&](std::size_t page, std::uint64_t value) {
    const std::optional<SetId> held = pager.hold({region.address + page * kPage, kPage}, {});
    std::fill_n(writable_words(region) + page * kWordsPerPage, kWordsPerPage, value);
    pager.release(*held);
  };
  for (std::size_t page = 0; page < 20; ++page) fill(page, 100 + page);  // 12 and more are spilled by now
  settle(pager);
  const std::uint64_t spilled = pager.spill_bytes();
  const std::uint64_t before = pager.residency().counters().writebacks;
  EXPECT_EQ(pager.discard({region.address + 1, 20 * kPage - 1}), 19u);  // whole pages alone
  for (int round = 0; round < 5; ++round) {
    for (std::size_t page = 1; page < 7; ++page) fill(page, 200 + page);
    settle(pager);
    EXPECT_EQ(pager.discard({region.address + kPage, 6 * kPage}), 6u);
  }
  EXPECT_LE(pager.residency().counters().writebacks, before + 1);  // page 0, which was not discarded
  EXPECT_EQ(pager.spill_bytes(), spilled);
  EXPECT_EQ(pager.io_counters().bytes_read, 0u);
  touch(pager, region.address, [&] { EXPECT_EQ(words(region)[5], 100u); });
  // What is written under an acquire after that is kept, and extents given back are taken again.
  for (std::size_t page = 1; page < 20; ++page) fill(page, 300 + page);
  for (std::size_t page = 1; page < 20; ++page) {
    touch(pager, region.address + page * kPage,
          [&] { ASSERT_EQ(words(region)[page * kWordsPerPage + 7], 300 + page) << page; });
  }
  EXPECT_EQ(pager.spill_bytes(), spilled);
}

TEST_P(PagerTest, discarded_pages_that_are_wanted_again_keep_raw_writes) {
  if (on_device()) GTEST_SKIP() << "on a device nothing is discarded";
  constexpr std::size_t kPages = 6;
  Pager pager(options(8));
  const Region region = pager.map_spill(24 * kPage);
  for (std::size_t page = 0; page < kPages; ++page) writable_words(region)[page * kWordsPerPage] = 1;
  EXPECT_EQ(pager.discard({region.address, kPages * kPage}), kPages);
  pager.wanted({region.address, kPages * kPage});
  for (std::size_t page = 0; page < kPages; ++page) writable_words(region)[page * kWordsPerPage] = 50 + page;
  for (std::size_t page = kPages; page < 24; ++page) writable_words(region)[page * kWordsPerPage] = 9;  // they leave
  for (std::size_t page = 0; page < kPages; ++page) EXPECT_EQ(words(region)[page * kWordsPerPage], 50 + page);
}

TEST_P(PagerTest, what_is_held_or_of_a_file_is_not_discarded) {
  if (on_device()) GTEST_SKIP() << "on a device nothing is discarded";
  const PatternFile file(4 * kPage);
  Pager pager(options(8));
  const Region mapped = pager.map_file(file.path()), region = pager.map_spill(2 * kPage);
  EXPECT_EQ(pager.discard({mapped.address, 4 * kPage}), 0u);
  const std::optional<SetId> held = pager.hold({region.address, kPage}, {});
  writable_words(region)[0] = 7;
  EXPECT_EQ(pager.discard({region.address, 2 * kPage}), 1u);
  EXPECT_EQ(words(region)[0], 7u);
  pager.release(*held);
  EXPECT_EQ(words(mapped)[kWordsPerPage], pattern(kWordsPerPage));
  EXPECT_EQ(error_of([&] { pager.discard({mapped.address, 400 * kPage}); }).kind(), ErrorKind::invalid);
}

TEST_P(PagerTest, a_raw_touch_brings_the_page_in) {
  if (on_device()) GTEST_SKIP() << "on a device nothing traps: whoever touches what is absent loses the context";
  const PatternFile file(30 * kPage + 24);
  Pager pager(options(8));
  const Region region = pager.map_file(file.path());
  for (std::size_t i = 0; i < region.size_bytes / 8; ++i) ASSERT_EQ(words(region)[i], pattern(i)) << i;
  const Counters counts = pager.residency().counters();
  EXPECT_EQ(counts.touches, 31u);
  EXPECT_EQ(counts.page_ins, 31u);
}

TEST_P(PagerTest, written_pages_survive_eviction_and_the_checkpoint_stays_as_it_was) {
  const PatternFile file(20 * kPage);
  {
    Pager pager(options(8));
    const Region region = pager.map_file(file.path());
    for (std::size_t page = 0; page < 20; page += 2) put(pager, region, page * kWordsPerPage + 3, page);
    for (int round = 0; round < 2; ++round) {
      for (std::size_t page = 0; page < 20; ++page) {
        touch(pager, region.address + page * kPage, [&] {
          for (std::size_t i = page * kWordsPerPage; i < (page + 1) * kWordsPerPage; i += 251) {
            if (i % kWordsPerPage != 3) ASSERT_EQ(words(region)[i], pattern(i)) << i;
          }
          if (page % 2 == 0) ASSERT_EQ(words(region)[page * kWordsPerPage + 3], page);
        });
      }
    }
    const Counters counts = pager.residency().counters();
    if (on_device()) {
      // To the host tier; once for each of three visits, since the device's copy is the only one while it is there.
      EXPECT_GE(counts.copies_out, 2u);
      EXPECT_LE(counts.copies_out, 30u);
    } else {
      EXPECT_GE(counts.writebacks, 2u);
    }
    EXPECT_LE(counts.writebacks, 10u);  // a page that was not written again is not written back again
    EXPECT_EQ(pager.io_counters().bytes_written, counts.writebacks * kPage);
  }
  Pager pager(options(16));
  const Region region = pager.map_file(file.path());
  touch(pager, region.address, [&] { EXPECT_EQ(words(region)[3], pattern(3)); });
}

TEST_P(PagerTest, spill_regions_start_as_zeros_without_io_and_keep_what_is_written) {
  Pager pager(options(8));
  const Region region = pager.map_spill(24 * kPage - 100);
  const auto every_page = [&](bool writes, const std::function<void(std::size_t)>& look) {
    for (std::size_t page = 0; page < 24; ++page) {
      const auto words_of_page = [&] {
        for (std::size_t i = page * kWordsPerPage; i < (page + 1) * kWordsPerPage; ++i) look(i);
      };
      touch(pager, region.address + page * kPage, words_of_page, writes);
    }
  };
  every_page(false, [&](std::size_t i) { ASSERT_EQ(words(region)[i], 0u); });
  EXPECT_EQ(pager.io_counters().bytes_read, 0u);
  every_page(true, [&](std::size_t i) {
    if (i % 97 == 0) writable_words(region)[i] = pattern(i);
  });
  every_page(false, [&](std::size_t i) { ASSERT_EQ(words(region)[i], i % 97 == 0 ? pattern(i) : 0); });
  EXPECT_GT(pager.io_counters().bytes_written, 0u);
  EXPECT_EQ(pager.bytes_in_use_max(), 8 * kPage);
}

TEST_P(PagerTest, without_a_spill_directory_modified_pages_stay_and_the_error_says_so) {
  if (on_device())
    GTEST_SKIP() << "the host tier takes a device's modified pages first: FailingCall, a_small_host_tier";
  PagerOptions no_spill = options(8);
  no_spill.spill_directory.clear();
  const PatternFile file(20 * kPage);
  Pager pager(no_spill);
  const Region region = pager.map_file(file.path());
  for (std::size_t page = 0; page < 6; ++page) writable_words(region)[page * kWordsPerPage] = 7;
  for (std::size_t page = 6; page < 20; ++page) {  // two frames are left for everything else
    const SetId one = pager.add_set({{region.address + page * kPage, kPage}}, "one");
    acquire(pager, one);
    EXPECT_EQ(words(region)[page * kWordsPerPage], pattern(page * kWordsPerPage));
    pager.release(one);
  }
  for (std::size_t page = 0; page < 6; ++page) EXPECT_EQ(words(region)[page * kWordsPerPage], 7u);
  writable_words(region)[6 * kWordsPerPage] = 7;
  writable_words(region)[7 * kWordsPerPage] = 7;
  const SetId next = pager.add_set({{region.address + 10 * kPage, kPage}}, "next");
  const Error error = error_of([&] { acquire(pager, next); });
  EXPECT_EQ(error.kind(), ErrorKind::io);
  EXPECT_NE(std::string(error.what()).find("spill directory"), std::string::npos) << error.what();
  EXPECT_EQ(words(region)[0], 7u);
}

TEST_P(PagerTest, hold_takes_any_range_and_declines_what_can_not_be_held) {
  const PatternFile file(20 * kPage);
  Pager pager(options(8));
  const Region region = pager.map_file(file.path());
  const std::optional<SetId> held = pager.hold({region.address + kPage + 5, 2 * kPage}, {});
  ASSERT_TRUE(held.has_value());
  EXPECT_EQ(pager.set(*held).pages.size(), 3u);
  if (on_device()) {  // where what is not held must not be touched
    EXPECT_EQ(error_of([&] { pager.hold({region.address, 20 * kPage}, {}); }).kind(), ErrorKind::budget);
  } else {
    EXPECT_EQ(pager.hold({region.address, 20 * kPage}, {}), std::nullopt);
  }
  pager.release(*held);
  EXPECT_EQ(pager.residency().pinned_pages(), 0u);
  EXPECT_EQ(error_of([&] { pager.hold({region.address + 30 * kPage, 8}, {}); }).kind(), ErrorKind::invalid);
}

TEST_P(PagerTest, a_ticket_brings_pages_in_while_the_caller_goes_on_and_holds_them) {
  const PatternFile file(20 * kPage);
  Pager pager(options(8));
  const Region region = pager.map_file(file.path());
  const SetId set = pager.add_set({{region.address, 4 * kPage}}, "set");
  {
    const std::unique_ptr<Ticket> ticket = pager.prefetch(set);
    EXPECT_EQ(pager.residency().pinned_pages(), 4u);
    ticket->wait({});
    pager.wait(*ticket, {}, nullptr);
    pager.synchronize(nullptr);
    EXPECT_TRUE(ticket->done());
    for (std::size_t page = 0; page < 4; ++page)
      EXPECT_EQ(words(region)[page * kWordsPerPage], pattern(page * kWordsPerPage));
    EXPECT_TRUE(pager.prefetch(set)->done());  // nothing to wait for; its own pins end with it
    EXPECT_EQ(pager.residency().pinned_pages(), 4u);
    const std::size_t left = pager.residency().pinnable_pages() - 4;
    const SetId more = pager.add_set({{region.address + 8 * kPage, (left + 1) * kPage}}, "more");
    EXPECT_EQ(error_of([&] { pager.prefetch(more); }).kind(), ErrorKind::budget);
  }
  EXPECT_EQ(pager.residency().pinned_pages(), 0u);
  for (int round = 0; round < 20; ++round) {  // dropped at any moment of the transfer
    pager.prefetch(pager.add_set({{region.address + round % 16 * kPage, 4 * kPage}}, "dropped"));
  }
  EXPECT_EQ(pager.residency().pinned_pages(), 0u);
  EXPECT_EQ(pager.residency().counters().failures, 0u);
}

TEST_P(PagerTest, a_dry_recording_pages_nothing_and_a_wet_one_pages) {
  const PatternFile file(4 * kPage);
  Pager pager(options(8));
  const Region region = pager.map_file(file.path());
  const SetId a = pager.add_set({{region.address, kPage}}, "a"),
              b = pager.add_set({{region.address + kPage, kPage}}, "b");
  const auto run = [&] {
    acquire(pager, a);
    acquire(pager, b);
    pager.release(b);
    pager.release(a);
  };
  const std::vector<std::int32_t> expected{1, 2, -2, -1};
  pager.recorder().begin(true);
  run();
  EXPECT_EQ(pager.recorder().end(), expected);
  EXPECT_EQ(pager.residency().counters().acquires, 0u);
  pager.recorder().begin(false);
  EXPECT_EQ(error_of([&] { pager.recorder().begin(true); }).kind(), ErrorKind::invalid);
  std::thread other(run);  // another thread is not recorded
  other.join();
  run();
  EXPECT_EQ(pager.recorder().end(), expected);
  EXPECT_EQ(pager.residency().counters().acquires, 4u);
  EXPECT_EQ(error_of([&] { pager.recorder().end(); }).kind(), ErrorKind::invalid);
}

TEST_P(PagerTest, an_interrupted_wait_leaves_nothing_acquired) {
  struct Stop {};
  const PatternFile file(40 * kPage);
  Pager pager(options(16));
  const Region region = pager.map_file(file.path());
  std::size_t interrupted = 0;
  for (std::uint32_t i = 0; i < 30; ++i) {
    const SetId set = pager.add_set({{region.address + i * kPage, 10 * kPage}}, "set");
    try {
      pager.acquire(set, [] { throw Stop{}; });
      pager.release(set);  // it was faster than the first look for signals
    } catch (const Stop&) {
      ++interrupted;
    }
    ASSERT_EQ(pager.residency().pinned_pages(), 0u);
  }
  const SetId set = pager.add_set({{region.address, 10 * kPage}}, "set");
  acquire(pager, set);
  EXPECT_EQ(words(region)[9 * kWordsPerPage], pattern(9 * kWordsPerPage));
  pager.release(set);
}

TEST_P(PagerTest, a_file_that_shrinks_while_open_is_an_error_and_not_stale_bytes) {
  const PatternFile file(10 * kPage);
  Pager pager(options(8));
  const Region region = pager.map_file(file.path());
  const SetId head = pager.add_set({{region.address, kPage}}, "head"),
              tail = pager.add_set({{region.address + 9 * kPage, kPage}}, "tail");
  ASSERT_EQ(truncate(file.path().c_str(), 9 * kPage + 4096), 0);
  const Error error = error_of([&] { acquire(pager, tail); });
  EXPECT_EQ(error.kind(), ErrorKind::io);
  EXPECT_NE(std::string(error.what()).find("truncated"), std::string::npos) << error.what();
  EXPECT_NE(std::string(error.what()).find(file.path()), std::string::npos) << error.what();
  EXPECT_EQ(pager.residency().pinned_pages(), 0u);
  acquire(pager, head);  // the rest still works
  EXPECT_EQ(words(region)[1], pattern(1));
  pager.release(head);
  EXPECT_EQ(pager.residency().counters().failures, 1u);
}

TEST_P(PagerTest, a_child_of_fork_gets_an_error_and_the_parent_goes_on) {
  const PatternFile file(20 * kPage);
  Pager pager(options(8));
  const Region region = pager.map_file(file.path());
  const SetId set = pager.add_set({{region.address, 2 * kPage}}, "set");
  for (int round = 0; round < 20; ++round) {
    const pid_t child = fork();
    if (child == 0) {
      const bool refused = error_of([&] { acquire(pager, set); }).kind() == ErrorKind::forked;
      pager.close();
      _exit(refused ? 42 : 1);
    }
    acquire(pager, set);
    EXPECT_EQ(words(region)[kWordsPerPage], pattern(kWordsPerPage));
    pager.release(set);
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status));
    EXPECT_EQ(WEXITSTATUS(status), 42);
  }
}

TEST_P(PagerTest, close_fails_those_who_wait_and_everything_after) {
  const PatternFile file(60 * kPage);
  for (int round = 0; round < 10; ++round) {
    Pager pager(options(16));
    const Region region = pager.map_file(file.path());
    std::vector<std::thread> clients;
    std::atomic<int> closed{0};
    for (std::size_t client = 0; client < 3; ++client) {
      clients.emplace_back([&, client] {
        for (std::size_t i = 0;; ++i) {
          const std::size_t page = (client * 20 + i) % 56;
          try {
            const SetId set = pager.add_set({{region.address + page * kPage, 4 * kPage}}, "set");
            acquire(pager, set);
            EXPECT_EQ(words(region)[page * kWordsPerPage], pattern(page * kWordsPerPage));
            pager.release(set);
          } catch (const Error& error) {
            EXPECT_EQ(error.kind(), ErrorKind::closed) << error.what();
            ++closed;
            return;
          }
        }
      });
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(round * 3));
    // Nobody may be reading through a raw pointer when the memory goes: the clients are between acquire and release
    // only.
    pager.residency().set_schedule(std::nullopt);
    std::thread closer([&] {
      const std::lock_guard lock(pager.residency().mutex);
      pager.residency().closing = true;
    });
    closer.join();
    for (std::thread& client : clients) client.join();
    pager.close();
    EXPECT_EQ(closed, 3);
    EXPECT_EQ(error_of([&] { pager.map_spill(8); }).kind(), ErrorKind::closed);
    EXPECT_EQ(error_of([&] { pager.hold({region.address, 8}, {}); }).kind(), ErrorKind::closed);
    pager.close();
  }
}

TEST_P(PagerTest, schedules_are_known_followed_and_forgotten_by_id) {
  const PatternFile file(4 * kPage);
  Pager pager(options(16));
  const Region region = pager.map_file(file.path());
  const SetId set = pager.add_set({{region.address, kPage}}, "set");
  const std::vector<std::int32_t> steps{static_cast<std::int32_t>(set.value)}, none;
  const ScheduleArrays arrays{steps, none, none, none, none, none};
  EXPECT_EQ(pager.followed_schedule(), std::nullopt);
  EXPECT_EQ(error_of([&] { pager.follow_schedule(ScheduleId{0}); }).kind(), ErrorKind::invalid);
  const ScheduleId first = pager.add_schedule(arrays), second = pager.add_schedule(arrays);
  EXPECT_EQ(pager.followed_schedule(), first);
  pager.follow_schedule(second);
  EXPECT_EQ(pager.followed_schedule(), second);
  pager.forget_schedule(second);
  EXPECT_EQ(pager.followed_schedule(), first);
  EXPECT_EQ(error_of([&] { pager.forget_schedule(second); }).kind(), ErrorKind::invalid);
  pager.forget_schedule(first);
  EXPECT_EQ(pager.followed_schedule(), std::nullopt);
  EXPECT_EQ(error_of([&] { pager.forget_schedule(first); }).kind(), ErrorKind::invalid);
  pager.add_schedule(arrays);
  pager.set_schedule(arrays);
  EXPECT_EQ(error_of([&] { pager.follow_schedule(first); }).kind(), ErrorKind::invalid);
  pager.clear_schedule();
  EXPECT_EQ(pager.followed_schedule(), std::nullopt);
}

INSTANTIATE_TEST_SUITE_P(engines, PagerTest, testing::Values("uring", "pread", "device", "device_cufile"),
                         [](const auto& engine) { return std::string(engine.param); });

}  // namespace
}  // namespace tp
