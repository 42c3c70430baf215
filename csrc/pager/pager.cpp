// SPDX-License-Identifier: Apache-2.0
#include "pager/pager.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <exception>
#include <limits>
#include <string>
#include <tuple>

#include "base/check.hpp"
#include "device/cufile.hpp"
#include "device/mapping_cost.hpp"
#include "io/cufile_queue.hpp"
#include "io/probe.hpp"
#include "pager/device_mover.hpp"
#include "pager/fault_handler.hpp"
#include "pager/host_mover.hpp"
#include "pager/page_size.hpp"
#include "pager/spill.hpp"

namespace tp {
namespace {

constexpr std::size_t kDemandTransfers = 4;  // beside the prefetches in flight
constexpr std::size_t kDevicePageBytesMax = 32 * kMiB;
constexpr std::size_t kHostFramesWanted = 16;    // nor the host's budget fewer than so many
constexpr std::size_t kDeviceFramesWanted = 64;  // a page is no larger than leaves the budget so many
// What a direct read of a page takes in beyond its two ends.
constexpr std::size_t kHostSlackBytes = kDirectAlignFallbackBytes;

// Nobody may wait for a device while a graph is captured: what may be in use then stays until the process ends.
template <class Things>
void keep_for_ever(Things things) {
  static std::mutex mutex;
  static auto* const kept = new std::vector<std::unique_ptr<Things>>;
  const std::lock_guard lock(mutex);
  kept->push_back(std::make_unique<Things>(std::move(things)));
}

void check_pagefile(const PagerOptions& options) {
  if (options.pagefile == nullptr) return;
  if (options.device) throw Error(ErrorKind::invalid, "a pagefile is for the host; a device pages to spill so far");
  if (checked_page_bytes(options.page_bytes, options.budget_bytes) == options.pagefile->page_bytes()) return;
  throw Error(ErrorKind::invalid, "the pagefile has pages of " + std::to_string(options.pagefile->page_bytes()) +
                                      " bytes; this pager's have " +
                                      std::to_string(checked_page_bytes(options.page_bytes, options.budget_bytes)));
}

std::uint64_t host_budget_of(const DeviceOptions& wanted) {
  return wanted.host_budget_bytes != 0 ? wanted.host_budget_bytes : kHostBudgetDefault;
}

std::size_t device_page_bytes(const PagerOptions& options, const CudaDevice& device) {
  const std::size_t granularity = device.facts().granularity_bytes;
  if (options.page_bytes != 0) {
    const std::size_t page_bytes = checked_page_bytes(options.page_bytes, options.budget_bytes);
    if (page_bytes % granularity == 0) return page_bytes;
    throw Error(ErrorKind::invalid, "page_bytes is " + std::to_string(page_bytes) + "; device '" + device.facts().name +
                                        "' maps multiples of " + std::to_string(granularity) + " bytes");
  }
  std::size_t page_bytes_max = std::max(kPageBytesMin, granularity);
  const std::uint64_t host_bytes = host_budget_of(*options.device);
  const std::uint64_t smaller_budget =
      std::min(options.budget_bytes, host_bytes * kDeviceFramesWanted / kHostFramesWanted);
  while (page_bytes_max < kDevicePageBytesMax && smaller_budget / (2 * page_bytes_max) >= kDeviceFramesWanted)
    page_bytes_max *= 2;
  return choose_page_bytes(measure_mapping_cost(device, page_bytes_max), measure_link_bandwidth(device));
}

// host_frames: the frames that transfers go through.
MoverOptions mover_options(const PagerOptions& options, std::size_t page_bytes, std::size_t frame_bytes,
                           std::size_t host_frames) {
  MoverOptions result;
  const std::uint64_t on_device = std::max<std::uint64_t>(kInflightBytesDefault, kDeviceInflightPages * page_bytes);
  const std::uint64_t usual = options.device ? on_device : kInflightBytesDefault;
  const std::uint64_t wanted = options.inflight_bytes != 0 ? options.inflight_bytes : usual;
  const std::size_t transfers =
      std::clamp<std::size_t>(wanted / page_bytes, 1, std::max<std::size_t>(1, host_frames / 2));
  result.inflight_bytes = transfers * page_bytes;
  if (options.pagefile != nullptr) {
    result.store = options.pagefile;
  } else {
    result.store = std::make_shared<Spill>(options.spill_directory, page_bytes);
  }
  IoQueueOptions queue_options;
  const std::size_t requests =
      (transfers + kDemandTransfers) * ((frame_bytes + kIoRequestBytesMax - 1) / kIoRequestBytesMax);
  queue_options.depth = static_cast<unsigned>(std::max<std::size_t>(requests, options.io_depth));
  if (queue_options.depth > kIoDepthMax) {
    throw Error(ErrorKind::invalid, "inflight_bytes and io_depth ask for " + std::to_string(queue_options.depth) +
                                        " requests in flight; at most " + std::to_string(kIoDepthMax) +
                                        " are possible");
  }
  result.make_queue = options.make_queue ? options.make_queue : [engine = options.engine, queue_options] {
    return make_io_queue(engine, queue_options);
  };
  return result;
}

}  // namespace

Pager::Pager(const PagerOptions& options) : fork_generation_(fork_generation()) {
  count_forks();
  check_pagefile(options);
  pagefile_ = options.pagefile;
  if (pagefile_ == nullptr) spill_directory_ = options.spill_directory;
  if (options.device) {
    make_device_tiers(options);
  } else {
    make_host_tier(options);
  }
  executor_->start();
  io_facts_ = executor_->io_facts();
  if (host_space_ != nullptr) attach_fault_handler(*space_, *residency_);
}

void Pager::make_host_tier(const PagerOptions& options) {
  page_bytes_ = checked_page_bytes(options.page_bytes, options.budget_bytes);
  frame_count_ = options.budget_bytes / page_bytes_;
  if (frame_count_ < 2 * kFaultFrames) {
    throw Error(ErrorKind::budget, "the budget of " + std::to_string(options.budget_bytes / kMiB) +
                                       " MiB is too small; at least " +
                                       std::to_string(2 * kFaultFrames * page_bytes_ / kMiB) +
                                       " MiB are needed with pages of " + std::to_string(page_bytes_ / kMiB) + " MiB");
  }
  auto space = std::make_shared<HostAddressSpace>(page_bytes_);
  host_space_ = space.get();
  space_ = std::move(space);
  pool_ = std::make_unique<FramePool>(options.budget_bytes, page_bytes_);
  residency_ = std::make_unique<Residency>(*space_, frame_count_, options.event_capacity);
  MoverOptions for_mover = mover_options(options, page_bytes_, pool_->frame_bytes(), frame_count_);
  make_queue_ = for_mover.make_queue;
  executor_ = std::make_unique<Executor>(
      *residency_, std::make_unique<HostMover>(*residency_, *host_space_, *pool_, std::move(for_mover)));
}

void Pager::make_device_tiers(const PagerOptions& options) {
  const DeviceOptions& wanted = *options.device;
  const CudaDriver& driver = wanted.driver != nullptr ? *wanted.driver : CudaDriver::system();
  device_ = std::make_shared<CudaDevice>(driver, wanted.ordinal);
  device_memory_is_host_memory_ = wanted.memory_is_host_memory;
  kernel_image_ = wanted.kernels;
  page_bytes_ = device_page_bytes(options, *device_);
  const std::uint64_t host_bytes = host_budget_of(wanted);
  pool_ = std::make_unique<FramePool>(host_bytes, page_bytes_, kHostSlackBytes, device_->facts().host_numa_node);
  host_budget_bytes_ = pool_->frame_count() * pool_->frame_bytes();
  auto space = std::make_shared<DeviceAddressSpace>(device_, page_bytes_);
  device_space_ = space.get();
  space_ = std::move(space);
  device_pool_ = std::make_unique<DeviceFramePool>(device_, options.budget_bytes, page_bytes_);
  frame_count_ = device_pool_->frame_count();
  copies_ = std::make_unique<CopyQueue>(device_);
  releases_ = std::make_unique<EventTimeline>(device_);
  residency_ = std::make_unique<Residency>(*space_, frame_count_, options.event_capacity, 2);
  streams_ = std::make_unique<StreamOrder>(device_, *copies_, *releases_, *residency_);
  MoverOptions for_mover = mover_options(options, page_bytes_, pool_->frame_bytes(), pool_->frame_count());
  choose_transport(wanted, for_mover);
  // Staging: what reads ahead of the copies, and what is being copied.
  const std::size_t staging = for_mover.inflight_bytes / page_bytes_ + kDeviceInflightPages;
  host_cache_frames_ = pool_->frame_count() - std::min(staging, pool_->frame_count() / 2);
  executor_ = std::make_unique<Executor>(
      *residency_,
      std::make_unique<DeviceMover>(*residency_, *pool_,
                                    DeviceTier{*device_, *device_space_, *device_pool_, *copies_, *releases_, kernels_},
                                    std::move(for_mover)));
}

void Pager::choose_transport(const DeviceOptions& wanted, MoverOptions& options) {
  transport_ = "host";
  transport_reason_ = "asked for";
  if (wanted.transport == Transport::host_tier) return;
  const std::string library_path = wanted.cufile_library.empty() ? kCufileLibrary : wanted.cufile_library;
  if (wanted.transport == Transport::automatic && access(kNvidiaFsStatistics, F_OK) != 0) {
    // Not even opened: that starts threads of cuFile's, and a log file in the working directory.
    transport_reason_ = std::string("cuFile is not direct: the kernel module nvidia-fs is not loaded (there is no ") +
                        kNvidiaFsStatistics + ")";
    return;
  }
  const CufileFacts facts = probe_cufile(library_path);
  if (wanted.transport == Transport::automatic && !facts.direct) {
    transport_reason_ = "cuFile is not direct: " + facts.reason;
    return;
  }
  if (!facts.usable) throw Error(ErrorKind::engine, "transport cufile was asked for: " + facts.reason);
  transport_ = "cufile";
  transport_reason_ = facts.reason;
  IoQueueOptions queue_options;
  options.make_direct_queue = [queue_options, library_path, device = device_] {
    return make_cufile_queue(queue_options, Cufile::load(library_path), *device);
  };
}

Pager::~Pager() {
  close();
  if (fork_generation() != fork_generation_) abandon_device();
  if (host_space_ != nullptr) detach_fault_handler(*residency_);
}

// In a child of fork(), where no call of CUDA works: what belongs to the parent's device is forgotten.
void Pager::abandon_device() noexcept {
  if (device_ == nullptr) return;
  static_cast<void>(executor_.release());  // its mover would unregister host memory
  static_cast<void>(streams_.release());
  static_cast<void>(kernels_.release());
  static_cast<void>(releases_.release());
  static_cast<void>(copies_.release());
  static_cast<void>(device_pool_.release());
  static_cast<void>(new std::shared_ptr<AddressSpace>(std::move(space_)));
  static_cast<void>(new std::shared_ptr<CudaDevice>(std::move(device_)));
}

void Pager::throw_if_unusable() const {
  if (fork_generation() != fork_generation_) {
    throw Error(ErrorKind::forked,
                "this pager belongs to the parent process: a child of fork() has neither its memory nor its I/O "
                "thread. Load the model in the "
                "child, or start workers with the 'spawn' method");
  }
  if (closed_.load(std::memory_order_relaxed)) {
    throw Error(ErrorKind::closed, "the pager is closed: its model's weights are no longer in memory; load it again");
  }
}

Region Pager::map_file(const std::string& path, std::uint64_t aligned_offset_bytes) {
  throw_if_unusable();
  File file = File::open_checkpoint(path, DirectPolicy::optional);
  const std::uint64_t size_bytes = file.size_bytes();
  if (size_bytes == 0) throw Error(ErrorKind::io, path + " is empty", EINVAL);
  if (device_ != nullptr && file.align_bytes() > kDirectAlignFallbackBytes)
    file = File::open_checkpoint(path, DirectPolicy::disabled);  // the frames' slack is less than its blocks
  const std::size_t misaligned = aligned_offset_bytes % kTensorAlignBytes;
  const std::uint32_t lead_bytes =
      device_ == nullptr ? 0 : static_cast<std::uint32_t>((kTensorAlignBytes - misaligned) % kTensorAlignBytes);
  const std::lock_guard lock(sets_mutex_);
  const PageRange pages = space_->reserve((lead_bytes + size_bytes + page_bytes_ - 1) / page_bytes_);
  std::uint16_t index = 0;
  {
    const std::lock_guard residency_lock(residency_->mutex);
    index = executor_->add_file(std::move(file));
  }
  append_region_pages(pages, size_bytes, lead_bytes, Backing::checkpoint, index);
  return {space_->address(PageId{pages.first}) + lead_bytes, size_bytes, pages};
}

Region Pager::map_spill(std::uint64_t size_bytes) {
  throw_if_unusable();
  if (size_bytes == 0) throw Error(ErrorKind::invalid, "map_spill: size_bytes is 0");
  const std::lock_guard lock(sets_mutex_);
  const PageRange pages = space_->reserve((size_bytes + page_bytes_ - 1) / page_bytes_);
  append_region_pages(pages, size_bytes, 0, Backing::zero, 0);
  return {space_->address(PageId{pages.first}), size_bytes, pages};
}

Region Pager::map_quantised(QuantisedFile file) {
  throw_if_unusable();
  if (file.given_away()) throw Error(ErrorKind::invalid, "the quantised file was given to a pager already");
  if (file.record_count() == 0) throw Error(ErrorKind::invalid, "map_quantised: the file has no pages");
  if (file.page_bytes() != page_bytes_) {
    throw Error(ErrorKind::invalid, "map_quantised: the file is for pages of " + std::to_string(file.page_bytes()) +
                                        " bytes; this pager's have " + std::to_string(page_bytes_));
  }
  const std::uint64_t count = file.record_count();
  const auto stride_bytes = static_cast<std::uint32_t>(record_bytes(file.layout(), page_bytes_));
  const std::lock_guard lock(sets_mutex_);
  load_kernels();
  const PageRange pages = space_->reserve(count);
  std::vector<PageEntry> entries(count);
  {
    const std::lock_guard residency_lock(residency_->mutex);
    const QuantisedLayout layout = file.layout();
    const std::uint16_t index = executor_->add_file(std::move(file.file()), layout);
    for (std::size_t i = 0; i < entries.size(); ++i) {
      entries[i].backing = Backing::quantised;
      entries[i].file = index;
      entries[i].offset_bytes = i * stride_bytes;
      entries[i].valid_bytes = stride_bytes;
    }
  }
  if (pagefile_ != nullptr) pagefile_->attach(PageId{pages.first}, entries);
  residency_->append_pages(entries);
  return {space_->address(PageId{pages.first}), count * page_bytes_, pages};
}

void Pager::load_kernels() {
  if (device_ == nullptr || kernels_ != nullptr || !quantised_reason_.empty()) return;
  std::unique_ptr<Kernels> loaded;
  std::string reason;
  try {
    loaded = std::make_unique<Kernels>(device_, kernel_image_);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::engine) throw;
    reason = error.what();
  }
  const std::lock_guard lock(residency_->mutex);
  kernels_ = std::move(loaded);
  quantised_reason_ = reason;
}

