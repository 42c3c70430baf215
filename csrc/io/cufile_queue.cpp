// SPDX-License-Identifier: Apache-2.0
#include "io/cufile_queue.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/check.hpp"
#include "base/error.hpp"
#include "io/worker_queue.hpp"

namespace tp {
namespace {

// A blocked call holds its thread for as long as the drive takes: as many as a drive's queue gains from.
constexpr unsigned kThreadsMax = 16;

// What open(2) leaves in a descriptor's flags and cuFile refuses.
constexpr int kFlagsRefused = O_TMPFILE | O_NOFOLLOW | O_NOATIME;
constexpr int kFlagsThatMatter = O_ACCMODE | O_DIRECT | O_SYNC | O_DSYNC;

[[noreturn]] void throw_of_descriptor(const char* call, int descriptor) {
  const int error_number = errno;
  throw Error(ErrorKind::io,
              "the cufile engine can't take file descriptor " + std::to_string(descriptor) + ": " + call +
                  " failed: " + describe_errno(error_number),
              error_number);
}

// What tells whether a descriptor's number still names the file that it named.
struct FileIdentity {
  dev_t device = 0;
  ino_t inode = 0;
  int flags = 0;
  bool operator==(const FileIdentity&) const = default;
};

FileIdentity identity_of(int descriptor) {
  struct stat status = {};
  if (fstat(descriptor, &status) != 0) throw_of_descriptor("fstat", descriptor);
  const int flags = fcntl(descriptor, F_GETFL);
  if (flags < 0) throw_of_descriptor("fcntl(F_GETFL)", descriptor);
  return {status.st_dev, status.st_ino, flags};
}

// The same file with a descriptor of our own, and without the flags that cuFile refuses.
int reopen(int descriptor, int flags) {
  const std::string path = "/proc/self/fd/" + std::to_string(descriptor);
  const int own = open(path.c_str(), (flags & kFlagsThatMatter) | O_CLOEXEC);
  if (own < 0) throw_of_descriptor(("open of " + path).c_str(), descriptor);
  return own;
}

struct RegisteredFile {
  FileIdentity identity;
  int own_descriptor = -1;  // -1: the caller's is registered
  cufile::Handle handle = nullptr;
};

struct Slice {
  std::byte* base = nullptr;
  std::size_t size_bytes = 0;
};

class CufileTransfers final : public BlockingTransfers {
 public:
  CufileTransfers(const IoQueueOptions& options, const Cufile& library, const CudaDevice& device)
      : library_(library), device_(device), slice_bytes_max_(options.registered_slice_bytes) {
    TP_CHECK(slice_bytes_max_ > 0);
    const CudaDevice::Current current(device_);
    session_ = std::make_unique<CufileSession>(library_);
  }

  ~CufileTransfers() override {
    const CudaDevice::Current current(device_);
    deregister_memory();
    for (auto& [descriptor, file] : files_) forget(file);
    session_.reset();
  }

  IoQueueFacts facts() const override {
    IoQueueFacts facts{"cufile", !slices_.empty(), unregistered_reason_, {}};
    facts.kernel_features.push_back(cufile_facts(*session_).direct ? "DIRECT" : "COMPATIBILITY_MODE");
    return facts;
  }

  // cuFile refuses a descriptor's number twice. So a file that is added again shares its handle, and the handle of one
  // that has been closed since (its number names another file now) goes first.
  File add_file(int descriptor) override {
    const FileIdentity identity = identity_of(descriptor);
    const CudaDevice::Current current(device_);
    const auto known = files_.find(descriptor);
    if (known != files_.end()) {
      if (known->second.identity == identity) return reinterpret_cast<File>(known->second.handle);
      forget(known->second);
      files_.erase(known);
    }
    RegisteredFile file = register_file(descriptor, identity);
    files_.emplace(descriptor, file);
    return reinterpret_cast<File>(file.handle);
  }

  void register_memory(std::span<std::byte> memory) override {
    if (refused_) return;
    const CudaDevice::Current current(device_);
    for (std::size_t at = 0; at < memory.size(); at += slice_bytes_max_) {
      const Slice slice{memory.data() + at, std::min(memory.size() - at, slice_bytes_max_)};
      const cufile::Status status =
          library_.cuFileBufRegister.result(static_cast<const void*>(slice.base), slice.size_bytes, 0);
      if (status.error != cufile::kSuccess) {
        deregister_memory();
        refused_ = true;
        unregistered_reason_ = "cuFileBufRegister of " + std::to_string(slice.size_bytes) +
                               " bytes failed: " + describe_cufile(status) +
                               "; transfers go through buffers of cuFile's own";
        return;
      }
      slices_.push_back(slice);
    }
    std::sort(slices_.begin(), slices_.end(),
              [](const Slice& left, const Slice& right) { return left.base < right.base; });
    unregistered_reason_.clear();
  }

