// SPDX-License-Identifier: Apache-2.0
#include "pager/quantised_file.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/check.hpp"
#include "base/error.hpp"
#include "base/limits.hpp"

namespace tp {
namespace {

const QuantisedLayout& checked(const QuantisedLayout& layout) {
  check_layout(layout);
  return layout;
}

}  // namespace

QuantisedFile::QuantisedFile(const std::string& directory, const QuantisedLayout& layout, std::size_t page_bytes)
    : layout_(checked(layout)),
      page_bytes_(page_bytes),
      file_(File::open_spill(directory, DirectPolicy::optional)),
      record_(
          static_cast<std::byte*>(std::aligned_alloc(kDirectAlignFallbackBytes, record_bytes(layout_, page_bytes_))),
          &std::free) {
  TP_CHECK(page_bytes >= kPageBytesMin && page_bytes <= kPageBytesMax);
  if (record_ == nullptr) throw Error(ErrorKind::memory, "no memory for a quantised page");
  if (file_.align_bytes() > kDirectAlignFallbackBytes) file_ = File::open_spill(directory, DirectPolicy::disabled);
}

std::uint64_t QuantisedFile::append(std::span<const std::uint16_t> numbers) {
  if (given_away()) throw Error(ErrorKind::invalid, "the quantised file was given to a pager already");
  const std::uint64_t first = record_count_;
  const std::size_t in_page = numbers_in_page(page_bytes_), stride_bytes = record_bytes(layout_, page_bytes_);
  const std::uint64_t count = (numbers.size() + in_page - 1) / in_page;
  if (count == 0) throw Error(ErrorKind::invalid, "there are no numbers to quantise");
  file_.preallocate(first * stride_bytes, count * stride_bytes);
  for (std::uint64_t i = 0; i < count; ++i) {
    const auto piece = numbers.subspan(i * in_page, std::min(in_page, numbers.size() - i * in_page));
    quantise_record(piece, layout_, page_bytes_, first + i, record_.get());
    write_record((first + i) * stride_bytes);
  }
  record_count_ += count;
  return first;
}

void QuantisedFile::write_record(std::uint64_t offset_bytes) {
  const std::size_t size_bytes = record_bytes(layout_, page_bytes_);
  for (std::size_t done = 0; done < size_bytes;) {
    const ssize_t wrote =
        pwrite(file_.descriptor(), record_.get() + done, size_bytes - done, static_cast<off_t>(offset_bytes + done));
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote <= 0) {
      const int error_number = wrote < 0 ? errno : EIO;
      throw Error(ErrorKind::io,
                  "writing a quantised page to " + file_.path() + " at offset " + std::to_string(offset_bytes + done) +
                      " failed: " + describe_errno(error_number),
                  error_number);
    }
    done += static_cast<std::size_t>(wrote);
  }
}

}  // namespace tp
