// SPDX-License-Identifier: Apache-2.0
#include "io/locked_memory.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <utility>

#include "base/check.hpp"

namespace tp {

LockedMemory::LockedMemory(std::uint64_t free_bytes_max) : free_bytes_max_(free_bytes_max) {}

std::span<std::byte> LockedMemory::take(std::size_t size_bytes) {
  TP_CHECK(size_bytes > 0);
  Block block;
  {
    const std::lock_guard lock(mutex_);
    auto best = free_.end();
    for (auto at = free_.begin(); at != free_.end(); ++at) {
      const std::size_t has_bytes = at->memory.span().size();
      // A block twice as large as asked for would keep memory from whoever asks for that much.
      if (has_bytes < size_bytes || has_bytes / 2 > size_bytes) continue;
      if (best == free_.end() || has_bytes < best->memory.span().size()) best = at;
    }
    if (best != free_.end()) {
      block = std::move(*best);
      free_.erase(best);
      counters_.bytes_free -= block.memory.span().size();
    }
  }
  const bool made = block.memory.span().empty();
  if (made) {
    block.memory = HugeMemory(size_bytes);
    block.locked = mlock(block.memory.span().data(), block.memory.span().size()) == 0;
  }
  const std::span<std::byte> memory = block.memory.span();
  const std::lock_guard lock(mutex_);
  if (made) {
    ++counters_.blocks_made;
    if (block.locked) counters_.bytes_locked += memory.size();
  }
  counters_.bytes_taken += memory.size();
  TP_CHECK(taken_.emplace(memory.data(), std::move(block)).second);
  return memory;
}

void LockedMemory::put(std::byte* memory) noexcept {
  std::vector<Block> gone;  // unmapped when the lock is free again
  const std::lock_guard lock(mutex_);
  const auto found = taken_.find(memory);
  if (found == taken_.end()) return;  // of the parent, in a child of fork()
  Block block = std::move(found->second);
  taken_.erase(found);
  const std::size_t size_bytes = block.memory.span().size();
  counters_.bytes_taken -= size_bytes;
  counters_.bytes_free += size_bytes;
  free_.push_back(std::move(block));
  while (counters_.bytes_free > free_bytes_max_) {
    const std::size_t first_bytes = free_.front().memory.span().size();
    counters_.bytes_free -= first_bytes;
    if (free_.front().locked) counters_.bytes_locked -= first_bytes;
    gone.push_back(std::move(free_.front()));
    free_.erase(free_.begin());
  }
}

bool LockedMemory::contains(const std::byte* memory, std::size_t size_bytes) const {
  const std::lock_guard lock(mutex_);
  const auto after = taken_.upper_bound(memory);
  if (after == taken_.begin()) return false;
  const std::span<std::byte> block = std::prev(after)->second.memory.span();
  const auto offset = static_cast<std::size_t>(memory - block.data());
  return offset <= block.size() && size_bytes <= block.size() - offset;
}

bool LockedMemory::starts_at(const std::byte* memory) const {
  const std::lock_guard lock(mutex_);
  return taken_.contains(memory);
}

LockedMemoryCounters LockedMemory::counters() const {
  const std::lock_guard lock(mutex_);
  return counters_;
}

// Never destroyed: tensors may die after everything else. A child makes its own, since another thread may have held the
// lock when it was born, and leaves the parent's alone, since other memory may be where that was.
LockedMemory& locked_memory() {
  struct OfProcess {
    pid_t process = getpid();
    LockedMemory memory;
  };
  static std::atomic<OfProcess*> current{new OfProcess};
  OfProcess* mine = current.load();
  if (mine->process == getpid()) return mine->memory;
  auto* made = new OfProcess;
  return current.compare_exchange_strong(mine, made) ? made->memory : mine->memory;
}

}  // namespace tp
