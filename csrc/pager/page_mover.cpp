// SPDX-License-Identifier: Apache-2.0
#include "pager/page_mover.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <utility>

#include "base/check.hpp"
#include "base/limits.hpp"
#include "pager/spill.hpp"

namespace tp {

PageMover::PageMover(Residency& residency, FramePool& host_pool, MoverOptions options)
    : residency_(residency), host_pool_(host_pool), options_(std::move(options)), store_(options_.store) {
  TP_CHECK(store_ != nullptr);
  prefetch_transfers_max_ = std::max<std::size_t>(1, options_.inflight_bytes / host_pool.page_bytes());
}

void PageMover::open() {
  transfers_ = std::make_unique<TransferQueue>(options_.make_queue(), host_pool_);
  TP_CHECK(transfers_->capacity() > prefetch_transfers_max_);  // room for demand beside prefetches
}

std::uint16_t PageMover::add_file(File file, std::optional<QuantisedLayout> layout) {
  TP_CHECK(files_.size() < kFilesMax);
  files_.push_back({std::move(file), layout});
  return static_cast<std::uint16_t>(files_.size() - 1);
}

PageSource PageMover::source_of(const PageEntry& entry) const {
  PageSource source{entry.backing, nullptr, entry.offset_bytes, entry.valid_bytes, entry.generation, entry.checksum,
                    nullptr,       false};
  if (entry.backing == Backing::checkpoint || entry.backing == Backing::quantised)
    source.file = &files_[entry.file].file;
  if (entry.backing == Backing::quantised) source.quantised = &*files_[entry.file].layout;
  if (entry.backing == Backing::spill) source.file = &store_->file(entry.file);
  if (entry.backing == Backing::spill) source.valid_bytes = static_cast<std::uint32_t>(host_pool_.page_bytes());
  if (entry.backing == Backing::zero) source.valid_bytes = 0;
  return source;
}

bool PageMover::write_back(PageId page, FrameId host_frame) {
  std::unique_lock lock(residency_.mutex);
  const PageEntry& entry = residency_.table.at(page);
  const Extent current = entry.stored_at();
  PageRecord record{{}, entry.generation + 1, 0};
  lock.unlock();
  try {
    record.extent = store_->take_extent(current);
  } catch (const Error& error) {
    writeback_failed(page, host_frame, error);
    return false;
  }
  spill_bytes_ = store_->allocated_bytes();
  record.checksum = page_checksum(host_pool_.slot(host_frame), host_pool_.page_bytes(), page, record.generation);
  writes_.emplace_back(page, record);
  lock.lock();
  if (residency_.table.at(page).state != PageState::writing) residency_.table.set_state(page, PageState::writing);
  ++residency_.counts.writebacks;
  lock.unlock();
  transfers_->start_writeback(page, host_frame, store_->file(record.extent.stripe), record.extent.offset_bytes);
  return true;
}

void PageMover::end_write(const FinishedTransfer& transfer) {
  const auto found =
      std::find_if(writes_.begin(), writes_.end(), [&](const auto& write) { return write.first == transfer.page; });
  TP_CHECK(found != writes_.end());
  const PageRecord record = found->second;
  writes_.erase(found);
  if (!transfer.error) {
    store_->written(transfer.page, record);
    const std::lock_guard lock(residency_.mutex);
    residency_.table.at(transfer.page).set_stored(record);
    return;
  }
  std::unique_lock lock(residency_.mutex);
  const Extent current = residency_.table.at(transfer.page).stored_at();
  lock.unlock();
  if (record.extent != current) store_->put_extent(record.extent);
}

void PageMover::read_backing(const PageEntry& entry, PageId page, std::byte* destination) const {
  const std::size_t page_bytes = host_pool_.page_bytes();
  std::memset(destination, 0, page_bytes);
  if (entry.backing == Backing::zero) return;
  const PageSource source = source_of(entry);
  // As a direct read wants it, whether the file was opened direct or not.
  const std::size_t skip = source.offset_bytes % kDirectAlignFallbackBytes;
  const std::size_t wanted = skip + source.valid_bytes;
  const std::size_t size =
      (wanted + kDirectAlignFallbackBytes - 1) / kDirectAlignFallbackBytes * kDirectAlignFallbackBytes;
  const std::unique_ptr<void, decltype(&std::free)> buffer(std::aligned_alloc(kDirectAlignFallbackBytes, size),
                                                           &std::free);
  if (buffer == nullptr) throw Error(ErrorKind::memory, "no memory for a page of " + std::to_string(size) + " bytes");
  auto* bytes = static_cast<std::byte*>(buffer.get());
  for (std::size_t done = 0; done < wanted;) {
    const ssize_t got = pread(source.file->descriptor(), bytes + done, size - done,
                              static_cast<off_t>(source.offset_bytes - skip + done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      throw Error(ErrorKind::io,
                  "reading " + source.file->path() + " at offset " + std::to_string(source.offset_bytes - skip + done) +
                      " (page " + std::to_string(page.value) +
                      ") failed: " + (got == 0 ? "the file ends there" : describe_errno(errno)),
                  got == 0 ? EIO : errno);
    }
    done += static_cast<std::size_t>(got);
  }
  if (entry.backing == Backing::quantised) {
    std::memcpy(destination, bytes, source.valid_bytes);
    if (!record_intact(destination, *source.quantised, page_bytes, source.offset_bytes / source.valid_bytes)) {
      throw Error(ErrorKind::io,
                  "quantised page " + std::to_string(page.value) + " came back from " + source.file->path() +
                      " with another checksum than it was written with",
                  EBADMSG);
    }
    return dequantise_in_place(destination, *source.quantised, page_bytes);
  }
  const bool whole = entry.backing == Backing::spill;
  std::memcpy(destination + (whole ? 0 : entry.lead_bytes), bytes + skip, source.valid_bytes);
  if (whole && page_checksum(destination, page_bytes, page, entry.generation) != entry.checksum) {
    throw Error(ErrorKind::io,
                "page " + std::to_string(page.value) + " came back from " + source.file->path() +
                    " with another checksum than it left with",
                EBADMSG);
  }
}

void PageMover::poll_transfers(std::chrono::nanoseconds timeout) {
  finished_.clear();
  transfers_->poll(finished_, timeout);
  std::exception_ptr failure;
  for (FinishedTransfer& transfer : finished_) {
    try {
      if (transfer.kind == TransferKind::writeback) end_write(transfer);
      finish(transfer);
    } catch (const Error&) {
      if (!failure) failure = std::current_exception();  // the others are finished all the same
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace tp
