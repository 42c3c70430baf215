// SPDX-License-Identifier: Apache-2.0
#include "io/durable_file.hpp"

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/check.hpp"
#include "base/error.hpp"
#include "base/limits.hpp"

namespace tp {
namespace {

std::string advice(int error_number) {
  switch (error_number) {
    case EACCES:
    case EPERM: return "; check the permissions of the file and of the directories above it";
    case EMFILE:
    case ENFILE: return "; no file descriptor is left, raise `ulimit -n`";
    case ENOENT: return "; check the path";
    case EEXIST: return "; it is there already";
    case EINVAL: return "; it may not be a regular file, or its file system lacks this call";
    case ELOOP: return "; it is a symbolic link, which is not followed here";
    case ENOSPC:
    case EDQUOT: return "; free space, or name a directory on another drive";
    case EROFS: return "; the file system is read-only, perhaps since the drive failed: see the kernel's log";
    case EIO: return "; the drive may be failing: see the kernel's log";
    default: return "";
  }
}

[[noreturn]] void throw_io(const std::string& what, const std::string& path, int error_number) {
  TP_CHECK(error_number > 0);
  throw Error(ErrorKind::io,
              "could not " + what + " " + path + ": " + describe_errno(error_number) + advice(error_number),
              error_number);
}

// The first result that is not EINTR; a signal that never stops is an error in the end.
template <class Call>
auto without_interrupts(const Call& call) {
  auto result = call();
  for (unsigned retry = 0; result == -EINTR && retry < kIoRetryMax; ++retry) result = call();
  return result;
}

template <class Result>
Result check_result(Result result, const std::string& what, const std::string& path) {
  if (result < 0) throw_io(what, path, static_cast<int>(-result));
  return result;
}

std::string range(const char* verb, std::uint64_t offset_bytes, std::size_t size_bytes) {
  return std::string(verb) + " " + std::to_string(size_bytes) + " bytes at offset " + std::to_string(offset_bytes) +
         " of";
}

}  // namespace

DurableFile::DurableFile(FileSystem& file_system, int handle, const std::string& path)
    : file_system_(&file_system), handle_(handle), path_(path) {
  TP_CHECK(handle >= 0);
}

DurableFile DurableFile::create(FileSystem& file_system, const std::string& path) {
  const int handle = without_interrupts([&] { return file_system.create(path); });
  return DurableFile(file_system, check_result(handle, "create", path), path);
}

DurableFile DurableFile::open(FileSystem& file_system, const std::string& path) {
  const int handle = without_interrupts([&] { return file_system.open(path); });
  DurableFile file(file_system, check_result(handle, "open", path), path);
  file.size_bytes();  // refuses what is not a regular file
  return file;
}

DurableFile::DurableFile(DurableFile&& other) noexcept
    : file_system_(other.file_system_), handle_(std::exchange(other.handle_, -1)), path_(std::move(other.path_)) {}

DurableFile& DurableFile::operator=(DurableFile&& other) noexcept {
  if (this == &other) return *this;
  if (handle_ >= 0) file_system_->close(handle_);
  file_system_ = other.file_system_;
  handle_ = std::exchange(other.handle_, -1);
  path_ = std::move(other.path_);
  return *this;
}

DurableFile::~DurableFile() {
  if (handle_ >= 0) file_system_->close(handle_);
}

std::uint64_t DurableFile::size_bytes() const {
  TP_CHECK(handle_ >= 0);
  const std::int64_t size = without_interrupts([&] { return file_system_->size(handle_); });
  return static_cast<std::uint64_t>(check_result(size, "ask for the size of", path_));
}

std::size_t DurableFile::read(std::uint64_t offset_bytes, std::span<std::byte> bytes) const {
  TP_CHECK(handle_ >= 0);
  std::size_t done = 0;
  while (done < bytes.size()) {
    const std::uint64_t from = offset_bytes + done;
    const std::span<std::byte> rest = bytes.subspan(done, std::min(bytes.size() - done, kDurableTransferBytesMax));
    const std::int64_t count = without_interrupts([&] { return file_system_->pread(handle_, rest, from); });
    if (count < 0) throw_io(range("read", from, rest.size()), path_, static_cast<int>(-count));
    TP_CHECK(static_cast<std::uint64_t>(count) <= rest.size());
    if (count == 0) break;
    done += static_cast<std::size_t>(count);
  }
  return done;
}

void DurableFile::write(std::uint64_t offset_bytes, std::span<const std::byte> bytes) {
  TP_CHECK(handle_ >= 0);
  std::size_t done = 0;
  while (done < bytes.size()) {
    const std::uint64_t to = offset_bytes + done;
    const auto rest = bytes.subspan(done, std::min(bytes.size() - done, kDurableTransferBytesMax));
    const std::int64_t count = without_interrupts([&] { return file_system_->pwrite(handle_, rest, to); });
    // Nothing written and no reason: asking again could go on for ever.
    if (count <= 0) throw_io(range("write", to, rest.size()), path_, count == 0 ? EIO : static_cast<int>(-count));
    TP_CHECK(static_cast<std::uint64_t>(count) <= rest.size());
    done += static_cast<std::size_t>(count);
  }
}

void DurableFile::preallocate(std::uint64_t offset_bytes, std::uint64_t size_bytes) {
  TP_CHECK(handle_ >= 0 && size_bytes > 0);
  const int result = without_interrupts([&] { return file_system_->preallocate(handle_, offset_bytes, size_bytes); });
  check_result(result, range("make room for", offset_bytes, size_bytes), path_);
}

void DurableFile::sync() {
  TP_CHECK(handle_ >= 0);
  check_result(file_system_->sync(handle_), "sync", path_);
}

LockResult DurableFile::lock() {
  TP_CHECK(handle_ >= 0);
  const int result = without_interrupts([&] { return file_system_->lock(handle_); });
  if (result == -EWOULDBLOCK) return LockResult::refused;
  check_result(result, "lock", path_);
  return LockResult::held;
}

void rename_over(FileSystem& file_system, const std::string& from, const std::string& to) {
  check_result(file_system.rename(from, to), "rename " + from + " to", to);
}

void remove_file(FileSystem& file_system, const std::string& path) {
  const int result = without_interrupts([&] { return file_system.remove(path); });
  if (result != -ENOENT) check_result(result, "remove", path);
}

void sync_directory(FileSystem& file_system, const std::string& path) {
  check_result(file_system.sync_directory(path), "sync the directory", path);
}

}  // namespace tp
