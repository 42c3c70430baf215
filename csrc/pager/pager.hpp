// SPDX-License-Identifier: Apache-2.0
// The core's front door: one address space, one budget of frames, one executor. On the host, or on a device, which has
// a host tier beneath it.
//
// Streams. On a device acquire() returns once the copies are issued; what the caller's stream gets after that starts
// when they are done. release() marks the stream: frames are taken once it has come so far. Nothing waits for the
// device. What the device writes to is told by mark_written(). On the host streams mean nothing.
//
// Threads: every method from any thread. Blocking: acquire, hold and close wait for I/O; the constructor allocates and
// populates the budget. Ownership: the address space outlives the pager for as long as a tensor over it does (space());
// after close() its pages are absent for good. Errors: Error of the kind named at each method; every method but close()
// and the facts throws Error(closed) after close() and
//   Error(forked) in a child of fork().
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "device/copy_queue.hpp"
#include "mem/device_address_space.hpp"
#include "mem/device_frame_pool.hpp"
#include "mem/frame_pool.hpp"
#include "mem/host_address_space.hpp"
#include "pager/executor.hpp"
#include "pager/gated_graph.hpp"
#include "pager/pagefile_store.hpp"
#include "pager/quantised_file.hpp"
#include "pager/recorder.hpp"
#include "pager/residency.hpp"
#include "pager/stream_order.hpp"
#include "pager/ticket.hpp"

namespace tp {

// How pages of files get from the drive to a device.
enum class Transport : std::uint8_t {
  automatic,  // cuFile where it goes past host memory, else by the host tier
  host_tier,
  cufile,  // even where it copies through host memory itself; Error(engine) where it does not work
};

struct DeviceOptions {
  const CudaDriver* driver = nullptr;
  int ordinal = 0;
  std::uint64_t host_budget_bytes = 0;  // of the host tier beneath; 0: kHostBudgetDefault
  bool memory_is_host_memory = false;   // of a stand-in for the driver
  Transport transport = Transport::automatic;
  std::string cufile_library;  // tests: instead of the system's
  std::span<const std::byte> kernels = kernel_image();
};

struct PagerOptions {
  std::uint64_t budget_bytes = 0;       // of the upper tier: the host's, or the device's where there is one
  std::optional<DeviceOptions> device;  // none: on the host
  std::size_t page_bytes = 0;           // 0: chosen from the budget
  std::string engine = "auto";
  unsigned io_depth = 0;             // requests; 0: what inflight_bytes needs
  std::uint64_t inflight_bytes = 0;  // of prefetch; 0: kInflightBytesDefault
  std::string spill_directory;
  std::shared_ptr<PagefileStore> pagefile;  // instead of spill, and so that commit() can be called; on the host only
  std::size_t event_capacity = 65536;
  std::function<std::unique_ptr<IoQueue>()> make_queue;  // tests: instead of `engine`
};

struct Region {
  std::byte* address = nullptr;
  std::uint64_t size_bytes = 0;
  PageRange pages;
};

struct AddressRange {
  const std::byte* address = nullptr;
  std::uint64_t size_bytes = 0;
};

class Pager {
 public:
  explicit Pager(const PagerOptions& options);
  ~Pager();
  Pager(const Pager&) = delete;
  Pager& operator=(const Pager&) = delete;

  // aligned_offset_bytes: on a device the region is shifted so that this byte of the file lies at a multiple of
  // kTensorAlignBytes. Region::address is where the file's first byte is. Error(io).
  Region map_file(const std::string& path, std::uint64_t aligned_offset_bytes = 0);
  Region map_spill(std::uint64_t size_bytes);  // Error(memory), Error(invalid)
  // Pages of 16-bit numbers, one for each record; what is written to them goes to the spill. On a device they are made
  // by its kernels, or on the host where it takes none (quantised_reason()). Error(invalid) when the file is for pages
  // of another size, or empty.
  Region map_quantised(QuantisedFile file);
  // Why quantised pages of a device are made on the host; empty when they are not.
  std::string quantised_reason() const;
  const std::shared_ptr<AddressSpace>& space() const noexcept { return space_; }
  // "host" or "cufile", and why; empty without a device.
  const std::string& transport() const noexcept { return transport_; }
  const std::string& transport_reason() const noexcept { return transport_reason_; }

  SetId add_set(const std::vector<AddressRange>& ranges, const std::string& name);  // Error(invalid)
  const PageSet& set(SetId id) const;

