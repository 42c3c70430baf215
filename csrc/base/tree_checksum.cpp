// SPDX-License-Identifier: Apache-2.0
#include "base/tree_checksum.hpp"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <vector>

namespace tp {

static_assert(std::endian::native == std::endian::little, "hashes are hashed as they lie in memory");

std::uint64_t tree_checksum(std::span<const std::byte> bytes) {
  std::vector<std::uint64_t> hashes;
  for (;;) {
    std::vector<std::uint64_t> level;
    std::size_t done = 0;
    do {
      const std::size_t size = std::min(kChecksumChunkBytes, bytes.size() - done);
      if (size == kChecksumChunkBytes) {
        level.push_back(XXH3_64bits(bytes.data() + done, size));
      } else {
        std::array<std::byte, kChecksumChunkBytes> filled{};
        if (size > 0) std::memcpy(filled.data(), bytes.data() + done, size);
        level.push_back(XXH3_64bits(filled.data(), filled.size()));
      }
      done += size;
    } while (done < bytes.size());
    if (level.size() == 1) return level[0];
    hashes = std::move(level);
    bytes = std::as_bytes(std::span(hashes));
  }
}

}  // namespace tp
