// SPDX-License-Identifier: Apache-2.0
#include "device/cufile.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <string_view>

#include "device/driver.hpp"

namespace tp {
namespace {

struct KnownError {
  int error;
  const char* name;
  int error_number;  // the nearest errno value
  const char* advice;
};
constexpr const char* kSeeLog = "cufile.log, in the working directory, says more";
constexpr std::array kKnownErrors = {
    KnownError{cufile::kErrorDriverNotInitialized, "CU_FILE_DRIVER_NOT_INITIALIZED", ENODEV,
               "nvidia-fs is not loaded: `modprobe nvidia-fs`, or set allow_compat_mode in cufile.json"},
    KnownError{cufile::kErrorDriverVersionMismatch, "CU_FILE_DRIVER_VERSION_MISMATCH", ENODEV,
               "nvidia-fs and libcufile are of different releases: install both from one CUDA release"},
    KnownError{cufile::kErrorPlatformNotSupported, "CU_FILE_PLATFORM_NOT_SUPPORTED", EOPNOTSUPP,
               "GPUDirect Storage does not run on this machine: `gdscheck -p` names the reason"},
    KnownError{
        cufile::kErrorIoNotSupported, "CU_FILE_IO_NOT_SUPPORTED", EOPNOTSUPP,
        "the file's file system is not one that GPUDirect Storage reaches: move the file to ext4 or XFS on NVMe, "
        "or set allow_compat_mode in cufile.json"},
    KnownError{cufile::kErrorDeviceNotSupported, "CU_FILE_DEVICE_NOT_SUPPORTED", EOPNOTSUPP,
               "this GPU has no GPUDirect Storage"},
    KnownError{cufile::kErrorNvfsDriver, "CU_FILE_NVFS_DRIVER_ERROR", EIO,
               "nvidia-fs refused: the kernel's log (`dmesg`) says more"},
    KnownError{cufile::kErrorCudaDriver, "CU_FILE_CUDA_DRIVER_ERROR", EIO,
               "the CUDA driver failed below cuFile: see the CUresult"},
    KnownError{cufile::kErrorCudaPointerInvalid, "CU_FILE_CUDA_POINTER_INVALID", EFAULT,
               "the address is not of memory that CUDA knows"},
    KnownError{cufile::kErrorCudaMemoryTypeInvalid, "CU_FILE_CUDA_MEMORY_TYPE_INVALID", EFAULT,
               "cuFile pins only memory of some kinds: memory of cuMemCreate must be made GPUDirect RDMA capable"},
    KnownError{cufile::kErrorCudaPointerRange, "CU_FILE_CUDA_POINTER_RANGE_ERROR", EFAULT,
               "the range leaves the allocation"},
    KnownError{cufile::kErrorCudaContextMismatch, "CU_FILE_CUDA_CONTEXT_MISMATCH", EINVAL,
               "the memory belongs to another CUDA context than the thread's"},
    KnownError{cufile::kErrorInvalidMappingSize, "CU_FILE_INVALID_MAPPING_SIZE", ENOMEM,
               "more memory than may be pinned: see max_device_pinned_mem_size_kb in cufile.json, and the size of BAR1 "
               "(`nvidia-smi -q`)"},
    KnownError{cufile::kErrorInvalidMappingRange, "CU_FILE_INVALID_MAPPING_RANGE", EFAULT,
               "the range leaves the memory that was registered"},
    KnownError{cufile::kErrorInvalidFileType, "CU_FILE_INVALID_FILE_TYPE", EINVAL,
               "it takes regular files and block devices alone"},
    KnownError{cufile::kErrorInvalidFileOpenFlag, "CU_FILE_INVALID_FILE_OPEN_FLAG", EINVAL,
               "the file was opened with a flag that cuFile refuses (O_APPEND, O_NOATIME, O_NOFOLLOW, O_TMPFILE)"},
    KnownError{cufile::kErrorDirectIoNotSet, "CU_FILE_DIO_NOT_SET", EINVAL,
               "before release 1.7 cuFile takes files opened with O_DIRECT alone: update it, or use direct I/O"},
    KnownError{cufile::kErrorInvalidValue, "CU_FILE_INVALID_VALUE", EINVAL, kSeeLog},
    KnownError{cufile::kErrorMemoryAlreadyRegistered, "CU_FILE_MEMORY_ALREADY_REGISTERED", EINVAL,
               "another user of cuFile in this process has registered it"},
    KnownError{cufile::kErrorMemoryNotRegistered, "CU_FILE_MEMORY_NOT_REGISTERED", EINVAL, kSeeLog},
    KnownError{cufile::kErrorPermissionDenied, "CU_FILE_PERMISSION_DENIED", EACCES,
               "no access to the file, or to /dev/nvidia-fs*: in a container, pass these devices in"},
    KnownError{cufile::kErrorDriverAlreadyOpen, "CU_FILE_DRIVER_ALREADY_OPEN", EINVAL, kSeeLog},
    KnownError{cufile::kErrorHandleNotRegistered, "CU_FILE_HANDLE_NOT_REGISTERED", EBADF, kSeeLog},
    KnownError{cufile::kErrorHandleAlreadyRegistered, "CU_FILE_HANDLE_ALREADY_REGISTERED", EINVAL,
               "another user of cuFile in this process has registered the descriptor"},
    KnownError{cufile::kErrorDeviceNotFound, "CU_FILE_DEVICE_NOT_FOUND", ENODEV, "there is no such GPU"},
    KnownError{cufile::kErrorInternal, "CU_FILE_INTERNAL_ERROR", EIO, kSeeLog},
    KnownError{cufile::kErrorNvfsSetup, "CU_FILE_NVFS_SETUP_ERROR", EIO, kSeeLog},
    KnownError{cufile::kErrorIoDisabled, "CU_FILE_IO_DISABLED", EOPNOTSUPP,
               "cufile.json turns GPUDirect Storage off for this file (fs.*, denylist)"},
    KnownError{cufile::kErrorGpuMemoryPinningFailed, "CU_FILE_GPU_MEMORY_PINNING_FAILED", ENOMEM,
               "the GPU's memory could not be pinned: BAR1 may be full (`nvidia-smi -q`)"},
};

const KnownError* find_known(int error) noexcept {
  const auto* found = std::find_if(kKnownErrors.begin(), kKnownErrors.end(),
                                   [error](const KnownError& known) { return known.error == error; });
  return found != kKnownErrors.end() ? found : nullptr;
}

// cuFile works on files and on memory: what is wrong with a file is another error to the user.
ErrorKind kind_of_call(std::string_view call) {
  return call == "cuFileHandleRegister" ? ErrorKind::io : ErrorKind::device;
}

bool is_set(const char* environment_variable) {
  const char* value = std::getenv(environment_variable);
  return value != nullptr && (std::string_view(value) == "true" || std::string_view(value) == "1");
}

}  // namespace

std::string describe_cufile(cufile::Status status) {
  const KnownError* known = find_known(status.error);
  std::string text =
      (known != nullptr ? known->name : "unknown error") + std::string(" (") + std::to_string(status.error) + ")";
  if (status.error == cufile::kErrorCudaDriver) text += ", CUresult " + std::to_string(status.cuda_error);
  return text + ": " + (known != nullptr ? known->advice : kSeeLog);
}

int errno_of_cufile(int error) noexcept {
  const KnownError* known = find_known(error);
  return known != nullptr ? known->error_number : EIO;
}

Error cufile_error(const char* call, cufile::Status status) {
  return Error(kind_of_call(call), std::string(call) + " failed: " + describe_cufile(status), status.error);
}

Cufile::Cufile(const std::string& library_path) : library_path_(library_path) {
  library_ = dlopen(library_path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library_ == nullptr) {
    const char* reason = dlerror();
    throw Error(ErrorKind::engine, "no cuFile: " + std::string(reason != nullptr ? reason : library_path) +
                                       ". Install GPUDirect Storage (the package nvidia-gds, or nvidia-cufile of pip)");
  }
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library_, name));
    if (function == nullptr) {
      throw Error(ErrorKind::engine, library_path + " has no " + name +
                                         ": it is not cuFile, or of a release before 1.0. Install that of CUDA 12.0 or "
                                         "newer");
    }
  };
