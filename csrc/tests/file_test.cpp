// SPDX-License-Identifier: Apache-2.0
#include "io/file.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <functional>

#include "base/error.hpp"
#include "base/limits.hpp"
#include "tests/child_process.hpp"
#include "tests/test_files.hpp"

namespace tp {
namespace {

namespace fs = std::filesystem;

class FileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = "/var/tmp/tensorpager-file-test-XXXXXX";
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    directory_ = name;
  }
  void TearDown() override { fs::remove_all(directory_); }

  std::string in_directory(const std::string& name) const { return directory_ + "/" + name; }
  std::size_t entries() const {
    return static_cast<std::size_t>(std::distance(fs::directory_iterator(directory_), fs::directory_iterator()));
  }
  // The Error(io) that `call` throws.
  static Error expect_io_error(const std::function<void()>& call) {
    try {
      call();
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::io);
      return error;
    }
    ADD_FAILURE() << "no error";
    return Error(ErrorKind::io, "none");
  }

  std::string directory_;
};

void expect_has(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << text;
}

mode_t mode_of(const File& file) {
  struct stat status{};
  EXPECT_EQ(fstat(file.descriptor(), &status), 0);
  return status.st_mode & 07777;
}

TEST_F(FileTest, a_checkpoint_is_opened_read_only_and_closed_on_exec) {
  const test::PatternFile pattern(123457, 0, directory_);
  const File file = File::open_checkpoint(pattern.path(), DirectPolicy::optional);
  EXPECT_EQ(file.size_bytes(), 123457u);
  EXPECT_EQ(file.path(), pattern.path());
  const int flags = fcntl(file.descriptor(), F_GETFL);
  EXPECT_EQ(flags & O_ACCMODE, O_RDONLY);
  EXPECT_EQ(flags & O_NONBLOCK, 0);
  EXPECT_EQ((flags & O_DIRECT) != 0, file.direct());
  EXPECT_NE(fcntl(file.descriptor(), F_GETFD) & FD_CLOEXEC, 0);
  EXPECT_EQ(file.direct(), file.direct_reason().empty());
  EXPECT_EQ(file.direct(), file.align_bytes() > 1);
  EXPECT_EQ(file.align_bytes() & (file.align_bytes() - 1), 0u);
}

TEST_F(FileTest, links_to_a_checkpoint_are_followed) {
  const test::PatternFile pattern(4096, 0, directory_);
  ASSERT_EQ(symlink(pattern.path().c_str(), in_directory("link").c_str()), 0);
  EXPECT_EQ(File::open_checkpoint(in_directory("link"), DirectPolicy::optional).size_bytes(), 4096u);
}

TEST_F(FileTest, buffered_when_direct_is_not_asked_for) {
  const test::PatternFile pattern(4096, 0, directory_);
  const File file = File::open_checkpoint(pattern.path(), DirectPolicy::disabled);
  EXPECT_FALSE(file.direct());
  EXPECT_EQ(file.align_bytes(), 1u);
  expect_has(file.direct_reason(), "not asked for");
}

TEST_F(FileTest, what_is_not_a_regular_file_is_refused_with_its_name) {
  ASSERT_EQ(mkfifo(in_directory("pipe").c_str(), 0600), 0);  // nobody writes: opening it must not hang
  const struct {
    std::string path, word;
  } cases[] = {{in_directory("pipe"), "a pipe"}, {directory_, "a directory"}, {"/dev/null", "a device"}};
  for (const auto& [path, word] : cases) {
    const Error error = expect_io_error([&] { File::open_checkpoint(path, DirectPolicy::optional); });
    expect_has(error.what(), path);
    expect_has(error.what(), word);
    EXPECT_NE(error.error_number(), 0);
  }
}

TEST_F(FileTest, a_missing_file_and_a_dangling_link_name_path_and_errno) {
  ASSERT_EQ(symlink("nowhere", in_directory("dangling").c_str()), 0);
  for (const char* name : {"missing", "dangling"}) {
    const Error error = expect_io_error([&] { File::open_checkpoint(in_directory(name), DirectPolicy::optional); });
    EXPECT_EQ(error.error_number(), ENOENT);
    expect_has(error.what(), in_directory(name));
    expect_has(error.what(), "ENOENT");
  }
}

TEST_F(FileTest, a_file_in_memory_is_not_direct_and_says_so) {
  if (!fs::exists("/dev/shm")) GTEST_SKIP() << "no /dev/shm";
  const test::PatternFile pattern(4096, 0, "/dev/shm");
  const File file = File::open_checkpoint(pattern.path(), DirectPolicy::optional);
  EXPECT_FALSE(file.direct());
  expect_has(file.direct_reason(), "memory");
  const Error error = expect_io_error([&] { File::open_checkpoint(pattern.path(), DirectPolicy::required); });
  expect_has(error.what(), pattern.path());
}

TEST_F(FileTest, a_spill_file_has_no_name_and_mode_0600_whatever_the_umask) {
  for (const mode_t mask : {mode_t{0}, mode_t{077}, mode_t{0777}}) {
    const mode_t before = umask(mask);
    const File file = File::open_spill(directory_, DirectPolicy::optional);
    umask(before);
    EXPECT_EQ(mode_of(file), mode_t{0600});
    EXPECT_EQ(entries(), 0u);
    EXPECT_EQ(file.size_bytes(), 0u);
    EXPECT_NE(fcntl(file.descriptor(), F_GETFD) & FD_CLOEXEC, 0);
  }
}

