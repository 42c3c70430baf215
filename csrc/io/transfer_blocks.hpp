// SPDX-License-Identifier: Apache-2.0
// How a transfer of any size, at any offset of a file, from or to memory at any address, is cut into requests that obey
// the file's alignment. Pure arithmetic: no I/O, no memory is touched. One thread.
//
// On a file opened direct (alignment A), a read covers the aligned blocks that the transfer lies in; what a block has
// before and behind it is read too, into memory of the reader's, and left there. A write must not touch its neighbours,
// so what it has of the first and of the last page goes through the page cache.
//
//   offset 5000, 12000 bytes, A = 4096, blocks of 8192      file  0    4096    8192    12288   16384   20480
//     read                                                             [bounced        |bounced        ]
//     write                                                              [cached|straight      |cached]
//
// straight: between the file and the transfer's memory. bounced: through aligned memory of the caller's, because the
// memory is not aligned or the block reaches beyond it. cached: by the file's other descriptor, which is not direct.
// A file that is not direct (A = 1) has straight blocks alone.
//
// Cached blocks come last and must be sent when every other block of the transfer is done: the page cache may hold the
// file in pieces larger than a page, and one that is changed while a direct write passes by would overwrite it later.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "io/io_queue.hpp"

namespace tp {

struct TransferBlock {
  enum class Way : std::uint8_t { straight, bounced, cached };

  Way way = Way::straight;
  std::uint64_t offset_bytes = 0;  // of the request, in the file
  std::uint32_t size_bytes = 0;    // of the request
  std::uint32_t lead_bytes = 0;    // of the request, before the transfer's own; only where bounced
  std::uint32_t own_bytes = 0;     // of the transfer
  std::byte* memory = nullptr;     // where the transfer's own bytes are, or go
};

class TransferBlocks {
 public:
  // align_bytes: what the file asks of memory, offset and size, at most 4096; 1 when it is not direct. block_bytes: the
  // most of one request, a multiple of 4096.
  TransferBlocks(IoOp op, std::uint64_t offset_bytes, std::span<std::byte> memory, std::uint32_t align_bytes,
                 std::uint32_t block_bytes);

  std::optional<TransferBlock> peek() const;  // the next one; none when all of the transfer has been given out
  void advance();                             // past it
  bool any_bounced() const;
  bool any_cached() const;

 private:
  struct Range {
    std::uint64_t begin_bytes = 0, end_bytes = 0;
    bool empty() const noexcept { return begin_bytes >= end_bytes; }
  };

  TransferBlock block_of(Range range, TransferBlock::Way way) const;
  bool aligned(std::uint64_t offset_bytes) const;

  IoOp op_;
  Range own_;
  std::byte* memory_;
  std::uint32_t memory_align_bytes_;
  std::uint32_t block_bytes_;
  Range direct_;       // what is left of it
  Range head_, tail_;  // cached
};

}  // namespace tp
