// SPDX-License-Identifier: Apache-2.0
#include "pager/page_flush.hpp"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <string>
#include <thread>

#include "base/check.hpp"
#include "base/limits.hpp"
#include "pager/spill.hpp"
#include "pager/transfer.hpp"

namespace tp {
namespace {

constexpr std::uint64_t kRequestBits = 8;
static_assert(kPageBytesMax / kIoRequestBytesMax < (1u << kRequestBits));
// A page on its way is the executor's, which tells nobody when it has arrived unless asked to bring it.
constexpr std::chrono::microseconds kOnItsWayPoll(100);

}  // namespace

PageFlush::PageFlush(Residency& residency, HostAddressSpace& space, PageStore& store, IoQueue& queue)
    : residency_(residency),
      space_(space),
      store_(store),
      queue_(queue),
      requests_per_page_(
          static_cast<std::uint32_t>((space.page_bytes() + kIoRequestBytesMax - 1) / kIoRequestBytesMax)) {
  const std::size_t by_pins = std::max<std::size_t>(1, residency.pinnable_pages() / 2);
  writes_max_ = std::min<std::size_t>({kFlushWritesMax, queue.depth() / requests_per_page_, by_pins});
  TP_CHECK(writes_max_ > 0);
  writes_.resize(writes_max_);
}

using Outcome = Residency::FlushOutcome;

void PageFlush::run(const Residency::Interrupted& interrupted) {
  {
    const std::lock_guard lock(residency_.mutex);
    residency_.hand_back_discarded(store_);
  }
  try {
    for (const PageId page : residency_.modified_pages()) {
      while (in_flight_ == writes_max_) wait_for_one();
      if (error_) break;
      if (interrupted) interrupted();
      Residency::FlushedPage flushed;
      for (;;) {
        flushed = residency_.begin_flush(page);
        const bool later = flushed.outcome == Outcome::on_its_way || flushed.outcome == Outcome::no_room;
        if (!later || error_) break;
        if (wait_for_one()) continue;
        if (flushed.outcome == Outcome::no_room) {
          throw Error(ErrorKind::invalid,
                      "commit() found the whole budget held by open steps; commit between steps, with nothing held");
        }
        std::this_thread::sleep_for(kOnItsWayPoll);
      }
      if (flushed.outcome == Outcome::begun) start(page, flushed.generation, flushed.extent);
    }
  } catch (...) {
    while (wait_for_one()) {
    }
    throw;
  }
  while (wait_for_one()) {
  }
  if (error_) throw *error_;
}

void PageFlush::start(PageId page, std::uint32_t generation, Extent current) {
  Write write{page, {{}, generation + 1, 0}, requests_per_page_, 0, 0};
  try {
    write.record.extent = store_.take_extent(current);
  } catch (const Error& error) {
    return fail(page, error);
  }
  std::byte* bytes = space_.address(page);
  const std::size_t page_bytes = space_.page_bytes();
  write.record.checksum = page_checksum(bytes, page_bytes, page, write.record.generation);
  const auto slot = static_cast<std::size_t>(
      std::find_if(writes_.begin(), writes_.end(), [](const Write& each) { return !each.page.valid(); }) -
      writes_.begin());
  TP_CHECK(slot < writes_.size());
  const FileId file = io_file(write.record.extent.stripe);
  std::vector<IoRequest> requests;
  for (std::size_t offset = 0; offset < page_bytes; offset += kIoRequestBytesMax) {
    const std::size_t size = std::min(page_bytes - offset, kIoRequestBytesMax);
    requests.push_back({slot << kRequestBits | requests.size(), IoOp::write, file,
                        write.record.extent.offset_bytes + offset, bytes + offset, static_cast<std::uint32_t>(size)});
  }
  TP_CHECK(requests.size() == write.requests_left);
  writes_[slot] = write;
  ++in_flight_;
  queue_.submit(requests);
}

FileId PageFlush::io_file(std::uint32_t stripe) {
  if (files_.size() <= stripe) files_.resize(stripe + 1);
  if (!files_[stripe]) {
    const File& file = store_.file(stripe);
    files_[stripe] = queue_.add_file(file.descriptor(), file.align_bytes());
  }
  return *files_[stripe];
}

bool PageFlush::wait_for_one() {
  if (in_flight_ == 0) return false;
  completions_.clear();
  queue_.wait(completions_, std::chrono::seconds(1));
  for (const IoCompletion& completion : completions_) complete(completion);
  return true;
}

void PageFlush::complete(const IoCompletion& completion) {
  const std::size_t slot = completion.token >> kRequestBits;
  const std::uint64_t request = completion.token & ((1u << kRequestBits) - 1);
  TP_CHECK(slot < writes_.size() && writes_[slot].requests_left > 0);
  Write& write = writes_[slot];
  const std::uint64_t begin = request * kIoRequestBytesMax;
  const std::uint64_t must_have = std::min<std::uint64_t>(kIoRequestBytesMax, space_.page_bytes() - begin);
  if (completion.error != 0 || completion.transferred_bytes < must_have) {
    if (write.error_number == 0) write.error_offset_bytes = write.record.extent.offset_bytes + begin;
    if (write.error_number == 0) write.error_number = completion.error != 0 ? completion.error : EIO;
  }
  if (--write.requests_left == 0) finish(write);
}

void PageFlush::finish(Write& write) {
  const PageId page = write.page;
  const PageRecord record = write.record;
  --in_flight_;
  write.page = PageId{};
  if (write.error_number != 0) {
    const Error error = transfer_error(TransferKind::writeback, store_.file(record.extent.stripe),
                                       write.error_offset_bytes, page, write.error_number, false);
    store_.put_extent(record.extent);
    return fail(page, error);
  }
  if (!residency_.flush_undisturbed(page)) {
    store_.put_extent(record.extent);
    return fail(page, Error(ErrorKind::invalid,
                            "page " + std::to_string(page.value) +
                                " was written to while commit() wrote it to the drive, so nothing was committed; "
                                "commit between steps, when no other thread changes the model"));
  }
  store_.written(page, record);
  residency_.end_flush(page, &record);
}

void PageFlush::fail(PageId page, const Error& error) {
  residency_.end_flush(page, nullptr);
  if (!error_) error_ = error;
}

}  // namespace tp
