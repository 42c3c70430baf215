// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA driver's binary interface that we call: types, constants and signatures as CUDA 12.0 has them,
// so that everything builds without a CUDA toolkit. Where there is one, cuda_abi_check.cpp compares each line with its
// <cuda.h>.
//
// Names are the driver's own. Entry points are asked for at the version of kCudaApiVersion, for which the driver hands
// out the signatures below whatever its own version is.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tp::cuda {

inline constexpr int kCudaApiVersion = 12000;

using Result = int;
using Device = int;
using DevicePtr = unsigned long long;
using AllocationHandle = unsigned long long;
using Context = struct ContextTag*;
using Stream = struct StreamTag*;
using Event = struct EventTag*;
using Module = struct ModuleTag*;
using Function = struct FunctionTag*;
using Graph = struct GraphTag*;
using GraphNode = struct GraphNodeTag*;
using GraphExec = struct GraphExecTag*;
using HostFunction = void (*)(void* user_data);

inline constexpr Result kSuccess = 0;
inline constexpr Result kErrorInvalidValue = 1;
inline constexpr Result kErrorOutOfMemory = 2;
inline constexpr Result kErrorNotInitialized = 3;
inline constexpr Result kErrorDeinitialized = 4;
inline constexpr Result kErrorNoDevice = 100;
inline constexpr Result kErrorInvalidDevice = 101;
inline constexpr Result kErrorInvalidImage = 200;
inline constexpr Result kErrorInvalidContext = 201;
inline constexpr Result kErrorMapFailed = 205;
inline constexpr Result kErrorUnmapFailed = 206;
inline constexpr Result kErrorEccUncorrectable = 214;
inline constexpr Result kErrorInvalidHandle = 400;
inline constexpr Result kErrorIllegalState = 401;
inline constexpr Result kErrorNotFound = 500;
inline constexpr Result kErrorNotReady = 600;
inline constexpr Result kErrorIllegalAddress = 700;
inline constexpr Result kErrorLaunchFailed = 719;
inline constexpr Result kErrorNotPermitted = 800;
inline constexpr Result kErrorNotSupported = 801;
inline constexpr Result kErrorStreamCaptureUnsupported = 900;
inline constexpr Result kErrorStreamCaptureInvalidated = 901;
inline constexpr Result kErrorStreamCaptureMerge = 902;
inline constexpr Result kErrorStreamCaptureUnmatched = 903;
inline constexpr Result kErrorStreamCaptureUnjoined = 904;
inline constexpr Result kErrorStreamCaptureIsolation = 905;
inline constexpr Result kErrorStreamCaptureImplicit = 906;
inline constexpr Result kErrorCapturedEvent = 907;
inline constexpr Result kErrorStreamCaptureWrongThread = 908;
inline constexpr Result kErrorUnknown = 999;
inline constexpr int kStreamCaptureModeGlobal = 0;
inline constexpr int kStreamCaptureModeThreadLocal = 1;
inline constexpr int kStreamCaptureModeRelaxed = 2;
inline constexpr int kStreamCaptureStatusNone = 0;
inline constexpr int kStreamCaptureStatusActive = 1;
inline constexpr int kStreamCaptureStatusInvalidated = 2;
inline constexpr unsigned kStreamSetCaptureDependencies = 1;

inline constexpr int kAttributeMultiprocessorCount = 16;
inline constexpr int kAttributeAsyncEngineCount = 40;
inline constexpr int kAttributeComputeCapabilityMajor = 75;
inline constexpr int kAttributeComputeCapabilityMinor = 76;
inline constexpr int kAttributeVirtualMemoryManagementSupported = 102;
inline constexpr int kAttributeHostNumaId = 134;

inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kEventDisableTiming = 2;
inline constexpr unsigned kStreamWaitValueAtLeast = 0;  // int32(now - value) >= 0
inline constexpr unsigned kStreamWaitValueEqual = 1;
inline constexpr int kStreamMemOpWaitValue32 = 1;
inline constexpr int kStreamMemOpWriteValue32 = 2;
inline constexpr std::size_t kStreamMemOpsMax = 255;  // in one batch
inline constexpr unsigned kHostRegisterPortable = 1;
inline constexpr unsigned kHostRegisterDeviceMap = 2;
inline constexpr std::uint64_t kGetProcAddressLegacyStream = 1;
inline constexpr int kAllocationTypePinned = 1;
inline constexpr int kLocationTypeDevice = 1;
inline constexpr int kAccessReadWrite = 3;
inline constexpr int kGranularityMinimum = 0;
inline constexpr int kGranularityRecommended = 1;

struct MemLocation {
  int type = kLocationTypeDevice;
  int id = 0;
};

struct MemAllocationProp {
  int type = kAllocationTypePinned;
  int requested_handle_types = 0;
  MemLocation location;
  void* win32_handle_meta_data = nullptr;
  struct {
    unsigned char compression_type = 0;
    unsigned char gpu_direct_rdma_capable = 0;
    unsigned short usage = 0;
    unsigned char reserved[4] = {};
  } alloc_flags;
};

struct MemAccessDesc {
  MemLocation location;
  int flags = kAccessReadWrite;
};

// A wait for a value, or a write of one: the two have equal layouts, which is all of the driver's union that we use.
struct StreamMemOp {
  int operation = 0;
  DevicePtr address = 0;
  std::uint64_t value = 0;  // 32-bit operations take the lower half
  unsigned flags = 0;
  DevicePtr alias = 0;  // the driver's own
  std::uint64_t reserved = 0;
};

struct BatchMemOpNodeParams {
  Context context = nullptr;
  unsigned count = 0;
  StreamMemOp* operations = nullptr;
  unsigned flags = 0;
};

