// SPDX-License-Identifier: Apache-2.0
#include "io/durable_file.hpp"

#include <gtest/gtest.h>

#include <cerrno>
#include <vector>

#include "base/limits.hpp"
#include "sim/sim_file_system.hpp"
#include "tests/thrown_error.hpp"

namespace tp {
namespace {

using test::error_of;
using test::has;

class DurableFileTest : public ::testing::Test {
 protected:
  std::vector<std::byte> read_all() const {
    std::vector<std::byte> bytes(bytes_.size() + 100);
    bytes.resize(file_.read(0, bytes));
    return bytes;
  }

  SimFileSystem sim_;
  DurableFile file_ = DurableFile::create(sim_, "/a/file");
  const std::vector<std::byte> bytes_ = std::vector<std::byte>(3000, std::byte{7});
};

TEST_F(DurableFileTest, short_transfers_are_continued_and_interrupted_ones_repeated) {
  for (const int error : {0, EINTR}) {
    sim_.fail({.call = SimCall::pwrite, .error = error, .times = 5});
    file_.write(0, bytes_);
    sim_.fail({.call = SimCall::pread, .error = error, .times = 5});
    EXPECT_EQ(read_all(), bytes_);
    sim_.replace("/a/file", {});
  }
}

TEST_F(DurableFileTest, a_signal_that_never_stops_is_an_error_in_the_end) {
  sim_.fail({.call = SimCall::pwrite, .error = EINTR, .times = 10 * kIoRetryMax});
  EXPECT_EQ(error_of([&] { file_.write(0, bytes_); }).error_number(), EINTR);
}

TEST_F(DurableFileTest, what_fails_names_the_file_the_offset_and_the_reason) {
  sim_.fail({.call = SimCall::pwrite, .error = ENOSPC});
  const Error error = error_of([&] { file_.write(4096, bytes_); });
  EXPECT_EQ(error.kind(), ErrorKind::io);
  EXPECT_EQ(error.error_number(), ENOSPC);
  EXPECT_TRUE(has(error.what(), "could not write 3000 bytes at offset 4096 of /a/file")) << error.what();
  EXPECT_TRUE(has(error.what(), "(ENOSPC); free space")) << error.what();
}

TEST_F(DurableFileTest, a_sync_is_called_once_whatever_it_says) {
  for (const int error : {EIO, EINTR}) {
    const std::uint64_t before = sim_.calls(SimCall::sync);
    sim_.fail({.call = SimCall::sync, .error = error});
    EXPECT_EQ(error_of([&] { file_.sync(); }).error_number(), error);
    EXPECT_EQ(sim_.calls(SimCall::sync), before + 1);
  }
}

TEST_F(DurableFileTest, removing_takes_it_well_when_there_is_nothing) {
  remove_file(sim_, "/a/file");
  remove_file(sim_, "/a/file");
  sim_.fail({.call = SimCall::remove, .error = EACCES});
  EXPECT_TRUE(has(error_of([&] { remove_file(sim_, "/a/file"); }).what(), "check the permissions"));
}

TEST_F(DurableFileTest, a_moved_from_file_holds_no_lock) {
  EXPECT_EQ(file_.lock(), LockResult::held);
  DurableFile again = DurableFile::open(sim_, "/a/file");
  EXPECT_EQ(again.lock(), LockResult::refused);
  {
    const DurableFile moved = std::move(file_);
  }
  EXPECT_EQ(again.lock(), LockResult::held);
}

}  // namespace
}  // namespace tp
