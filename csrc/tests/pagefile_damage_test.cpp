// SPDX-License-Identifier: Apache-2.0
// Bytes on the drive that are not those a pagefile wrote: always found, and named.
#include <gtest/gtest.h>
#include <xxhash.h>

#include <cerrno>
#include <cstring>

#include "pager/pagefile.hpp"
#include "tests/pagefile_fixture.hpp"

namespace tp {
namespace {

using test::committed_store;
using test::error_of;
using test::has;
using test::kExtentPath;
using test::kRootPath;
using test::kTestPageBytes;
using test::metadata_of;
using test::page_of;
using test::read_page;
using test::small_growth;
using test::write_salt;

class PagefileDamageTest : public ::testing::Test {
 protected:
  std::uint64_t offset_of(std::uint32_t page) const { return store_.record(PageId{page}).extent.offset_bytes; }
  std::vector<std::byte> stored(std::uint32_t page) const {
    const std::vector<std::byte> file = sim_.contents(kExtentPath);
    const auto begin = file.begin() + static_cast<std::ptrdiff_t>(offset_of(page));
    return {begin, begin + kTestPageBytes};
  }
  void put(std::uint32_t page, std::span<const std::byte> bytes) {
    sim_.overwrite(kExtentPath, offset_of(page), bytes);
  }
  // verify() finds this page alone, and read() refuses it.
  void expect_only_damaged(std::uint32_t page, const std::string& why) const {
    const std::vector<DamagedPage> damaged = store_.verify();
    ASSERT_EQ(damaged.size(), 1u);
    EXPECT_EQ(damaged[0].page, PageId{page});
    EXPECT_EQ(damaged[0].file, kExtentPath);
    EXPECT_EQ(damaged[0].offset_bytes, offset_of(page));
    EXPECT_TRUE(has(damaged[0].why, why)) << damaged[0].why;
    const Error error = error_of([&] { read_page(store_, page); });
    EXPECT_EQ(error.error_number(), EBADMSG);
    EXPECT_TRUE(has(error.what(), "page " + std::to_string(page) + " at offset")) << error.what();
    EXPECT_TRUE(has(error.what(), kExtentPath) && has(error.what(), why)) << error.what();
  }

