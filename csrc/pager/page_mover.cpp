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

namespace tp {

PageMover::PageMover(Residency& residency, FramePool& host_pool, MoverOptions options)
    : residency_(residency),
      host_pool_(host_pool),
      options_(std::move(options)),
      spill_(options_.spill_directory, host_pool.page_bytes()) {
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
  if (entry.backing == Backing::spill) source.file = &spill_.file();
  if (entry.backing == Backing::spill) source.valid_bytes = static_cast<std::uint32_t>(host_pool_.page_bytes());
  if (entry.backing == Backing::zero) source.valid_bytes = 0;
  return source;
}

bool PageMover::write_back(PageId page, FrameId host_frame) {
  std::unique_lock lock(residency_.mutex);
  const PageEntry& entry = residency_.table.at(page);
  const bool has_extent = entry.backing == Backing::spill;
  std::uint64_t extent = entry.offset_bytes;
  const std::uint32_t generation = entry.generation + 1;
  lock.unlock();
  if (!has_extent) {
    try {
      extent = spill_.take_extent();
    } catch (const Error& error) {
      writeback_failed(page, host_frame, error);
      return false;
    }
    spill_bytes_ = spill_.allocated_bytes();
  }
  const std::uint64_t checksum = page_checksum(host_pool_.slot(host_frame), host_pool_.page_bytes(), page, generation);
  lock.lock();
  PageEntry& written = residency_.table.at(page);
  written.backing = Backing::spill;
  written.offset_bytes = extent;
  written.lead_bytes = 0;
  written.generation = generation;
  written.checksum = checksum;
  if (written.state != PageState::writing) residency_.table.set_state(page, PageState::writing);
  ++residency_.counts.writebacks;
  lock.unlock();
  transfers_->start_writeback(page, host_frame, spill_.file(), extent);
  return true;
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
      finish(transfer);
    } catch (const Error&) {
      if (!failure) failure = std::current_exception();  // the others are finished all the same
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace tp
