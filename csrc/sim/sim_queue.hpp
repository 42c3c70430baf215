// SPDX-License-Identifier: Apache-2.0
// An IoQueue whose world is a seed: transfers happen late, in random order, in pieces, and fail where a test says so.
// It really moves bytes: to and from memory files of its own, or real descriptors (pread/pwrite) when the pager adds
// one.
//
// Fault model. Tolerated by everything above: completions late and reordered; short transfers, also unaligned ones
// under direct I/O; EINTR, EAGAIN, EIO, ENOMEM, ENOSPC on the Nth transfer, once or for ever. To find who relies on
// more than the contract gives, memory of a read is overwritten with kPoison at submit(), and memory of a write must
// hold the same bytes when the transfer happens as at submit() (an assertion).
//
// Time. There is no clock: each wait() is one tick, and a transfer is due a random number of ticks after it was asked
// for. With one thread, equal seeds and equal calls give equal runs. A wait() with a timeout skips to the next due
// transfer and blocks only while nothing is in flight.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <vector>

#include "io/io_queue.hpp"
#include "io/queue_counters.hpp"
#include "io/transfer_progress.hpp"
#include "io/wake_event.hpp"

namespace tp {

enum class Recurrence : std::uint8_t { once, sticky };

struct SimFailure {
  std::uint64_t nth = 1;  // the first transfer it hits, counted from 1, of those that match
  int error = 5;          // errno value; EIO
  Recurrence recurrence = Recurrence::once;
  std::optional<IoOp> op;  // any, when empty
};

// Shared by a test and the queue it has handed to a pager. Any thread.
//
// A sweep: for nth = 1, 2, ... arm the injector, run the operation, check it; stop when fired() stays 0.
class SimInjector {
 public:
  void arm(const SimFailure& failure);  // replaces the last one, restarts the counts
  void disarm();
  int next(IoOp op);  // called once a transfer: 0, or the error to inject
  std::uint64_t transfers() const;
  std::uint64_t fired() const;

 private:
  mutable std::mutex mutex_;
  std::optional<SimFailure> failure_;
  std::uint64_t matching_ = 0, transfers_ = 0, fired_ = 0;
};

struct SimOptions {
  IoQueueOptions queue;
  std::uint64_t seed = 1;
  unsigned late_ticks_max = 3;
  unsigned short_one_in = 0;              // every so many transfers one is cut short; 0 for never
  std::shared_ptr<SimInjector> injector;  // may be null
};

class SimQueue final : public IoQueue {
 public:
  static constexpr std::byte kPoison{0xa5};

  explicit SimQueue(const SimOptions& options);
  ~SimQueue() override;  // what is in flight happens now

  // The bytes must outlive the queue; a write past the end makes them longer.
  FileId add_memory_file(std::vector<std::byte>& bytes, std::uint32_t direct_align_bytes = 1);

  unsigned depth() const noexcept override { return options_.queue.depth; }
  IoQueueFacts facts() const override;
  IoQueueCounters counters() const noexcept override { return counters_.snapshot(); }
  FileId add_file(int descriptor, std::uint32_t direct_align_bytes) override;
  void remove_file(FileId file) override;
  void register_memory(std::span<std::byte> memory) override;
  void submit(std::span<const IoRequest> requests) override;
  std::size_t wait(std::vector<IoCompletion>& completions, std::chrono::nanoseconds timeout) override;
  void wake() noexcept override { wake_.signal(); }
  void drain(std::vector<IoCompletion>& completions) override;

 private:
  struct SimFile {
    std::vector<std::byte>* bytes = nullptr;  // null: the descriptor
    int descriptor = -1;
    std::uint32_t align_bytes = 1;  // 0: removed
  };
  struct InFlight {
    TransferProgress progress;
    std::uint64_t due_tick = 0;
    std::vector<std::byte> written;  // the bytes of a write when it was submitted
  };

  std::uint64_t random(std::uint64_t below);
  std::size_t run_due(std::vector<IoCompletion>& completions);
  bool step(InFlight& flight, std::vector<IoCompletion>& completions);
  int transfer(const InFlight& flight, const TransferPiece& piece);
  int transfer_memory(const SimFile& file, IoOp op, const TransferPiece& piece);

  const SimOptions options_;
  std::mt19937_64 random_;
  std::uint64_t tick_ = 0;
  std::vector<SimFile> files_;
  std::vector<FileId> empty_places_;  // in files_
  std::vector<InFlight> in_flight_;
  WakeEvent wake_;
  QueueCounters counters_;
};

}  // namespace tp
