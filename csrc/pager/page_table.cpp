// SPDX-License-Identifier: Apache-2.0
#include "pager/page_table.hpp"

#include "base/check.hpp"
#include "base/limits.hpp"

namespace tp {
namespace {

// The transition table. Rows: from; columns: to, in the order of PageState.
//
//   page-in    absent -> reading -> host -> copying_in -> device     (Backing::zero skips the read, and on a device the
//                                                                     host frame: absent -> copying_in)
//   evict      device -> absent, or -> host where the host frame has the bytes                 (nothing to be kept)
//              device -> copying_out -> host -> writing -> absent    (dirty: written back, sooner or later)
//   failures   reading, host, copying_in -> failed -> absent         (a page-in: the next access starts again)
//              writing -> host, host -> copying_in -> device         (a writeback: on the host the bytes go back to
//              their
//                                                                     address)
constexpr bool kAllowed[kPageStateCount][kPageStateCount] = {
    //                absent reading host   copyin device copyout writing failed
    /* absent      */ {false, true, true, true, false, false, false, false},
    /* reading     */ {false, false, true, false, false, false, false, true},
    /* host        */ {true, false, false, true, false, false, true, true},
    /* copying_in  */ {false, false, false, false, true, false, false, true},
    /* device      */ {true, false, true, false, false, true, false, false},
    /* copying_out */ {false, false, true, false, false, false, false, false},
    /* writing     */ {true, false, true, false, false, false, false, false},
    /* failed      */ {true, false, false, false, false, false, false, false},
};

}  // namespace

const char* page_state_name(PageState state) noexcept {
  switch (state) {
    case PageState::absent: return "absent";
    case PageState::reading: return "reading";
    case PageState::host: return "host";
    case PageState::copying_in: return "copying_in";
    case PageState::device: return "device";
    case PageState::copying_out: return "copying_out";
    case PageState::writing: return "writing";
    case PageState::failed: return "failed";
  }
  return "unknown";
}

bool page_transition_allowed(PageState from, PageState to) noexcept {
  return kAllowed[static_cast<std::size_t>(from)][static_cast<std::size_t>(to)];
}

void PageEntry::set_stored(const PageRecord& record) noexcept {
  TP_DCHECK(record.extent.valid() && record.extent.stripe < kPagefileDirectoriesMax);
  backing = Backing::spill;
  file = static_cast<std::uint16_t>(record.extent.stripe);
  offset_bytes = record.extent.offset_bytes;
  lead_bytes = 0;
  generation = record.generation;
  checksum = record.checksum;
}

void PageTable::append(const PageEntry& entry) {
  TP_CHECK(entry.state == PageState::absent && entry.pins == 0);
  entries_.push_back(entry);
}

PageEntry& PageTable::at(PageId page) {
  TP_CHECK(page.value < entries_.size());
  return entries_[page.value];
}

const PageEntry& PageTable::at(PageId page) const {
  TP_CHECK(page.value < entries_.size());
  return entries_[page.value];
}

void PageTable::set_state(PageId page, PageState to) {
  PageEntry& entry = at(page);
  TP_CHECK(page_transition_allowed(entry.state, to));
  if (to == PageState::device) ++resident_count_;
  if (entry.state == PageState::device) --resident_count_;
  // A page that is pinned was asked for: it may arrive, but never leave.
  TP_CHECK(entry.state != PageState::device || entry.pins == 0);
  check_frames(entry, to);
  entry.state = to;
}

// Who has which frame.
void PageTable::check_frames(const PageEntry& entry, PageState state) const {
  const bool gone = state == PageState::absent || state == PageState::failed;
  if (tiers_ == 1) {
    TP_CHECK(entry.frame.valid() != gone && !entry.host_frame.valid());
    return;
  }
  const bool on_device =
      state == PageState::copying_in || state == PageState::device || state == PageState::copying_out;
  TP_CHECK(entry.frame.valid() == on_device);
  if (gone) TP_CHECK(!entry.host_frame.valid());
  const bool in_host_tier = state == PageState::reading || state == PageState::host || state == PageState::writing ||
                            state == PageState::copying_out;
  if (in_host_tier) TP_CHECK(entry.host_frame.valid());
}

}  // namespace tp
