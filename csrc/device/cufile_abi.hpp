// SPDX-License-Identifier: Apache-2.0
// The part of cuFile's binary interface (libcufile.so.0, GPUDirect Storage) that we call: types, constants and
// signatures, so that everything builds without a CUDA toolkit. Where there is one, cufile_abi_check.cpp compares each
// line with its <cufile.h>. Names of entry points are the library's own.
#pragma once

#include <sys/types.h>

#include <cstddef>

#include "device/cuda_abi.hpp"

namespace tp::cufile {

inline constexpr int kSuccess = 0;
inline constexpr int kErrorDriverNotInitialized = 5001;
inline constexpr int kErrorDriverVersionMismatch = 5004;
inline constexpr int kErrorPlatformNotSupported = 5007;
inline constexpr int kErrorIoNotSupported = 5008;
inline constexpr int kErrorDeviceNotSupported = 5009;
inline constexpr int kErrorNvfsDriver = 5010;
inline constexpr int kErrorCudaDriver = 5011;
inline constexpr int kErrorCudaPointerInvalid = 5012;
inline constexpr int kErrorCudaMemoryTypeInvalid = 5013;
inline constexpr int kErrorCudaPointerRange = 5014;
inline constexpr int kErrorCudaContextMismatch = 5015;
inline constexpr int kErrorInvalidMappingSize = 5016;
inline constexpr int kErrorInvalidMappingRange = 5017;
inline constexpr int kErrorInvalidFileType = 5018;
inline constexpr int kErrorInvalidFileOpenFlag = 5019;
inline constexpr int kErrorDirectIoNotSet = 5020;
inline constexpr int kErrorInvalidValue = 5022;
inline constexpr int kErrorMemoryAlreadyRegistered = 5023;
inline constexpr int kErrorMemoryNotRegistered = 5024;
inline constexpr int kErrorPermissionDenied = 5025;
inline constexpr int kErrorDriverAlreadyOpen = 5026;
inline constexpr int kErrorHandleNotRegistered = 5027;
inline constexpr int kErrorHandleAlreadyRegistered = 5028;
inline constexpr int kErrorDeviceNotFound = 5029;
inline constexpr int kErrorInternal = 5030;
inline constexpr int kErrorNvfsSetup = 5033;
inline constexpr int kErrorIoDisabled = 5034;
inline constexpr int kErrorGpuMemoryPinningFailed = 5036;

// Bits of DriverProperties::nvfs.
inline constexpr unsigned kControlAllowCompatMode = 1u << 1;

inline constexpr int kHandleTypeDescriptor = 1;

// What most calls return, by value: an error of cuFile's, and CUDA's where the first is kErrorCudaDriver.
struct Status {
  int error = kSuccess;
  cuda::Result cuda_error = cuda::kSuccess;
};

using Handle = void*;

struct Descriptor {
  int type = kHandleTypeDescriptor;
  union {
    int descriptor;
    void* handle = nullptr;
  } file;
  const void* file_system_operations = nullptr;
};

struct DriverProperties {
  struct {
    unsigned major_version = 0;  // of nvidia-fs; both are 0 where it is not loaded
    unsigned minor_version = 0;
    std::size_t poll_threshold_kib = 0;
    std::size_t direct_io_max_kib = 0;
    unsigned status_flags = 0;  // a bit for each kind of storage that can be reached directly
    unsigned control_flags = 0;
  } nvfs;
  unsigned feature_flags = 0;
  unsigned device_cache_max_kib = 0;
  unsigned per_buffer_cache_kib = 0;
  unsigned device_pinned_memory_max_kib = 0;
  unsigned batch_io_max = 0;
  unsigned batch_io_timeout_max_ms = 0;
};

// X(entry point, parameters). All return Status.
#define TP_CUFILE_STATUS_ENTRY_POINTS(X)                                      \
  X(cuFileDriverOpen, ())                                                     \
  X(cuFileDriverGetProperties, (DriverProperties * properties))               \
  X(cuFileHandleRegister, (Handle * handle, Descriptor * descriptor))         \
  X(cuFileBufRegister, (const void* base, std::size_t size_bytes, int flags)) \
  X(cuFileBufDeregister, (const void* base))

// The rest. X(name, return type, parameters).
#define TP_CUFILE_OTHER_ENTRY_POINTS(X)                                                                      \
  X(cuFileHandleDeregister, void, (Handle handle))                                                           \
  X(cuFileRead, ssize_t,                                                                                     \
    (Handle handle, void* base, std::size_t size_bytes, off_t file_offset_bytes, off_t memory_offset_bytes)) \
  X(cuFileWrite, ssize_t,                                                                                    \
    (Handle handle, const void* base, std::size_t size_bytes, off_t file_offset_bytes, off_t memory_offset_bytes))

}  // namespace tp::cufile
