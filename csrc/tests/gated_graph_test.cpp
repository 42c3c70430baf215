// SPDX-License-Identifier: Apache-2.0
// A whole run as one graph that waits for its pages: it sees the right bytes, nothing is asked for behind a waiter on a
// hardware channel, streams that share one are refused, and what goes wrong all the same ends in an error, not a hang.
#include "pager/gated_graph.hpp"

#include <gtest/gtest.h>

#include <unistd.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "captured_run.hpp"
#include "watchdog.hpp"

namespace tp {
namespace {

using test::CapturedRun;
using test::ends;
using test::kDevicePage;
using test::kRunPages;
using test::kRunReplays;
using test::kRunSeeds;
using test::kRunSteps;
using test::slow_run_device;
using test::StandinDevice;

// The run as one graph, and what replays it. Gone before the run.
struct Gated {
  explicit Gated(CapturedRun& of, std::chrono::milliseconds stuck_after = kStuckAfter)
      : run(of), graph(of.pager().make_gated_graph(of.stream(), kRunSteps, stuck_after)) {
    exec = run.capture([&] {
      for (std::size_t step = 0; step < run.step_count(); ++step) {
        graph->step(run.set(step), run.stream());
        run.launch_kernel(step);
      }
      graph->end(run.stream());
    });
  }
  void replay() {
    run.pager().begin_pass();
    graph->replay(run.stream(), [&] { run.launch(exec); });
  }

