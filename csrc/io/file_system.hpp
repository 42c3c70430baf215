// SPDX-License-Identifier: Apache-2.0
// The calls that a durable file needs of the machine, and no more: the seam at which a simulated drive takes the place
// of a real one (csrc/sim/sim_file_system.hpp). Use it through DurableFile, where every result is checked.
//
// Results: 0, a file, or a count of bytes; negative errno on failure. Nothing is retried here: EINTR and transfers of
// fewer bytes than asked for are the caller's. Files are small integers; with PosixFileSystem they are descriptors.
// Threads: one at a time for each file; PosixFileSystem has no state of its own. Blocking: all of them. Throws nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace tp {

class FileSystem {
 public:
  virtual ~FileSystem() = default;

  // Both for reading and writing, links not followed. create() makes a file of mode 0600 and fails with EEXIST.
  virtual int create(const std::string& path) = 0;
  virtual int open(const std::string& path) = 0;
  virtual void close(int file) noexcept = 0;

  virtual std::int64_t size(int file) = 0;  // EINVAL for what is not a regular file
  virtual std::int64_t pread(int file, std::span<std::byte> bytes, std::uint64_t offset_bytes) = 0;
  virtual std::int64_t pwrite(int file, std::span<const std::byte> bytes, std::uint64_t offset_bytes) = 0;
  // Room for the range, the file made longer where it ends before. Never shortens, never changes bytes.
  virtual int preallocate(int file, std::uint64_t offset_bytes, std::uint64_t size_bytes) = 0;
  // What was written, and the size needed to read it, is on the drive. After a failure nobody knows what is: the
  // kernel may have dropped it, and a second call may succeed all the same. So it must never be called again in hope.
  virtual int sync(int file) = 0;
  virtual int lock(int file) = 0;  // exclusively, until closed; EWOULDBLOCK when somebody else has it

  virtual int rename(const std::string& from, const std::string& to) = 0;  // over what is there, at once or not at all
  virtual int remove(const std::string& path) = 0;
  virtual int sync_directory(const std::string& path) = 0;  // names made, renamed and removed in it; as sync()
};

class PosixFileSystem final : public FileSystem {
 public:
  int create(const std::string& path) override;
  int open(const std::string& path) override;
  void close(int file) noexcept override;
  std::int64_t size(int file) override;
  std::int64_t pread(int file, std::span<std::byte> bytes, std::uint64_t offset_bytes) override;
  std::int64_t pwrite(int file, std::span<const std::byte> bytes, std::uint64_t offset_bytes) override;
  int preallocate(int file, std::uint64_t offset_bytes, std::uint64_t size_bytes) override;
  int sync(int file) override;
  int lock(int file) override;
  int rename(const std::string& from, const std::string& to) override;
  int remove(const std::string& path) override;
  int sync_directory(const std::string& path) override;
};

// The one of this process; it has no state, so it is never in the way of anybody.
FileSystem& posix_file_system();

}  // namespace tp
