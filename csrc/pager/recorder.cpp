// SPDX-License-Identifier: Apache-2.0
#include "pager/recorder.hpp"

#include "base/check.hpp"
#include "base/error.hpp"

namespace tp {

void Recorder::begin(bool dry) {
  if (on_.load()) throw Error(ErrorKind::invalid, "record_begin: another recording is under way");
  events_.clear();
  dry_ = dry;
  thread_ = std::this_thread::get_id();
  on_ = true;
}

std::vector<std::int32_t> Recorder::end() {
  if (off()) throw Error(ErrorKind::invalid, "record_end: this thread has not begun a recording");
  on_ = false;
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

}  // namespace tp
