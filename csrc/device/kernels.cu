// SPDX-License-Identifier: Apache-2.0
// The kernels. What each does is in kernels.hpp; what it must give, bit for bit, in kernels_reference.cpp. Compiled to
// a fatbin, embedded (kernel_image.cpp) and loaded through the driver.
#include "device/chunk_hash.hpp"
#include "device/kernel_jobs.hpp"
#include "device/number_formats.hpp"

namespace tp::kernel {
namespace {

__constant__ const ChunkSecret kSecret = TP_XXH3_SECRET;

template <class Value>
__device__ __forceinline__ Value* pointer(Address address) {
  return reinterpret_cast<Value*>(address);
}

// Words of one width, four in flight for each thread: a read of host memory takes microseconds.
template <class Word>
__device__ void copy_words(const CopyJob& job, std::uint64_t begin, std::uint64_t end) {
  const Word* source = pointer<const Word>(job.source);
  Word* destination = pointer<Word>(job.destination);
  const std::uint64_t first = begin / sizeof(Word), last = end / sizeof(Word);
  std::uint64_t i = first + threadIdx.x;
  for (; i + 3 * kBlockThreads < last; i += 4 * kBlockThreads) {
    const Word a = source[i], b = source[i + kBlockThreads], c = source[i + 2 * kBlockThreads],
               d = source[i + 3 * kBlockThreads];
    destination[i] = a;
    destination[i + kBlockThreads] = b;
    destination[i + 2 * kBlockThreads] = c;
    destination[i + 3 * kBlockThreads] = d;
  }
  for (; i < last; i += kBlockThreads) destination[i] = source[i];
  const std::uint64_t done = last * sizeof(Word);
  if (done + threadIdx.x < end)  // fewer bytes than a word has
    pointer<std::uint8_t>(job.destination)[done + threadIdx.x] =
        pointer<const std::uint8_t>(job.source)[done + threadIdx.x];
}

// A stretch of zeros where the chunk ends early.
__device__ std::uint64_t word_at(const HashJob& job, std::uint64_t offset) {
  if (offset + 8 <= job.size_bytes) return *pointer<const std::uint64_t>(job.source + offset);
  std::uint64_t word = 0;
  for (unsigned i = 0; i < 8 && offset + i < job.size_bytes; ++i)
    word |= static_cast<std::uint64_t>(*pointer<const std::uint8_t>(job.source + offset + i)) << (8 * i);
  return word;
}

}  // namespace

// grid: x pieces of the largest job, y jobs.
extern "C" __global__ void __launch_bounds__(kBlockThreads) tensorpager_gather(Batch<CopyJob> batch) {
  const CopyJob job = batch.jobs[blockIdx.y];
  const std::uint64_t begin = static_cast<std::uint64_t>(blockIdx.x) * kCopyBytesPerBlock;
  if (begin >= job.size_bytes) return;
  const std::uint64_t end = begin + kCopyBytesPerBlock < job.size_bytes ? begin + kCopyBytesPerBlock : job.size_bytes;
  const Address bits = job.source | job.destination;
  if (bits % 16 == 0) {
    copy_words<uint4>(job, begin, end);
  } else if (bits % 8 == 0) {
    copy_words<std::uint64_t>(job, begin, end);
  } else if (bits % 4 == 0) {
    copy_words<std::uint32_t>(job, begin, end);
  } else {
    copy_words<std::uint8_t>(job, begin, end);
  }
}

// grid: x blocks of the largest job, y jobs. Eight threads a chunk, so a warp reads four stripes of 64 bytes at once.
extern "C" __global__ void __launch_bounds__(kBlockThreads) tensorpager_hash_chunks(Batch<HashJob> batch) {
  const HashJob job = batch.jobs[blockIdx.y];
  const unsigned lane = threadIdx.x % kChunkLanes;
  const std::uint64_t chunk = static_cast<std::uint64_t>(blockIdx.x) * kChunksPerBlock + threadIdx.x / kChunkLanes;
  const std::uint64_t chunks = (job.size_bytes + kChunkBytes - 1) / kChunkBytes;
  const ChunkKeys keys = kSecret.keys(lane);
  const std::uint64_t begin = chunk * kChunkBytes + lane * 8;
  const bool inside = chunk < chunks;  // all threads of a warp stay, for the shuffles
  const bool whole = inside && (chunk + 1) * kChunkBytes <= job.size_bytes;
  std::uint64_t accumulator = keys.start;
#pragma unroll 8
  for (unsigned stripe = 0; stripe < kStripesPerChunk; ++stripe) {
    const std::uint64_t offset = begin + stripe * 64;
    const std::uint64_t own = whole    ? *pointer<const std::uint64_t>(job.source + offset)
                              : inside ? word_at(job, offset)
                                       : 0;
    const std::uint64_t neighbour = __shfl_xor_sync(0xFFFFFFFFu, own, 1);
    const std::uint64_t key = stripe + 1 == kStripesPerChunk ? keys.last : kSecret.key(stripe, lane);
    accumulator += stripe_term(own, neighbour, key);
    if (stripe % kStripesPerBlock == kStripesPerBlock - 1 && stripe + 1 < kStripesPerChunk)
      accumulator = scrambled(accumulator, keys.scramble);
  }
  const std::uint64_t merged = accumulator ^ keys.merge;
  const std::uint64_t other = __shfl_xor_sync(0xFFFFFFFFu, merged, 1);
  std::uint64_t sum = folded_product(merged, other);
  sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
  sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 4);
  if (inside && lane == 0) pointer<std::uint64_t>(job.destination)[chunk] = chunk_hash(sum);
}

// grid: x blocks of the largest job, y jobs. Eight elements a thread: 8 bytes are read, 16 written.
extern "C" __global__ void __launch_bounds__(kBlockThreads)
    tensorpager_dequantise(Batch<DequantiseJob> batch, std::uint64_t block_elements, QuantisedFormat from,
                           FloatFormat to) {
  const DequantiseJob job = batch.jobs[blockIdx.y];
  const std::uint64_t first =
      (static_cast<std::uint64_t>(blockIdx.x) * kBlockThreads + threadIdx.x) * kElementsPerThread;
  if (first >= job.count) return;
  const float scale = pointer<const float>(job.scales)[first / block_elements];
  if (first + kElementsPerThread > job.count) {
    for (std::uint64_t i = first; i < job.count; ++i) {
      const float value = float_of_code(pointer<const std::uint8_t>(job.source)[i], from);
      pointer<std::uint16_t>(job.destination)[i] = code_of_float(value * scale, to);
    }
    return;
  }
  const std::uint64_t codes = *pointer<const std::uint64_t>(job.source + first);
  std::uint32_t words[kElementsPerThread / 2];
#pragma unroll
  for (unsigned i = 0; i < kElementsPerThread / 2; ++i) {
    const float even = float_of_code(static_cast<std::uint8_t>(codes >> (16 * i)), from);
    const float odd = float_of_code(static_cast<std::uint8_t>(codes >> (16 * i + 8)), from);
    words[i] = code_of_float(even * scale, to) | static_cast<std::uint32_t>(code_of_float(odd * scale, to)) << 16;
  }
  *pointer<uint4>(job.destination + 2 * first) = make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace tp::kernel
