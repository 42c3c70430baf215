// SPDX-License-Identifier: Apache-2.0
#include "pager/direct_reader.hpp"

#include <cerrno>

#include "base/check.hpp"
#include "pager/transfer.hpp"

namespace tp {

DirectReader::DirectReader(std::unique_ptr<IoQueue> queue) : queue_(std::move(queue)), slots_(queue_->depth()) {
  for (std::size_t slot = slots_.size(); slot > 0; --slot) free_slots_.push_back(slot - 1);
}

FileId DirectReader::io_file(const File& file) {
  for (const auto& [descriptor, id] : io_files_) {
    if (descriptor == file.descriptor()) return id;
  }
  // 1: the engine reads what is not aligned as well.
  io_files_.emplace_back(file.descriptor(), queue_->add_file(file.descriptor(), 1));
  return io_files_.back().second;
}

void DirectReader::start(const Read& read, std::byte* page_address) {
  TP_CHECK(!free_slots_.empty() && read.size_bytes > 0);
  const FileId file = io_file(*read.file);
  const std::size_t slot = free_slots_.back();
  free_slots_.pop_back();
  slots_[slot] = read;
  ++in_flight_;
  const IoRequest request{slot, IoOp::read, file, read.offset_bytes, page_address + read.lead_bytes, read.size_bytes};
  queue_->submit({&request, 1});
}

void DirectReader::poll(std::vector<Finished>& finished) {
  if (in_flight_ == 0) return;
  completions_.clear();
  queue_->wait(completions_, std::chrono::nanoseconds(0));
  for (const IoCompletion& completion : completions_) {
    const Read& read = slots_[completion.token];
    Finished& result = finished.emplace_back(Finished{read, std::nullopt});
    const bool ended_early = completion.error == 0 && completion.transferred_bytes < read.size_bytes;
    if (completion.error != 0 || ended_early) {
      result.error = transfer_error(TransferKind::page_in, *read.file, read.offset_bytes + completion.transferred_bytes,
                                    read.page, completion.error, ended_early);
    }
    free_slots_.push_back(completion.token);
    --in_flight_;
  }
}

}  // namespace tp