  void start_worker() override { device_.bind_thread(); }

  std::uint64_t bytes_in_one_piece(const std::byte* memory) const override {
    const Slice* slice = find_slice(memory);
    if (slice == nullptr) return BlockingTransfers::bytes_in_one_piece(memory);
    return static_cast<std::uint64_t>(slice->base + slice->size_bytes - memory);
  }

  int transfer(IoOp op, File file, const TransferPiece& piece) noexcept override {
    const auto handle = reinterpret_cast<cufile::Handle>(file);
    const auto file_offset = static_cast<off_t>(piece.offset_bytes);
    // Registered memory is recognised by the address that was registered alone.
    const Slice* slice = find_slice(piece.memory);
    std::byte* base = slice != nullptr ? slice->base : piece.memory;
    const auto memory_offset = static_cast<off_t>(piece.memory - base);
    errno = 0;
    const ssize_t moved = op == IoOp::read ? library_.cuFileRead(handle, static_cast<void*>(base), piece.size_bytes,
                                                                 file_offset, memory_offset)
                                           : library_.cuFileWrite(handle, static_cast<const void*>(base),
                                                                  piece.size_bytes, file_offset, memory_offset);
    if (moved == -1) return errno != 0 ? -errno : -EIO;
    if (moved < 0) return -errno_of_cufile(static_cast<int>(-moved));
    return moved <= static_cast<ssize_t>(piece.size_bytes) ? static_cast<int>(moved) : -EIO;
  }

 private:
  RegisteredFile register_file(int descriptor, const FileIdentity& identity) const {
    RegisteredFile file;
    file.identity = identity;
    if ((identity.flags & kFlagsRefused) != 0) file.own_descriptor = reopen(descriptor, identity.flags);
    cufile::Status status = register_handle(descriptor, file);
    if (status.error == cufile::kErrorHandleAlreadyRegistered && file.own_descriptor < 0) {
      file.own_descriptor = reopen(descriptor, identity.flags);  // by another queue, say: it takes another number
      status = register_handle(descriptor, file);
    }
    if (status.error == cufile::kSuccess) return file;
    if (file.own_descriptor >= 0) close(file.own_descriptor);
    throw cufile_error("cuFileHandleRegister", status);
  }

  cufile::Status register_handle(int descriptor, RegisteredFile& file) const {
    cufile::Descriptor description;
    description.file.descriptor = file.own_descriptor >= 0 ? file.own_descriptor : descriptor;
    return library_.cuFileHandleRegister.result(&file.handle, &description);
  }

  void forget(const RegisteredFile& file) const {
    library_.cuFileHandleDeregister(file.handle);
    if (file.own_descriptor >= 0) close(file.own_descriptor);
  }

  void deregister_memory() {
    for (const Slice& slice : slices_) library_.cuFileBufDeregister.result(static_cast<const void*>(slice.base));
    slices_.clear();
  }

  const Slice* find_slice(const std::byte* memory) const {
    const auto after =
        std::upper_bound(slices_.begin(), slices_.end(), memory,
                         [](const std::byte* address, const Slice& slice) { return address < slice.base; });
    if (after == slices_.begin()) return nullptr;
    const Slice& slice = *(after - 1);
    return memory < slice.base + slice.size_bytes ? &slice : nullptr;
  }

  const Cufile& library_;
  const CudaDevice& device_;
  const std::size_t slice_bytes_max_;
  std::unique_ptr<CufileSession> session_;
  std::map<int, RegisteredFile> files_;  // by the caller's descriptor
  // Sorted by address. Written before the first request alone, so that workers read it without a lock.
  std::vector<Slice> slices_;
  bool refused_ = false;
  std::string unregistered_reason_ = "no memory was registered";
};

}  // namespace

std::unique_ptr<IoQueue> make_cufile_queue(const IoQueueOptions& options, const Cufile& library,
                                           const CudaDevice& device) {
  return make_worker_queue("cufile", options, kThreadsMax, std::make_unique<CufileTransfers>(options, library, device));
}

}  // namespace tp
