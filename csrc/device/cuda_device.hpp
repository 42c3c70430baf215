// SPDX-License-Identifier: Apache-2.0
// One CUDA device and its primary context, which torch and every other library of the process share.
//
// Threads: any. A thread that calls the driver for this device has a Current in scope; it is nothing but a look at a
// thread-local of the driver where the context is current already, as in torch's own threads. Blocking: the constructor
// may make the context (100s of ms); the rest never. Ownership: the context is retained for the object's life. Errors:
// the constructor throws Error(engine) when there is no such device or it lacks what is needed, with the reason.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "device/driver.hpp"

namespace tp {

struct CudaDeviceFacts {
  int ordinal = 0;
  std::string name;
  std::string pci_bus_id;
  int compute_capability = 0;  // 90 for 9.0
  int multiprocessor_count = 0;
  int copy_engine_count = 0;
  int host_numa_node = -1;  // -1: unknown
  std::uint64_t total_bytes = 0;
  std::size_t granularity_bytes = 0;  // of mappings
};

class CudaDevice {
 public:
  CudaDevice(const CudaDriver& driver, int ordinal);
  ~CudaDevice();
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  const CudaDriver& driver() const noexcept { return driver_; }
  const CudaDeviceFacts& facts() const noexcept { return facts_; }
  std::uint64_t free_bytes() const;  // now, of all processes together
  cuda::MemAllocationProp allocation_prop() const;
  cuda::MemAccessDesc read_write_access() const;
  // A stream that does not wait for the legacy default stream, nor lets it wait. The caller destroys it.
  cuda::Stream make_stream() const;

  // Makes the device's context current for the calling thread for good; for threads of our own.
  void bind_thread() const { driver_.cuCtxSetCurrent(context_); }
  // Makes it current for the calling thread while it lives. Throws nothing: where that fails, so does the call it is
  // for.
  class Current {
   public:
    explicit Current(const CudaDevice& device) noexcept;
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

   private:
    const CudaDevice& device_;
    bool pushed_ = false;
  };
  // What the calling thread asks of the driver while this lives is no part of a CUDA graph that it or another thread
  // captures, and does not spoil the capture as long as it asks nothing of a captured stream. Throws nothing.
  class OutsideCapture {
   public:
    explicit OutsideCapture(const CudaDevice& device) noexcept;
    ~OutsideCapture();
    OutsideCapture(const OutsideCapture&) = delete;
    OutsideCapture& operator=(const OutsideCapture&) = delete;

   private:
    const CudaDevice& device_;
    int mode_ = cuda::kStreamCaptureModeRelaxed;  // what it is exchanged for
    bool exchanged_ = false;
  };

 private:
  void read_facts();
  const CudaDriver& driver_;
  cuda::Device device_ = 0;
  cuda::Context context_ = nullptr;
  CudaDeviceFacts facts_;
};

}  // namespace tp
