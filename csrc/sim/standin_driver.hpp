// SPDX-License-Identifier: Apache-2.0
// A CUDA driver without a device, for tests: a shared library with the entry points of device/cuda_abi.hpp over host
// memory, and the interface by which a test rules it. CudaDriver::load() takes the library's path; the test links it
// too, and gets the same object from tensorpager_standin_driver().
//
// What runs. Each stream is a thread with a queue. Order is CUDA's and no more: a stream's own order, events (a wait
// takes the record that is the latest at the call), and the legacy default stream, which orders itself with every
// stream that is not kStreamNonBlocking. Waits, writes and host functions are operations like copies. An operation
// looks at the mapping table each time it touches device memory: what is not mapped, or has no access, is
// kErrorIllegalAddress, and the context is lost. Device memory is one memory file: a mapped address with access can
// also be read by the host (not so on a device); any other traps. What cuMemCreate gives is filled with kPoison.
//
// What is provoked. With delay_max above 0 every operation starts late by a random time, poisons its destination,
// copies in pieces in random order, and touches memory early or late within its time. So a buffer that is used before
// its event has completed shows wrong bytes in some of the seeds. With one seed the draws of a stream are equal from
// run to run; how threads interleave is the machine's. Copies are visible to the thread sanitizer unless hides_races
// is set, so that it also finds what the bytes don't show.
//
// Stricter than a device, so that nobody relies on what is only usual: memory calls need a current context, cuMemFree
// does not wait, a copy from unregistered memory is asynchronous (and counted), unmapping while an operation that
// touches the range runs is counted as a violation.
//
// Channels. A device has a few hardware queues for all streams of a process. With `channels` above 0 the streams share
// so many in turn: what is asked for of one channel begins in the order of the calls, whichever stream it is of, so an
// operation that waits holds up all that come behind it. A program whose waits end only by what comes later then hangs,
// as it may on a device; is_stuck() and blocked() let a test see that, and behind_waiters() tells of each operation
// that nothing but its channel made wait for the host.
//
// Simulated time. Each operation is given a start and an end in nanoseconds, by the rules above and by one engine per
// direction of copies (host to device, device to host), one for copies and fills within the device, one for kernels.
// It starts when the host has asked for it, what it waits for has ended and its engine is free; engines take whoever
// fits first, in the order of calls. So the account does not depend on how fast this machine is. A rate of 0 takes no
// time; nor do events, waits and host functions. The host's clock is one for all threads: it reaches an operation's
// end when a call tells a thread that it is done, and moves when a test says so. What follows from polling depends on
// polls_step_time:
//   false  a query says what has really happened, and the clock jumps to that operation's end;
//   true   a query says "done" only when the clock has got there. Otherwise it moves the clock to the next end of any
//          operation, as time goes by for a host that polls. Use this where several events are polled in a loop. Where
//          another thread asks for work, host_waits says when that one has nothing left to ask for: a thread that this
//          machine has not come round to yet must not cost simulated time.
// With real_seconds_per_simulated_second above 0 operations also take that long, and the host's clock follows the
// machine's.
//
// Threads: any, but reset() while no other thread is in the driver. Errors: TP_CHECK.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "base/check.hpp"
#include "device/cuda_abi.hpp"

#define TP_STANDIN_EXPORT __attribute__((visibility("default")))

namespace tp {

// The image that cuModuleLoadData takes: these bytes, the last of them 0, and nothing behind them is read. Its
// functions are the kernels that were added.
inline constexpr char kStandinImage[] = "TPSTANDIN";

struct StandinOptions {
  std::uint64_t seed = 1;
  std::chrono::microseconds delay_max{0};  // 0: as fast as it goes, in one piece
  bool hides_races = false;                // for programs that are wrong on purpose
  bool polls_step_time = false;
  std::function<bool()> host_waits = {};  // asked by such a query; false: the clock stays
  double real_seconds_per_simulated_second = 0;
  std::uint64_t host_to_device_bytes_per_second = 0;
  std::uint64_t device_to_host_bytes_per_second = 0;
  std::uint64_t device_bytes_per_second = 0;
  std::size_t device_memory_bytes = std::size_t{1} << 30;  // of each device
  int device_count = 1;                                    // with 0, cuInit finds no device
  int driver_version = 13000;
  std::map<int, int> attributes = {};    // in place of what cuDeviceGetAttribute says otherwise
  std::string missing_entry_point = {};  // cuGetProcAddress does not find it
  std::size_t channels = 0;              // 0: each stream has its own. They don't count in simulated time
  bool has_value_operations = true;      // else waits for values, and writes of them, are kErrorNotSupported
  bool mapping_waits = false;            // mapping and unmapping return when all streams are through, as some may
};

enum class StandinEffect : std::uint8_t {
  once,       // that call fails, and has done nothing
  sticky,     // that call and all later ones that match
  context,    // that call, and then every call that needs a context, of any name
  operation,  // that call succeeds; its operation fails when it runs, and the context is lost
};

struct StandinFailure {
  std::string call = {};  // the entry point; any that may fail, when empty (all but the two that name errors)
  std::uint64_t nth = 1;  // counted from 1 since arm(), of the calls that match
  cuda::Result result = cuda::kErrorUnknown;
  StandinEffect effect = StandinEffect::once;
};

enum class StandinEngine : std::uint8_t { host_to_device, device_to_host, device, kernel };
inline constexpr std::size_t kStandinEngines = 4;

// What was left alive. Operations: those that had not finished.
struct StandinLeaks {
  std::size_t handles = 0, mappings = 0, reservations = 0, allocations = 0, registrations = 0;
  std::size_t streams = 0, events = 0, modules = 0, graphs = 0, contexts = 0, operations = 0;