std::string Pager::quantised_reason() const {
  const std::lock_guard lock(residency_->mutex);
  return quantised_reason_;
}

void Pager::append_region_pages(PageRange pages, std::uint64_t size_bytes, std::uint32_t lead_bytes, Backing backing,
                                std::uint16_t file) {
  std::vector<PageEntry> entries(pages.count);
  std::uint64_t offset_bytes = 0;  // in the backing
  for (std::size_t i = 0; i < entries.size(); ++i) {
    PageEntry& entry = entries[i];
    entry.backing = backing;
    entry.file = file;
    entry.lead_bytes = i == 0 ? lead_bytes : 0;
    entry.offset_bytes = offset_bytes;
    entry.valid_bytes =
        static_cast<std::uint32_t>(std::min<std::uint64_t>(page_bytes_ - entry.lead_bytes, size_bytes - offset_bytes));
    offset_bytes += entry.valid_bytes;
  }
  if (pagefile_ != nullptr) pagefile_->attach(PageId{pages.first}, entries);
  residency_->append_pages(entries);
}

std::vector<PageId> Pager::pages_of(const std::vector<AddressRange>& ranges) const {
  std::vector<PageId> pages;
  for (const AddressRange& range : ranges) {
    if (range.size_bytes == 0) continue;
    const PageId first = space_->find(range.address);
    const PageId last = space_->find(range.address + (range.size_bytes - 1));
    const bool inside = first.valid() && last.valid() && last >= first &&
                        (last.value - first.value) <= range.size_bytes / space_->page_bytes() + 1;
    if (!inside)
      throw Error(ErrorKind::invalid,
                  "a range of " + std::to_string(range.size_bytes) + " bytes lies outside the pager's address space");
    for (std::uint32_t page = first.value; page <= last.value; ++page) pages.push_back(PageId{page});
  }
  std::sort(pages.begin(), pages.end());
  pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
  return pages;
}

