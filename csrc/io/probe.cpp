// SPDX-License-Identifier: Apache-2.0
#include "io/probe.hpp"

#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "base/check.hpp"
#include "base/error.hpp"
#include "io/file.hpp"

namespace tp {
namespace {

struct Engine {
  const char* name;
  std::unique_ptr<IoQueue> (*make)(const IoQueueOptions&);
  bool transfers;  // engines that move no bytes are only taken by name
};
// Best first. A new engine is one file and one line here.
constexpr std::array kEngines{Engine{"uring", make_uring_queue, true}, Engine{"pread", make_pread_queue, true},
                              Engine{"null", make_null_queue, false}};

std::string joined(const std::vector<std::string>& words) {
  std::string result;
  for (const std::string& word : words) result += (result.empty() ? "" : ", ") + word;
  return result;
}

// Anonymous memory and a file without a name for one trial transfer.
class Trial {
 public:
  static constexpr std::size_t kBytes = 64 * kKiB;

  Trial() : file_(memfd_create("tensorpager-probe", MFD_CLOEXEC)) {
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory != MAP_FAILED) memory_ = static_cast<std::byte*>(memory);
    if (file_ >= 0 && memory_ != nullptr) {
      std::memset(memory_, 0x5a, kBytes);
      written_ = pwrite(file_, memory_, kBytes, 0) == static_cast<ssize_t>(kBytes);
      std::memset(memory_, 0, kBytes);
    }
    if (!written_) refusal_ = "there was no memory to try it with: " + describe_errno(errno);
  }
  ~Trial() {
    if (memory_ != nullptr) munmap(memory_, kBytes);
    if (file_ >= 0) close(file_);
  }
  Trial(const Trial&) = delete;
  Trial& operator=(const Trial&) = delete;

  const std::string& refusal() const noexcept { return refusal_; }
  std::span<std::byte> memory() const noexcept { return {memory_, kBytes}; }

  // Reads the file through the queue. Empty when every byte came, else what went wrong.
  std::string read_through(IoQueue& queue) const {
    TP_CHECK(written_);
    const IoRequest request{1, IoOp::read, queue.add_file(file_, 1), 0, memory_, kBytes};
    queue.submit({&request, 1});
    std::vector<IoCompletion> completions;
    queue.drain(completions);
    TP_CHECK(completions.size() == 1);
    if (completions[0].error != 0) return "a trial read failed: " + describe_errno(completions[0].error);
    for (std::size_t at = 0; at < kBytes; ++at) {
      if (memory_[at] != std::byte{0x5a}) return "a trial read brought wrong bytes";
    }
    return "";
  }

 private:
  int file_;
  std::byte* memory_ = nullptr;
  bool written_ = false;
  std::string refusal_;
};

EngineCandidate probe_engine(const Engine& engine) {
  EngineCandidate candidate{engine.name, false, ""};
  const Trial trial;
  if (!trial.refusal().empty()) {
    candidate.reason = trial.refusal();
    return candidate;
  }
  try {
    const std::unique_ptr<IoQueue> queue = engine.make(IoQueueOptions{});
    queue->register_memory(trial.memory());
    const IoQueueFacts facts = queue->facts();
    if (engine.transfers) candidate.reason = trial.read_through(*queue);
    candidate.usable = candidate.reason.empty();
    if (!candidate.usable) return candidate;
    const std::string features = joined(facts.kernel_features);
    candidate.reason = features.empty() ? "works" : "works, with " + features;
    candidate.reason += facts.memory_registered ? ", memory registered" : "; " + facts.memory_registered_reason;
  } catch (const Error& error) {
    candidate.reason = error.what();
  }
  TP_CHECK(!candidate.reason.empty());
  return candidate;
}

std::string file_system_name(long magic) {
  constexpr long kZfsMagic = 0x2fc12fc1;  // not in linux/magic.h
  static constexpr std::array<std::pair<long, const char*>, 12> names{{{EXT4_SUPER_MAGIC, "ext4"},
                                                                       {XFS_SUPER_MAGIC, "xfs"},
                                                                       {BTRFS_SUPER_MAGIC, "btrfs"},
                                                                       {TMPFS_MAGIC, "tmpfs"},
                                                                       {RAMFS_MAGIC, "ramfs"},
                                                                       {OVERLAYFS_SUPER_MAGIC, "overlay"},
                                                                       {NFS_SUPER_MAGIC, "nfs"},
                                                                       {SMB2_SUPER_MAGIC, "smb"},
                                                                       {V9FS_MAGIC, "9p"},
                                                                       {F2FS_SUPER_MAGIC, "f2fs"},
                                                                       {FUSE_SUPER_MAGIC, "fuse"},
                                                                       {kZfsMagic, "zfs"}}};
  for (const auto& [number, name] : names) {
    if (number == magic) return name;
  }
  std::array<char, 64> text{};
  const int length = std::snprintf(text.data(), text.size(), "0x%lx", static_cast<unsigned long>(magic));
  TP_CHECK(length > 0 && static_cast<std::size_t>(length) < text.size());
  return text.data();
}

}  // namespace

std::vector<EngineCandidate> probe_engines() {
  std::vector<EngineCandidate> candidates;
  for (const Engine& engine : kEngines) candidates.push_back(probe_engine(engine));
  TP_CHECK(candidates.size() == kEngines.size());
  return candidates;
}

DirectoryFacts probe_directory(const std::string& directory) {
  const File file = File::open_spill(directory, DirectPolicy::optional);
  struct statfs status{};
  if (fstatfs(file.descriptor(), &status) != 0) {
    throw Error(ErrorKind::io, "statfs of " + directory + ": " + describe_errno(errno), errno);
  }
  DirectoryFacts facts{directory, file_system_name(status.f_type), file.direct(), file.align_bytes(),
                       file.direct_reason()};
  if (facts.direct) facts.reason = "direct I/O, aligned to " + std::to_string(facts.align_bytes) + " bytes";
  if (status.f_type == BTRFS_SUPER_MAGIC) {
    facts.reason +=
        "; btrfs makes direct writes to files with checksums buffered (chattr +C on the directory avoids it)";
  }
  TP_CHECK(!facts.reason.empty());
  return facts;
}

std::unique_ptr<IoQueue> make_io_queue(const std::string& engine, const IoQueueOptions& options) {
  std::string known;
  std::string refused;
  for (const Engine& candidate : kEngines) {
    known += std::string(known.empty() ? "" : ", ") + candidate.name;
    if (engine == candidate.name) return candidate.make(options);
    if (engine != "auto" || !candidate.transfers) continue;
    try {
      return candidate.make(options);
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::engine) throw;
      refused += std::string("; ") + candidate.name + ": " + error.what();
    }
  }
  if (!refused.empty()) throw Error(ErrorKind::engine, "no I/O engine can run here" + refused);
  throw Error(ErrorKind::engine, "there is no engine '" + engine + "'; choose auto, or one of " + known);
}

}  // namespace tp
