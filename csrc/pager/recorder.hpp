// SPDX-License-Identifier: Apache-2.0
// Records which sets one thread acquires and releases: the steps of a run. Dry, it replaces paging altogether, so that
// a run on fake tensors (no memory) leaves the same record as a real one. Beside them it notes what becomes of the
// pages' contents: from where on they are others, or of no use.
//
// Threads: begin and end by the recorded thread; other threads are neither recorded nor dry. Contents may end on any
// thread: what ends while nothing is recorded is noted as of the next begin. Blocking: never.
// Errors: Error(invalid) for begin without end, or end without begin.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "base/ids.hpp"
#include "mem/address_space.hpp"

namespace tp {

enum class ContentChange : std::int32_t {
  modified,  // by the step acquired last, if it is still open and has the page; else by the next one that has
  ended,     // nobody will want what the page held
};

struct ContentNote {
  std::int32_t position = 0;  // events recorded before it
  ContentChange change = ContentChange::modified;
  PageRange pages;
};

class Recorder {
 public:
  void begin(bool dry);
  // +(set + 1) for an acquire, -(set + 1) for a release, in order.
  std::vector<std::int32_t> end();
  // Nothing is being recorded on this thread: the usual case, one relaxed load.
  bool off() const noexcept {
    return !on_.load(std::memory_order_relaxed) || thread_.load() != std::this_thread::get_id();
  }
  bool dry() const noexcept { return dry_; }
  void acquired(SetId set);
  void released(SetId set);
  void note(ContentChange change, std::span<const PageId> pages);  // a range, ascending
  // Of the recording that ended last, by position.
  std::vector<ContentNote> contents() const;

 private:
  std::atomic<bool> on_{false};
  std::atomic<std::thread::id> thread_{};
  bool dry_ = false;
  std::vector<std::int32_t> events_;
  mutable std::mutex notes_mutex_;  // over those below
  std::vector<ContentNote> between_, notes_, ended_notes_;
};

// Contents that end between two recordings are noted up to so many; a pager that nobody records notes no more.
inline constexpr std::size_t kNotesBetweenMax = 65536;

}  // namespace tp
