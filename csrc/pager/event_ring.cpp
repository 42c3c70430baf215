// SPDX-License-Identifier: Apache-2.0
#include "pager/event_ring.hpp"

#include <unistd.h>

#include <ctime>
#include <iterator>

#include "base/check.hpp"

namespace tp {
namespace {
static_assert(std::size(kEventKindNames) == static_cast<std::size_t>(EventKind::copy_out_end) + 1);
thread_local const std::uint32_t current_thread = static_cast<std::uint32_t>(gettid());
}  // namespace

std::uint64_t monotonic_ns() noexcept {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000u + static_cast<std::uint64_t>(now.tv_nsec);
}

void EventRing::add(EventKind kind, std::int32_t page, std::int32_t frame, std::int64_t step, std::int32_t set) {
  if (events_.empty()) return;
  events_[added_ % events_.size()] = {monotonic_ns(), page, frame, static_cast<std::int32_t>(step), set,
                                      current_thread, kind, {}};
  ++added_;
}

std::vector<Event> EventRing::snapshot() const {
  std::vector<Event> result;
  const std::uint64_t first = overwritten();
  result.reserve(added_ - first);
  for (std::uint64_t i = first; i < added_; ++i) result.push_back(events_[i % events_.size()]);
  TP_CHECK(result.size() <= events_.size());
  return result;
}

}  // namespace tp
