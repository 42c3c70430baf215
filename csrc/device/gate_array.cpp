// SPDX-License-Identifier: Apache-2.0
#include "device/gate_array.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <span>

#include "base/check.hpp"
#include "device/graph_capture.hpp"

namespace tp {
namespace {

constexpr std::uint32_t kClosed = 0;
constexpr std::uint32_t kOpen = 1;

std::atomic_ref<std::uint32_t> as_atomic(const std::uint32_t* flag) {
  return std::atomic_ref(*const_cast<std::uint32_t*>(flag));
}

}  // namespace

GateArray::GateArray(std::shared_ptr<const CudaDevice> device, std::size_t count)
    : device_(std::move(device)), count_(count) {
  TP_CHECK(count > 0);
  const auto system_page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  size_bytes_ = (2 * count * sizeof(std::uint32_t) + system_page - 1) / system_page * system_page;
  void* memory = mmap(nullptr, size_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    throw Error(ErrorKind::memory,
                "no memory for " + std::to_string(2 * count) + " flags of a CUDA graph: " + std::strerror(errno),
                errno);
  }
  flags_ = static_cast<std::uint32_t*>(memory);
  const CudaDevice::Current current(*device_);
  try {
    device_->driver().cuMemHostRegister(memory, size_bytes_,
                                        cuda::kHostRegisterPortable | cuda::kHostRegisterDeviceMap);
  } catch (...) {
    munmap(memory, size_bytes_);
    throw;
  }
  try {
    device_->driver().cuMemHostGetDevicePointer(&address_, memory, 0u);
  } catch (...) {
    device_->driver().cuMemHostUnregister.result(memory);
    munmap(memory, size_bytes_);
    throw;
  }
}

GateArray::~GateArray() {
  const CudaDevice::Current current(*device_);
  device_->driver().cuMemHostUnregister.result(static_cast<void*>(flags_));
  munmap(flags_, size_bytes_);
}

cuda::DevicePtr GateArray::device_address(const std::uint32_t* flag) const noexcept {
  return address_ + static_cast<cuda::DevicePtr>(flag - flags_) * sizeof(std::uint32_t);
}

cuda::StreamMemOp GateArray::set_mark(std::size_t index) const noexcept {
  return {.operation = cuda::kStreamMemOpWriteValue32, .address = device_address(mark(index)), .value = 1};
}

void GateArray::capture_step(std::size_t index, cuda::Stream stream) {
  TP_CHECK(index < count_);
  const cuda::DevicePtr gate = device_address(flags_ + index);
  std::array<cuda::StreamMemOp, 3> operations = {
      cuda::StreamMemOp{},
      cuda::StreamMemOp{.operation = cuda::kStreamMemOpWaitValue32,
                        .address = gate,
                        .value = kOpen,
                        .flags = cuda::kStreamWaitValueEqual},
      cuda::StreamMemOp{.operation = cuda::kStreamMemOpWriteValue32, .address = gate, .value = kClosed},
  };
  if (index > 0) operations[0] = set_mark(index - 1);
  capture_value_operations(*device_, stream, std::span(operations).subspan(index > 0 ? 0 : 1));
}

void GateArray::capture_end(std::size_t last, cuda::Stream stream) {
  TP_CHECK(last < count_);
  cuda::StreamMemOp operation = set_mark(last);
  capture_value_operations(*device_, stream, {&operation, 1});
}

void GateArray::open_behind(std::size_t index, cuda::Stream stream) {
  TP_CHECK(index < count_);
  const CudaDevice::Current current(*device_);
  device_->driver().cuStreamWriteValue32(stream, device_address(flags_ + index), kOpen, 0u);
}

void GateArray::open(std::size_t index) noexcept { as_atomic(flags_ + index).store(kOpen, std::memory_order_release); }

void GateArray::close(std::size_t index) noexcept {
  as_atomic(flags_ + index).store(kClosed, std::memory_order_release);
}

bool GateArray::is_open(std::size_t index) const noexcept {
  return as_atomic(flags_ + index).load(std::memory_order_acquire) == kOpen;
}

void GateArray::clear_mark(std::size_t index) noexcept { as_atomic(mark(index)).store(0, std::memory_order_release); }

}  // namespace tp
