// SPDX-License-Identifier: Apache-2.0
#include "pager/page_table.hpp"

#include "base/check.hpp"

namespace tp {
namespace {

// The transition table. Rows: from; columns: to, in the order of PageState.
//
//   page-in    absent -> reading -> host -> copying_in -> device     (Backing::zero skips the read: absent -> host)
//   evict      device -> copying_out -> host -> absent               (clean: dropped)
//              device -> copying_out -> host -> writing -> absent    (dirty: written back first)
//   failures   reading, host, copying_in -> failed -> absent         (a page-in: the next access starts again)
//              writing -> host -> copying_in -> device               (a writeback: the bytes go back to their address)
constexpr bool kAllowed[kPageStateCount][kPageStateCount] = {
    //                absent reading host   copyin device copyout writing failed
    /* absent      */ {false, true, true, false, false, false, false, false},
    /* reading     */ {false, false, true, false, false, false, false, true},
    /* host        */ {true, false, false, true, false, false, true, true},
    /* copying_in  */ {false, false, false, false, true, false, false, true},
    /* device      */ {false, false, false, false, false, true, false, false},
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
  TP_CHECK(to != PageState::copying_out || entry.pins == 0);
  // Who has a frame: every state between absent and absent, and only those.
  const bool has_frame = to != PageState::absent && to != PageState::failed;
  TP_CHECK(has_frame == entry.frame.valid());
  entry.state = to;
}

}  // namespace tp
