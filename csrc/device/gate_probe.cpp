// SPDX-License-Identifier: Apache-2.0
#include "device/gate_probe.hpp"

#include <atomic>
#include <exception>
#include <functional>
#include <optional>
#include <thread>

#include "device/gate_array.hpp"

namespace tp {
namespace {

constexpr std::chrono::microseconds kLook{100};

bool comes_true(const std::function<bool()>& holds, std::chrono::milliseconds patience) {
  const auto end = std::chrono::steady_clock::now() + patience;
  while (!holds()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(kLook);
  }
  return true;
}

// A graph that does nothing but wait at its gate. Gate 0 is its own; gate 1 + i is opened by copy stream i.
class WaitingGraph {
 public:
  WaitingGraph(const std::shared_ptr<const CudaDevice>& device, std::size_t copy_streams)
      : device_(*device), gates_(device, 1 + copy_streams) {
    capture_stream_ = device_.make_stream();
    try {
      capture();
    } catch (...) {
      destroy();
      throw;
    }
  }
  ~WaitingGraph() { destroy(); }
  WaitingGraph(const WaitingGraph&) = delete;
  WaitingGraph& operator=(const WaitingGraph&) = delete;

  GateArray& gates() noexcept { return gates_; }
  void launch(cuda::Stream stream) { device_.driver().cuGraphLaunch(exec_, stream); }

 private:
  void capture() {
    const CudaDriver& driver = device_.driver();
    cuda::Graph graph = nullptr;
    driver.cuStreamBeginCapture(capture_stream_, cuda::kStreamCaptureModeThreadLocal);
    std::exception_ptr failure;
    try {
      gates_.capture_step(0, capture_stream_);
    } catch (const Error&) {
      failure = std::current_exception();
    }
    const cuda::Result ended = driver.cuStreamEndCapture.result(capture_stream_, &graph);
    if (!failure && ended == cuda::kSuccess) {
      const cuda::Result made = driver.cuGraphInstantiateWithFlags.result(&exec_, graph, 0ull);
      if (made != cuda::kSuccess) failure = std::make_exception_ptr(driver.error("cuGraphInstantiateWithFlags", made));
    }
    if (graph != nullptr) driver.cuGraphDestroy.result(graph);
    if (failure) std::rethrow_exception(failure);
    if (ended != cuda::kSuccess) throw driver.error("cuStreamEndCapture", ended);
  }
  void destroy() noexcept {
    cuda::Graph graph = nullptr;
    int status = cuda::kStreamCaptureStatusNone;
    if (device_.driver().cuStreamIsCapturing.result(capture_stream_, &status) == cuda::kSuccess &&
        status != cuda::kStreamCaptureStatusNone &&
        device_.driver().cuStreamEndCapture.result(capture_stream_, &graph) == cuda::kSuccess) {
      device_.driver().cuGraphDestroy.result(graph);
    }
    if (exec_ != nullptr) device_.driver().cuGraphExecDestroy.result(exec_);
    device_.driver().cuStreamDestroy.result(capture_stream_);
  }

  const CudaDevice& device_;
  GateArray gates_;
  cuda::Stream capture_stream_ = nullptr;
  cuda::GraphExec exec_ = nullptr;
};

// Maps a frame at an address of its own, and unmaps it, in a thread that may get stuck in it until the gate opens.
class MappingTrial {
 public:
  MappingTrial(const CudaDevice& device, cuda::AllocationHandle frame, std::size_t frame_bytes)
      : device_(device), frame_(frame), frame_bytes_(frame_bytes), thread_([this] { run(); }) {}
  ~MappingTrial() { thread_.join(); }
  MappingTrial(const MappingTrial&) = delete;
  MappingTrial& operator=(const MappingTrial&) = delete;
  bool done() const noexcept { return done_.load(); }
  // Once it is done: what failed.
  const std::optional<Error>& error() const noexcept { return error_; }

