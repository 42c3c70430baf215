// SPDX-License-Identifier: Apache-2.0
// A checksum that thousands of threads can take part in: XXH3-64 of every 4 KiB chunk, then of the chunks' hashes, and
// so on until one is left. The last chunk is filled up with zeros, of every level. So bytes that differ in trailing
// zeros alone have one checksum where they have equally many chunks: check their size beside it.
//
// XXH3: github.com/Cyan4973/xxHash, doc/xxhash_spec.md. On a device: Kernels::tree_checksums gives the same numbers.
// Threads: any. Blocking: no, at 10 GB/s and more a thread. Errors: none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace tp {

inline constexpr std::size_t kChecksumChunkBytes = 4096;

std::uint64_t tree_checksum(std::span<const std::byte> bytes);

}  // namespace tp
