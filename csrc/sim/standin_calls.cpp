// SPDX-License-Identifier: Apache-2.0
// The stand-in driver's entry points. What they all do first is in StandinWorld::begin().
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <string_view>
#include <utility>

#include "base/check.hpp"
#include "sim/standin_world.hpp"

namespace tp {
namespace {

using cuda::DevicePtr;
using cuda::Result;

constexpr const char* kDeviceName = "tensorpager stand-in";
constexpr unsigned kWaitFlagsMask = 7;
constexpr unsigned kWaitAtLeast = 0;
constexpr unsigned kWaitEqual = 1;
constexpr std::uint64_t kValueBytes = 4;

struct ErrorText {
  Result result;
  const char* name;
  const char* text;
};
constexpr ErrorText kErrorTexts[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {4, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {205, "CUDA_ERROR_MAP_FAILED", "mapping of buffer object failed"},
    {206, "CUDA_ERROR_UNMAP_FAILED", "unmapping of buffer object failed"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {709, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"},
    {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {800, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

const ErrorText* find_error(Result result) {
  const auto* found = std::find_if(std::begin(kErrorTexts), std::end(kErrorTexts),
                                   [=](const auto& each) { return each.result == result; });
  return found != std::end(kErrorTexts) ? found : nullptr;
}

Result copy_text(char* text, int size_bytes, const char* from) {
  if (text == nullptr || size_bytes <= static_cast<int>(std::strlen(from))) return cuda::kErrorInvalidValue;
  std::strcpy(text, from);
  return cuda::kSuccess;
}

cuda::Context context_of(int device) { return reinterpret_cast<cuda::Context>(std::uintptr_t{0x100} + device); }

int device_of(cuda::Context context) { return static_cast<int>(reinterpret_cast<std::uintptr_t>(context) - 0x100); }

std::uint32_t load(std::byte* memory) {
  return std::atomic_ref(*reinterpret_cast<std::uint32_t*>(memory)).load(std::memory_order_acquire);
}

void store(std::byte* memory, std::uint32_t value) {
  std::atomic_ref(*reinterpret_cast<std::uint32_t*>(memory)).store(value, std::memory_order_release);
}

bool value_holds(std::uint32_t now, std::uint32_t wanted, unsigned how) {
  return how == kWaitEqual ? now == wanted : static_cast<std::int32_t>(now - wanted) >= 0;
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

Result StandinWorld::cuInit(unsigned flags) {
  if (flags != 0) return cuda::kErrorInvalidValue;
  const Lock lock(mutex_);
  return options_.device_count > 0 ? cuda::kSuccess : cuda::kErrorNoDevice;
}

Result StandinWorld::cuDriverGetVersion(int* version) {
  const Lock lock(mutex_);
  *version = options_.driver_version;
  return cuda::kSuccess;
}

Result StandinWorld::cuGetErrorName(Result error, const char** name) {
  const ErrorText* found = find_error(error);
  *name = found != nullptr ? found->name : nullptr;
  return found != nullptr ? cuda::kSuccess : cuda::kErrorInvalidValue;
}

Result StandinWorld::cuGetErrorString(Result error, const char** text) {
  const ErrorText* found = find_error(error);
  *text = found != nullptr ? found->text : nullptr;
  return found != nullptr ? cuda::kSuccess : cuda::kErrorInvalidValue;
}

Result StandinWorld::cuDeviceGetCount(int* count) {
  const Lock lock(mutex_);
  *count = options_.device_count;
  return cuda::kSuccess;
}

Result StandinWorld::cuDeviceGet(cuda::Device* device, int ordinal) {
  const Lock lock(mutex_);
  if (!is_device(ordinal)) return cuda::kErrorInvalidDevice;
  *device = ordinal;
  return cuda::kSuccess;
}

Result StandinWorld::cuDeviceGetName(char* name, int size_bytes, cuda::Device device) {
  const Lock lock(mutex_);
  return is_device(device) ? copy_text(name, size_bytes, kDeviceName) : cuda::kErrorInvalidDevice;
}

Result StandinWorld::cuDeviceGetAttribute(int* value, int attribute, cuda::Device device) {
  const Lock lock(mutex_);
  if (!is_device(device)) return cuda::kErrorInvalidDevice;
  const std::map<int, int> usual = {
      {cuda::kAttributeMultiprocessorCount, 132},
      {cuda::kAttributeAsyncEngineCount, 2},
      {cuda::kAttributeComputeCapabilityMajor, 9},
      {cuda::kAttributeComputeCapabilityMinor, 0},
      {cuda::kAttributeVirtualMemoryManagementSupported, 1},
      {cuda::kAttributeHostNumaId, 0},
  };
  const auto set = options_.attributes.find(attribute);
  const auto found = set != options_.attributes.end() ? set : usual.find(attribute);
  if (found == usual.end()) return cuda::kErrorInvalidValue;
  *value = found->second;
  return cuda::kSuccess;
}

Result StandinWorld::cuDeviceTotalMem(std::size_t* bytes, cuda::Device device) {
  const Lock lock(mutex_);
  if (!is_device(device)) return cuda::kErrorInvalidDevice;
  *bytes = options_.device_memory_bytes;
  return cuda::kSuccess;
}

Result StandinWorld::cuDeviceGetPCIBusId(char* id, int size_bytes, cuda::Device device) {
  const Lock lock(mutex_);
  if (!is_device(device)) return cuda::kErrorInvalidDevice;
  char text[16];
  std::snprintf(text, sizeof text, "0000:%02X:00.0", static_cast<unsigned>(device + 1) & 0xffu);
  return copy_text(id, size_bytes, text);
}

bool StandinWorld::is_context_locked(cuda::Context context) const {
  const int device = device_of(context);
  return is_device(device) && contexts_[static_cast<std::size_t>(device)] > 0;
}

int StandinWorld::current_device_locked() { return device_of(thread_locked().contexts.back()); }

Result StandinWorld::cuDevicePrimaryCtxRetain(cuda::Context* context, cuda::Device device) {
  const Lock lock(mutex_);
  if (!is_device(device)) return cuda::kErrorInvalidDevice;
  ++contexts_[static_cast<std::size_t>(device)];
  *context = context_of(device);
  return cuda::kSuccess;
}

Result StandinWorld::cuDevicePrimaryCtxRelease(cuda::Device device) {
  const Lock lock(mutex_);
  if (!is_device(device)) return cuda::kErrorInvalidDevice;
  std::size_t& retained = contexts_[static_cast<std::size_t>(device)];
  if (retained == 0) return cuda::kErrorInvalidContext;
  --retained;
  return cuda::kSuccess;
}

Result StandinWorld::cuCtxSetCurrent(cuda::Context context) {
  const Lock lock(mutex_);
  std::vector<cuda::Context>& contexts = thread_locked().contexts;
  if (context != nullptr && !is_context_locked(context)) return cuda::kErrorInvalidContext;
  if (!contexts.empty()) contexts.pop_back();
  if (context != nullptr) contexts.push_back(context);
  return cuda::kSuccess;
}

Result StandinWorld::cuCtxGetCurrent(cuda::Context* context) {
  const Lock lock(mutex_);
  const std::vector<cuda::Context>& contexts = thread_locked().contexts;
  *context = contexts.empty() ? nullptr : contexts.back();
  return cuda::kSuccess;
}

Result StandinWorld::cuCtxPushCurrent(cuda::Context context) {
  const Lock lock(mutex_);
  if (!is_context_locked(context)) return cuda::kErrorInvalidContext;
  thread_locked().contexts.push_back(context);
  return cuda::kSuccess;
}

Result StandinWorld::cuCtxPopCurrent(cuda::Context* context) {
  const Lock lock(mutex_);
  std::vector<cuda::Context>& contexts = thread_locked().contexts;
  if (contexts.empty()) return cuda::kErrorInvalidContext;
  if (context != nullptr) *context = contexts.back();
  contexts.pop_back();
  return cuda::kSuccess;
}

Result StandinWorld::cuMemGetInfo(std::size_t* free_bytes, std::size_t* total_bytes) {
  const Lock lock(mutex_);
  return memory_->info(current_device_locked(), free_bytes, total_bytes);
}

Result StandinWorld::cuMemGetAllocationGranularity(std::size_t* bytes, const cuda::MemAllocationProp* prop, int) {
  const Lock lock(mutex_);
  if (prop == nullptr || prop->type != cuda::kAllocationTypePinned || !is_device(prop->location.id))
    return cuda::kErrorInvalidValue;
  *bytes = kGranularityBytes;
  return cuda::kSuccess;
}

// The address that is wanted is a hint, which a driver may leave alone; this one always does.
Result StandinWorld::cuMemAddressReserve(DevicePtr* address, std::size_t size_bytes, std::size_t alignment_bytes,
                                         DevicePtr, unsigned long long flags) {
  const Lock lock(mutex_);
  return flags == 0 ? memory_->reserve(address, size_bytes, alignment_bytes) : cuda::kErrorInvalidValue;
}

Result StandinWorld::cuMemAddressFree(DevicePtr address, std::size_t size_bytes) {
  const Lock lock(mutex_);
  return memory_->free_reservation(address, size_bytes);
}

Result StandinWorld::cuMemCreate(cuda::AllocationHandle* handle, std::size_t size_bytes,
                                 const cuda::MemAllocationProp* prop, unsigned long long flags) {
  const Lock lock(mutex_);
  if (flags != 0 || prop == nullptr || prop->type != cuda::kAllocationTypePinned) return cuda::kErrorInvalidValue;
  if (prop->location.type != cuda::kLocationTypeDevice || !is_device(prop->location.id))
    return cuda::kErrorInvalidDevice;
  return memory_->create(handle, size_bytes, prop->location.id);
}

Result StandinWorld::cuMemRelease(cuda::AllocationHandle handle) {
  const Lock lock(mutex_);
  return memory_->release(handle);
}

// The offset is there for later versions of CUDA: "must be zero".
Result StandinWorld::cuMemMap(DevicePtr address, std::size_t size_bytes, std::size_t offset_bytes,
                              cuda::AllocationHandle handle, unsigned long long flags) {
  const Lock lock(mutex_);
  if (offset_bytes != 0 || flags != 0) return cuda::kErrorInvalidValue;
  return memory_->map(address, size_bytes, handle);
}

void StandinWorld::warn_of_use_locked(const char* call, DevicePtr address, std::size_t size_bytes) {
  if (streams_->is_touched_locked(address, size_bytes))
    streams_->violation_locked(std::string(call) + " of a range that a running operation uses");
}

Result StandinWorld::cuMemUnmap(DevicePtr address, std::size_t size_bytes) {
  const Lock lock(mutex_);
  warn_of_use_locked("cuMemUnmap", address, size_bytes);
  return memory_->unmap(address, size_bytes);
}

Result StandinWorld::cuMemSetAccess(DevicePtr address, std::size_t size_bytes, const cuda::MemAccessDesc* access,
                                    std::size_t count) {
  const Lock lock(mutex_);
  if (access == nullptr || count != 1 || access->location.type != cuda::kLocationTypeDevice ||
      !is_device(access->location.id))
    return cuda::kErrorInvalidValue;
  return memory_->set_access(address, size_bytes, access->flags);
}

Result StandinWorld::cuMemAlloc(DevicePtr* address, std::size_t size_bytes) {
  const Lock lock(mutex_);
  return memory_->allocate(address, size_bytes, current_device_locked());
}

Result StandinWorld::cuMemFree(DevicePtr address) {
  const Lock lock(mutex_);
  if (address == 0) return cuda::kSuccess;
  warn_of_use_locked("cuMemFree", address, 1);
  return memory_->free_allocation(address);
}

Result StandinWorld::cuMemHostRegister(void* memory, std::size_t size_bytes, unsigned) {
  const Lock lock(mutex_);
  return memory_->register_host(memory, size_bytes);
}

Result StandinWorld::cuMemHostUnregister(void* memory) {
  const Lock lock(mutex_);
  return memory_->unregister_host(memory);
}

Result StandinWorld::cuMemHostGetDevicePointer(DevicePtr* address, void* memory, unsigned flags) {
  const Lock lock(mutex_);
  if (flags != 0 || memory_->host_memory(memory, 1) != StandinHostMemory::registered) return cuda::kErrorInvalidValue;
  *address = static_cast<DevicePtr>(reinterpret_cast<std::uintptr_t>(memory));
  return cuda::kSuccess;
}

StandinOperationPointer StandinWorld::operation_locked(const char* call) {
  auto operation = std::make_shared<StandinOperation>();
  operation->call = call;
  operation->failure = thread_locked().operation_failure;
  return operation;
}

Result StandinWorld::copy_to_host_or_device(const char* call, StandinEngine engine, DevicePtr address,
                                            std::byte* host_memory, std::size_t size_bytes, cuda::Stream handle) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  if (stream == nullptr) return cuda::kErrorInvalidHandle;
  if (size_bytes == 0) return cuda::kSuccess;
  const StandinHostMemory kind = memory_->host_memory(host_memory, size_bytes);
  if (kind == StandinHostMemory::partly_registered) return cuda::kErrorInvalidValue;
  if (kind == StandinHostMemory::unregistered) ++unregistered_copies_;
  const StandinOperationPointer operation = operation_locked(call);
  operation->engine = engine;
  operation->size_bytes = size_bytes;
  const bool to_device = engine == StandinEngine::host_to_device;
  operation->body = [=, this](StandinOperation& self) -> Result {
    StandinStreams& streams = *streams_;
    if (kind == StandinHostMemory::registered) {
      const Lock again(mutex_);
      if (memory_->host_memory(host_memory, size_bytes) != kind)
        streams.violation_locked(std::string(self.call) + " ran after its host memory was unregistered");
    }
    const auto poison = [&](std::byte* memory, std::size_t, std::size_t size) { streams.fill(memory, kPoison, size); };
    if (streams.poisons_destinations()) {
      if (!to_device) poison(host_memory, 0, size_bytes);
      if (to_device && !streams.touch(self, address, size_bytes, true, poison)) return cuda::kErrorIllegalAddress;
    }
    const auto piece = [&](std::size_t begin, std::size_t size) {
      return streams.touch(self, address + begin, size, to_device,
                           [&](std::byte* memory, std::size_t offset, std::size_t bytes) {
                             std::byte* host = host_memory + begin + offset;
                             streams.move(to_device ? memory : host, to_device ? host : memory, bytes);
                           });
    };
    return streams.in_pieces(*stream, self, size_bytes, piece) ? cuda::kSuccess : cuda::kErrorIllegalAddress;
  };
  streams_->enqueue_locked(stream, operation);
  return cuda::kSuccess;
}

Result StandinWorld::cuMemcpyHtoDAsync(DevicePtr destination, const void* source, std::size_t size_bytes,
                                       cuda::Stream stream) {
  auto* host_memory = static_cast<std::byte*>(const_cast<void*>(source));  // read alone
  return copy_to_host_or_device("cuMemcpyHtoDAsync", StandinEngine::host_to_device, destination, host_memory,
                                size_bytes, stream);
}

Result StandinWorld::cuMemcpyDtoHAsync(void* destination, DevicePtr source, std::size_t size_bytes,
                                       cuda::Stream stream) {
  return copy_to_host_or_device("cuMemcpyDtoHAsync", StandinEngine::device_to_host, source,
                                static_cast<std::byte*>(destination), size_bytes, stream);
}

Result StandinWorld::cuMemcpyDtoDAsync(DevicePtr destination, DevicePtr source, std::size_t size_bytes,
                                       cuda::Stream handle) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  if (stream == nullptr) return cuda::kErrorInvalidHandle;
  const StandinOperationPointer operation = operation_locked("cuMemcpyDtoDAsync");
  operation->engine = StandinEngine::device;
  operation->size_bytes = size_bytes;
  operation->body = [=, this](StandinOperation& self) -> Result {
    StandinStreams& streams = *streams_;
    const auto piece = [&](std::size_t begin, std::size_t size) {
      bool is_mapped = true;
      const auto from = [&](std::byte* source_memory, std::size_t offset, std::size_t source_bytes) {
        const auto to = [&](std::byte* memory, std::size_t inner, std::size_t bytes) {
          streams.move(memory, source_memory + inner, bytes);
        };
        is_mapped = is_mapped && streams.touch(self, destination + begin + offset, source_bytes, true, to);
      };
      return streams.touch(self, source + begin, size, false, from) && is_mapped;
    };
    return streams.in_pieces(*stream, self, size_bytes, piece) ? cuda::kSuccess : cuda::kErrorIllegalAddress;
  };
  streams_->enqueue_locked(stream, operation);
  return cuda::kSuccess;
}

Result StandinWorld::cuMemsetD8Async(DevicePtr destination, unsigned char value, std::size_t size_bytes,
                                     cuda::Stream handle) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  if (stream == nullptr) return cuda::kErrorInvalidHandle;
  const StandinOperationPointer operation = operation_locked("cuMemsetD8Async");
  operation->engine = StandinEngine::device;
  operation->size_bytes = size_bytes;
  operation->body = [=, this](StandinOperation& self) -> Result {
    const auto piece = [&](std::size_t begin, std::size_t size) {
      return streams_->touch(
          self, destination + begin, size, true,
          [&](std::byte* memory, std::size_t, std::size_t bytes) { streams_->fill(memory, std::byte{value}, bytes); });
    };
    return streams_->in_pieces(*stream, self, size_bytes, piece) ? cuda::kSuccess : cuda::kErrorIllegalAddress;
  };
  streams_->enqueue_locked(stream, operation);
  return cuda::kSuccess;
}

Result StandinWorld::cuStreamCreateWithPriority(cuda::Stream* stream, unsigned flags, int) {
  const Lock lock(mutex_);
  if ((flags & ~cuda::kStreamNonBlocking) != 0) return cuda::kErrorInvalidValue;
  *stream = streams_->create_locked(flags);
  return cuda::kSuccess;
}

Result StandinWorld::cuStreamDestroy(cuda::Stream stream) {
  const Lock lock(mutex_);
  return streams_->destroy_locked(stream) ? cuda::kSuccess : cuda::kErrorInvalidHandle;
}

Result StandinWorld::cuStreamQuery(cuda::Stream handle) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  if (stream == nullptr) return cuda::kErrorInvalidHandle;
  for (const StandinOperationPointer& operation : streams_->pending_locked(stream)) {
    if (!timeline_->query(*operation)) return cuda::kErrorNotReady;
  }
  return cuda::kSuccess;
}

Result StandinWorld::cuStreamSynchronize(cuda::Stream handle) {
  Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  if (stream == nullptr) return cuda::kErrorInvalidHandle;
  return streams_->wait(lock, streams_->pending_locked(stream));
}

Result StandinWorld::cuCtxSynchronize() {
  Lock lock(mutex_);
  return streams_->wait(lock, streams_->all_pending_locked());
}

Result StandinWorld::cuStreamWaitEvent(cuda::Stream handle, cuda::Event event, unsigned flags) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  const auto found = events_.find(event);
  if (stream == nullptr || found == events_.end()) return cuda::kErrorInvalidHandle;
  if (flags != 0) return cuda::kErrorInvalidValue;
  const StandinOperationPointer operation = operation_locked("cuStreamWaitEvent");
  if (found->second.record != nullptr) operation->after.push_back(found->second.record);
  streams_->enqueue_locked(stream, operation);
  return cuda::kSuccess;
}

Result StandinWorld::cuStreamWaitValue32(cuda::Stream handle, DevicePtr address, std::uint32_t value, unsigned flags) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  if (stream == nullptr) return cuda::kErrorInvalidHandle;
  const unsigned how = flags & kWaitFlagsMask;
  if (address % kValueBytes != 0) return cuda::kErrorInvalidValue;
  if (how != kWaitAtLeast && how != kWaitEqual) return cuda::kErrorNotSupported;
  const StandinOperationPointer operation = operation_locked("cuStreamWaitValue32");
  operation->is_gate = true;
  operation->body = [=, this](StandinOperation& self) -> Result {
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
  streams_->enqueue_locked(stream, operation);
  return cuda::kSuccess;
}

Result StandinWorld::cuStreamWriteValue32(cuda::Stream handle, DevicePtr address, std::uint32_t value, unsigned flags) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  if (stream == nullptr) return cuda::kErrorInvalidHandle;
  if (address % kValueBytes != 0 || flags > 1) return cuda::kErrorInvalidValue;
  const StandinOperationPointer operation = operation_locked("cuStreamWriteValue32");
  operation->body = [=, this](StandinOperation& self) -> Result {
    {
      const Lock again(mutex_);  // before the value is there for a gate to see
      value_written_ns_[address] = self.end_ns;
    }
    const bool is_mapped = streams_->touch(self, address, kValueBytes, true,
                                           [&](std::byte* memory, std::size_t, std::size_t) { store(memory, value); });
    return is_mapped ? cuda::kSuccess : cuda::kErrorIllegalAddress;
  };
  streams_->enqueue_locked(stream, operation);
  return cuda::kSuccess;
}

Result StandinWorld::cuThreadExchangeStreamCaptureMode(int* mode) {
  if (mode == nullptr || *mode < 0 || *mode > cuda::kStreamCaptureModeRelaxed) return cuda::kErrorInvalidValue;
  thread_local int current = 0;
  std::swap(*mode, current);
  return cuda::kSuccess;
}

Result StandinWorld::cuStreamIsCapturing(cuda::Stream handle, int* status) {
  const Lock lock(mutex_);
  if (streams_->find_locked(handle) == nullptr) return cuda::kErrorInvalidHandle;
  *status = 0;
  return cuda::kSuccess;
}

Result StandinWorld::cuLaunchHostFunc(cuda::Stream handle, cuda::HostFunction function, void* user_data) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  if (stream == nullptr) return cuda::kErrorInvalidHandle;
  if (function == nullptr) return cuda::kErrorInvalidValue;
  const StandinOperationPointer operation = operation_locked("cuLaunchHostFunc");
  operation->body = [=, this](StandinOperation& self) -> Result {
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
  streams_->enqueue_locked(stream, operation);
  return cuda::kSuccess;
}

Result StandinWorld::cuEventCreate(cuda::Event* event, unsigned flags) {
  const Lock lock(mutex_);
  *event = new_handle_locked<cuda::Event>();
  events_[*event] = {flags, nullptr};
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
  const StandinOperationPointer operation = operation_locked("cuEventRecord");
  operation->body = [this](StandinOperation& self) -> Result {
    streams_->pause_to_end(self);
    return cuda::kSuccess;
  };
  found->second.record = operation;
  streams_->enqueue_locked(stream, operation);
  return cuda::kSuccess;
}

Result StandinWorld::cuEventQuery(cuda::Event event) {
  const Lock lock(mutex_);
  const auto found = events_.find(event);
  if (found == events_.end()) return cuda::kErrorInvalidHandle;
  const StandinOperationPointer& record = found->second.record;
  return record == nullptr || timeline_->query(*record) ? cuda::kSuccess : cuda::kErrorNotReady;
}

Result StandinWorld::cuEventSynchronize(cuda::Event event) {
  Lock lock(mutex_);
  const auto found = events_.find(event);
  if (found == events_.end()) return cuda::kErrorInvalidHandle;
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
  StandinStreamPointer stream = streams_->find_locked(handle);
  if (found == functions_.end() || stream == nullptr) return cuda::kErrorInvalidHandle;
  const std::shared_ptr<const StandinKernel> kernel = kernels_.at(found->second.kernel);
  if (extra != nullptr || (parameters == nullptr && !kernel->parameter_bytes.empty())) return cuda::kErrorInvalidValue;
  if (std::uint64_t{grid_x} * grid_y * grid_z == 0 || std::uint64_t{block_x} * block_y * block_z == 0)
    return cuda::kErrorInvalidValue;
  const auto launch = std::make_shared<Launch>();
  launch->grid_x = grid_x, launch->grid_y = grid_y, launch->grid_z = grid_z;
  launch->block_x = block_x, launch->block_y = block_y, launch->block_z = block_z;
  launch->shared_bytes = shared_bytes;
  for (std::size_t at = 0; at < kernel->parameter_bytes.size(); ++at) {
    const auto* begin = static_cast<const std::byte*>(parameters[at]);
    launch->parameters.emplace_back(begin, begin + kernel->parameter_bytes[at]);
  }
  lock.unlock();  // the callback is the test's
  const std::uint64_t duration_ns = kernel->duration_ns ? kernel->duration_ns(*launch) : 0;
  lock.lock();
  const StandinOperationPointer operation = operation_locked("cuLaunchKernel");
  operation->engine = StandinEngine::kernel;
  operation->duration_ns = duration_ns;
  operation->body = [=, this](StandinOperation& self) -> Result {
    launch->streams = streams_.get();
    launch->operation = &self;
    const bool ran = streams_->in_pieces(*stream, self, 1, [&](std::size_t, std::size_t) {
      kernel->run(*launch);
      return !launch->has_faulted;
    });
    return ran ? cuda::kSuccess : cuda::kErrorIllegalAddress;
  };
  streams_->enqueue_locked(stream, operation);
  return cuda::kSuccess;
}

}  // namespace tp