 private:
  void run() noexcept {
    const CudaDevice::Current current(device_);
    const CudaDevice::OutsideCapture outside(device_);
    const CudaDriver& driver = device_.driver();
    const cuda::MemAccessDesc access = device_.read_write_access();
    cuda::DevicePtr address = 0;
    bool mapped = false;
    try {
      driver.cuMemAddressReserve(&address, frame_bytes_, std::size_t{0}, cuda::DevicePtr{0}, 0ull);
      driver.cuMemMap(address, frame_bytes_, std::size_t{0}, frame_, 0ull);
      mapped = true;
      driver.cuMemSetAccess(address, frame_bytes_, &access, std::size_t{1});
      mapped = false;
      driver.cuMemUnmap(address, frame_bytes_);
    } catch (const Error& error) {
      error_ = error;
    }
    if (mapped) driver.cuMemUnmap.result(address, frame_bytes_);
    if (address != 0) driver.cuMemAddressFree.result(address, frame_bytes_);
    done_ = true;
  }

  const CudaDevice& device_;
  const cuda::AllocationHandle frame_;
  const std::size_t frame_bytes_;
  std::optional<Error> error_;
  std::atomic<bool> done_{false};
  std::thread thread_;
};

struct Trial {
  const CudaDevice& device;
  const std::vector<cuda::Stream>& copy_streams;
  cuda::AllocationHandle frame;
  std::size_t frame_bytes;
  std::chrono::milliseconds patience;
};

GateFacts try_gates(const Trial& trial, WaitingGraph& graph) {
  GateArray& gates = graph.gates();
  const std::size_t count = trial.copy_streams.size();
  for (std::size_t index = 0; index < count; ++index) gates.open_behind(1 + index, trial.copy_streams[index]);
  const auto all_open = [&] {
    for (std::size_t index = 0; index < count; ++index) {
      if (!gates.is_open(1 + index)) return false;
    }
    return true;
  };
  if (!comes_true(all_open, trial.patience)) {
    return {
        false,
        "copies are stuck behind a graph that waits: the stream shares a hardware queue with a copy stream. "
        "Another stream may have one of its own; so may all with CUDA_DEVICE_MAX_CONNECTIONS=32 in the environment"};
  }
  MappingTrial mapping(trial.device, trial.frame, trial.frame_bytes);
  const bool mapped = comes_true([&] { return mapping.done(); }, trial.patience);
  gates.open(0);  // or the trial might never end
  if (!mapped) return {false, "mapping frames waits for the device, and so for a graph that waits for them"};
  if (mapping.error()) return {false, std::string("a frame could not be mapped to try it: ") + mapping.error()->what()};
  return {true, "copies and mapping get on while a graph waits in this stream"};
}

}  // namespace

GateFacts probe_gates(const std::shared_ptr<const CudaDevice>& device, cuda::Stream stream,
                      const std::vector<cuda::Stream>& copy_streams, cuda::AllocationHandle frame,
                      std::size_t frame_bytes, std::chrono::milliseconds patience) {
  const CudaDevice::Current current(*device);
  std::optional<WaitingGraph> graph;
  try {
    graph.emplace(device, copy_streams.size());
  } catch (const Error& error) {
    if (context_is_lost(error.error_number())) throw;
    return {false, std::string("waits for values can't be put into a graph: ") + error.what()};
  }
  const CudaDriver& driver = device->driver();
  driver.cuStreamSynchronize(stream);
  for (const cuda::Stream copies : copy_streams) driver.cuStreamSynchronize(copies);
  graph->launch(stream);
  GateFacts facts;
  try {
    facts = try_gates({*device, copy_streams, frame, frame_bytes, patience}, *graph);
  } catch (const Error& error) {
    graph->gates().open(0);
    if (context_is_lost(error.error_number())) throw;
    facts = {false, std::string("values can't be written by a stream: ") + error.what()};
  }
  graph->gates().open(0);
  driver.cuStreamSynchronize(stream);
  for (const cuda::Stream copies : copy_streams) driver.cuStreamSynchronize(copies);
  return facts;
}

}  // namespace tp
