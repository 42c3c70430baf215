// SPDX-License-Identifier: Apache-2.0
// The stand-in driver's entry points. What they all do first is in StandinWorld::begin().
#include <algorithm>
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
    {401, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {709, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"},
    {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {800, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {902, "CUDA_ERROR_STREAM_CAPTURE_MERGE", "operation would result in a merge of separate capture sequences"},
    {903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream as it began"},
    {904, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"},
    {905, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"},
    {906, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", "operation would make the legacy stream depend on a capturing stream"},
    {907, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"},
    {908, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "capture was not ended by the thread that began it"},
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
  Lock lock(mutex_);
  if (offset_bytes != 0 || flags != 0) return cuda::kErrorInvalidValue;
  wait_before_mapping(lock);
  return memory_->map(address, size_bytes, handle);
}

void StandinWorld::warn_of_use_locked(const char* call, DevicePtr address, std::size_t size_bytes) {
  if (streams_->is_touched_locked(address, size_bytes))
    streams_->violation_locked(std::string(call) + " of a range that a running operation uses");
}

void StandinWorld::wait_before_mapping(Lock& lock) {
  if (options_.mapping_waits) streams_->wait(lock, streams_->all_pending_locked());
}

Result StandinWorld::cuMemUnmap(DevicePtr address, std::size_t size_bytes) {
  Lock lock(mutex_);
  wait_before_mapping(lock);
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
  operation->body = [=, this](StandinOperation& self, StandinStream& on) -> Result {
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
    return streams.in_pieces(on, self, size_bytes, piece) ? cuda::kSuccess : cuda::kErrorIllegalAddress;
  };
  return submit_locked(stream, operation);
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
  operation->body = [=, this](StandinOperation& self, StandinStream& on) -> Result {
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
    return streams.in_pieces(on, self, size_bytes, piece) ? cuda::kSuccess : cuda::kErrorIllegalAddress;
  };
  return submit_locked(stream, operation);
}

Result StandinWorld::cuMemsetD8Async(DevicePtr destination, unsigned char value, std::size_t size_bytes,
                                     cuda::Stream handle) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  if (stream == nullptr) return cuda::kErrorInvalidHandle;
  const StandinOperationPointer operation = operation_locked("cuMemsetD8Async");
  operation->engine = StandinEngine::device;
  operation->size_bytes = size_bytes;
  operation->body = [=, this](StandinOperation& self, StandinStream& on) -> Result {
    const auto piece = [&](std::size_t begin, std::size_t size) {
      return streams_->touch(
          self, destination + begin, size, true,
          [&](std::byte* memory, std::size_t, std::size_t bytes) { streams_->fill(memory, std::byte{value}, bytes); });
    };
    return streams_->in_pieces(on, self, size_bytes, piece) ? cuda::kSuccess : cuda::kErrorIllegalAddress;
  };
  return submit_locked(stream, operation);
}

}  // namespace tp
