// SPDX-License-Identifier: Apache-2.0
#include "device/kernels_reference.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "device/chunk_hash.hpp"
#include "device/number_formats.hpp"

namespace tp::kernel {
namespace {

constexpr ChunkSecret kSecret = TP_XXH3_SECRET;
constexpr unsigned kWordsPerStripe = kChunkLanes;

template <class Value>
Value* pointer(Address address) {
  return reinterpret_cast<Value*>(address);
}

std::uint64_t hash_of(const std::array<std::uint64_t, kChunkBytes / 8>& words) {
  std::uint64_t sum = 0;
  std::array<std::uint64_t, kChunkLanes> merged{};
  for (unsigned lane = 0; lane < kChunkLanes; ++lane) {
    const ChunkKeys keys = kSecret.keys(lane);
    std::uint64_t accumulator = keys.start;
    for (unsigned stripe = 0; stripe < kStripesPerChunk; ++stripe) {
      const bool last = stripe + 1 == kStripesPerChunk;
      accumulator += stripe_term(words[stripe * kWordsPerStripe + lane], words[stripe * kWordsPerStripe + (lane ^ 1)],
                                 last ? keys.last : kSecret.key(stripe, lane));
      if (stripe % kStripesPerBlock == kStripesPerBlock - 1 && !last)
        accumulator = scrambled(accumulator, keys.scramble);
    }
    merged[lane] = accumulator ^ keys.merge;
  }
  for (unsigned lane = 0; lane < kChunkLanes; lane += 2) sum += folded_product(merged[lane], merged[lane + 1]);
  return chunk_hash(sum);
}

}  // namespace

void gather_reference(std::span<const CopyJob> jobs) {
  for (const CopyJob& job : jobs)
    std::memcpy(pointer<std::byte>(job.destination), pointer<const std::byte>(job.source), job.size_bytes);
}

void hash_chunks_reference(std::span<const HashJob> jobs) {
  for (const HashJob& job : jobs) {
    for (std::uint64_t done = 0, chunk = 0; done < job.size_bytes; done += kChunkBytes, ++chunk) {
      std::array<std::uint64_t, kChunkBytes / 8> words{};
      std::memcpy(words.data(), pointer<const std::byte>(job.source + done),
                  std::min<std::uint64_t>(kChunkBytes, job.size_bytes - done));
      pointer<std::uint64_t>(job.destination)[chunk] = hash_of(words);
    }
  }
}

void dequantise_reference(std::span<const DequantiseJob> jobs, std::uint64_t block_elements, QuantisedFormat from,
                          FloatFormat to) {
  for (const DequantiseJob& job : jobs) {
    for (std::uint64_t i = 0; i < job.count; ++i) {
      const float value = float_of_code(pointer<const std::uint8_t>(job.source)[i], from);
      pointer<std::uint16_t>(job.destination)[i] =
          code_of_float(value * pointer<const float>(job.scales)[i / block_elements], to);
    }
  }
}

}  // namespace tp::kernel
