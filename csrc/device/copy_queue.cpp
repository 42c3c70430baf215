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

void CopyQueue::dequantise(const Kernels& kernels, std::byte* device_address, const std::byte* record,
                           const QuantisedLayout& layout, std::size_t page_bytes) {
  cuda::DevicePtr codes = 0;
  device_->driver().cuMemHostGetDevicePointer(&codes, const_cast<std::byte*>(record), 0u);
  const kernel::DequantiseJob job{reinterpret_cast<kernel::Address>(device_address), codes,
                                  codes + scales_offset_bytes(page_bytes), numbers_in_page(page_bytes)};
  kernels.dequantise({&job, 1}, layout.block_elements, layout.codes, layout.numbers, to_device_);
  const std::size_t read_bytes = job.count + job.count / layout.block_elements * sizeof(float);
  bytes_to_device_.fetch_add(read_bytes, std::memory_order_relaxed);
}

void CopyQueue::to_host(std::byte* host, const std::byte* device_address, std::size_t size_bytes) {
  device_->driver().cuMemcpyDtoHAsync(static_cast<void*>(host), device_pointer(device_address), size_bytes, to_host_);
  bytes_to_host_.fetch_add(size_bytes, std::memory_order_relaxed);
}

}  // namespace tp
