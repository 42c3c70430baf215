// SPDX-License-Identifier: Apache-2.0
// The stand-in driver's entry points of streams, events, values, host functions and kernels.
#include <atomic>
#include <cstring>
#include <utility>

#include "sim/standin_world.hpp"

namespace tp {
namespace {

using cuda::DevicePtr;
using cuda::Result;

constexpr unsigned kWaitFlagsMask = 7;
constexpr std::uint64_t kValueBytes = 4;

std::uint32_t load(std::byte* memory) {
  return std::atomic_ref(*reinterpret_cast<std::uint32_t*>(memory)).load(std::memory_order_acquire);
}

void store(std::byte* memory, std::uint32_t value) {
  std::atomic_ref(*reinterpret_cast<std::uint32_t*>(memory)).store(value, std::memory_order_release);
}

bool value_holds(std::uint32_t now, std::uint32_t wanted, unsigned how) {
  return how == cuda::kStreamWaitValueEqual ? now == wanted : static_cast<std::int32_t>(now - wanted) >= 0;
}

class Launch final : public StandinLaunch {
 public:
  bool read(DevicePtr address, void* destination, std::size_t size_bytes) override {
    auto* to = static_cast<std::byte*>(destination);
    const bool is_mapped = touch(
        address, size_bytes, false,
        [&](std::byte* memory, std::size_t offset, std::size_t size) { streams->move(to + offset, memory, size); });
    if (!is_mapped) std::memset(to, static_cast<int>(StandinDriver::kPoison), size_bytes);
    return is_mapped;
  }
  bool write(DevicePtr address, const void* source, std::size_t size_bytes) override {
    const auto* from = static_cast<const std::byte*>(source);
    return touch(address, size_bytes, true, [&](std::byte* memory, std::size_t offset, std::size_t size) {
      streams->move(memory, from + offset, size);
    });
  }

  StandinStreams* streams = nullptr;
  StandinOperation* operation = nullptr;  // null before it runs
  bool has_faulted = false;

 private:
  bool touch(DevicePtr address, std::size_t size_bytes, bool writes, const StandinStreams::Touch& each) {
    if (operation == nullptr || has_faulted) return false;
    has_faulted = !streams->touch(*operation, address, size_bytes, writes, each);
    return !has_faulted;
  }
};

}  // namespace

Result StandinWorld::cuStreamCreateWithPriority(cuda::Stream* stream, unsigned flags, int) {
  const Lock lock(mutex_);
  if ((flags & ~cuda::kStreamNonBlocking) != 0) return cuda::kErrorInvalidValue;
  *stream = streams_->create_locked(flags);
  return cuda::kSuccess;
}

Result StandinWorld::cuStreamDestroy(cuda::Stream handle) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  if (stream == nullptr) return cuda::kErrorInvalidHandle;
  if (const Result refused = graphs_.refuse_in_capture(stream); refused != cuda::kSuccess) return refused;
  return streams_->destroy_locked(handle) ? cuda::kSuccess : cuda::kErrorInvalidHandle;
}

Result StandinWorld::cuStreamQuery(cuda::Stream handle) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  if (stream == nullptr) return cuda::kErrorInvalidHandle;
  if (const Result refused = graphs_.refuse_in_capture(stream); refused != cuda::kSuccess) return refused;
  for (const StandinOperationPointer& operation : streams_->pending_locked(stream)) {
    if (!timeline_->query(*operation)) return cuda::kErrorNotReady;
  }
  return cuda::kSuccess;
}

Result StandinWorld::cuStreamSynchronize(cuda::Stream handle) {
  Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  if (stream == nullptr) return cuda::kErrorInvalidHandle;
  if (const Result refused = graphs_.refuse_in_capture(stream); refused != cuda::kSuccess) return refused;
  return streams_->wait(lock, streams_->pending_locked(stream));
}

Result StandinWorld::cuCtxSynchronize() {
  Lock lock(mutex_);
  if (graphs_.invalidate_all()) return cuda::kErrorStreamCaptureUnsupported;
  return streams_->wait(lock, streams_->all_pending_locked());
}

Result StandinWorld::cuStreamWaitEvent(cuda::Stream handle, cuda::Event event, unsigned flags) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  const auto found = events_.find(event);
  if (stream == nullptr || found == events_.end()) return cuda::kErrorInvalidHandle;
  if (flags != 0) return cuda::kErrorInvalidValue;
  if (const auto captured = graphs_.wait(stream, found->second.point, stream == streams_->legacy())) return *captured;
  const StandinOperationPointer operation = operation_locked("cuStreamWaitEvent");
  if (found->second.record != nullptr) operation->after.push_back(found->second.record);
  return submit_locked(stream, operation);
}

