// SPDX-License-Identifier: Apache-2.0
#include "sim/standin_driver.hpp"

#include <algorithm>
#include <numeric>
#include <string_view>
#include <utility>

#include "sim/standin_world.hpp"

namespace tp {
namespace {

using cuda::Result;

constexpr Result kErrorContextIsDestroyed = 709;
constexpr int kSymbolNotFound = 1;
constexpr int kVersionNotSufficient = 2;

constexpr std::array<std::string_view, 2> kNamesErrors = {"cuGetErrorName", "cuGetErrorString"};
constexpr std::array<std::string_view, 15> kNeedsNoContext = {
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem",
    "cuDeviceGetPCIBusId",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease",
    "cuCtxSetCurrent",
    "cuCtxGetCurrent",
    "cuCtxPushCurrent",
    "cuCtxPopCurrent",
    "cuMemGetAllocationGranularity",
};
constexpr std::array<std::string_view, 11> kAsksForOperation = {
    "cuMemcpyHtoDAsync",    "cuMemcpyDtoHAsync", "cuMemcpyDtoDAsync",   "cuMemsetD8Async",
    "cuStreamWaitEvent",    "cuLaunchHostFunc",  "cuEventRecord",       "cuLaunchKernel",
    "cuStreamWriteValue32", "cuGraphLaunch",     "cuStreamWaitValue32",
};
// CUDA names no list of what it calls "potentially unsafe" during a capture; whatever may wait or take memory is here.
constexpr std::array<std::string_view, 18> kUnsafeInCapture = {
    "cuMemAlloc",       "cuMemFree",           "cuMemCreate",       "cuMemRelease",        "cuMemMap",
    "cuMemUnmap",       "cuMemSetAccess",      "cuMemHostRegister", "cuMemHostUnregister", "cuMemAddressReserve",
    "cuMemAddressFree", "cuModuleLoadData",    "cuModuleUnload",    "cuEventQuery",        "cuEventSynchronize",
    "cuStreamQuery",    "cuStreamSynchronize", "cuCtxSynchronize",
};

template <std::size_t Count>
bool is_one_of(const std::array<std::string_view, Count>& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

std::string_view name_of(StandinCall call) { return kStandinCallNames[static_cast<std::size_t>(call)]; }

// A function with the entry point's signature that calls the member.
template <StandinCall Call, auto Member, class Signature = decltype(Member)>
struct EntryPoint;

template <StandinCall Call, auto Member, class... Parameters>
struct EntryPoint<Call, Member, Result (StandinWorld::*)(Parameters...)> {
  static Result call(Parameters... parameters) {
    StandinWorld& world = StandinWorld::instance();
    const Result result = world.begin(Call);
    return result != cuda::kSuccess ? result : (world.*Member)(parameters...);
  }
};

const std::map<std::string, void*>& entry_points() {
  static const auto* const all = new std::map<std::string, void*>{
#define TP_STANDIN_ENTRY(name, parameters) \
  {#name, reinterpret_cast<void*>(&EntryPoint<StandinCall::name, &StandinWorld::name>::call)},
      TP_CUDA_ENTRY_POINTS(TP_STANDIN_ENTRY)
#undef TP_STANDIN_ENTRY
  };
  return *all;
}

}  // namespace

StandinWorld& StandinWorld::instance() {
  static StandinWorld* const world = new StandinWorld;
  return *world;
}

StandinWorld::StandinWorld() { reset({}); }

StandinLeaks StandinWorld::reset(const StandinOptions& options) {
  TP_CHECK(options.device_count >= 0 && options.delay_max.count() >= 0);
  StandinLeaks leaks;
  if (streams_ != nullptr) {
    leaks = alive();
    streams_->stop();  // its threads take the lock, and go through the pointer
    streams_.reset();
  }
  const std::lock_guard lock(mutex_);
  options_ = options;
  ++generation_;
  timeline_.reset();
  memory_.reset();
  graphs_.clear();
  events_.clear();
  modules_.clear();
  functions_.clear();
  value_written_ns_.clear();
  failure_.reset();
  calls_.fill(0);
  unregistered_copies_ = matching_ = fired_ = 0;
  contexts_.assign(static_cast<std::size_t>(options.device_count), 0);
  memory_ = std::make_unique<StandinMemory>(options.device_memory_bytes, options.device_count);
  timeline_ = std::make_unique<StandinTimeline>(options);
  streams_ = std::make_unique<StandinStreams>(options, *memory_, *timeline_, mutex_);
  return leaks;
}

StandinLeaks StandinWorld::alive() const {
  const std::lock_guard lock(mutex_);
  return alive_locked();
}

StandinLeaks StandinWorld::alive_locked() const {
  StandinLeaks leaks;
  leaks.handles = memory_->handles();
  leaks.mappings = memory_->mappings();
  leaks.reservations = memory_->reservations();
  leaks.allocations = memory_->allocations();
  leaks.registrations = memory_->registrations();
  leaks.streams = streams_->count_locked();
  leaks.events = events_.size();
  leaks.modules = modules_.size();
  leaks.graphs = graphs_.count();
  leaks.contexts = std::accumulate(contexts_.begin(), contexts_.end(), std::size_t{0});
  leaks.operations = streams_->unfinished_locked();
  return leaks;
}

void StandinWorld::add_kernel(const StandinKernel& kernel) {
  TP_CHECK(!kernel.name.empty() && kernel.run);
  const std::lock_guard lock(mutex_);
  kernels_[kernel.name] = std::make_shared<const StandinKernel>(kernel);
}

void StandinWorld::arm(const StandinFailure& failure) {
  TP_CHECK(failure.nth > 0 && failure.result != cuda::kSuccess);
  TP_CHECK(failure.call.empty() || entry_points().contains(failure.call));
  TP_CHECK(!is_one_of(kNamesErrors, failure.call));
  TP_CHECK(failure.effect != StandinEffect::operation || failure.call.empty() ||
           is_one_of(kAsksForOperation, failure.call));
  const std::lock_guard lock(mutex_);
  failure_ = failure;
  matching_ = fired_ = 0;
}

void StandinWorld::disarm() {
  const std::lock_guard lock(mutex_);
  failure_.reset();
}

std::uint64_t StandinWorld::fired() const {
  const std::lock_guard lock(mutex_);
  return fired_;
}

Result StandinWorld::context_error() const {
  const std::lock_guard lock(mutex_);
  return streams_->context_error_locked();
}

void StandinWorld::lose_context(Result result) {
  TP_CHECK(result != cuda::kSuccess);
  const std::lock_guard lock(mutex_);
  streams_->lose_context_locked(result);
}

std::uint64_t StandinWorld::calls() const {
  const std::lock_guard lock(mutex_);
  return std::accumulate(calls_.begin(), calls_.end(), std::uint64_t{0});
}

std::uint64_t StandinWorld::calls(const std::string& name) const {
  const auto found = std::find(kStandinCallNames.begin(), kStandinCallNames.end(), std::string_view(name));
  TP_CHECK(found != kStandinCallNames.end());
  const std::lock_guard lock(mutex_);
  return calls_[static_cast<std::size_t>(found - kStandinCallNames.begin())];
}

std::uint64_t StandinWorld::bytes(StandinEngine engine) const {
  const std::lock_guard lock(mutex_);
  return streams_->bytes_locked(engine);
}

std::uint64_t StandinWorld::operations() const {
  const std::lock_guard lock(mutex_);
  return streams_->operations_locked();
}

std::uint64_t StandinWorld::unregistered_copies() const {
  const std::lock_guard lock(mutex_);
  return unregistered_copies_;
}

std::vector<std::string> StandinWorld::violations() const {
  const std::lock_guard lock(mutex_);
  return streams_->violations_locked();
}

std::vector<std::string> StandinWorld::behind_waiters() const {
  const std::lock_guard lock(mutex_);
  return streams_->behind_waiters_locked();
}

std::vector<std::string> StandinWorld::blocked() const {
  const std::lock_guard lock(mutex_);
  return streams_->blocked_locked();
}

bool StandinWorld::is_stuck() const {
  const std::lock_guard lock(mutex_);
  return streams_->is_stuck_locked();
}

std::uint64_t StandinWorld::host_now_ns() const {
  const std::lock_guard lock(mutex_);
  return timeline_->host_now_ns();
}

std::uint64_t StandinWorld::device_end_ns() const {
  const std::lock_guard lock(mutex_);
  return timeline_->device_end_ns();
}

std::uint64_t StandinWorld::busy_ns(StandinEngine engine) const {
  const std::lock_guard lock(mutex_);
  return timeline_->busy_ns(engine);
}

void StandinWorld::advance_host_ns(std::uint64_t nanoseconds) {
  const std::lock_guard lock(mutex_);
  timeline_->advance_host_ns(nanoseconds);
}

void StandinWorld::host_reached_ns(std::uint64_t nanoseconds) {
  const std::lock_guard lock(mutex_);
  timeline_->host_reached_ns(nanoseconds);
}

StandinThread& StandinWorld::thread_locked() {
  thread_local StandinThread thread;
  if (thread.generation != generation_) {
    thread.contexts.clear();
    thread.capture_mode = cuda::kStreamCaptureModeGlobal;
    thread.generation = generation_;
  }
  return thread;
}

Result StandinWorld::begin(StandinCall call) {
  Lock lock(mutex_);
  const std::string_view name = name_of(call);
  StandinThread& thread = thread_locked();
  ++calls_[static_cast<std::size_t>(call)];
  thread.operation_failure = cuda::kSuccess;
  if (is_one_of(kNamesErrors, name)) return cuda::kSuccess;
  if (thread.is_in_host_function) {
    streams_->violation_locked(std::string(name) + " was called from a host function");
    return cuda::kErrorNotPermitted;
  }
  const Result injected = inject_locked(call, thread);
  if (streams_->context_error_locked() != cuda::kSuccess) streams_->wait_for_copies(lock);
  if (injected != cuda::kSuccess) return injected;
  if (is_one_of(kNeedsNoContext, name)) return cuda::kSuccess;
  if (streams_->context_error_locked() != cuda::kSuccess) return streams_->context_error_locked();
  if (thread.contexts.empty()) {
    streams_->violation_locked(std::string(name) + " was called without a current context");
    return cuda::kErrorInvalidContext;
  }
  if (!is_context_locked(thread.contexts.back())) {
    streams_->violation_locked(std::string(name) + " was called in a context that was released");
    return kErrorContextIsDestroyed;
  }
  if (is_one_of(kUnsafeInCapture, name) && !graphs_.allows_unsafe_call(thread.capture_mode))
    return cuda::kErrorStreamCaptureUnsupported;
  return cuda::kSuccess;
}

Result StandinWorld::inject_locked(StandinCall call, StandinThread& thread) {
  const std::string_view name = name_of(call);
  if (!failure_ || (!failure_->call.empty() && failure_->call != name)) return cuda::kSuccess;
  if (failure_->effect == StandinEffect::operation && !is_one_of(kAsksForOperation, name)) return cuda::kSuccess;
  ++matching_;
  const bool is_hit =
      failure_->effect == StandinEffect::sticky ? matching_ >= failure_->nth : matching_ == failure_->nth;
  if (!is_hit) return cuda::kSuccess;
  ++fired_;
  if (failure_->effect == StandinEffect::operation) {
    thread.operation_failure = failure_->result;
    return cuda::kSuccess;
  }
  if (failure_->effect == StandinEffect::context) streams_->lose_context_locked(failure_->result);
  return failure_->result;
}

int StandinWorld::look_up(const std::string& name, int version, void** function) {
  const std::lock_guard lock(mutex_);
  *function = nullptr;
  const auto found = entry_points().find(name);
  if (found == entry_points().end() || name == options_.missing_entry_point) return kSymbolNotFound;
  if (version > options_.driver_version) return kVersionNotSufficient;
  *function = found->second;
  return 0;
}

}  // namespace tp

tp::StandinDriver* tensorpager_standin_driver() { return &tp::StandinWorld::instance(); }

extern "C" TP_STANDIN_EXPORT tp::cuda::Result cuGetProcAddress_v2(const char* symbol, void** function, int version,
                                                                  std::uint64_t flags, int* query_result);

tp::cuda::Result cuGetProcAddress_v2(const char* symbol, void** function, int version, std::uint64_t flags,
                                     int* query_result) {
  if (symbol == nullptr || function == nullptr || flags != tp::cuda::kGetProcAddressLegacyStream)
    return tp::cuda::kErrorInvalidValue;
  const int result = tp::StandinWorld::instance().look_up(symbol, version, function);
  if (query_result != nullptr) *query_result = result;
  return tp::cuda::kSuccess;
}