#define TP_CUFILE_FIND(name, parameters) find(name.function_, #name);
  TP_CUFILE_STATUS_ENTRY_POINTS(TP_CUFILE_FIND)
#undef TP_CUFILE_FIND
#define TP_CUFILE_FIND(name, result, parameters) find(name, #name);
  TP_CUFILE_OTHER_ENTRY_POINTS(TP_CUFILE_FIND)
#undef TP_CUFILE_FIND
  close_counted_ = reinterpret_cast<Close>(dlsym(library_, "cuFileDriverClose_v2"));
  Close close_any = close_counted_;
  if (close_any == nullptr) find(close_any, "cuFileDriverClose");
  get_version_ = reinterpret_cast<GetVersion>(dlsym(library_, "cuFileGetVersion"));
}

const Cufile& Cufile::load(const std::string& library_path) {
  static std::mutex mutex;
  static auto* const loaded = new std::map<std::string, std::unique_ptr<Cufile>>;  // never destroyed, as libcuda
  const std::lock_guard lock(mutex);
  std::unique_ptr<Cufile>& library = (*loaded)[library_path];
  if (library == nullptr) library.reset(new Cufile(library_path));
  return *library;
}

const Cufile& Cufile::system() { return load(kCufileLibrary); }

std::string Cufile::version() const {
  int version = 0;
  if (get_version_ == nullptr || get_version_(&version).error != cufile::kSuccess) return "";
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

CufileSession::CufileSession(const Cufile& library) : library_(library) {
  const cufile::Status opened = library_.cuFileDriverOpen.result();
  opened_ = opened.error == cufile::kSuccess;
  if (!opened_ && opened.error != cufile::kErrorDriverAlreadyOpen)  // by another user of this process: as good
    throw Error(ErrorKind::engine, "cuFile can't start: cuFileDriverOpen failed: " + describe_cufile(opened),
                opened.error);
  const cufile::Status read = library_.cuFileDriverGetProperties.result(&properties_);
  if (read.error == cufile::kSuccess) return;
  close();
  throw Error(ErrorKind::engine, "cuFile can't start: cuFileDriverGetProperties failed: " + describe_cufile(read),
              read.error);
}

CufileSession::~CufileSession() { close(); }

void CufileSession::close() noexcept {
  if (opened_ && library_.close_counted_ != nullptr) library_.close_counted_();
  opened_ = false;
}

CufileFacts cufile_facts(const CufileSession& session, const std::string& statistics_path) {
  const auto& nvfs = session.properties().nvfs;
  const std::string version = session.library().version();
  const std::string library = "cuFile" + (version.empty() ? "" : " " + version);
  const auto staged = [&](const std::string& reason) {
    return CufileFacts{true, false, library + " works through host memory alone (compatibility mode): " + reason};
  };
  if (is_set("CUFILE_FORCE_COMPAT_MODE")) return staged("CUFILE_FORCE_COMPAT_MODE is set, unset it to change that");
  if (nvfs.major_version == 0 && nvfs.minor_version == 0)
    return staged("the kernel module nvidia-fs is not loaded (`modprobe nvidia-fs`)");
  if (access(statistics_path.c_str(), F_OK) != 0)
    return staged(statistics_path +
                  " is missing, so nvidia-fs is not there for this process (containers need it passed in)");
  if (nvfs.status_flags == 0)
    return staged("nvidia-fs supports no storage of this machine (`gdscheck -p` lists what it knows)");
  const std::string module =
      "nvidia-fs " + std::to_string(nvfs.major_version) + "." + std::to_string(nvfs.minor_version);
  const bool may_fall_back = (nvfs.control_flags & cufile::kControlAllowCompatMode) != 0;
  return {true, true,
          library + " with " + module + " reaches storage directly" +
              (may_fall_back ? "; files that it can't reach go through host memory (allow_compat_mode)"
                             : "; files that it can't reach are refused (allow_compat_mode is off)")};
}

CufileFacts probe_cufile(const std::string& library_path, const std::string& statistics_path) noexcept {
  try {
    const Cufile& library = Cufile::load(library_path);
    // Where CUDA has no driver, cuFile would only write to stderr and to a log in the working directory.
    if (library_path == kCufileLibrary) CudaDriver::system();
    const CufileSession session(library);
    return cufile_facts(session, statistics_path);
  } catch (const std::exception& error) {
    return {false, false, error.what()};
  }
}

}  // namespace tp