Result StandinWorld::make_wait_value_locked(const char* call, DevicePtr address, std::uint32_t value, unsigned flags,
                                            StandinOperation& operation) {
  const unsigned how = flags & kWaitFlagsMask;
  if (address % kValueBytes != 0) return cuda::kErrorInvalidValue;
  if (!options_.has_value_operations) return cuda::kErrorNotSupported;
  if (how != cuda::kStreamWaitValueAtLeast && how != cuda::kStreamWaitValueEqual) return cuda::kErrorNotSupported;
  operation.call = call;
  operation.is_gate = true;
  operation.body = [=, this](StandinOperation& self, StandinStream&) -> Result {
    bool is_mapped = true;
    const bool was_met = streams_->wait_for_value([&] {
      std::vector<StandinPiece> pieces;
      is_mapped = memory_->find(address, kValueBytes, false, pieces);
      if (!is_mapped) return true;
      if (!value_holds(load(pieces.front().memory), value, how)) return false;
      const auto written = value_written_ns_.find(address);
      timeline_->opened(self, written != value_written_ns_.end() ? std::optional(written->second) : std::nullopt);
      return true;
    });
    return was_met && !is_mapped ? cuda::kErrorIllegalAddress : cuda::kSuccess;
  };
  return cuda::kSuccess;
}

Result StandinWorld::make_write_value_locked(const char* call, DevicePtr address, std::uint32_t value, unsigned flags,
                                             StandinOperation& operation) {
  if (address % kValueBytes != 0 || flags > 1) return cuda::kErrorInvalidValue;
  if (!options_.has_value_operations) return cuda::kErrorNotSupported;
  operation.call = call;
  operation.body = [=, this](StandinOperation& self, StandinStream&) -> Result {
    {
      const Lock again(mutex_);  // before the value is there for a gate to see
      value_written_ns_[address] = self.end_ns;
    }
    const bool is_mapped = streams_->touch(self, address, kValueBytes, true,
                                           [&](std::byte* memory, std::size_t, std::size_t) { store(memory, value); });
    return is_mapped ? cuda::kSuccess : cuda::kErrorIllegalAddress;
  };
  return cuda::kSuccess;
}

Result StandinWorld::cuStreamWaitValue32(cuda::Stream handle, DevicePtr address, std::uint32_t value, unsigned flags) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  if (stream == nullptr) return cuda::kErrorInvalidHandle;
  const StandinOperationPointer operation = operation_locked("cuStreamWaitValue32");
  const Result made = make_wait_value_locked("cuStreamWaitValue32", address, value, flags, *operation);
  return made == cuda::kSuccess ? submit_locked(stream, operation) : made;
}

Result StandinWorld::cuStreamWriteValue32(cuda::Stream handle, DevicePtr address, std::uint32_t value, unsigned flags) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  if (stream == nullptr) return cuda::kErrorInvalidHandle;
  const StandinOperationPointer operation = operation_locked("cuStreamWriteValue32");
  const Result made = make_write_value_locked("cuStreamWriteValue32", address, value, flags, *operation);
  return made == cuda::kSuccess ? submit_locked(stream, operation) : made;
}

Result StandinWorld::cuLaunchHostFunc(cuda::Stream handle, cuda::HostFunction function, void* user_data) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  if (stream == nullptr) return cuda::kErrorInvalidHandle;
  if (function == nullptr) return cuda::kErrorInvalidValue;
  const StandinOperationPointer operation = operation_locked("cuLaunchHostFunc");
  operation->body = [=, this](StandinOperation& self, StandinStream&) -> Result {
    streams_->pause_to_end(self);
    StandinThread* thread = nullptr;
    {
      const Lock again(mutex_);
      timeline_->observed(self);  // what it tells another thread, the host knows from now on
      thread = &thread_locked();
    }
    thread->is_in_host_function = true;
    function(user_data);
    thread->is_in_host_function = false;
    return cuda::kSuccess;
  };
  return submit_locked(stream, operation);
}

Result StandinWorld::cuEventCreate(cuda::Event* event, unsigned flags) {
  const Lock lock(mutex_);
  *event = new_handle_locked<cuda::Event>();
  events_[*event] = {.flags = flags, .record = nullptr, .point = {}};
  return cuda::kSuccess;
}

Result StandinWorld::cuEventDestroy(cuda::Event event) {
  const Lock lock(mutex_);
  return events_.erase(event) != 0 ? cuda::kSuccess : cuda::kErrorInvalidHandle;
}

Result StandinWorld::cuEventRecord(cuda::Event event, cuda::Stream handle) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  const auto found = events_.find(event);
  if (stream == nullptr || found == events_.end()) return cuda::kErrorInvalidHandle;
  if (const auto point = graphs_.record(stream)) {
    if (point->capture->is_invalidated) return cuda::kErrorStreamCaptureInvalidated;
    found->second.point = *point;
    return cuda::kSuccess;
  }
  const StandinOperationPointer operation = operation_locked("cuEventRecord");
  operation->body = [this](StandinOperation& self, StandinStream&) -> Result {
    streams_->pause_to_end(self);
    return cuda::kSuccess;
  };
  const Result submitted = submit_locked(stream, operation);
  if (submitted == cuda::kSuccess) found->second = {found->second.flags, operation, {}};
  return submitted;
}