  SimFileSystem sim_;
  Pagefile store_ = committed_store(sim_, 3);
};

TEST_F(PagefileDamageTest, every_flipped_bit_of_a_page_is_found) {
  std::vector<std::byte> bytes = stored(1);
  std::vector<std::byte> page(kTestPageBytes);
  for (std::size_t bit = 0; bit < kTestPageBytes * 8; ++bit) {
    const std::size_t at = bit / 8;
    const std::byte right = bytes[at];
    const std::byte wrong = right ^ static_cast<std::byte>(1u << bit % 8);
    sim_.overwrite(kExtentPath, offset_of(1) + at, {&wrong, 1});
    bool found = false;
    try {
      store_.read(PageId{1}, page);
    } catch (const Error& error) {
      found = error.error_number() == EBADMSG;
    }
    ASSERT_TRUE(found) << "bit " << bit;
    if (bit % 4999 == 0) expect_only_damaged(1, "wrong checksum");
    sim_.overwrite(kExtentPath, offset_of(1) + at, {&right, 1});
  }
  EXPECT_TRUE(store_.verify().empty());
}

TEST_F(PagefileDamageTest, a_page_torn_at_any_sector_is_found) {
  const std::vector<std::byte> after = stored(1);
  const std::vector<std::byte> before = page_of(99);
  for (std::size_t torn_at = 0; torn_at < kTestPageBytes; torn_at += 512) {
    std::vector<std::byte> torn = after;
    std::copy(before.begin() + static_cast<std::ptrdiff_t>(torn_at), before.end(),
              torn.begin() + static_cast<std::ptrdiff_t>(torn_at));
    put(1, torn);
    expect_only_damaged(1, "wrong checksum");
  }
  put(1, after);
  EXPECT_TRUE(store_.verify().empty());
}

TEST_F(PagefileDamageTest, bytes_of_another_page_are_found_even_when_both_have_equal_content) {
  put(1, stored(2));
  expect_only_damaged(1, "wrong checksum");
  put(1, page_of(2));
  write_salt(store_, 2, 2);  // now pages 1 and 2 have the same bytes; the records say which is which
  store_.commit({});
  EXPECT_NE(store_.record(PageId{1}).checksum, store_.record(PageId{2}).checksum);
}

TEST_F(PagefileDamageTest, older_bytes_of_the_same_page_are_found) {
  const std::vector<std::byte> older = stored(1);
  write_salt(store_, 1, 50);
  store_.commit({});
  put(1, older);
  expect_only_damaged(1, "wrong checksum");
}

TEST_F(PagefileDamageTest, two_exchanged_pages_are_both_found) {
  const std::vector<std::byte> one = stored(0);
  put(0, stored(2));
  put(2, one);
  const std::vector<DamagedPage> damaged = store_.verify();
  ASSERT_EQ(damaged.size(), 2u);
  EXPECT_EQ(damaged[0].page, PageId{0});
  EXPECT_EQ(damaged[1].page, PageId{2});
}

TEST_F(PagefileDamageTest, a_page_that_cannot_be_read_is_among_the_damaged_and_the_rest_is_read) {
  sim_.fail({.call = SimCall::pread, .nth = 2});
  const std::vector<DamagedPage> damaged = store_.verify();
  ASSERT_EQ(damaged.size(), 1u);
  EXPECT_EQ(damaged[0].page, PageId{1});
  EXPECT_TRUE(has(damaged[0].why, "EIO")) << damaged[0].why;
}

TEST(PagefileFilesTest, extent_files_of_two_stores_that_changed_places_are_named) {
  SimFileSystem sim;
  {
    committed_store(sim, 2, "/a");
  }
  {
    committed_store(sim, 2, "/b");
  }
  sim.exchange("/a/pages.tensorpager", "/b/pages.tensorpager");
  for (const std::string directory : {"/a", "/b"}) {
    const Error error = error_of([&] { Pagefile::open({directory}, small_growth(), sim); });
    EXPECT_EQ(error.error_number(), EBADMSG);
    EXPECT_TRUE(has(error.what(), directory + "/pages.tensorpager: it belongs to another pagefile")) << error.what();
  }
}

TEST(PagefileFilesTest, a_root_of_another_store_is_named_by_its_extent_file) {
  SimFileSystem sim;
  {
    committed_store(sim, 2, "/a");
  }
  {
    committed_store(sim, 2, "/b");
  }
  sim.exchange("/a/root.tensorpager", "/b/root.tensorpager");
  EXPECT_EQ(error_of([&] { Pagefile::open({"/a"}, small_growth(), sim); }).error_number(), EBADMSG);
}

TEST(PagefileFilesTest, an_extent_file_cut_off_anywhere_is_refused_or_its_pages_are_named) {
  constexpr std::uint32_t kPages = 3;
  for (std::uint64_t size_bytes = 0; size_bytes < (kPages + 1) * kTestPageBytes; size_bytes += 256) {
    SCOPED_TRACE(size_bytes);
    SimFileSystem sim;
    {
      committed_store(sim, kPages);
    }
    sim.truncate(kExtentPath, size_bytes);
    if (size_bytes < kExtentHeaderBytes) {
      const Error error = error_of([&] { Pagefile::open({"/a"}, small_growth(), sim); });
      EXPECT_EQ(error.error_number(), EBADMSG);
      EXPECT_TRUE(has(error.what(), kExtentPath)) << error.what();
      continue;
    }
    Pagefile store = Pagefile::open({"/a"}, small_growth(), sim);
    const std::uint64_t whole_pages = size_bytes / kTestPageBytes - 1;
    const std::vector<DamagedPage> damaged = store.verify();
    ASSERT_EQ(damaged.size(), kPages - whole_pages);
    for (const DamagedPage& each : damaged) EXPECT_TRUE(has(each.why, "too short")) << each.why;
    // What is whole can be used on, and new pages go where no page is said to lie.
    for (std::uint32_t page = 0; page < kPages; ++page) write_salt(store, page, 20 + page);
    store.commit({});
    EXPECT_TRUE(store.verify().empty());
  }
}

TEST(PagefileFilesTest, every_changed_byte_of_an_extent_files_header_is_found) {
  SimFileSystem sim;
  {
    committed_store(sim, 1);
  }
  const std::vector<std::byte> file = sim.contents(kExtentPath);
  for (std::size_t at = 0; at < kExtentHeaderBytes; ++at) {
    const std::byte wrong = file[at] ^ std::byte{0xff};
    sim.overwrite(kExtentPath, at, {&wrong, 1});
    const Error error = error_of([&] { Pagefile::open({"/a"}, small_growth(), sim); });
    ASSERT_EQ(error.error_number(), EBADMSG) << at;
    ASSERT_TRUE(has(error.what(), kExtentPath)) << error.what();
    sim.overwrite(kExtentPath, at, {&file[at], 1});
  }
  EXPECT_TRUE(test::holds(Pagefile::open({"/a"}, small_growth(), sim), {{1}, "first"}));
}

TEST(PagefileFilesTest, every_flipped_bit_of_a_root_is_found) {
  SimFileSystem sim;
  {
    committed_store(sim, 2);
  }
  const std::vector<std::byte> root = sim.contents(kRootPath);
  for (std::size_t bit = 0; bit < root.size() * 8; ++bit) {
    const std::byte wrong = root[bit / 8] ^ static_cast<std::byte>(1u << bit % 8);
    sim.overwrite(kRootPath, bit / 8, {&wrong, 1});
    const Error error = error_of([&] { Pagefile::open({"/a"}, small_growth(), sim); });
    ASSERT_EQ(error.error_number(), EBADMSG) << bit;
    ASSERT_TRUE(has(error.what(), kRootPath)) << error.what();
    sim.overwrite(kRootPath, bit / 8, {&root[bit / 8], 1});
  }
}

TEST(PagefileFilesTest, a_root_of_any_other_length_is_refused) {
  SimFileSystem sim;
  {
    committed_store(sim, 2);
  }
  const std::vector<std::byte> root = sim.contents(kRootPath);
  for (std::size_t size_bytes = 0; size_bytes < root.size() + 64; ++size_bytes) {
    std::vector<std::byte> other = root;
    other.resize(size_bytes);
    sim.replace(kRootPath, other);
    if (size_bytes == root.size()) continue;
    const Error error = error_of([&] { Pagefile::open({"/a"}, small_growth(), sim); });
    ASSERT_EQ(error.error_number(), EBADMSG) << size_bytes;
    ASSERT_TRUE(has(error.what(), kRootPath)) << error.what();
  }
}

// Somebody who can make checksums, too, gets an error or a store that can be read; memory goes with the file's size.
TEST(PagefileFilesTest, a_root_with_a_right_checksum_and_wrong_numbers_does_no_harm) {
  SimFileSystem sim;
  {
    committed_store(sim, 2);
  }
  const std::vector<std::byte> root = sim.contents(kRootPath);
  const std::size_t end = root.size() - kRootChecksumBytes;
  std::size_t refused = 0;
  for (std::size_t at = 0; at < end; ++at) {
    for (const unsigned value : {0x00u, 0x01u, 0x7fu, 0x80u, 0xffu}) {
      std::vector<std::byte> other = root;
      other[at] = static_cast<std::byte>(value);
      const std::uint64_t checksum = XXH3_64bits(other.data(), end);
      std::memcpy(other.data() + end, &checksum, sizeof checksum);
      sim.replace(kRootPath, other);
      try {
        Pagefile store = Pagefile::open({"/a"}, small_growth(), sim);
        store.verify();
        for (std::uint32_t page = 0; page < store.page_count(); ++page) write_salt(store, page, 9);
        store.commit({});
      } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::io);
        ++refused;
      }
    }
  }
  EXPECT_GT(refused, end);
}

