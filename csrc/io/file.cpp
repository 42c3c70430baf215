// SPDX-License-Identifier: Apache-2.0
#include "io/file.hpp"

#include <fcntl.h>
#include <limits.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <mutex>
#include <utility>

#include "base/check.hpp"
#include "base/error.hpp"
#include "base/limits.hpp"

namespace tp {
namespace {

[[noreturn]] void throw_io(const std::string& what, const std::string& path, int error_number,
                           const std::string& advice = "") {
  TP_CHECK(error_number > 0);
  throw Error(ErrorKind::io, what + " " + path + ": " + describe_errno(error_number) + advice, error_number);
}

std::string open_advice(int error_number) {
  switch (error_number) {
    case EACCES:
    case EPERM: return "; check the permissions of the file and of the directories above it";
    case EMFILE:
    case ENFILE: return "; no file descriptor is left, raise `ulimit -n`";
    case ENOENT: return "; check the path (a link may dangle)";
    default: return "";
  }
}

std::uint64_t regular_size(int descriptor, const std::string& path) {
  struct stat status{};
  if (fstat(descriptor, &status) != 0) throw_io("fstat of", path, errno);
  TP_CHECK(status.st_size >= 0);
  if (S_ISREG(status.st_mode)) return static_cast<std::uint64_t>(status.st_size);
  const char* kind = S_ISDIR(status.st_mode)                              ? "a directory"
                     : S_ISFIFO(status.st_mode)                           ? "a pipe"
                     : S_ISCHR(status.st_mode) || S_ISBLK(status.st_mode) ? "a device"
                                                                          : "a special file";
  throw Error(ErrorKind::io,
              path + " is " + kind + ", not a regular file; paging reads at offsets of a file with a size",
              S_ISDIR(status.st_mode) ? EISDIR : EINVAL);
}

// What direct transfers on this file must be aligned to: asked of the file (Linux 6.1), else what block devices take.
// Zero: the file system says that this file takes none.
std::uint32_t direct_alignment(int descriptor) {
#ifdef STATX_DIOALIGN
  struct statx facts{};
  if (statx(descriptor, "", AT_EMPTY_PATH, STATX_DIOALIGN, &facts) == 0 && (facts.stx_mask & STATX_DIOALIGN) != 0) {
    return std::max(facts.stx_dio_mem_align, facts.stx_dio_offset_align);
  }
#endif
  static_cast<void>(descriptor);
  return kDirectAlignFallbackBytes;
}

// Switches the open file to direct transfers. Empty when it is direct now, else why not.
std::string make_direct(int descriptor, std::uint32_t& align_bytes) {
  TP_CHECK(align_bytes == 1);
  struct statfs file_system{};
  if (fstatfs(descriptor, &file_system) == 0 &&
      (file_system.f_type == TMPFS_MAGIC || file_system.f_type == RAMFS_MAGIC)) {
    return "the file lies in memory (tmpfs): paging from or to it frees none";
  }
  const std::uint32_t alignment = direct_alignment(descriptor);
  if (alignment == 0) return "the file system takes no direct I/O on this file (STATX_DIOALIGN is 0)";
  if (alignment > kPageBytesMin || (alignment & (alignment - 1)) != 0) {
    return "the file asks for an alignment of " + std::to_string(alignment) + " bytes, which pages do not have";
  }
  const int flags = fcntl(descriptor, F_GETFL);
  if (flags < 0 || fcntl(descriptor, F_SETFL, flags | O_DIRECT) != 0) {
    return "the file system refuses O_DIRECT: " + describe_errno(errno) + "; transfers go through the page cache";
  }
  align_bytes = alignment;
  return "";
}

// A file system without O_TMPFILE: a name nobody can guess or plant, and gone before anything is written.
int open_unlinked(const std::string& directory) {
  struct stat status{};
  if (stat(directory.c_str(), &status) != 0) return -1;
  if ((status.st_mode & S_IWOTH) != 0 && (status.st_mode & S_ISVTX) == 0) {
    throw Error(ErrorKind::io,
                "will not spill to " + directory +
                    ": anyone may write and delete there, and its file system has no "
                    "O_TMPFILE. Set the sticky bit (chmod +t) or name a directory of your own",
                EPERM);
  }
  std::string name = directory + "/.tensorpager-spill-XXXXXX";
  const int descriptor = mkostemp(name.data(), O_CLOEXEC | O_NOFOLLOW);  // O_CREAT|O_EXCL, mode 0600
  if (descriptor < 0 || unlink(name.c_str()) == 0) return descriptor;
  const int error_number = errno;
  close(descriptor);
  errno = error_number;
  return -1;
}

int open_unnamed(const std::string& directory) {
  const int descriptor = open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC | O_EXCL, 0600);
  if (descriptor >= 0) return descriptor;
  // EISDIR: a kernel that does not know the flag.
  const bool unknown = errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL;
  return unknown ? open_unlinked(directory) : -1;
}

}  // namespace