SetId Pager::intern_set(std::vector<PageId> pages, const std::string& name) {
  const auto known = set_by_pages_.find(pages);
  if (known != set_by_pages_.end()) return known->second;
  const SetId id = residency_->add_set(name, pages);
  set_by_pages_.emplace(std::move(pages), id);
  return id;
}

SetId Pager::add_set(const std::vector<AddressRange>& ranges, const std::string& name) {
  throw_if_unusable();
  const std::lock_guard lock(sets_mutex_);
  return intern_set(pages_of(ranges), name);
}

const PageSet& Pager::set(SetId id) const { return residency_->set(id); }

void Pager::acquire(SetId id, const Residency::Interrupted& interrupted, cuda::Stream stream) {
  throw_if_unusable();
  if (streams_ != nullptr) streams_->refuse_capture(stream);
  if (!recorder_.off()) {
    recorder_.acquired(id);
    if (recorder_.dry()) return;
  }
  const std::uint64_t copy_point = residency_->acquire(id, AcquireKind::step, interrupted);
  if (streams_ == nullptr) return;
  try {
    streams_->wait_for_copies(stream, copy_point);
  } catch (...) {
    residency_->release(id);
    throw;
  }
}

void Pager::release(SetId id, cuda::Stream stream) {
  if (!recorder_.off()) {
    recorder_.released(id);
    if (recorder_.dry()) return;
  }
  if (fork_generation() != fork_generation_) return;  // an acquire of the parent's, nothing to give back here
  if (streams_ == nullptr || closed_.load(std::memory_order_relaxed)) return residency_->release(id);
  streams_->release(id, stream);
}

