// SPDX-License-Identifier: Apache-2.0
#include "sim/standin_cufile.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "base/check.hpp"

extern "C" tp::cuda::Result cuGetProcAddress_v2(const char* symbol, void** function, int version, std::uint64_t flags,
                                                int* query_result);

namespace tp {
namespace {

using cufile::Status;

constexpr int kErrorsOfCufile = 5000;
constexpr unsigned kStatusNvme = 1u << 4;
constexpr int kFlagsRefused = O_TMPFILE | O_NOFOLLOW | O_NOATIME | O_APPEND;

// Does the calling thread have a context of the stand-in driver?
bool has_context() {
  using GetCurrent = cuda::Result (*)(cuda::Context*);
  void* function = nullptr;
  int query_result = 0;
  TP_CHECK(cuGetProcAddress_v2("cuCtxGetCurrent", &function, cuda::kCudaApiVersion, cuda::kGetProcAddressLegacyStream,
                               &query_result) == cuda::kSuccess);
  cuda::Context context = nullptr;
  return reinterpret_cast<GetCurrent>(function)(&context) == cuda::kSuccess && context != nullptr;
}

class CufileWorld final : public StandinCufile {
 public:
  static CufileWorld& instance() {
    static auto* const world = new CufileWorld;  // never destroyed: threads of a test may outlive main()
    return *world;
  }

  StandinCufileLeaks reset(const StandinCufileOptions& options) override {
    const std::lock_guard lock(mutex_);
    const StandinCufileLeaks leaks = alive_locked();
    options_ = options;
    sessions_ = 0;
    handles_.clear();
    buffers_.clear();
    calls_.clear();
    failure_.reset();
    matching_ = fired_ = registered_transfers_ = 0;
    violations_.clear();
    return leaks;
  }
  StandinCufileLeaks alive() const override {
    const std::lock_guard lock(mutex_);
    return alive_locked();
  }
  void arm(const StandinCufileFailure& failure) override {
    TP_CHECK(failure.nth > 0 && failure.error != 0);
    const std::lock_guard lock(mutex_);
    failure_ = failure;
    matching_ = fired_ = 0;
  }
  std::uint64_t fired() const override {
    const std::lock_guard lock(mutex_);
    return fired_;
  }
  std::uint64_t calls(const std::string& name) const override {
    const std::lock_guard lock(mutex_);
    const auto found = calls_.find(name);
    return found != calls_.end() ? found->second : 0;
  }
  std::uint64_t registered_transfers() const override {
    const std::lock_guard lock(mutex_);
    return registered_transfers_;
  }
  std::vector<std::string> violations() const override {
    const std::lock_guard lock(mutex_);
    return violations_;
  }

  Status open() {
    const std::lock_guard lock(mutex_);
    if (const Status failed = begin_locked("cuFileDriverOpen"); failed.error != 0) return failed;
    if (options_.is_open_elsewhere) return {cufile::kErrorDriverAlreadyOpen};
    ++sessions_;
    return {};
  }

  Status close_session(bool is_counted) {
    const std::lock_guard lock(mutex_);
    if (const Status failed = begin_locked("cuFileDriverClose"); failed.error != 0) return failed;
    if (sessions_ == 0) return violation_locked("closed more often than opened", cufile::kErrorDriverNotInitialized);
    sessions_ = is_counted ? sessions_ - 1 : 0;
    if (sessions_ == 0 && !handles_.empty()) violation_locked("closed with files registered", 0);
    if (sessions_ == 0 && !buffers_.empty()) violation_locked("closed with buffers registered", 0);
    return {};
  }

  Status properties(cufile::DriverProperties* properties) {
    const std::lock_guard lock(mutex_);
    if (const Status failed = begin_locked("cuFileDriverGetProperties"); failed.error != 0) return failed;
    *properties = {};
    if (options_.has_module) {
      properties->nvfs.major_version = 2;
      properties->nvfs.minor_version = 20;
      properties->nvfs.status_flags = options_.supports_storage ? kStatusNvme : 0;
    }
    properties->nvfs.control_flags = options_.allows_compatibility ? cufile::kControlAllowCompatMode : 0;
    return {};
  }

  Status register_handle(cufile::Handle* handle, const cufile::Descriptor* descriptor) {
    const std::lock_guard lock(mutex_);
    if (const Status failed = begin_locked("cuFileHandleRegister"); failed.error != 0) return failed;
    if (!is_open_locked()) return violation_locked("a file before it was opened", cufile::kErrorDriverNotInitialized);
    if (descriptor->type != cufile::kHandleTypeDescriptor || descriptor->file_system_operations != nullptr)
      return {cufile::kErrorInvalidValue};
    const int number = descriptor->file.descriptor;
    struct stat status = {};
    const int flags = fcntl(number, F_GETFL);
    if (flags < 0 || fstat(number, &status) != 0 || !S_ISREG(status.st_mode)) return {cufile::kErrorInvalidFileType};
    if ((flags & kFlagsRefused) != 0) return {cufile::kErrorInvalidFileOpenFlag};
    if (options_.needs_direct_files && (flags & O_DIRECT) == 0) return {cufile::kErrorDirectIoNotSet};
    const bool is_known =
        std::any_of(handles_.begin(), handles_.end(), [number](const auto& each) { return each.second == number; });
    if (is_known) return {cufile::kErrorHandleAlreadyRegistered};
    *handle = reinterpret_cast<cufile::Handle>(next_handle_++);
    handles_.emplace(*handle, number);
    return {};
  }

