// SPDX-License-Identifier: Apache-2.0
#include "device/cuda_device.hpp"

namespace tp {

CudaDevice::CudaDevice(const CudaDriver& driver, int ordinal) : driver_(driver) {
  facts_.ordinal = ordinal;
  int count = 0;
  driver_.cuDeviceGetCount(&count);
  if (ordinal < 0 || ordinal >= count) {
    throw Error(ErrorKind::engine, "there is no CUDA device " + std::to_string(ordinal) + ": the driver shows " +
                                       std::to_string(count) + " (see CUDA_VISIBLE_DEVICES)");
  }
  driver_.cuDeviceGet(&device_, ordinal);
  int mappable = 0;
  driver_.cuDeviceGetAttribute(&mappable, cuda::kAttributeVirtualMemoryManagementSupported, device_);
  if (mappable == 0) {
    throw Error(ErrorKind::engine, "CUDA device " + std::to_string(ordinal) +
                                       " has no virtual memory management, by which frames are put under addresses");
  }
  driver_.cuDevicePrimaryCtxRetain(&context_, device_);
  try {
    read_facts();
  } catch (...) {
    driver_.cuDevicePrimaryCtxRelease.result(device_);
    throw;
  }
}

CudaDevice::~CudaDevice() { driver_.cuDevicePrimaryCtxRelease.result(device_); }

void CudaDevice::read_facts() {
  const Current current(*this);
  char text[256] = {};
  driver_.cuDeviceGetName(text, static_cast<int>(sizeof text), device_);
  facts_.name = text;
  driver_.cuDeviceGetPCIBusId(text, static_cast<int>(sizeof text), device_);
  facts_.pci_bus_id = text;
  int major = 0, minor = 0;
  driver_.cuDeviceGetAttribute(&major, cuda::kAttributeComputeCapabilityMajor, device_);
  driver_.cuDeviceGetAttribute(&minor, cuda::kAttributeComputeCapabilityMinor, device_);
  facts_.compute_capability = 10 * major + minor;
  driver_.cuDeviceGetAttribute(&facts_.multiprocessor_count, cuda::kAttributeMultiprocessorCount, device_);
  driver_.cuDeviceGetAttribute(&facts_.copy_engine_count, cuda::kAttributeAsyncEngineCount, device_);
  // Drivers before 12.2 don't know this attribute.
  if (driver_.cuDeviceGetAttribute.result(&facts_.host_numa_node, cuda::kAttributeHostNumaId, device_) !=
      cuda::kSuccess) {
    facts_.host_numa_node = -1;
  }
  std::size_t total_bytes = 0;
  driver_.cuDeviceTotalMem(&total_bytes, device_);
  facts_.total_bytes = total_bytes;
  const cuda::MemAllocationProp prop = allocation_prop();
  driver_.cuMemGetAllocationGranularity(&facts_.granularity_bytes, &prop, cuda::kGranularityMinimum);
}

std::uint64_t CudaDevice::free_bytes() const {
  const Current current(*this);
  std::size_t free_bytes = 0, total_bytes = 0;
  driver_.cuMemGetInfo(&free_bytes, &total_bytes);
  return free_bytes;
}

cuda::MemAllocationProp CudaDevice::allocation_prop() const {
  cuda::MemAllocationProp prop;
  prop.location.id = facts_.ordinal;
  return prop;
}

cuda::MemAccessDesc CudaDevice::read_write_access() const {
  cuda::MemAccessDesc access;
  access.location.id = facts_.ordinal;
  return access;
}

cuda::Stream CudaDevice::make_stream() const {
  const Current current(*this);
  cuda::Stream stream = nullptr;
  driver_.cuStreamCreateWithPriority(&stream, cuda::kStreamNonBlocking, 0);
  return stream;
}

CudaDevice::Current::Current(const CudaDevice& device) noexcept : device_(device) {
  cuda::Context now = nullptr;
  if (device_.driver_.cuCtxGetCurrent.result(&now) == cuda::kSuccess && now == device_.context_) return;
  pushed_ = device_.driver_.cuCtxPushCurrent.result(device_.context_) == cuda::kSuccess;
}

CudaDevice::Current::~Current() {
  cuda::Context popped = nullptr;
  if (pushed_) device_.driver_.cuCtxPopCurrent.result(&popped);
}

CudaDevice::OutsideCapture::OutsideCapture(const CudaDevice& device) noexcept : device_(device) {
  exchanged_ = device_.driver_.cuThreadExchangeStreamCaptureMode.result(&mode_) == cuda::kSuccess;
}

CudaDevice::OutsideCapture::~OutsideCapture() {
  if (exchanged_) device_.driver_.cuThreadExchangeStreamCaptureMode.result(&mode_);
}

}  // namespace tp
