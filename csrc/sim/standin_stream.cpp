// SPDX-License-Identifier: Apache-2.0
#include "sim/standin_stream.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <set>
#include <utility>

#include "base/check.hpp"

namespace tp {
namespace {

using cuda::Result;

constexpr std::uint64_t kFirstHandle = 0x100;  // CUDA gives small ones a meaning
constexpr std::uint64_t kLegacyHandle = 1;
constexpr std::size_t kPiecesMax = 6;
constexpr std::chrono::microseconds kValuePollInterval{50};
constexpr std::size_t kViolationsKeptMax = 100;

// Memory that a wrong program has two threads race for, out of the thread sanitizer's sight: it intercepts memmove and
// memset, which the compiler would also make of a plain loop.
__attribute__((no_sanitize("thread"))) void move_unseen(std::byte* destination, const std::byte* source,
                                                        std::size_t size_bytes) {
  volatile std::byte* to = destination;
  const volatile std::byte* from = source;
  for (std::size_t at = 0; at < size_bytes; ++at) to[at] = from[at];
}

__attribute__((no_sanitize("thread"))) void fill_unseen(std::byte* destination, std::byte value,
                                                        std::size_t size_bytes) {
  volatile std::byte* to = destination;
  for (std::size_t at = 0; at < size_bytes; ++at) to[at] = value;
}

}  // namespace

StandinStreams::StandinStreams(const StandinOptions& options, StandinMemory& memory, StandinTimeline& timeline,
                               std::mutex& mutex)
    : options_(options),
      memory_(memory),
      timeline_(timeline),
      mutex_(mutex),
      legacy_(std::make_shared<StandinStream>(0u, 0u, 0u, options.seed)),
      channels_(options.channels) {}

StandinStreams::~StandinStreams() { stop(); }

StandinStreamPointer StandinStreams::make_stream_locked(unsigned flags) {
  join_finished_locked();
  const std::uint64_t number = ++streams_made_;
  std::seed_seq seed{options_.seed, number};
  std::uint32_t stream_seed = 0;
  seed.generate(&stream_seed, &stream_seed + 1);
  const std::size_t channel = channels_.empty() ? 0 : number % channels_.size();
  return std::make_shared<StandinStream>(number, flags, channel, stream_seed);
}

cuda::Stream StandinStreams::create_locked(unsigned flags) {
  const StandinStreamPointer stream = make_stream_locked(flags);
  const auto handle = reinterpret_cast<cuda::Stream>(static_cast<std::uintptr_t>(kFirstHandle + stream->number));
  streams_[handle] = stream;
  return handle;
}

StandinStreamPointer StandinStreams::create_lane_locked() {
  return lanes_.emplace_back(make_stream_locked(cuda::kStreamNonBlocking));
}

void StandinStreams::destroy_lane_locked(const StandinStreamPointer& lane) {
  lane->is_destroyed = true;
  if (lane->thread.joinable()) destroyed_.push_back(lane);
  std::erase(lanes_, lane);
  changed_.notify_all();
}

bool StandinStreams::destroy_locked(cuda::Stream stream) {
  const auto found = streams_.find(stream);
  if (found == streams_.end()) return false;
  found->second->is_destroyed = true;
  if (found->second->thread.joinable()) destroyed_.push_back(found->second);
  streams_.erase(found);
  changed_.notify_all();
  return true;
}

void StandinStreams::join_finished_locked() {
  std::erase_if(destroyed_, [](const StandinStreamPointer& stream) {
    if (stream->is_finished) stream->thread.join();  // it has let go of the lock and does nothing more
    return stream->is_finished;
  });
}

StandinStreamPointer StandinStreams::find_locked(cuda::Stream stream) {
  if (reinterpret_cast<std::uintptr_t>(stream) <= kLegacyHandle) return legacy_;
  const auto found = streams_.find(stream);
  return found != streams_.end() ? found->second : nullptr;
}

void StandinStreams::enqueue_locked(const StandinStreamPointer& stream, const StandinOperationPointer& operation) {
  for (const StandinOperationPointer& before : pending_locked(stream)) operation->after.push_back(before);
  if (stream != legacy_ && (stream->flags & cuda::kStreamNonBlocking) == 0 && legacy_->last != nullptr)
    operation->after.push_back(legacy_->last);
  operation->stream = stream.get();
  enter_channel_locked(*stream, operation);
  stream->last = operation;
  stream->queue.push_back(operation);
  timeline_.asked(operation);
  if (!stream->thread.joinable()) stream->thread = std::thread([this, stream] { run(*stream); });
  changed_.notify_all();
}

std::vector<StandinOperationPointer> StandinStreams::pending_locked(const StandinStreamPointer& stream) const {
  std::vector<StandinOperationPointer> pending;
  if (stream->last != nullptr) pending.push_back(stream->last);
  if (stream != legacy_) return pending;
  const auto add = [&](const StandinStreamPointer& other) {
    if ((other->flags & cuda::kStreamNonBlocking) == 0 && other->last != nullptr) pending.push_back(other->last);
  };
  for (const auto& [handle, other] : streams_) add(other);
  for (const StandinStreamPointer& other : destroyed_) add(other);
  return pending;
}

std::vector<StandinStreamPointer> StandinStreams::all_locked() const {
  std::vector<StandinStreamPointer> all{legacy_};
  for (const auto& [handle, stream] : streams_) all.push_back(stream);
  all.insert(all.end(), lanes_.begin(), lanes_.end());
  all.insert(all.end(), destroyed_.begin(), destroyed_.end());
  return all;
}

std::vector<StandinOperationPointer> StandinStreams::all_pending_locked() const {
  std::vector<StandinOperationPointer> pending;
  for (const StandinStreamPointer& stream : all_locked()) {
    if (stream->last != nullptr) pending.push_back(stream->last);
  }
  return pending;
}

// ---------------------------------------------------------------- channels

void StandinStreams::enter_channel_locked(StandinStream& stream, const StandinOperationPointer& operation) {
  if (channels_.empty()) return;
  Channel& channel = channels_[stream.channel];
  if (!is_held_locked(operation)) {
    for (const StandinOperationPointer& ahead : channel) {
      if (!is_held_locked(ahead)) continue;
      if (behind_waiters_.size() < kViolationsKeptMax) {
        behind_waiters_.push_back(std::string(operation->call) + " of stream " + std::to_string(stream.number) +
                                  " is behind " + ahead->call + " of stream " + std::to_string(ahead->stream->number) +
                                  " in channel " + std::to_string(stream.channel));
      }
      break;
    }
  }
  channel.push_back(operation);
}

void StandinStreams::leave_channel_locked(const StandinOperation& operation) {
  if (channels_.empty()) return;
  Channel& channel = channels_[operation.stream->channel];
  std::erase_if(channel, [&](const StandinOperationPointer& each) { return each.get() == &operation; });
  changed_.notify_all();
}

// Whether it waits for a value, or for something that does.
bool StandinStreams::is_held_locked(const StandinOperationPointer& operation) const {
  std::vector<const StandinOperation*> left{operation.get()};
  std::set<const StandinOperation*> seen;
  while (!left.empty()) {
    const StandinOperation* each = left.back();
    left.pop_back();
    if (each->is_done || !seen.insert(each).second) continue;
    if (each->is_gate && !each->is_open) return true;
    for (const StandinOperationPointer& before : each->after) left.push_back(before.get());
  }
  return false;
}

std::vector<std::string> StandinStreams::blocked_locked() const {
  std::vector<std::string> lines;
  for (const StandinStreamPointer& stream : all_locked()) {
    if (stream->queue.empty()) continue;
    const StandinOperation& first = *stream->queue.front();
    std::string why = first.has_begun ? (first.is_gate ? "waits for a value" : "runs") : "can begin";
    if (!first.has_begun && !can_begin_locked(first)) {
      const auto before =
          std::find_if(first.after.begin(), first.after.end(), [](const auto& each) { return !each->is_done; });
      why = before != first.after.end() ? std::string("waits for ") + (*before)->call + " of stream " +
                                              std::to_string((*before)->stream->number)
                                        : std::string("is behind ") + channels_[stream->channel].front()->call +
                                              " in channel " + std::to_string(stream->channel);
    }
    lines.push_back(std::string(first.call) + " of stream " + std::to_string(stream->number) + " " + why);
  }
  return lines;
}

bool StandinStreams::is_stuck_locked() const {
  bool has_work = false;
  for (const StandinStreamPointer& stream : all_locked()) {
    if (stream->queue.empty()) continue;
    const StandinOperation& first = *stream->queue.front();
    const bool goes_on = first.has_begun ? !first.is_gate || first.is_open : can_begin_locked(first);
    if (goes_on) return false;
    has_work = true;
  }
  return has_work && !is_halted_locked();
}

Result StandinStreams::wait(std::unique_lock<std::mutex>& lock,
                            const std::vector<StandinOperationPointer>& operations) {
  const auto all_done = [&] {
    return std::all_of(operations.begin(), operations.end(), [](const auto& each) { return each->is_done; });
  };
  changed_.wait(lock, [&] { return is_halted_locked() || all_done(); });
  if (context_error_ != cuda::kSuccess) {
    wait_for_copies(lock);
    return context_error_;
  }
  for (const StandinOperationPointer& operation : operations) timeline_.observed(*operation);
  return cuda::kSuccess;
}

void StandinStreams::wait_for_copies(std::unique_lock<std::mutex>& lock) {
  changed_.wait(lock, [this] {
    return std::none_of(running_.begin(), running_.end(), [](const StandinOperation* operation) {
      return operation->engine && *operation->engine != StandinEngine::kernel;
    });
  });
}

void StandinStreams::lose_context_locked(Result result) {
  if (context_error_ == cuda::kSuccess) context_error_ = result;
  changed_.notify_all();
}

void StandinStreams::violation_locked(std::string text) {
  if (violations_.size() < kViolationsKeptMax) violations_.push_back(std::move(text));
}

bool StandinStreams::is_touched_locked(cuda::DevicePtr address, std::size_t size_bytes) const {
  for (const StandinOperation* operation : running_) {
    for (const StandinOperation::Range& range : operation->touched) {
      if (range.address < address + size_bytes && address < range.address + range.size_bytes) return true;
    }
  }
  return false;
}

std::size_t StandinStreams::unfinished_locked() const {
  std::size_t unfinished = 0;
  for (const StandinStreamPointer& stream : all_locked()) unfinished += stream->queue.size();
  return unfinished;
}

void StandinStreams::stop() {
  std::vector<StandinStreamPointer> all;
  {
    const std::lock_guard lock(mutex_);
    is_stopping_ = true;
    all = all_locked();
    changed_.notify_all();
    stopping_.notify_all();
  }
  for (const StandinStreamPointer& stream : all) {
    if (stream->thread.joinable()) stream->thread.join();
  }
}

void StandinStreams::run(StandinStream& stream) {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return is_stopping_ || stream.is_destroyed || !stream.queue.empty(); });
    if (stream.queue.empty()) break;
    const StandinOperationPointer operation = stream.queue.front();
    changed_.wait(lock, [&] { return is_halted_locked() || can_begin_locked(*operation); });
    if (!is_halted_locked()) run_operation(lock, stream, *operation);
    finish_locked(stream, *operation);
  }
  stream.is_finished = true;
}