void Pager::synchronize(cuda::Stream stream) {
  throw_if_unusable();
  if (streams_ == nullptr) return;
  streams_->refuse_capture(stream);
  const CudaDevice::Current current(*device_);
  device_->driver().cuStreamSynchronize(stream);
}

GateFacts Pager::probe_gates(cuda::Stream stream) {
  throw_if_unusable();
  if (streams_ == nullptr) return {false, "the host has no CUDA graphs"};
  streams_->refuse_capture(stream);
  const std::lock_guard lock(gated_graph_mutex_);
  return tp::probe_gates(device_, stream, {copies_->stream_to_device(), copies_->stream_to_host()},
                         device_pool_->handle(FrameId{0}), page_bytes_);
}

std::unique_ptr<GatedGraph> Pager::make_gated_graph(cuda::Stream stream, std::size_t steps_max,
                                                    std::chrono::milliseconds stuck_after) {
  const GateFacts facts = probe_gates(stream);
  if (!facts.usable) {
    throw Error(ErrorKind::engine,
                "a CUDA graph can't wait for pages on this stream: " + facts.reason + ". Capture in pieces instead");
  }
  return std::make_unique<GatedGraph>(GatedGraphParts{device_, *copies_, *releases_, *residency_, gated_graph_mutex_},
                                      stream, steps_max, stuck_after);
}

