// SPDX-License-Identifier: Apache-2.0
// Kernels for pages, launched on a caller's stream. Each has a reference in plain C++ (kernels_reference.hpp) that it
// equals bit for bit.
//
// gather          copies many small pieces in one launch, from registered host memory or the device's own. A copy
//                 engine takes some microseconds for each piece, whatever its size.
// tree_checksums  base/tree_checksum.hpp of bytes on the device, at its memory's speed.
// dequantise      8-bit codes, each block of them with a float32 scale, to 16-bit numbers. The codes may lie in
//                 registered host memory: then half the bytes cross the link that the numbers would take.
//
// Threads: any; the device's context is made current. Blocking: never (the first launch of a kernel may load its code).
// Ownership: memory that a job names belongs to the launch until the stream has passed it. Errors: the constructor
// throws Error(engine) when no kernels were built or the device's driver refuses them; Error(invalid) when a job does
// not keep to what is said above it; Error(device).
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "device/cuda_device.hpp"
#include "device/kernel_image.hpp"
#include "device/kernel_jobs.hpp"

namespace tp {

class Kernels {
 public:
  explicit Kernels(std::shared_ptr<const CudaDevice> device, std::span<const std::byte> image = kernel_image());
  ~Kernels();
  Kernels(const Kernels&) = delete;
  Kernels& operator=(const Kernels&) = delete;

  // Any alignment; 16 bytes at a time where source and destination are multiples of 16.
  void gather(std::span<const kernel::CopyJob> jobs, cuda::Stream stream) const;

  struct ChecksumJob {
    kernel::Address bytes = 0;  // a multiple of 8
    std::uint64_t size_bytes = 0;
  };
  // What tree_checksums needs to work in, for jobs of at most size_bytes_max.
  static std::uint64_t scratch_bytes(std::size_t job_count, std::uint64_t size_bytes_max) noexcept;
  // checksums: device memory for an uint64 a job. scratch: device memory, a multiple of 8.
  void tree_checksums(std::span<const ChecksumJob> jobs, kernel::Address checksums, kernel::Address scratch,
                      cuda::Stream stream) const;

  // source: a multiple of 8; destination: of 16; scales: of 4. block_elements: a multiple of 8.
  void dequantise(std::span<const kernel::DequantiseJob> jobs, std::uint64_t block_elements,
                  kernel::QuantisedFormat from, kernel::FloatFormat to, cuda::Stream stream) const;

 private:
  std::shared_ptr<const CudaDevice> device_;
  cuda::Module module_ = nullptr;
  cuda::Function gather_ = nullptr, hash_chunks_ = nullptr, dequantise_ = nullptr;
};

}  // namespace tp
