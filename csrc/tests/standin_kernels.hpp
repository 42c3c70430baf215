// SPDX-License-Identifier: Apache-2.0
// The kernels' references as kernels of the stand-in: they take the same parameters, do no more than their grid covers,
// and read and write through device addresses.
#pragma once

#include <algorithm>
#include <vector>

#include "device/kernels_reference.hpp"
#include "sim/standin_driver.hpp"

namespace tp::test {

inline kernel::Address host_address(const void* memory) { return reinterpret_cast<kernel::Address>(memory); }

inline void run_gather(StandinLaunch& launch) {
  const auto batch = launch.parameter<kernel::Batch<kernel::CopyJob>>(0);
  for (unsigned y = 0; y < launch.grid_y; ++y) {
    const kernel::CopyJob& job = batch.jobs[y];
    std::vector<std::byte> bytes(
        std::min<std::uint64_t>(job.size_bytes, std::uint64_t{launch.grid_x} * kernel::kCopyBytesPerBlock));
    if (!launch.read(job.source, bytes.data(), bytes.size())) return;
    if (!launch.write(job.destination, bytes.data(), bytes.size())) return;
  }
}

inline void run_hash_chunks(StandinLaunch& launch) {
  const auto batch = launch.parameter<kernel::Batch<kernel::HashJob>>(0);
  for (unsigned y = 0; y < launch.grid_y; ++y) {
    const kernel::HashJob& job = batch.jobs[y];
    const std::uint64_t covered = std::uint64_t{launch.grid_x} * kernel::kChunksPerBlock * kernel::kChunkBytes;
    std::vector<std::byte> bytes(std::min(job.size_bytes, covered));
    std::vector<std::uint64_t> hashes((bytes.size() + kernel::kChunkBytes - 1) / kernel::kChunkBytes);
    if (!launch.read(job.source, bytes.data(), bytes.size())) return;
    const kernel::HashJob here{host_address(hashes.data()), host_address(bytes.data()), bytes.size()};
    kernel::hash_chunks_reference({&here, 1});
    if (!launch.write(job.destination, hashes.data(), hashes.size() * sizeof(std::uint64_t))) return;
  }
}

inline void run_dequantise(StandinLaunch& launch) {
  const auto batch = launch.parameter<kernel::Batch<kernel::DequantiseJob>>(0);
  const auto block_elements = launch.parameter<std::uint64_t>(1);
  for (unsigned y = 0; y < launch.grid_y; ++y) {
    const kernel::DequantiseJob& job = batch.jobs[y];
    const std::uint64_t covered = std::uint64_t{launch.grid_x} * kernel::kBlockThreads * kernel::kElementsPerThread;
    std::vector<std::byte> codes(std::min(job.count, covered));
    std::vector<float> scales((codes.size() + block_elements - 1) / block_elements);
    std::vector<std::uint16_t> numbers(codes.size());
    if (!launch.read(job.source, codes.data(), codes.size())) return;
    if (!launch.read(job.scales, scales.data(), scales.size() * sizeof(float))) return;
    const kernel::DequantiseJob here{host_address(numbers.data()), host_address(codes.data()),
                                     host_address(scales.data()), codes.size()};
    kernel::dequantise_reference({&here, 1}, block_elements, launch.parameter<kernel::QuantisedFormat>(2),
                                 launch.parameter<kernel::FloatFormat>(3));
    if (!launch.write(job.destination, numbers.data(), numbers.size() * sizeof(std::uint16_t))) return;
  }
}

inline void add_kernels(StandinDriver& driver) {
  const auto quick = [](const StandinLaunch&) -> std::uint64_t { return 1000; };
  driver.add_kernel({"tensorpager_gather", {sizeof(kernel::Batch<kernel::CopyJob>)}, run_gather, quick});
  driver.add_kernel({"tensorpager_hash_chunks", {sizeof(kernel::Batch<kernel::HashJob>)}, run_hash_chunks, quick});
  driver.add_kernel({"tensorpager_dequantise",
                     {sizeof(kernel::Batch<kernel::DequantiseJob>), sizeof(std::uint64_t),
                      sizeof(kernel::QuantisedFormat), sizeof(kernel::FloatFormat)},
                     run_dequantise,
                     quick});
}

}  // namespace tp::test