void Pager::mark_written(SetId id) {
  throw_if_unusable();
  if (!recorder_.off() && recorder_.dry()) return;
  residency_->mark_written(id);
}

std::size_t Pager::discard(AddressRange range) {
  throw_if_unusable();
  if (!recorder_.off() && recorder_.dry()) return 0;
  std::vector<PageId> pages = pages_of({range});
  const auto partly = [&](PageId page) {
    const std::byte* begin = space_->address(page);
    return begin < range.address || begin + page_bytes_ > range.address + range.size_bytes;
  };
  pages.erase(std::remove_if(pages.begin(), pages.end(), partly), pages.end());
  recorder_.note(ContentChange::ended, pages);
  return residency_->discard(pages);
}

void Pager::wanted(AddressRange range) {
  throw_if_unusable();
  const std::vector<PageId> pages = pages_of({range});
  recorder_.note(ContentChange::modified, pages);
  residency_->wanted(pages);
}

void Pager::note_modified(AddressRange range) {
  throw_if_unusable();
  recorder_.note(ContentChange::modified, pages_of({range}));
}

std::optional<SetId> Pager::hold(AddressRange range, const Residency::Interrupted& interrupted, cuda::Stream stream) {
  throw_if_unusable();
  if (streams_ != nullptr) streams_->refuse_capture(stream);
  SetId id;
  std::size_t page_count = 0;
  {
    const std::lock_guard lock(sets_mutex_);
    const PageId first = space_->find(range.address);
    const PageId last = range.size_bytes == 0 ? first : space_->find(range.address + (range.size_bytes - 1));
    if (!first.valid() || !last.valid()) {
      throw Error(ErrorKind::invalid,
                  "a range of " + std::to_string(range.size_bytes) + " bytes lies outside the pager's address space");
    }
    page_count = last.value - first.value + 1;
    const std::uint64_t key = static_cast<std::uint64_t>(first.value) << 32 | last.value;
    const auto known = set_by_range_.find(key);
    if (known != set_by_range_.end()) {
      id = known->second;
    } else {
      id = intern_set(pages_of({range}),
                      "access to pages " + std::to_string(first.value) + "-" + std::to_string(last.value));
      set_by_range_.emplace(key, id);
    }
  }
  if (!recorder_.off()) {
    recorder_.acquired(id);
    if (recorder_.dry()) return id;
  }
  if (device_ == nullptr && !residency_->try_fit(page_count)) return std::nullopt;
  const std::uint64_t copy_point = residency_->acquire(id, AcquireKind::stray, interrupted);
  if (streams_ == nullptr) return id;
  try {
    streams_->wait_for_copies(stream, copy_point);
  } catch (...) {
    residency_->release(id);
    throw;
  }
  return id;
}

