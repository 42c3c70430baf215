// SPDX-License-Identifier: Apache-2.0
// One entry for every page of the address space: where it is, where its bytes come from, who forbids its eviction.
//
// Residency is one state, changed only by PageTable::set_state, which checks the transition table in page_table.cpp.
//
// On the host there is one tier: `frame` is the frame that is read into and that the address shows. On a device there
// are two: `frame` is of the device, `host_frame` of the host tier, which reads go through. A page that is on the
// device may keep its host frame: then it can leave the device without a copy (unless host_stale) and come back without
// a read.
//
// Threads: every access under the lock of Residency. Blocking: never. Errors: none; a wrong transition is an assertion.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/ids.hpp"
#include "pager/pagefile_root.hpp"

namespace tp {

enum class PageState : std::uint8_t {
  absent,       // only its backing has the bytes
  reading,      // a read into its host frame is in flight
  host,         // its host frame has the bytes; no address shows them
  copying_in,   // its way from the host frame to its address is decided on
  device,       // resident: its address shows the bytes (to a stream: once that has waited for copy_point)
  copying_out,  // leaving its address; on a device the copy to its host frame is in flight
  writing,      // a write of its (modified) bytes is in flight; the frame is immutable
  failed,       // the last transfer failed; the next access tries again
};
inline constexpr std::size_t kPageStateCount = 8;

const char* page_state_name(PageState state) noexcept;
bool page_transition_allowed(PageState from, PageState to) noexcept;

enum class Backing : std::uint8_t {
  zero,        // never written: reads as zeros, no I/O
  checkpoint,  // the user's file, read-only
  spill,       // the page store; checksum and generation below
  quantised,   // our own file, in the form of quantised_page.hpp
};

struct PageEntry {
  PageState state = PageState::absent;
  Backing backing = Backing::zero;
  bool dirty = false;
  bool dead = false;               // dirty, and nobody wants what it holds: Residency::discard
  std::uint16_t file = 0;          // which of the mover's files; which stripe of the page store, for Backing::spill
  std::uint32_t pins = 0;          // acquires not yet released
  std::uint32_t waiters = 0;       // threads that wait for this page
  FrameId frame;                   // one tier: valid from reading to writing; two: from copying_in to copying_out
  FrameId host_frame;              // two tiers only: valid from reading to writing, optional on the device
  bool host_stale = false;         // the device has written since the host frame had the bytes
  std::uint32_t valid_bytes = 0;   // bytes that the backing has; the last page of a file is short
  std::uint32_t generation = 0;    // counts the writebacks, so that a stale page is told from the current one
  std::uint32_t lead_bytes = 0;    // bytes of the page before the backing's first; of a region's first page only
  std::uint64_t offset_bytes = 0;  // in that file
  std::uint64_t checksum = 0;      // XXH3 of the stored bytes, mixed with page and generation
  std::uint64_t last_use = 0;      // tick of the last release, for least recently used when there is no schedule
  // Of a device, points of its timelines (event_timeline.hpp): no frame is taken before both are reached.
  std::uint64_t copy_point = 0;     // the last copy to or from the page
  std::uint64_t release_point = 0;  // the last release

  // Where the page is in the page store; not valid when it is not there.
  Extent stored_at() const noexcept { return backing == Backing::spill ? Extent{file, offset_bytes} : Extent{}; }
  void set_stored(const PageRecord& record) noexcept;  // it is there
};

class PageTable {
 public:
  explicit PageTable(int tiers = 1) : tiers_(tiers) {}
  int tiers() const noexcept { return tiers_; }
  void append(const PageEntry& entry);
  std::size_t size() const noexcept { return entries_.size(); }
  PageEntry& at(PageId page);
  const PageEntry& at(PageId page) const;
  void set_state(PageId page, PageState to);
  bool resident(PageId page) const { return at(page).state == PageState::device; }
  std::uint64_t resident_count() const noexcept { return resident_count_; }

 private:
  void check_frames(const PageEntry& entry, PageState state) const;
  int tiers_;
  std::vector<PageEntry> entries_;
  std::uint64_t resident_count_ = 0;
};

}  // namespace tp
