// SPDX-License-Identifier: Apache-2.0
#include "io/file_system.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <limits>

#include "base/check.hpp"

namespace tp {
namespace {

constexpr int kOpenFlags = O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY;

int result_of(int result) { return result >= 0 ? result : -errno; }

off_t file_offset(std::uint64_t offset_bytes) {
  TP_CHECK(offset_bytes <= static_cast<std::uint64_t>(std::numeric_limits<off_t>::max()));
  return static_cast<off_t>(offset_bytes);
}

}  // namespace

int PosixFileSystem::create(const std::string& path) {
  const int file = ::open(path.c_str(), kOpenFlags | O_CREAT | O_EXCL, 0600);
  if (file < 0) return -errno;
  if (fchmod(file, 0600) == 0) return file;  // whatever the umask
  const int error_number = errno;
  ::close(file);
  ::unlink(path.c_str());
  return -error_number;
}

int PosixFileSystem::open(const std::string& path) { return result_of(::open(path.c_str(), kOpenFlags)); }

// What close() reports has been met by sync() before, or does not matter.
void PosixFileSystem::close(int file) noexcept { ::close(file); }

std::int64_t PosixFileSystem::size(int file) {
  struct stat status{};
  if (fstat(file, &status) != 0) return -errno;
  if (!S_ISREG(status.st_mode)) return -EINVAL;
  TP_CHECK(status.st_size >= 0);
  return status.st_size;
}

std::int64_t PosixFileSystem::pread(int file, std::span<std::byte> bytes, std::uint64_t offset_bytes) {
  const ssize_t count = ::pread(file, bytes.data(), bytes.size(), file_offset(offset_bytes));
  return count >= 0 ? count : -errno;
}

std::int64_t PosixFileSystem::pwrite(int file, std::span<const std::byte> bytes, std::uint64_t offset_bytes) {
  const ssize_t count = ::pwrite(file, bytes.data(), bytes.size(), file_offset(offset_bytes));
  return count >= 0 ? count : -errno;
}

int PosixFileSystem::preallocate(int file, std::uint64_t offset_bytes, std::uint64_t size_bytes) {
  TP_CHECK(size_bytes > 0 && offset_bytes + size_bytes > offset_bytes);
  if (fallocate(file, 0, file_offset(offset_bytes), file_offset(size_bytes)) == 0) return 0;
  if (errno != EOPNOTSUPP) return -errno;
  // Extended with a hole: a full disk then shows at the write. posix_fallocate would write zeros instead.
  const std::int64_t size_now_bytes = size(file);
  if (size_now_bytes < 0) return static_cast<int>(size_now_bytes);
  const off_t end_bytes = file_offset(offset_bytes + size_bytes);
  return size_now_bytes >= end_bytes ? 0 : result_of(ftruncate(file, end_bytes));
}

// fdatasync leaves out times of access and change alone; a new size is part of it.
int PosixFileSystem::sync(int file) { return result_of(fdatasync(file)); }

int PosixFileSystem::lock(int file) { return result_of(flock(file, LOCK_EX | LOCK_NB)); }

int PosixFileSystem::rename(const std::string& from, const std::string& to) {
  return result_of(std::rename(from.c_str(), to.c_str()));
}

int PosixFileSystem::remove(const std::string& path) { return result_of(unlink(path.c_str())); }

int PosixFileSystem::sync_directory(const std::string& path) {
  const int directory = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory < 0) return -errno;
  const int result = result_of(fsync(directory));
  ::close(directory);
  return result;
}

FileSystem& posix_file_system() {
  static PosixFileSystem file_system;
  return file_system;
}

}  // namespace tp
