// SPDX-License-Identifier: Apache-2.0
// What the kernels are told: jobs, handed over by value with the launch, so that nothing has to be allocated for them.
// Included by kernels.cu too, by nvcc: plain types only.
#pragma once

#include <cstdint>

namespace tp::kernel {

// Addresses that the device can read: of its own memory, or of registered host memory.
using Address = std::uint64_t;

struct CopyJob {
  Address destination, source;
  std::uint64_t size_bytes;
};

// destination: an uint64 for every chunk.
struct HashJob {
  Address destination, source;
  std::uint64_t size_bytes;
};

// scales: float32, one for each block of elements.
struct DequantiseJob {
  Address destination, source, scales;
  std::uint64_t count;
};

enum class QuantisedFormat : std::uint32_t { int8, fp8_e4m3, fp8_e5m2 };
enum class FloatFormat : std::uint32_t { bfloat16, float16 };

// Parameters may take 4 KiB in all (CUDA programming guide, "__global__ functions").
template <class Job>
struct Batch {
  static constexpr std::uint32_t kJobsMax = (4096 - 64) / sizeof(Job);
  Job jobs[kJobsMax];
};

inline constexpr std::uint32_t kChunkBytes = 4096;  // of a checksum: base/tree_checksum.hpp
inline constexpr unsigned kBlockThreads = 256;
inline constexpr unsigned kChunkLanes = 8;  // threads that hash a chunk together
inline constexpr unsigned kChunksPerBlock = kBlockThreads / kChunkLanes;
inline constexpr unsigned kElementsPerThread = 8;  // dequantised by a thread in one go
inline constexpr unsigned kCopyBytesPerBlock = kBlockThreads * 16 * 4;

}  // namespace tp::kernel
