// SPDX-License-Identifier: Apache-2.0
// The last events of a pager, for traces and pictures. Fixed size: the oldest are overwritten and counted.
// Threads: under the lock of Residency. Blocking: never. Errors: none.
#pragma once

#include <cstdint>
#include <vector>

namespace tp {

enum class EventKind : std::uint8_t {
  page_in_begin,
  page_in_end,
  evict,
  writeback_begin,
  writeback_end,
  acquire_begin,
  acquire_end,
  release,
  stall_begin,
  stall_end,
  fault,
  read_begin,  // into the host tier of a device: frame is of the host tier
  read_end,
  copy_out_begin,
  copy_out_end,
};
inline constexpr const char* kEventKindNames[] = {"page_in_begin", "page_in_end",    "evict",       "writeback_begin",
                                                  "writeback_end", "acquire_begin",  "acquire_end", "release",
                                                  "stall_begin",   "stall_end",      "fault",       "read_begin",
                                                  "read_end",      "copy_out_begin", "copy_out_end"};

struct Event {
  std::uint64_t time_ns;  // CLOCK_MONOTONIC
  std::int32_t page;      // -1: none
  std::int32_t frame;     // -1: none
  std::int32_t step;      // absolute step, -1: off schedule
  std::int32_t set;       // -1: none
  std::uint32_t thread;   // kernel thread id
  EventKind kind;
  std::uint8_t padding[3];
};
static_assert(sizeof(Event) == 32);

class EventRing {
 public:
  explicit EventRing(std::size_t capacity) : events_(capacity) {}
  void add(EventKind kind, std::int32_t page, std::int32_t frame, std::int64_t step, std::int32_t set);
  std::vector<Event> snapshot() const;  // oldest first
  std::uint64_t added() const noexcept { return added_; }
  std::uint64_t overwritten() const noexcept { return added_ > events_.size() ? added_ - events_.size() : 0; }
  void clear() noexcept { added_ = 0; }

 private:
  std::vector<Event> events_;
  std::uint64_t added_ = 0;
};

std::uint64_t monotonic_ns() noexcept;

}  // namespace tp
