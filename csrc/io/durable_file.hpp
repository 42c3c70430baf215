// SPDX-License-Identifier: Apache-2.0
// An open file of a FileSystem, with every result checked in one place: EINTR is retried, transfers of fewer bytes than
// asked for are continued, and whatever else fails is an Error(io) with path, offset and errno.
//
// Threads: one at a time. Blocking: every call. Move-only; closes its file. The FileSystem must outlive it. sync() is
// never retried, not even after EINTR: a second fsync may succeed although the first one's bytes are lost.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "io/file_system.hpp"

namespace tp {

enum class LockResult : std::uint8_t { held, refused };

class DurableFile {
 public:
  static DurableFile create(FileSystem& file_system, const std::string& path);
  static DurableFile open(FileSystem& file_system, const std::string& path);

  DurableFile(DurableFile&& other) noexcept;
  DurableFile& operator=(DurableFile&& other) noexcept;
  DurableFile(const DurableFile&) = delete;
  DurableFile& operator=(const DurableFile&) = delete;
  ~DurableFile();

  const std::string& path() const noexcept { return path_; }
  int handle() const noexcept { return handle_; }
  std::uint64_t size_bytes() const;  // asks the file

  // How many bytes there were: fewer than asked for only where the file ends.
  std::size_t read(std::uint64_t offset_bytes, std::span<std::byte> bytes) const;
  void write(std::uint64_t offset_bytes, std::span<const std::byte> bytes);
  void preallocate(std::uint64_t offset_bytes, std::uint64_t size_bytes);
  void sync();
  LockResult lock();

 private:
  DurableFile(FileSystem& file_system, int handle, const std::string& path);
  FileSystem* file_system_;
  int handle_;
  std::string path_;
};

// The same care for names. remove_file() takes it well when there is none.
void rename_over(FileSystem& file_system, const std::string& from, const std::string& to);
void remove_file(FileSystem& file_system, const std::string& path);
void sync_directory(FileSystem& file_system, const std::string& path);

}  // namespace tp
