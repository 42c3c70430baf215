// SPDX-License-Identifier: Apache-2.0
// How a request is carried to its end, in one place for every engine. An engine asks next_piece() for what the kernel
// is to do now, hands the kernel's raw result (bytes, 0 for end of file, -errno) to advance(), and goes on until that
// says finished. Pure arithmetic: no I/O, no memory is touched, not thread-safe (the owner of the request calls).
//
// The kernel may stop early for good reasons: a signal, the end of the file, a transfer longer than the device takes.
// Three rules follow.
//
//   1. Under direct I/O a remainder must start at an aligned byte, so it restarts at the last boundary before the
//      byte reached, and the bytes between are transferred again.
//   2. A read that asks again and ends at the same byte has met the end of the file. (Buffered reads see the plain 0.)
//   3. Whatever does not get further is bounded: EINTR, EAGAIN and results without progress are repeated kIoRetryMax
//      times for one request and are then an error; a write that moves nothing is EIO at once.
//
// Example. A direct read (alignment 512) of 8192 bytes at offset 4096 of a file of 9096 bytes, where a signal cuts the
// first transfer short:
//
//   asks offset 4096 size 8192, result 3000: byte 3000 reached, boundary 2560    -> again
//   asks offset 6656 size 5632, result 2440: byte 5000 reached, boundary 4608    -> again
//   asks offset 8704 size 3584, result  392: byte 5000 again: the file ends here -> finished, 5000 bytes, no error
#pragma once

#include <cstddef>
#include <cstdint>

#include "io/io_queue.hpp"

namespace tp {

struct TransferPiece {
  std::uint64_t offset_bytes = 0;
  std::byte* memory = nullptr;
  std::uint32_t size_bytes = 0;
};

class TransferProgress {
 public:
  enum class Verdict : std::uint8_t { finished, again };

  TransferProgress() = default;
  // align_bytes: what the file asks of memory, offset and size, 1 when buffered. transfer_max_bytes: cap of one piece,
  // 0 for none; it is rounded to the alignment.
  TransferProgress(const IoRequest& request, std::uint32_t align_bytes, std::uint32_t transfer_max_bytes);

  const IoRequest& request() const noexcept { return request_; }
  // memory_bytes_max cuts the piece where the engine's memory ends (a registered slice); it keeps the alignment.
  TransferPiece next_piece(std::uint64_t memory_bytes_max = ~std::uint64_t{0}) const;
  // For the piece last asked for.
  Verdict advance(const TransferPiece& piece, int raw_result);
  IoCompletion completion() const;  // once finished

  bool last_was_short() const noexcept { return last_ == Last::short_transfer; }
  bool last_was_retry() const noexcept { return last_ == Last::retry; }

 private:
  enum class Last : std::uint8_t { none, short_transfer, retry };

  Verdict finish(int error);
  Verdict retry(int error_when_spent);

  IoRequest request_;
  std::uint32_t align_bytes_ = 1;
  std::uint32_t piece_bytes_max_ = 0;
  std::uint32_t restart_bytes_ = 0;  // where the next piece starts, from the request's start: aligned
  std::uint32_t reached_bytes_ = 0;  // bytes known to be transferred: >= restart_bytes_
  unsigned retries_ = 0;
  int error_ = 0;
  bool finished_ = false;
  Last last_ = Last::none;
};

}  // namespace tp
