// SPDX-License-Identifier: Apache-2.0
// Huge-page memory for buffers that files are read into and written from over and over: taken once, given back, and
// taken again without being faulted in anew. Locked in RAM (mlock) where the limit on that allows it.
//
// Threads: any. Blocking: take() touches memory that is new. Errors: Error(memory). Fork: memory is not there in a
// child; a child has a pool of its own, and what the parent took means nothing to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <span>
#include <vector>

#include "base/huge_memory.hpp"

namespace tp {

struct LockedMemoryCounters {
  std::uint64_t bytes_taken = 0;   // by who has not given them back
  std::uint64_t bytes_free = 0;    // kept for the next
  std::uint64_t bytes_locked = 0;  // of both
  std::uint64_t blocks_made = 0;   // not counting those taken again
};

class LockedMemory {
 public:
  // free_bytes_max: more than this is not kept; what was given back first goes back to the system first.
  explicit LockedMemory(std::uint64_t free_bytes_max = std::uint64_t{1} << 30);

  // At least size_bytes, from a multiple of 2 MiB on (of 4 KiB when smaller than that). What it holds is undefined.
  std::span<std::byte> take(std::size_t size_bytes);
  void put(std::byte* memory) noexcept;                                  // what take() gave
  bool contains(const std::byte* memory, std::size_t size_bytes) const;  // in one block that is taken
  bool starts_at(const std::byte* memory) const;                         // of a block that is taken
  LockedMemoryCounters counters() const;

 private:
  struct Block {
    HugeMemory memory;
    bool locked = false;
  };

  const std::uint64_t free_bytes_max_;
  mutable std::mutex mutex_;  // guards the rest
  std::map<const std::byte*, Block> taken_;
  std::vector<Block> free_;  // in the order in which they came back
  LockedMemoryCounters counters_;
};

// The one of this process: what one handle made, another reads into.
LockedMemory& locked_memory();

}  // namespace tp
