// SPDX-License-Identifier: Apache-2.0
#include "mem/frame_pool.hpp"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>

#include "base/check.hpp"
#include "base/error.hpp"
#include "base/huge_memory.hpp"
#include "base/limits.hpp"

namespace tp {
namespace {

std::string mebibytes(std::uint64_t bytes) { return std::to_string(bytes / kMiB) + " MiB"; }

// MemAvailable of /proc/meminfo, or 0 when it can't be read.
std::uint64_t available_memory_bytes() {
  std::FILE* file = std::fopen("/proc/meminfo", "re");
  if (file == nullptr) return 0;
  char line[256];
  unsigned long long kibibytes = 0;
  while (std::fgets(line, sizeof line, file) != nullptr) {
    if (std::sscanf(line, "MemAvailable: %llu kB", &kibibytes) == 1) break;
  }
  std::fclose(file);
  return kibibytes * kKiB;
}

void refuse_more_than_the_machine_has(std::uint64_t budget_bytes) {
  const std::uint64_t available = available_memory_bytes();
  if (available == 0 || budget_bytes <= available) return;
  throw Error(ErrorKind::memory,
              "the budget of " + mebibytes(budget_bytes) + " is more than the " + mebibytes(available) +
                  " of memory this machine has available; the budget is allocated at once, so give a smaller one",
              ENOMEM);
}

void prefer_numa_node(void* memory, std::size_t bytes, int node) {
  constexpr int kPreferred = 1;  // MPOL_PREFERRED of <numaif.h>, which is libnuma's
  if (node < 0 || node >= 64) return;
  const unsigned long mask = 1ul << node;
  syscall(SYS_mbind, memory, bytes, kPreferred, &mask, sizeof mask * 8, 0u);
}

}  // namespace

int protection_flags(SlotAccess access) noexcept {
  switch (access) {
    case SlotAccess::none: return PROT_NONE;
    case SlotAccess::read: return PROT_READ;
    case SlotAccess::read_write: return PROT_READ | PROT_WRITE;
  }
  return PROT_NONE;
}

FramePool::FramePool(std::uint64_t budget_bytes, std::size_t page_bytes, std::size_t slack_bytes, int numa_node)
    : page_bytes_(page_bytes), frame_bytes_(page_bytes + slack_bytes), frame_count_(budget_bytes / frame_bytes_) {
  TP_CHECK(slack_bytes % (4 * kKiB) == 0);
  TP_CHECK(std::has_single_bit(page_bytes) && page_bytes >= kPageBytesMin && page_bytes <= kPageBytesMax);
  if (frame_count_ < kFramesMin) {
    throw Error(ErrorKind::budget, "the budget of " + mebibytes(budget_bytes) + " holds " +
                                       std::to_string(frame_count_) + " frames of " + mebibytes(frame_bytes_) +
                                       "; at least " + std::to_string(kFramesMin) + " are needed (" +
                                       mebibytes(kFramesMin * frame_bytes_) + ")");
  }
  refuse_more_than_the_machine_has(frame_count_ * frame_bytes_);

  // One page more than needed, so that the first frame can start at a multiple of the page size.
  reservation_bytes_ = frame_count_ * frame_bytes_ + page_bytes_;
  void* memory =
      mmap(nullptr, reservation_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    throw Error(ErrorKind::memory,
                "could not map " + mebibytes(reservation_bytes_) + " of frames: " + describe_errno(errno), errno);
  }
  reservation_ = static_cast<std::byte*>(memory);
  const auto address = reinterpret_cast<std::uintptr_t>(reservation_);
  base_ = reservation_ + (page_bytes_ - address % page_bytes_) % page_bytes_;
  try {
    populate(numa_node);
  } catch (...) {
    munmap(reservation_, reservation_bytes_);
    throw;
  }
  access_.assign(frame_count_, SlotAccess::read_write);
  taken_.assign(frame_count_, false);
  free_.reserve(frame_count_);
  // Taken from the back: lowest slots first, so that consecutive pages land in consecutive frames.
  for (std::size_t i = frame_count_; i-- > 0;) free_.push_back(FrameId{static_cast<std::uint32_t>(i)});
}

FramePool::~FramePool() { munmap(reservation_, reservation_bytes_); }

void FramePool::populate(int numa_node) {
  const std::size_t bytes = frame_count_ * frame_bytes_;
  // Huge pages are a speed-up, not a need: a kernel without them (EINVAL) gives 4 KiB pages. A child of fork() must not
  // share frames: copy-on-write during direct I/O would split parent and child (open(2), NOTES).
  madvise(base_, bytes, MADV_HUGEPAGE);
  if (madvise(base_, bytes, MADV_DONTFORK) != 0) {
    throw Error(ErrorKind::memory, "MADV_DONTFORK on the frames failed: " + describe_errno(errno), errno);
  }
  prefer_numa_node(base_, bytes, numa_node);
  const int failure = tp::populate(memory());
  if (failure != 0) {
    throw Error(ErrorKind::memory,
                "could not populate " + mebibytes(bytes) + " of frames: " + describe_errno(failure) +
                    "; a memory limit (cgroup, ulimit -v) may be below the budget",
                failure);
  }
}

std::byte* FramePool::slot(FrameId frame) const {
  TP_CHECK(frame.value < frame_count_);
  return base_ + static_cast<std::size_t>(frame.value) * frame_bytes_;
}

FrameId FramePool::take() {
  TP_CHECK(!free_.empty());
  const FrameId frame = free_.back();
  free_.pop_back();
  TP_CHECK(!taken_[frame.value]);
  taken_[frame.value] = true;
  const std::uint64_t in_use = frames_in_use_.fetch_add(1) + 1;
  TP_CHECK(in_use <= frame_count_);
  if (in_use > frames_in_use_max_) frames_in_use_max_ = in_use;
  return frame;
}

void FramePool::put(FrameId frame) {
  TP_CHECK(frame.value < frame_count_ && taken_[frame.value]);
  taken_[frame.value] = false;
  frames_in_use_.fetch_sub(1);
  free_.push_back(frame);
}

SlotAccess FramePool::access(FrameId frame) const {
  TP_CHECK(frame.value < frame_count_);
  return access_[frame.value];
}

void FramePool::set_access(FrameId frame, SlotAccess access) {
  if (this->access(frame) == access) return;
  if (mprotect(slot(frame), frame_bytes_, protection_flags(access)) != 0) {
    throw Error(ErrorKind::memory,
                "mprotect of frame " + std::to_string(frame.value) + " failed: " + describe_errno(errno), errno);
  }
  access_[frame.value] = access;
}

void FramePool::note_access(FrameId frame, SlotAccess access) {
  TP_CHECK(frame.value < frame_count_);
  access_[frame.value] = access;
}

}  // namespace tp
