// SPDX-License-Identifier: Apache-2.0
// What tests of IoQueues share: memory aligned for direct I/O, files with a pattern, and a loop that keeps a queue
// full.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "base/check.hpp"
#include "io/io_queue.hpp"
#include "io/wake_event.hpp"
#include "tests/test_files.hpp"

namespace tp::test {

// Anonymous memory; starts at a page of the machine.
class Memory {
 public:
  explicit Memory(std::size_t size_bytes) : size_bytes_(size_bytes) {
    void* mapped = mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TP_CHECK(mapped != MAP_FAILED);
    base_ = static_cast<std::byte*>(mapped);
  }
  ~Memory() { munmap(base_, size_bytes_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  std::byte* at(std::size_t offset) const { return base_ + offset; }
  std::span<std::byte> span() const { return {base_, size_bytes_}; }

 private:
  std::byte* base_ = nullptr;
  std::size_t size_bytes_;
};

inline std::byte pattern_byte(std::uint64_t offset, std::uint64_t salt = 0) {
  return static_cast<std::byte>(pattern(offset / 8, salt) >> (offset % 8 * 8));  // little-endian
}

inline void fill_pattern(std::span<std::byte> memory, std::uint64_t offset, std::uint64_t salt = 0) {
  for (std::size_t at = 0; at < memory.size(); ++at) memory[at] = pattern_byte(offset + at, salt);
}

// The first byte that differs from the pattern of a PatternFile at offset, or memory.size().
inline std::size_t first_wrong(std::span<const std::byte> memory, std::uint64_t offset, std::uint64_t salt = 0) {
  for (std::size_t at = 0; at < memory.size(); ++at) {
    if (memory[at] != pattern_byte(offset + at, salt)) return at;
  }
  return memory.size();
}

// Runs all requests, never more than the queue's depth in flight. Completions by token; each token completes once.
inline std::map<std::uint64_t, IoCompletion> run_all(IoQueue& queue, std::span<const IoRequest> requests) {
  std::map<std::uint64_t, IoCompletion> by_token;
  std::vector<IoCompletion> completions;
  std::size_t submitted = 0;
  while (by_token.size() < requests.size()) {
    const std::size_t in_flight = submitted - by_token.size();
    const std::size_t room = std::min<std::size_t>(queue.depth() - in_flight, requests.size() - submitted);
    if (room > 0) queue.submit(requests.subspan(submitted, room));
    submitted += room;
    completions.clear();
    queue.wait(completions, kWaitForever);
    for (const IoCompletion& completion : completions) {
      TP_CHECK(by_token.emplace(completion.token, completion).second);
    }
  }
  return by_token;
}

}  // namespace tp::test
