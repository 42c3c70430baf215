// SPDX-License-Identifier: Apache-2.0
// The executor against a shadow model: whatever the schedule says and whatever the clients do, every access sees its
// own bytes, no event takes more than the budget, and nothing in use leaves. Files and spill lie in memory (/dev/shm),
// so that the test is bound by decisions.
#include "pager/executor.hpp"

#include <gtest/gtest.h>

#include <deque>
#include <map>
#include <random>
#include <set>
#include <thread>

#include "pager/pager.hpp"
#include "test_files.hpp"

namespace tp {
namespace {

using test::pattern;
using test::PatternFile;

constexpr std::size_t kPage = kPageBytesMin;
constexpr std::size_t kWordsPerPage = kPage / 8;
constexpr char kMemoryDirectory[] = "/dev/shm";

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kPagers = 20;
#else
constexpr int kPagers = 100;
#endif
constexpr int kSchedulesPerPager = 10;

using Random = std::mt19937_64;
std::size_t below(Random& random, std::size_t end) { return random() % end; }

// Follows the events of a run and checks at each that the budget holds and that the order of a page's life is kept.
class Replay {
 public:
  explicit Replay(std::size_t frame_count) : frame_count_(frame_count) {}
  void check(const std::vector<Event>& events) {
    for (const Event& event : events) {
      switch (event.kind) {
        case EventKind::page_in_begin:
          ASSERT_TRUE(in_use_.emplace(event.frame, event.page).second) << "frame " << event.frame << " taken twice";
          ASSERT_FALSE(resident_.contains(event.page)) << "page " << event.page << " read while resident";
          ASSERT_LE(in_use_.size(), frame_count_);
          break;
        case EventKind::page_in_end: resident_.insert(event.page); break;
        case EventKind::evict:
        case EventKind::writeback_end:
          ASSERT_EQ(resident_.erase(event.page), 1u) << "page " << event.page << " evicted while absent";
          ASSERT_EQ(in_use_.erase(event.frame), 1u);
          ++evictions;
          break;
        default: break;
      }
    }
  }
  std::size_t evictions = 0;

 private:
  std::size_t frame_count_;
  std::map<std::int32_t, std::int32_t> in_use_;  // frame -> page
  std::set<std::int32_t> resident_;
};

struct RandomSchedule {
  std::vector<std::int32_t> step_set, initial, step, deadline, page_in, evict;
  ScheduleArrays arrays() const { return {step_set, initial, step, deadline, page_in, evict}; }
};

// A pager, a file and a spill region, with what every page must show.
class Shadow {
 public:
  Shadow(Random& random, std::size_t frames)
      : file_((10 + below(random, 30)) * kPage, 3, kMemoryDirectory), pager_(options(frames)) {
    region_ = pager_.map_file(file_.path());
    spill_ = pager_.map_spill((1 + below(random, 10)) * kPage);
    pages_ = region_.pages.count + spill_.pages.count;
    const std::size_t sets = 3 + below(random, 12);
    for (std::size_t i = 0; i < sets; ++i) add_random_set(random, frames);
  }
  static PagerOptions options(std::size_t frames) {
    PagerOptions result;
    result.budget_bytes = frames * kPage;
    result.engine = "pread";
    result.spill_directory = kMemoryDirectory;
    result.event_capacity = 1 << 20;
    return result;
  }
  std::byte* address(std::size_t page) const {
    return page < region_.pages.count ? region_.address + page * kPage
                                      : spill_.address + (page - region_.pages.count) * kPage;
  }
  std::uint64_t* words(std::size_t page) const { return reinterpret_cast<std::uint64_t*>(address(page)); }
  void check_page(std::size_t page) const {
    const bool from_file = page < region_.pages.count;
    for (const std::size_t word : {std::size_t{1}, kWordsPerPage / 2, kWordsPerPage - 1}) {
      ASSERT_EQ(words(page)[word], from_file ? pattern(page * kWordsPerPage + word, 3) : 0u) << "page " << page;
    }
    const auto written = written_.find(page);
    const std::uint64_t first = written != written_.end() ? written->second
                                : from_file               ? pattern(page * kWordsPerPage, 3)
                                                          : 0u;
    ASSERT_EQ(words(page)[0], first) << "page " << page;
  }
  void write_page(std::size_t page, std::uint64_t value) {
    words(page)[0] = value;
    written_[page] = value;
  }
  // Beginning with the first steps of step_set_.
  RandomSchedule random_schedule(Random& random, std::size_t prefix_steps) const;
  void set_random_schedule(Random& random);
  void run_pass(Random& random, const std::vector<std::int32_t>& step_set);
  void acquire_and_check(Random& random, std::size_t set, AcquireKind kind);

