// SPDX-License-Identifier: Apache-2.0
#include "io/transfer_progress.hpp"

#include <algorithm>
#include <cerrno>

#include "base/check.hpp"

namespace tp {

TransferProgress::TransferProgress(const IoRequest& request, std::uint32_t align_bytes,
                                   std::uint32_t transfer_max_bytes)
    : request_(request), align_bytes_(align_bytes) {
  TP_CHECK(align_bytes > 0 && (align_bytes & (align_bytes - 1)) == 0);
  TP_CHECK(request.size_bytes > 0 && request.size_bytes <= kRequestBytesMax);
  TP_CHECK(request.offset_bytes % align_bytes == 0);
  TP_CHECK(request.size_bytes % align_bytes == 0);
  TP_CHECK(reinterpret_cast<std::uintptr_t>(request.memory) % align_bytes == 0);
  // A cap below the alignment can't be kept: the smallest direct transfer is one aligned block.
  const std::uint32_t cap_bytes = transfer_max_bytes == 0 ? request.size_bytes : transfer_max_bytes;
  piece_bytes_max_ = std::max(cap_bytes / align_bytes * align_bytes, align_bytes);
}

TransferPiece TransferProgress::next_piece(std::uint64_t memory_bytes_max) const {
  TP_CHECK(!finished_);
  TP_CHECK(restart_bytes_ < request_.size_bytes);
  TP_CHECK(memory_bytes_max >= align_bytes_);
  TransferPiece piece;
  piece.offset_bytes = request_.offset_bytes + restart_bytes_;
  piece.memory = request_.memory + restart_bytes_;
  const std::uint64_t left_bytes = request_.size_bytes - restart_bytes_;
  piece.size_bytes = static_cast<std::uint32_t>(
      std::min({left_bytes, std::uint64_t{piece_bytes_max_}, memory_bytes_max / align_bytes_ * align_bytes_}));
  return piece;
}

TransferProgress::Verdict TransferProgress::advance(const TransferPiece& piece, int raw_result) {
  TP_CHECK(!finished_);
  TP_CHECK(piece.offset_bytes == request_.offset_bytes + restart_bytes_);
  last_ = Last::none;
  if (raw_result == -EINTR || raw_result == -EAGAIN) return retry(-raw_result);
  if (raw_result < 0) return finish(-raw_result);

  const auto moved_bytes = static_cast<std::uint32_t>(raw_result);
  TP_CHECK(moved_bytes <= piece.size_bytes);
  const bool is_read = request_.op == IoOp::read;
  const std::uint32_t reached_bytes = restart_bytes_ + moved_bytes;

  if (moved_bytes == 0) {
    // A read at or beyond the end of the file. After a restart the file has shrunk to the boundary or below it, so
    // only what lies before the boundary is still in the file.
    if (is_read) reached_bytes_ = restart_bytes_;
    return finish(is_read ? 0 : EIO);
  }
  if (reached_bytes <= reached_bytes_) {
    if (is_read && reached_bytes == reached_bytes_) return finish(0);  // rule 2
    return retry(EIO);
  }
  reached_bytes_ = reached_bytes;
  restart_bytes_ = reached_bytes / align_bytes_ * align_bytes_;
  if (reached_bytes_ == request_.size_bytes) return finish(0);
  // A piece that was cut on purpose and came back whole is a remainder all the same.
  last_ = Last::short_transfer;
  return Verdict::again;
}

IoCompletion TransferProgress::completion() const {
  TP_CHECK(finished_);
  TP_CHECK(error_ != 0 || request_.op == IoOp::read || reached_bytes_ == request_.size_bytes);
  return {request_.token, error_, error_ == 0 ? reached_bytes_ : 0};
}

TransferProgress::Verdict TransferProgress::finish(int error) {
  error_ = error;
  finished_ = true;
  return Verdict::finished;
}

TransferProgress::Verdict TransferProgress::retry(int error_when_spent) {
  TP_CHECK(retries_ <= kIoRetryMax);
  if (retries_ == kIoRetryMax) return finish(error_when_spent);
  ++retries_;
  last_ = Last::retry;
  return Verdict::again;
}

}  // namespace tp
