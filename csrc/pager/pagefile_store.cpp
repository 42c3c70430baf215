// SPDX-License-Identifier: Apache-2.0
#include "pager/pagefile_store.hpp"

#include <utility>

#include "base/check.hpp"
#include "base/error.hpp"

namespace tp {

PagefileStore::PagefileStore(Pagefile pagefile) : pagefile_(std::move(pagefile)), page_bytes_(pagefile_.page_bytes()) {
  pagefile_.refuse_when_undecided();
  for (std::uint32_t stripe = 0; stripe < pagefile_.stripe_count(); ++stripe)
    files_.push_back(File::open_stored(pagefile_.extent_file(stripe).path(), DirectPolicy::optional));
  TP_CHECK(!files_.empty());
}

void PagefileStore::attach(PageId first, std::span<PageEntry> entries) {
  const std::lock_guard lock(mutex_);
  const std::uint64_t end = std::uint64_t{first.value} + entries.size();
  if (end > pagefile_.page_count()) pagefile_.grow(static_cast<std::uint32_t>(end - pagefile_.page_count()));
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const PageRecord& record = pagefile_.record(PageId{first.value + static_cast<std::uint32_t>(i)});
    entries[i].generation = record.generation;
    if (record.extent.valid()) entries[i].set_stored(record);
  }
}

void PagefileStore::commit(std::span<const std::byte> metadata) {
  const std::lock_guard lock(mutex_);
  pagefile_.commit(metadata);
}

void PagefileStore::prepare(std::span<const std::byte> metadata) {
  const std::lock_guard lock(mutex_);
  pagefile_.prepare(metadata);
}

void PagefileStore::publish() {
  const std::lock_guard lock(mutex_);
  pagefile_.publish();
}

void PagefileStore::abandon() {
  const std::lock_guard lock(mutex_);
  pagefile_.abandon();
}

std::uint64_t PagefileStore::commit_number() const {
  const std::lock_guard lock(mutex_);
  return pagefile_.commit_number();
}

// Never where the page is: the last commit may be there.
Extent PagefileStore::take_extent(Extent) {
  const std::lock_guard lock(mutex_);
  return pagefile_.take_extent();
}

void PagefileStore::put_extent(Extent extent) {
  const std::lock_guard lock(mutex_);
  pagefile_.put_extent(extent);
}

void PagefileStore::written(PageId page, const PageRecord& record) {
  const std::lock_guard lock(mutex_);
  pagefile_.written(page, record.extent, record.checksum, record.generation);
}

void PagefileStore::discard(PageId page, Extent extent) {
  const std::lock_guard lock(mutex_);
  const bool still_there = pagefile_.record(page).extent == extent;
  if (still_there && !pagefile_.stopped()) pagefile_.discard(page);
}

const File& PagefileStore::file(std::uint32_t stripe) const {
  TP_CHECK(stripe < files_.size());
  return files_[stripe];
}

std::uint64_t PagefileStore::allocated_bytes() const {
  const std::lock_guard lock(mutex_);
  std::uint64_t extents = 0;
  for (std::uint32_t stripe = 0; stripe < pagefile_.stripe_count(); ++stripe)
    extents += pagefile_.extent_file(stripe).used_count();
  return extents * page_bytes_;
}

}  // namespace tp