  void deregister_handle(cufile::Handle handle) {
    const std::lock_guard lock(mutex_);
    begin_locked("cuFileHandleDeregister");
    if (handles_.erase(handle) == 0) violation_locked("a file that was not registered was deregistered", 0);
  }

  Status register_buffer(const void* base, std::size_t size_bytes, int flags) {
    const bool is_current = has_context();
    const std::lock_guard lock(mutex_);
    if (const Status failed = begin_locked("cuFileBufRegister"); failed.error != 0) return failed;
    if (!is_open_locked()) return violation_locked("a buffer before it was opened", cufile::kErrorDriverNotInitialized);
    if (base == nullptr || size_bytes == 0 || flags != 0) return {cufile::kErrorInvalidValue};
    if (!is_current) return violation_locked("a buffer without a context", cufile::kErrorCudaContextMismatch);
    const auto* first = static_cast<const std::byte*>(base);
    for (const auto& [other, other_bytes] : buffers_) {
      if (first < other + other_bytes && other < first + size_bytes) return {cufile::kErrorMemoryAlreadyRegistered};
    }
    buffers_.emplace(first, size_bytes);
    return {};
  }

  Status deregister_buffer(const void* base) {
    const std::lock_guard lock(mutex_);
    if (const Status failed = begin_locked("cuFileBufDeregister"); failed.error != 0) return failed;
    if (buffers_.erase(static_cast<const std::byte*>(base)) == 0)
      return violation_locked("a buffer that was not registered was deregistered", cufile::kErrorMemoryNotRegistered);
    return {};
  }

  ssize_t transfer(const char* call, cufile::Handle handle, std::byte* base, std::size_t size_bytes,
                   off_t file_offset_bytes, off_t memory_offset_bytes) {
    const bool is_read = std::string(call) == "cuFileRead";
    const bool is_current = has_context();
    int descriptor = -1;
    std::size_t admitted_bytes_max = 0;
    {
      const std::lock_guard lock(mutex_);
      const Status failed = begin_locked(call);
      if (failed.error >= kErrorsOfCufile) return -failed.error;
      if (failed.error != 0) {
        errno = failed.error;
        return -1;
      }
      const int error = check_locked(handle, base, size_bytes, memory_offset_bytes, is_current);
      if (error != 0) return -error;
      descriptor = handles_.at(handle);
      admitted_bytes_max = options_.admitted_bytes_max;
    }
    std::byte* memory = base + memory_offset_bytes;
    const ssize_t moved = is_read ? read_any(descriptor, memory, size_bytes, file_offset_bytes)
                                  : pwrite(descriptor, memory, size_bytes, file_offset_bytes);
    if (moved <= 0 || admitted_bytes_max == 0) return moved;
    return std::min(moved, static_cast<ssize_t>(admitted_bytes_max));
  }

 private:
  CufileWorld() = default;

  // A file that is open direct takes whole blocks alone; cuFile reads what it is asked for through a buffer then.
  static ssize_t read_any(int descriptor, std::byte* memory, std::size_t size_bytes, off_t offset_bytes) {
    constexpr std::size_t kBlock = 4096;
    const bool aligned =
        (reinterpret_cast<std::uintptr_t>(memory) | size_bytes | static_cast<std::size_t>(offset_bytes)) % kBlock == 0;
    if (aligned || (fcntl(descriptor, F_GETFL) & O_DIRECT) == 0)
      return pread(descriptor, memory, size_bytes, offset_bytes);
    const std::size_t skip = static_cast<std::size_t>(offset_bytes) % kBlock;
    const std::size_t whole = (skip + size_bytes + kBlock - 1) / kBlock * kBlock;
    const std::unique_ptr<void, decltype(&std::free)> buffer(std::aligned_alloc(kBlock, whole), &std::free);
    const ssize_t moved = pread(descriptor, buffer.get(), whole, offset_bytes - static_cast<off_t>(skip));
    if (moved < 0) return moved;
    const std::size_t got = static_cast<std::size_t>(moved) > skip ? static_cast<std::size_t>(moved) - skip : 0;
    std::memcpy(memory, static_cast<std::byte*>(buffer.get()) + skip, std::min(got, size_bytes));
    return static_cast<ssize_t>(std::min(got, size_bytes));
  }

  bool is_open_locked() const { return sessions_ > 0 || options_.is_open_elsewhere; }

  StandinCufileLeaks alive_locked() const { return {sessions_, handles_.size(), buffers_.size()}; }

