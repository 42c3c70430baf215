// SPDX-License-Identifier: Apache-2.0
// One CUDA graph for a whole run of steps: it is launched before its pages are there, and waits for them step by step
// at gates (device/gate_array.hpp), which copy streams open behind the copies. Marks that it sets tell the executor
// when frames may be taken again, so no thread waits for the device but in acquire().
//
// That is what pieces between page operations avoid, and it is the more dangerous for it:
//   - The graph stands in a hardware queue while copies are asked for. Where these share it, nobody would get on. So
//     probe() must have found that they don't, in the very stream that it is launched in, and while it runs progress is
//     watched: without any for kStuckAfter, the host opens the gates.
//   - It can't be stopped. When a page can't be had, all gates are opened: the kernels read what is not mapped, and the
//     context is lost. Where copies were stuck they may have read what was not copied yet. Either way replay() throws,
//     and the pager takes nothing more: what the graph made and wrote is never taken for right.
//
// Between its launch and the opening of its last gate a replay holds the pager's lock for it: two graphs that hold
// frames for each other would wait for ever.
//
// Threads: one at a time. Blocking: replay() until the last gate is open; the destructor until the last replay is
// through. Ownership: what it is made of outlives it, but for the pager's being closed. Errors: Error(invalid) for what
// comes in the wrong order, Error(engine) when probe() did not find gates usable, what acquire() throws, Error(device).
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "device/copy_queue.hpp"
#include "device/gate_array.hpp"
#include "device/gate_probe.hpp"
#include "pager/residency.hpp"

namespace tp {

// What a gated graph uses and the pager owns.
struct GatedGraphParts {
  std::shared_ptr<const CudaDevice> device;
  CopyQueue& copies;
  EventTimeline& releases;
  Residency& residency;
  std::mutex& one_at_a_time;
};

// Copies of pages take milliseconds, and kernels of a step no longer than what a display's watchdog lets pass.
inline constexpr std::chrono::milliseconds kStuckAfter{10'000};

class GatedGraph {
 public:
  // stream: where it is launched. steps_max: calls of step().
  GatedGraph(GatedGraphParts parts, cuda::Stream stream, std::size_t steps_max,
             std::chrono::milliseconds stuck_after = kStuckAfter);
  ~GatedGraph();
  GatedGraph(const GatedGraph&) = delete;
  GatedGraph& operator=(const GatedGraph&) = delete;

  // While a stream is captured: what it captures from now on uses the pages of the set, and no others.
  void step(SetId set, cuda::Stream captured_stream);
  // It modifies these, which are of that set.
  void writes(SetId set);
  // The last of it was captured.
  void end(cuda::Stream captured_stream);
  // `launch` launches the graph that was captured, in this stream, which is the one that was probed; its pages are
  // brought in step by step. When it throws, it counts as launched.
  void replay(cuda::Stream stream, const std::function<void()>& launch);

  std::size_t step_count() const noexcept { return steps_.size(); }
  std::uint64_t replays() const noexcept { return replays_; }

 private:
  struct Step {
    SetId set;
    std::vector<SetId> written;
    std::uint64_t last_point = 0;  // of the releases, at the last replay
  };
  void bring_in(std::size_t index);
  void wait_for(std::uint64_t release_point);
  void wait_until_open();
  void open_after_failure(std::size_t index) noexcept;
  void throw_if_stuck();

  GatedGraphParts parts_;
  cuda::Stream stream_;
  std::chrono::milliseconds stuck_after_;
  std::unique_ptr<GateArray> gates_;
  std::vector<Step> steps_;
  bool ended_ = false;
  bool failed_ = false;
  std::uint64_t replays_ = 0;
  // For throw_if_stuck().
  std::uint64_t seen_arrivals_ = 0, seen_departures_ = 0, seen_releases_ = 0;
  std::chrono::steady_clock::time_point seen_at_;
};

}  // namespace tp
