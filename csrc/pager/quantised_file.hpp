// SPDX-License-Identifier: Apache-2.0
// Records of quantised pages (quantised_page.hpp) in a file of our own, which has no name and ends with the process.
// Made by its owner, then given to Pager::map_quantised(), whose pages they become in the order of append().
//
// Threads: one. Blocking: append() writes. Errors: Error(io) naming directory, call and errno, a full disk before
// anything is written; Error(invalid) as quantise_record(). After an error the file is as before the call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>

#include "device/quantised_page.hpp"
#include "io/file.hpp"

namespace tp {

class QuantisedFile {
 public:
  // page_bytes: of the pager that will map it. Error(invalid) for a layout that breaks its rules.
  QuantisedFile(const std::string& directory, const QuantisedLayout& layout, std::size_t page_bytes);

  // As many records as the numbers fill, the last one filled up with zeros. Returns the first one's place.
  std::uint64_t append(std::span<const std::uint16_t> numbers);

  const QuantisedLayout& layout() const noexcept { return layout_; }
  std::size_t page_bytes() const noexcept { return page_bytes_; }
  std::uint64_t record_count() const noexcept { return record_count_; }
  std::uint64_t size_bytes() const noexcept { return record_count_ * record_bytes(layout_, page_bytes_); }
  bool given_away() const noexcept { return record_ == nullptr; }
  File& file() noexcept { return file_; }

 private:
  void write_record(std::uint64_t offset_bytes);

  QuantisedLayout layout_;
  std::size_t page_bytes_;
  File file_;
  std::uint64_t record_count_ = 0;
  std::unique_ptr<std::byte, decltype(&std::free)> record_;  // aligned, for direct writes
};

}  // namespace tp
