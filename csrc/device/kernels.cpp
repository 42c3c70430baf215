// SPDX-License-Identifier: Apache-2.0
#include "device/kernels.hpp"

#include <algorithm>
#include <string>
#include <vector>

#include "base/check.hpp"

namespace tp {
namespace {

using kernel::Batch;

std::uint64_t chunk_count(std::uint64_t size_bytes) {
  return std::max<std::uint64_t>(1, (size_bytes + kernel::kChunkBytes - 1) / kernel::kChunkBytes);
}

unsigned blocks(std::uint64_t count, std::uint64_t per_block) {
  const std::uint64_t result = (count + per_block - 1) / per_block;
  TP_CHECK(result > 0 && result <= 0x7FFFFFFFu);  // of a grid's x
  return static_cast<unsigned>(result);
}

// Calls launch(batch, count, the largest job's size) for as many jobs at a time as fit in a launch. Those of size 0
// have nothing to do.
template <class Job, class Size, class Launch>
void for_batches(std::span<const Job> jobs, Size size, Launch launch) {
  Batch<Job> batch{};
  unsigned count = 0;
  std::uint64_t largest = 0;
  const auto flush = [&] {
    if (count > 0) launch(batch, count, largest);
    count = 0;
    largest = 0;
  };
  for (const Job& job : jobs) {
    if (size(job) == 0) continue;
    batch.jobs[count++] = job;
    largest = std::max<std::uint64_t>(largest, size(job));
    if (count == Batch<Job>::kJobsMax) flush();
  }
  flush();
}

void require(bool holds, const char* what) {
  if (!holds) throw Error(ErrorKind::invalid, std::string("a kernel was given ") + what);
}

}  // namespace

Kernels::Kernels(std::shared_ptr<const CudaDevice> device, std::span<const std::byte> image)
    : device_(std::move(device)) {
  if (image.empty()) {
    throw Error(
        ErrorKind::engine,
        "tensorpager was built without its CUDA kernels: nvcc was not found; install the CUDA toolkit and build "
        "it anew");
  }
  const CudaDevice::Current current(*device_);
  const CudaDriver& driver = device_->driver();
  const cuda::Result loaded = driver.cuModuleLoadData.result(&module_, static_cast<const void*>(image.data()));
  if (loaded != cuda::kSuccess) {
    const Error error = driver.error("cuModuleLoadData", loaded);
    throw Error(ErrorKind::engine,
                "the driver refuses tensorpager's kernels for '" + device_->facts().name + "' (compute capability " +
                    std::to_string(device_->facts().compute_capability) + "): " + error.what(),
                loaded);
  }
  try {
    driver.cuModuleGetFunction(&gather_, module_, "tensorpager_gather");
    driver.cuModuleGetFunction(&hash_chunks_, module_, "tensorpager_hash_chunks");
    driver.cuModuleGetFunction(&dequantise_, module_, "tensorpager_dequantise");
  } catch (...) {
    driver.cuModuleUnload.result(module_);
    throw;
  }
}

Kernels::~Kernels() {
  const CudaDevice::Current current(*device_);
  device_->driver().cuModuleUnload.result(module_);
}

void Kernels::gather(std::span<const kernel::CopyJob> jobs, cuda::Stream stream) const {
  const CudaDevice::Current current(*device_);
  for_batches(
      jobs, [](const kernel::CopyJob& job) { return job.size_bytes; },
      [&](Batch<kernel::CopyJob>& batch, unsigned count, std::uint64_t largest) {
        void* parameters[] = {&batch};
        device_->driver().cuLaunchKernel(gather_, blocks(largest, kernel::kCopyBytesPerBlock), count, 1u,
                                         kernel::kBlockThreads, 1u, 1u, 0u, stream, parameters,
                                         static_cast<void**>(nullptr));
      });
}

std::uint64_t Kernels::scratch_bytes(std::size_t job_count, std::uint64_t size_bytes_max) noexcept {
  // Two levels at a time, each smaller than the first.
  return 2 * job_count * chunk_count(size_bytes_max) * sizeof(std::uint64_t);
}

void Kernels::tree_checksums(std::span<const ChecksumJob> jobs, kernel::Address checksums, kernel::Address scratch,
                             cuda::Stream stream) const {
  std::uint64_t largest = 0;
  for (const ChecksumJob& job : jobs) {
    require(job.bytes % 8 == 0, "bytes to be hashed that do not begin at a multiple of 8");
    require(job.size_bytes > 0, "no bytes to hash");
    largest = std::max(largest, job.size_bytes);
  }
  require(scratch % 8 == 0 && checksums % 8 == 0, "memory for hashes that does not begin at a multiple of 8");
  const CudaDevice::Current current(*device_);
  // A level's hashes are the next one's bytes, in the other half of the scratch memory.
  const std::uint64_t row_bytes = chunk_count(largest) * sizeof(std::uint64_t);
  std::vector<kernel::HashJob> level;
  for (const ChecksumJob& job : jobs) level.push_back({0, job.bytes, job.size_bytes});
  for (int half = 0; largest > 0; half = 1 - half) {
    std::vector<kernel::HashJob> next;
    std::uint64_t largest_next = 0;
    for (std::size_t i = 0; i < level.size(); ++i) {
      kernel::HashJob& job = level[i];
      next.push_back(job);
      if (job.size_bytes == 0) continue;  // done at an earlier level
      const std::uint64_t chunks = chunk_count(job.size_bytes);
      const bool root = chunks == 1;
      job.destination = root ? checksums + i * sizeof(std::uint64_t) : scratch + (half * level.size() + i) * row_bytes;
      next.back() = {0, job.destination, root ? 0 : chunks * sizeof(std::uint64_t)};
      largest_next = std::max(largest_next, next.back().size_bytes);
    }
    for_batches(
        std::span<const kernel::HashJob>(level), [](const kernel::HashJob& job) { return job.size_bytes; },
        [&](Batch<kernel::HashJob>& batch, unsigned count, std::uint64_t largest_size) {
          void* parameters[] = {&batch};
          device_->driver().cuLaunchKernel(hash_chunks_, blocks(chunk_count(largest_size), kernel::kChunksPerBlock),
                                           count, 1u, kernel::kBlockThreads, 1u, 1u, 0u, stream, parameters,
                                           static_cast<void**>(nullptr));
        });
    level = std::move(next);
    largest = largest_next;
  }
}

void Kernels::dequantise(std::span<const kernel::DequantiseJob> jobs, std::uint64_t block_elements,
                         kernel::QuantisedFormat from, kernel::FloatFormat to, cuda::Stream stream) const {
  require(block_elements > 0 && block_elements % kernel::kElementsPerThread == 0,
          "blocks whose number of elements is no multiple of 8");
  for (const kernel::DequantiseJob& job : jobs) {
    require(job.source % 8 == 0, "codes that do not begin at a multiple of 8");
    require(job.destination % 16 == 0, "room for numbers that does not begin at a multiple of 16");
    require(job.scales % 4 == 0, "scales that do not begin at a multiple of 4");
  }
  const CudaDevice::Current current(*device_);
  for_batches(
      jobs, [](const kernel::DequantiseJob& job) { return job.count; },
      [&](Batch<kernel::DequantiseJob>& batch, unsigned count, std::uint64_t largest) {
        void* parameters[] = {&batch, &block_elements, &from, &to};
        device_->driver().cuLaunchKernel(
            dequantise_, blocks(largest, std::uint64_t{kernel::kBlockThreads} * kernel::kElementsPerThread), count, 1u,
            kernel::kBlockThreads, 1u, 1u, 0u, stream, parameters, static_cast<void**>(nullptr));
      });
}

}  // namespace tp
