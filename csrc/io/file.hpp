// SPDX-License-Identifier: Apache-2.0
// A file the pager reads from (a checkpoint, opened read-only), spills to (unlinked at birth), or stores pages in.
//
// open_checkpoint: O_RDONLY|O_CLOEXEC, refuses what is not a regular file; direct when the file system takes O_DIRECT
// (DirectPolicy), the alignment asked of the file with STATX_DIOALIGN. open_spill: O_TMPFILE, else O_CREAT|O_EXCL|
// O_NOFOLLOW and unlinked at once; mode 0600. open_stored: O_RDWR|O_NOFOLLOW. open_to_write: O_WRONLY|O_CREAT, mode
// 0600, links followed. reopen: the same file once more, by what a descriptor of it names. preallocate() makes room
// now, so that a full disk is met here. Files that lie in memory (tmpfs) are never direct: their bytes would only be
// copied within RAM. Blocking; one thread. Errors: Error(io) with path, call and errno. Move-only; closes its
// descriptor.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <string>

#include "io/io_queue.hpp"

namespace tp {

enum class DirectPolicy { required, optional, disabled };

class File {
 public:
  static File open_checkpoint(const std::string& path, DirectPolicy policy);
  static File open_stored(const std::string& path, DirectPolicy policy);  // an extent file, for reading and writing
  static File open_spill(const std::string& directory, DirectPolicy policy);
  static File open_to_write(const std::string& path, DirectPolicy policy);
  // For writing. descriptor: anybody's, open for writing. Error(io) when it is not, or /proc is not mounted.
  static File reopen_to_write(int descriptor, DirectPolicy policy);

  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File();

  int descriptor() const noexcept { return descriptor_; }
  const std::string& path() const noexcept { return path_; }
  std::uint64_t size_bytes() const noexcept { return size_bytes_; }  // when opened, or as made room for since
  std::uint64_t size_bytes_now() const;  // asks the file again: smaller when somebody truncated it
  bool direct() const noexcept { return direct_; }
  const std::string& direct_reason() const noexcept { return direct_reason_; }  // why not, when not
  std::uint32_t align_bytes() const noexcept { return align_bytes_; }  // of memory, offset and size; 1 when buffered

  struct stat status() const;  // fstat

  void preallocate(std::uint64_t offset_bytes, std::uint64_t size_bytes);
  // The same, unless the file is that large and has no holes. What could not be had in full is given back.
  void make_room(std::uint64_t offset_bytes, std::uint64_t size_bytes);

 private:
  File() = default;
  void finish_opening(DirectPolicy policy);
  void apply(DirectPolicy policy);
  bool allocate(int mode, std::uint64_t offset_bytes, std::uint64_t size_bytes) const;
  [[noreturn]] void throw_no_room(std::uint64_t offset_bytes, std::uint64_t size_bytes, int error_number) const;
  int descriptor_ = -1;
  std::string path_;
  std::uint64_t size_bytes_ = 0;
  bool direct_ = false;
  std::string direct_reason_;
  std::uint32_t align_bytes_ = 1;
};

}  // namespace tp
