// SPDX-License-Identifier: Apache-2.0
#include "pager/gated_graph.hpp"

#include <thread>

#include "base/check.hpp"

namespace tp {
namespace {

constexpr std::chrono::microseconds kLook{20};

}  // namespace

GatedGraph::GatedGraph(GatedGraphParts parts, cuda::Stream stream, std::size_t steps_max,
                       std::chrono::milliseconds stuck_after)
    : parts_(std::move(parts)),
      stream_(stream),
      stuck_after_(stuck_after),
      gates_(std::make_unique<GateArray>(parts_.device, steps_max)) {}

GatedGraph::~GatedGraph() {
  // The device may still be on its way through the flags, and the executor looks at the marks.
  const CudaDevice::Current current(*parts_.device);
  seen_at_ = std::chrono::steady_clock::now();
  try {
    for (const Step& step : steps_) wait_for(step.last_point);
  } catch (const Error&) {
    static std::mutex mutex;
    static auto* const kept = new std::vector<std::unique_ptr<GateArray>>;  // the device may write to it when it can
    const std::lock_guard lock(mutex);
    kept->push_back(std::move(gates_));
  }
}

void GatedGraph::step(SetId set, cuda::Stream captured_stream) {
  if (ended_) throw Error(ErrorKind::invalid, "a gated graph was captured already");
  if (steps_.size() == gates_->count()) {
    throw Error(ErrorKind::invalid,
                "a gated graph has more steps than the " + std::to_string(gates_->count()) + " that it was made for");
  }
  gates_->capture_step(steps_.size(), captured_stream);
  steps_.push_back({set, {}, 0});
}

void GatedGraph::writes(SetId set) {
  if (ended_ || steps_.empty()) throw Error(ErrorKind::invalid, "no step of a gated graph is being captured");
  steps_.back().written.push_back(set);
}

void GatedGraph::end(cuda::Stream captured_stream) {
  if (ended_) throw Error(ErrorKind::invalid, "a gated graph was captured already");
  if (!steps_.empty()) gates_->capture_end(steps_.size() - 1, captured_stream);
  ended_ = true;
}

void GatedGraph::replay(cuda::Stream stream, const std::function<void()>& launch) {
  if (!ended_) throw Error(ErrorKind::invalid, "a gated graph is replayed before it was captured");
  if (stream != stream_) {
    throw Error(ErrorKind::invalid,
                "a gated graph is replayed in another stream than the one that was found to have a hardware queue of "
                "its own");
  }
  if (failed_) {
    throw Error(ErrorKind::device,
                "a gated graph can't be replayed after a replay that failed: the device went on with pages missing");
  }
  const std::lock_guard lock(parts_.one_at_a_time);
  const CudaDevice::Current current(*parts_.device);
  std::size_t index = 0;
  try {
    launch();
    ++replays_;
    seen_at_ = std::chrono::steady_clock::now();
    for (; index < steps_.size(); ++index) bring_in(index);
    wait_until_open();
  } catch (const Error& error) {
    open_after_failure(index);
    const std::string what = std::string(error.what()) + " (step " + std::to_string(index) + " of " +
                             std::to_string(steps_.size()) +
                             " of a CUDA graph that could not be stopped: what it computed and wrote is wrong)";
    parts_.residency.device_lost(Error(ErrorKind::device, what, error.error_number()));
    throw Error(error.kind(), what, error.error_number());
  } catch (...) {  // of the launch, which may have happened all the same
    open_after_failure(index);
    throw;
  }
}

void GatedGraph::bring_in(std::size_t index) {
  Step& step = steps_[index];
  // Not interrupted by signals: whoever gave up now would have to let the graph run into pages that are missing.
  parts_.residency.acquire(step.set, AcquireKind::step, [this] { throw_if_stuck(); });
  try {
    // The launch before has to have come through this gate, and to have let go of the mark.
    wait_for(step.last_point);
    for (const SetId written : step.written) parts_.residency.mark_written(written);
    gates_->clear_mark(index);
    gates_->open_behind(index, parts_.copies.stream_to_device());
    step.last_point = parts_.releases.record_mark(gates_->mark(index));
  } catch (...) {
    parts_.residency.release(step.set);
    throw;
  }
  parts_.residency.release(step.set, step.last_point);
}

void GatedGraph::wait_for(std::uint64_t release_point) {
  while (parts_.releases.reached() < release_point && parts_.releases.poll() < release_point) {
    throw_if_stuck();
    std::this_thread::sleep_for(kLook);
  }
}

// Until the last opening has been done: then nothing that the graph waits for can be stuck behind it.
void GatedGraph::wait_until_open() {
  const std::uint64_t point = parts_.copies.end_to_device();
  while (parts_.copies.arrivals().poll() < point) {
    throw_if_stuck();
    std::this_thread::sleep_for(kLook);
  }
}

// While the device owes something, and gets on with none of it.
void GatedGraph::throw_if_stuck() {
  const auto now = std::chrono::steady_clock::now();
  const std::uint64_t arrivals = parts_.copies.arrivals().reached();
  const std::uint64_t departures = parts_.copies.departures().reached();
  const std::uint64_t releases = parts_.releases.reached();
  const bool owes = arrivals < parts_.copies.arrivals().recorded() ||
                    departures < parts_.copies.departures().recorded() || releases < parts_.releases.recorded();
  const bool got_on = arrivals != seen_arrivals_ || departures != seen_departures_ || releases != seen_releases_;
  if (!owes || got_on) {
    seen_arrivals_ = arrivals, seen_departures_ = departures, seen_releases_ = releases;
    seen_at_ = now;
    return;
  }
  if (now - seen_at_ < stuck_after_) return;
  throw Error(ErrorKind::device,
              "the device has not got on for " + std::to_string(stuck_after_.count()) +
                  " ms while a CUDA graph waits on it for pages: what it waits for is stuck behind it in a hardware "
                  "queue, or a kernel hangs. Capture in pieces instead",
              cuda::kErrorNotReady);
}

void GatedGraph::open_after_failure(std::size_t index) noexcept {
  failed_ = true;
  for (; index < steps_.size(); ++index) {
    try {
      wait_for(steps_[index].last_point);  // else the launch before would take it for its own
    } catch (const Error&) {               // stuck or lost: nothing else is left to do
    }
    gates_->open(index);
  }
}

}  // namespace tp
