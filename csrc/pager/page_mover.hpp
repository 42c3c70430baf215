// SPDX-License-Identifier: Apache-2.0
// How pages move: which frames there are, and the ways between drive, host frame and device frame. The executor decides
// when (executor.hpp); HostMover and DeviceMover know how, on the host's one tier and on a device's two.
//
// A round of the executor has two halves for a mover. With the residency's lock held it decides (begin_round, start,
// read_ahead): tables change, no system call is made. Then, without the lock, carry_out() does what was decided and
// poll() waits for and finishes what was under way.
//
// What both share is here: the drive side. Modified pages are written back to the spill from a host frame at its slot;
// a page that comes back is checked against its checksum. A failed page-in fails those who wait for the page. A failed
// writeback loses nothing: the bytes stay in their frame, and from then on only what needs no writeback is evicted; who
// needs a frame that only a writeback could free gets the spill's error.
//
// Threads: the executor thread. Blocking: poll() alone. Errors: Error of kind memory, device or engine from carry_out()
// and
//   poll() when a mapping or the device fails: then the executor shows nothing any more.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "io/file.hpp"
#include "io/io_queue.hpp"
#include "mem/frame_pool.hpp"
#include "pager/page_store.hpp"
#include "pager/residency.hpp"
#include "pager/transfer.hpp"

namespace tp {

struct MoverOptions {
  std::function<std::unique_ptr<IoQueue>()> make_queue;  // called on the executor thread, which is the queue's owner
  std::function<std::unique_ptr<IoQueue>()> make_direct_queue;  // likewise; none: every page goes through the host tier
  std::uint64_t inflight_bytes = 0;                             // of prefetch
  std::shared_ptr<PageStore> store;
};

enum class Purpose : std::uint8_t { demand, prefetch };

enum class Start : std::uint8_t {
  started,    // on its way to its address
  under_way,  // something that must come first has been started, or is in flight
  no_room,    // enough in flight
  no_frame,   // no frame can be had now
};

inline constexpr std::int64_t kAnyUse = -1;  // used_after: any victim will do

class PageMover {
 public:
  PageMover(Residency& residency, FramePool& host_pool, MoverOptions options);
  virtual ~PageMover() = default;
  PageMover(const PageMover&) = delete;
  PageMover& operator=(const PageMover&) = delete;

  // On the executor thread, before anything else. Throws what setting up the engine or the device throws.
  virtual void open();

  // ---- under the lock
  virtual void begin_round() {}
  // Moves a page that is not at its address on towards it. Its frame is free, or comes from `planned_victim` if that
  // can go, else from any page that is next used after step `used_after`.
  virtual Start start(PageId page, Purpose purpose, PageId planned_victim, std::int64_t used_after) = 0;
  // Whether start() could still do something for a page in this state.
  virtual bool can_start(PageState state) const noexcept = 0;
  virtual bool frame_free() const = 0;
  // Whether a victim is still to be waited for: in use, or on its way. Otherwise it can go, or is gone.
  virtual bool victim_busy(const PageEntry& victim) const noexcept = 0;
  // Whether pages are used later than they are released: by a device.
  virtual bool runs_behind() const noexcept { return false; }
  // What the schedule's coming actions will want, as far ahead as there is room for.
  virtual void read_ahead() {}
  virtual bool working() const = 0;  // something is decided or in flight: a frame may come free
  const std::optional<Error>& spill_error() const noexcept { return spill_error_; }

  // ---- without
  virtual void carry_out() = 0;
  virtual void poll(std::chrono::nanoseconds timeout) = 0;
  // Nothing more will be asked for: waits for what the device still has to do, which need not be polled then.
  virtual void wait_for_device() {}
  // Nothing in flight: memory may be freed.
  virtual bool drained() const { return transfers_->in_flight() == 0; }
  // Something was carried out that decisions depend on: decide again before waiting.
  bool take_decide_again() noexcept { return std::exchange(decide_again_, false); }
  // In a child of fork(): forget what belongs to the parent.
  void abandon() noexcept { static_cast<void>(transfers_.release()); }

  // Under the residency's lock. layout: of a file of quantised pages.
  std::uint16_t add_file(File file, std::optional<QuantisedLayout> layout = std::nullopt);
  // The page's bytes as its backing has them, page_bytes of them. Any thread; blocks on the drive. Error(io).
  void read_backing(const PageEntry& entry, PageId page, std::byte* destination) const;
  IoQueue& io() noexcept { return transfers_->io(); }
  std::uint64_t spill_bytes() const noexcept { return spill_bytes_.load(); }

 protected:
  PageSource source_of(const PageEntry& entry) const;
  // The bytes of `page` are in a host frame at its slot, which nobody can write to. False: writeback_failed() was
  // called.
  bool write_back(PageId page, FrameId host_frame);
  virtual void writeback_failed(PageId page, FrameId frame, const Error& error) = 0;
  virtual void finish(FinishedTransfer& transfer) = 0;
  // With no lock held: waits for I/O and hands every finished transfer to finish(), once the store knows of it.
  void poll_transfers(std::chrono::nanoseconds timeout);

  void end_write(const FinishedTransfer& transfer);

  Residency& residency_;
  FramePool& host_pool_;
  MoverOptions options_;
  struct BackingFile {
    File file;
    std::optional<QuantisedLayout> layout;
  };
  std::deque<BackingFile> files_;  // stable addresses
  std::shared_ptr<PageStore> store_;
  std::vector<std::pair<PageId, PageRecord>> writes_;  // in flight: what the page will be
  std::optional<Error> spill_error_;
  std::unique_ptr<TransferQueue> transfers_;
  std::vector<FinishedTransfer> finished_;
  std::size_t writebacks_in_flight_ = 0;
  std::size_t prefetch_transfers_max_ = 1;
  bool decide_again_ = false;
  std::atomic<std::uint64_t> spill_bytes_{0};
};

inline constexpr std::size_t kWritebacksInFlightMax = 2;

}  // namespace tp
