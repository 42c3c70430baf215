// SPDX-License-Identifier: Apache-2.0
#include "io/transfer_blocks.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include "base/limits.hpp"

namespace tp {
namespace {

using Way = TransferBlock::Way;

std::span<std::byte> memory_at(std::uintptr_t address, std::uint64_t size_bytes) {
  return {reinterpret_cast<std::byte*>(address), size_bytes};  // never dereferenced
}

std::vector<TransferBlock> all_blocks(TransferBlocks blocks) {
  std::vector<TransferBlock> all;
  while (const std::optional<TransferBlock> block = blocks.peek()) {
    all.push_back(*block);
    blocks.advance();
  }
  return all;
}

constexpr std::uintptr_t kMemory = 0x10000000;

// What is owed to the file: alignment, sizes; and to the transfer: each of its bytes once, at the right address.
void check_blocks(IoOp op, std::uint64_t offset, std::uintptr_t address, std::uint64_t size, std::uint32_t align,
                  std::uint32_t block_bytes) {
  SCOPED_TRACE(testing::Message() << (op == IoOp::read ? "read" : "write") << " offset " << offset << " address "
                                  << address << " size " << size << " align " << align);
  const TransferBlocks blocks(op, offset, memory_at(address, size), align, block_bytes);
  std::vector<std::pair<std::uint64_t, std::uint64_t>> covered;
  bool cached_seen = false, bounced_seen = false;
  for (const TransferBlock& block : all_blocks(blocks)) {
    ASSERT_GT(block.own_bytes, 0u);
    ASSERT_LE(block.size_bytes, std::max<std::uint32_t>(block_bytes, 2 * kDirectAlignFallbackBytes));
    const std::uint64_t own_offset = block.offset_bytes + block.lead_bytes;
    ASSERT_GE(own_offset, offset);
    ASSERT_EQ(reinterpret_cast<std::uintptr_t>(block.memory), address + (own_offset - offset));
    if (block.way == Way::cached) {
      cached_seen = true;
      ASSERT_EQ(op, IoOp::write);
      ASSERT_GT(align, 1u);
    } else {
      ASSERT_FALSE(cached_seen) << "cached blocks come last";
      ASSERT_EQ(block.offset_bytes % align, 0u);
      ASSERT_EQ(block.size_bytes % align, 0u);
    }
    if (block.way != Way::bounced) {
      ASSERT_EQ(block.own_bytes, block.size_bytes);
      if (block.way == Way::straight) {
        ASSERT_EQ(reinterpret_cast<std::uintptr_t>(block.memory) % align, 0u);
      }
    } else {
      bounced_seen = true;
      if (op == IoOp::write) {
        ASSERT_EQ(block.own_bytes, block.size_bytes) << "a write touches nothing but its own";
      }
    }
    covered.emplace_back(own_offset, own_offset + block.own_bytes);
  }
  std::sort(covered.begin(), covered.end());
  std::uint64_t reached = offset;
  for (const auto& [begin, end] : covered) {
    ASSERT_EQ(begin, reached);
    reached = end;
  }
  ASSERT_EQ(reached, offset + size);
  ASSERT_EQ(blocks.any_cached(), cached_seen);
  ASSERT_EQ(blocks.any_bounced(), bounced_seen);
}

TEST(TransferBlocksTest, every_byte_once_and_every_request_as_the_file_asks) {
  std::mt19937_64 random(7);
  for (const IoOp op : {IoOp::read, IoOp::write}) {
    for (const std::uint32_t align : {1u, 512u, 4096u}) {
      for (const std::uint64_t size : {1u, 511u, 512u, 4095u, 4096u, 4097u, 8191u, 8193u, 65536u, 100'003u}) {
        for (const std::uint64_t offset : {0u, 1u, 512u, 4095u, 4096u, 5000u}) {
          for (const std::uintptr_t misaligned : {0u, 1u, 64u, 512u}) {
            check_blocks(op, offset, kMemory + misaligned, size, align, 16384);
          }
        }
      }
      for (int round = 0; round < 200; ++round) {
        check_blocks(op, random() % 100'000, kMemory + random() % 10'000, 1 + random() % 100'000, align,
                     static_cast<std::uint32_t>(4096 * (1 + random() % 16)));
      }
    }
  }
}

TEST(TransferBlocksTest, what_is_aligned_goes_straight) {
  for (const IoOp op : {IoOp::read, IoOp::write}) {
    const TransferBlocks blocks(op, 8192, memory_at(kMemory, 3 * kMiB), 4096, kMiB);
    EXPECT_FALSE(blocks.any_bounced());
    EXPECT_FALSE(blocks.any_cached());
    EXPECT_EQ(all_blocks(blocks).size(), 3u);
  }
}

TEST(TransferBlocksTest, a_read_bounces_its_ends_alone_where_memory_and_offset_agree) {
  const std::vector<TransferBlock> blocks =
      all_blocks({IoOp::read, 4096 + 100, memory_at(kMemory + 100, 8 * 65536), 4096, 65536});
  ASSERT_EQ(blocks.size(), 9u);
  for (std::size_t at = 0; at < blocks.size(); ++at) {
    const bool end = at == 0 || at + 1 == blocks.size();
    EXPECT_EQ(blocks[at].way, end ? Way::bounced : Way::straight) << at;
  }
  EXPECT_EQ(blocks[0].lead_bytes, 100u);
  EXPECT_EQ(blocks[8].own_bytes, 100u);
}

TEST(TransferBlocksTest, more_than_four_gibibytes) {
  const std::uint64_t size = 5 * kGiB + 3;
  TransferBlocks blocks(IoOp::read, 6 * kGiB + 4096, memory_at(kMemory, size), 4096, kMiB);
  std::uint64_t own = 0, count = 0, end = 0;
  while (const std::optional<TransferBlock> block = blocks.peek()) {
    own += block->own_bytes;
    end = block->offset_bytes + block->lead_bytes + block->own_bytes;
    ++count;
    blocks.advance();
  }
  EXPECT_EQ(own, size);
  EXPECT_EQ(count, 5 * kGiB / kMiB + 1);
  EXPECT_EQ(end, 6 * kGiB + 4096 + size);
}

TEST(TransferBlocksTest, nothing_has_no_blocks) {
  for (const IoOp op : {IoOp::read, IoOp::write}) {
    const TransferBlocks blocks(op, 5, memory_at(kMemory, 0), 4096, 4096);
    EXPECT_FALSE(blocks.peek());
    EXPECT_FALSE(blocks.any_bounced());
    EXPECT_FALSE(blocks.any_cached());
  }
}

}  // namespace
}  // namespace tp
