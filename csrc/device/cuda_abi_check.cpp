// SPDX-License-Identifier: Apache-2.0
// Compares cuda_abi.hpp with the toolkit's <cuda.h>. Compiled where there is a toolkit, never linked.
#include <cuda.h>

#include <cstddef>
#include <type_traits>

#include "device/cuda_abi.hpp"

namespace tp::cuda {
namespace {

#define TP_SAME(ours, theirs) static_assert(static_cast<long long>(ours) == static_cast<long long>(theirs))
TP_SAME(kSuccess, CUDA_SUCCESS);
TP_SAME(kErrorInvalidValue, CUDA_ERROR_INVALID_VALUE);
TP_SAME(kErrorOutOfMemory, CUDA_ERROR_OUT_OF_MEMORY);
TP_SAME(kErrorStreamCaptureImplicit, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
TP_SAME(kStreamCaptureModeRelaxed, CU_STREAM_CAPTURE_MODE_RELAXED);
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
// <cuda.h> renames some entry points to their newest version by macros, here too; those that changed after 12.0 are not
// among ours.
#define TP_CHECK_SIGNATURE(name, parameters) \
  static_assert(same_signature(static_cast<Result(*) parameters>(nullptr), static_cast<decltype(&::name)>(nullptr)));
TP_CUDA_ENTRY_POINTS(TP_CHECK_SIGNATURE)
#undef TP_CHECK_SIGNATURE

}  // namespace
}  // namespace tp::cuda
