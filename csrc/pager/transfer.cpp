// SPDX-License-Identifier: Apache-2.0
#include "pager/transfer.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "base/check.hpp"
#include "base/limits.hpp"
#include "pager/spill.hpp"

namespace tp {
namespace {

// A request's token: which transfer, and which request of it. 64 MiB pages have 64 requests.
constexpr std::uint64_t kRequestBits = 8;
static_assert(kPageBytesMax / kIoRequestBytesMax < (1u << kRequestBits));

std::uint32_t round_up(std::uint32_t value, std::uint32_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

TransferQueue::TransferQueue(std::unique_ptr<IoQueue> queue, FramePool& pool)
    : queue_(std::move(queue)),
      pool_(pool),
      requests_per_page_(
          static_cast<std::uint32_t>((pool.frame_bytes() + kIoRequestBytesMax - 1) / kIoRequestBytesMax)) {
  TP_CHECK(queue_ != nullptr && queue_->depth() >= requests_per_page_);
  queue_->register_memory(pool.memory());
  // Registered memory is reached by its physical pages; any other through the process's own mapping.
  slot_access_ = queue_->facts().registered_pages_may_move ? SlotAccess::none : SlotAccess::read_write;
}

std::size_t TransferQueue::take_slot() {
  if (free_slots_.empty()) {
    slots_.emplace_back();
    free_slots_.push_back(slots_.size() - 1);
  }
  const std::size_t index = free_slots_.back();
  free_slots_.pop_back();
  ++in_flight_;
  return index;
}

FileId TransferQueue::io_file(const File& file) {
  for (const auto& [descriptor, id] : io_files_) {
    if (descriptor == file.descriptor()) return id;
  }
  io_files_.emplace_back(file.descriptor(), queue_->add_file(file.descriptor(), file.align_bytes()));
  return io_files_.back().second;
}

void TransferQueue::start_page_in(PageId page, FrameId frame, const PageSource& source) {
  TP_CHECK(page.valid() && source.valid_bytes <= pool_.frame_bytes());
  const std::size_t index = take_slot();
  slots_[index] = Slot{TransferKind::page_in, page, frame, source, 0, 0, 0, false};
  if (source.backing == Backing::zero) {
    finished_at_once_.push_back(index);
    return;
  }
  TP_CHECK(source.file != nullptr && source.valid_bytes > 0);
  // Direct I/O reads whole blocks: the last page asks for more than the file has and gets what is there.
  const std::uint32_t size = std::min(round_up(source.valid_bytes, source.file->align_bytes()),
                                      static_cast<std::uint32_t>(pool_.frame_bytes()));
  if (pool_.access(frame) != slot_access_ && pool_.access(frame) != SlotAccess::read_write)
    pool_.set_access(frame, slot_access_);
  submit_requests(index, IoOp::read, *source.file, source.offset_bytes, size);
}

void TransferQueue::start_writeback(PageId page, FrameId frame, const File& file, std::uint64_t offset_bytes) {
  const std::size_t index = take_slot();
  const auto size = static_cast<std::uint32_t>(pool_.page_bytes());
  PageSource source{Backing::spill, &file, offset_bytes, size, 0, 0};
  slots_[index] = Slot{TransferKind::writeback, page, frame, source, 0, 0, 0, false};
  submit_requests(index, IoOp::write, file, offset_bytes, size);
}

void TransferQueue::submit_requests(std::size_t slot_index, IoOp op, const File& file, std::uint64_t offset_bytes,
                                    std::uint32_t size_bytes) {
  Slot& slot = slots_[slot_index];
  std::byte* memory = pool_.slot(slot.frame);
  const FileId io_file_id = io_file(file);
  requests_.clear();
  for (std::uint32_t offset = 0; offset < size_bytes; offset += static_cast<std::uint32_t>(kIoRequestBytesMax)) {
    const std::uint32_t size = std::min(size_bytes - offset, static_cast<std::uint32_t>(kIoRequestBytesMax));
    const std::uint64_t token = static_cast<std::uint64_t>(slot_index) << kRequestBits | requests_.size();
    requests_.push_back({token, op, io_file_id, offset_bytes + offset, memory + offset, size});
  }
  slot.requests_left = static_cast<std::uint32_t>(requests_.size());
  requests_in_flight_ += requests_.size();
  TP_CHECK(requests_in_flight_ <= queue_->depth());
  queue_->submit(requests_);
}

void TransferQueue::poll(std::vector<FinishedTransfer>& finished, std::chrono::nanoseconds timeout) {
  if (!finished_at_once_.empty()) timeout = std::chrono::nanoseconds(0);
  completions_.clear();
  queue_->wait(completions_, timeout);
  for (const IoCompletion& completion : completions_) complete_request(completion, finished);
  for (const std::size_t index : finished_at_once_) {
    Slot& slot = slots_[index];
    finished.push_back({slot.kind, slot.page, slot.frame, finish_page_in(slot)});
    free_slots_.push_back(index);
    --in_flight_;
  }
  finished_at_once_.clear();
}

void TransferQueue::complete_request(const IoCompletion& completion, std::vector<FinishedTransfer>& finished) {
  const std::size_t index = completion.token >> kRequestBits;
  const std::uint64_t request = completion.token & ((1u << kRequestBits) - 1);
  TP_CHECK(index < slots_.size());
  Slot& slot = slots_[index];
  TP_CHECK(slot.requests_left > 0);
  --requests_in_flight_;
  const std::uint64_t begin = request * kIoRequestBytesMax;
  // What this request must have brought: up to its own end or the end of what the backing has, whichever comes first.
  const std::uint64_t must_have = std::min<std::uint64_t>(
      kIoRequestBytesMax, slot.source.valid_bytes > begin ? slot.source.valid_bytes - begin : 0);
  if (completion.error != 0 && slot.error_number == 0) {
    slot.error_number = completion.error;
    slot.error_offset_bytes = slot.source.offset_bytes + begin;
  } else if (completion.error == 0 && completion.transferred_bytes < must_have && slot.error_number == 0) {
    slot.error_number = EIO;
    slot.file_ended_early = true;
    slot.error_offset_bytes = slot.source.offset_bytes + begin + completion.transferred_bytes;
  }
  if (--slot.requests_left > 0) return;
  FinishedTransfer result{slot.kind, slot.page, slot.frame, std::nullopt};
  if (slot.error_number != 0) {
    result.error = describe(slot);
  } else if (slot.kind == TransferKind::page_in) {
    result.error = finish_page_in(slot);
  }
  finished.push_back(std::move(result));
  free_slots_.push_back(index);
  --in_flight_;
}

std::optional<Error> TransferQueue::finish_page_in(Slot& slot) {
  std::byte* bytes = pool_.slot(slot.frame);
  const PageSource& source = slot.source;
  if (source.backing == Backing::spill) {
    if (pool_.access(slot.frame) == SlotAccess::none) pool_.set_access(slot.frame, SlotAccess::read);
    if (page_checksum(bytes, pool_.page_bytes(), slot.page, source.generation) != source.checksum) {
      return Error(ErrorKind::io,
                   "page " + std::to_string(slot.page.value) + " came back from " + source.file->path() +
                       " at offset " + std::to_string(source.offset_bytes) +
                       " with another checksum than it left with: the drive or its driver returned wrong bytes",
                   EBADMSG);
    }
  } else if (source.backing == Backing::quantised) {
    return finish_quantised(slot);
  } else if (source.valid_bytes < pool_.page_bytes()) {
    // The frame held another page before: what the backing does not cover must not show it.
    pool_.set_access(slot.frame, SlotAccess::read_write);
    std::memset(bytes + source.valid_bytes, 0, pool_.page_bytes() - source.valid_bytes);
  }
  return std::nullopt;
}

std::optional<Error> TransferQueue::finish_quantised(const Slot& slot) {
  std::byte* bytes = pool_.slot(slot.frame);
  const PageSource& source = slot.source;
  if (pool_.access(slot.frame) == SlotAccess::none) pool_.set_access(slot.frame, SlotAccess::read);
  if (!record_intact(bytes, *source.quantised, pool_.page_bytes(), source.offset_bytes / source.valid_bytes)) {
    return Error(ErrorKind::io,
                 "quantised page " + std::to_string(slot.page.value) + " came back from " + source.file->path() +
                     " at offset " + std::to_string(source.offset_bytes) +
                     " with another checksum than it was written with: the drive or its driver returned wrong bytes",
                 EBADMSG);
  }
  if (source.dequantised_later) return std::nullopt;
  pool_.set_access(slot.frame, SlotAccess::read_write);
  dequantise_in_place(bytes, *source.quantised, pool_.page_bytes());
  return std::nullopt;
}

Error TransferQueue::describe(const Slot& slot) const {
  return transfer_error(slot.kind, *slot.source.file, slot.error_offset_bytes, slot.page, slot.error_number,
                        slot.file_ended_early);
}

Error transfer_error(TransferKind kind, const File& file, std::uint64_t offset_bytes, PageId page, int error_number,
                     bool file_ended_early) {
  const std::string where =
      file.path() + " at offset " + std::to_string(offset_bytes) + " (page " + std::to_string(page.value) + ")";
  if (file_ended_early) {
    return Error(ErrorKind::io,
                 where +
                     ": the file ends there, but held more when it was opened; it was truncated or is being "
                     "rewritten. Restore it and load the model again",
                 EIO);
  }
  const char* what = kind == TransferKind::page_in ? "reading " : "writing ";
  std::string message = what + where + " failed: " + describe_errno(error_number);
  if (error_number == EIO) message += "; the drive reports a fault (see the kernel log)";
  if (error_number == ENOSPC)
    message += "; the spill's file system is full: free space or name another directory (store=)";
  return Error(ErrorKind::io, std::move(message), error_number);
}

}  // namespace tp
