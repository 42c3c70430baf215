// SPDX-License-Identifier: Apache-2.0
// A run captured as pieces of CUDA graphs, replayed with page operations in between: every kernel sees its own bytes
// whatever the device's timing, and nothing hangs, however few hardware channels there are. Programs that are wrong on
// purpose are caught.
#include <gtest/gtest.h>

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

}  // namespace
}  // namespace tp
