// SPDX-License-Identifier: Apache-2.0
#include "io/transfer_progress.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <random>
#include <vector>

namespace tp {
namespace {

using Verdict = TransferProgress::Verdict;

std::byte* fake_memory() { return reinterpret_cast<std::byte*>(std::uintptr_t{1} << 30); }

TransferProgress make(IoOp op, std::uint64_t offset, std::uint32_t size, std::uint32_t align, std::uint32_t cap = 0) {
  return TransferProgress({77, op, FileId{0}, offset, fake_memory(), size}, align, cap);
}

void expect_piece(const TransferProgress& progress, std::uint64_t offset, std::uint32_t size) {
  const TransferPiece piece = progress.next_piece();
  EXPECT_EQ(piece.offset_bytes, offset);
  EXPECT_EQ(piece.size_bytes, size);
  EXPECT_EQ(piece.memory, fake_memory() + (offset - progress.request().offset_bytes));
}

void expect_done(const TransferProgress& progress, int error, std::uint32_t bytes) {
  const IoCompletion completion = progress.completion();
  EXPECT_EQ(completion.token, 77u);
  EXPECT_EQ(completion.error, error);
  EXPECT_EQ(completion.transferred_bytes, bytes);
}

TEST(TransferProgressTest, a_whole_transfer_is_finished_at_once) {
  TransferProgress progress = make(IoOp::read, 100, 5000, 1);
  expect_piece(progress, 100, 5000);
  EXPECT_EQ(progress.advance(progress.next_piece(), 5000), Verdict::finished);
  expect_done(progress, 0, 5000);
  EXPECT_FALSE(progress.last_was_short());
}

TEST(TransferProgressTest, a_short_buffered_transfer_goes_on_at_the_next_byte) {
  for (const IoOp op : {IoOp::read, IoOp::write}) {
    TransferProgress progress = make(op, 100, 5000, 1);
    EXPECT_EQ(progress.advance(progress.next_piece(), 1), Verdict::again);
    EXPECT_TRUE(progress.last_was_short());
    expect_piece(progress, 101, 4999);
    EXPECT_EQ(progress.advance(progress.next_piece(), 4999), Verdict::finished);
    expect_done(progress, 0, 5000);
  }
}

TEST(TransferProgressTest, the_example_of_the_header) {
  TransferProgress progress = make(IoOp::read, 4096, 8192, 512);
  expect_piece(progress, 4096, 8192);
  EXPECT_EQ(progress.advance(progress.next_piece(), 3000), Verdict::again);
  expect_piece(progress, 6656, 5632);
  EXPECT_EQ(progress.advance(progress.next_piece(), 2440), Verdict::again);
  expect_piece(progress, 8704, 3584);
  EXPECT_EQ(progress.advance(progress.next_piece(), 392), Verdict::finished);
  expect_done(progress, 0, 5000);
}

TEST(TransferProgressTest, a_direct_write_restarts_at_the_last_boundary) {
  TransferProgress progress = make(IoOp::write, 8192, 16384, 4096);
  EXPECT_EQ(progress.advance(progress.next_piece(), 4095), Verdict::again);
  expect_piece(progress, 8192, 16384);
  EXPECT_EQ(progress.advance(progress.next_piece(), 12287), Verdict::again);
  expect_piece(progress, 8192 + 8192, 8192);
  EXPECT_EQ(progress.advance(progress.next_piece(), 8192), Verdict::finished);
  expect_done(progress, 0, 16384);
}

TEST(TransferProgressTest, the_end_of_a_file_is_not_an_error) {
  TransferProgress empty = make(IoOp::read, 4096, 4096, 1);
  EXPECT_EQ(empty.advance(empty.next_piece(), 0), Verdict::finished);
  expect_done(empty, 0, 0);

  TransferProgress buffered = make(IoOp::read, 0, 4096, 1);
  EXPECT_EQ(buffered.advance(buffered.next_piece(), 10), Verdict::again);
  EXPECT_EQ(buffered.advance(buffered.next_piece(), 0), Verdict::finished);
  expect_done(buffered, 0, 10);
}

TEST(TransferProgressTest, a_file_that_shrinks_between_two_pieces_counts_only_what_it_still_has) {
  TransferProgress progress = make(IoOp::read, 0, 8192, 512);
  EXPECT_EQ(progress.advance(progress.next_piece(), 1000), Verdict::again);
  expect_piece(progress, 512, 7680);
  EXPECT_EQ(progress.advance(progress.next_piece(), 0), Verdict::finished);
  expect_done(progress, 0, 512);
}

TEST(TransferProgressTest, a_write_that_moves_nothing_is_an_error) {
  TransferProgress progress = make(IoOp::write, 0, 4096, 1);
  EXPECT_EQ(progress.advance(progress.next_piece(), 0), Verdict::finished);
  expect_done(progress, EIO, 0);
}

TEST(TransferProgressTest, transient_errors_are_repeated_and_then_an_error) {
  for (const int error : {EINTR, EAGAIN}) {
    TransferProgress progress = make(IoOp::read, 0, 4096, 1);
    for (unsigned attempt = 0; attempt < kIoRetryMax; ++attempt) {
      ASSERT_EQ(progress.advance(progress.next_piece(), -error), Verdict::again);
      ASSERT_TRUE(progress.last_was_retry());
      expect_piece(progress, 0, 4096);
    }
    EXPECT_EQ(progress.advance(progress.next_piece(), -error), Verdict::finished);
    EXPECT_FALSE(progress.last_was_retry());
    expect_done(progress, error, 0);
  }
}

TEST(TransferProgressTest, results_without_progress_are_bounded) {
  TransferProgress read = make(IoOp::read, 0, 8192, 4096);
  EXPECT_EQ(read.advance(read.next_piece(), 100), Verdict::again);
  unsigned repeats = 0;
  while (read.advance(read.next_piece(), 50) == Verdict::again) ++repeats;
  EXPECT_EQ(repeats, kIoRetryMax);
  expect_done(read, EIO, 0);

  TransferProgress write = make(IoOp::write, 0, 8192, 4096);
  EXPECT_EQ(write.advance(write.next_piece(), 100), Verdict::again);
  for (repeats = 0; write.advance(write.next_piece(), 100) == Verdict::again; ++repeats) {
  }
  EXPECT_EQ(repeats, kIoRetryMax);
  expect_done(write, EIO, 0);
}

TEST(TransferProgressTest, any_other_error_finishes_with_it) {
  for (const int error : {EIO, ENOSPC, ENOMEM, EBADF, EFAULT, EINVAL}) {
    TransferProgress progress = make(IoOp::write, 0, 4096, 1);
    EXPECT_EQ(progress.advance(progress.next_piece(), 1000), Verdict::again);
    EXPECT_EQ(progress.advance(progress.next_piece(), -error), Verdict::finished);
    expect_done(progress, error, 0);
  }
}

TEST(TransferProgressTest, a_cap_and_the_end_of_a_slice_cut_pieces_to_the_alignment) {
  TransferProgress capped = make(IoOp::read, 0, 8192, 1, 512);
  expect_piece(capped, 0, 512);
  TransferProgress rounded = make(IoOp::read, 0, 16384, 4096, 5000);
  expect_piece(rounded, 0, 4096);
  TransferProgress below = make(IoOp::read, 0, 16384, 4096, 512);  // the smallest direct transfer is a block
  expect_piece(below, 0, 4096);
  const TransferPiece at_slice_end = make(IoOp::read, 0, 16384, 4096).next_piece(8192);
  EXPECT_EQ(at_slice_end.size_bytes, 8192u);
}

// Whatever the kernel does, a request ends: either every byte has been moved from its own place, or there is an error.
TEST(TransferProgressTest, random_results_always_end_with_every_byte_in_place_or_an_error) {
  std::mt19937_64 random(20260101);
  for (int round = 0; round < 1000; ++round) {
    const std::uint32_t align = 1u << (random() % 3 * 6);  // 1, 64, 4096
    const auto size = static_cast<std::uint32_t>((1 + random() % 16) * align);
    const IoOp op = random() % 2 == 0 ? IoOp::read : IoOp::write;
    TransferProgress progress =
        make(op, align * (random() % 100), size, align, static_cast<std::uint32_t>(random() % 9000));
    std::vector<bool> moved(size, false);
    Verdict verdict = Verdict::again;
    for (unsigned steps = 0; verdict == Verdict::again; ++steps) {
      ASSERT_LT(steps, size + kIoRetryMax + 1);
      const TransferPiece piece = progress.next_piece();
      ASSERT_EQ(piece.offset_bytes % align, 0u);
      ASSERT_EQ(piece.size_bytes % align, 0u);
      const int result = random() % 8 == 0 ? -EINTR : static_cast<int>(1 + random() % piece.size_bytes);
      const std::size_t start = piece.offset_bytes - progress.request().offset_bytes;
      if (result > 0) std::fill_n(moved.begin() + static_cast<std::ptrdiff_t>(start), result, true);
      verdict = progress.advance(piece, result);
    }
    const IoCompletion completion = progress.completion();
    ASSERT_EQ(std::count(moved.begin(), moved.begin() + completion.transferred_bytes, false), 0);
    if (op == IoOp::write && completion.error == 0) {
      ASSERT_EQ(completion.transferred_bytes, size);
    }
  }
}

TEST(TransferProgressDeathTest, a_request_that_is_not_aligned_is_a_mistake) {
  EXPECT_DEATH(make(IoOp::read, 100, 4096, 512), "assertion failed");
  EXPECT_DEATH(make(IoOp::read, 0, 100, 512), "assertion failed");
  EXPECT_DEATH(make(IoOp::read, 0, 0, 1), "assertion failed");
}

}  // namespace
}  // namespace tp
