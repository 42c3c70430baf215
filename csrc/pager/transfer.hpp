// SPDX-License-Identifier: Apache-2.0
// Moves pages between their backing and their frame. A transfer is one page: it is cut into requests of at most
// kIoRequestBytesMax, all in flight at once, and is finished when every one of them is and every byte has been
// accounted for.
//
// Who owns the frame. From start_*() until poll() has returned the transfer as finished, the frame's memory belongs to
// the transfer: it stands at
//   its slot, no address of the model shows it, and nobody else reads, writes or moves it. Before and after, it is the
//   executor's.
// Threads: the executor thread. Blocking: poll() waits for a completion, a wake or the timeout; drain() until nothing
// is in flight. Errors: a failed transfer is returned as such with an Error that names page, file and offset; the
// frame's content is then undefined.
//   start_*() throw nothing but Error(memory) from mprotect.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "base/error.hpp"
#include "base/ids.hpp"
#include "device/quantised_page.hpp"
#include "io/file.hpp"
#include "io/io_queue.hpp"
#include "mem/frame_pool.hpp"
#include "pager/page_table.hpp"

namespace tp {

enum class TransferKind : std::uint8_t { page_in, writeback };

struct FinishedTransfer {
  TransferKind kind;
  PageId page;
  FrameId frame;
  std::optional<Error> error;
};

struct PageSource {
  Backing backing = Backing::zero;
  const File* file = nullptr;  // for checkpoint and spill
  std::uint64_t offset_bytes = 0;
  std::uint32_t valid_bytes = 0;  // bytes the backing has; the rest of the frame is zeroed
  std::uint32_t generation = 0;   // for spill, with the checksum
  std::uint64_t checksum = 0;
  const QuantisedLayout* quantised = nullptr;  // for quantised: valid_bytes are the record's
  bool dequantised_later = false;              // the frame gets the record as it is
};

// What went wrong with a page's bytes, and where.
Error transfer_error(TransferKind kind, const File& file, std::uint64_t offset_bytes, PageId page, int error_number,
                     bool file_ended_early);

class TransferQueue {
 public:
  TransferQueue(std::unique_ptr<IoQueue> queue, FramePool& pool);

  IoQueue& io() noexcept { return *queue_; }
  std::size_t in_flight() const noexcept { return in_flight_; }
  std::uint64_t in_flight_bytes() const noexcept { return in_flight_ * pool_.page_bytes(); }
  std::size_t capacity() const noexcept { return queue_->depth() / requests_per_page_; }  // transfers at a time
  // The access a frame must have at its slot while a transfer runs on it.
  SlotAccess slot_access() const noexcept { return slot_access_; }

  void start_page_in(PageId page, FrameId frame, const PageSource& source);
  void start_writeback(PageId page, FrameId frame, const File& file, std::uint64_t offset_bytes);
  void poll(std::vector<FinishedTransfer>& finished, std::chrono::nanoseconds timeout);

 private:
  struct Slot {
    TransferKind kind = TransferKind::page_in;
    PageId page;
    FrameId frame;
    PageSource source;
    std::uint32_t requests_left = 0;
    int error_number = 0;
    std::uint64_t error_offset_bytes = 0;
    bool file_ended_early = false;
  };
  std::size_t take_slot();
  FileId io_file(const File& file);
  void submit_requests(std::size_t slot_index, IoOp op, const File& file, std::uint64_t offset_bytes,
                       std::uint32_t size_bytes);
  void complete_request(const IoCompletion& completion, std::vector<FinishedTransfer>& finished);
  std::optional<Error> finish_page_in(Slot& slot);
  std::optional<Error> finish_quantised(const Slot& slot);
  Error describe(const Slot& slot) const;

  std::unique_ptr<IoQueue> queue_;
  FramePool& pool_;
  std::uint32_t requests_per_page_;
  SlotAccess slot_access_;
  std::vector<Slot> slots_;
  std::vector<std::size_t> free_slots_;
  std::vector<std::size_t> finished_at_once_;  // zero fills: no I/O to wait for
  std::vector<std::pair<int, FileId>> io_files_;
  std::vector<IoRequest> requests_;
  std::vector<IoCompletion> completions_;
  std::size_t in_flight_ = 0;
  std::size_t requests_in_flight_ = 0;
};

}  // namespace tp
