// SPDX-License-Identifier: Apache-2.0
// The CUDA driver, loaded at run time. The only way to it: nothing else names a driver function or links against one.
//
// Each entry point is a member of its own name. Called like a function it checks the result and throws; .result() hands
// it out, for the two calls whose "not ready" is an answer and for destructors.
//
// Threads: any, once loaded; the driver's own rules hold (a thread needs a current context for most calls). Blocking:
// as the driver's call is; none of those we call waits for the device but the three ...Synchronize. Ownership: the
// library stays loaded until the process ends, since the driver does not survive being unloaded. Errors: load() throws
// Error(engine) with the reason. A call throws Error(memory) when the device is out of memory, else
//   Error(device), whose message names the call and the driver's own name for the error, and whose error_number() is
//   the CUresult. After an error for which context_is_lost() holds every later call fails alike; host memory stays
//   readable.
#pragma once

#include <string>
#include <utility>

#include "base/error.hpp"
#include "device/cuda_abi.hpp"

namespace tp {

class CudaDriver;

// Every error after which the context refuses all work until the process ends (CUDA driver API, "CUresult": "this
// leaves the process in an inconsistent state").
bool context_is_lost(cuda::Result result) noexcept;

template <class Signature>
class CudaEntryPoint;

template <class... Parameters>
class CudaEntryPoint<cuda::Result(Parameters...)> {
 public:
  explicit CudaEntryPoint(const char* name) noexcept : name_(name) {}

  template <class... Arguments>
  cuda::Result result(Arguments... arguments) const noexcept {
    return function_(arguments...);
  }
  template <class... Arguments>
  void operator()(Arguments... arguments) const {
    const cuda::Result result = function_(arguments...);
    if (result != cuda::kSuccess) fail(result);
  }
  const char* name() const noexcept { return name_; }

 private:
  friend class CudaDriver;
  using Pointer = cuda::Result (*)(Parameters...);
  [[noreturn]] void fail(cuda::Result result) const;

  const char* name_;
  Pointer function_ = nullptr;
  const CudaDriver* driver_ = nullptr;
};

class CudaDriver {
 public:
  // The driver of this machine, loaded and initialised by the first call; the same object every time.
  static const CudaDriver& system();
  // Another library with the same entry points; for tests. Never unloaded.
  static const CudaDriver& load(const std::string& library_path);

  CudaDriver(const CudaDriver&) = delete;
  CudaDriver& operator=(const CudaDriver&) = delete;

  int version() const noexcept { return version_; }  // e.g. 13000
  const std::string& library_path() const noexcept { return library_path_; }
  Error error(const char* call, cuda::Result result) const;

  using Result = cuda::Result;
  using Device = cuda::Device;
  using DevicePtr = cuda::DevicePtr;
  using AllocationHandle = cuda::AllocationHandle;
  using Context = cuda::Context;
  using Stream = cuda::Stream;
  using Event = cuda::Event;
  using Module = cuda::Module;
  using Function = cuda::Function;
  using Graph = cuda::Graph;
  using GraphNode = cuda::GraphNode;
  using GraphExec = cuda::GraphExec;
  using HostFunction = cuda::HostFunction;
  using MemAllocationProp = cuda::MemAllocationProp;
  using MemAccessDesc = cuda::MemAccessDesc;
  using BatchMemOpNodeParams = cuda::BatchMemOpNodeParams;
#define TP_CUDA_MEMBER(name, parameters) CudaEntryPoint<cuda::Result parameters> name{#name};
  TP_CUDA_ENTRY_POINTS(TP_CUDA_MEMBER)
#undef TP_CUDA_MEMBER

 private:
  explicit CudaDriver(const std::string& library_path);

  std::string library_path_;
  void* library_ = nullptr;
  int version_ = 0;
};

template <class... Parameters>
void CudaEntryPoint<cuda::Result(Parameters...)>::fail(cuda::Result result) const {
  throw driver_->error(name_, result);
}

}  // namespace tp