bool StandinStreams::can_begin_locked(const StandinOperation& operation) const {
  const bool is_next = channels_.empty() || channels_[operation.stream->channel].front().get() == &operation;
  return is_next &&
         std::all_of(operation.after.begin(), operation.after.end(), [](const auto& each) { return each->is_done; });
}

void StandinStreams::run_operation(std::unique_lock<std::mutex>& lock, StandinStream& stream,
                                   StandinOperation& operation) {
  operation.has_begun = true;
  lock.unlock();
  pause(stream);
  lock.lock();
  if (is_halted_locked()) return;
  if (!operation.is_gate) leave_channel_locked(operation);
  if (operation.engine) bytes_[static_cast<std::size_t>(*operation.engine)] += operation.size_bytes;
  running_.push_back(&operation);
  lock.unlock();
  Result result = operation.failure;
  if (result == cuda::kSuccess && operation.body) result = operation.body(operation, stream);
  lock.lock();
  std::erase(running_, &operation);
  if (result != cuda::kSuccess && !is_stopping_) lose_context_locked(result);
  ++operations_;
}

void StandinStreams::finish_locked(StandinStream& stream, StandinOperation& operation) {
  if (operation.is_gate) timeline_.opened(operation, std::nullopt);
  operation.is_done = true;
  leave_channel_locked(operation);
  operation.after.clear();
  operation.touched.clear();
  operation.body = nullptr;
  stream.queue.pop_front();
  changed_.notify_all();
}

