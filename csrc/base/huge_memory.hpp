// SPDX-License-Identifier: Apache-2.0
// Anonymous memory for transfers: all of it there from the start, in huge pages where it is large enough and the kernel
// gives them. From 2 MiB on it starts and ends at a multiple of that, below it at a page of the machine.
//
// Threads: none of its own once made. Blocking: making it touches all of it, with every core. Fork: a child has no
// mapping there (copy-on-write during direct I/O would split parent and child; open(2), NOTES). Errors: Error(memory).
#pragma once

#include <cstddef>
#include <span>

namespace tp {

// Touches all of the memory, which starts at a page of the machine: 0, or an errno value.
int populate(std::span<std::byte> memory);

class HugeMemory {
 public:
  HugeMemory() = default;
  explicit HugeMemory(std::size_t size_bytes);
  HugeMemory(HugeMemory&& other) noexcept;
  HugeMemory& operator=(HugeMemory&& other) noexcept;
  HugeMemory(const HugeMemory&) = delete;
  HugeMemory& operator=(const HugeMemory&) = delete;
  ~HugeMemory();

  std::span<std::byte> span() const noexcept { return memory_; }  // as much as was asked for, or more; empty by default

 private:
  std::span<std::byte> mapping_;
  std::span<std::byte> memory_;
};

}  // namespace tp