// X(entry point, parameters). All return Result. Of those that changed after 12.0, cuda_abi_check.cpp has a list.
#define TP_CUDA_ENTRY_POINTS(X)                                                                                       \
  X(cuInit, (unsigned flags))                                                                                         \
  X(cuDriverGetVersion, (int* version))                                                                               \
  X(cuGetErrorName, (Result error, const char** name))                                                                \
  X(cuGetErrorString, (Result error, const char** text))                                                              \
  X(cuDeviceGetCount, (int* count))                                                                                   \
  X(cuDeviceGet, (Device * device, int ordinal))                                                                      \
  X(cuDeviceGetName, (char* name, int size_bytes, Device device))                                                     \
  X(cuDeviceGetAttribute, (int* value, int attribute, Device device))                                                 \
  X(cuDeviceTotalMem, (std::size_t* bytes, Device device))                                                            \
  X(cuDeviceGetPCIBusId, (char* id, int size_bytes, Device device))                                                   \
  X(cuDevicePrimaryCtxRetain, (Context * context, Device device))                                                     \
  X(cuDevicePrimaryCtxRelease, (Device device))                                                                       \
  X(cuCtxSetCurrent, (Context context))                                                                               \
  X(cuCtxGetCurrent, (Context * context))                                                                             \
  X(cuCtxPushCurrent, (Context context))                                                                              \
  X(cuCtxPopCurrent, (Context * context))                                                                             \
  X(cuCtxSynchronize, ())                                                                                             \
  X(cuMemGetInfo, (std::size_t* free_bytes, std::size_t* total_bytes))                                                \
  X(cuMemGetAllocationGranularity, (std::size_t* bytes, const MemAllocationProp* prop, int option))                   \
  X(cuMemAddressReserve, (DevicePtr * address, std::size_t size_bytes, std::size_t alignment_bytes, DevicePtr wanted, \
                          unsigned long long flags))                                                                  \
  X(cuMemAddressFree, (DevicePtr address, std::size_t size_bytes))                                                    \
  X(cuMemCreate,                                                                                                      \
    (AllocationHandle * handle, std::size_t size_bytes, const MemAllocationProp* prop, unsigned long long flags))     \
  X(cuMemRelease, (AllocationHandle handle))                                                                          \
  X(cuMemMap, (DevicePtr address, std::size_t size_bytes, std::size_t offset_bytes, AllocationHandle handle,          \
               unsigned long long flags))                                                                             \
  X(cuMemUnmap, (DevicePtr address, std::size_t size_bytes))                                                          \
  X(cuMemSetAccess, (DevicePtr address, std::size_t size_bytes, const MemAccessDesc* access, std::size_t count))      \
  X(cuMemAlloc, (DevicePtr * address, std::size_t size_bytes))                                                        \
  X(cuMemFree, (DevicePtr address))                                                                                   \
  X(cuMemHostRegister, (void* memory, std::size_t size_bytes, unsigned flags))                                        \
  X(cuMemHostUnregister, (void* memory))                                                                              \
  X(cuMemHostGetDevicePointer, (DevicePtr * address, void* memory, unsigned flags))                                   \
  X(cuMemcpyHtoDAsync, (DevicePtr destination, const void* source, std::size_t size_bytes, Stream stream))            \
  X(cuMemcpyDtoHAsync, (void* destination, DevicePtr source, std::size_t size_bytes, Stream stream))                  \
  X(cuMemcpyDtoDAsync, (DevicePtr destination, DevicePtr source, std::size_t size_bytes, Stream stream))              \
  X(cuMemsetD8Async, (DevicePtr destination, unsigned char value, std::size_t size_bytes, Stream stream))             \
  X(cuStreamCreateWithPriority, (Stream * stream, unsigned flags, int priority))                                      \
  X(cuStreamDestroy, (Stream stream))                                                                                 \
  X(cuStreamQuery, (Stream stream))                                                                                   \
  X(cuStreamSynchronize, (Stream stream))                                                                             \
  X(cuStreamWaitEvent, (Stream stream, Event event, unsigned flags))                                                  \
  X(cuStreamWaitValue32, (Stream stream, DevicePtr address, std::uint32_t value, unsigned flags))                     \
  X(cuStreamWriteValue32, (Stream stream, DevicePtr address, std::uint32_t value, unsigned flags))                    \
  X(cuStreamBeginCapture, (Stream stream, int mode))                                                                  \
  X(cuStreamEndCapture, (Stream stream, Graph * graph))                                                               \
  X(cuStreamGetCaptureInfo, (Stream stream, int* status, std::uint64_t* id, Graph* graph,                             \
                             const GraphNode** dependencies, std::size_t* dependency_count))                          \
  X(cuStreamUpdateCaptureDependencies,                                                                                \
    (Stream stream, GraphNode * dependencies, std::size_t dependency_count, unsigned flags))                          \
  X(cuGraphAddBatchMemOpNode, (GraphNode * node, Graph graph, const GraphNode* dependencies,                          \
                               std::size_t dependency_count, const BatchMemOpNodeParams* params))                     \
  X(cuGraphInstantiateWithFlags, (GraphExec * exec, Graph graph, unsigned long long flags))                           \
  X(cuGraphLaunch, (GraphExec exec, Stream stream))                                                                   \
  X(cuGraphExecDestroy, (GraphExec exec))                                                                             \
  X(cuGraphDestroy, (Graph graph))                                                                                    \
  X(cuThreadExchangeStreamCaptureMode, (int* mode))                                                                   \
  X(cuStreamIsCapturing, (Stream stream, int* status))                                                                \
  X(cuLaunchHostFunc, (Stream stream, HostFunction function, void* user_data))                                        \
  X(cuEventCreate, (Event * event, unsigned flags))                                                                   \
  X(cuEventDestroy, (Event event))                                                                                    \
  X(cuEventRecord, (Event event, Stream stream))                                                                      \
  X(cuEventQuery, (Event event))                                                                                      \
  X(cuEventSynchronize, (Event event))                                                                                \
  X(cuEventElapsedTime, (float* milliseconds, Event begin, Event end))                                                \
  X(cuModuleLoadData, (Module * module, const void* image))                                                           \
  X(cuModuleUnload, (Module module))                                                                                  \
  X(cuModuleGetFunction, (Function * function, Module module, const char* name))                                      \
  X(cuLaunchKernel,                                                                                                   \
    (Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,        \
     unsigned block_z, unsigned shared_bytes, Stream stream, void** parameters, void** extra))

}  // namespace tp::cuda