  std::size_t total() const {
    return handles + mappings + reservations + allocations + registrations + streams + events + modules + graphs +
           contexts + operations;
  }
};

// One launch, as its kernel sees it. On the stream's thread; valid during the call.
class TP_STANDIN_EXPORT StandinLaunch {
 public:
  unsigned grid_x = 1, grid_y = 1, grid_z = 1, block_x = 1, block_y = 1, block_z = 1, shared_bytes = 0;

  StandinLaunch() = default;
  StandinLaunch(const StandinLaunch&) = delete;
  StandinLaunch& operator=(const StandinLaunch&) = delete;
  virtual ~StandinLaunch() = default;

  // The value that the parameter had when the kernel was launched.
  template <class Value>
  Value parameter(std::size_t index) const {
    TP_CHECK(index < parameters.size() && parameters[index].size() == sizeof(Value));
    Value value;
    std::memcpy(&value, parameters[index].data(), sizeof value);
    return value;
  }
  // Device memory, or registered host memory. False when an address is not mapped: the context is lost, and the kernel
  // should return. While the duration is asked for, nothing can be touched.
  virtual bool read(cuda::DevicePtr address, void* destination, std::size_t size_bytes) = 0;
  virtual bool write(cuda::DevicePtr address, const void* source, std::size_t size_bytes) = 0;

  std::vector<std::vector<std::byte>> parameters;
};

struct StandinKernel {
  std::string name;
  std::vector<std::size_t> parameter_bytes;
  std::function<void(StandinLaunch&)> run;
  std::function<std::uint64_t(const StandinLaunch&)> duration_ns;  // asked for in cuLaunchKernel; empty for none
};

class TP_STANDIN_EXPORT StandinDriver {
 public:
  static constexpr std::byte kPoison{0xa5};
  static constexpr std::size_t kGranularityBytes = std::size_t{2} << 20;

  StandinDriver() = default;
  StandinDriver(const StandinDriver&) = delete;
  StandinDriver& operator=(const StandinDriver&) = delete;
  virtual ~StandinDriver() = default;

  // Drops operations that have not begun, waits for those that run, destroys all there is, forgets counts, failures,
  // the lost context and every thread's current context, and sets the clock to 0. Kernels stay.
  virtual StandinLeaks reset(const StandinOptions& options = {}) = 0;
  virtual StandinLeaks alive() const = 0;

  // Replaces one of the same name. Before the launch.
  virtual void add_kernel(const StandinKernel& kernel) = 0;

  // One failure at a time. A sweep: for nth = 1, 2, ... arm, run the program, check it; stop when fired() stays 0.
  virtual void arm(const StandinFailure& failure) = 0;  // replaces the last one, restarts fired()
  virtual void disarm() = 0;
  virtual std::uint64_t fired() const = 0;
  // kSuccess, or the error for which the context is lost; lose_context() loses it now.
  virtual cuda::Result context_error() const = 0;
  virtual void lose_context(cuda::Result result) = 0;

  virtual std::uint64_t calls() const = 0;
  virtual std::uint64_t calls(const std::string& name) const = 0;
  virtual std::uint64_t bytes(StandinEngine engine) const = 0;  // of operations that have begun
  virtual std::uint64_t operations() const = 0;                 // that have finished
  virtual std::uint64_t unregistered_copies() const = 0;
  virtual std::vector<std::string> violations() const = 0;  // a line each
  // Operations that were asked for, on a channel, behind one that waits for a value, and don't wait for it themselves.
  virtual std::vector<std::string> behind_waiters() const = 0;
  // What the first operation of each stream waits for, a line each; and whether none of them can begin or goes on but
  // for a value that nothing on the device will write before. Nothing left to do is not stuck.
  virtual std::vector<std::string> blocked() const = 0;
  virtual bool is_stuck() const = 0;

  virtual std::uint64_t host_now_ns() const = 0;
  virtual std::uint64_t device_end_ns() const = 0;  // the end of the last operation that was asked for
  virtual std::uint64_t busy_ns(StandinEngine engine) const = 0;
  virtual void advance_host_ns(std::uint64_t nanoseconds) = 0;  // the host was busy, or waited for another device
  virtual void host_reached_ns(std::uint64_t nanoseconds) = 0;  // the same up to a moment; none when it is past
};

}  // namespace tp

extern "C" TP_STANDIN_EXPORT tp::StandinDriver* tensorpager_standin_driver();
