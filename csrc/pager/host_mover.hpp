// SPDX-License-Identifier: Apache-2.0
// The host's one tier: a page is read into a frame at its slot, and the frame's memory then moves under the page's
// address. A clean victim is dropped in the round that takes its frame. A dirty one leaves its address, is written
// back, and its frame is free when the write is finished. Contract: page_mover.hpp.
#pragma once

#include "mem/host_address_space.hpp"
#include "pager/page_mover.hpp"

namespace tp {

class HostMover final : public PageMover {
 public:
  HostMover(Residency& residency, HostAddressSpace& space, FramePool& pool, MoverOptions options)
      : PageMover(residency, pool, std::move(options)), space_(space) {}

  Start start(PageId page, Purpose purpose, PageId planned_victim, std::int64_t used_after) override;
  bool can_start(PageState state) const noexcept override { return state == PageState::absent; }
  bool frame_free() const override { return host_pool_.free_count() > 0; }
  bool victim_busy(const PageEntry& victim) const noexcept override {
    return victim.pins > 0 || (victim.state != PageState::device && victim.state != PageState::absent);
  }
  bool working() const override { return transfers_->in_flight() > 0 || !jobs_.empty(); }
  void begin_round() override;
  void carry_out() override;
  void poll(std::chrono::nanoseconds timeout) override { poll_transfers(timeout); }

 private:
  struct Job {      // decided under the lock, carried out without it
    PageId victim;  // leaves its address first, if valid
    PageId page;    // comes in, if valid; else the victim is written back
    FrameId frame;
    PageSource source;
  };

  bool evictable(PageId page) const;
  std::optional<FrameId> free_a_frame(PageId planned_victim, std::int64_t used_after, PageId& dropped);
  void begin_writeback(PageId victim);
  void finish(FinishedTransfer& transfer) override;
  void finish_page_in(const FinishedTransfer& transfer);
  void finish_writeback(const FinishedTransfer& transfer);
  void writeback_failed(PageId page, FrameId frame, const Error& error) override;

  HostAddressSpace& space_;
  std::vector<Job> jobs_, carrying_;
};

}  // namespace tp
