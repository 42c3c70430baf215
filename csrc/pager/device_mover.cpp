// SPDX-License-Identifier: Apache-2.0
#include "pager/device_mover.hpp"

#include <algorithm>
#include <limits>
#include <string>

#include "base/check.hpp"
#include "base/limits.hpp"

namespace tp {
namespace {

// Between two looks at the device's timelines. A look is one query of the oldest event of each, about a microsecond.
constexpr std::chrono::microseconds kDevicePoll{50};
constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();
// Nobody counts on finding the page there.
constexpr std::int64_t kNotKept = kNever - 1;
// Page-locked in pieces, so that one refusal says how far it came, and no single call holds the driver's lock for long.
constexpr std::size_t kRegisterBytes = 1 * kGiB;
constexpr std::size_t kSmallHostTierFrames = 64;

}  // namespace

DeviceMover::DeviceMover(Residency& residency, FramePool& host_pool, const DeviceTier& tier, MoverOptions options)
    : PageMover(residency, host_pool, std::move(options)),
      tier_(tier),
      host_frame_page_(host_pool.frame_count()),
      copies_in_flight_max_(std::max<std::size_t>(2, options_.inflight_bytes / host_pool.page_bytes())) {}

DeviceMover::~DeviceMover() {
  const CudaDevice::Current current(tier_.device);
  for (std::byte* memory : registered_) tier_.device.driver().cuMemHostUnregister.result(static_cast<void*>(memory));
}

void DeviceMover::open() {
  tier_.device.bind_thread();
  // What this thread asks of the driver is no part of a CUDA graph that another thread captures, and must not spoil it.
  int mode = cuda::kStreamCaptureModeRelaxed;
  tier_.device.driver().cuThreadExchangeStreamCaptureMode(&mode);
  register_host_memory();
  PageMover::open();
  if (options_.make_direct_queue) direct_ = std::make_unique<DirectReader>(options_.make_direct_queue());
}

void DeviceMover::register_host_memory() {
  const std::span<std::byte> memory = host_pool_.memory();
  // Whole frames, so that no copy crosses from one piece to the next.
  const std::size_t piece_bytes =
      std::max<std::size_t>(1, kRegisterBytes / host_pool_.frame_bytes()) * host_pool_.frame_bytes();
  for (std::size_t offset = 0; offset < memory.size(); offset += piece_bytes) {
    const std::size_t size = std::min(piece_bytes, memory.size() - offset);
    const cuda::Result result = tier_.device.driver().cuMemHostRegister.result(
        static_cast<void*>(memory.data() + offset), size, cuda::kHostRegisterPortable | cuda::kHostRegisterDeviceMap);
    if (result != cuda::kSuccess) {
      const Error error = tier_.device.driver().error("cuMemHostRegister", result);
      throw Error(error.kind(),
                  "the host budget of " + std::to_string(memory.size() / kMiB) + " MiB could not be page-locked (" +
                      std::to_string(offset / kMiB) + " MiB could): " + error.what() +
                      "; give a smaller host budget, or raise the limit on locked memory (ulimit -l)",
                  result);
    }
    registered_.push_back(memory.data() + offset);
  }
}

// ---------------------------------------------------------------- decide: under the lock

void DeviceMover::begin_round() {
  residency_.reached = {tier_.copies.arrivals().reached(), tier_.copies.departures().reached(),
                        tier_.releases.reached()};
  if (read_for_this_copy_.size() < residency_.table.size()) read_for_this_copy_.resize(residency_.table.size());
  take_back_stale_frames();
}

bool DeviceMover::can_start(PageState state) const noexcept {
  return state == PageState::absent || state == PageState::reading || state == PageState::host;
}

bool DeviceMover::victim_busy(const PageEntry& victim) const noexcept {
  const bool on_its_way = victim.state == PageState::copying_in || victim.state == PageState::copying_out;
  return victim.pins > 0 || on_its_way || (victim.state == PageState::device && !residency_.quiet(victim));
}

bool DeviceMover::working() const {
  const bool reads_direct = direct_ != nullptr && direct_->in_flight() > 0;
  return transfers_->in_flight() > 0 || reads_direct || device_behind() || !reads_.empty() || !direct_reads_.empty() ||
         !copies_in_.empty() || !copies_out_.empty() || !writebacks_.empty();
}

bool DeviceMover::device_behind() const {
  const CopyQueue& copies = tier_.copies;
  return !lost_ && (copies.arrivals().reached() < copies.arrivals().recorded() ||
                    copies.departures().reached() < copies.departures().recorded() ||
                    tier_.releases.reached() < tier_.releases.recorded());
}

Start DeviceMover::start(PageId page, Purpose purpose, PageId planned_victim, std::int64_t used_after) {
  const PageEntry& entry = residency_.table.at(page);
  TP_CHECK(can_start(entry.state));
  if (entry.state == PageState::reading) return Start::under_way;
  if (entry.state == PageState::absent && entry.backing != Backing::zero) {
    const Tape* tape = residency_.tape.get();
    const bool scheduled = purpose == Purpose::prefetch && tape != nullptr;
    const std::int64_t for_action = scheduled ? tape->next_action : kBeforeAll;
    if (goes_direct(page, entry, for_action)) return start_direct(page, purpose, planned_victim, used_after);
    return start_read(page, purpose, for_action);
  }
  return start_copy(page, purpose, planned_victim, used_after);
}

// Not while the host tier has room to keep pages in, nor those that the next page-in is to find there.
bool DeviceMover::goes_direct(PageId page, const PageEntry& entry, std::int64_t for_action) const {
  if (direct_ == nullptr || entry.backing != Backing::checkpoint || host_pool_.free_count() > 1) return false;
  const Tape* tape = residency_.tape.get();
  if (tape == nullptr) return true;
  const std::int64_t after = std::max(for_action + 1, tape->next_action);
  const auto next = tape->schedule().next_page_in(page, after);
  return !next || !tape->schedule().host_hit(*next);
}

Start DeviceMover::start_direct(PageId page, Purpose purpose, PageId planned_victim, std::int64_t used_after) {
  const std::size_t capacity = direct_->capacity();
  const std::size_t limit = purpose == Purpose::prefetch ? std::max<std::size_t>(1, capacity - 1) : capacity;
  if (direct_->in_flight() + direct_reads_.size() >= limit) return Start::no_room;
  const std::optional<FrameId> frame = free_device_frame(planned_victim, used_after);
  if (!frame) return working() ? Start::under_way : Start::no_frame;
  PageEntry& entry = residency_.table.at(page);
  ++residency_.counts.direct_reads;
  count_page_in(page, purpose, *frame);
  const PageSource source = source_of(entry);
  direct_reads_.push_back({page, *frame, source.file, source.offset_bytes, source.valid_bytes, entry.lead_bytes});
  return Start::started;
}

void DeviceMover::count_page_in(PageId page, Purpose purpose, FrameId frame) {
  Counters& counts = residency_.counts;
  ++counts.page_ins;
  ++(purpose == Purpose::prefetch ? counts.prefetches : counts.faults);
  residency_.table.at(page).frame = frame;
  residency_.table.set_state(page, PageState::copying_in);
  if (purpose == Purpose::demand) residency_.record(EventKind::fault, page, frame);
  residency_.record(EventKind::page_in_begin, page, frame);
}

Start DeviceMover::start_read(PageId page, Purpose purpose, std::int64_t for_action) {
  const std::size_t limit = purpose == Purpose::prefetch ? prefetch_transfers_max_ : transfers_->capacity();
  if (transfers_->in_flight() + reads_.size() + writebacks_.size() >= limit) return Start::no_room;
  // The last one is for a page that has to leave the device so that those read can go there.
  if (host_frames_promised() + 1 == host_pool_.frame_count()) return Start::under_way;
  const std::optional<FrameId> frame = free_host_frame(for_action);
  if (!frame) return working() ? Start::under_way : Start::no_frame;
  PageEntry& entry = residency_.table.at(page);
  entry.host_frame = *frame;
  entry.host_stale = false;
  host_frame_page_[frame->value] = page;
  residency_.table.set_state(page, PageState::reading);
  ++residency_.counts.reads;
  residency_.record(EventKind::read_begin, page, *frame);
  PageSource source = source_of(entry);
  // A direct read starts at a block: the frame gets what lies before the page's first byte too.
  const auto skip = static_cast<std::uint32_t>(source.offset_bytes % kDirectAlignFallbackBytes);
  source.offset_bytes -= skip;
  source.valid_bytes += skip;
  source.dequantised_later = tier_.kernels != nullptr;
  reads_.push_back({page, *frame, source});
  return Start::under_way;
}

Start DeviceMover::start_copy(PageId page, Purpose purpose, PageId planned_victim, std::int64_t used_after) {
  if (purpose == Purpose::prefetch && copies_in_.size() + copies_in_flight_.size() >= copies_in_flight_max_)
    return Start::no_room;
  const std::optional<FrameId> frame = free_device_frame(planned_victim, used_after);
  if (!frame) return working() ? Start::under_way : Start::no_frame;
  PageEntry& entry = residency_.table.at(page);
  CopyIn copy{page, *frame, entry.host_frame, 0, 0, 0, nullptr, 0};
  if (entry.host_frame.valid()) {
    const bool quantised = entry.backing == Backing::quantised;
    const bool whole = entry.dirty || entry.backing == Backing::spill || quantised;  // otherwise what the file has
    if (quantised && !entry.dirty && tier_.kernels != nullptr) copy.quantised = source_of(entry).quantised;
    copy.lead_bytes = whole ? 0 : entry.lead_bytes;
    copy.valid_bytes = whole ? static_cast<std::uint32_t>(host_pool_.page_bytes()) : entry.valid_bytes;
    copy.skip_bytes = whole ? 0 : static_cast<std::uint32_t>(entry.offset_bytes % kDirectAlignFallbackBytes);
  }
  Counters& counts = residency_.counts;
  if (!entry.host_frame.valid()) ++counts.zero_fills;
  if (entry.host_frame.valid() && !read_for_this_copy_[page.value]) ++counts.host_hits;
  read_for_this_copy_[page.value] = false;
  count_page_in(page, purpose, *frame);
  copies_in_.push_back(copy);
  return Start::started;
}

bool DeviceMover::evictable(PageId page) const {
  if (!page.valid()) return false;
  const PageEntry& entry = residency_.table.at(page);
  return entry.state == PageState::device && entry.pins == 0 && residency_.quiet(entry);
}

std::optional<FrameId> DeviceMover::free_device_frame(PageId planned_victim, std::int64_t used_after) {
  if (tier_.pool.free_count() > 0) return tier_.pool.take();
  const PageId victim = evictable(planned_victim) ? planned_victim : residency_.choose_victim(used_after, false);
  if (!victim.valid()) return std::nullopt;
  const PageEntry& entry = residency_.table.at(victim);
  const bool host_has_it = entry.host_frame.valid() && !entry.host_stale;
  if (entry.dirty && !host_has_it) {
    begin_copy_out(victim);
    return std::nullopt;
  }
  const FrameId frame = entry.frame;
  drop_from_device(victim);
  return frame;
}

void DeviceMover::drop_from_device(PageId victim) {
  PageEntry& entry = residency_.table.at(victim);
  const FrameId frame = entry.frame;
  if (entry.host_frame.valid() && entry.host_stale) give_back_host_frame(entry);
  entry.frame = FrameId{};
  residency_.table.set_state(victim, entry.host_frame.valid() ? PageState::host : PageState::absent);
  residency_.frame_page[frame.value] = PageId{};
  ++residency_.counts.evictions;
  residency_.record(EventKind::evict, victim, frame);
  leaving_.push_back(victim);
  // It may be wanted again before the point that reading ahead has come to.
  if (entry.state == PageState::absent) next_read_ = std::min(next_read_, comes_in_again(victim));
}

bool DeviceMover::begin_copy_out(PageId victim) {
  PageEntry& entry = residency_.table.at(victim);
  TP_CHECK(entry.dirty && entry.pins == 0);
  if (copies_out_.size() + copies_out_flight_.size() >= copies_in_flight_max_) return false;
  if (!entry.host_frame.valid()) {
    const std::optional<FrameId> host_frame = free_host_frame(kBeforeAll);
    if (!host_frame) return false;
    entry.host_frame = *host_frame;
    host_frame_page_[host_frame->value] = victim;
  }
  residency_.table.set_state(victim, PageState::copying_out);
  residency_.frame_page[entry.frame.value] = PageId{};
  ++residency_.counts.copies_out;
  residency_.record(EventKind::copy_out_begin, victim, entry.frame);
  copies_out_.push_back({victim, entry.frame, entry.host_frame, 0});
  return true;
}

// Those whose page is being read, or waited for and not yet on its way to the device. Counted in a small tier only: in
// a large one transfers never take them all.
std::size_t DeviceMover::host_frames_promised() const {
  if (host_pool_.frame_count() > kSmallHostTierFrames) return 0;
  return static_cast<std::size_t>(std::count_if(host_frame_page_.begin(), host_frame_page_.end(), [this](PageId page) {
    if (!page.valid()) return false;
    const PageEntry& entry = residency_.table.at(page);
    return entry.state == PageState::reading || (entry.state == PageState::host && entry.pins > 0);
  }));
}

void DeviceMover::give_back_host_frame(PageEntry& entry) {
  host_frame_page_[entry.host_frame.value] = PageId{};
  host_pool_.put(entry.host_frame);
  entry.host_frame = FrameId{};
  entry.host_stale = false;
}

void DeviceMover::take_back_stale_frames() {
  std::vector<PageId>& stale = residency_.stale_host_pages;
  const auto done = [this](PageId page) {
    PageEntry& entry = residency_.table.at(page);
    if (!entry.host_frame.valid() || !entry.host_stale || entry.state != PageState::device) return true;
    if (entry.copy_point > residency_.reached.copies_in) return false;  // the copy still reads it
    give_back_host_frame(entry);
    return true;
  };
  stale.erase(std::remove_if(stale.begin(), stale.end(), done), stale.end());
}

// The number of the next action that brings the page in; kNever when none does.
std::int64_t DeviceMover::comes_in_again(PageId page) const {
  const Tape* tape = residency_.tape.get();
  if (tape == nullptr) return kNever;
  return tape->schedule().next_page_in(page, tape->next_action).value_or(kNever);
}

std::optional<FrameId> DeviceMover::free_host_frame(std::int64_t for_action) {
  if (host_pool_.free_count() > 0) return host_pool_.take();
  const PageId victim = choose_host_victim(for_action);
  if (!victim.valid()) return std::nullopt;
  PageEntry& entry = residency_.table.at(victim);
  if (entry.state == PageState::host && entry.dirty) {
    if (writebacks_in_flight_ >= kWritebacksInFlightMax) return std::nullopt;
    ++writebacks_in_flight_;
    residency_.table.set_state(victim, PageState::writing);
    residency_.record(EventKind::writeback_begin, victim, entry.host_frame);
    writebacks_.emplace_back(victim, entry.host_frame);
    return std::nullopt;
  }
  const FrameId frame = entry.host_frame;
  entry.host_frame = FrameId{};
  entry.host_stale = false;
  host_frame_page_[frame.value] = PageId{};
  if (entry.state == PageState::host) {
    residency_.table.set_state(victim, PageState::absent);
    next_read_ = std::min(next_read_, comes_in_again(victim));
  }
  return frame;
}

// Which action finds the page in its host frame: the larger, the less the frame is worth.
std::int64_t DeviceMover::host_worth(PageId page, const PageEntry& entry) const {
  const bool on_device = entry.state == PageState::device;
  if (on_device && entry.host_stale) return kNever;
  const Tape* tape = residency_.tape.get();
  if (tape == nullptr) return on_device ? kNever : kNotKept;
  const std::int64_t action = comes_in_again(page);
  if (action == kNever) return kNever;
  const bool read_ahead = !on_device && read_for_this_copy_[page.value];
  return read_ahead || tape->schedule().host_hit(action) ? action : kNotKept;
}

// The page whose host frame is worth least; of equals the least recently used. Only the action whose turn it is may
// take a frame that another one counts on.
PageId DeviceMover::choose_host_victim(std::int64_t for_action) const {
  const Tape* tape = residency_.tape.get();
  const bool may_take_kept = for_action == kBeforeAll || tape == nullptr || for_action <= tape->next_action;
  PageId best;
  std::pair<std::int64_t, std::int64_t> best_rank{std::numeric_limits<std::int64_t>::min(), 0};
  for (const PageId page : host_frame_page_) {
    if (!page.valid()) continue;
    const PageEntry& entry = residency_.table.at(page);
    const bool on_device = entry.state == PageState::device;
    if (!on_device && entry.state != PageState::host) continue;
    if (entry.copy_point > residency_.reached.copies_in) continue;  // the copy still reads it
    if (!on_device && entry.pins > 0) continue;                     // somebody waits for it
    if (!on_device && entry.dirty && spill_error_) continue;
    const std::pair<std::int64_t, std::int64_t> rank{host_worth(page, entry),
                                                     -static_cast<std::int64_t>(entry.last_use)};
    if (rank.first < kNotKept && (rank.first <= for_action || !may_take_kept)) continue;
    if (!best.valid() || rank > best_rank) {
      best = page;
      best_rank = rank;
    }
  }
  return best;
}

void DeviceMover::read_ahead() {
  const Tape* tape = residency_.tape.get();
  if (tape == nullptr || lost_) return;
  // Another schedule, or the same one from its start.
  if (&tape->schedule() != read_schedule_ || tape->next_action < read_from_) {
    read_schedule_ = &tape->schedule();
    next_read_ = tape->next_action;
    next_initial_read_ = tape->next_initial;
  }
  read_from_ = tape->next_action;
  const std::span<const PageId> initial = tape->schedule().initial_pages();
  next_initial_read_ = std::max(next_initial_read_, tape->next_initial);
  for (; next_initial_read_ < initial.size(); ++next_initial_read_) {
    if (!read_ahead_of(initial[next_initial_read_], kBeforeAll)) return;
  }
  // Not further than the host tier could hold, nor than a cycle: beyond, it would only turn round.
  const std::int64_t count = tape->schedule().action_count();
  const std::int64_t end = tape->next_action + std::min(count, static_cast<std::int64_t>(host_pool_.frame_count()));
  next_read_ = std::max(next_read_, tape->next_action);
  for (; next_read_ < end; ++next_read_) {
    if (!read_ahead_of(tape->schedule().action(next_read_).page_in, next_read_)) return;
  }
}

// False when no more can be read now.
bool DeviceMover::read_ahead_of(PageId page, std::int64_t for_action) {
  const PageEntry& entry = residency_.table.at(page);
  if (entry.state != PageState::absent || entry.backing == Backing::zero) return true;
  if (goes_direct(page, entry, for_action)) return true;  // it needs no host frame
  return start_read(page, Purpose::prefetch, for_action) == Start::under_way && entry.state == PageState::reading;
}

// ---------------------------------------------------------------- carry out: no lock

void DeviceMover::carry_out() {
  if (lost_) {
    leaving_.clear(), copies_in_.clear(), copies_out_.clear(), reads_.clear(), writebacks_.clear();
    direct_reads_.clear();
    return;
  }
  // Reads first: they take longest, and nothing below waits.
  for (const Read& read : reads_) transfers_->start_page_in(read.page, read.host_frame, read.source);
  reads_.clear();
  for (const auto& [page, host_frame] : writebacks_) write_back(page, host_frame);
  writebacks_.clear();
  try {
    tier_.space.unmap(leaving_);
    leaving_.clear();
    carry_out_direct_reads();
    carry_out_copies_in();
    carry_out_copies_out();
  } catch (const Error&) {
    lost_ = true;  // which address shows what is no longer certain
    throw;
  }
}

void DeviceMover::carry_out_direct_reads() {
  if (direct_reads_.empty()) return;
  std::vector<PageMapping> mappings;
  for (const DirectReader::Read& read : direct_reads_) mappings.push_back({read.page, read.frame});
  tier_.space.map(tier_.pool, mappings);
  for (const DirectReader::Read& read : direct_reads_) {
    try {
      direct_->start(read, tier_.space.address(read.page));
    } catch (const Error& error) {  // the engine refuses the file
      direct_finished_.push_back({read, error});
    }
  }
  direct_reads_.clear();
}

void DeviceMover::poll_direct_reads() {
  if (direct_ == nullptr) return;
  direct_->poll(direct_finished_);
  if (!lost_) {
    for (const DirectReader::Finished& finished : direct_finished_) {
      if (finished.error) {
        fail_direct_read(finished.read, *finished.error);
      } else {
        finish_direct_read(finished.read);
      }
    }
  }
  direct_finished_.clear();
}

void DeviceMover::finish_direct_read(const DirectReader::Read& read) {
  std::byte* address = tier_.space.address(read.page);
  const std::size_t end = read.lead_bytes + read.size_bytes, page_bytes = host_pool_.page_bytes();
  CopyIn zeros{read.page, read.frame, FrameId{}, 0, 0, 0, nullptr, 0};
  if (read.lead_bytes > 0) tier_.copies.zero(address, read.lead_bytes);
  if (end < page_bytes) tier_.copies.zero(address + end, page_bytes - end);
  if (end - read.lead_bytes < page_bytes) zeros.point = tier_.copies.end_to_device();
  const std::lock_guard lock(residency_.mutex);
  residency_.table.at(read.page).copy_point = zeros.point;
  residency_.page_arrived(read.page, read.frame);
  if (zeros.point > 0) {
    copies_in_flight_.push_back(zeros);
  } else {
    residency_.record(EventKind::page_in_end, read.page, read.frame);
  }
}

void DeviceMover::fail_direct_read(const DirectReader::Read& read, const Error& error) {
  PageId page = read.page;
  tier_.space.unmap({&page, 1});
  const std::lock_guard lock(residency_.mutex);
  PageEntry& entry = residency_.table.at(page);
  entry.frame = FrameId{};
  tier_.pool.put(read.frame);
  residency_.table.set_state(page, PageState::failed);
  residency_.page_failed(page, error);
}

void DeviceMover::carry_out_copies_in() {
  if (copies_in_.empty()) return;
  std::vector<PageMapping> mappings;
  for (const CopyIn& copy : copies_in_) mappings.push_back({copy.page, copy.frame});
  tier_.space.map(tier_.pool, mappings);
  for (CopyIn& copy : copies_in_) {
    std::byte* address = tier_.space.address(copy.page);
    const std::size_t end = copy.lead_bytes + copy.valid_bytes;
    // The frame held another page before: what the backing does not cover must not show it.
    if (copy.lead_bytes > 0) tier_.copies.zero(address, copy.lead_bytes);
    if (copy.quantised != nullptr) {
      tier_.copies.dequantise(*tier_.kernels, address, host_pool_.slot(copy.host_frame), *copy.quantised,
                              host_pool_.page_bytes());
    } else if (copy.valid_bytes > 0) {
      tier_.copies.to_device(address + copy.lead_bytes, host_pool_.slot(copy.host_frame) + copy.skip_bytes,
                             copy.valid_bytes);
    }
    if (end < host_pool_.page_bytes()) tier_.copies.zero(address + end, host_pool_.page_bytes() - end);
    copy.point = tier_.copies.end_to_device();
  }
  const std::lock_guard lock(residency_.mutex);
  for (const CopyIn& copy : copies_in_) {
    PageEntry& entry = residency_.table.at(copy.page);
    entry.copy_point = copy.point;
    if (copy.quantised != nullptr) {
      ++residency_.counts.dequantised;
      ++residency_.counts.dequantised_on_device;
    }
    residency_.page_arrived(copy.page, copy.frame);
    copies_in_flight_.push_back(copy);
  }
  copies_in_.clear();
}

void DeviceMover::carry_out_copies_out() {
  for (CopyOut& copy : copies_out_) {
    tier_.copies.to_host(host_pool_.slot(copy.host_frame), tier_.space.address(copy.page), host_pool_.page_bytes());
    copy.point = tier_.copies.end_to_host();
    copies_out_flight_.push_back(copy);
  }
  copies_out_.clear();
}

// ---------------------------------------------------------------- finish

void DeviceMover::poll(std::chrono::nanoseconds timeout) {
  const bool reads_direct = direct_ != nullptr && (direct_->in_flight() > 0 || !direct_finished_.empty());
  poll_transfers(device_behind() || reads_direct ? std::min<std::chrono::nanoseconds>(timeout, kDevicePoll) : timeout);
  if (lost_) return poll_direct_reads();
  try {
    poll_direct_reads();
    poll_device();
  } catch (const Error&) {
    lost_ = true;
    throw;
  }
}

void DeviceMover::poll_device() {
  tier_.copies.arrivals().poll();
  tier_.copies.departures().poll();
  tier_.releases.poll();
  finish_copies_in();
  finish_copies_out();
}

void DeviceMover::finish_copies_in() {
  const std::uint64_t reached = tier_.copies.arrivals().reached();
  if (copies_in_flight_.empty() || copies_in_flight_.front().point > reached) return;
  const std::lock_guard lock(residency_.mutex);
  while (!copies_in_flight_.empty() && copies_in_flight_.front().point <= reached) {
    residency_.record(EventKind::page_in_end, copies_in_flight_.front().page, copies_in_flight_.front().frame);
    copies_in_flight_.pop_front();
  }
}

void DeviceMover::finish_copies_out() {
  const std::uint64_t reached = tier_.copies.departures().reached();
  std::vector<CopyOut> done;
  while (!copies_out_flight_.empty() && copies_out_flight_.front().point <= reached) {
    done.push_back(copies_out_flight_.front());
    copies_out_flight_.pop_front();
  }
  if (done.empty()) return;
  std::vector<PageId> pages;
  for (const CopyOut& copy : done) pages.push_back(copy.page);
  tier_.space.unmap(pages);
  const std::lock_guard lock(residency_.mutex);
  for (const CopyOut& copy : done) {
    PageEntry& entry = residency_.table.at(copy.page);
    entry.frame = FrameId{};
    entry.host_stale = false;
    residency_.table.set_state(copy.page, PageState::host);
    read_for_this_copy_[copy.page.value] = false;
    tier_.pool.put(copy.frame);
    ++residency_.counts.evictions;
    residency_.record(EventKind::copy_out_end, copy.page, copy.frame);
    residency_.record(EventKind::evict, copy.page, copy.frame);
  }
}

void DeviceMover::finish(FinishedTransfer& transfer) {
  if (transfer.kind == TransferKind::writeback) return finish_writeback(transfer);
  finish_read(transfer);
}

void DeviceMover::finish_read(FinishedTransfer& transfer) {
  const std::lock_guard lock(residency_.mutex);
  PageEntry& entry = residency_.table.at(transfer.page);
  if (transfer.error) {
    give_back_host_frame(entry);
    residency_.table.set_state(transfer.page, PageState::failed);
    residency_.page_failed(transfer.page, *transfer.error);
    return;
  }
  residency_.table.set_state(transfer.page, PageState::host);
  entry.dirty = false;
  if (entry.backing == Backing::quantised && tier_.kernels == nullptr) ++residency_.counts.dequantised;
  read_for_this_copy_[transfer.page.value] = true;
  residency_.record(EventKind::read_end, transfer.page, transfer.frame);
}

void DeviceMover::finish_writeback(const FinishedTransfer& transfer) {
  if (transfer.error) return writeback_failed(transfer.page, transfer.frame, *transfer.error);
  const std::lock_guard lock(residency_.mutex);
  --writebacks_in_flight_;
  PageEntry& entry = residency_.table.at(transfer.page);
  entry.dirty = false;
  residency_.record(EventKind::writeback_end, transfer.page, transfer.frame);
  if (entry.pins > 0) {  // asked for meanwhile: it is here already
    residency_.table.set_state(transfer.page, PageState::host);
    return;
  }
  give_back_host_frame(entry);
  residency_.table.set_state(transfer.page, PageState::absent);
}

void DeviceMover::writeback_failed(PageId page, FrameId, const Error& error) {
  const std::lock_guard lock(residency_.mutex);
  residency_.table.set_state(page, PageState::host);  // still dirty, and nothing is lost
  --writebacks_in_flight_;
  ++residency_.counts.failures;
  spill_error_ = error;
  decide_again_ = true;
}

void DeviceMover::wait_for_device() {
  if (lost_ || !device_behind()) return;
  try {
    poll_device();  // what is through needs no wait for all streams, which would spoil a capture on any of them
    if (!device_behind()) return;
    const cuda::Result result = tier_.device.driver().cuCtxSynchronize.result();
    if (result == cuda::kErrorStreamCaptureUnsupported) return;  // some stream is captured: it is polled for instead
    if (result != cuda::kSuccess) throw tier_.device.driver().error("cuCtxSynchronize", result);
  } catch (const Error&) {
    lost_ = true;
    throw;
  }
  tier_.copies.arrivals().all_reached();
  tier_.copies.departures().all_reached();
  tier_.releases.all_reached();
  finish_copies_in();
  finish_copies_out();
}

bool DeviceMover::drained() const {
  if (transfers_->in_flight() > 0 || (direct_ != nullptr && direct_->in_flight() > 0)) return false;
  return lost_ || !device_behind();
}

}  // namespace tp
