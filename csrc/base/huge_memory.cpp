// SPDX-License-Identifier: Apache-2.0
#include "base/huge_memory.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.hpp"
#include "base/error.hpp"
#include "base/limits.hpp"

namespace tp {
namespace {

constexpr std::size_t kMachinePageBytes = 4 * kKiB;
constexpr unsigned kThreadsMax = 8;

std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

int populate_share(std::span<std::byte> memory) {
  while (madvise(memory.data(), memory.size(), MADV_POPULATE_WRITE) != 0) {
    if (errno == EAGAIN) continue;
    if (errno != EINVAL) return errno;
    for (std::size_t at = 0; at < memory.size(); at += kMachinePageBytes) memory[at] = std::byte{0};  // before 5.14
    return 0;
  }
  return 0;
}

}  // namespace

// Zeroing runs at memory speed per core, so every core takes a share; two are enough on small machines.
int populate(std::span<std::byte> memory) {
  const unsigned threads = std::clamp(std::thread::hardware_concurrency(), 1u, kThreadsMax);
  const std::size_t share_bytes = round_up((memory.size() + threads - 1) / threads, kPageBytesMin);
  std::atomic<int> failure{0};
  std::vector<std::thread> workers;
  for (std::size_t first = share_bytes; first < memory.size(); first += share_bytes) {
    const std::span<std::byte> share = memory.subspan(first, std::min(share_bytes, memory.size() - first));
    workers.emplace_back([share, &failure] {
      if (const int error = populate_share(share)) failure = error;
    });
  }
  if (const int error = populate_share(memory.first(std::min(share_bytes, memory.size())))) failure = error;
  for (std::thread& worker : workers) worker.join();
  return failure;
}

HugeMemory::HugeMemory(std::size_t size_bytes) {
  TP_CHECK(size_bytes > 0);
  const bool huge = size_bytes >= kPageBytesMin;
  const std::size_t unit = huge ? kPageBytesMin : kMachinePageBytes;
  const std::size_t own_bytes = round_up(size_bytes, unit);
  // One huge page more than needed, so that the memory can start at a multiple of one.
  const std::size_t mapped_bytes = own_bytes + (huge ? unit : 0);
  const std::string what = std::to_string(own_bytes) + " bytes of memory for transfers";
  const auto fail = [&what](const char* call, int error) {
    throw Error(ErrorKind::memory,
                std::string(call) + " of " + what + " failed: " + describe_errno(error) +
                    "; less memory is free than that, or a limit (cgroup, ulimit -v) is below it",
                error);
  };
  void* mapped = mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) fail("mmap", errno);
  mapping_ = {static_cast<std::byte*>(mapped), mapped_bytes};
  const std::size_t beyond = reinterpret_cast<std::uintptr_t>(mapped) % unit;
  memory_ = mapping_.subspan(beyond == 0 ? 0 : unit - beyond, own_bytes);
  if (huge) madvise(memory_.data(), own_bytes, MADV_HUGEPAGE);  // a speed-up, not a need
  int error = madvise(memory_.data(), own_bytes, MADV_DONTFORK) == 0 ? 0 : errno;
  if (error == 0) error = populate(memory_);
  if (error == 0) return;
  munmap(mapping_.data(), mapping_.size());
  fail("madvise", error);
}

HugeMemory::HugeMemory(HugeMemory&& other) noexcept { *this = std::move(other); }

HugeMemory& HugeMemory::operator=(HugeMemory&& other) noexcept {
  if (this == &other) return *this;
  if (!mapping_.empty()) munmap(mapping_.data(), mapping_.size());
  mapping_ = std::exchange(other.mapping_, {});
  memory_ = std::exchange(other.memory_, {});
  return *this;
}

HugeMemory::~HugeMemory() {
  if (!mapping_.empty()) munmap(mapping_.data(), mapping_.size());
}

}  // namespace tp
