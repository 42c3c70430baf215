// SPDX-License-Identifier: Apache-2.0
// The form in which a page of 16-bit numbers can lie in a file: 8-bit codes, and a float32 scale for each block of
// them. Half the bytes leave the drive, and half cross a device's link; the page itself is of 16-bit numbers as any
// other.
//
// A record, one for each page, of record_bytes():
//   codes     a byte for each number of the page
//   scales    a float32 for each block of block_elements numbers
//   zeros
//   checksum  uint64, the last 8 bytes: XXH3-64 of all before, seeded with the record's place in its file
// A number is code * scale, rounded to the nearest, as in device/number_formats.hpp. quantise_record() takes the
// largest magnitude of a block for the largest code (127 for int8, else the format's largest number); codes are rounded
// to nearest, ties to even.
//
// Threads: any. Blocking: never; a page of 2 MiB takes some hundred microseconds either way. Errors: quantise_record
// throws Error(invalid) when a number is infinite or none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "device/kernel_jobs.hpp"

namespace tp {

struct QuantisedLayout {
  kernel::QuantisedFormat codes = kernel::QuantisedFormat::int8;
  kernel::FloatFormat numbers = kernel::FloatFormat::bfloat16;
  std::uint32_t block_elements = 128;
};

// A record is never larger than its page, and its scales begin at a multiple of 4: block_elements is a power of two
// from 8 to 65536. Error(invalid).
void check_layout(const QuantisedLayout& layout);

std::size_t numbers_in_page(std::size_t page_bytes) noexcept;
std::size_t scales_offset_bytes(std::size_t page_bytes) noexcept;
std::size_t record_bytes(const QuantisedLayout& layout, std::size_t page_bytes) noexcept;  // a multiple of 4 KiB

// numbers: at most numbers_in_page(); the rest of the page is zeros.
void quantise_record(std::span<const std::uint16_t> numbers, const QuantisedLayout& layout, std::size_t page_bytes,
                     std::uint64_t record_index, std::byte* record);
// Whether the record is the one that was written there.
bool record_intact(const std::byte* record, const QuantisedLayout& layout, std::size_t page_bytes,
                   std::uint64_t record_index) noexcept;
// page: its first bytes are the record; all of them are the page's numbers afterwards.
void dequantise_in_place(std::byte* page, const QuantisedLayout& layout, std::size_t page_bytes);

}  // namespace tp