bool StandinStreams::touch(StandinOperation& operation, cuda::DevicePtr address, std::size_t size_bytes, bool writes,
                           const Touch& touch) {
  std::unique_lock lock(mutex_);
  std::vector<StandinPiece> pieces;
  if (!memory_.find(address, size_bytes, writes, pieces)) return false;
  operation.touched.push_back({address, size_bytes});
  lock.unlock();
  std::size_t offset_bytes = 0;
  for (const StandinPiece& piece : pieces) {
    touch(piece.memory, offset_bytes, piece.size_bytes);
    offset_bytes += piece.size_bytes;
  }
  lock.lock();
  pieces.clear();  // under the lock, since it may be the last to hold an allocation
  return true;
}

void StandinStreams::move(std::byte* destination, const std::byte* source, std::size_t size_bytes) const {
  if (options_.hides_races) {
    move_unseen(destination, source, size_bytes);
  } else {
    std::memmove(destination, source, size_bytes);
  }
}

void StandinStreams::fill(std::byte* destination, std::byte value, std::size_t size_bytes) const {
  if (options_.hides_races) {
    fill_unseen(destination, value, size_bytes);
  } else {
    std::memset(destination, static_cast<int>(value), size_bytes);
  }
}

bool StandinStreams::in_pieces(StandinStream& stream, const StandinOperation& operation, std::size_t size_bytes,
                               const std::function<bool(std::size_t, std::size_t)>& piece) {
  enum class Manner : std::uint8_t { early, late, spread };
  if (options_.delay_max.count() == 0) {
    pause_to_end(operation);
    return size_bytes == 0 || piece(0, size_bytes);
  }
  const auto random = [&](std::size_t below) { return static_cast<std::size_t>(stream.random() % below); };
  const auto manner = static_cast<Manner>(random(3));
  std::vector<std::size_t> cuts{0, size_bytes};
  for (std::size_t left = random(kPiecesMax); left > 0; --left) cuts.push_back(random(size_bytes + 1));
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  std::vector<std::size_t> order;
  for (std::size_t at = 0; at + 1 < cuts.size(); ++at) order.push_back(at);
  for (std::size_t at = order.size(); at > 1; --at) std::swap(order[at - 1], order[random(at)]);
  if (manner == Manner::late) {
    pause(stream);
    pause_to_end(operation);
  }
  for (std::size_t at = 0; at < order.size(); ++at) {
    if (manner == Manner::spread) pause(stream);
    if (manner == Manner::spread && at + 1 == order.size()) pause_to_end(operation);
    const std::size_t offset_bytes = cuts[order[at]];
    if (!piece(offset_bytes, cuts[order[at] + 1] - offset_bytes)) return false;
  }
  if (manner == Manner::early) {
    pause(stream);
    pause_to_end(operation);
  }
  return true;
}

bool StandinStreams::wait_for_value(const std::function<bool()>& holds) {
  std::unique_lock lock(mutex_);
  while (!is_halted_locked()) {
    if (holds()) return true;
    // The host stores into memory without a call, so nobody tells.
    changed_.wait_for(lock, kValuePollInterval);
  }
  return false;
}

void StandinStreams::pause(StandinStream& stream) {
  if (options_.delay_max.count() == 0 || stream.random() % 2 == 0) return;
  const std::chrono::microseconds delay(stream.random() % (static_cast<std::uint64_t>(options_.delay_max.count()) + 1));
  std::unique_lock lock(mutex_);
  stopping_.wait_for(lock, delay, [this] { return is_stopping_; });
}

void StandinStreams::pause_to_end(const StandinOperation& operation) {
  std::unique_lock lock(mutex_);
  if (const auto end = timeline_.real_end(operation)) stopping_.wait_until(lock, *end, [this] { return is_stopping_; });
}

}  // namespace tp
