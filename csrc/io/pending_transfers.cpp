// SPDX-License-Identifier: Apache-2.0
#include "io/pending_transfers.hpp"

#include <algorithm>
#include <chrono>
#include <utility>

#include "base/check.hpp"

namespace tp {
namespace {

constexpr std::chrono::milliseconds kInterruptPeriod{100};

// So many that are not begun are looked at when those before can't be: a look costs time under the lock.
constexpr std::size_t kLookAhead = 8;

template <typename Number>
bool overlap(Number first, std::size_t first_size, Number second, std::size_t second_size) {
  return first < second + second_size && second < first + first_size;
}

// Whether one of the two, done before, after or during the other, would leave other bytes somewhere.
bool conflict(const FileTransfer& first, const FileTransfer& second) {
  const bool first_reads = first.op == IoOp::read, second_reads = second.op == IoOp::read;
  if ((first_reads || second_reads) &&
      overlap(first.memory.data(), first.memory.size(), second.memory.data(), second.memory.size())) {
    return true;
  }
  if ((first_reads && second_reads) || first.device != second.device || first.inode != second.inode) return false;
  // Of two writes, what one has in the page cache must not be there while the other passes by.
  if (!first_reads && !second_reads && (first.cached || second.cached)) return true;
  return overlap(first.offset_bytes, first.memory.size(), second.offset_bytes, second.memory.size());
}

// A copy that shares nothing with the original: exceptions count who has their text, in a way that a thread sanitizer
// does not see through.
Error apart(const Error& error) { return {error.kind(), std::string(error.what()), error.error_number()}; }

}  // namespace

FileTransfer::FileTransfer(IoOp transfer_op, File transfer_file, std::uint64_t transfer_offset_bytes,
                           std::span<std::byte> transfer_memory, std::uint32_t block_bytes)
    : op(transfer_op),
      file(std::move(transfer_file)),
      offset_bytes(transfer_offset_bytes),
      memory(transfer_memory),
      device(file.status().st_dev),
      inode(file.status().st_ino),
      blocks(op, offset_bytes, memory, file.align_bytes(), block_bytes) {}

PendingTransfers::PendingTransfers(std::function<void()> look, bool several_workers)
    : look_(std::move(look)), several_workers_(several_workers) {}

std::uint64_t PendingTransfers::add(Pointer transfer, bool alone) {
  std::uint64_t id = 0;
  {
    const std::lock_guard lock(mutex_);
    if (broken_) throw *broken_;
    transfer->id = id = ++last_id_;
    transfer->alone = alone;
    unfinished_.push_back(std::move(transfer));
    finish_where_done();  // of no bytes
  }
  look_();
  return id;
}

void PendingTransfers::drain() {
  std::unique_lock lock(mutex_);
  finished_some_.wait(lock, [this] { return unfinished_.empty(); });
}

std::size_t PendingTransfers::wait(const Interrupted& interrupted) {
  std::unique_lock lock(mutex_);
  const std::uint64_t last_id = last_id_;
  const auto is_mine = [last_id](std::uint64_t id, bool alone) { return id <= last_id && !alone; };
  const auto under_way = [is_mine](const Pointer& each) { return is_mine(each->id, each->alone); };
  wait_until(lock, [&] { return std::none_of(unfinished_.begin(), unfinished_.end(), under_way); }, interrupted);
  const auto mine = std::partition(finished_.begin(), finished_.end(),
                                   [is_mine](const Finished& each) { return !is_mine(each.id, each.alone); });
  const auto count = static_cast<std::size_t>(finished_.end() - mine);
  const Finished* first_failed = nullptr;
  std::size_t failed = 0;
  for (auto at = mine; at != finished_.end(); ++at) {
    if (!at->failure) continue;
    ++failed;
    if (first_failed == nullptr || at->id < first_failed->id) first_failed = &*at;
  }
  std::optional<Error> failure;
  if (first_failed != nullptr) failure = first_failed->failure;
  finished_.erase(mine, finished_.end());
  if (!failure) return count;
  if (failed == 1) throw *failure;
  throw Error(failure->kind(),
              std::string(failure->what()) + " (so did " + std::to_string(failed - 1) + " more of " +
                  std::to_string(count) + " transfers)",
              failure->error_number());
}

void PendingTransfers::wait_for(std::uint64_t id, const Interrupted& interrupted) {
  std::unique_lock lock(mutex_);
  const auto find = [this, id] {
    return std::find_if(finished_.begin(), finished_.end(), [id](const Finished& each) { return each.id == id; });
  };
  try {
    wait_until(lock, [this, find] { return find() != finished_.end(); }, interrupted);
  } catch (...) {
    let_wait_take(id);
    throw;
  }
  const std::optional<Error> failure = find()->failure;
  finished_.erase(find());
  if (failure) throw *failure;
}

void PendingTransfers::let_wait_take(std::uint64_t id) {
  const std::lock_guard lock(mutex_);
  for (const Pointer& each : unfinished_) {
    if (each->id == id) each->alone = false;
  }
  for (Finished& each : finished_) {
    if (each.id == id) each.alone = false;
  }
}

// Throws with the lock free, else holds it.
void PendingTransfers::wait_until(std::unique_lock<std::mutex>& lock, const std::function<bool()>& done,
                                  const Interrupted& interrupted) {
  while (!finished_some_.wait_for(lock, kInterruptPeriod, done)) {
    if (!interrupted) continue;
    lock.unlock();
    interrupted();
    lock.lock();
  }
}

std::optional<PendingTransfers::Taken> PendingTransfers::take(bool may_bounce) {
  const std::lock_guard lock(mutex_);
  std::size_t not_begun = 0;
  for (std::size_t place = 0; place < unfinished_.size() && not_begun < kLookAhead; ++place) {
    FileTransfer& transfer = *unfinished_[place];
    if (given_out(transfer)) continue;
    if (!transfer.begun) {
      ++not_begun;
      if (!may_begin(place)) continue;
    }
    const TransferBlock block = *transfer.blocks.peek();
    if (block.way == TransferBlock::Way::cached && transfer.in_flight > 0) continue;
    if (block.way == TransferBlock::Way::bounced && !may_bounce) continue;
    transfer.begun = true;
    transfer.blocks.advance();
    ++transfer.in_flight;
    return Taken{unfinished_[place], block};
  }
  return std::nullopt;
}

void PendingTransfers::done(const Pointer& transfer, std::optional<Error> failure) {
  bool look = false;
  {
    const std::lock_guard lock(mutex_);
    TP_CHECK(transfer->in_flight > 0);
    --transfer->in_flight;
    if (failure && !transfer->failure) {
      transfer->failure = apart(*failure);
      transfer->abandoned = true;
    }
    if (transfer->in_flight == 0 && given_out(*transfer)) look = finish_where_done() && !unfinished_.empty();
  }
  if (look && several_workers_) look_();
}

bool PendingTransfers::all_taken(const Pointer& transfer) const {
  const std::lock_guard lock(mutex_);
  return given_out(*transfer);
}

void PendingTransfers::fail_all(const Error& error) {
  const std::lock_guard lock(mutex_);
  broken_ = apart(error);
  for (const Pointer& transfer : unfinished_) {
    if (given_out(*transfer)) continue;
    transfer->abandoned = true;
    if (!transfer->failure) transfer->failure = apart(error);
  }
  finish_where_done();
}

bool PendingTransfers::may_begin(std::size_t place) const {
  const FileTransfer& transfer = *unfinished_[place];
  return std::none_of(unfinished_.begin(), unfinished_.begin() + static_cast<std::ptrdiff_t>(place),
                      [&transfer](const Pointer& earlier) { return conflict(*earlier, transfer); });
}

bool PendingTransfers::given_out(const FileTransfer& transfer) const {
  return transfer.abandoned || !transfer.blocks.peek();
}

bool PendingTransfers::finish_where_done() {
  const auto is_done = [this](const Pointer& each) { return each->in_flight == 0 && given_out(*each); };
  bool any = false;
  for (const Pointer& each : unfinished_) {
    if (!is_done(each)) continue;
    finished_.push_back({each->id, each->alone, std::exchange(each->failure, std::nullopt)});
    any = true;
  }
  if (!any) return false;
  std::erase_if(unfinished_, is_done);
  finished_some_.notify_all();
  return true;
}

}  // namespace tp
