// SPDX-License-Identifier: Apache-2.0
#include "sim/sim_file_system.hpp"

#include <gtest/gtest.h>

#include <cerrno>
#include <set>

namespace tp {
namespace {

std::vector<std::byte> filled(std::size_t size_bytes, int value) {
  return std::vector<std::byte>(size_bytes, static_cast<std::byte>(value));
}

// A file of 4 KiB of ones, synced with its name.
int synced_file(SimFileSystem& sim) {
  const int file = sim.create("/a/file");
  EXPECT_EQ(sim.pwrite(file, filled(4096, 1), 0), 4096);
  EXPECT_EQ(sim.sync(file), 0);
  EXPECT_EQ(sim.sync_directory("/a"), 0);
  return file;
}

TEST(SimFileSystemTest, what_was_synced_survives_every_crash) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    SimFileSystem sim;
    synced_file(sim);
    sim.crash(seed);
    EXPECT_EQ(sim.contents("/a/file"), filled(4096, 1));
  }
}

TEST(SimFileSystemTest, a_crash_keeps_any_subset_of_unsynced_sectors_and_no_half_sector) {
  std::set<std::size_t> kept;
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    SimFileSystem sim;
    sim.pwrite(synced_file(sim), filled(4096, 2), 0);
    sim.crash(seed);
    const std::vector<std::byte> bytes = sim.contents("/a/file");
    std::size_t sectors = 0;
    for (std::size_t at = 0; at < bytes.size(); at += 512) {
      const std::vector<std::byte> sector(&bytes[at], &bytes[at] + 512);
      EXPECT_TRUE(sector == filled(512, 1) || sector == filled(512, 2));
      sectors += sector == filled(512, 2);
    }
    kept.insert(sectors);
  }
  EXPECT_TRUE(kept.contains(0) && kept.contains(8));
  EXPECT_GE(kept.size(), 6u);
}

TEST(SimFileSystemTest, a_rename_and_a_creation_not_synced_have_happened_or_not) {
  std::set<std::pair<int, bool>> outcomes;
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    SimFileSystem sim;
    synced_file(sim);
    const int other = sim.create("/a/other");
    sim.pwrite(other, filled(512, 2), 0);
    sim.sync(other);
    sim.rename("/a/other", "/a/file");
    sim.create("/a/third");
    sim.crash(seed);
    outcomes.insert({std::to_integer<int>(sim.contents("/a/file")[0]), sim.exists("/a/third")});
  }
  EXPECT_EQ(outcomes.size(), 4u);
}

TEST(SimFileSystemTest, a_process_that_ends_loses_nothing_and_holds_no_lock) {
  SimFileSystem sim;
  const int file = synced_file(sim);
  EXPECT_EQ(sim.lock(file), 0);
  EXPECT_EQ(sim.lock(sim.open("/a/file")), -EWOULDBLOCK);
  sim.pwrite(file, filled(4096, 2), 0);
  sim.end_process();
  EXPECT_EQ(sim.contents("/a/file"), filled(4096, 2));
  EXPECT_EQ(sim.lock(sim.open("/a/file")), 0);
}

TEST(SimFileSystemTest, after_a_failed_sync_later_ones_succeed_and_the_bytes_are_lost) {
  SimFileSystem sim;
  const int file = synced_file(sim);
  sim.pwrite(file, filled(4096, 2), 0);
  sim.fail({.call = SimCall::sync});
  EXPECT_EQ(sim.sync(file), -EIO);
  EXPECT_TRUE(sim.fired());
  EXPECT_EQ(sim.sync(file), 0);
  EXPECT_EQ(sim.contents("/a/file"), filled(4096, 2)) << "still seen, which is the trap";
  sim.crash(1);
  EXPECT_EQ(sim.contents("/a/file"), filled(4096, 1));
}

TEST(SimFileSystemTest, the_nth_call_of_a_kind_fails_or_transfers_half) {
  SimFileSystem sim;
  const int file = synced_file(sim);
  sim.fail({.call = SimCall::pwrite, .nth = 2, .error = ENOSPC});
  EXPECT_EQ(sim.pwrite(file, filled(512, 3), 0), 512);
  EXPECT_EQ(sim.pwrite(file, filled(512, 3), 0), -ENOSPC);
  EXPECT_EQ(sim.pwrite(file, filled(512, 3), 0), 512);
  sim.fail({.call = SimCall::pread, .error = 0});
  std::vector<std::byte> bytes(512);
  EXPECT_EQ(sim.pread(file, bytes, 0), 256);
  EXPECT_EQ(sim.pread(file, bytes, 0), 512);
  EXPECT_EQ(sim.pread(file, bytes, 4096), 0);
}

TEST(SimFileSystemTest, after_it_halts_nothing_happens_any_more) {
  SimFileSystem sim;
  const int file = synced_file(sim);
  sim.halt_at(sim.calls() + 2, SimEffect::none);
  EXPECT_EQ(sim.pwrite(file, filled(512, 2), 0), 512);
  EXPECT_EQ(sim.sync(file), -EIO);
  EXPECT_TRUE(sim.halted());
  EXPECT_EQ(sim.pwrite(file, filled(512, 3), 512), -EIO);
  EXPECT_EQ(sim.rename("/a/file", "/a/other"), -EIO);
  sim.end_process();
  EXPECT_FALSE(sim.halted());
  EXPECT_EQ(sim.contents("/a/file")[512], std::byte{1});
}

}  // namespace
}  // namespace tp
