// SPDX-License-Identifier: Apache-2.0
#include "pager/recorder.hpp"

#include "base/check.hpp"
#include "base/error.hpp"

namespace tp {

void Recorder::begin(bool dry) {
  if (on_.load()) throw Error(ErrorKind::invalid, "record_begin: another recording is under way");
  events_.clear();
  if (!dry) {
    const std::lock_guard lock(notes_mutex_);
    notes_ = std::move(between_);
    between_.clear();
  }
  dry_ = dry;
  thread_ = std::this_thread::get_id();
  on_ = true;
}

std::vector<std::int32_t> Recorder::end() {
  if (off()) throw Error(ErrorKind::invalid, "record_end: this thread has not begun a recording");
  on_ = false;
  if (!dry_) {
    const std::lock_guard lock(notes_mutex_);
    ended_notes_ = std::move(notes_);
    notes_.clear();
  }
  dry_ = false;
  return std::move(events_);
}

void Recorder::acquired(SetId set) {
  TP_CHECK(set.valid());
  events_.push_back(static_cast<std::int32_t>(set.value) + 1);
}

void Recorder::released(SetId set) {
  TP_CHECK(set.valid());
  events_.push_back(-static_cast<std::int32_t>(set.value) - 1);
}

void Recorder::note(ContentChange change, std::span<const PageId> page_ids) {
  if (page_ids.empty()) return;
  const PageRange pages{page_ids.front().value, static_cast<std::uint32_t>(page_ids.size())};
  const bool recorded = !off();
  if (recorded && dry_) return;
  const std::lock_guard lock(notes_mutex_);
  if (recorded)
    notes_.push_back({static_cast<std::int32_t>(events_.size()), change, pages});
  else if (change == ContentChange::ended && between_.size() < kNotesBetweenMax)
    between_.push_back({0, change, pages});
}

std::vector<ContentNote> Recorder::contents() const {
  const std::lock_guard lock(notes_mutex_);
  return ended_notes_;
}

}  // namespace tp
