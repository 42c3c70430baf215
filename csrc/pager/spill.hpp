// SPDX-License-Identifier: Apache-2.0
// Where modified pages go: extents of one page each in an unlinked file, reused, made in preallocated chunks so that a
// full disk is met before a byte is written. The file is opened at the first writeback; a directory that can't take it
// shows then.
//
// Threads: the executor thread. Blocking: opening and preallocating are. Errors: Error(io) naming directory, call and
// errno. Volatile by contract: the content ends with the process. Checksums are in the page table, in RAM.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "pager/page_store.hpp"

namespace tp {

class Spill final : public PageStore {
 public:
  Spill(std::string directory, std::size_t page_bytes);
  // The page's own place again, else one that opens or grows the file when it has to.
  Extent take_extent(Extent current) override;
  void put_extent(Extent extent) override;
  void written(PageId, const PageRecord&) override {}
  void discard(PageId page, Extent extent) override;
  const File& file(std::uint32_t stripe) const override;
  std::uint64_t allocated_bytes() const override { return end_bytes_; }

 private:
  std::string directory_;
  std::size_t page_bytes_;
  std::optional<File> file_;
  std::uint64_t end_bytes_ = 0;
  std::vector<std::uint64_t> free_;
};

// XXH3-64 of a page's bytes, seeded with page and generation: a stale, swapped or misdirected page has another sum.
std::uint64_t page_checksum(const std::byte* bytes, std::size_t size_bytes, PageId page,
                            std::uint32_t generation) noexcept;

}  // namespace tp
