// SPDX-License-Identifier: Apache-2.0
// Compares cuda_abi.hpp with the toolkit's <cuda.h>. Compiled where there is a toolkit, never linked.
#include <cuda.h>
#include <cudaTypedefs.h>

#include <cstddef>
#include <type_traits>

#include "device/cuda_abi.hpp"

namespace tp::cuda {
namespace {

#define TP_SAME(ours, theirs) static_assert(static_cast<long long>(ours) == static_cast<long long>(theirs))
TP_SAME(kSuccess, CUDA_SUCCESS);
TP_SAME(kErrorInvalidValue, CUDA_ERROR_INVALID_VALUE);
TP_SAME(kErrorOutOfMemory, CUDA_ERROR_OUT_OF_MEMORY);
TP_SAME(kErrorIllegalState, CUDA_ERROR_ILLEGAL_STATE);
TP_SAME(kErrorStreamCaptureUnsupported, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
TP_SAME(kErrorStreamCaptureInvalidated, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
TP_SAME(kErrorStreamCaptureMerge, CUDA_ERROR_STREAM_CAPTURE_MERGE);
TP_SAME(kErrorStreamCaptureUnmatched, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
TP_SAME(kErrorStreamCaptureUnjoined, CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
TP_SAME(kErrorStreamCaptureIsolation, CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
TP_SAME(kErrorStreamCaptureImplicit, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
TP_SAME(kErrorCapturedEvent, CUDA_ERROR_CAPTURED_EVENT);
TP_SAME(kErrorStreamCaptureWrongThread, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
TP_SAME(kStreamCaptureModeGlobal, CU_STREAM_CAPTURE_MODE_GLOBAL);
TP_SAME(kStreamCaptureModeThreadLocal, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
TP_SAME(kStreamCaptureModeRelaxed, CU_STREAM_CAPTURE_MODE_RELAXED);
TP_SAME(kStreamCaptureStatusNone, CU_STREAM_CAPTURE_STATUS_NONE);
TP_SAME(kStreamCaptureStatusActive, CU_STREAM_CAPTURE_STATUS_ACTIVE);
TP_SAME(kStreamCaptureStatusInvalidated, CU_STREAM_CAPTURE_STATUS_INVALIDATED);
TP_SAME(kStreamSetCaptureDependencies, CU_STREAM_SET_CAPTURE_DEPENDENCIES);
TP_SAME(kStreamWaitValueAtLeast, CU_STREAM_WAIT_VALUE_GEQ);
TP_SAME(kStreamWaitValueEqual, CU_STREAM_WAIT_VALUE_EQ);
TP_SAME(kStreamMemOpWaitValue32, CU_STREAM_MEM_OP_WAIT_VALUE_32);
TP_SAME(kStreamMemOpWriteValue32, CU_STREAM_MEM_OP_WRITE_VALUE_32);
TP_SAME(kErrorNotInitialized, CUDA_ERROR_NOT_INITIALIZED);
TP_SAME(kErrorDeinitialized, CUDA_ERROR_DEINITIALIZED);
TP_SAME(kErrorNoDevice, CUDA_ERROR_NO_DEVICE);
TP_SAME(kErrorInvalidDevice, CUDA_ERROR_INVALID_DEVICE);
TP_SAME(kErrorInvalidImage, CUDA_ERROR_INVALID_IMAGE);
TP_SAME(kErrorInvalidContext, CUDA_ERROR_INVALID_CONTEXT);
TP_SAME(kErrorMapFailed, CUDA_ERROR_MAP_FAILED);
TP_SAME(kErrorUnmapFailed, CUDA_ERROR_UNMAP_FAILED);
TP_SAME(kErrorEccUncorrectable, CUDA_ERROR_ECC_UNCORRECTABLE);
TP_SAME(kErrorInvalidHandle, CUDA_ERROR_INVALID_HANDLE);
TP_SAME(kErrorNotFound, CUDA_ERROR_NOT_FOUND);
TP_SAME(kErrorNotReady, CUDA_ERROR_NOT_READY);
TP_SAME(kErrorIllegalAddress, CUDA_ERROR_ILLEGAL_ADDRESS);
TP_SAME(kErrorLaunchFailed, CUDA_ERROR_LAUNCH_FAILED);
TP_SAME(kErrorNotPermitted, CUDA_ERROR_NOT_PERMITTED);
TP_SAME(kErrorNotSupported, CUDA_ERROR_NOT_SUPPORTED);
TP_SAME(kErrorUnknown, CUDA_ERROR_UNKNOWN);
TP_SAME(kAttributeMultiprocessorCount, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
TP_SAME(kAttributeAsyncEngineCount, CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT);
TP_SAME(kAttributeComputeCapabilityMajor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
TP_SAME(kAttributeComputeCapabilityMinor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
TP_SAME(kAttributeVirtualMemoryManagementSupported, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
TP_SAME(kAttributeHostNumaId, CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID);
TP_SAME(kStreamNonBlocking, CU_STREAM_NON_BLOCKING);
TP_SAME(kEventDisableTiming, CU_EVENT_DISABLE_TIMING);
TP_SAME(kHostRegisterPortable, CU_MEMHOSTREGISTER_PORTABLE);
TP_SAME(kHostRegisterDeviceMap, CU_MEMHOSTREGISTER_DEVICEMAP);
TP_SAME(kGetProcAddressLegacyStream, CU_GET_PROC_ADDRESS_LEGACY_STREAM);
TP_SAME(kAllocationTypePinned, CU_MEM_ALLOCATION_TYPE_PINNED);
TP_SAME(kLocationTypeDevice, CU_MEM_LOCATION_TYPE_DEVICE);
TP_SAME(kAccessReadWrite, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
TP_SAME(kGranularityMinimum, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
TP_SAME(kGranularityRecommended, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
#undef TP_SAME

static_assert(sizeof(MemLocation) == sizeof(CUmemLocation) && offsetof(MemLocation, id) == offsetof(CUmemLocation, id));
static_assert(sizeof(MemAccessDesc) == sizeof(CUmemAccessDesc) &&
              offsetof(MemAccessDesc, flags) == offsetof(CUmemAccessDesc, flags));
static_assert(sizeof(MemAllocationProp) == sizeof(CUmemAllocationProp) &&
              offsetof(MemAllocationProp, location) == offsetof(CUmemAllocationProp, location) &&
              offsetof(MemAllocationProp, win32_handle_meta_data) ==
                  offsetof(CUmemAllocationProp, win32HandleMetaData) &&
              offsetof(MemAllocationProp, alloc_flags) == offsetof(CUmemAllocationProp, allocFlags));
using TheirMemOp = CUstreamBatchMemOpParams;
static_assert(sizeof(StreamMemOp) == sizeof(TheirMemOp) &&
              offsetof(StreamMemOp, operation) == offsetof(TheirMemOp, operation) &&
              offsetof(StreamMemOp, address) == offsetof(TheirMemOp, waitValue.address) &&
              offsetof(StreamMemOp, address) == offsetof(TheirMemOp, writeValue.address) &&
              offsetof(StreamMemOp, value) == offsetof(TheirMemOp, waitValue.value) &&
              offsetof(StreamMemOp, value) == offsetof(TheirMemOp, writeValue.value) &&
              offsetof(StreamMemOp, flags) == offsetof(TheirMemOp, waitValue.flags) &&
              offsetof(StreamMemOp, flags) == offsetof(TheirMemOp, writeValue.flags) &&
              offsetof(StreamMemOp, alias) == offsetof(TheirMemOp, waitValue.alias));
static_assert(sizeof(BatchMemOpNodeParams) == sizeof(CUDA_BATCH_MEM_OP_NODE_PARAMS) &&
              offsetof(BatchMemOpNodeParams, context) == offsetof(CUDA_BATCH_MEM_OP_NODE_PARAMS, ctx) &&
              offsetof(BatchMemOpNodeParams, count) == offsetof(CUDA_BATCH_MEM_OP_NODE_PARAMS, count) &&
              offsetof(BatchMemOpNodeParams, operations) == offsetof(CUDA_BATCH_MEM_OP_NODE_PARAMS, paramArray) &&
              offsetof(BatchMemOpNodeParams, flags) == offsetof(CUDA_BATCH_MEM_OP_NODE_PARAMS, flags));

// Equal to the calling convention: pointers are pointers, integers (enumerations, handles) have equal sizes.
template <class Ours, class Theirs>
constexpr bool same_parameter() {
  if constexpr (std::is_floating_point_v<Theirs>) return std::is_same_v<Ours, Theirs>;
  return std::is_pointer_v<Ours> == std::is_pointer_v<Theirs> && sizeof(Ours) == sizeof(Theirs);
}
template <class... Ours, class... Theirs>
constexpr bool same_signature(Result (*)(Ours...), CUresult (*)(Theirs...)) {
  if constexpr (sizeof...(Ours) != sizeof...(Theirs))
    return false;
  else
    return (same_parameter<Ours, Theirs>() && ...);
}
// <cuda.h> renames entry points to their newest version by macros. Of ours, these changed after the version that
// kCudaApiVersion asks the driver for, and are compared with that one's type.
#define TP_TAG(name, parameters) struct name##Tag;
TP_CUDA_ENTRY_POINTS(TP_TAG)
#undef TP_TAG
template <class Tag, class Newest>
struct TheirSignature {
  using Type = Newest;
};
template <class Newest>
struct TheirSignature<cuStreamGetCaptureInfoTag, Newest> {
  using Type = PFN_cuStreamGetCaptureInfo_v11030;
};
template <class Newest>
struct TheirSignature<cuStreamUpdateCaptureDependenciesTag, Newest> {
  using Type = PFN_cuStreamUpdateCaptureDependencies_v11030;
};

#define TP_CHECK_SIGNATURE(name, parameters)                               \
  static_assert(same_signature(static_cast<Result(*) parameters>(nullptr), \
                               static_cast<TheirSignature<name##Tag, decltype(&::name)>::Type>(nullptr)));
TP_CUDA_ENTRY_POINTS(TP_CHECK_SIGNATURE)
#undef TP_CHECK_SIGNATURE

}  // namespace
}  // namespace tp::cuda