void Pager::read_without_device(AddressRange range, std::byte* destination) const {
  throw_if_unusable();
  TP_CHECK(device_ != nullptr);
  const std::lock_guard close_lock(close_mutex_);  // the frames stay
  throw_if_unusable();
  std::vector<std::byte> page_copy(page_bytes_);
  for (const PageId page : pages_of({range})) {
    std::unique_lock lock(residency_->mutex);
    const PageEntry entry = residency_->table.at(page);
    const bool record_only = entry.backing == Backing::quantised && !entry.dirty;
    const bool host_has_it = entry.host_frame.valid() && !entry.host_stale && entry.state != PageState::reading &&
                             entry.state != PageState::copying_out && !record_only;
    if (host_has_it) {
      const bool whole = entry.dirty || entry.backing == Backing::spill;
      const std::byte* slot = pool_->slot(entry.host_frame);
      std::fill(page_copy.begin(), page_copy.end(), std::byte{0});
      if (whole) {
        std::copy_n(slot, page_bytes_, page_copy.begin());
      } else {
        std::copy_n(slot + entry.offset_bytes % kDirectAlignFallbackBytes, entry.valid_bytes,
                    page_copy.begin() + entry.lead_bytes);
      }
    }
    lock.unlock();
    if (!host_has_it && entry.dirty) {
      throw Error(ErrorKind::device, "page " + std::to_string(page.value) +
                                         " was modified on the device, which has its only copy; it is lost with the "
                                         "context");
    }
    if (!host_has_it) executor_->read_backing(entry, page, page_copy.data());
    const std::byte* begin = std::max<const std::byte*>(range.address, space_->address(page));
    const std::byte* end =
        std::min<const std::byte*>(range.address + range.size_bytes, space_->address(page) + page_bytes_);
    std::copy(page_copy.data() + (begin - space_->address(page)), page_copy.data() + (end - space_->address(page)),
              destination + (begin - range.address));
  }
}

std::unique_ptr<Ticket> Pager::prefetch(SetId id) {
  throw_if_unusable();
  return std::make_unique<Ticket>(*residency_, id);
}

void Pager::wait(Ticket& ticket, const Residency::Interrupted& interrupted, cuda::Stream stream) {
  if (streams_ != nullptr) streams_->refuse_capture(stream);
  const std::uint64_t copy_point = ticket.wait(interrupted);
  if (streams_ != nullptr) streams_->wait_for_copies(stream, copy_point);
}

void Pager::release(Ticket& ticket, cuda::Stream stream) {
  if (fork_generation() != fork_generation_) return;
  if (streams_ == nullptr || closed_.load(std::memory_order_relaxed)) return ticket.release();
  streams_->release(ticket, stream);
}

void Pager::begin_pass() {
  throw_if_unusable();
  if (!recorder_.off() && recorder_.dry()) return;
  residency_->begin_pass();
}

Schedule Pager::make_schedule(const ScheduleArrays& arrays) const {
  throw_if_unusable();
  std::vector<std::vector<PageId>> set_pages;
  const std::size_t sets = residency_->set_count();
  for (std::uint32_t id = 0; id < sets; ++id) set_pages.push_back(residency_->set(SetId{id}).pages);
  return Schedule(arrays, set_pages, space_->page_count(), frame_count_, host_cache_frames_);
}

