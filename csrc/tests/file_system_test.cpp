// SPDX-License-Identifier: Apache-2.0
#include "io/file_system.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <filesystem>

#include "tests/child_process.hpp"

namespace tp {
namespace {

class FileSystemTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = "/var/tmp/tensorpager-file-system-test-XXXXXX";
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    directory_ = name;
    path_ = directory_ + "/file";
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  FileSystem& files_ = posix_file_system();
  std::string directory_, path_;
};

TEST_F(FileSystemTest, a_created_file_has_mode_0600_whatever_the_umask_and_is_created_once) {
  for (const mode_t mask : {mode_t{0}, mode_t{0777}}) {
    const mode_t before = umask(mask);
    const int file = files_.create(path_);
    umask(before);
    ASSERT_GE(file, 0);
    struct stat status{};
    ASSERT_EQ(fstat(file, &status), 0);
    EXPECT_EQ(status.st_mode & 07777, mode_t{0600});
    EXPECT_NE(fcntl(file, F_GETFD) & FD_CLOEXEC, 0);
    EXPECT_EQ(files_.create(path_), -EEXIST);
    files_.close(file);
    EXPECT_EQ(files_.remove(path_), 0);
    EXPECT_EQ(files_.remove(path_), -ENOENT);
  }
}

TEST_F(FileSystemTest, links_are_not_followed_and_a_directory_is_no_file) {
  ASSERT_EQ(symlink("elsewhere", path_.c_str()), 0);
  EXPECT_EQ(files_.open(path_), -ELOOP);
  EXPECT_EQ(files_.create(path_), -EEXIST);
  EXPECT_EQ(files_.open(directory_), -EISDIR);
  EXPECT_EQ(files_.open(directory_ + "/missing"), -ENOENT);
}

TEST_F(FileSystemTest, bytes_are_read_as_written_up_to_the_end_of_the_file) {
  const int file = files_.create(path_);
  const std::array<std::byte, 4> bytes = {std::byte{1}, std::byte{2}, std::byte{3}, std::byte{4}};
  EXPECT_EQ(files_.pwrite(file, bytes, 100), 4);
  EXPECT_EQ(files_.size(file), 104);
  std::array<std::byte, 8> read{};
  EXPECT_EQ(files_.pread(file, read, 102), 2);
  EXPECT_EQ(read[1], std::byte{4});
  EXPECT_EQ(files_.pread(file, read, 104), 0);
  EXPECT_EQ(files_.sync(file), 0);
  EXPECT_EQ(files_.rename(path_, directory_ + "/other"), 0);
  EXPECT_EQ(files_.sync_directory(directory_), 0);
  EXPECT_EQ(files_.sync_directory(directory_ + "/other"), -ENOTDIR);
  files_.close(file);
}

TEST_F(FileSystemTest, a_lock_is_held_once_and_until_the_file_is_closed) {
  const int file = files_.create(path_);
  const int again = files_.open(path_);
  EXPECT_EQ(files_.lock(file), 0);
  EXPECT_EQ(files_.lock(again), -EWOULDBLOCK);
  files_.close(file);
  EXPECT_EQ(files_.lock(again), 0);
  files_.close(again);
}

TEST_F(FileSystemTest, preallocate_makes_room_and_never_shortens_also_where_there_is_no_fallocate) {
  const auto body = [&]() -> std::string {
    const int file = files_.create(path_);
    const int longer = files_.preallocate(file, 8192, 65536);
    const int within = files_.preallocate(file, 0, 4096);
    const std::string sizes = std::to_string(files_.size(file));
    files_.close(file);
    files_.remove(path_);
    return longer == 0 && within == 0 ? sizes : "failed";
  };
  EXPECT_EQ(body(), "73728");
  const test::ChildResult without = test::run_in_child([&] {
    test::deny_system_call(SYS_fallocate, EOPNOTSUPP);
    return body();
  });
  EXPECT_EQ(without.text, "73728");
}

}  // namespace
}  // namespace tp
