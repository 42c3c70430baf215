// SPDX-License-Identifier: Apache-2.0
#include "io/file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <utility>

#include "base/check.hpp"
#include "base/error.hpp"
#include "base/limits.hpp"

namespace tp {
namespace {

[[noreturn]] void throw_io(const std::string& what, const std::string& path, int error_number, const std::string& advice = "") {
  throw Error(ErrorKind::io, what + " " + path + ": " + describe_errno(error_number) + advice, error_number);
}

void require_regular(int descriptor, const std::string& path, std::uint64_t& size_bytes) {
  struct stat status {};
  if (fstat(descriptor, &status) != 0) throw_io("fstat of", path, errno);
  if (!S_ISREG(status.st_mode)) {
    throw Error(ErrorKind::io, path + " is not a regular file; paging reads files at offsets, which pipes, devices and directories do not have",
                EINVAL);
  }
  size_bytes = static_cast<std::uint64_t>(status.st_size);
}

// What direct transfers on this file must be aligned to: asked of the file (Linux 6.1), else the page size every block device takes.
// Zero: the file system says that this file takes none.
std::uint32_t direct_alignment(int descriptor) {
#ifdef STATX_DIOALIGN
  struct statx facts {};
  if (statx(descriptor, "", AT_EMPTY_PATH, STATX_DIOALIGN, &facts) == 0 && (facts.stx_mask & STATX_DIOALIGN) != 0) {
    return std::max(facts.stx_dio_mem_align, facts.stx_dio_offset_align);
  }
#endif
  static_cast<void>(descriptor);
  return kDirectAlignFallbackBytes;
}

// Switches the open file to direct transfers. Empty when it is direct now, else why not.
std::string make_direct(int descriptor, std::uint32_t& align_bytes) {
  align_bytes = 1;
  const std::uint32_t alignment = direct_alignment(descriptor);
  if (alignment == 0) return "the file system takes no direct I/O on this file (STATX_DIOALIGN is 0)";
  if (alignment > kPageBytesMin) return "the file asks for an alignment of " + std::to_string(alignment) + " bytes, more than a page";
  const int flags = fcntl(descriptor, F_GETFL);
  if (flags < 0 || fcntl(descriptor, F_SETFL, flags | O_DIRECT) != 0) {
    return "the file system refuses O_DIRECT: " + describe_errno(errno) + "; transfers go through the page cache";
  }
  align_bytes = alignment;
  return "";
}

void apply(DirectPolicy policy, int descriptor, const std::string& path, bool& direct, std::string& reason, std::uint32_t& align_bytes) {
  align_bytes = 1;
  if (policy == DirectPolicy::disabled) {
    reason = "direct I/O was not asked for";
    return;
  }
  reason = make_direct(descriptor, align_bytes);
  direct = reason.empty();
  if (!direct && policy == DirectPolicy::required) throw Error(ErrorKind::io, path + ": direct I/O is required, but " + reason, EINVAL);
}

int open_unnamed(const std::string& directory) {
  const int descriptor = open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC | O_EXCL, 0600);
  if (descriptor >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL)) return descriptor;
  // A file system without O_TMPFILE: a name nobody can guess or plant, and gone before anything is written.
  std::string name = directory + "/.tensorpager-spill-XXXXXX";
  const int named = mkostemp(name.data(), O_CLOEXEC);  // O_CREAT|O_EXCL, which follows no link at the last component; mode 0600
  if (named >= 0 && unlink(name.c_str()) != 0) {
    const int error_number = errno;
    close(named);
    errno = error_number;
    return -1;
  }
  return named;
}

}  // namespace

File File::open_checkpoint(const std::string& path, DirectPolicy policy) {
  File file;
  file.path_ = path;
  // Links are followed: download caches are made of them. O_NONBLOCK: opening a FIFO must not hang before it is refused.
  file.descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file.descriptor_ < 0) throw_io("could not open", path, errno);
  require_regular(file.descriptor_, path, file.size_bytes_);
  apply(policy, file.descriptor_, path, file.direct_, file.direct_reason_, file.align_bytes_);
  return file;
}

File File::open_spill(const std::string& directory, DirectPolicy policy) {
  File file;
  file.path_ = directory + " (spill)";
  file.descriptor_ = open_unnamed(directory);
  if (file.descriptor_ < 0) throw_io("could not make a spill file in", directory, errno, "; name a directory that can be written (store=)");
  if (fchmod(file.descriptor_, 0600) != 0) throw_io("fchmod of", file.path_, errno);
  require_regular(file.descriptor_, file.path_, file.size_bytes_);
  apply(policy, file.descriptor_, file.path_, file.direct_, file.direct_reason_, file.align_bytes_);
  return file;
}

File::File(File&& other) noexcept { *this = std::move(other); }

File& File::operator=(File&& other) noexcept {
  if (this == &other) return *this;
  if (descriptor_ >= 0) close(descriptor_);
  descriptor_ = std::exchange(other.descriptor_, -1);
  path_ = std::move(other.path_);
  size_bytes_ = other.size_bytes_;
  direct_ = other.direct_;
  direct_reason_ = std::move(other.direct_reason_);
  align_bytes_ = other.align_bytes_;
  return *this;
}

File::~File() {
  if (descriptor_ >= 0) close(descriptor_);
}

void File::preallocate(std::uint64_t offset_bytes, std::uint64_t size_bytes) {
  TP_CHECK(descriptor_ >= 0 && size_bytes > 0);
  int result = 0;
  do {
    result = fallocate(descriptor_, 0, static_cast<off_t>(offset_bytes), static_cast<off_t>(size_bytes)) == 0 ? 0 : errno;
  } while (result == EINTR);
  if (result == EOPNOTSUPP) {
    // Extends with a hole: a full disk then shows at the write. posix_fallocate would write zeros through the page cache instead.
    result = ftruncate(descriptor_, static_cast<off_t>(offset_bytes + size_bytes)) == 0 ? 0 : errno;
  }
  if (result != 0) {
    throw_io("could not make room for " + std::to_string(size_bytes / kMiB) + " MiB in", path_, result,
             result == ENOSPC ? "; free space or name another directory (store=)" : "");
  }
  size_bytes_ = std::max(size_bytes_, offset_bytes + size_bytes);
}

}  // namespace tp