TEST(PagefileFilesTest, counts_that_claim_huge_sizes_ask_for_no_memory) {
  SimFileSystem sim;
  {
    committed_store(sim, 2);
  }
  const std::vector<std::byte> root = sim.contents(kRootPath);
  for (const std::size_t at : {48u, 64u}) {  // the counts of pages and of metadata
    for (const std::uint64_t count : {1ull << 31, 0xffffffffull, 1ull << 40, 1ull << 63, ~0ull}) {
      sim.overwrite(kRootPath, at, std::as_bytes(std::span(&count, 1)));
      EXPECT_EQ(error_of([&] { Pagefile::open({"/a"}, small_growth(), sim); }).error_number(), EBADMSG);
    }
    sim.replace(kRootPath, root);
  }
}

TEST(PagefileFilesTest, two_pages_at_one_place_are_refused) {
  PagefileRoot root{{}, 1, kTestPageBytes, 1, {}, {}};
  root.pages.assign(2, PageRecord{{0, kTestPageBytes}, 1, 1});
  const std::vector<std::byte> bytes = encode_root(root);
  EXPECT_TRUE(has(error_of([&] { decode_root(bytes, "root"); }).what(), "two pages lie at offset 4096"));
}

TEST(PagefileFilesTest, a_temporary_root_that_a_crash_left_is_removed) {
  SimFileSystem sim;
  {
    committed_store(sim, 2);
  }
  sim.pwrite(sim.create(kRootPath + ".new"), metadata_of("half a root"), 0);
  EXPECT_TRUE(test::holds(Pagefile::open({"/a"}, small_growth(), sim), {{1, 2}, "first"}));
  EXPECT_FALSE(sim.exists(kRootPath + ".new"));
}

}  // namespace
}  // namespace tp
