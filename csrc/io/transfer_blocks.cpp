// SPDX-License-Identifier: Apache-2.0
#include "io/transfer_blocks.hpp"

#include <algorithm>
#include <bit>

#include "base/check.hpp"
#include "base/limits.hpp"

namespace tp {
namespace {

// A page of the page cache: what a cached write and a direct one must not share.
constexpr std::uint32_t kCachePageBytes = kDirectAlignFallbackBytes;

std::uint64_t round_down(std::uint64_t bytes, std::uint64_t unit) { return bytes / unit * unit; }
std::uint64_t round_up(std::uint64_t bytes, std::uint64_t unit) { return round_down(bytes + unit - 1, unit); }

}  // namespace

TransferBlocks::TransferBlocks(IoOp op, std::uint64_t offset_bytes, std::span<std::byte> memory,
                               std::uint32_t align_bytes, std::uint32_t block_bytes)
    : op_(op),
      own_{offset_bytes, offset_bytes + memory.size()},
      memory_(memory.data()),
      memory_align_bytes_(align_bytes),
      block_bytes_(block_bytes) {
  TP_CHECK(std::has_single_bit(align_bytes) && align_bytes <= kCachePageBytes);
  TP_CHECK(block_bytes > 0 && block_bytes <= kRequestBytesMax && block_bytes % kCachePageBytes == 0);
  TP_CHECK(own_.end_bytes >= own_.begin_bytes);
  if (own_.empty()) return;
  if (op_ == IoOp::read || align_bytes == 1) {
    direct_ = {round_down(own_.begin_bytes, align_bytes), round_up(own_.end_bytes, align_bytes)};
    return;
  }
  direct_ = {round_up(own_.begin_bytes, kCachePageBytes), round_down(own_.end_bytes, kCachePageBytes)};
  if (direct_.empty()) {
    head_ = own_;  // less than two pages
    return;
  }
  head_ = {own_.begin_bytes, direct_.begin_bytes};
  tail_ = {direct_.end_bytes, own_.end_bytes};
}

std::optional<TransferBlock> TransferBlocks::peek() const {
  if (!direct_.empty()) {
    const Range range{direct_.begin_bytes, std::min(direct_.begin_bytes + block_bytes_, direct_.end_bytes)};
    const bool inside = range.begin_bytes >= own_.begin_bytes && range.end_bytes <= own_.end_bytes;
    return block_of(range,
                    inside && aligned(range.begin_bytes) ? TransferBlock::Way::straight : TransferBlock::Way::bounced);
  }
  if (!head_.empty()) return block_of(head_, TransferBlock::Way::cached);
  if (!tail_.empty()) return block_of(tail_, TransferBlock::Way::cached);
  return std::nullopt;
}

void TransferBlocks::advance() {
  if (!direct_.empty()) {
    direct_.begin_bytes = std::min(direct_.begin_bytes + block_bytes_, direct_.end_bytes);
  } else if (!head_.empty()) {
    head_ = {};
  } else {
    TP_CHECK(!tail_.empty());
    tail_ = {};
  }
}

bool TransferBlocks::any_bounced() const {
  if (direct_.empty()) return false;
  const bool inside = direct_.begin_bytes >= own_.begin_bytes && direct_.end_bytes <= own_.end_bytes;
  return !inside || !aligned(direct_.begin_bytes);
}

bool TransferBlocks::any_cached() const { return !head_.empty() || !tail_.empty(); }

TransferBlock TransferBlocks::block_of(Range range, TransferBlock::Way way) const {
  const std::uint64_t own_begin_bytes = std::max(range.begin_bytes, own_.begin_bytes);
  const std::uint64_t own_end_bytes = std::min(range.end_bytes, own_.end_bytes);
  TransferBlock block;
  block.way = way;
  block.offset_bytes = range.begin_bytes;
  block.size_bytes = static_cast<std::uint32_t>(range.end_bytes - range.begin_bytes);
  block.lead_bytes = static_cast<std::uint32_t>(own_begin_bytes - range.begin_bytes);
  block.own_bytes = static_cast<std::uint32_t>(own_end_bytes - own_begin_bytes);
  block.memory = memory_ + (own_begin_bytes - own_.begin_bytes);
  TP_CHECK(own_begin_bytes < own_end_bytes);
  TP_CHECK(way == TransferBlock::Way::bounced || block.own_bytes == block.size_bytes);
  return block;
}

// Of the memory for the byte at an offset that is inside of the transfer.
bool TransferBlocks::aligned(std::uint64_t offset_bytes) const {
  return (reinterpret_cast<std::uintptr_t>(memory_) + (offset_bytes - own_.begin_bytes)) % memory_align_bytes_ == 0;
}

}  // namespace tp
