// SPDX-License-Identifier: Apache-2.0
// What a pagefile writes about itself, byte by byte: the root, and the header of an extent file. Little-endian.
//
// Root (root.tensorpager), one for each commit, exactly as long as its counts say:
//     0  8  magic "TPROOT\r\n"            40  8  page_bytes
//     8  4  version, 1                    48  8  count of pages
//    12  4  bytes of a page's record, 24  56  4  count of extent files (stripes)
//    16 16  store id                      60  4  zero
//    32  8  commit number                 64  8  bytes of metadata
//    72     a record for each page: stripe 4, generation 4, offset 8, checksum 8; stripe 0xffffffff: all zeros
//           the caller's metadata, then 8 bytes: XXH3-64 of everything before
// Header (the first 4 KiB of pages.tensorpager; extents follow from offset page_bytes on):
//     0  8  magic "TPPAGES\n"   8  4  version, 1   12  4  stripe   16 16  store id   32  8  page_bytes
//    40     zeros, and in the last 8 bytes XXH3-64 of everything before
//
// Decoding trusts nothing: each count is held against the size of the file before it is used, every offset against the
// page size, and no two pages may lie at one place. Threads: any. Errors: Error(io) with EBADMSG, naming the file.
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace tp {

struct StoreId {
  std::array<std::uint64_t, 2> words{};
  friend bool operator==(const StoreId&, const StoreId&) = default;
};

std::string to_string(const StoreId& id);  // 32 hexadecimal digits

// Room for one page in an extent file.
struct Extent {
  static constexpr std::uint32_t kNowhere = 0xffffffffu;
  std::uint32_t stripe = kNowhere;  // which extent file
  std::uint64_t offset_bytes = 0;   // a multiple of the page size, never 0
  bool valid() const noexcept { return stripe != kNowhere; }
  friend auto operator<=>(const Extent&, const Extent&) = default;
};

struct PageRecord {
  Extent extent;  // not valid: the page is all zeros and lies nowhere
  std::uint32_t generation = 0;
  std::uint64_t checksum = 0;
  friend bool operator==(const PageRecord&, const PageRecord&) = default;
};

struct PagefileRoot {
  StoreId store;
  std::uint64_t commit_number = 0;
  std::uint64_t page_bytes = 0;
  std::uint32_t stripe_count = 0;
  std::vector<PageRecord> pages;
  std::vector<std::byte> metadata;
};

struct ExtentHeader {
  StoreId store;
  std::uint32_t stripe = 0;
  std::uint64_t page_bytes = 0;
};

inline constexpr std::size_t kRootHeaderBytes = 72;
inline constexpr std::size_t kRootRecordBytes = 24;
inline constexpr std::size_t kRootChecksumBytes = 8;
inline constexpr std::size_t kExtentHeaderBytes = 4096;

// Whether pages of a pagefile may have this size.
bool valid_pagefile_page_bytes(std::uint64_t page_bytes) noexcept;

std::vector<std::byte> encode_root(const PagefileRoot& root);
// How long the file must be, by the first kRootHeaderBytes of it: asked before the rest is read.
std::uint64_t root_size_bytes(std::span<const std::byte, kRootHeaderBytes> header, const std::string& path);
PagefileRoot decode_root(std::span<const std::byte> bytes, const std::string& path);

std::array<std::byte, kExtentHeaderBytes> encode_extent_header(const ExtentHeader& header);
ExtentHeader decode_extent_header(std::span<const std::byte, kExtentHeaderBytes> bytes, const std::string& path);

}  // namespace tp
