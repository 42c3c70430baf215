// SPDX-License-Identifier: Apache-2.0
#include "device/copy_queue.hpp"

namespace tp {
namespace {

cuda::DevicePtr device_pointer(const std::byte* address) { return reinterpret_cast<cuda::DevicePtr>(address); }

}  // namespace

CopyQueue::CopyQueue(std::shared_ptr<const CudaDevice> device)
    : device_(device), to_device_(device->make_stream()), arrivals_(device), departures_(device) {
  try {
    to_host_ = device_->make_stream();
  } catch (...) {
    device_->driver().cuStreamDestroy.result(to_device_);
    throw;
  }
}

CopyQueue::~CopyQueue() {
  const CudaDevice::Current current(*device_);
  device_->driver().cuStreamDestroy.result(to_device_);
  device_->driver().cuStreamDestroy.result(to_host_);
}

void CopyQueue::to_device(std::byte* device_address, const std::byte* host, std::size_t size_bytes) {
  device_->driver().cuMemcpyHtoDAsync(device_pointer(device_address), static_cast<const void*>(host), size_bytes,
                                      to_device_);
  bytes_to_device_.fetch_add(size_bytes, std::memory_order_relaxed);
}

void CopyQueue::zero(std::byte* device_address, std::size_t size_bytes) {
  device_->driver().cuMemsetD8Async(device_pointer(device_address), static_cast<unsigned char>(0), size_bytes,
                                    to_device_);
}

void CopyQueue::to_host(std::byte* host, const std::byte* device_address, std::size_t size_bytes) {
  device_->driver().cuMemcpyDtoHAsync(static_cast<void*>(host), device_pointer(device_address), size_bytes, to_host_);
  bytes_to_host_.fetch_add(size_bytes, std::memory_order_relaxed);
}

}  // namespace tp
