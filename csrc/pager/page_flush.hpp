// SPDX-License-Identifier: Apache-2.0
// Writes the modified pages of a host pager to its store, and leaves them resident and clean: how a commit begins.
//
// While a page is written its address shows it read-only, and it can't be evicted. Nobody may write to the pages
// meanwhile: one that is written to all the same is not stored, stays modified, and is an Error(invalid).
//
// Threads: run() on the thread that makes the object, which owns the queue; the executor goes on beside it. Blocking:
// until everything is written. Errors: run() throws the first Error(io), Error(invalid), Error(closed), or what
// `interrupted` throws (called between pages), after all transfers have ended; pages not stored are modified still.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "base/error.hpp"
#include "base/ids.hpp"
#include "io/io_queue.hpp"
#include "mem/host_address_space.hpp"
#include "pager/page_store.hpp"
#include "pager/residency.hpp"

namespace tp {

class PageFlush {
 public:
  // The queue is not used by anybody else. All must outlive the flush.
  PageFlush(Residency& residency, HostAddressSpace& space, PageStore& store, IoQueue& queue);
  void run(const Residency::Interrupted& interrupted);

 private:
  struct Write {
    PageId page;  // not valid: the slot is free
    PageRecord record;
    std::uint32_t requests_left = 0;
    int error_number = 0;
    std::uint64_t error_offset_bytes = 0;
  };
  void start(PageId page, std::uint32_t generation, Extent current);
  bool wait_for_one();  // false: nothing was in flight
  void complete(const IoCompletion& completion);
  void finish(Write& write);
  void fail(PageId page, const Error& error);
  FileId io_file(std::uint32_t stripe);

  Residency& residency_;
  HostAddressSpace& space_;
  PageStore& store_;
  IoQueue& queue_;
  std::uint32_t requests_per_page_;
  std::size_t writes_max_;
  std::vector<Write> writes_;
  std::size_t in_flight_ = 0;
  std::vector<std::optional<FileId>> files_;  // by stripe
  std::vector<IoCompletion> completions_;
  std::optional<Error> error_;
};

// Enough that a drive is busy, and few enough pins that faults still find frames.
inline constexpr std::size_t kFlushWritesMax = 8;

}  // namespace tp
