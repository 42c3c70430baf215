// SPDX-License-Identifier: Apache-2.0
// XXH3-64 of a chunk of 4 KiB, split among eight lanes. Each has one of the algorithm's eight accumulators: a stripe is
// eight words, a lane's own goes into its product, its neighbour's is added, and after every 16 stripes the accumulator
// is scrambled. So a lane needs nothing of the others but one word a stripe, and their accumulators at the end.
//
// Algorithm and constants: github.com/Cyan4973/xxHash, doc/xxhash_spec.md, "XXH3 Algorithm Description" for long input
// with the default secret. kernels.cu has lanes that are threads, kernels_reference.cpp has them in a loop.
#pragma once

#include <cstdint>

#include "device/portable.hpp"

namespace tp::kernel {

inline constexpr unsigned kStripesPerChunk = 64;
inline constexpr unsigned kStripesPerBlock = 16;

inline constexpr std::uint64_t kPrime32_1 = 0x9E3779B1u, kPrime32_2 = 0x85EBCA77u, kPrime32_3 = 0xC2B2AE3Du;
inline constexpr std::uint64_t kPrime64_1 = 0x9E3779B185EBCA87u, kPrime64_2 = 0xC2B2AE3D27D4EB4Fu,
                               kPrime64_3 = 0x165667B19E3779F9u, kPrime64_4 = 0x85EBCA77C2B2AE63u,
                               kPrime64_5 = 0x27D4EB2F165667C5u;
inline constexpr std::uint64_t kAvalancheFactor = 0x165667919E3779F9u;

// The words of the default secret that a lane works with. It is computed once a chunk, from tables of 24 words.
struct ChunkKeys {
  std::uint64_t start;     // of the accumulator
  std::uint64_t last;      // of the last stripe
  std::uint64_t scramble;  // after each block
  std::uint64_t merge;     // of the final sum
};

struct ChunkSecret {
  std::uint64_t words[24];

  // The 8 bytes from any offset on.
  TP_HOST_DEVICE constexpr std::uint64_t at(unsigned offset_bytes) const {
    const unsigned word = offset_bytes / 8, shift = offset_bytes % 8 * 8;
    return shift == 0 ? words[word] : words[word] >> shift | words[word + 1] << (64 - shift);
  }
  // The key of a lane in a stripe of its block.
  TP_HOST_DEVICE constexpr std::uint64_t key(unsigned stripe, unsigned lane) const {
    return words[stripe % kStripesPerBlock + lane];
  }
  TP_HOST_DEVICE constexpr ChunkKeys keys(unsigned lane) const {
    const std::uint64_t starts[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                                     kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
    return {starts[lane], at(192 - 64 - 7 + 8 * lane), at(192 - 64 + 8 * lane), at(11 + 8 * lane)};
  }
};

#define TP_XXH3_SECRET                                                                                       \
  {{0xbe4ba423396cfeb8u, 0x1cad21f72c81017cu, 0xdb979083e96dd4deu, 0x1f67b3b7a4a44072u, 0x78e5c0cc4ee679cbu, \
    0x2172ffcc7dd05a82u, 0x8e2443f7744608b8u, 0x4c263a81e69035e0u, 0xcb00c391bb52283cu, 0xa32e531b8b65d088u, \
    0x4ef90da297486471u, 0xd8acdea946ef1938u, 0x3f349ce33f76faa8u, 0x1d4f0bc7c7bbdcf9u, 0x3159b4cd4be0518au, \
    0x647378d9c97e9fc8u, 0xc3ebd33483acc5eau, 0xeb6313faffa081c5u, 0x49daf0b751dd0d17u, 0x9e68d429265516d3u, \
    0xfca1477d58be162bu, 0xce31d07ad1b8f88fu, 0x280416958f3acb45u, 0x7e404bbbcafbd7afu}}

// What a lane adds for a stripe: `own` and `neighbour` are the words of this lane and of lane ^ 1.
TP_HOST_DEVICE constexpr std::uint64_t stripe_term(std::uint64_t own, std::uint64_t neighbour, std::uint64_t key) {
  const std::uint64_t keyed = own ^ key;
  return neighbour + (keyed & 0xFFFFFFFFu) * (keyed >> 32);
}

TP_HOST_DEVICE constexpr std::uint64_t scrambled(std::uint64_t accumulator, std::uint64_t key) {
  return (accumulator ^ accumulator >> 47 ^ key) * kPrime32_1;
}

// The high and the low half of the product of 64-bit numbers, one xor the other, from four products of halves.
TP_HOST_DEVICE constexpr std::uint64_t folded_product(std::uint64_t left, std::uint64_t right) {
  const std::uint64_t mask = 0xFFFFFFFFu;
  const std::uint64_t low = (left & mask) * (right & mask), high = (left >> 32) * (right >> 32);
  const std::uint64_t first = (left >> 32) * (right & mask), second = (left & mask) * (right >> 32);
  const std::uint64_t middle = (low >> 32) + (first & mask) + second;
  return ((middle << 32) | (low & mask)) ^ (high + (first >> 32) + (middle >> 32));
}

// sum: over the four pairs of lanes, of folded_product(accumulator ^ merge key, the same of lane ^ 1).
TP_HOST_DEVICE constexpr std::uint64_t chunk_hash(std::uint64_t sum) {
  std::uint64_t hash = 4096u * kPrime64_1 + sum;
  hash = (hash ^ hash >> 37) * kAvalancheFactor;
  return hash ^ hash >> 32;
}

}  // namespace tp::kernel
