// SPDX-License-Identifier: Apache-2.0
// Compares cufile_abi.hpp with the toolkit's <cufile.h>. Compiled where there is one, never linked.
#include <cuda.h>
#include <cufile.h>

#include <cstddef>
#include <type_traits>

#include "device/cufile_abi.hpp"

namespace tp::cufile {
namespace {

#define TP_SAME(ours, theirs) static_assert(static_cast<long long>(ours) == static_cast<long long>(theirs))
TP_SAME(kSuccess, CU_FILE_SUCCESS);
TP_SAME(kErrorDriverNotInitialized, CU_FILE_DRIVER_NOT_INITIALIZED);
TP_SAME(kErrorDriverVersionMismatch, CU_FILE_DRIVER_VERSION_MISMATCH);
TP_SAME(kErrorPlatformNotSupported, CU_FILE_PLATFORM_NOT_SUPPORTED);
TP_SAME(kErrorIoNotSupported, CU_FILE_IO_NOT_SUPPORTED);
TP_SAME(kErrorDeviceNotSupported, CU_FILE_DEVICE_NOT_SUPPORTED);
TP_SAME(kErrorNvfsDriver, CU_FILE_NVFS_DRIVER_ERROR);
TP_SAME(kErrorCudaDriver, CU_FILE_CUDA_DRIVER_ERROR);
TP_SAME(kErrorCudaPointerInvalid, CU_FILE_CUDA_POINTER_INVALID);
TP_SAME(kErrorCudaMemoryTypeInvalid, CU_FILE_CUDA_MEMORY_TYPE_INVALID);
TP_SAME(kErrorCudaPointerRange, CU_FILE_CUDA_POINTER_RANGE_ERROR);
TP_SAME(kErrorCudaContextMismatch, CU_FILE_CUDA_CONTEXT_MISMATCH);
TP_SAME(kErrorInvalidMappingSize, CU_FILE_INVALID_MAPPING_SIZE);
TP_SAME(kErrorInvalidMappingRange, CU_FILE_INVALID_MAPPING_RANGE);
TP_SAME(kErrorInvalidFileType, CU_FILE_INVALID_FILE_TYPE);
TP_SAME(kErrorInvalidFileOpenFlag, CU_FILE_INVALID_FILE_OPEN_FLAG);
TP_SAME(kErrorDirectIoNotSet, CU_FILE_DIO_NOT_SET);
TP_SAME(kErrorInvalidValue, CU_FILE_INVALID_VALUE);
TP_SAME(kErrorMemoryAlreadyRegistered, CU_FILE_MEMORY_ALREADY_REGISTERED);
TP_SAME(kErrorMemoryNotRegistered, CU_FILE_MEMORY_NOT_REGISTERED);
TP_SAME(kErrorPermissionDenied, CU_FILE_PERMISSION_DENIED);
TP_SAME(kErrorDriverAlreadyOpen, CU_FILE_DRIVER_ALREADY_OPEN);
TP_SAME(kErrorHandleNotRegistered, CU_FILE_HANDLE_NOT_REGISTERED);
TP_SAME(kErrorHandleAlreadyRegistered, CU_FILE_HANDLE_ALREADY_REGISTERED);
TP_SAME(kErrorDeviceNotFound, CU_FILE_DEVICE_NOT_FOUND);
TP_SAME(kErrorInternal, CU_FILE_INTERNAL_ERROR);
TP_SAME(kErrorNvfsSetup, CU_FILE_NVFS_SETUP_ERROR);
TP_SAME(kErrorIoDisabled, CU_FILE_IO_DISABLED);
TP_SAME(kErrorGpuMemoryPinningFailed, CU_FILE_GPU_MEMORY_PINNING_FAILED);
TP_SAME(kControlAllowCompatMode, 1u << CU_FILE_ALLOW_COMPAT_MODE);
TP_SAME(kHandleTypeDescriptor, CU_FILE_HANDLE_TYPE_OPAQUE_FD);
#undef TP_SAME

#define TP_SAME_MEMBER(ours, our_member, theirs, their_member)                  \
  static_assert(offsetof(ours, our_member) == offsetof(theirs, their_member) && \
                sizeof(ours::our_member) == sizeof(theirs::their_member))
static_assert(sizeof(Status) == sizeof(CUfileError_t));
TP_SAME_MEMBER(Status, error, CUfileError_t, err);
TP_SAME_MEMBER(Status, cuda_error, CUfileError_t, cu_err);

static_assert(sizeof(Descriptor) == sizeof(CUfileDescr_t));
TP_SAME_MEMBER(Descriptor, type, CUfileDescr_t, type);
TP_SAME_MEMBER(Descriptor, file, CUfileDescr_t, handle);
TP_SAME_MEMBER(Descriptor, file_system_operations, CUfileDescr_t, fs_ops);

using OurNvfs = decltype(DriverProperties::nvfs);
using TheirNvfs = decltype(CUfileDrvProps_t::nvfs);
TP_SAME_MEMBER(OurNvfs, major_version, TheirNvfs, major_version);
TP_SAME_MEMBER(OurNvfs, minor_version, TheirNvfs, minor_version);
TP_SAME_MEMBER(OurNvfs, poll_threshold_kib, TheirNvfs, poll_thresh_size);
TP_SAME_MEMBER(OurNvfs, direct_io_max_kib, TheirNvfs, max_direct_io_size);
TP_SAME_MEMBER(OurNvfs, status_flags, TheirNvfs, dstatusflags);
TP_SAME_MEMBER(OurNvfs, control_flags, TheirNvfs, dcontrolflags);
static_assert(sizeof(DriverProperties) == sizeof(CUfileDrvProps_t));
TP_SAME_MEMBER(DriverProperties, nvfs, CUfileDrvProps_t, nvfs);
TP_SAME_MEMBER(DriverProperties, feature_flags, CUfileDrvProps_t, fflags);
TP_SAME_MEMBER(DriverProperties, device_cache_max_kib, CUfileDrvProps_t, max_device_cache_size);
TP_SAME_MEMBER(DriverProperties, per_buffer_cache_kib, CUfileDrvProps_t, per_buffer_cache_size);
TP_SAME_MEMBER(DriverProperties, device_pinned_memory_max_kib, CUfileDrvProps_t, max_device_pinned_mem_size);
TP_SAME_MEMBER(DriverProperties, batch_io_max, CUfileDrvProps_t, max_batch_io_size);
TP_SAME_MEMBER(DriverProperties, batch_io_timeout_max_ms, CUfileDrvProps_t, max_batch_io_timeout_msecs);
#undef TP_SAME_MEMBER

// Equal to the calling convention: pointers are pointers, integers have equal sizes. Where the result is a structure,
// its layout was compared above.
template <class Ours, class Theirs>
constexpr bool same_parameter() {
  return std::is_pointer_v<Ours> == std::is_pointer_v<Theirs> && sizeof(Ours) == sizeof(Theirs);
}
template <class Ours, class Theirs>
constexpr bool same_result() {
  if constexpr (std::is_same_v<Ours, Status>)
    return std::is_same_v<Theirs, CUfileError_t>;
  else
    return std::is_same_v<Ours, Theirs>;
}
template <class OurResult, class... Ours, class TheirResult, class... Theirs>
constexpr bool same_signature(OurResult (*)(Ours...), TheirResult (*)(Theirs...)) {
  if constexpr (sizeof...(Ours) != sizeof...(Theirs))
    return false;
  else
    return same_result<OurResult, TheirResult>() && (same_parameter<Ours, Theirs>() && ...);
}
#define TP_CHECK_OTHER(name, result, parameters) \
  static_assert(same_signature(static_cast<result(*) parameters>(nullptr), static_cast<decltype(&::name)>(nullptr)));
#define TP_CHECK_STATUS(name, parameters) TP_CHECK_OTHER(name, Status, parameters)
TP_CUFILE_STATUS_ENTRY_POINTS(TP_CHECK_STATUS)
TP_CUFILE_OTHER_ENTRY_POINTS(TP_CHECK_OTHER)
TP_CHECK_STATUS(cuFileDriverClose, ())  // which <cufile.h> renames to cuFileDriverClose_v2
TP_CHECK_STATUS(cuFileGetVersion, (int* version))
#undef TP_CHECK_STATUS
#undef TP_CHECK_OTHER

}  // namespace
}  // namespace tp::cufile
