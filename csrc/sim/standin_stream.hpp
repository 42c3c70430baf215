// SPDX-License-Identifier: Apache-2.0
// Streams of the stand-in driver: a thread each, their order, and how operations touch memory.
//
// Threads: any. One lock, the driver's, guards everything here, the memory and the timeline; members whose name ends in
// _locked are called with it held. Bodies of operations run on the stream's thread without it. Ownership: stop() before
// the memory goes.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "device/cuda_abi.hpp"
#include "sim/standin_driver.hpp"
#include "sim/standin_memory.hpp"
#include "sim/standin_timeline.hpp"

namespace tp {

struct StandinStream {
  StandinStream(std::uint64_t of_number, unsigned stream_flags, std::size_t of_channel, std::uint64_t seed)
      : number(of_number), flags(stream_flags), channel(of_channel), random(seed) {}

  const std::uint64_t number;  // 0: the legacy default stream
  const unsigned flags;
  const std::size_t channel;
  std::deque<StandinOperationPointer> queue;
  StandinOperationPointer last;  // null: none was ever asked for
  bool is_destroyed = false, is_finished = false;
  std::mt19937_64 random;  // for the stream's thread alone
  std::thread thread;      // from the first operation on
};

using StandinStreamPointer = std::shared_ptr<StandinStream>;

class StandinStreams {
 public:
  // A part of a transfer: memory in reach of the host, and how far into the transfer it is.
  using Touch = std::function<void(std::byte* memory, std::size_t offset_bytes, std::size_t size_bytes)>;

  StandinStreams(const StandinOptions& options, StandinMemory& memory, StandinTimeline& timeline, std::mutex& mutex);
  StandinStreams(const StandinStreams&) = delete;
  StandinStreams& operator=(const StandinStreams&) = delete;
  ~StandinStreams();

  cuda::Stream create_locked(unsigned flags);
  bool destroy_locked(cuda::Stream stream);
  StandinStreamPointer find_locked(cuda::Stream stream);  // null: no such
  std::size_t count_locked() const { return streams_.size(); }
  const StandinStreamPointer& legacy() const { return legacy_; }
  // A stream without a handle, for graphs.
  StandinStreamPointer create_lane_locked();
  void destroy_lane_locked(const StandinStreamPointer& lane);

  void enqueue_locked(const StandinStreamPointer& stream, const StandinOperationPointer& operation);
  // What has to be done for the stream to be: of the legacy default stream, also what blocks it.
  std::vector<StandinOperationPointer> pending_locked(const StandinStreamPointer& stream) const;
  // Waits until they are done: kSuccess, or the error for which the context is lost.
  cuda::Result wait(std::unique_lock<std::mutex>& lock, const std::vector<StandinOperationPointer>& operations);

  // Until no copy touches memory any more. Whoever is told that the context is lost may give its host memory away.
  void wait_for_copies(std::unique_lock<std::mutex>& lock);

  cuda::Result context_error_locked() const { return context_error_; }
  void lose_context_locked(cuda::Result result);
  void violation_locked(std::string text);
  const std::vector<std::string>& violations_locked() const { return violations_; }
  bool is_touched_locked(cuda::DevicePtr address, std::size_t size_bytes) const;
  std::uint64_t bytes_locked(StandinEngine engine) const { return bytes_[static_cast<std::size_t>(engine)]; }
  std::uint64_t operations_locked() const { return operations_; }
  std::size_t unfinished_locked() const;
  const std::vector<std::string>& behind_waiters_locked() const { return behind_waiters_; }
  std::vector<std::string> blocked_locked() const;
  bool is_stuck_locked() const;
  void stop();  // what has not begun never does

  // For bodies. False: the range may not be touched.
  bool touch(StandinOperation& operation, cuda::DevicePtr address, std::size_t size_bytes, bool writes,
             const Touch& touch);
  void move(std::byte* destination, const std::byte* source, std::size_t size_bytes) const;
  void fill(std::byte* destination, std::byte value, std::size_t size_bytes) const;
  // Calls `piece` for all parts of a transfer, at the times and in the order that are hardest on whoever did not wait.
  bool in_pieces(StandinStream& stream, const StandinOperation& operation, std::size_t size_bytes,
                 const std::function<bool(std::size_t offset_bytes, std::size_t size_bytes)>& piece);
  bool poisons_destinations() const { return options_.delay_max.count() > 0; }
  // Waits until `holds`, which is asked now and then with the lock held; false when the context was lost first.
  std::vector<StandinOperationPointer> all_pending_locked() const;
  bool wait_for_value(const std::function<bool()>& holds);
  void pause_to_end(const StandinOperation& operation);

 private:
  using Channel = std::deque<StandinOperationPointer>;  // what has not begun, in the order of calls

  StandinStreamPointer make_stream_locked(unsigned flags);
  void enter_channel_locked(StandinStream& stream, const StandinOperationPointer& operation);
  void leave_channel_locked(const StandinOperation& operation);
  bool is_held_locked(const StandinOperationPointer& operation) const;
  // Every stream that exists, with its handle's number or none.
  std::vector<StandinStreamPointer> all_locked() const;
  void run(StandinStream& stream);
  void run_operation(std::unique_lock<std::mutex>& lock, StandinStream& stream, StandinOperation& operation);
  void finish_locked(StandinStream& stream, StandinOperation& operation);
  bool can_begin_locked(const StandinOperation& operation) const;
  bool is_halted_locked() const { return is_stopping_ || context_error_ != cuda::kSuccess; }
  void join_finished_locked();
  void pause(StandinStream& stream);

  const StandinOptions options_;
  StandinMemory& memory_;
  StandinTimeline& timeline_;
  std::mutex& mutex_;
  std::condition_variable changed_, stopping_;
  bool is_stopping_ = false;
  cuda::Result context_error_ = cuda::kSuccess;
  std::uint64_t streams_made_ = 0;
  const StandinStreamPointer legacy_;
  std::map<cuda::Stream, StandinStreamPointer> streams_;
  std::vector<StandinStreamPointer> lanes_;      // of graphs
  std::vector<StandinStreamPointer> destroyed_;  // with work left
  std::vector<Channel> channels_;                // none: each stream has its own
  std::vector<std::string> behind_waiters_;
  std::vector<StandinOperation*> running_;
  std::vector<std::string> violations_;
  std::array<std::uint64_t, kStandinEngines> bytes_{};
  std::uint64_t operations_ = 0;
};

}  // namespace tp
