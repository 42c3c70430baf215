// SPDX-License-Identifier: Apache-2.0
// Pages whose bytes a number makes, and what a pagefile should hold of them.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "pager/pagefile.hpp"
#include "sim/sim_file_system.hpp"
#include "tests/test_files.hpp"
#include "tests/thrown_error.hpp"

namespace tp::test {

inline constexpr std::size_t kTestPageBytes = 4096;

// Salt 0 is a page of zeros.
inline std::vector<std::byte> page_of(std::uint64_t salt, std::size_t page_bytes = kTestPageBytes) {
  std::vector<std::byte> bytes(page_bytes);
  if (salt == 0) return bytes;
  for (std::size_t at = 0; at < page_bytes; at += 8) {
    const std::uint64_t word = pattern(at / 8, salt);
    std::memcpy(bytes.data() + at, &word, sizeof word);
  }
  return bytes;
}

inline std::vector<std::byte> metadata_of(const std::string& text) {
  const auto* bytes = reinterpret_cast<const std::byte*>(text.data());
  return {bytes, bytes + text.size()};
}

inline std::string text_of(std::span<const std::byte> metadata) {
  return {reinterpret_cast<const char*>(metadata.data()), metadata.size()};
}

// What a store holds: the salt of each page, and the metadata.
struct Content {
  std::vector<std::uint64_t> salts;
  std::string metadata;
  friend bool operator==(const Content&, const Content&) = default;
};

// Salts can't be read from bytes, so the answer is whether the store holds just this, every byte of it.
inline bool holds(const Pagefile& store, const Content& content) {
  if (store.page_count() != content.salts.size() || text_of(store.metadata()) != content.metadata) return false;
  std::vector<std::byte> bytes(store.page_bytes());
  for (std::uint32_t page = 0; page < store.page_count(); ++page) {
    store.read(PageId{page}, bytes);
    if (bytes != page_of(content.salts[page], bytes.size())) return false;
  }
  return true;
}

inline void write_salt(Pagefile& store, std::uint32_t page, std::uint64_t salt) {
  store.write(PageId{page}, page_of(salt, store.page_bytes()));
}

inline std::vector<std::byte> read_page(const Pagefile& store, std::uint32_t page) {
  std::vector<std::byte> bytes(store.page_bytes(), std::byte{0xa5});
  store.read(PageId{page}, bytes);
  return bytes;
}

inline PagefileOptions small_growth(std::uint64_t growth_bytes = kTestPageBytes) {
  PagefileOptions options;
  options.growth_bytes = growth_bytes;
  return options;
}

inline const std::string kRootPath = "/a/root.tensorpager";
inline const std::string kExtentPath = "/a/pages.tensorpager";

// A store in /a whose pages 0, 1, ... have the salts 1, 2, ..., committed with the metadata "first".
inline Pagefile committed_store(SimFileSystem& sim, std::uint32_t page_count, const std::string& directory = "/a") {
  Pagefile store = Pagefile::create({directory}, kTestPageBytes, small_growth(), sim);
  store.grow(page_count);
  for (std::uint32_t page = 0; page < page_count; ++page) write_salt(store, page, page + 1);
  store.commit(metadata_of("first"));
  return store;
}

}  // namespace tp::test