  void acquire(SetId id, const Residency::Interrupted& interrupted, cuda::Stream stream = nullptr);
  void release(SetId id, cuda::Stream stream = nullptr);
  void mark_written(SetId id);  // between acquire and release; Error(invalid)
  // The whole pages of a range in spill regions: see Residency::discard. Returns how many. Error(invalid).
  std::size_t discard(AddressRange range);
  void wanted(AddressRange range);
  // For the recording alone: the open step modifies the range. wanted() and discard() are noted by themselves.
  void note_modified(AddressRange range);
  // acquire() for a byte range outside of any step. Nothing when it is more than the budget can hold: then pages come
  // in as they are touched; a device can't do that, and it is Error(budget).
  std::optional<SetId> hold(AddressRange range, const Residency::Interrupted& interrupted,
                            cuda::Stream stream = nullptr);
  // acquire() that does not wait: the ticket holds the pages and tells when they are there.
  // Copies bytes of a device's address space to host memory without asking the device: out of the host tier, or from
  // the drive. What is left when the context is lost. Error(device) names the page of which the device has the only
  // copy; Error(io), Error(invalid).
  void read_without_device(AddressRange range, std::byte* destination) const;
  // Makes what the pages hold now, and `metadata`, the pagefile's next commit. Blocks until it is on the drive. Nobody
  // may write to the pages meanwhile. Afterwards they are as resident as before. Error(invalid) without a pagefile, and
  // when a page was written to all the same; Error(io): the commit before is whole, and nothing in memory is lost.
  void commit(std::span<const std::byte> metadata, const Residency::Interrupted& interrupted);
  // A commit that others make too, see pagefile.hpp: prepare_commit() as commit() without its last step, which
  // publish_commit() makes; abandon_commit() drops it. Error(invalid) when none is prepared.
  void prepare_commit(std::span<const std::byte> metadata, const Residency::Interrupted& interrupted);
  void publish_commit();
  void abandon_commit();
  std::uint64_t commit_number() const;  // of the last commit, 0 without one
  std::unique_ptr<Ticket> prefetch(SetId id);
  void wait(Ticket& ticket, const Residency::Interrupted& interrupted, cuda::Stream stream = nullptr);
  void release(Ticket& ticket, cuda::Stream stream = nullptr);
  void begin_pass();

  Recorder& recorder() noexcept { return recorder_; }
  // Known schedules: see Residency. Error(invalid).
  void set_schedule(const ScheduleArrays& arrays);
  ScheduleId add_schedule(const ScheduleArrays& arrays, ScheduleKind kind = ScheduleKind::exact);
  void follow_schedule(ScheduleId id);
  void forget_schedule(ScheduleId id);
  std::optional<ScheduleId> followed_schedule() const { return residency_->followed_schedule(); }
  std::optional<SetId> next_set() const { return residency_->next_set(); }
  void clear_schedule();

  const Residency& residency() const noexcept { return *residency_; }
  Residency& residency() noexcept { return *residency_; }
  std::size_t page_bytes() const noexcept { return page_bytes_; }
  std::size_t frame_count() const noexcept { return frame_count_; }
  std::uint64_t budget_bytes() const noexcept { return frame_count_ * page_bytes_; }
  IoQueueFacts io_facts() const { return io_facts_; }
  IoQueueCounters io_counters() const;  // since the start or reset_statistics()
  void reset_statistics();
  std::uint64_t spill_bytes() const;
  const std::string& spill_directory() const noexcept { return spill_directory_; }
  std::uint64_t bytes_in_use_max() const;
  const CudaDevice* device() const noexcept { return device_.get(); }  // null on the host
  bool device_memory_is_host_memory() const noexcept { return device_memory_is_host_memory_; }
  // Waits until the stream has done all it holds. Nothing on the host.
  void synchronize(cuda::Stream stream);
  // Whether a graph in this stream may wait for pages (gate_probe.hpp), and such a graph: Error(engine) when not.
  GateFacts probe_gates(cuda::Stream stream);
  std::unique_ptr<GatedGraph> make_gated_graph(cuda::Stream stream, std::size_t steps_max,
                                               std::chrono::milliseconds stuck_after = kStuckAfter);
  std::uint64_t host_budget_bytes() const noexcept { return host_budget_bytes_; }  // of the tier beneath a device
  std::uint64_t host_bytes_in_use_max() const;
  std::uint64_t bytes_to_device() const noexcept { return copies_ ? copies_->bytes_to_device() : 0; }
  std::uint64_t bytes_to_host() const noexcept { return copies_ ? copies_->bytes_to_host() : 0; }
  bool closed() const noexcept { return closed_.load(); }
  void close() noexcept;