void File::apply(DirectPolicy policy) {
  TP_CHECK(descriptor_ >= 0);
  if (policy == DirectPolicy::disabled) {
    direct_reason_ = "direct I/O was not asked for";
    return;
  }
  direct_reason_ = make_direct(descriptor_, align_bytes_);
  direct_ = direct_reason_.empty();
  TP_CHECK(direct_ || align_bytes_ == 1);
  if (!direct_ && policy == DirectPolicy::required) {
    throw Error(ErrorKind::io, path_ + ": direct I/O is required, but " + direct_reason_, EINVAL);
  }
}

File File::open_checkpoint(const std::string& path, DirectPolicy policy) {
  File file;
  file.path_ = path;
  // Links are followed: download caches are made of them. O_NONBLOCK: opening a pipe must not hang before it is
  // refused.
  file.descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (file.descriptor_ < 0) throw_io("could not open", path, errno, open_advice(errno));
  file.finish_opening(policy);
  return file;
}

// Of a file opened with O_NONBLOCK.
void File::finish_opening(DirectPolicy policy) {
  size_bytes_ = regular_size(descriptor_, path_);
  // io_uring would take O_NONBLOCK for "fail with EAGAIN rather than wait for the drive".
  const int flags = fcntl(descriptor_, F_GETFL);
  if (flags < 0 || fcntl(descriptor_, F_SETFL, flags & ~O_NONBLOCK) != 0) throw_io("fcntl of", path_, errno);
  apply(policy);
}

File File::open_stored(const std::string& path, DirectPolicy policy) {
  File file;
  file.path_ = path;
  file.descriptor_ = open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY);
  if (file.descriptor_ < 0) throw_io("could not open", path, errno, open_advice(errno));
  file.size_bytes_ = regular_size(file.descriptor_, path);
  file.apply(policy);
  return file;
}

File File::open_to_write(const std::string& path, DirectPolicy policy) {
  File file;
  file.path_ = path;
  file.descriptor_ = open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0600);
  if (file.descriptor_ < 0) throw_io("could not open", path, errno, open_advice(errno));
  file.finish_opening(policy);
  return file;
}