  PatternFile file_;
  Pager pager_;
  Region region_, spill_;
  std::size_t pages_ = 0;
  std::vector<SetId> sets_;
  std::vector<std::vector<std::size_t>> set_pages_;
  std::vector<std::int32_t> step_set_;
  std::map<std::size_t, std::uint64_t> written_;

 private:
  void add_random_set(Random& random, std::size_t frames) {
    std::vector<AddressRange> ranges;
    std::set<std::size_t> pages;
    const std::size_t count = 1 + below(random, std::min<std::size_t>(4, (frames - kFaultFrames) / 2));
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t page = below(random, pages_);
      pages.insert(page);
      ranges.push_back({address(page) + 8, kPage - 8});
    }
    sets_.push_back(pager_.add_set(ranges, "set " + std::to_string(sets_.size())));
    set_pages_.emplace_back(pages.begin(), pages.end());
  }
};

// Any arrays that pass the checks: a schedule may be useless, never wrong.
RandomSchedule Shadow::random_schedule(Random& random, std::size_t prefix_steps) const {
  RandomSchedule result;
  const std::size_t steps = std::max<std::size_t>(1 + below(random, 20), prefix_steps), actions = below(random, 30);
  result.step_set.assign(step_set_.begin(), step_set_.begin() + static_cast<std::ptrdiff_t>(prefix_steps));
  while (result.step_set.size() < steps)
    result.step_set.push_back(static_cast<std::int32_t>(sets_[below(random, sets_.size())].value));
  for (std::size_t i = 0; i < below(random, pager_.frame_count() + 1); ++i)
    result.initial.push_back(static_cast<std::int32_t>(below(random, pages_)));
  for (std::size_t i = 0; i < actions; ++i) {
    result.step.push_back(static_cast<std::int32_t>(below(random, steps + 1)));
    result.deadline.push_back(static_cast<std::int32_t>(below(random, 2 * steps)));
    result.page_in.push_back(static_cast<std::int32_t>(below(random, pages_)));
    result.evict.push_back(static_cast<std::int32_t>(below(random, pages_ + 1)) - 1);
  }
  std::sort(result.step.begin(), result.step.end());
  std::sort(result.deadline.begin(), result.deadline.end());
  for (std::size_t i = 0; i < actions; ++i) result.step[i] = std::min(result.step[i], result.deadline[i]);
  return result;
}

void Shadow::set_random_schedule(Random& random) {
  const RandomSchedule schedule = random_schedule(random, 0);
  step_set_ = schedule.step_set;
  pager_.set_schedule(schedule.arrays());
}

// One pass that takes these steps but for a stray access, a raw touch or another step now and then; it may end early.
void Shadow::run_pass(Random& random, const std::vector<std::int32_t>& step_set) {
  pager_.begin_pass();
  for (const std::int32_t value : step_set) {
    const std::size_t choice = below(random, 40);
    std::size_t set = 0;
    while (sets_[set].value != static_cast<std::uint32_t>(value)) ++set;
    if (choice == 0) return;
    if (choice == 1) {
      ASSERT_NO_FATAL_FAILURE(check_page(below(random, pages_)));
    }
    if (choice == 2) {
      ASSERT_NO_FATAL_FAILURE(acquire_and_check(random, set, AcquireKind::stray));
    }
    if (choice == 3) set = below(random, sets_.size());
    ASSERT_NO_FATAL_FAILURE(acquire_and_check(random, set, AcquireKind::step));
  }
}

void Shadow::acquire_and_check(Random& random, std::size_t set, AcquireKind kind) {
  if (kind == AcquireKind::step) {
    pager_.acquire(sets_[set], {});
  } else {
    const std::size_t page = set_pages_[set][0];
    const std::optional<SetId> held = pager_.hold({address(page), kPage}, {});
    ASSERT_TRUE(held.has_value());
    check_page(page);
    return pager_.release(*held);
  }
  for (const std::size_t page : set_pages_[set]) check_page(page);
  if (below(random, 8) == 0) write_page(set_pages_[set][0], random());
  pager_.release(sets_[set]);
}

TEST(Executor, a_thousand_random_schedules_show_the_right_bytes_within_the_budget) {
  std::size_t evictions = 0;
  for (int pager_number = 0; pager_number < kPagers; ++pager_number) {
    Random random(1000 + static_cast<std::uint64_t>(pager_number));
    SCOPED_TRACE("seed " + std::to_string(1000 + pager_number));
    const std::size_t frames = 2 * kFaultFrames + below(random, 12);
    Shadow shadow(random, frames);
    Replay replay(frames);
    for (int schedule = 0; schedule < kSchedulesPerPager; ++schedule) {
      shadow.set_random_schedule(random);
      for (int i = 0; i < 12; ++i) {
        const std::size_t choice = below(random, 10);
        std::size_t set = below(random, shadow.sets_.size());
        if (choice == 0) shadow.pager_.begin_pass();
        if (choice == 1) {  // a raw touch, no acquire
          const std::size_t page = below(random, shadow.pages_);
          ASSERT_NO_FATAL_FAILURE(shadow.check_page(page));
          if (below(random, 3) == 0) shadow.write_page(page, random());
        }
        const AcquireKind kind = choice == 2 ? AcquireKind::stray : AcquireKind::step;
        ASSERT_NO_FATAL_FAILURE(shadow.acquire_and_check(random, set, kind));
      }
    }
    EXPECT_EQ(shadow.pager_.residency().pinned_pages(), 0u);
    EXPECT_LE(shadow.pager_.bytes_in_use_max(), frames * kPage);
    ASSERT_EQ(shadow.pager_.residency().events_overwritten(), 0u);
    ASSERT_NO_FATAL_FAILURE(replay.check(shadow.pager_.residency().events()));
    evictions += replay.evictions;
  }
  EXPECT_GT(evictions, static_cast<std::size_t>(kPagers) * 20);  // the runs were tight enough to mean something
}

// Known schedules that share some of their first steps, and passes that change between them anywhere.
TEST(Executor, a_thousand_random_mixtures_of_passes_show_the_right_bytes_within_the_budget) {
  std::size_t evictions = 0, switches = 0;
  for (int pager_number = 0; pager_number < kPagers; ++pager_number) {
    Random random(5000 + static_cast<std::uint64_t>(pager_number));
    SCOPED_TRACE("seed " + std::to_string(5000 + pager_number));
    const std::size_t frames = 2 * kFaultFrames + below(random, 12);
    Shadow shadow(random, frames);
    Replay replay(frames);
    for (int mixture = 0; mixture < kSchedulesPerPager; ++mixture) {
      shadow.set_random_schedule(random);
      std::vector<std::vector<std::int32_t>> passes{shadow.step_set_};
      std::vector<ScheduleId> known{*shadow.pager_.followed_schedule()};
      for (std::size_t i = 0; i < 1 + below(random, 5); ++i) {
        const RandomSchedule schedule = shadow.random_schedule(random, below(random, shadow.step_set_.size() + 1));
        const auto kind = below(random, 8) == 0 ? ScheduleKind::common : ScheduleKind::exact;
        known.push_back(shadow.pager_.add_schedule(schedule.arrays(), kind));
        passes.push_back(schedule.step_set);
      }
      for (int pass = 0; pass < 4; ++pass)
        ASSERT_NO_FATAL_FAILURE(shadow.run_pass(random, passes[below(random, passes.size())]));
      switches += shadow.pager_.residency().tape_counters().switches;
      shadow.pager_.follow_schedule(known[below(random, known.size())]);
      ASSERT_NO_FATAL_FAILURE(shadow.run_pass(random, passes[below(random, passes.size())]));
      shadow.pager_.forget_schedule(known[below(random, known.size())]);
    }
    EXPECT_EQ(shadow.pager_.residency().pinned_pages(), 0u);
    EXPECT_LE(shadow.pager_.bytes_in_use_max(), frames * kPage);
    ASSERT_EQ(shadow.pager_.residency().events_overwritten(), 0u);
    ASSERT_NO_FATAL_FAILURE(replay.check(shadow.pager_.residency().events()));
    evictions += replay.evictions;
  }
  EXPECT_GT(evictions, static_cast<std::size_t>(kPagers) * 20);
  EXPECT_GT(switches, static_cast<std::size_t>(kPagers) * 10);
}

// Two passes with the same first steps, in turn: only the step at which they part is a surprise.
TEST(Executor, after_a_switch_the_rest_of_the_pass_is_read_ahead) {
  const PatternFile file(16 * kPage, 8, kMemoryDirectory);
  Pager pager(Shadow::options(10));
  const Region region = pager.map_file(file.path());
  std::vector<std::int32_t> sets;
  for (std::size_t i = 0; i < 8; ++i)
    sets.push_back(
        static_cast<std::int32_t>(pager.add_set({{region.address + 2 * i * kPage, 2 * kPage}}, "two").value));
  // Sets 0 and 1, then 2, 3, 4 or 5, 6, 7: either way ten pages, which are all kept from pass to pass.
  std::vector<std::vector<std::int32_t>> passes(2), pages(2);
  for (std::int32_t i = 0; i < 10; ++i) {
    pages[0].push_back(i);
    pages[1].push_back(i < 4 ? i : i + 6);
  }
  for (const std::size_t set : {0u, 1u, 2u, 3u, 4u}) passes[0].push_back(sets[set]);
  for (const std::size_t set : {0u, 1u, 5u, 6u, 7u}) passes[1].push_back(sets[set]);
  const std::vector<std::int32_t> none;
  pager.set_schedule({passes[0], pages[0], none, none, none, none});
  pager.add_schedule({passes[1], pages[1], none, none, none, none});
  constexpr std::uint64_t kPasses = 20;
  for (std::size_t pass = 0; pass < kPasses; ++pass) {
    pager.begin_pass();
    for (const std::int32_t value : passes[pass % 2]) {
      const SetId set{static_cast<std::uint32_t>(value)};
      pager.acquire(set, {});
      const std::size_t word = pager.set(set).pages[0].value * kWordsPerPage + 1;
      ASSERT_EQ(reinterpret_cast<const std::uint64_t*>(region.address)[word], pattern(word, 8));
      pager.release(set);
    }
  }
  const TapeCounters tape = pager.residency().tape_counters();
  EXPECT_EQ(tape.switches, kPasses - 1);
  EXPECT_EQ(tape.jumps + tape.off_schedule, 0u);
  const Counters counts = pager.residency().counters();
  EXPECT_EQ(counts.faults, 2 * (kPasses - 1));
  EXPECT_EQ(counts.page_ins, 10 + 6 * (kPasses - 1));
}

TEST(Executor, known_schedules_come_and_go_while_threads_run_passes) {
  const PatternFile file(24 * kPage, 9, kMemoryDirectory);
  Pager pager(Shadow::options(12));
  const Region region = pager.map_file(file.path());
  std::vector<std::int32_t> sets;
  for (std::size_t page = 0; page < 24; ++page)
    sets.push_back(static_cast<std::int32_t>(pager.add_set({{region.address + page * kPage, kPage}}, "one").value));
  const auto pass_of = [&sets](std::size_t branch) {
    std::vector<std::int32_t> steps(sets.begin(), sets.begin() + 6);
    for (std::size_t i = 0; i < 6; ++i) steps.push_back(sets[6 + (branch + i) % 18]);
    return steps;
  };
  std::atomic<std::size_t> wrong{0};
  std::atomic<bool> running{true};
  std::vector<std::thread> threads;
  for (std::uint64_t seed = 0; seed < 3; ++seed) {
    threads.emplace_back([&, seed] {
      Random mine(seed);
      for (int pass = 0; pass < 25; ++pass) {
        pager.begin_pass();
        for (const std::int32_t value : pass_of(3 * below(mine, 6))) {
          const SetId set{static_cast<std::uint32_t>(value)};
          pager.acquire(set, {});
          const std::size_t word = pager.set(set).pages[0].value * kWordsPerPage + 2;
          wrong += reinterpret_cast<const std::uint64_t*>(region.address)[word] != pattern(word, 9);
          pager.release(set);
        }
      }
    });
  }
  std::thread planner([&] {
    Random mine(99);
    const std::vector<std::int32_t> none;
    std::deque<ScheduleId> known;
    while (running) {
      const std::vector<std::int32_t> steps = pass_of(3 * below(mine, 6));
      const std::vector<std::int32_t> initial(steps.begin(), steps.begin() + 6);
      known.push_back(pager.add_schedule({steps, initial, none, none, none, none}));
      if (below(mine, 4) == 0) pager.follow_schedule(known[below(mine, known.size())]);
      if (known.size() <= 6) continue;
      pager.forget_schedule(known.front());
      known.pop_front();
    }
  });
  for (std::thread& thread : threads) thread.join();
  running = false;
  planner.join();
  EXPECT_EQ(wrong, 0u);
  EXPECT_EQ(pager.residency().pinned_pages(), 0u);
  EXPECT_LE(pager.bytes_in_use_max(), 12 * kPage);
}

TEST(Executor, many_threads_with_sets_and_raw_touches_see_the_right_bytes) {
  Random random(7);
  const PatternFile file(48 * kPage, 5, kMemoryDirectory);
  Pager pager(Shadow::options(24));
  const Region region = pager.map_file(file.path());
  const auto* words = reinterpret_cast<const std::uint64_t*>(region.address);
  std::atomic<std::size_t> wrong{0};
  std::vector<std::thread> threads;
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    threads.emplace_back([&, seed] {
      Random mine(seed);
      for (int i = 0; i < 150; ++i) {
        const std::size_t page = below(mine, 46);
        if (i % 3 == 0) {
          wrong += words[page * kWordsPerPage + 9] != pattern(page * kWordsPerPage + 9, 5);
          continue;
        }
        const SetId set = pager.add_set({{region.address + page * kPage, 3 * kPage}}, "three");
        pager.acquire(set, {});
        for (std::size_t p = page; p < page + 3; ++p)
          wrong += words[p * kWordsPerPage + 9] != pattern(p * kWordsPerPage + 9, 5);
        pager.release(set);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0u);
  EXPECT_EQ(pager.residency().pinned_pages(), 0u);
  EXPECT_EQ(pager.bytes_in_use_max(), 24 * kPage);
}

// A cyclic pass over 20 pages in 10 steps with 10 frames: six pages stay, fourteen stream, and each action's victim is
// free in time.
TEST(Executor, follows_a_cyclic_schedule_without_a_fault_and_with_the_planned_bytes) {
  const PatternFile file(20 * kPage, 4, kMemoryDirectory);
  Pager pager(Shadow::options(10));
  const Region region = pager.map_file(file.path());
  std::vector<std::int32_t> step_set, initial, page_in, evict, step, deadline;
  for (std::size_t i = 0; i < 10; ++i) {
    step_set.push_back(
        static_cast<std::int32_t>(pager.add_set({{region.address + 2 * i * kPage, 2 * kPage}}, "step").value));
  }
  for (std::int32_t page = 0; page < 10; ++page) initial.push_back(page);
  for (std::int32_t i = 0; i < 14; ++i) {
    const std::int32_t in = i < 10 ? 10 + i : i - 4, out = 6 + i;
    page_in.push_back(in);
    evict.push_back(out);
    step.push_back(out / 2 + 1);
    deadline.push_back(i < 10 ? in / 2 : 10 + in / 2);
  }
  pager.set_schedule({step_set, initial, step, deadline, page_in, evict});
  constexpr int kPasses = 50;
  const auto* words = reinterpret_cast<const std::uint64_t*>(region.address);
  for (int pass = 0; pass < kPasses; ++pass) {
    pager.begin_pass();
    for (std::size_t i = 0; i < 10; ++i) {
      const SetId set{static_cast<std::uint32_t>(step_set[i])};
      pager.acquire(set, {});
      ASSERT_EQ(words[2 * i * kWordsPerPage + 1], pattern(2 * i * kWordsPerPage + 1, 4));
      pager.release(set);
    }
  }
  const Counters counts = pager.residency().counters();
  EXPECT_EQ(counts.faults, 0u);
  // Ten at the start, fourteen a pass; the last pass may or may not have begun to read for the next one.
  EXPECT_GE(counts.page_ins, 10u + 14 * kPasses - 4);
  EXPECT_LE(counts.page_ins, 10u + 14 * kPasses);
  EXPECT_EQ(counts.passes, static_cast<std::uint64_t>(kPasses));
}

// The schedule lists the page last, and by its turn every frame holds a page that is used sooner: it is passed over
// while its reader already waits, and must come on demand.
TEST(Executor, a_page_that_the_schedule_passes_over_comes_on_demand) {
  constexpr std::int32_t kFrames = 12;
  const PatternFile file((kFrames + 1) * kPage, 6, kMemoryDirectory);
  PagerOptions options = Shadow::options(kFrames);
  options.inflight_bytes = kPage;
  options.make_queue = [] {
    IoQueueOptions queue_options;
    queue_options.filter = [](const IoRequest&, int raw_result) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));  // so that the reader waits before the turn comes
      return raw_result;
    };
    return make_pread_queue(queue_options);
  };
  Pager pager(options);
  const Region region = pager.map_file(file.path());
  std::vector<std::int32_t> step_set;
  const std::vector<std::int32_t> initial{kFrames, 0}, none;
  for (std::int32_t page = 0; page <= kFrames; ++page) {
    std::byte* const address = region.address + static_cast<std::size_t>(page) * kPage;
    step_set.push_back(static_cast<std::int32_t>(pager.add_set({{address, kPage}}, "one").value));
    if (page == 0 || page == kFrames) continue;
    pager.acquire(SetId{static_cast<std::uint32_t>(step_set.back())}, {});
    pager.release(SetId{static_cast<std::uint32_t>(step_set.back())});
  }
  pager.set_schedule({step_set, initial, none, none, none, none});
  const SetId first{static_cast<std::uint32_t>(step_set[0])};
  pager.acquire(first, {});
  EXPECT_EQ(reinterpret_cast<const std::uint64_t*>(region.address)[1], pattern(1, 6));
  pager.release(first);
}

}  // namespace
}  // namespace tp
