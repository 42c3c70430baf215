// SPDX-License-Identifier: Apache-2.0
#include "device/driver.hpp"

#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>

namespace tp {
namespace {

constexpr const char* kSystemLibrary = "libcuda.so.1";
constexpr int kQuerySuccess = 0;
constexpr int kQueryVersionNotSufficient = 2;

using GetProcAddress = cuda::Result (*)(const char* symbol, void** function, int version, std::uint64_t flags,
                                        int* query_result);

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

bool context_is_lost(cuda::Result result) noexcept {
  switch (result) {
    case cuda::kErrorDeinitialized:
    case cuda::kErrorEccUncorrectable:
    case 220:  // NVLINK_UNCORRECTABLE
    case 226:  // CONTAINED
    case cuda::kErrorIllegalAddress:
    case 702:  // LAUNCH_TIMEOUT
    case 710:  // ASSERT
    case 714:  // HARDWARE_STACK_ERROR
    case 715:  // ILLEGAL_INSTRUCTION
    case 716:  // MISALIGNED_ADDRESS
    case 717:  // INVALID_ADDRESS_SPACE
    case 718:  // INVALID_PC
    case cuda::kErrorLaunchFailed:
    case 721:  // TENSOR_MEMORY_LEAK
    case 911:  // EXTERNAL_DEVICE
      return true;
    default: return false;
  }
}

CudaDriver::CudaDriver(const std::string& library_path) : library_path_(library_path) {
  library_ = dlopen(library_path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library_ == nullptr) {
    const char* reason = dlerror();
    throw Error(ErrorKind::engine, "no CUDA driver: " + std::string(reason != nullptr ? reason : library_path) +
                                       ". On a machine with an NVIDIA GPU, install its driver (12.0 or newer)");
  }
  auto* get_proc_address =
      reinterpret_cast<GetProcAddress>(dlsym(library_, "cuGetProcAddress_v2"));  // there since CUDA 12.0
  if (get_proc_address == nullptr)
    throw Error(ErrorKind::engine, library_path + " is older than CUDA 12.0; a driver of 12.0 or newer is needed");
  const auto find = [&](auto& entry) {
    void* function = nullptr;
    int query_result = kQuerySuccess;
    const cuda::Result result = get_proc_address(entry.name_, &function, cuda::kCudaApiVersion,
                                                 cuda::kGetProcAddressLegacyStream, &query_result);
    if (result != cuda::kSuccess || query_result != kQuerySuccess || function == nullptr) {
      throw Error(ErrorKind::engine, library_path + " has no " + entry.name_ + " at version " +
                                         version_text(cuda::kCudaApiVersion) +
                                         (query_result == kQueryVersionNotSufficient ? " (the driver is older)" : "") +
                                         ": CUresult " + std::to_string(result));
    }
    entry.function_ = reinterpret_cast<typename std::remove_reference_t<decltype(entry)>::Pointer>(function);
    entry.driver_ = this;
  };
#define TP_CUDA_FIND(name, parameters) find(name);
  TP_CUDA_ENTRY_POINTS(TP_CUDA_FIND)
#undef TP_CUDA_FIND
  const cuda::Result result = cuInit.result(0u);
  if (result != cuda::kSuccess) {
    // Here the driver is there and the device is not: another story than a failing call, and the same for a caller as
    // no driver at all.
    throw Error(ErrorKind::engine, "the CUDA driver can't start: " + std::string(error("cuInit", result).what()),
                result);
  }
  cuDriverGetVersion(&version_);
}

const CudaDriver& CudaDriver::load(const std::string& library_path) {
  static std::mutex mutex;
  static std::map<std::string, std::unique_ptr<CudaDriver>>* const loaded =
      new std::map<std::string, std::unique_ptr<CudaDriver>>;  // never destroyed: the driver outlives every static
  const std::lock_guard lock(mutex);
  std::unique_ptr<CudaDriver>& driver = (*loaded)[library_path];
  if (driver == nullptr) driver.reset(new CudaDriver(library_path));
  return *driver;
}

const CudaDriver& CudaDriver::system() { return load(kSystemLibrary); }

Error CudaDriver::error(const char* call, cuda::Result result) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (cuGetErrorName.result(result, &name) != cuda::kSuccess || name == nullptr) name = "unknown error";
  if (cuGetErrorString.result(result, &text) != cuda::kSuccess || text == nullptr) text = "no description";
  std::string message = std::string(call) + " failed: " + text + " (" + name + ", " + std::to_string(result) + ")";
  if (result == cuda::kErrorOutOfMemory) {
    return Error(ErrorKind::memory, message + "; give a smaller device budget or free memory of the device", result);
  }
  if (context_is_lost(result)) {
    message +=
        "; the CUDA context is lost for this process, often through an earlier kernel's fault. Host copies stay "
        "readable; start a new process to go on";
  }
  return Error(ErrorKind::device, message, result);
}

}  // namespace tp
