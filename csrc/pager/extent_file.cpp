// SPDX-License-Identifier: Apache-2.0
#include "pager/extent_file.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <iterator>
#include <limits>
#include <utility>

#include "base/check.hpp"
#include "base/error.hpp"

namespace tp {
namespace {

constexpr std::uint64_t kFileBytesMax = std::numeric_limits<std::int64_t>::max();

void check_header(const ExtentHeader& found, const ExtentHeader& wanted, const std::string& path) {
  std::string difference;
  if (found.store != wanted.store) {
    difference = "it belongs to another pagefile (" + to_string(found.store) + ", not " + to_string(wanted.store) + ")";
  } else if (found.stripe != wanted.stripe) {
    difference = "it is extent file " + std::to_string(found.stripe) + " and stands in the place of number " +
                 std::to_string(wanted.stripe);
  } else if (found.page_bytes != wanted.page_bytes) {
    difference = "its pages have " + std::to_string(found.page_bytes) + " bytes, the root's " +
                 std::to_string(wanted.page_bytes);
  }
  if (difference.empty()) return;
  throw Error(ErrorKind::io,
              path + ": " + difference + ". Name the directories of one pagefile, in the order they were created in",
              EBADMSG);
}

}  // namespace

ExtentFile::ExtentFile(DurableFile file, std::uint64_t page_bytes, std::uint64_t growth_bytes)
    : file_(std::move(file)),
      page_bytes_(page_bytes),
      growth_bytes_(std::max(growth_bytes / page_bytes * page_bytes, page_bytes)),
      end_bytes_(page_bytes) {
  TP_CHECK(page_bytes >= kExtentHeaderBytes);
}

ExtentFile ExtentFile::create(FileSystem& file_system, const std::string& path, const ExtentHeader& header,
                              std::uint64_t growth_bytes) {
  ExtentFile file(DurableFile::create(file_system, path), header.page_bytes, growth_bytes);
  try {
    file.file_.write(0, encode_extent_header(header));
    file.file_.sync();
  } catch (const Error&) {
    file_system.remove(path);  // as far as that goes; what is thrown on says why
    throw;
  }
  return file;
}

ExtentFile ExtentFile::open(FileSystem& file_system, const std::string& path, const ExtentHeader& header,
                            std::uint64_t growth_bytes, std::span<const std::uint64_t> used) {
  TP_CHECK(std::is_sorted(used.begin(), used.end()));
  ExtentFile file(DurableFile::open(file_system, path), header.page_bytes, growth_bytes);
  std::array<std::byte, kExtentHeaderBytes> bytes{};
  if (file.file_.read(0, bytes) < bytes.size()) {
    throw Error(ErrorKind::io, path + " is too short for the header of an extent file; it was cut off or replaced",
                EBADMSG);
  }
  check_header(decode_extent_header(bytes, path), header, path);
  const std::uint64_t page_bytes = header.page_bytes;
  const std::uint64_t size_bytes = file.file_.size_bytes() / page_bytes * page_bytes;
  std::uint64_t next = page_bytes;  // everything before is in use or free already
  for (const std::uint64_t offset : used) {
    TP_CHECK(offset >= next && offset % page_bytes == 0);
    file.put_range(next, std::min(offset, size_bytes));
    next = offset + page_bytes;
  }
  file.put_range(next, size_bytes);
  file.end_bytes_ = std::max(next, size_bytes);
  file.used_count_ = used.size();
  return file;
}

// Nothing when the range is empty or turned round: a file that was cut short.
void ExtentFile::put_range(std::uint64_t first, std::uint64_t end) {
  if (first >= end) return;
  auto after = free_.lower_bound(first);
  TP_CHECK(after == free_.end() || after->first >= end);
  if (after != free_.end() && after->first == end) {
    end = after->second;
    after = free_.erase(after);
  }
  if (after != free_.begin()) {
    const auto before = std::prev(after);
    TP_CHECK(before->second <= first);
    if (before->second == first) {
      before->second = end;
      return;
    }
  }
  free_.emplace_hint(after, first, end);
}

void ExtentFile::grow() {
  TP_CHECK(end_bytes_ >= page_bytes_ && end_bytes_ % page_bytes_ == 0);
  if (end_bytes_ > kFileBytesMax - growth_bytes_) {
    throw Error(ErrorKind::io, path() + " can't grow beyond offset " + std::to_string(end_bytes_), EFBIG);
  }
  file_.preallocate(end_bytes_, growth_bytes_);
  put_range(end_bytes_, end_bytes_ + growth_bytes_);
  end_bytes_ += growth_bytes_;
}

std::uint64_t ExtentFile::take() {
  if (free_.empty()) grow();
  const auto lowest = free_.begin();
  const auto [offset, end] = *lowest;
  TP_CHECK(offset % page_bytes_ == 0 && offset + page_bytes_ <= end);
  free_.erase(lowest);
  if (offset + page_bytes_ < end) free_.emplace(offset + page_bytes_, end);
  ++used_count_;
  return offset;
}

void ExtentFile::put(std::uint64_t offset_bytes) {
  TP_CHECK(used_count_ > 0 && offset_bytes >= page_bytes_ && offset_bytes % page_bytes_ == 0);
  TP_CHECK(offset_bytes < end_bytes_);
  put_range(offset_bytes, offset_bytes + page_bytes_);
  --used_count_;
}

std::size_t ExtentFile::read(std::uint64_t offset_bytes, std::span<std::byte> bytes) const {
  TP_CHECK(offset_bytes >= page_bytes_ && bytes.size() == page_bytes_);
  return file_.read(offset_bytes, bytes);
}

void ExtentFile::write(std::uint64_t offset_bytes, std::span<const std::byte> bytes) {
  TP_CHECK(offset_bytes >= page_bytes_ && bytes.size() == page_bytes_);
  unsynced_ = true;
  file_.write(offset_bytes, bytes);
}

void ExtentFile::sync() {
  if (!unsynced_) return;
  file_.sync();
  unsynced_ = false;
}

}  // namespace tp