  CapturedRun& run;
  std::unique_ptr<GatedGraph> graph;
  cuda::GraphExec exec = nullptr;
};

void expect_error(ErrorKind kind, const std::string& text, const std::function<void()>& call) {
  try {
    call();
    FAIL() << "no error that says " << text;
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind) << error.what();
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
  }
}

TEST(GatedGraph, sees_its_own_bytes_and_has_nothing_behind_a_waiter) {
  for (const std::size_t channels : {0u, 3u, 8u}) {
    for (std::uint64_t seed = 1; seed <= kRunSeeds; ++seed) {
      SCOPED_TRACE("channels " + std::to_string(channels) + ", seed " + std::to_string(seed));
      CapturedRun run(slow_run_device(seed, channels));
      if (seed % 2 == 0) run.follow_schedule();
      Gated gated(run);
      ASSERT_TRUE(ends(run.device().standin(), [&] {
        for (int replay = 0; replay < kRunReplays; ++replay) gated.replay();
        run.synchronize();
      }));
      ASSERT_TRUE(run.is_right());
      EXPECT_EQ(run.device().standin().behind_waiters(), std::vector<std::string>{});
      EXPECT_GE(run.pager().residency().counters().evictions, kRunPages);
      EXPECT_EQ(run.pager().residency().pinned_pages(), 0u);
      EXPECT_EQ(gated.graph->replays(), static_cast<std::uint64_t>(kRunReplays));
    }
  }
}

// Everything is resident, so nothing holds the host up: it comes to the gates of the next launch before the device has
// come to those of the last.
TEST(GatedGraph, opens_no_gate_that_the_launch_before_has_not_come_through) {
  static std::atomic<bool> let_go;
  for (std::uint64_t seed = 1; seed <= 5; ++seed) {
    CapturedRun run(slow_run_device(seed, 0));
    run.use_first_steps(2);
    Gated gated(run);
    gated.replay();
    run.synchronize();
    let_go = false;
    {
      const CudaDevice::Current current(*run.pager().device());
      CapturedRun::driver().cuLaunchHostFunc(
          run.stream(),
          +[](void*) {
            while (!let_go) std::this_thread::sleep_for(std::chrono::milliseconds(1));
          },
          nullptr);
    }
    ASSERT_TRUE(ends(run.device().standin(), [&] {
      gated.replay();
      std::thread next([&] { gated.replay(); });
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      let_go = true;
      next.join();
      gated.replay();
      run.synchronize();
    }));
    EXPECT_TRUE(run.is_right());
    EXPECT_EQ(gated.graph->replays(), 4u);
  }
}

TEST(GatedGraph, is_one_launch_and_asks_for_no_event_between_its_steps) {
  CapturedRun run(slow_run_device(1, 0));
  Gated gated(run);
  gated.replay();
  run.synchronize();
  StandinDriver& standin = run.device().standin();
  const std::uint64_t launches = standin.calls("cuGraphLaunch"), waits = standin.calls("cuStreamWaitEvent");
  gated.replay();
  run.synchronize();
  EXPECT_EQ(standin.calls("cuGraphLaunch") - launches, 1u);
  EXPECT_EQ(standin.calls("cuStreamWaitEvent"), waits);
}

TEST(GatedGraph, is_refused_where_copies_would_be_stuck_behind_it) {
  for (const std::size_t channels : {1u, 2u}) {
    CapturedRun run(slow_run_device(1, channels));
    expect_error(ErrorKind::engine, "shares a hardware queue",
                 [&] { run.pager().make_gated_graph(run.stream(), kRunSteps); });
    std::vector<cuda::GraphExec> pieces;  // and pieces do it
    for (std::size_t step = 0; step < kRunSteps; ++step) {
      pieces.push_back(run.capture_step(step));
      run.pager().acquire(run.set(step), {}, run.stream());
      run.launch(pieces.back());
      run.pager().release(run.set(step), run.stream());
    }
    run.synchronize();
    EXPECT_TRUE(run.is_right());
  }
  StandinOptions options = slow_run_device(1, 0);
  options.mapping_waits = true;
  CapturedRun run(options);
  expect_error(ErrorKind::engine, "mapping frames waits",
               [&] { run.pager().make_gated_graph(run.stream(), kRunSteps); });
}

// The same without the probe: a graph that waits is launched, and then its pages are asked for.
TEST(GatedGraph, that_nobody_probed_for_hangs_on_a_shared_channel_and_is_caught) {
  CapturedRun run(slow_run_device(1, 1));
  auto gates =
      std::make_unique<GateArray>(std::shared_ptr<const CudaDevice>(run.pager().device(), [](const CudaDevice*) {}), 1);
  const cuda::GraphExec graph = run.capture([&] {
    gates->capture_step(0, run.stream());
    run.launch_kernel(0);
  });
  const cuda::Stream other = run.device().make_stream();
  EXPECT_FALSE(ends(run.device().standin(), [&] {
    run.launch(graph);
    run.pager().acquire(run.set(0), {}, other);
    run.device().synchronize(other);  // the copies are there
    gates->open(0);
    run.pager().release(run.set(0), run.stream());
    run.synchronize();
  }));
  EXPECT_FALSE(run.device().standin().behind_waiters().empty());
}

TEST(GatedGraph, keeps_what_its_steps_write) {
  for (std::uint64_t seed = 1; seed <= 5; ++seed) {
    CapturedRun run(slow_run_device(seed, 0));
    Pager& pager = run.pager();
    const Region spill = pager.map_spill(kRunPages * kDevicePage);
    std::vector<SetId> sets;
    for (std::size_t page = 0; page < kRunPages; ++page)
      sets.push_back(pager.add_set({{spill.address + page * kDevicePage, 8}}, "spill"));
    const auto address_of = [&](std::size_t page) { return test::device_pointer(spill.address + page * kDevicePage); };
    {
      const std::unique_ptr<GatedGraph> graph = pager.make_gated_graph(run.stream(), kRunPages);
      const cuda::GraphExec exec = run.capture([&] {
        for (std::size_t page = 0; page < kRunPages; ++page) {
          graph->step(sets[page], run.stream());
          graph->writes(sets[page]);
          test::KernelWork& work = run.device().new_work();
          work.writes.push_back({address_of(page), 100 + page});
          run.device().launch(work, run.stream());
        }
        graph->end(run.stream());
      });
      for (int replay = 0; replay < 2; ++replay) graph->replay(run.stream(), [&] { run.launch(exec); });
    }
    for (std::size_t page = 0; page < kRunPages; ++page) {
      pager.acquire(sets[page], {}, run.stream());
      test::KernelWork& work = run.device().new_work();
      work.checks.push_back({address_of(page), 100 + page});
      run.device().launch(work, run.stream());
      pager.release(sets[page], run.stream());
    }
    run.synchronize();
    EXPECT_TRUE(run.is_right()) << seed;
    EXPECT_GT(pager.residency().counters().copies_out, 0u);
  }
}

TEST(GatedGraph, of_two_threads_take_turns) {
  CapturedRun run(slow_run_device(3, 0));
  StandinDevice& device = run.device();
  const cuda::Stream other = device.make_stream();
  Gated first(run);
  const std::unique_ptr<GatedGraph> second = run.pager().make_gated_graph(other, kRunSteps);
  const cuda::GraphExec exec = run.capture([&] {
    for (std::size_t step = kRunSteps; step-- > 0;) {
      second->step(run.set(step), run.stream());
      run.launch_kernel(step);
    }
    second->end(run.stream());
  });
  ASSERT_TRUE(ends(device.standin(), [&] {
    std::thread thread([&] {
      for (int replay = 0; replay < 5; ++replay) {
        second->replay(other, [&] {
          const CudaDevice::Current current(*run.pager().device());
          CapturedRun::driver().cuGraphLaunch(exec, other);
        });
      }
    });
    for (int replay = 0; replay < 5; ++replay) first.replay();
    thread.join();
    run.synchronize();
    device.synchronize(other);
  }));
  EXPECT_TRUE(run.is_right());
}

TEST(GatedGraph, says_what_comes_in_the_wrong_order) {
  CapturedRun run(slow_run_device(1, 0));
  Gated gated(run);
  const std::unique_ptr<GatedGraph> small = run.pager().make_gated_graph(run.stream(), 1);
  expect_error(ErrorKind::invalid, "before it was captured", [&] { small->replay(run.stream(), [] {}); });
  expect_error(ErrorKind::invalid, "no step", [&] { small->writes(run.set(0)); });
  expect_error(ErrorKind::invalid, "not being captured", [&] { small->step(run.set(0), run.stream()); });
  run.capture([&] {
    small->step(run.set(0), run.stream());
    expect_error(ErrorKind::invalid, "more steps", [&] { small->step(run.set(1), run.stream()); });
    small->end(run.stream());
    expect_error(ErrorKind::invalid, "captured already", [&] { small->end(run.stream()); });
    expect_error(ErrorKind::invalid, "captured already", [&] { small->step(run.set(1), run.stream()); });
    expect_error(ErrorKind::device, "CUDA graph is captured", [&] { run.pager().probe_gates(run.stream()); });
  });
  expect_error(ErrorKind::invalid, "another stream", [&] { gated.graph->replay(nullptr, [] {}); });
  gated.replay();
  run.synchronize();
  EXPECT_TRUE(run.is_right());
}

// A graph that was launched can't be stopped: it runs into the absent page, and everybody hears of it.
TEST(GatedGraph, whose_page_can_not_be_read_ends_with_the_context_and_without_a_hang) {
  CapturedRun run(slow_run_device(5, 0));
  Gated gated(run);
  ASSERT_EQ(truncate(run.path().c_str(), static_cast<off_t>(7 * kDevicePage)), 0);
  std::string message;
  std::thread([&] {
    try {
      gated.replay();
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::io);
      message = error.what();
    }
  }).join();
  EXPECT_NE(message.find("step 3 of 6"), std::string::npos) << message;
  EXPECT_NE(message.find("could not be stopped"), std::string::npos) << message;
  EXPECT_THROW(run.synchronize(), Error);
  EXPECT_EQ(run.device().standin().context_error(), cuda::kErrorIllegalAddress);
  EXPECT_EQ(run.device().wrong(), 0u);
  expect_error(ErrorKind::device, "after a replay that failed", [&] { gated.replay(); });
  EXPECT_THROW(run.pager().acquire(run.set(0), {}, run.stream()), Error);
}

