// SPDX-License-Identifier: Apache-2.0
#include "io/transfer_worker.hpp"

#include <pthread.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <system_error>
#include <utility>

#include "base/check.hpp"
#include "base/limits.hpp"
#include "base/signals_blocked.hpp"
#include "io/wake_event.hpp"

namespace tp {
namespace {

std::optional<Error> failure_of(const FileTransfer& transfer, const TransferBlock& block,
                                const IoCompletion& completion) {
  const std::uint64_t own_offset_bytes = block.offset_bytes + block.lead_bytes;
  if (completion.error != 0) {
    return Error(ErrorKind::io,
                 std::string(transfer.op == IoOp::read ? "could not read " : "could not write ") +
                     std::to_string(block.own_bytes) + " bytes at offset " + std::to_string(own_offset_bytes) + " of " +
                     transfer.file.path() + ": " + describe_errno(completion.error),
                 completion.error);
  }
  if (completion.transferred_bytes >= block.lead_bytes + block.own_bytes) return std::nullopt;
  return Error(ErrorKind::io, transfer.file.path() + " ended at byte " +
                                  std::to_string(block.offset_bytes + completion.transferred_bytes) + " while " +
                                  std::to_string(block.own_bytes) + " bytes at offset " +
                                  std::to_string(own_offset_bytes) + " were read. It had " +
                                  std::to_string(transfer.file.size_bytes()) +
                                  " bytes when it was opened; somebody made it shorter since");
}

}  // namespace

TransferWorker::TransferWorker(std::unique_ptr<IoQueue> queue, PendingTransfers& pending, std::uint32_t block_bytes,
                               bool one_at_a_time)
    : pending_(pending),
      bounce_bytes_(block_bytes),
      bounce_slots_(std::clamp<std::size_t>(kBounceBytesMax / block_bytes, 2, 2 * std::size_t{queue->depth()})),
      one_at_a_time_(one_at_a_time),
      queue_(std::move(queue)) {
  TP_CHECK(block_bytes > 0 && block_bytes <= kRequestBytesMax);
  flights_.resize(queue_->depth());
  for (std::uint64_t token = flights_.size(); token > 0; --token) free_tokens_.push_back(token - 1);
  const SignalsBlocked signals_blocked;
  try {
    thread_ = std::thread([this] { run(); });
  } catch (const std::system_error& error) {
    throw Error(ErrorKind::engine,
                "could not start a thread for transfers: " + describe_errno(error.code().value()) +
                    ". Raise the limit on processes (`ulimit -u`, pids cgroup).",
                error.code().value());
  }
}

TransferWorker::~TransferWorker() {
  stopping_ = true;
  {
    const std::lock_guard lock(queue_mutex_);
    if (queue_) queue_->wake();
  }
  thread_.join();
}

void TransferWorker::make_bounce_memory() {
  if (bounce_memory_.span().empty()) bounce_memory_ = HugeMemory(bounce_slots_ * bounce_bytes_);
}

void TransferWorker::wake() noexcept {
  if (!looking_) return;
  const std::lock_guard lock(queue_mutex_);
  if (queue_) queue_->wake();
}

IoQueueCounters TransferWorker::counters() const {
  const std::lock_guard lock(queue_mutex_);
  return queue_ ? queue_->counters() : last_counters_;
}

void TransferWorker::run() {
  pthread_setname_np(pthread_self(), "tensorpager-io");
  try {
    while (round()) {
    }
  } catch (const Error& error) {
    give_up(error);
  }
}

// False when it is to end.
bool TransferWorker::round() {
  take_blocks();
  copy_arrivals();
  leave_transfers();
  const bool in_flight = free_tokens_.size() < flights_.size();
  if (!in_flight && stopping_) return false;
  completions_.clear();
  // In flight elsewhere may be what this thread's next block waits for: then it is woken.
  queue_->wait(completions_, kWaitForever);
  for (const IoCompletion& completion : completions_) land(completion);
  return true;
}

// looking_ is set before the look: what is added after it is seen to have found somebody to wake.
void TransferWorker::take_blocks() {
  looking_ = true;
  while (!free_tokens_.empty()) {
    // A bounce that will be free soon is worth waiting for, unless nothing would tell.
    const bool may_bounce = bounces_made_ < bounce_slots_ || !free_bounces_.empty();
    std::optional<PendingTransfers::Taken> taken = pending_.take(may_bounce);
    if (!taken) break;
    send(std::move(*taken));
  }
  if (free_tokens_.empty()) looking_ = false;
  submit();
}

void TransferWorker::send(PendingTransfers::Taken taken) {
  const TransferBlock& block = taken.block;
  const std::uint64_t token = free_tokens_.back();
  free_tokens_.pop_back();
  Joined& joined = join(taken.transfer);
  ++joined.in_flight;
  Flight& flight = flights_[token];
  flight = {std::move(taken.transfer), block, nullptr};
  std::byte* memory = block.memory;
  const IoOp op = flight.transfer->op;
  if (block.way == TransferBlock::Way::bounced) {
    if (free_bounces_.empty()) {
      free_bounces_.push_back(bounce_memory_.span().data() + bounces_made_ * bounce_bytes_);
      ++bounces_made_;
    }
    memory = flight.bounce = free_bounces_.back();
    free_bounces_.pop_back();
    bounced_bytes_.fetch_add(block.own_bytes, std::memory_order_relaxed);
    if (op == IoOp::write) std::memcpy(memory, block.memory, block.own_bytes);
  }
  requests_.push_back({token, op, file_of(joined, block.way), block.offset_bytes, memory, block.size_bytes});
  // What was copied goes at once: the drive need not wait for the next copy.
  if (one_at_a_time_ || (flight.bounce != nullptr && op == IoOp::write)) submit();
}

void TransferWorker::submit() {
  if (requests_.empty()) return;
  queue_->submit(requests_);
  requests_.clear();
}

void TransferWorker::land(const IoCompletion& completion) {
  Flight& flight = flights_[completion.token];
  free_tokens_.push_back(completion.token);
  --join(flight.transfer).in_flight;
  std::optional<Error> failure = failure_of(*flight.transfer, flight.block, completion);
  if (flight.bounce != nullptr && flight.transfer->op == IoOp::read && !failure) {
    arrivals_.push_back(std::move(flight));
    return;
  }
  if (flight.bounce != nullptr) free_bounces_.push_back(flight.bounce);
  pending_.done(flight.transfer, std::move(failure));
  flight = {};
}

// After new blocks have been sent, so that the drive is busy meanwhile.
void TransferWorker::copy_arrivals() {
  const bool any = !arrivals_.empty();
  for (Flight& flight : arrivals_) {
    std::memcpy(flight.block.memory, flight.bounce + flight.block.lead_bytes, flight.block.own_bytes);
    free_bounces_.push_back(flight.bounce);
    pending_.done(flight.transfer, std::nullopt);
  }
  arrivals_.clear();
  if (any) take_blocks();  // that had no bounce before
}

TransferWorker::Joined& TransferWorker::join(const PendingTransfers::Pointer& transfer) {
  const auto found = std::find_if(joined_.begin(), joined_.end(),
                                  [&transfer](const Joined& each) { return each.transfer == transfer; });
  if (found != joined_.end()) return *found;
  joined_.push_back({transfer, {}, {}, 0});
  return joined_.back();
}

FileId TransferWorker::file_of(Joined& joined, TransferBlock::Way way) {
  const bool cached = way == TransferBlock::Way::cached;
  const File& file = cached ? *joined.transfer->cached : joined.transfer->file;
  FileId& id = cached ? joined.cached : joined.file;
  if (!id.valid()) id = queue_->add_file(file.descriptor(), file.align_bytes());
  return id;
}

// Lets go of the files of transfers that no block will be sent of any more.
void TransferWorker::leave_transfers() {
  std::erase_if(joined_, [this](const Joined& joined) {
    if (joined.in_flight > 0 || !pending_.all_taken(joined.transfer)) return false;
    if (joined.file.valid()) queue_->remove_file(joined.file);
    if (joined.cached.valid()) queue_->remove_file(joined.cached);
    return true;
  });
}

// The queue is destroyed first: it holds on to memory until the kernel has let go of it.
void TransferWorker::give_up(const Error& error) {
  std::unique_ptr<IoQueue> queue;
  {
    const std::lock_guard lock(queue_mutex_);
    last_counters_ = queue_->counters();
    queue = std::move(queue_);
  }
  queue.reset();
  pending_.fail_all(error);
  for (Flight& flight : flights_) {
    if (flight.transfer) pending_.done(flight.transfer, error);
  }
  for (Flight& flight : arrivals_) pending_.done(flight.transfer, error);
}

}  // namespace tp
