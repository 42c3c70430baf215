// SPDX-License-Identifier: Apache-2.0
#include "sim/sim_queue.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "base/check.hpp"
#include "base/error.hpp"

namespace tp {

void SimInjector::arm(const SimFailure& failure) {
  TP_CHECK(failure.nth > 0 && failure.error > 0);
  const std::lock_guard lock(mutex_);
  failure_ = failure;
  matching_ = transfers_ = fired_ = 0;
}

void SimInjector::disarm() {
  const std::lock_guard lock(mutex_);
  failure_.reset();
}

int SimInjector::next(IoOp op) {
  const std::lock_guard lock(mutex_);
  ++transfers_;
  if (!failure_ || (failure_->op && *failure_->op != op)) return 0;
  ++matching_;
  const bool hit = failure_->recurrence == Recurrence::sticky ? matching_ >= failure_->nth : matching_ == failure_->nth;
  if (!hit) return 0;
  ++fired_;
  return failure_->error;
}

std::uint64_t SimInjector::transfers() const {
  const std::lock_guard lock(mutex_);
  return transfers_;
}

std::uint64_t SimInjector::fired() const {
  const std::lock_guard lock(mutex_);
  return fired_;
}

SimQueue::SimQueue(const SimOptions& options) : options_(options), random_(options.seed) {
  TP_CHECK(options_.queue.depth > 0 && options_.queue.depth <= kIoDepthMax);
}

SimQueue::~SimQueue() {
  std::vector<IoCompletion> completions;
  drain(completions);
}

IoQueueFacts SimQueue::facts() const {
  return {"sim", false, "the sim engine moves bytes through the addresses of requests", {}};
}

FileId SimQueue::add_memory_file(std::vector<std::byte>& bytes, std::uint32_t direct_align_bytes) {
  TP_CHECK(direct_align_bytes > 0);
  TP_CHECK(files_.size() < kFilesMax);
  files_.push_back({&bytes, -1, direct_align_bytes});
  return FileId{static_cast<std::uint32_t>(files_.size() - 1)};
}

FileId SimQueue::add_file(int descriptor, std::uint32_t direct_align_bytes) {
  TP_CHECK(descriptor >= 0);
  TP_CHECK(direct_align_bytes > 0);
  const SimFile file{nullptr, descriptor, direct_align_bytes};
  if (!empty_places_.empty()) {
    const FileId place = empty_places_.back();
    empty_places_.pop_back();
    files_[place.value] = file;
    return place;
  }
  if (files_.size() == kFilesMax) throw Error(ErrorKind::invalid, "too many files for one IoQueue (kFilesMax)");
  files_.push_back(file);
  return FileId{static_cast<std::uint32_t>(files_.size() - 1)};
}

void SimQueue::remove_file(FileId file) {
  TP_CHECK(file.value < files_.size() && files_[file.value].align_bytes != 0);
  for (const InFlight& flight : in_flight_) TP_CHECK(flight.progress.request().file != file);
  files_[file.value] = {nullptr, -1, 0};
  empty_places_.push_back(file);
}

void SimQueue::register_memory(std::span<std::byte> memory) {
  TP_CHECK(!memory.empty());
  TP_CHECK(counters_.snapshot().requests == 0);
}

void SimQueue::submit(std::span<const IoRequest> requests) {
  TP_CHECK(in_flight_.size() + requests.size() <= options_.queue.depth);
  for (const IoRequest& request : requests) {
    TP_CHECK(request.file.value < files_.size());
    InFlight flight;
    const std::uint32_t align_bytes = files_[request.file.value].align_bytes;
    flight.progress = TransferProgress(request, align_bytes, options_.queue.transfer_max_bytes);
    flight.due_tick = tick_ + 1 + random(options_.late_ticks_max + 1);
    if (request.op == IoOp::read) {
      std::fill_n(request.memory, request.size_bytes, kPoison);
    } else {
      flight.written.assign(request.memory, request.memory + request.size_bytes);
    }
    in_flight_.push_back(std::move(flight));
    counters_.count_request();
  }
}

std::size_t SimQueue::wait(std::vector<IoCompletion>& completions, std::chrono::nanoseconds timeout) {
  ++tick_;
  // A wake may come before or after completions that are due: both happen.
  if (random(2) == 0 && wake_.consume()) return 0;
  for (;;) {
    if (const std::size_t count = run_due(completions)) return count;
    if (wake_.consume()) return 0;
    if (timeout.count() == 0) return 0;
    if (in_flight_.empty()) break;
    ++tick_;
  }
  wait_for_events(wake_, nullptr, Deadline(timeout));
  counters_.count_system_call();
  wake_.consume();
  return 0;
}

void SimQueue::drain(std::vector<IoCompletion>& completions) {
  while (!in_flight_.empty()) {
    ++tick_;
    run_due(completions);
  }
}

std::uint64_t SimQueue::random(std::uint64_t below) {
  TP_CHECK(below > 0);
  return random_() % below;  // not std::uniform_int_distribution, whose numbers differ between libraries
}

// Takes a step of some of the requests that are due, at least one if there is one; returns how many finished.
std::size_t SimQueue::run_due(std::vector<IoCompletion>& completions) {
  std::vector<std::size_t> due;
  for (std::size_t at = 0; at < in_flight_.size(); ++at) {
    if (in_flight_[at].due_tick <= tick_) due.push_back(at);
  }
  if (due.empty()) return 0;
  for (std::size_t at = due.size() - 1; at > 0; --at) std::swap(due[at], due[random(at + 1)]);
  due.resize(1 + random(due.size()));

  std::size_t finished = 0;
  for (const std::size_t at : due) {
    if (!step(in_flight_[at], completions)) continue;
    in_flight_[at].due_tick = std::numeric_limits<std::uint64_t>::max();  // marks it for removal
    ++finished;
  }
  std::erase_if(in_flight_,
                [](const InFlight& flight) { return flight.due_tick == std::numeric_limits<std::uint64_t>::max(); });
  return finished;
}

// One transfer of one request; true when the request is finished.
bool SimQueue::step(InFlight& flight, std::vector<IoCompletion>& completions) {
  const IoRequest& request = flight.progress.request();
  if (request.op == IoOp::write) {
    TP_CHECK(std::memcmp(flight.written.data(), request.memory, request.size_bytes) == 0);
  }
  const TransferPiece piece = flight.progress.next_piece();
  int raw_result = transfer(flight, piece);
  if (options_.queue.filter) raw_result = options_.queue.filter(request, raw_result);
  const TransferProgress::Verdict verdict = flight.progress.advance(piece, raw_result);
  counters_.count_result(flight.progress);
  if (verdict == TransferProgress::Verdict::again) {
    flight.due_tick = tick_ + random(options_.late_ticks_max + 1);
    return false;
  }
  const IoCompletion completion = flight.progress.completion();
  counters_.count_completion(request.op, completion);
  completions.push_back(completion);
  return true;
}

int SimQueue::transfer(const InFlight& flight, const TransferPiece& piece) {
  const IoRequest& request = flight.progress.request();
  const SimFile& file = files_[request.file.value];
  if (options_.injector) {
    if (const int error = options_.injector->next(request.op)) return -error;
  }
  TransferPiece cut = piece;
  // Longer than one aligned block, a cut transfer always gets further than any before it; a shorter one could end where
  // an earlier one did, which is what the end of a file looks like.
  if (options_.short_one_in > 0 && cut.size_bytes > file.align_bytes && random(options_.short_one_in) == 0) {
    cut.size_bytes = file.align_bytes + static_cast<std::uint32_t>(random(cut.size_bytes - file.align_bytes));
  }
  if (file.bytes != nullptr) return transfer_memory(file, request.op, cut);
  counters_.count_system_call();
  const auto offset = static_cast<off_t>(piece.offset_bytes);
  // A descriptor opened direct takes aligned sizes only, so the whole piece is moved and less is admitted to.
  const ssize_t moved = request.op == IoOp::read ? pread(file.descriptor, piece.memory, piece.size_bytes, offset)
                                                 : pwrite(file.descriptor, piece.memory, piece.size_bytes, offset);
  if (moved < 0) return -errno;
  return static_cast<int>(std::min<ssize_t>(moved, cut.size_bytes));
}

int SimQueue::transfer_memory(const SimFile& file, IoOp op, const TransferPiece& piece) {
  std::vector<std::byte>& bytes = *file.bytes;
  if (op == IoOp::write) {
    bytes.resize(std::max<std::size_t>(bytes.size(), piece.offset_bytes + piece.size_bytes));
    std::copy_n(piece.memory, piece.size_bytes, bytes.begin() + static_cast<std::ptrdiff_t>(piece.offset_bytes));
    return static_cast<int>(piece.size_bytes);
  }
  if (piece.offset_bytes >= bytes.size()) return 0;
  const std::size_t left_bytes = bytes.size() - piece.offset_bytes;
  const std::size_t moved_bytes = std::min<std::size_t>(piece.size_bytes, left_bytes);
  std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(piece.offset_bytes), moved_bytes, piece.memory);
  return static_cast<int>(moved_bytes);
}

}  // namespace tp
