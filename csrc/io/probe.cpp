// SPDX-License-Identifier: Apache-2.0
#include "io/probe.hpp"

#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/vfs.h>

#include <array>
#include <cerrno>
#include <functional>
#include <utility>

#include "base/error.hpp"
#include "io/file.hpp"

namespace tp {
namespace {

struct Engine {
  const char* name;
  std::unique_ptr<IoQueue> (*make)(const IoQueueOptions&);
};
// Best first. A new engine is one file and one line here. The null engine transfers nothing and is only taken by name.
constexpr Engine kEngines[] = {{"uring", make_uring_queue}, {"pread", make_pread_queue}, {"null", make_null_queue}};

std::string joined(const std::vector<std::string>& words) {
  std::string result;
  for (const std::string& word : words) result += (result.empty() ? "" : ", ") + word;
  return result;
}

// Makes the engine for real, with a little memory of its own to register.
EngineCandidate probe_engine(const Engine& engine) {
  EngineCandidate candidate{engine.name, false, ""};
  constexpr std::size_t kProbeBytes = 64 * kKiB;
  void* memory = mmap(nullptr, kProbeBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    candidate.reason = "no memory to try it with: " + describe_errno(errno);
    return candidate;
  }
  try {
    const std::unique_ptr<IoQueue> queue = engine.make(IoQueueOptions{});
    queue->register_memory({static_cast<std::byte*>(memory), kProbeBytes});
    const IoQueueFacts facts = queue->facts();
    candidate.usable = true;
    const std::string features = joined(facts.kernel_features);
    candidate.reason = features.empty() ? "works" : "works, with " + features;
    candidate.reason += facts.memory_registered ? ", memory registered" : "; memory not registered: " + facts.memory_registered_reason;
  } catch (const Error& error) {
    candidate.reason = error.what();
  }
  munmap(memory, kProbeBytes);
  return candidate;
}

std::string file_system_name(long magic) {
  static const std::pair<long, const char*> names[] = {
      {EXT4_SUPER_MAGIC, "ext4"}, {0x58465342, "xfs"},          {BTRFS_SUPER_MAGIC, "btrfs"}, {TMPFS_MAGIC, "tmpfs"},
      {RAMFS_MAGIC, "ramfs"},     {OVERLAYFS_SUPER_MAGIC, "overlay"}, {NFS_SUPER_MAGIC, "nfs"},     {V9FS_MAGIC, "9p"},
      {F2FS_SUPER_MAGIC, "f2fs"}, {FUSE_SUPER_MAGIC, "fuse"},   {0x2fc12fc1, "zfs"}};
  for (const auto& [number, name] : names) {
    if (number == magic) return name;
  }
  char text[32];
  std::snprintf(text, sizeof text, "file system 0x%lx", static_cast<unsigned long>(magic));
  return text;
}

}  // namespace

std::vector<EngineCandidate> probe_engines() {
  std::vector<EngineCandidate> candidates;
  for (const Engine& engine : kEngines) candidates.push_back(probe_engine(engine));
  candidates.back().reason += "; transfers nothing, for tests and measurements";
  return candidates;
}

DirectoryFacts probe_directory(const std::string& directory) {
  DirectoryFacts facts;
  facts.directory = directory;
  const File file = File::open_spill(directory, DirectPolicy::optional);
  struct statfs status {};
  if (fstatfs(file.descriptor(), &status) != 0) {
    throw Error(ErrorKind::io, "statfs of " + directory + ": " + describe_errno(errno), errno);
  }
  const auto magic = static_cast<long>(status.f_type);
  facts.file_system = file_system_name(magic);
  facts.direct = file.direct();
  facts.align_bytes = file.align_bytes();
  facts.reason = file.direct() ? "direct I/O, aligned to " + std::to_string(file.align_bytes()) + " bytes" : file.direct_reason();
  if (magic == TMPFS_MAGIC || magic == RAMFS_MAGIC) {
    facts.direct = false;
    facts.reason = "lies in memory: what is spilled here frees none";
  } else if (magic == BTRFS_SUPER_MAGIC) {
    facts.reason += "; btrfs turns direct writes into buffered ones for files with checksums (chattr +C on the directory avoids it)";
  }
  return facts;
}

std::unique_ptr<IoQueue> make_io_queue(const std::string& engine, const IoQueueOptions& options) {
  std::string refused, known;
  for (const Engine& candidate : kEngines) {
    known += std::string(known.empty() ? "" : ", ") + candidate.name;
    const bool automatic = engine == "auto" && candidate.make != make_null_queue;
    if (engine != candidate.name && !automatic) continue;
    try {
      return candidate.make(options);
    } catch (const Error& error) {
      if (!automatic || error.kind() != ErrorKind::engine) throw;
      refused += std::string("; ") + candidate.name + ": " + error.what();
    }
  }
  if (!refused.empty()) throw Error(ErrorKind::engine, "no I/O engine can run here" + refused);
  throw Error(ErrorKind::engine, "there is no engine '" + engine + "'; choose auto, or one of " + known);
}

}  // namespace tp
