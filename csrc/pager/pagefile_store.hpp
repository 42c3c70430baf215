// SPDX-License-Identifier: Apache-2.0
// The page store that stays: a Pagefile under one lock, whose pages have the numbers of the address space's. Transfers
// go to its extent files through descriptors of their own, direct where the file system takes that.
//
// Threads: any. A commit() holds the lock while it waits for the drive, and so whoever else calls meanwhile waits too.
// Blocking: all but the getters. Errors: as Pagefile; discard() throws none: a store that takes no more writes keeps
// what it has, and the next take_extent() or commit() says why.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "io/file.hpp"
#include "pager/page_store.hpp"
#include "pager/page_table.hpp"
#include "pager/pagefile.hpp"

namespace tp {

class PagefileStore final : public PageStore {
 public:
  explicit PagefileStore(Pagefile pagefile);  // in which no commit is prepared

  // The address space has got pages. Those that the store had already come back as they were at its last commit.
  void attach(PageId first, std::span<PageEntry> entries);
  void commit(std::span<const std::byte> metadata);
  void prepare(std::span<const std::byte> metadata);
  void publish();
  void abandon();
  std::uint64_t commit_number() const;
  std::uint64_t page_bytes() const noexcept { return page_bytes_; }

  Extent take_extent(Extent current) override;
  void put_extent(Extent extent) override;
  void written(PageId page, const PageRecord& record) override;
  void discard(PageId page, Extent extent) override;
  const File& file(std::uint32_t stripe) const override;
  std::uint64_t allocated_bytes() const override;

 private:
  mutable std::mutex mutex_;
  Pagefile pagefile_;
  std::uint64_t page_bytes_;
  std::vector<File> files_;  // by stripe
};

}  // namespace tp
