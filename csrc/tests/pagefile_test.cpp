// SPDX-License-Identifier: Apache-2.0
#include "pager/pagefile.hpp"

#include <gtest/gtest.h>

#include <cerrno>
#include <limits>

#include "pager/spill.hpp"
#include "tests/pagefile_fixture.hpp"

namespace tp {
namespace {

using test::committed_store;
using test::Content;
using test::error_of;
using test::has;
using test::kExtentPath;
using test::kRootPath;
using test::kTestPageBytes;
using test::metadata_of;
using test::page_of;
using test::read_page;
using test::small_growth;
using test::text_of;
using test::write_salt;

TEST(PagefileTest, what_is_written_and_committed_is_read_again_and_after_opening_anew) {
  SimFileSystem sim;
  {
    Pagefile store = committed_store(sim, 5);
    EXPECT_EQ(store.commit_number(), 1u);
    EXPECT_TRUE(test::holds(store, {{1, 2, 3, 4, 5}, "first"}));
  }
  sim.crash(1);
  const Pagefile store = Pagefile::open({"/a"}, small_growth(), sim);
  EXPECT_EQ(store.commit_number(), 1u);
  EXPECT_EQ(store.page_bytes(), kTestPageBytes);
  EXPECT_TRUE(test::holds(store, {{1, 2, 3, 4, 5}, "first"}));
  EXPECT_TRUE(store.verify().empty());
}

TEST(PagefileTest, a_created_store_is_empty_and_can_be_opened_at_once) {
  SimFileSystem sim;
  {
    Pagefile::create({"/a"}, kTestPageBytes, {}, sim);
  }
  sim.crash(1);
  const Pagefile store = Pagefile::open({"/a"}, {}, sim);
  EXPECT_EQ(store.commit_number(), 0u);
  EXPECT_EQ(store.page_count(), 0u);
  EXPECT_TRUE(store.metadata().empty());
}

TEST(PagefileTest, opening_shows_the_last_commit_and_nothing_that_came_after_it) {
  SimFileSystem sim;
  {
    Pagefile store = committed_store(sim, 3);
    write_salt(store, 1, 77);
    store.discard(PageId{2});
    store.grow(4);
    EXPECT_EQ(read_page(store, 1), page_of(77));
    EXPECT_EQ(read_page(store, 2), page_of(0));
  }
  const Pagefile store = Pagefile::open({"/a"}, small_growth(), sim);
  EXPECT_TRUE(test::holds(store, {{1, 2, 3}, "first"}));
}

TEST(PagefileTest, pages_of_zeros_take_no_room_and_no_writes) {
  SimFileSystem sim;
  Pagefile store = Pagefile::create({"/a"}, kTestPageBytes, small_growth(), sim);
  EXPECT_EQ(store.grow(1000), PageId{0});
  EXPECT_EQ(store.grow(1), PageId{1000});
  store.commit({});
  EXPECT_EQ(sim.written_bytes(kExtentPath), kExtentHeaderBytes);
  EXPECT_EQ(store.extent_file(0).used_count(), 0u);
  EXPECT_EQ(read_page(store, 999), page_of(0));
}

TEST(PagefileTest, a_discarded_page_is_zeros_and_its_room_is_used_again_after_the_next_commit) {
  SimFileSystem sim;
  Pagefile store = committed_store(sim, 1);
  const Extent first = store.record(PageId{0}).extent;
  store.discard(PageId{0});
  EXPECT_EQ(read_page(store, 0), page_of(0));
  const Extent other = store.take_extent();
  EXPECT_NE(other, first) << "the last commit still needs it";
  store.put_extent(other);
  store.commit({});
  EXPECT_EQ(store.extent_file(0).used_count(), 0u);
  EXPECT_EQ(store.take_extent(), first);
}

TEST(PagefileTest, an_extent_that_was_never_committed_is_free_at_once) {
  SimFileSystem sim;
  Pagefile store = committed_store(sim, 1);
  for (std::uint64_t salt = 10; salt < 40; ++salt) write_salt(store, 0, salt);
  EXPECT_EQ(store.extent_file(0).used_count(), 2u);
  EXPECT_LE(sim.contents(kExtentPath).size(), 4 * kTestPageBytes);  // header, committed, now, next
}

TEST(PagefileTest, unchanged_pages_are_not_written_again) {
  SimFileSystem sim;
  Pagefile store = committed_store(sim, 64);
  const std::uint64_t before = sim.written_bytes(kExtentPath);
  write_salt(store, 7, 100);
  store.commit(metadata_of("second"));
  EXPECT_EQ(sim.written_bytes(kExtentPath) - before, kTestPageBytes);
  const std::uint64_t syncs = sim.calls(SimCall::sync);
  store.commit(metadata_of("third"));
  EXPECT_EQ(sim.written_bytes(kExtentPath) - before, kTestPageBytes);
  EXPECT_EQ(sim.calls(SimCall::sync) - syncs, 1u) << "the root's alone";
  EXPECT_EQ(text_of(store.metadata()), "third");
}

TEST(PagefileTest, directories_share_the_pages_by_their_weights) {
  SimFileSystem sim;
  PagefileOptions options = small_growth();
  options.weights = {1.0, 3.0, 2.0};
  Pagefile store = Pagefile::create({"/a", "/b", "/c"}, kTestPageBytes, options, sim);
  store.grow(60);
  for (std::uint32_t page = 0; page < 60; ++page) write_salt(store, page, page + 1);
  EXPECT_EQ(store.extent_file(0).used_count(), 10u);
  EXPECT_EQ(store.extent_file(1).used_count(), 30u);
  EXPECT_EQ(store.extent_file(2).used_count(), 20u);
  EXPECT_EQ(store.extent_file(1).path(), "/b/pages.tensorpager");
  store.commit({});
  for (std::uint32_t page = 0; page < 60; ++page) EXPECT_EQ(read_page(store, page), page_of(page + 1));
}

TEST(PagefileTest, without_weights_directories_share_equally) {
  SimFileSystem sim;
  Pagefile store = Pagefile::create({"/a", "/b"}, kTestPageBytes, small_growth(), sim);
  store.grow(10);
  for (std::uint32_t page = 0; page < 10; ++page) write_salt(store, page, page + 1);
  EXPECT_EQ(store.extent_file(0).used_count(), 5u);
  EXPECT_EQ(store.extent_file(1).used_count(), 5u);
}

TEST(PagefileTest, files_grow_in_preallocated_chunks) {
  SimFileSystem sim;
  Pagefile store = Pagefile::create({"/a"}, kTestPageBytes, small_growth(10 * kTestPageBytes), sim);
  store.grow(11);
  for (std::uint32_t page = 0; page < 10; ++page) write_salt(store, page, 1);
  const std::uint64_t chunks = sim.calls(SimCall::preallocate);
  EXPECT_EQ(sim.contents(kExtentPath).size(), 11 * kTestPageBytes);
  write_salt(store, 10, 1);
  EXPECT_EQ(sim.calls(SimCall::preallocate), chunks + 1);
  EXPECT_EQ(sim.contents(kExtentPath).size(), 21 * kTestPageBytes);
}

TEST(PagefileTest, pages_written_by_somebody_else_count_when_they_are_reported) {
  SimFileSystem sim;
  Pagefile store = committed_store(sim, 2);
  const Extent extent = store.take_extent();
  const std::vector<std::byte> bytes = page_of(50);
  sim.overwrite(store.extent_file(extent.stripe).path(), extent.offset_bytes, bytes);
  store.commit(metadata_of("before"));
  EXPECT_EQ(read_page(store, 0), page_of(1));
  store.written(PageId{0}, extent, page_checksum(bytes.data(), bytes.size(), PageId{0}, 9), 9);
  EXPECT_EQ(read_page(store, 0), bytes);
  EXPECT_EQ(store.record(PageId{0}).generation, 9u);
  store.commit(metadata_of("after"));
  EXPECT_TRUE(store.verify().empty());
}

TEST(PagefileTest, one_at_a_time_may_have_a_store_open) {
  SimFileSystem sim;
  {
    const Pagefile store = committed_store(sim, 1);
    const Error error = error_of([&] { Pagefile::open({"/a"}, {}, sim); });
    EXPECT_EQ(error.kind(), ErrorKind::io);
    EXPECT_TRUE(has(error.what(), "another process")) << error.what();
    EXPECT_TRUE(has(error.what(), "/a")) << error.what();
  }
  EXPECT_TRUE(test::holds(Pagefile::open({"/a"}, {}, sim), {{1}, "first"}));
}

TEST(PagefileTest, a_store_is_not_created_over_another) {
  SimFileSystem sim;
  {
    committed_store(sim, 1);
  }
  EXPECT_EQ(error_of([&] { Pagefile::create({"/a"}, kTestPageBytes, {}, sim); }).error_number(), EEXIST);
  const Error error = error_of([&] { Pagefile::create({"/b", "/a"}, kTestPageBytes, {}, sim); });
  EXPECT_EQ(error.error_number(), EEXIST);
  EXPECT_TRUE(has(error.what(), kExtentPath)) << error.what();
  EXPECT_FALSE(sim.exists("/b/pages.tensorpager"));
  EXPECT_TRUE(test::holds(Pagefile::open({"/a"}, {}, sim), {{1}, "first"}));
}

TEST(PagefileTest, a_directory_without_a_store_is_named_and_left_as_it_is) {
  SimFileSystem sim;
  const Error error = error_of([&] { Pagefile::open({"/nothing"}, {}, sim); });
  EXPECT_EQ(error.error_number(), ENOENT);
  EXPECT_TRUE(has(error.what(), "/nothing holds no pagefile")) << error.what();
  EXPECT_FALSE(sim.exists("/nothing/lock.tensorpager"));
}

TEST(PagefileTest, arguments_out_of_range_are_refused) {
  SimFileSystem sim;
  const auto create = [&](const std::vector<std::string>& directories, std::uint64_t page_bytes,
                          const std::vector<double>& weights) {
    PagefileOptions options;
    options.weights = weights;
    return error_of([&] { Pagefile::create(directories, page_bytes, options, sim); }).kind();
  };
  EXPECT_EQ(create({}, kTestPageBytes, {}), ErrorKind::invalid);
  EXPECT_EQ(create(std::vector<std::string>(65, "/a"), kTestPageBytes, {}), ErrorKind::invalid);
  for (const std::uint64_t page_bytes : {0ull, 2048ull, 4097ull, 12288ull, 128ull << 20, 1ull << 63}) {
    EXPECT_EQ(create({"/a"}, page_bytes, {}), ErrorKind::invalid) << page_bytes;
  }
  EXPECT_EQ(create({"/a"}, kTestPageBytes, {1.0, 1.0}), ErrorKind::invalid);
  for (const double weight : {0.0, -1.0, std::numeric_limits<double>::infinity(), std::nan("")}) {
    EXPECT_EQ(create({"/a"}, kTestPageBytes, {weight}), ErrorKind::invalid) << weight;
  }
  EXPECT_EQ(error_of([&] { Pagefile::create({"/a"}, kTestPageBytes, small_growth(~0ull), sim); }).kind(),
            ErrorKind::invalid);
  Pagefile store = committed_store(sim, 1);
  EXPECT_EQ(error_of([&] { store.grow(0xffffffffu); }).kind(), ErrorKind::invalid);
  const std::vector<std::byte> metadata(kPagefileMetadataBytesMax + 1);
  EXPECT_EQ(error_of([&] { store.commit(metadata); }).kind(), ErrorKind::invalid);
  EXPECT_TRUE(test::holds(store, {{1}, "first"}));
}

TEST(PagefileTest, directories_must_be_those_of_one_store_and_in_order) {
  SimFileSystem sim;
  {
    Pagefile::create({"/a", "/b"}, kTestPageBytes, {}, sim);
  }
  {
    Pagefile::create({"/c", "/d"}, kTestPageBytes, {}, sim);
  }
  const auto message = [&](const std::vector<std::string>& directories) {
    return std::string(error_of([&] { Pagefile::open(directories, {}, sim); }).what());
  };
  EXPECT_TRUE(has(message({"/a"}), "lies in 2 directories")) << message({"/a"});
  EXPECT_TRUE(has(message({"/a", "/b", "/c"}), "and 3 were named")) << message({"/a", "/b", "/c"});
  EXPECT_TRUE(has(message({"/b", "/a"}), "/b holds no pagefile")) << message({"/b", "/a"});
  EXPECT_TRUE(has(message({"/a", "/a"}), "is extent file 0")) << message({"/a", "/a"});
  EXPECT_TRUE(has(message({"/a", "/d"}), "/d/pages.tensorpager: it belongs to another pagefile"))
      << message({"/a", "/d"});
  EXPECT_EQ(Pagefile::open({"/a", "/b"}, {}, sim).stripe_count(), 2u);
}

// The drive holds the last commit, memory all pages, and room that is made helps.
TEST(PagefileTest, a_full_disk_changes_nothing_and_writing_goes_on_when_there_is_room) {
  for (const SimCall call : {SimCall::preallocate, SimCall::pwrite}) {
    SimFileSystem sim;
    Pagefile store = committed_store(sim, 2);
    write_salt(store, 0, 10);
    sim.fail({.call = call, .error = ENOSPC, .times = 1000});
    for (int attempt = 0; attempt < 3; ++attempt) {
      const Error error = error_of([&] { write_salt(store, 1, 20); });
      EXPECT_EQ(error.error_number(), ENOSPC);
      EXPECT_TRUE(has(error.what(), kExtentPath) && has(error.what(), "free space")) << error.what();
      EXPECT_EQ(error_of([&] { store.commit(metadata_of("full")); }).error_number(), ENOSPC);
      EXPECT_EQ(read_page(store, 0), page_of(10));
      EXPECT_EQ(read_page(store, 1), page_of(2));
    }
    EXPECT_EQ(store.extent_file(0).used_count(), 3u);
    sim.fail({.nth = 1000000});
    write_salt(store, 1, 20);
    store.commit(metadata_of("second"));
    EXPECT_TRUE(test::holds(store, {{10, 20}, "second"}));
  }
}

TEST(PagefileTest, a_store_on_a_full_disk_can_be_opened_and_read) {
  SimFileSystem sim;
  {
    committed_store(sim, 2);
  }
  sim.fail({.call = SimCall::preallocate, .error = ENOSPC, .times = 1000});
  Pagefile store = Pagefile::open({"/a"}, small_growth(), sim);
  EXPECT_TRUE(test::holds(store, {{1, 2}, "first"}));
  EXPECT_EQ(error_of([&] { write_salt(store, 0, 3); }).error_number(), ENOSPC);
  EXPECT_TRUE(test::holds(store, {{1, 2}, "first"}));
}

TEST(PagefileTest, a_failed_sync_stops_the_store_and_is_never_tried_again) {
  for (std::uint64_t nth = 1; nth <= 2; ++nth) {  // the extent file's, the root's
    SimFileSystem sim;
    Pagefile store = committed_store(sim, 2);
    write_salt(store, 0, 10);
    sim.fail({.call = SimCall::sync, .nth = nth});
    const std::string first = error_of([&] { store.commit(metadata_of("lost")); }).what();
    EXPECT_TRUE(has(first, "commit 1 is whole on the drive") && has(first, "open it again")) << first;
    const std::uint64_t syncs = sim.calls(SimCall::sync);
    const std::uint64_t writes = sim.calls(SimCall::pwrite);
    EXPECT_EQ(error_of([&] { store.commit({}); }).what(), first);
    EXPECT_EQ(error_of([&] { write_salt(store, 1, 20); }).what(), first);
    EXPECT_EQ(error_of([&] { store.discard(PageId{1}); }).what(), first);
    EXPECT_EQ(error_of([&] { store.grow(1); }).what(), first);
    EXPECT_EQ(error_of([&] { store.take_extent(); }).error_number(), EIO);
    EXPECT_EQ(sim.calls(SimCall::sync), syncs);
    EXPECT_EQ(sim.calls(SimCall::pwrite), writes);
    EXPECT_EQ(read_page(store, 1), page_of(2)) << "reading goes on";
    sim.crash(nth);
    EXPECT_TRUE(test::holds(Pagefile::open({"/a"}, {}, sim), {{1, 2}, "first"}));
  }
}

// The rename may have happened; what was written for it must not be overwritten, nor what was written before.
TEST(PagefileTest, a_root_that_may_be_in_place_or_not_stops_the_store) {
  for (const SimCall call : {SimCall::rename, SimCall::sync_directory}) {
    for (const SimEffect effect : {SimEffect::none, SimEffect::happens}) {
      SimFileSystem sim;
      Pagefile store = committed_store(sim, 2);
      write_salt(store, 0, 10);
      sim.fail({.call = call, .effect = effect});
      const std::string first = error_of([&] { store.commit(metadata_of("second")); }).what();
      EXPECT_TRUE(has(first, "commit 1, or 2, is whole on the drive")) << first;
      EXPECT_EQ(error_of([&] { write_salt(store, 0, 20); }).what(), first);
      EXPECT_EQ(error_of([&] { store.commit({}); }).what(), first);
      sim.crash(1);
      const Pagefile opened = Pagefile::open({"/a"}, {}, sim);
      EXPECT_TRUE(test::holds(opened, {{1, 2}, "first"}) || test::holds(opened, {{10, 2}, "second"}));
    }
  }
}

TEST(PagefileTest, every_write_of_a_page_has_a_generation_of_its_own) {
  SimFileSystem sim;
  Pagefile store = committed_store(sim, 1);
  EXPECT_EQ(store.record(PageId{0}).generation, 1u);
  write_salt(store, 0, 10);
  EXPECT_EQ(store.record(PageId{0}).generation, 2u);
  store.discard(PageId{0});
  write_salt(store, 0, 11);
  EXPECT_EQ(store.record(PageId{0}).generation, 3u);
}

TEST(PagefileTest, extents_are_reused_by_a_store_opened_anew) {
  SimFileSystem sim;
  {
    committed_store(sim, 8);
  }
  const std::size_t size_bytes = sim.contents(kExtentPath).size();
  {
    Pagefile store = Pagefile::open({"/a"}, small_growth(), sim);
    for (std::uint32_t page = 0; page < 8; ++page) store.discard(PageId{page});
    store.commit({});
  }
  Pagefile store = Pagefile::open({"/a"}, small_growth(), sim);
  for (std::uint32_t page = 0; page < 8; ++page) write_salt(store, page, 90 + page);
  EXPECT_EQ(sim.contents(kExtentPath).size(), size_bytes);
}

}  // namespace
}  // namespace tp
