// SPDX-License-Identifier: Apache-2.0
#include "pager/pagefile_root.hpp"

#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <limits>

#include "base/check.hpp"
#include "base/error.hpp"
#include "base/limits.hpp"

namespace tp {

static_assert(std::endian::native == std::endian::little, "numbers are stored as they lie in memory");

namespace {

constexpr char kRootMagic[] = "TPROOT\r\n";  // a transfer that rewrites line ends shows in the first eight bytes
constexpr char kExtentMagic[] = "TPPAGES\n";
constexpr std::size_t kMagicBytes = 8;
constexpr std::uint32_t kVersion = 1;
constexpr std::uint64_t kOffsetBytesMax = std::numeric_limits<std::int64_t>::max();

static_assert(sizeof kRootMagic == kMagicBytes + 1 && sizeof kExtentMagic == kMagicBytes + 1);

template <class Number>
void put(std::byte* bytes, std::size_t at, Number number) {
  std::memcpy(bytes + at, &number, sizeof number);
}

template <class Number>
Number get(const std::byte* bytes, std::size_t at) {
  Number number;
  std::memcpy(&number, bytes + at, sizeof number);
  return number;
}

[[noreturn]] void throw_damaged(const std::string& path, const std::string& what) {
  throw Error(ErrorKind::io,
              path + ": " + what + ". The file is damaged, or is no pagefile's; bring back a copy of the whole store",
              EBADMSG);
}

void check_magic(const std::byte* bytes, const char* magic, const std::string& path) {
  if (std::memcmp(bytes, magic, kMagicBytes) != 0) throw_damaged(path, "it does not begin as a pagefile's file does");
  const auto version = get<std::uint32_t>(bytes, 8);
  if (version == kVersion) return;
  throw_damaged(path, "its format has version " + std::to_string(version) + ", this release reads version " +
                          std::to_string(kVersion));
}

void check_page_bytes(std::uint64_t page_bytes, const std::string& path) {
  if (!valid_pagefile_page_bytes(page_bytes)) {
    throw_damaged(path, "a page size of " + std::to_string(page_bytes) + " bytes is not possible");
  }
}

void check_checksum(std::span<const std::byte> bytes, const std::string& path) {
  TP_CHECK(bytes.size() >= kRootChecksumBytes);
  const std::size_t size = bytes.size() - kRootChecksumBytes;
  if (XXH3_64bits(bytes.data(), size) != get<std::uint64_t>(bytes.data(), size)) {
    throw_damaged(path, "its checksum is wrong");
  }
}

void put_checksum(std::span<std::byte> bytes) {
  TP_CHECK(bytes.size() >= kRootChecksumBytes);
  const std::size_t size = bytes.size() - kRootChecksumBytes;
  put(bytes.data(), size, static_cast<std::uint64_t>(XXH3_64bits(bytes.data(), size)));
}

PageRecord decode_record(const std::byte* bytes, std::size_t page, const PagefileRoot& root, const std::string& path) {
  PageRecord record;
  record.extent.stripe = get<std::uint32_t>(bytes, 0);
  record.generation = get<std::uint32_t>(bytes, 4);
  record.extent.offset_bytes = get<std::uint64_t>(bytes, 8);
  record.checksum = get<std::uint64_t>(bytes, 16);
  const std::uint64_t offset = record.extent.offset_bytes;
  const bool possible = record.extent.valid()
                            ? record.extent.stripe < root.stripe_count && offset > 0 && offset % root.page_bytes == 0 &&
                                  offset <= kOffsetBytesMax - root.page_bytes
                            : offset == 0 && record.checksum == 0;
  if (!possible) {
    throw_damaged(path, "page " + std::to_string(page) + " cannot lie at offset " + std::to_string(offset) +
                            " of extent file " + std::to_string(record.extent.stripe));
  }
  return record;
}

void check_no_extent_twice(const PagefileRoot& root, const std::string& path) {
  std::vector<Extent> extents;
  extents.reserve(root.pages.size());
  for (const PageRecord& record : root.pages) {
    if (record.extent.valid()) extents.push_back(record.extent);
  }
  std::sort(extents.begin(), extents.end());
  const auto twice = std::adjacent_find(extents.begin(), extents.end());
  if (twice == extents.end()) return;
  throw_damaged(path, "two pages lie at offset " + std::to_string(twice->offset_bytes) + " of extent file " +
                          std::to_string(twice->stripe));
}

}  // namespace

std::string to_string(const StoreId& id) {
  char digits[33];
  std::snprintf(digits, sizeof digits, "%016llx%016llx", static_cast<unsigned long long>(id.words[0]),
                static_cast<unsigned long long>(id.words[1]));
  return digits;
}

bool valid_pagefile_page_bytes(std::uint64_t page_bytes) noexcept {
  return page_bytes >= kPagefilePageBytesMin && page_bytes <= kPageBytesMax && std::has_single_bit(page_bytes);
}

std::vector<std::byte> encode_root(const PagefileRoot& root) {
  TP_CHECK(valid_pagefile_page_bytes(root.page_bytes) && root.stripe_count > 0);
  TP_CHECK(root.metadata.size() <= kPagefileMetadataBytesMax);
  const std::size_t records_bytes = root.pages.size() * kRootRecordBytes;
  std::vector<std::byte> bytes(kRootHeaderBytes + records_bytes + root.metadata.size() + kRootChecksumBytes);
  std::memcpy(bytes.data(), kRootMagic, kMagicBytes);
  put(bytes.data(), 8, kVersion);
  put(bytes.data(), 12, static_cast<std::uint32_t>(kRootRecordBytes));
  put(bytes.data(), 16, root.store.words);
  put(bytes.data(), 32, root.commit_number);
  put(bytes.data(), 40, root.page_bytes);
  put(bytes.data(), 48, static_cast<std::uint64_t>(root.pages.size()));
  put(bytes.data(), 56, root.stripe_count);
  put(bytes.data(), 64, static_cast<std::uint64_t>(root.metadata.size()));
  std::byte* next = bytes.data() + kRootHeaderBytes;
  for (const PageRecord& record : root.pages) {
    put(next, 0, record.extent.stripe);
    put(next, 4, record.generation);
    put(next, 8, record.extent.offset_bytes);
    put(next, 16, record.checksum);
    next += kRootRecordBytes;
  }
  std::copy(root.metadata.begin(), root.metadata.end(), next);
  put_checksum(bytes);
  return bytes;
}

std::uint64_t root_size_bytes(std::span<const std::byte, kRootHeaderBytes> header, const std::string& path) {
  check_magic(header.data(), kRootMagic, path);
  const auto page_count = get<std::uint64_t>(header.data(), 48);
  const auto metadata_bytes = get<std::uint64_t>(header.data(), 64);
  // Page numbers have 32 bits and the highest means none, so the sum below can't overflow.
  if (page_count > std::numeric_limits<std::uint32_t>::max()) {
    throw_damaged(path, "a count of " + std::to_string(page_count) + " pages is not possible");
  }
  if (metadata_bytes > kPagefileMetadataBytesMax) {
    throw_damaged(path, std::to_string(metadata_bytes) + " bytes of metadata are not possible");
  }
  return kRootHeaderBytes + page_count * kRootRecordBytes + metadata_bytes + kRootChecksumBytes;
}

PagefileRoot decode_root(std::span<const std::byte> bytes, const std::string& path) {
  if (bytes.size() < kRootHeaderBytes + kRootChecksumBytes) throw_damaged(path, "it is too short for a root");
  const std::uint64_t size_bytes = root_size_bytes(bytes.first<kRootHeaderBytes>(), path);
  if (size_bytes != bytes.size()) {
    throw_damaged(path,
                  "it has " + std::to_string(bytes.size()) + " bytes and should have " + std::to_string(size_bytes));
  }
  check_checksum(bytes, path);
  PagefileRoot root;
  root.store.words = get<std::array<std::uint64_t, 2>>(bytes.data(), 16);
  root.commit_number = get<std::uint64_t>(bytes.data(), 32);
  root.page_bytes = get<std::uint64_t>(bytes.data(), 40);
  root.stripe_count = get<std::uint32_t>(bytes.data(), 56);
  check_page_bytes(root.page_bytes, path);
  if (root.stripe_count == 0 || root.stripe_count > kPagefileDirectoriesMax ||
      get<std::uint32_t>(bytes.data(), 12) != kRootRecordBytes || get<std::uint32_t>(bytes.data(), 60) != 0) {
    throw_damaged(path, "its header holds numbers that are not possible");
  }
  const auto page_count = get<std::uint64_t>(bytes.data(), 48);
  root.pages.reserve(page_count);
  const std::byte* next = bytes.data() + kRootHeaderBytes;
  for (std::uint64_t page = 0; page < page_count; ++page, next += kRootRecordBytes) {
    root.pages.push_back(decode_record(next, page, root, path));
  }
  root.metadata.assign(next, bytes.data() + bytes.size() - kRootChecksumBytes);
  check_no_extent_twice(root, path);
  return root;
}

std::array<std::byte, kExtentHeaderBytes> encode_extent_header(const ExtentHeader& header) {
  TP_CHECK(valid_pagefile_page_bytes(header.page_bytes) && header.stripe < kPagefileDirectoriesMax);
  std::array<std::byte, kExtentHeaderBytes> bytes{};
  std::memcpy(bytes.data(), kExtentMagic, kMagicBytes);
  put(bytes.data(), 8, kVersion);
  put(bytes.data(), 12, header.stripe);
  put(bytes.data(), 16, header.store.words);
  put(bytes.data(), 32, header.page_bytes);
  put_checksum(bytes);
  return bytes;
}

ExtentHeader decode_extent_header(std::span<const std::byte, kExtentHeaderBytes> bytes, const std::string& path) {
  check_magic(bytes.data(), kExtentMagic, path);
  check_checksum(bytes, path);
  ExtentHeader header;
  header.stripe = get<std::uint32_t>(bytes.data(), 12);
  header.store.words = get<std::array<std::uint64_t, 2>>(bytes.data(), 16);
  header.page_bytes = get<std::uint64_t>(bytes.data(), 32);
  check_page_bytes(header.page_bytes, path);
  return header;
}

}  // namespace tp