void Pager::set_schedule(const ScheduleArrays& arrays) { residency_->set_schedule(make_schedule(arrays)); }

ScheduleId Pager::add_schedule(const ScheduleArrays& arrays, ScheduleKind kind) {
  return residency_->add_schedule(make_schedule(arrays), kind);
}

void Pager::follow_schedule(ScheduleId id) {
  throw_if_unusable();
  residency_->follow_schedule(id);
}

void Pager::forget_schedule(ScheduleId id) {
  throw_if_unusable();
  residency_->forget_schedule(id);
}

void Pager::clear_schedule() {
  throw_if_unusable();
  residency_->set_schedule(std::nullopt);
}

IoQueueCounters Pager::all_io_counters() const {
  IoQueueCounters result = executor_ ? executor_->io_counters() : io_counters_at_close_;
  return result += io_counters_of_flushes_;
}

IoQueueCounters Pager::io_counters() const {
  const std::lock_guard lock(close_mutex_);
  IoQueueCounters result = all_io_counters();
  return result -= io_counters_at_reset_;
}

void Pager::reset_statistics() {
  const std::lock_guard lock(close_mutex_);
  io_counters_at_reset_ = all_io_counters();
  residency_->reset_statistics();
}

std::uint64_t Pager::bytes_in_use_max() const {
  const std::lock_guard lock(close_mutex_);
  if (device_pool_) return device_pool_->bytes_in_use_max();
  return pool_ && device_ == nullptr ? pool_->bytes_in_use_max() : bytes_in_use_max_at_close_;
}

std::uint64_t Pager::host_bytes_in_use_max() const {
  const std::lock_guard lock(close_mutex_);
  return pool_ && device_ != nullptr ? pool_->bytes_in_use_max() : host_bytes_in_use_max_at_close_;
}

std::uint64_t Pager::spill_bytes() const {
  const std::lock_guard lock(close_mutex_);
  return executor_ ? executor_->spill_bytes() : spill_bytes_at_close_;
}

void Pager::close() noexcept {
  const std::lock_guard commit_lock(commit_mutex_);
  const std::lock_guard lock(close_mutex_);
  if (closed_.exchange(true)) return;
  if (fork_generation() != fork_generation_) {
    // The executor's thread and the ring are the parent's: what remains here is left to the end of the process.
    executor_->abandon();
    static_cast<void>(executor_.release());
    static_cast<void>(pool_.release());
    static_cast<void>(device_pool_.release());
    static_cast<void>(copies_.release());
    static_cast<void>(releases_.release());
    return;
  }
  executor_->stop();
  io_counters_at_close_ = executor_->io_counters();
  spill_bytes_at_close_ = executor_->spill_bytes();
  if (pagefile_ != nullptr) commit_number_at_close_ = pagefile_->commit_number();
  if (device_ != nullptr) {
    close_device();
    return;
  }
  bytes_in_use_max_at_close_ = pool_->bytes_in_use_max();
  retire_fault_handler(*residency_);
  host_space_->discard();
  // The ring goes before the memory it may have registered. Residency stays: late callers get Error(closed) from it.
  executor_.reset();
  pool_.reset();
  pagefile_.reset();  // and somebody else may open it
}

void Pager::close_device() noexcept {
  bytes_in_use_max_at_close_ = device_pool_->bytes_in_use_max();
  host_bytes_in_use_max_at_close_ = pool_->bytes_in_use_max();
  // After a lost context every call fails, and what it would free is gone with the context: no result is looked at.
  const CudaDevice::Current current(*device_);
  const CudaDevice::OutsideCapture outside(*device_);
  // Once, for what was acquired and never released, and for what is in flight after a failing call: nothing may run on
  // memory that is taken away now. Fails at once when the context is lost, and then nothing runs.
  const bool must_wait = residency_->pinned_pages() > 0 || residency_->is_poisoned();
  const cuda::Result waited = must_wait ? device_->driver().cuCtxSynchronize.result() : cuda::kSuccess;
  streams_->forget();
  if (waited == cuda::kErrorStreamCaptureUnsupported) {
    keep_for_ever(std::tuple(space_, std::move(executor_), std::move(device_pool_), std::move(pool_)));
    return;
  }
  device_space_->discard();
  executor_.reset();
  device_pool_.reset();
  pool_.reset();
}

}  // namespace tp
