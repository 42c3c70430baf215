// SPDX-License-Identifier: Apache-2.0
// A run captured as pieces of CUDA graphs, replayed with page operations in between: every kernel sees its own bytes
// whatever the device's timing, and nothing hangs, however few hardware channels there are. Programs that are wrong on
// purpose are caught.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "captured_run.hpp"
#include "watchdog.hpp"

namespace tp {
namespace {

using test::CapturedRun;
using test::ends;
using test::kRunPages;
using test::kRunReplays;
using test::kRunSeeds;
using test::kRunSteps;
using test::pattern;
using test::slow_run_device;

enum class Pieces : std::uint8_t {
  right,
  launched_before_they_are_held,
  released_before_they_are_launched,
  not_held_at_all,
};

void replay_pieces(CapturedRun& run, const std::vector<cuda::GraphExec>& pieces, Pieces how) {
  Pager& pager = run.pager();
  for (int replay = 0; replay < kRunReplays; ++replay) {
    pager.begin_pass();
    for (std::size_t step = 0; step < kRunSteps; ++step) {
      if (how == Pieces::launched_before_they_are_held) run.launch(pieces[step]);
      if (how != Pieces::not_held_at_all) pager.acquire(run.set(step), {}, run.stream());
      if (how == Pieces::released_before_they_are_launched) pager.release(run.set(step), run.stream());
      if (how != Pieces::launched_before_they_are_held) run.launch(pieces[step]);
      if (how == Pieces::right || how == Pieces::launched_before_they_are_held)
        pager.release(run.set(step), run.stream());
    }
  }
  run.synchronize();
}

// In how many seeds of kRunSeeds it is caught.
std::uint64_t caught(Pieces how) {
  std::uint64_t seeds = 0;
  for (std::uint64_t seed = 1; seed <= kRunSeeds; ++seed) {
    StandinOptions options = slow_run_device(seed, 0);
    options.hides_races = true;
    CapturedRun run(options);
    std::vector<cuda::GraphExec> pieces;
    for (std::size_t step = 0; step < kRunSteps; ++step) pieces.push_back(run.capture_step(step));
    const bool ended = ends(run.device().standin(), [&] { replay_pieces(run, pieces, how); });
    seeds += !ended || !run.is_right();
  }
  return seeds;
}

TEST(GraphPieces, see_their_own_bytes_on_any_number_of_channels) {
  for (const std::size_t channels : {0u, 1u, 2u, 3u}) {
    for (std::uint64_t seed = 1; seed <= kRunSeeds; ++seed) {
      SCOPED_TRACE("channels " + std::to_string(channels) + ", seed " + std::to_string(seed));
      CapturedRun run(slow_run_device(seed, channels));
      if (seed % 2 == 0) run.follow_schedule();
      std::vector<cuda::GraphExec> pieces;
      for (std::size_t step = 0; step < kRunSteps; ++step) pieces.push_back(run.capture_step(step));
      ASSERT_TRUE(ends(run.device().standin(), [&] { replay_pieces(run, pieces, Pieces::right); }));
      ASSERT_TRUE(run.is_right());
      EXPECT_TRUE(run.device().standin().behind_waiters().empty());
      EXPECT_GE(run.pager().residency().counters().evictions, kRunPages);
      EXPECT_EQ(run.pager().residency().pinned_pages(), 0u);
    }
  }
}

TEST(GraphPieces, that_are_wrong_on_purpose_are_caught) {
  EXPECT_EQ(caught(Pieces::right), 0u);
  for (const Pieces how :
       {Pieces::launched_before_they_are_held, Pieces::released_before_they_are_launched, Pieces::not_held_at_all}) {
    EXPECT_GE(caught(how), kRunSeeds * 3 / 4) << static_cast<int>(how);
  }
}

// ---------------------------------------------------------------- in simulated time

// Pieces of so many pages each, over a file, by the schedule that keeps what half of the frames hold: the others are
// for what is computed with and what is on its way. Time, by what compute or link take at least.
double time_of_pieces(std::size_t pages_a_piece, std::size_t frames, double compute_of_link) {
  const std::size_t pages = 3 * frames, through = frames / 2, stay = frames - through;
  const std::size_t steps = pages / pages_a_piece, moved = pages - stay;
  std::atomic<Pager*> made{nullptr};
  test::StandinDevice device(test::timed_device(frames, made));
  const test::PatternFile file(pages * test::kDevicePage, 7, test::kMemoryDirectory);
  Pager pager(test::device_options(frames, pages + 2));
  made = &pager;
  const Region region = pager.map_file(file.path());
  std::vector<SetId> sets;
  std::vector<std::int32_t> step_set, initial, step, deadline, page_in, evict;
  for (std::size_t each = 0; each < steps; ++each) {
    std::byte* begin = region.address + each * pages_a_piece * test::kDevicePage;
    sets.push_back(pager.add_set({{begin, pages_a_piece * test::kDevicePage}}, "piece"));
    step_set.push_back(static_cast<std::int32_t>(sets.back().value));
  }
  for (std::size_t page = 0; page < frames; ++page) initial.push_back(static_cast<std::int32_t>(page));
  for (std::size_t page = stay; page < pages; ++page) {
    const std::size_t next = page + through < pages ? page + through : page + through - pages + stay;
    const std::size_t cycle = page + through < pages ? 0 : steps;
    step.push_back(static_cast<std::int32_t>(page / pages_a_piece + 1));
    deadline.push_back(static_cast<std::int32_t>(cycle + next / pages_a_piece));
    page_in.push_back(static_cast<std::int32_t>(next));
    evict.push_back(static_cast<std::int32_t>(page));
  }
  pager.set_schedule({step_set, initial, step, deadline, page_in, evict});
  std::vector<cuda::GraphExec> graphs;
  const auto kernel_ns =
      static_cast<std::uint64_t>(compute_of_link * test::link_ns(moved) / static_cast<double>(steps));
  for (std::size_t each = 0; each < steps; ++each) {
    test::KernelWork& work = device.new_work();
    const std::size_t word = each * pages_a_piece * test::kWordsPerPage + 5;
    work.checks.push_back({test::device_pointer(region.address + 8 * word), pattern(word, 7)});
    work.duration_ns = kernel_ns;
    graphs.push_back(device.capture([&] { device.launch(work, device.stream()); }));
  }
  const auto replay = [&](int times) {
    for (int pass = 0; pass < times; ++pass) {
      pager.begin_pass();
      for (std::size_t each = 0; each < steps; ++each) {
        pager.acquire(sets[each], {}, device.stream());
        device.launch(graphs[each]);
        pager.release(sets[each], device.stream());
      }
    }
    device.synchronize(device.stream());
  };
  replay(2);
  const std::uint64_t begin_ns = device.standin().host_now_ns();
  constexpr int kPasses = 4;
  replay(kPasses);
  EXPECT_EQ(device.wrong(), 0u);
  const auto elapsed = static_cast<double>(device.standin().host_now_ns() - begin_ns);
  return elapsed / (kPasses * std::max(test::link_ns(moved), static_cast<double>(steps * kernel_ns)));
}

// What PIECES_IN_BUDGET of graphs.py rests on: larger pieces leave fewer frames for what is on its way.
TEST(GraphPieces, of_a_sixteenth_of_the_budget_take_no_longer_than_compute_or_link) {
  constexpr std::size_t kFrames = 32;
  for (const std::size_t pages : {2u, 4u, 8u}) {
    for (const double share : {0.5, 1.0, 2.0}) {
      const double time = time_of_pieces(pages, kFrames, share);
      RecordProperty("a_" + std::to_string(kFrames / pages) + "th_" + std::to_string(share), std::to_string(time));
      if (pages == kFrames / 16) EXPECT_LE(time, 1.06) << "compute / link " << share;
    }
  }
}

}  // namespace
}  // namespace tp