File File::reopen_to_write(int descriptor, DirectPolicy policy) {
  const int flags = fcntl(descriptor, F_GETFL);
  const std::string number = "descriptor " + std::to_string(descriptor);
  if (flags < 0) throw_io("could not write to", number, errno);
  if ((flags & O_ACCMODE) == O_RDONLY) throw_io("could not write to", number, EBADF, "; it is open for reading alone");
  const std::string link = "/proc/self/fd/" + std::to_string(descriptor);
  File file;
  std::array<char, PATH_MAX> name{};
  const ssize_t length = readlink(link.c_str(), name.data(), name.size());
  file.path_ = length > 0 ? std::string(name.data(), static_cast<std::size_t>(length)) : number;
  file.descriptor_ = open(link.c_str(), O_WRONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (file.descriptor_ < 0) throw_io("could not open once more, through /proc,", file.path_, errno);
  file.finish_opening(policy);
  return file;
}

File File::open_spill(const std::string& directory, DirectPolicy policy) {
  File file;
  file.path_ = directory + " (spill)";
  file.descriptor_ = open_unnamed(directory);
  if (file.descriptor_ < 0) {
    throw_io("could not make a spill file in", directory, errno,
             open_advice(errno) + "; name a directory that can be written (store=)");
  }
  if (fchmod(file.descriptor_, 0600) != 0) throw_io("fchmod of", file.path_, errno);
  file.size_bytes_ = regular_size(file.descriptor_, file.path_);
  TP_CHECK(file.size_bytes_ == 0);
  file.apply(policy);
  return file;
}

File::File(File&& other) noexcept { *this = std::move(other); }

File& File::operator=(File&& other) noexcept {
  if (this == &other) return *this;
  if (descriptor_ >= 0) close(descriptor_);
  descriptor_ = std::exchange(other.descriptor_, -1);
  path_ = std::move(other.path_);
  size_bytes_ = std::exchange(other.size_bytes_, 0);
  direct_ = std::exchange(other.direct_, false);
  direct_reason_ = std::move(other.direct_reason_);
  align_bytes_ = std::exchange(other.align_bytes_, 1);
  return *this;
}

File::~File() {
  if (descriptor_ >= 0) close(descriptor_);
}

struct stat File::status() const {
  struct stat status{};
  if (fstat(descriptor_, &status) != 0) throw_io("fstat of", path_, errno);
  return status;
}

std::uint64_t File::size_bytes_now() const {
  TP_CHECK(descriptor_ >= 0);
  return regular_size(descriptor_, path_);
}

// Throws, but for a file system that knows no such thing: false.
bool File::allocate(int mode, std::uint64_t offset_bytes, std::uint64_t size_bytes) const {
  TP_CHECK(descriptor_ >= 0 && size_bytes > 0);
  TP_CHECK(offset_bytes + size_bytes > offset_bytes);
  int error_number = 0;
  do {
    const auto size = static_cast<off_t>(size_bytes);
    error_number = fallocate(descriptor_, mode, static_cast<off_t>(offset_bytes), size) == 0 ? 0 : errno;
  } while (error_number == EINTR);
  if (error_number == 0 || error_number == EOPNOTSUPP) return error_number == 0;
  throw_no_room(offset_bytes, size_bytes, error_number);
}

void File::throw_no_room(std::uint64_t offset_bytes, std::uint64_t size_bytes, int error_number) const {
  const std::string range = std::to_string(size_bytes) + " bytes at offset " + std::to_string(offset_bytes);
  const char* advice = error_number == ENOSPC  ? "; free space, or name another directory"
                       : error_number == EFBIG ? "; the limit on the size of files (`ulimit -f`) is below that"
                                               : "";
  throw_io("could not make room for " + range + " in", path_, error_number, advice);
}

void File::preallocate(std::uint64_t offset_bytes, std::uint64_t size_bytes) {
  if (!allocate(0, offset_bytes, size_bytes)) {
    // Extends with a hole: a full disk then shows at the write. posix_fallocate would write zeros through the page
    // cache instead. Never shortens.
    const std::uint64_t end_bytes = std::max(size_bytes_now(), offset_bytes + size_bytes);
    if (ftruncate(descriptor_, static_cast<off_t>(end_bytes)) != 0) throw_no_room(offset_bytes, size_bytes, errno);
  }
  size_bytes_ = std::max(size_bytes_, offset_bytes + size_bytes);
}

void File::make_room(std::uint64_t offset_bytes, std::uint64_t size_bytes) {
  // One at a time in this process: what one gives back must not be what another has just been given.
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  constexpr std::uint64_t kStatBlockBytes = 512;
  const struct stat before = status();
  const auto now_bytes = static_cast<std::uint64_t>(before.st_size);
  const bool whole = static_cast<std::uint64_t>(before.st_blocks) * kStatBlockBytes >= now_bytes;
  if (whole && now_bytes >= offset_bytes + size_bytes) return;
  try {
    // Behind the end of the file first, where a part of it can be given back without touching what the file holds.
    allocate(FALLOC_FL_KEEP_SIZE, offset_bytes, size_bytes);
    preallocate(offset_bytes, size_bytes);
  } catch (const Error&) {
    if (ftruncate(descriptor_, status().st_size) != 0) throw_io("could not give back the room behind", path_, errno);
    throw;
  }
}

}  // namespace tp
