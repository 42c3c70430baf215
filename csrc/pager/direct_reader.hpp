// SPDX-License-Identifier: Apache-2.0
// Reads pages of files straight into device frames, by an engine whose memory is the device's (cufile_queue.hpp). No
// host frame takes part, so nothing of these pages stays in the host tier.
//
// Threads: the executor thread. Blocking: never. Ownership: the page's address, which is mapped to its frame, belongs
// to the reader from start() until poll() has returned the page. Errors: a read that failed is returned as such with an
// Error that names page, file and offset; the frame's content is then undefined. start() throws Error(io) where the
// engine refuses the file.
#pragma once

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "base/ids.hpp"
#include "io/file.hpp"
#include "io/io_queue.hpp"

namespace tp {

class DirectReader {
 public:
  explicit DirectReader(std::unique_ptr<IoQueue> queue);

  struct Read {
    PageId page;
    FrameId frame;
    const File* file = nullptr;
    std::uint64_t offset_bytes = 0;
    std::uint32_t size_bytes = 0;
    std::uint32_t lead_bytes = 0;  // of the page, before what is read
  };
  struct Finished {
    Read read;
    std::optional<Error> error;
  };

  std::size_t in_flight() const noexcept { return in_flight_; }
  std::size_t capacity() const noexcept { return queue_->depth(); }
  void start(const Read& read, std::byte* page_address);
  void poll(std::vector<Finished>& finished);

 private:
  FileId io_file(const File& file);

  std::unique_ptr<IoQueue> queue_;
  std::vector<Read> slots_;
  std::vector<std::size_t> free_slots_;
  std::vector<std::pair<int, FileId>> io_files_;
  std::vector<IoCompletion> completions_;
  std::size_t in_flight_ = 0;
};

}  // namespace tp