 private:
  void make_host_tier(const PagerOptions& options);
  void load_kernels();
  void make_device_tiers(const PagerOptions& options);
  void abandon_device() noexcept;
  void choose_transport(const DeviceOptions& wanted, MoverOptions& options);
  void close_device() noexcept;
  void throw_if_unusable() const;
  std::vector<PageId> pages_of(const std::vector<AddressRange>& ranges) const;
  void append_region_pages(PageRange pages, std::uint64_t size_bytes, std::uint32_t lead_bytes, Backing backing,
                           std::uint16_t file);
  Schedule make_schedule(const ScheduleArrays& arrays) const;
  SetId intern_set(std::vector<PageId> pages, const std::string& name);

  unsigned fork_generation_;
  std::size_t page_bytes_ = 0;
  std::size_t frame_count_ = 0;
  std::uint64_t host_budget_bytes_ = 0;
  std::size_t host_cache_frames_ = 0;  // of the tier beneath a device, less those for staging
  bool device_memory_is_host_memory_ = false;
  std::shared_ptr<CudaDevice> device_;
  std::string spill_directory_;
  std::string transport_, transport_reason_;
  std::shared_ptr<AddressSpace> space_;
  HostAddressSpace* host_space_ = nullptr;  // space_, or
  DeviceAddressSpace* device_space_ = nullptr;
  std::unique_ptr<FramePool> pool_;
  std::unique_ptr<DeviceFramePool> device_pool_;
  std::unique_ptr<CopyQueue> copies_;
  std::unique_ptr<EventTimeline> releases_;
  std::span<const std::byte> kernel_image_;
  std::unique_ptr<Kernels> kernels_;  // changes once, under the residency's lock, with the first quantised pages
  std::string quantised_reason_;      // likewise
  std::unique_ptr<Residency> residency_;
  std::unique_ptr<StreamOrder> streams_;  // of a device
  std::unique_ptr<Executor> executor_;
  void flush_modified(const Residency::Interrupted& interrupted);
  void decide_commit(void (PagefileStore::*decide)());
  void note_room_in_store();
  std::shared_ptr<PagefileStore> pagefile_;
  std::function<std::unique_ptr<IoQueue>()> make_queue_;  // for flushes
  std::mutex commit_mutex_;                               // before close_mutex_: close() waits for a commit
  std::mutex gated_graph_mutex_;                          // while one is replayed
  IoQueueFacts io_facts_;
  IoQueueCounters all_io_counters() const;  // with close_mutex_ held
  IoQueueCounters io_counters_at_close_, io_counters_at_reset_, io_counters_of_flushes_;
  std::uint64_t bytes_in_use_max_at_close_ = 0, host_bytes_in_use_max_at_close_ = 0, spill_bytes_at_close_ = 0;
  std::uint64_t commit_number_at_close_ = 0;
  Recorder recorder_;
  mutable std::mutex sets_mutex_;  // sets are made by one thread at a time; never held while waiting
  std::map<std::vector<PageId>, SetId> set_by_pages_;
  std::unordered_map<std::uint64_t, SetId> set_by_range_;  // first page << 32 | last page, for hold()
  mutable std::mutex
      close_mutex_;  // over executor_ and pool_ after construction: the facts may be asked while another thread closes
  std::atomic<bool> closed_{false};
};

// Measured, 2 MiB pages, ratios in one interleaved run on two cores: 8, 16, 32, 48 MiB read at 1.01, 1.17, 1.12, 1.21
// of fio's bandwidth for 0.057, 0.038, 0.027, 0.026 CPU-s/GiB. More in flight means fewer wakes; a fault may queue
// behind all of it (10 ms at 3 GiB/s).
inline constexpr std::uint64_t kInflightBytesDefault = 32 * kMiB;

// On a device: pages in flight at each stage. Four keep the link busy while one is looked at every kDevicePoll.
inline constexpr std::size_t kDeviceInflightPages = 4;
inline constexpr std::uint64_t kHostBudgetDefault = 1 * kGiB;
// What torch's allocators give, and its vectorised kernels ask for.
inline constexpr std::size_t kTensorAlignBytes = 256;

}  // namespace tp