TEST(GatedGraph, that_the_device_does_not_get_on_with_is_given_up) {
  static std::atomic<bool> let_go;
  let_go = false;
  {
    CapturedRun run(slow_run_device(6, 0));
    run.device().standin().add_kernel({.name = "work",
                                       .parameter_bytes = {sizeof(const test::KernelWork*)},
                                       .run =
                                           [](StandinLaunch&) {
                                             while (!let_go) std::this_thread::sleep_for(std::chrono::milliseconds(1));
                                           },
                                       .duration_ns = {}});
    Gated gated(run, std::chrono::milliseconds(300));
    expect_error(ErrorKind::device, "has not got on for 300 ms", [&] { gated.replay(); });
    let_go = true;
    expect_error(ErrorKind::device, "after a replay that failed", [&] { gated.replay(); });
  }
  CapturedRun gives_the_kernel_back(slow_run_device(6, 0));
}

TEST(GatedGraph, survives_or_names_every_failing_call) {
  const std::vector<std::string> all{
#define TP_NAME(name, parameters) #name,
      TP_CUDA_ENTRY_POINTS(TP_NAME)
#undef TP_NAME
  };
  std::vector<std::string> names;  // of the calls that a replay makes
  {
    CapturedRun run(slow_run_device(2, 0));
    Gated gated(run);
    std::vector<std::uint64_t> before;
    for (const std::string& name : all) before.push_back(run.device().standin().calls(name));
    gated.replay();
    run.synchronize();
    for (std::size_t at = 0; at < all.size(); ++at) {
      if (run.device().standin().calls(all[at]) > before[at] + 1) names.push_back(all[at]);
    }
  }
  EXPECT_GE(names.size(), 8u);
  std::size_t failures = 0;
  for (const StandinEffect effect : {StandinEffect::once, StandinEffect::context}) {
    for (const std::string& name : names) {
      SCOPED_TRACE(name);
      StandinOptions options = slow_run_device(2, 0);
      options.hides_races = true;  // a graph that goes on without its pages reads what is being copied
      CapturedRun run(options);
      Gated gated(run, std::chrono::milliseconds(500));
      gated.replay();
      run.synchronize();
      run.device().standin().arm({.call = name, .nth = 2, .result = cuda::kErrorIllegalAddress, .effect = effect});
      std::atomic<bool> failed{false};
      EXPECT_TRUE(ends(
          run.device().standin(),
          [&] {
            try {
              gated.replay();
              run.synchronize();
            } catch (const Error& error) {
              failed = true;
              EXPECT_NE(error.kind(), ErrorKind::invalid) << error.what();
            }
          },
          std::chrono::milliseconds(2000)));
      run.device().standin().disarm();
      if (!failed && effect == StandinEffect::once) EXPECT_TRUE(run.is_right());
      failures += failed;
    }
  }
  EXPECT_GT(failures, names.size() / 2);
}

}  // namespace
}  // namespace tp
