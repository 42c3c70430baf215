// SPDX-License-Identifier: Apache-2.0
// One extent file of a pagefile: its header, and which of its extents are free. Which page lies where is the
// pagefile's to know. The file grows in preallocated chunks, so that a full disk is met before a byte is written.
//
// The lowest free extent is taken first, so that writes run on. Free extents are kept as ranges: memory goes with the
// pages in use, not with what a file claims to be its size. Threads: one at a time. Blocking: all but put() and the
// getters. Errors: Error(io) naming the file; EBADMSG where it is not the file it should be. Move-only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "io/durable_file.hpp"
#include "pager/pagefile_root.hpp"

namespace tp {

class ExtentFile {
 public:
  static ExtentFile create(FileSystem& file_system, const std::string& path, const ExtentHeader& header,
                           std::uint64_t growth_bytes);
  // `used`: the offsets that hold pages, in ascending order. They may lie beyond the end of a file that was cut short.
  static ExtentFile open(FileSystem& file_system, const std::string& path, const ExtentHeader& header,
                         std::uint64_t growth_bytes, std::span<const std::uint64_t> used);

  std::uint64_t take();  // an offset; grows the file when nothing is free
  void put(std::uint64_t offset_bytes);
  std::uint64_t used_count() const noexcept { return used_count_; }

  std::size_t read(std::uint64_t offset_bytes, std::span<std::byte> bytes) const;  // fewer where the file ends
  void write(std::uint64_t offset_bytes, std::span<const std::byte> bytes);
  void mark_written() noexcept { unsynced_ = true; }  // by somebody else, through another descriptor
  void sync();                                        // when something was written since the last one

  const std::string& path() const noexcept { return file_.path(); }
  int handle() const noexcept { return file_.handle(); }

 private:
  ExtentFile(DurableFile file, std::uint64_t page_bytes, std::uint64_t growth_bytes);
  void grow();
  void put_range(std::uint64_t first, std::uint64_t end);

  DurableFile file_;
  std::uint64_t page_bytes_;
  std::uint64_t growth_bytes_;
  std::uint64_t end_bytes_;                      // where the next chunk begins
  std::map<std::uint64_t, std::uint64_t> free_;  // begin -> end in bytes; ranges neither meet nor touch
  std::uint64_t used_count_ = 0;
  bool unsynced_ = false;
};

}  // namespace tp
