// SPDX-License-Identifier: Apache-2.0
// Pager's commits: what is modified is written, and then the pagefile exchanges its root.
#include <exception>
#include <memory>

#include "base/error.hpp"
#include "pager/page_flush.hpp"
#include "pager/pager.hpp"

namespace tp {

void Pager::flush_modified(const Residency::Interrupted& interrupted) {
  throw_if_unusable();
  if (pagefile_ == nullptr) {
    throw Error(ErrorKind::invalid, "commit() needs a pagefile; this pager's modified pages end with the process");
  }
  const std::unique_ptr<IoQueue> queue = make_queue_();
  PageFlush flush(*residency_, *host_space_, *pagefile_, *queue);
  std::exception_ptr failure;
  try {
    flush.run(interrupted);
  } catch (...) {
    failure = std::current_exception();
  }
  const std::lock_guard lock(close_mutex_);
  io_counters_of_flushes_ += queue->counters();
  if (failure) std::rethrow_exception(failure);
}

// Extents of the commit before are free.
void Pager::note_room_in_store() {
  const std::lock_guard lock(residency_->mutex);
  residency_->store_may_have_room = true;
  residency_->wake();
}

void Pager::commit(std::span<const std::byte> metadata, const Residency::Interrupted& interrupted) {
  const std::lock_guard commit_lock(commit_mutex_);
  flush_modified(interrupted);
  pagefile_->commit(metadata);
  note_room_in_store();
}

void Pager::prepare_commit(std::span<const std::byte> metadata, const Residency::Interrupted& interrupted) {
  const std::lock_guard commit_lock(commit_mutex_);
  flush_modified(interrupted);
  pagefile_->prepare(metadata);
}

void Pager::decide_commit(void (PagefileStore::*decide)()) {
  const std::lock_guard commit_lock(commit_mutex_);
  throw_if_unusable();
  if (pagefile_ == nullptr) throw Error(ErrorKind::invalid, "without a pagefile no commit is prepared");
  ((*pagefile_).*decide)();
  note_room_in_store();
}

void Pager::publish_commit() { decide_commit(&PagefileStore::publish); }

void Pager::abandon_commit() { decide_commit(&PagefileStore::abandon); }

std::uint64_t Pager::commit_number() const {
  const std::lock_guard lock(close_mutex_);
  return pagefile_ == nullptr ? commit_number_at_close_ : pagefile_->commit_number();
}

}  // namespace tp