TEST_F(FileTest, a_spill_directory_that_cannot_be_written_is_an_error_with_its_name) {
  const Error error = expect_io_error([&] { File::open_spill(in_directory("missing"), DirectPolicy::optional); });
  EXPECT_EQ(error.error_number(), ENOENT);
  expect_has(error.what(), in_directory("missing"));
}

// Where the file system has no O_TMPFILE: the kernel's answer is imitated with a filter in a child.
TEST_F(FileTest, without_o_tmpfile_the_spill_file_is_unlinked_at_once) {
  const test::ChildResult result = test::run_in_child([&] {
    test::deny_open_flag(O_TMPFILE & ~O_DIRECTORY, EOPNOTSUPP);
    umask(0);
    const File file = File::open_spill(directory_, DirectPolicy::optional);
    struct stat status{};
    fstat(file.descriptor(), &status);
    return std::to_string(status.st_nlink) + " links, mode " + std::to_string(status.st_mode & 07777) + ", " +
           std::to_string(entries()) + " entries";
  });
  EXPECT_EQ(result.text, "0 links, mode 384, 0 entries");  // 384 is 0600
}

TEST_F(FileTest, without_o_tmpfile_a_directory_where_anyone_may_delete_is_refused) {
  const test::ChildResult result = test::run_in_child([&] {
    test::deny_open_flag(O_TMPFILE & ~O_DIRECTORY, EOPNOTSUPP);
    chmod(directory_.c_str(), 0777);
    try {
      File::open_spill(directory_, DirectPolicy::optional);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("opened");
  });
  expect_has(result.text, directory_);
  expect_has(result.text, "sticky");
}

TEST_F(FileTest, preallocate_makes_room_that_stat_can_see) {
  File file = File::open_spill(directory_, DirectPolicy::optional);
  file.preallocate(0, 8 * kMiB);
  EXPECT_EQ(file.size_bytes(), 8 * kMiB);
  file.preallocate(4 * kMiB, kMiB);  // inside: nothing changes
  EXPECT_EQ(file.size_bytes(), 8 * kMiB);
  struct stat status{};
  ASSERT_EQ(fstat(file.descriptor(), &status), 0);
  EXPECT_EQ(static_cast<std::uint64_t>(status.st_size), 8 * kMiB);
  EXPECT_GE(static_cast<std::uint64_t>(status.st_blocks) * 512, 8 * kMiB);
}

// The kernel's answers are imitated in a child: filling a real disk would be felt by everyone on it.
TEST_F(FileTest, a_full_disk_and_a_quota_are_met_by_preallocate) {
  for (const int error_number : {ENOSPC, EDQUOT, EFBIG}) {
    const test::ChildResult result = test::run_in_child([&]() -> std::string {
      test::deny_system_call(SYS_fallocate, error_number);
      File file = File::open_spill(directory_, DirectPolicy::optional);
      try {
        file.preallocate(4096, 8 * kMiB);
      } catch (const Error& error) {
        const bool as_told = error.kind() == ErrorKind::io && error.error_number() == error_number;
        return std::string(as_told && file.size_bytes() == 0 ? "typed: " : "wrong: ") + error.what();
      }
      return "made";
    });
    expect_has(result.text, "typed: could not make room for 8388608 bytes at offset 4096");
    expect_has(result.text, directory_);
    if (error_number == ENOSPC) expect_has(result.text, "free space");
  }
}

TEST_F(FileTest, without_fallocate_the_file_is_extended_and_never_shortened) {
  const test::ChildResult result = test::run_in_child([&] {
    test::deny_system_call(SYS_fallocate, EOPNOTSUPP);
    File file = File::open_spill(directory_, DirectPolicy::optional);
    file.preallocate(0, 2 * kMiB);
    file.preallocate(0, kMiB);
    return std::to_string(file.size_bytes_now());
  });
  EXPECT_EQ(result.text, "2097152");
}

TEST_F(FileTest, a_file_that_shrinks_is_seen_when_asked) {
  const test::PatternFile pattern(100000, 0, directory_);
  const File file = File::open_checkpoint(pattern.path(), DirectPolicy::optional);
  ASSERT_EQ(truncate(pattern.path().c_str(), 5000), 0);
  EXPECT_EQ(file.size_bytes(), 100000u);
  EXPECT_EQ(file.size_bytes_now(), 5000u);
}

TEST_F(FileTest, a_moved_from_file_is_empty_and_the_descriptor_is_closed_once) {
  const test::PatternFile pattern(4096, 0, directory_);
  File first = File::open_checkpoint(pattern.path(), DirectPolicy::optional);
  const int descriptor = first.descriptor();
  {
    const File second = std::move(first);
    EXPECT_EQ(second.descriptor(), descriptor);
    EXPECT_EQ(first.descriptor(), -1);
    EXPECT_EQ(first.size_bytes(), 0u);
  }
  EXPECT_EQ(fcntl(descriptor, F_GETFD), -1);
  EXPECT_EQ(errno, EBADF);
}

}  // namespace
}  // namespace tp
