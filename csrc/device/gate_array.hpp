// SPDX-License-Identifier: Apache-2.0
// Flags in host memory by which work on the device waits for what is asked for later, and tells how far it has come.
//
// A *gate* holds back what a graph does behind it until it is opened, and closes by itself when it has let one launch
// through: values are baked into a graph, so each launch finds it as the one before did. A *mark* is set by the graph
// and cleared by the host.
//
// A stream that stands at a gate occupies a hardware queue, and what others have in that queue is stuck behind it. So
// whoever uses gates must know that what opens them does not come that way: gate_probe.hpp.
//
// Threads: any, one for each flag at a time. Blocking: never. Ownership: flags live as long as the array, which must
// outlive every launch of a graph that has them. Errors: Error(device), Error(memory).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "device/cuda_device.hpp"

namespace tp {

class GateArray {
 public:
  GateArray(std::shared_ptr<const CudaDevice> device, std::size_t count);  // gates, and as many marks
  ~GateArray();
  GateArray(const GateArray&) = delete;
  GateArray& operator=(const GateArray&) = delete;

  std::size_t count() const noexcept { return count_; }
  // Into what the stream captures: sets the mark of the step before, if there is one, and waits at this one's gate.
  void capture_step(std::size_t index, cuda::Stream stream);
  // Sets the mark of the last step.
  void capture_end(std::size_t last, cuda::Stream stream);
  // Opens the gate when the stream has done all it holds.
  void open_behind(std::size_t index, cuda::Stream stream);
  void open(std::size_t index) noexcept;  // now
  void close(std::size_t index) noexcept;
  bool is_open(std::size_t index) const noexcept;
  const std::uint32_t* mark(std::size_t index) const noexcept { return flags_ + count_ + index; }
  void clear_mark(std::size_t index) noexcept;

 private:
  cuda::DevicePtr device_address(const std::uint32_t* flag) const noexcept;
  cuda::StreamMemOp set_mark(std::size_t index) const noexcept;

  std::shared_ptr<const CudaDevice> device_;
  std::size_t count_;
  std::size_t size_bytes_ = 0;
  std::uint32_t* flags_ = nullptr;  // gates, then marks
  cuda::DevicePtr address_ = 0;
};

}  // namespace tp
