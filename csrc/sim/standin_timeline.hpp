// SPDX-License-Identifier: Apache-2.0
// The simulated time of the stand-in driver: when each operation starts and ends, and how late it is for the host. The
// model is described in standin_driver.hpp.
//
// An operation's time is settled as soon as it is known: at the call for most, and for what comes behind a gate (a wait
// for a value) when the gate opens. Operations only ever wait for operations that were asked for before them, so one
// pass in the order of calls settles all that can be.
//
// Threads: none; the driver's lock is around each call.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "device/cuda_abi.hpp"
#include "sim/standin_driver.hpp"

namespace tp {

struct StandinStream;

struct StandinOperation {
  struct Range {
    cuda::DevicePtr address = 0;
    std::size_t size_bytes = 0;
  };
  // Run by the thread of the stream. May be run again: what a graph holds is run with every launch.
  using Body = std::function<cuda::Result(StandinOperation&, StandinStream&)>;

  // Given by whoever asks for it.
  const char* call = "";
  std::optional<StandinEngine> engine;
  std::uint64_t size_bytes = 0;           // moved, when it moves any
  std::uint64_t duration_ns = 0;          // of a kernel; copies get theirs from their size
  bool is_gate = false;                   // its end is known only when it has happened
  cuda::Result failure = cuda::kSuccess;  // in place of what it would do
  Body body;
  std::vector<std::shared_ptr<StandinOperation>> after;  // what has to be done before; empty when it is itself

  // Its life.
  StandinStream* stream = nullptr;
  bool has_begun = false, is_done = false, is_settled = false, is_open = false;  // open: a gate that has been passed
  std::uint64_t asked_ns = 0, start_ns = 0, end_ns = 0;
  std::vector<Range> touched;  // while it runs
};

using StandinOperationPointer = std::shared_ptr<StandinOperation>;

class StandinTimeline {
 public:
  explicit StandinTimeline(const StandinOptions& options);

  void asked(const StandinOperationPointer& operation);
  // The gate opened by what ended at `opened_ns`, or by the host just now.
  void opened(StandinOperation& gate, std::optional<std::uint64_t> opened_ns);

  // A thread of the host asks whether an operation is done, and is told; or it has waited for it, or runs in it.
  bool query(const StandinOperation& operation);
  void observed(const StandinOperation& operation);

  std::uint64_t host_now_ns();
  void advance_host_ns(std::uint64_t nanoseconds) { host_now_ns_ = host_now_ns() + nanoseconds; }
  void host_reached_ns(std::uint64_t nanoseconds);
  std::uint64_t device_end_ns() const { return device_end_ns_; }
  std::uint64_t busy_ns(StandinEngine engine) const { return busy_ns_[static_cast<std::size_t>(engine)]; }
  // When the operation is to end by the machine's clock; nothing when it takes no real time.
  std::optional<std::chrono::steady_clock::time_point> real_end(const StandinOperation& operation) const;

 private:
  void settle_all();
  bool settle(const StandinOperationPointer& operation);
  std::uint64_t take(StandinEngine engine, std::uint64_t ready_ns, std::uint64_t duration_ns);
  std::uint64_t duration_ns(const StandinOperation& operation) const;
  void step();

  const StandinOptions options_;
  const std::chrono::steady_clock::time_point origin_ = std::chrono::steady_clock::now();
  std::uint64_t host_now_ns_ = 0, device_end_ns_ = 0;
  std::array<std::map<std::uint64_t, std::uint64_t>, kStandinEngines> busy_;  // begin to end
  std::array<std::uint64_t, kStandinEngines> busy_ns_{};
  std::vector<StandinOperationPointer> unsettled_;                     // in the order of calls
  std::multimap<std::uint64_t, StandinOperationPointer> not_reached_;  // by end; with polls_step_time alone
};

}  // namespace tp