  // Counts the call. What it is to fail with, if it is.
  Status begin_locked(const char* call) {
    ++calls_[call];
    if (!failure_ || failure_->call != call) return {};
    ++matching_;
    if (failure_->stays ? matching_ < failure_->nth : matching_ != failure_->nth) return {};
    ++fired_;
    return {failure_->error, failure_->cuda_error};
  }

  Status violation_locked(const std::string& what, int error) {
    violations_.push_back(what);
    return {error};
  }

  // 0, or the error of a transfer.
  int check_locked(cufile::Handle handle, const std::byte* base, std::size_t size_bytes, off_t memory_offset_bytes,
                   bool is_current) {
    if (!handles_.contains(handle)) {
      return violation_locked("a transfer with a file that is not registered", cufile::kErrorHandleNotRegistered).error;
    }
    if (!is_current) return violation_locked("a transfer without a context", cufile::kErrorCudaContextMismatch).error;
    const std::byte* first = base + memory_offset_bytes;
    const auto after = buffers_.upper_bound(first);
    const bool is_registered = after != buffers_.begin() && first < std::prev(after)->first + std::prev(after)->second;
    if (!is_registered) {
      if (memory_offset_bytes == 0) return 0;
      return violation_locked("an offset into a buffer that is not registered", cufile::kErrorCudaPointerRange).error;
    }
    const auto& [buffer, buffer_bytes] = *std::prev(after);
    if (base != buffer)
      return violation_locked("a registered buffer named by another address", cufile::kErrorMemoryNotRegistered).error;
    if (static_cast<std::size_t>(memory_offset_bytes) + size_bytes > buffer_bytes)
      return violation_locked("a transfer across a buffer's end", cufile::kErrorInvalidMappingRange).error;
    ++registered_transfers_;
    return 0;
  }

  mutable std::mutex mutex_;  // guards all
  StandinCufileOptions options_;
  std::size_t sessions_ = 0;
  std::uintptr_t next_handle_ = 0x1000;
  std::map<cufile::Handle, int> handles_;
  std::map<const std::byte*, std::size_t> buffers_;
  std::map<std::string, std::uint64_t> calls_;
  std::optional<StandinCufileFailure> failure_;
  std::uint64_t matching_ = 0, fired_ = 0, registered_transfers_ = 0;
  std::vector<std::string> violations_;
};

CufileWorld& world() { return CufileWorld::instance(); }

}  // namespace
}  // namespace tp

tp::StandinCufile* tensorpager_standin_cufile() { return &tp::world(); }

extern "C" {
#define TP_DECLARE(name, parameters) TP_STANDIN_EXPORT Status name parameters;
#define TP_DECLARE_OTHER(name, result, parameters) TP_STANDIN_EXPORT result name parameters;
using tp::cufile::Descriptor;
using tp::cufile::DriverProperties;
using tp::cufile::Handle;
using tp::cufile::Status;
TP_CUFILE_STATUS_ENTRY_POINTS(TP_DECLARE)
TP_CUFILE_OTHER_ENTRY_POINTS(TP_DECLARE_OTHER)
TP_STANDIN_EXPORT Status cuFileDriverClose();
#undef TP_DECLARE
#undef TP_DECLARE_OTHER

Status cuFileDriverOpen() { return tp::world().open(); }
Status cuFileDriverGetProperties(DriverProperties* properties) { return tp::world().properties(properties); }
Status cuFileHandleRegister(Handle* handle, Descriptor* descriptor) {
  return tp::world().register_handle(handle, descriptor);
}
void cuFileHandleDeregister(Handle handle) { tp::world().deregister_handle(handle); }
Status cuFileBufRegister(const void* base, std::size_t size_bytes, int flags) {
  return tp::world().register_buffer(base, size_bytes, flags);
}
Status cuFileBufDeregister(const void* base) { return tp::world().deregister_buffer(base); }
ssize_t cuFileRead(Handle handle, void* base, std::size_t size_bytes, off_t file_offset_bytes,
                   off_t memory_offset_bytes) {
  return tp::world().transfer("cuFileRead", handle, static_cast<std::byte*>(base), size_bytes, file_offset_bytes,
                              memory_offset_bytes);
}
ssize_t cuFileWrite(Handle handle, const void* base, std::size_t size_bytes, off_t file_offset_bytes,
                    off_t memory_offset_bytes) {
  auto* memory = const_cast<std::byte*>(static_cast<const std::byte*>(base));  // which is read from alone
  return tp::world().transfer("cuFileWrite", handle, memory, size_bytes, file_offset_bytes, memory_offset_bytes);
}
Status cuFileDriverClose() { return tp::world().close_session(false); }

#ifndef TENSORPAGER_STANDIN_CUFILE_OLD
TP_STANDIN_EXPORT Status cuFileDriverClose_v2();
TP_STANDIN_EXPORT Status cuFileGetVersion(int* version);

Status cuFileDriverClose_v2() { return tp::world().close_session(true); }
Status cuFileGetVersion(int* version) {
  *version = 1110;
  return {};
}
#endif
}
