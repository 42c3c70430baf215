// SPDX-License-Identifier: Apache-2.0
#include "pager/host_tier_plan.hpp"

#include <cstdint>
#include <set>
#include <unordered_map>

namespace tp {
namespace {

// The first cycle fills the tier, and after the second what is kept repeats or changes no count.
constexpr std::size_t kCycles = 3;

// What MIN finds in one cycle need not be what it can find in every cycle: it may change from one to the next. Going
// once around with all that was found, the page that is kept longest goes wherever there are too many.
void drop_what_does_not_fit(std::vector<bool>& hits, const std::vector<std::uint64_t>& next, std::size_t frame_count) {
  const std::size_t count = hits.size();
  std::set<std::uint64_t> kept;
  for (std::size_t i = 0; i < count; ++i) {
    if (next[i] >= count && hits[next[i] - count]) kept.insert(next[i] - count);
  }
  const auto drop = [&] {
    while (kept.size() > frame_count) {
      hits[*kept.rbegin() % count] = false;
      kept.erase(std::prev(kept.end()));
    }
  };
  drop();
  for (std::size_t i = 0; i < count; ++i) {
    kept.erase(i);
    if (hits[next[i] % count]) kept.insert(next[i]);
    drop();
  }
}

}  // namespace

std::vector<bool> plan_host_hits(std::span<const PageId> page_ins, std::size_t frame_count) {
  const std::size_t count = page_ins.size();
  std::vector<bool> hits(count, false);
  if (count == 0 || frame_count == 0) return hits;
  // For each page-in, the next one of the same page: later in this cycle, or in the next.
  std::vector<std::uint64_t> next(count);
  std::unordered_map<PageId, std::uint64_t> later;
  for (std::size_t i = 2 * count; i-- > 0;) {
    if (i < count) next[i] = later[page_ins[i]];
    later[page_ins[i % count]] = i;
  }
  std::set<std::uint64_t> kept;  // page-ins that will find their page, as numbers that run on across cycles
  for (std::size_t cycle = 0; cycle < kCycles; ++cycle) {
    for (std::size_t i = 0; i < count; ++i) {
      hits[i] = kept.erase(cycle * count + i) > 0;
      kept.insert(cycle * count + next[i]);
      if (kept.size() > frame_count) kept.erase(std::prev(kept.end()));
    }
  }
  drop_what_does_not_fit(hits, next, frame_count);
  return hits;
}

}  // namespace tp