Result StandinWorld::cuEventQuery(cuda::Event event) {
  const Lock lock(mutex_);
  const auto found = events_.find(event);
  if (found == events_.end()) return cuda::kErrorInvalidHandle;
  if (found->second.point.capture != nullptr) return cuda::kErrorCapturedEvent;
  const StandinOperationPointer& record = found->second.record;
  return record == nullptr || timeline_->query(*record) ? cuda::kSuccess : cuda::kErrorNotReady;
}

Result StandinWorld::cuEventSynchronize(cuda::Event event) {
  Lock lock(mutex_);
  const auto found = events_.find(event);
  if (found == events_.end()) return cuda::kErrorInvalidHandle;
  if (found->second.point.capture != nullptr) return cuda::kErrorCapturedEvent;
  const StandinOperationPointer record = found->second.record;
  return record == nullptr ? cuda::kSuccess : streams_->wait(lock, {record});
}

Result StandinWorld::cuEventElapsedTime(float* milliseconds, cuda::Event begin, cuda::Event end) {
  const Lock lock(mutex_);
  for (const cuda::Event event : {begin, end}) {
    const auto found = events_.find(event);
    if (found == events_.end() || found->second.record == nullptr ||
        (found->second.flags & cuda::kEventDisableTiming) != 0)
      return cuda::kErrorInvalidHandle;
  }
  const StandinOperation& first = *events_[begin].record;
  const StandinOperation& last = *events_[end].record;
  if (!first.is_done || !last.is_done) return cuda::kErrorNotReady;
  *milliseconds = static_cast<float>((static_cast<double>(last.end_ns) - static_cast<double>(first.end_ns)) / 1e6);
  return cuda::kSuccess;
}

Result StandinWorld::cuModuleLoadData(cuda::Module* module, const void* image) {
  const Lock lock(mutex_);
  if (image == nullptr) return cuda::kErrorInvalidValue;
  // As a string, so that a shorter image of another kind is not read beyond its end.
  if (std::strncmp(static_cast<const char*>(image), kStandinImage, sizeof kStandinImage) != 0)
    return cuda::kErrorInvalidImage;
  *module = new_handle_locked<cuda::Module>();
  modules_[*module] = true;
  return cuda::kSuccess;
}

Result StandinWorld::cuModuleUnload(cuda::Module module) {
  const Lock lock(mutex_);
  if (modules_.erase(module) == 0) return cuda::kErrorInvalidHandle;
  std::erase_if(functions_, [=](const auto& each) { return each.second.module == module; });
  return cuda::kSuccess;
}

Result StandinWorld::cuModuleGetFunction(cuda::Function* function, cuda::Module module, const char* name) {
  const Lock lock(mutex_);
  if (!modules_.contains(module)) return cuda::kErrorInvalidHandle;
  if (name == nullptr || !kernels_.contains(name)) return cuda::kErrorNotFound;
  *function = new_handle_locked<cuda::Function>();
  functions_[*function] = {module, name};
  return cuda::kSuccess;
}

Result StandinWorld::cuLaunchKernel(cuda::Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                    unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                                    cuda::Stream handle, void** parameters, void** extra) {
  Lock lock(mutex_);
  const auto found = functions_.find(function);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  if (found == functions_.end() || stream == nullptr) return cuda::kErrorInvalidHandle;
  const std::shared_ptr<const StandinKernel> kernel = kernels_.at(found->second.kernel);
  if (extra != nullptr || (parameters == nullptr && !kernel->parameter_bytes.empty())) return cuda::kErrorInvalidValue;
  if (std::uint64_t{grid_x} * grid_y * grid_z == 0 || std::uint64_t{block_x} * block_y * block_z == 0)
    return cuda::kErrorInvalidValue;
  std::vector<std::vector<std::byte>> values;
  for (std::size_t at = 0; at < kernel->parameter_bytes.size(); ++at) {
    const auto* begin = static_cast<const std::byte*>(parameters[at]);
    values.emplace_back(begin, begin + kernel->parameter_bytes[at]);
  }
  const auto fill = [=](Launch& launch) {
    launch.grid_x = grid_x, launch.grid_y = grid_y, launch.grid_z = grid_z;
    launch.block_x = block_x, launch.block_y = block_y, launch.block_z = block_z;
    launch.shared_bytes = shared_bytes;
    launch.parameters = values;
  };
  Launch described;
  fill(described);
  lock.unlock();  // the callback is the test's
  const std::uint64_t duration_ns = kernel->duration_ns ? kernel->duration_ns(described) : 0;
  lock.lock();
  const StandinOperationPointer operation = operation_locked("cuLaunchKernel");
  operation->engine = StandinEngine::kernel;
  operation->duration_ns = duration_ns;
  operation->body = [=, this](StandinOperation& self, StandinStream& on) -> Result {
    Launch launch;
    fill(launch);
    launch.streams = streams_.get();
    launch.operation = &self;
    const bool ran = streams_->in_pieces(on, self, 1, [&](std::size_t, std::size_t) {
      kernel->run(launch);
      return !launch.has_faulted;
    });
    return ran ? cuda::kSuccess : cuda::kErrorIllegalAddress;
  };
  return submit_locked(stream, operation);
}

}  // namespace tp
