// SPDX-License-Identifier: Apache-2.0
#include "pager/host_mover.hpp"

#include "base/check.hpp"

namespace tp {

bool HostMover::evictable(PageId page) const {
  if (!page.valid()) return false;
  const PageEntry& entry = residency_.table.at(page);
  return entry.state == PageState::device && entry.pins == 0 && !(entry.dirty && !entry.dead && spill_error_);
}

void HostMover::begin_round() {
  residency_.hand_back_discarded(*store_);
  if (residency_.store_may_have_room) spill_error_.reset();
  residency_.store_may_have_room = false;
}

Start HostMover::start(PageId page, Purpose purpose, PageId planned_victim, std::int64_t used_after) {
  const std::size_t limit = purpose == Purpose::prefetch ? prefetch_transfers_max_ : transfers_->capacity();
  if (transfers_->in_flight() + jobs_.size() >= limit) return Start::no_room;
  PageId dropped;
  const std::optional<FrameId> frame = free_a_frame(planned_victim, used_after, dropped);
  if (!frame) return Start::no_frame;
  PageEntry& entry = residency_.table.at(page);
  TP_CHECK(entry.state == PageState::absent);
  entry.frame = *frame;
  residency_.table.set_state(page, entry.backing == Backing::zero ? PageState::host : PageState::reading);
  Counters& counts = residency_.counts;
  ++counts.page_ins;
  ++(purpose == Purpose::prefetch ? counts.prefetches : counts.faults);
  if (entry.backing == Backing::zero) ++counts.zero_fills;
  if (purpose == Purpose::demand) residency_.record(EventKind::fault, page, *frame);
  residency_.record(EventKind::page_in_begin, page, *frame);
  jobs_.push_back({dropped, page, *frame, source_of(entry)});
  return Start::started;
}

std::optional<FrameId> HostMover::free_a_frame(PageId planned_victim, std::int64_t used_after, PageId& dropped) {
  if (host_pool_.free_count() > 0) return host_pool_.take();
  const bool as_planned = evictable(planned_victim) && residency_.dead_pages == 0;
  const PageId victim = as_planned ? planned_victim : residency_.choose_victim(used_after, spill_error_.has_value());
  if (!victim.valid()) return std::nullopt;
  PageEntry& entry = residency_.table.at(victim);
  if (entry.dirty && !entry.dead) {
    if (writebacks_in_flight_ < kWritebacksInFlightMax) begin_writeback(victim);
    return std::nullopt;
  }
  if (entry.dead) residency_.forget_content(victim);
  // Clean: the bytes are on the drive. Its address keeps showing them, read-only, until carry_out unmaps it.
  const FrameId frame = entry.frame;
  entry.frame = FrameId{};
  residency_.table.set_state(victim, PageState::absent);
  residency_.frame_page[frame.value] = PageId{};
  ++residency_.counts.evictions;
  residency_.record(EventKind::evict, victim, frame);
  dropped = victim;
  return frame;
}

void HostMover::begin_writeback(PageId victim) {
  PageEntry& entry = residency_.table.at(victim);
  TP_CHECK(entry.dirty && entry.pins == 0);
  residency_.table.set_state(victim, PageState::copying_out);
  residency_.frame_page[entry.frame.value] = PageId{};
  ++writebacks_in_flight_;
  residency_.record(EventKind::writeback_begin, victim, entry.frame);
  jobs_.push_back({victim, PageId{}, entry.frame, PageSource{}});
}

// ---------------------------------------------------------------- carry out: no lock

void HostMover::carry_out() {
  carrying_.clear();  // what a failing mapping left
  carrying_.swap(jobs_);
  for (const Job& job : carrying_) {
    if (!job.page.valid()) {
      // From the unmap on nobody can write to the page, so what is summed is what is written.
      space_.unmap(host_pool_, job.frame, job.victim, SlotAccess::read_write);
      {
        const std::lock_guard lock(residency_.mutex);
        residency_.table.set_state(job.victim, PageState::host);
      }
      write_back(job.victim, job.frame);
      continue;
    }
    if (job.victim.valid()) space_.unmap(host_pool_, job.frame, job.victim, transfers_->slot_access());
    transfers_->start_page_in(job.page, job.frame, job.source);
  }
  carrying_.clear();
}

// ---------------------------------------------------------------- finish

void HostMover::finish(FinishedTransfer& transfer) {
  if (transfer.kind == TransferKind::writeback) return finish_writeback(transfer);
  if (!transfer.error) return finish_page_in(transfer);
  const std::lock_guard lock(residency_.mutex);
  residency_.table.at(transfer.page).frame = FrameId{};
  residency_.table.set_state(transfer.page, PageState::failed);
  host_pool_.put(transfer.frame);
  residency_.page_failed(transfer.page, *transfer.error);
}

void HostMover::finish_page_in(const FinishedTransfer& transfer) {
  {
    const std::lock_guard lock(residency_.mutex);
    PageEntry& entry = residency_.table.at(transfer.page);
    if (entry.state == PageState::reading) residency_.table.set_state(transfer.page, PageState::host);
    residency_.table.set_state(transfer.page, PageState::copying_in);
  }
  space_.map(host_pool_, transfer.frame, transfer.page);
  const std::lock_guard lock(residency_.mutex);
  PageEntry& entry = residency_.table.at(transfer.page);
  entry.dirty = false;
  if (entry.backing == Backing::quantised) ++residency_.counts.dequantised;
  residency_.record(EventKind::page_in_end, transfer.page, transfer.frame);
  residency_.page_arrived(transfer.page, transfer.frame);
}

void HostMover::finish_writeback(const FinishedTransfer& transfer) {
  if (transfer.error) return writeback_failed(transfer.page, transfer.frame, *transfer.error);
  const std::lock_guard lock(residency_.mutex);
  --writebacks_in_flight_;
  PageEntry& entry = residency_.table.at(transfer.page);
  entry.dirty = false;
  entry.frame = FrameId{};
  residency_.table.set_state(transfer.page, PageState::absent);
  host_pool_.put(transfer.frame);
  ++residency_.counts.evictions;
  residency_.record(EventKind::writeback_end, transfer.page, transfer.frame);
}

void HostMover::writeback_failed(PageId page, FrameId frame, const Error& error) {
  // The only copy of these bytes is the frame: it goes back to its address, still dirty, and nothing is lost.
  {
    const std::lock_guard lock(residency_.mutex);
    if (residency_.table.at(page).state == PageState::writing) residency_.table.set_state(page, PageState::host);
    residency_.table.set_state(page, PageState::copying_in);
    --writebacks_in_flight_;
    ++residency_.counts.failures;
    spill_error_ = error;
    decide_again_ = true;  // who waits for this frame must look for another
  }
  space_.map(host_pool_, frame, page);
  space_.allow_write(page);
  const std::lock_guard lock(residency_.mutex);
  residency_.page_arrived(page, frame);
}

}  // namespace tp
