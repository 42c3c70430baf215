// SPDX-License-Identifier: Apache-2.0
// A fixed number of frames of physical memory: the hard byte budget of the host tier.
//
// Every frame is frame_bytes of populated memory, 2 MiB huge pages where the kernel gives them, allocated once and
// reused (reading into memory touched for the first time runs at a fraction of the drive's speed). A frame's *slot* is
// its home address: it names the frame for registered I/O for ever, also while the frame's memory is mapped elsewhere
// (AddressSpace).
//
// Threads: none of its own; the executor thread owns it after construction. Counters may be read from any thread.
// Blocking: the constructor populates all memory. Errors: Error(memory) when the kernel or the machine can't give it.
// A budget is a bound: take() on an empty pool is an assertion, so callers ask free_count() first.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/ids.hpp"

namespace tp {

// What the process may do with a frame's memory while it is at its slot.
enum class SlotAccess : std::uint8_t { none, read, read_write };

class FramePool {
 public:
  // slack_bytes: what a frame has more than a page, a multiple of 4 KiB, for reads that start before the page's own
  // first byte. Frames are exactly as large as that; the budget counts the slack too.
  // numa_node: where the memory should lie, -1 for anywhere; a wish, which a kernel without NUMA does not hear.
  FramePool(std::uint64_t budget_bytes, std::size_t page_bytes, std::size_t slack_bytes = 0, int numa_node = -1);
  ~FramePool();
  FramePool(const FramePool&) = delete;
  FramePool& operator=(const FramePool&) = delete;

  std::size_t page_bytes() const noexcept { return page_bytes_; }
  std::size_t frame_bytes() const noexcept { return frame_bytes_; }
  std::size_t frame_count() const noexcept { return frame_count_; }
  std::size_t free_count() const noexcept { return free_.size(); }
  std::span<std::byte> memory() const noexcept { return {base_, frame_count_ * frame_bytes_}; }
  std::byte* slot(FrameId frame) const;

  FrameId take();
  void put(FrameId frame);

  // The access that the memory at the slot has now; set_access changes it when it differs.
  SlotAccess access(FrameId frame) const;
  void set_access(FrameId frame, SlotAccess access);
  // For AddressSpace, which moved the memory away from or back to the slot and knows with which access.
  void note_access(FrameId frame, SlotAccess access);

  std::uint64_t bytes_in_use() const noexcept { return frames_in_use_.load() * frame_bytes_; }
  std::uint64_t bytes_in_use_max() const noexcept { return frames_in_use_max_.load() * frame_bytes_; }

 private:
  void populate(int numa_node);

  std::size_t page_bytes_;
  std::size_t frame_bytes_;
  std::size_t frame_count_;
  std::byte* reservation_ = nullptr;
  std::size_t reservation_bytes_ = 0;
  std::byte* base_ = nullptr;
  std::vector<FrameId> free_;
  std::vector<bool> taken_;
  std::vector<SlotAccess> access_;
  std::atomic<std::uint64_t> frames_in_use_{0};
  std::atomic<std::uint64_t> frames_in_use_max_{0};
};

int protection_flags(SlotAccess access) noexcept;

}  // namespace tp
