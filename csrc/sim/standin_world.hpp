// SPDX-License-Identifier: Apache-2.0
// The stand-in driver itself: what its entry points (standin_calls.cpp, standin_stream_calls.cpp,
// standin_graph_calls.cpp) and its control interface (standin_driver.cpp) share.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "device/cuda_abi.hpp"
#include "sim/standin_driver.hpp"
#include "sim/standin_graph.hpp"
#include "sim/standin_memory.hpp"
#include "sim/standin_stream.hpp"
#include "sim/standin_timeline.hpp"

namespace tp {

enum class StandinCall : std::uint8_t {
#define TP_STANDIN_CALL(name, parameters) name,
  TP_CUDA_ENTRY_POINTS(TP_STANDIN_CALL)
#undef TP_STANDIN_CALL
      count
};

inline constexpr std::array kStandinCallNames = {
#define TP_STANDIN_NAME(name, parameters) #name,
    TP_CUDA_ENTRY_POINTS(TP_STANDIN_NAME)
#undef TP_STANDIN_NAME
};

// Of one thread of the process. What an earlier reset() left behind does not count.
struct StandinThread {
  std::uint64_t generation = 0;
  std::vector<cuda::Context> contexts;  // the current one is the last
  bool is_in_host_function = false;
  int capture_mode = cuda::kStreamCaptureModeGlobal;
  cuda::Result operation_failure = cuda::kSuccess;  // for the operation that the call asks for
};

class StandinWorld final : public StandinDriver {
 public:
  static StandinWorld& instance();  // never destroyed: threads of a test may outlive main()

  StandinLeaks reset(const StandinOptions& options) override;
  StandinLeaks alive() const override;
  void add_kernel(const StandinKernel& kernel) override;
  void arm(const StandinFailure& failure) override;
  void disarm() override;
  std::uint64_t fired() const override;
  cuda::Result context_error() const override;
  void lose_context(cuda::Result result) override;
  std::uint64_t calls() const override;
  std::uint64_t calls(const std::string& name) const override;
  std::uint64_t bytes(StandinEngine engine) const override;
  std::uint64_t operations() const override;
  std::uint64_t unregistered_copies() const override;
  std::vector<std::string> violations() const override;
  std::vector<std::string> behind_waiters() const override;
  std::vector<std::string> blocked() const override;
  bool is_stuck() const override;
  std::uint64_t host_now_ns() const override;
  std::uint64_t device_end_ns() const override;
  std::uint64_t busy_ns(StandinEngine engine) const override;
  void advance_host_ns(std::uint64_t nanoseconds) override;
  void host_reached_ns(std::uint64_t nanoseconds) override;

  // What every call does first: kSuccess, or what it returns instead of doing anything.
  cuda::Result begin(StandinCall call);
  // cuGetProcAddress's: the query result, and the function where it is 0.
  int look_up(const std::string& name, int version, void** function);

  using Result = cuda::Result;
  using Device = cuda::Device;
  using DevicePtr = cuda::DevicePtr;
  using AllocationHandle = cuda::AllocationHandle;
  using Context = cuda::Context;
  using Stream = cuda::Stream;
  using Event = cuda::Event;
  using Module = cuda::Module;
  using Function = cuda::Function;
  using Graph = cuda::Graph;
  using GraphNode = cuda::GraphNode;
  using GraphExec = cuda::GraphExec;
  using HostFunction = cuda::HostFunction;
  using MemAllocationProp = cuda::MemAllocationProp;
  using MemAccessDesc = cuda::MemAccessDesc;
  using BatchMemOpNodeParams = cuda::BatchMemOpNodeParams;
#define TP_STANDIN_MEMBER(name, parameters) cuda::Result name parameters;
  TP_CUDA_ENTRY_POINTS(TP_STANDIN_MEMBER)
#undef TP_STANDIN_MEMBER

 private:
  using Lock = std::unique_lock<std::mutex>;
  struct EventState {
    unsigned flags = 0;
    StandinOperationPointer record;  // the latest; null: never recorded
    StandinCapturePoint point;       // when that was into a capture
  };
  struct FunctionState {
    cuda::Module module = nullptr;
    std::string kernel;
  };

  StandinWorld();
  StandinThread& thread_locked();
  cuda::Result inject_locked(StandinCall call, StandinThread& thread);
  StandinLeaks alive_locked() const;
  bool is_device(int device) const { return device >= 0 && device < options_.device_count; }
  bool is_context_locked(cuda::Context context) const;
  int current_device_locked();
  template <class Handle>
  Handle new_handle_locked() {
    return reinterpret_cast<Handle>(static_cast<std::uintptr_t>(next_handle_++));
  }
  StandinOperationPointer operation_locked(const char* call);
  cuda::Result submit_locked(const StandinStreamPointer& stream, const StandinOperationPointer& operation);
  cuda::Result make_wait_value_locked(const char* call, cuda::DevicePtr address, std::uint32_t value, unsigned flags,
                                      StandinOperation& operation);
  cuda::Result make_write_value_locked(const char* call, cuda::DevicePtr address, std::uint32_t value, unsigned flags,
                                       StandinOperation& operation);
  void wait_before_mapping(Lock& lock);
  // Takes the copy apart: kErrorInvalidValue for a host range that is registered in part.
  cuda::Result check_host_range_locked(const void* memory, std::size_t size_bytes, bool* is_registered);
  cuda::Result copy_to_host_or_device(const char* call, StandinEngine engine, cuda::DevicePtr address,
                                      std::byte* host_memory, std::size_t size_bytes, cuda::Stream stream);
  void warn_of_use_locked(const char* call, cuda::DevicePtr address, std::size_t size_bytes);

  mutable std::mutex mutex_;
  StandinOptions options_;
  std::uint64_t generation_ = 1;
  std::unique_ptr<StandinMemory> memory_;
  std::unique_ptr<StandinTimeline> timeline_;
  std::unique_ptr<StandinStreams> streams_;
  std::vector<std::size_t> contexts_;  // how often each device's is retained
  std::uintptr_t next_handle_ = 0x1000;
  StandinGraphs graphs_;
  std::vector<cuda::GraphNode> dependencies_;  // handed out by cuStreamGetCaptureInfo
  std::map<cuda::Event, EventState> events_;
  std::map<cuda::Module, bool> modules_;
  std::map<cuda::Function, FunctionState> functions_;
  std::map<std::string, std::shared_ptr<const StandinKernel>> kernels_;
  std::map<cuda::DevicePtr, std::uint64_t> value_written_ns_;  // by operations, for gates
  std::array<std::uint64_t, static_cast<std::size_t>(StandinCall::count)> calls_{};
  std::uint64_t unregistered_copies_ = 0;
  std::optional<StandinFailure> failure_;
  std::uint64_t matching_ = 0, fired_ = 0;
};

}  // namespace tp
