// SPDX-License-Identifier: Apache-2.0
// A device's two tiers: drive -> host frame -> device frame, several pages at each stage at once, and back for what the
// device wrote. Contract: page_mover.hpp.
//
// Reads run ahead of the device. A read needs a host frame only, so the coming actions' pages are read into the host
// tier as far ahead as it has frames to give; a copy to the device needs a device frame, whose last user the compute
// stream may not be through with yet. So the drive and the link stay busy while the device computes.
//
// The host tier is staging and cache at once. A page keeps its host frame when it has been copied to the device if the
// schedule says so: it knows which page-ins are to find their page there (host_tier_plan.hpp), and reading ahead takes
// only the other frames. A page that the schedule never brings in again (it stays on the device) keeps none for long,
// so what is cached is what the device tier can't hold. With no schedule the least recently used goes. Nothing is read
// again while it is still there.
//
// Quantised pages lie in their host frame as they do in the file, and become numbers on the copy stream: a kernel reads
// codes and scales from the host frame, so only these cross the link. Without kernels the numbers are made on this
// thread once the page is read.
//
// Straight in. Where cuFile is direct, pages of files go from the drive to their device frame, once the host tier is
// full, and unless the schedule says that it will be asked for them again. Such a page has arrived when it is read.
//
// Who waits for whom. A page counts as arrived once its copy is issued; acquire() makes the caller's stream wait for
// it. A frame is taken from a page when nothing pins it, its last copy is done, and every stream that released it is
// past the release (Residency::quiet). Nobody waits for the device as a whole, and no driver call here waits at all.
//
// Threads: the executor thread. Blocking: poll() looks at the device's timelines every kDevicePoll while any is behind.
// Errors: beside page_mover.hpp's: Error(device) once the context is lost; then nothing of the device is asked any
// more,
//   and host frames stay as they are.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "device/copy_queue.hpp"
#include "device/cuda_device.hpp"
#include "device/kernels.hpp"
#include "mem/device_address_space.hpp"
#include "mem/device_frame_pool.hpp"
#include "pager/direct_reader.hpp"
#include "pager/page_mover.hpp"

namespace tp {

// What the mover uses and the pager owns, for longer than it.
struct DeviceTier {
  const CudaDevice& device;
  DeviceAddressSpace& space;
  DeviceFramePool& pool;
  CopyQueue& copies;
  EventTimeline& releases;
  // Null until quantised pages are mapped, and after that where there are none: then the host makes the numbers.
  const std::unique_ptr<Kernels>& kernels;
};

class DeviceMover final : public PageMover {
 public:
  DeviceMover(Residency& residency, FramePool& host_pool, const DeviceTier& tier, MoverOptions options);
  ~DeviceMover() override;

  void open() override;
  void begin_round() override;
  Start start(PageId page, Purpose purpose, PageId planned_victim, std::int64_t used_after) override;
  bool can_start(PageState state) const noexcept override;
  bool frame_free() const override { return tier_.pool.free_count() > 0; }
  bool victim_busy(const PageEntry& victim) const noexcept override;
  bool runs_behind() const noexcept override { return true; }
  void read_ahead() override;
  bool working() const override;
  void carry_out() override;
  void poll(std::chrono::nanoseconds timeout) override;
  void wait_for_device() override;
  bool drained() const override;

 private:
  struct Read {
    PageId page;
    FrameId host_frame;
    PageSource source;
  };
  struct CopyIn {
    PageId page;
    FrameId frame;
    FrameId host_frame;  // invalid: zeros
    std::uint32_t lead_bytes = 0, skip_bytes = 0, valid_bytes = 0;
    const QuantisedLayout* quantised = nullptr;  // the host frame has a record
    std::uint64_t point = 0;
  };
  struct CopyOut {
    PageId page;
    FrameId frame;
    FrameId host_frame;
    std::uint64_t point = 0;
  };
  // An action of the schedule, by its number: a frame may be taken from pages that come in after it.
  static constexpr std::int64_t kBeforeAll = -1;

  Start start_read(PageId page, Purpose purpose, std::int64_t for_action);
  bool goes_direct(PageId page, const PageEntry& entry, std::int64_t for_action) const;
  Start start_direct(PageId page, Purpose purpose, PageId planned_victim, std::int64_t used_after);
  void count_page_in(PageId page, Purpose purpose, FrameId frame);
  Start start_copy(PageId page, Purpose purpose, PageId planned_victim, std::int64_t used_after);
  bool evictable(PageId page) const;
  std::optional<FrameId> free_device_frame(PageId planned_victim, std::int64_t used_after);
  void drop_from_device(PageId victim);
  bool begin_copy_out(PageId victim);
  std::optional<FrameId> free_host_frame(std::int64_t for_action);
  PageId choose_host_victim(std::int64_t for_action) const;
  std::int64_t comes_in_again(PageId page) const;
  std::int64_t host_worth(PageId page, const PageEntry& entry) const;
  std::size_t host_frames_promised() const;
  void give_back_host_frame(PageEntry& entry);
  void take_back_stale_frames();
  bool read_ahead_of(PageId page, std::int64_t for_action);

  void carry_out_direct_reads();
  void poll_direct_reads();
  void finish_direct_read(const DirectReader::Read& read);
  void fail_direct_read(const DirectReader::Read& read, const Error& error);
  void carry_out_copies_in();
  void carry_out_copies_out();
  void finish(FinishedTransfer& transfer) override;
  void finish_read(FinishedTransfer& transfer);
  void finish_writeback(const FinishedTransfer& transfer);
  void writeback_failed(PageId page, FrameId frame, const Error& error) override;
  void poll_device();
  void finish_copies_in();
  void finish_copies_out();
  bool device_behind() const;
  void register_host_memory();

  DeviceTier tier_;
  std::vector<std::byte*> registered_;
  // Decided, not yet carried out.
  std::vector<PageId> leaving_;
  std::vector<CopyIn> copies_in_;
  std::vector<CopyOut> copies_out_;
  std::vector<Read> reads_;
  std::vector<DirectReader::Read> direct_reads_;
  std::vector<std::pair<PageId, FrameId>> writebacks_;
  // Issued, not yet reached; in order.
  std::deque<CopyIn> copies_in_flight_;
  std::deque<CopyOut> copies_out_flight_;
  std::vector<PageId> host_frame_page_;  // by host frame
  std::vector<bool>
      read_for_this_copy_;  // by page: its host frame was filled by a read since the last copy to the device
  const Schedule* read_schedule_ = nullptr;  // whose actions next_read_ counts
  std::int64_t read_from_ = 0;               // its next action when that was last looked at
  std::int64_t next_read_ = 0;
  std::size_t next_initial_read_ = 0;
  std::size_t copies_in_flight_max_;
  std::unique_ptr<DirectReader> direct_;  // null: every page goes through the host tier
  std::vector<DirectReader::Finished> direct_finished_;
  bool lost_ = false;
};

}  // namespace tp
