// SPDX-License-Identifier: Apache-2.0
#include "pager/spill.hpp"

#include <xxhash.h>

#include <cerrno>

#include "base/check.hpp"
#include "base/error.hpp"
#include "base/limits.hpp"

namespace tp {
namespace {
constexpr std::uint64_t kChunkBytes = 64 * kMiB;
}

Spill::Spill(std::string directory, std::size_t page_bytes)
    : directory_(std::move(directory)), page_bytes_(page_bytes) {
  TP_CHECK(page_bytes > 0 && kChunkBytes % page_bytes == 0);
}

Extent Spill::take_extent(Extent current) {
  if (current.valid()) return current;
  if (directory_.empty()) {
    throw Error(ErrorKind::io, "a modified page must leave memory, but there is no spill directory; give one (store=)",
                ENOENT);
  }
  if (!file_) file_ = File::open_spill(directory_, DirectPolicy::optional);
  if (free_.empty()) {
    file_->preallocate(end_bytes_, kChunkBytes);
    // Pushed in descending order, so that extents are taken in ascending order and writes run on.
    for (std::uint64_t offset = kChunkBytes; offset > 0; offset -= page_bytes_)
      free_.push_back(end_bytes_ + offset - page_bytes_);
    end_bytes_ += kChunkBytes;
  }
  const Extent extent{0, free_.back()};
  free_.pop_back();
  TP_CHECK(extent.offset_bytes % page_bytes_ == 0 && extent.offset_bytes < end_bytes_);
  return extent;
}

void Spill::put_extent(Extent extent) {
  TP_CHECK(extent.stripe == 0 && extent.offset_bytes % page_bytes_ == 0 && extent.offset_bytes < end_bytes_);
  free_.push_back(extent.offset_bytes);
}

void Spill::discard(PageId, Extent extent) { put_extent(extent); }

const File& Spill::file(std::uint32_t stripe) const {
  TP_CHECK(file_.has_value() && stripe == 0);
  return *file_;
}

std::uint64_t page_checksum(const std::byte* bytes, std::size_t size_bytes, PageId page,
                            std::uint32_t generation) noexcept {
  TP_DCHECK(bytes != nullptr && page.valid());
  const std::uint64_t seed = static_cast<std::uint64_t>(page.value) << 32 | generation;
  return XXH3_64bits_withSeed(bytes, size_bytes, seed);
}

}  // namespace tp
