// SPDX-License-Identifier: Apache-2.0
// Sweeps over a file's pages on the stand-in device, by a schedule, with a kernel a page that checks what it shows.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <string>
#include <vector>

#include "standin_fixture.hpp"

namespace tp::test {

inline constexpr std::size_t kWordsPerPage = kDevicePage / 8;
inline constexpr char kMemoryDirectory[] = "/dev/shm";

inline StandinOptions slow_device(std::uint64_t seed, std::size_t device_frames) {
  StandinOptions options;
  options.seed = seed;
  options.delay_max = std::chrono::microseconds(30);
  options.device_memory_bytes = device_frames * kDevicePage;  // a frame too many would be out of memory
  return options;
}

// A sweep over all pages of a file, one at a time, several times.
inline void sweep(StandinDevice& device, Pager& pager, const Region& region, const std::vector<SetId>& sets, int passes,
                  std::uint64_t kernel_ns = 0) {
  for (int pass = 0; pass < passes; ++pass) {
    pager.begin_pass();
    for (std::size_t page = 0; page < sets.size(); ++page) {
      pager.acquire(sets[page], {}, device.stream());
      KernelWork& work = device.new_work();
      const std::size_t word = page * kWordsPerPage + 5;
      work.checks.push_back({device_pointer(region.address + 8 * word), pattern(word, 7)});
      work.duration_ns = kernel_ns;
      device.launch(work, device.stream());
      pager.release(sets[page], device.stream());
    }
  }
  device.synchronize(device.stream());
  EXPECT_EQ(device.wrong(), 0u);
}

inline std::vector<SetId> one_set_per_page(Pager& pager, const Region& region) {
  std::vector<SetId> sets;
  for (std::size_t page = 0; page < region.pages.count; ++page)
    sets.push_back(pager.add_set({{region.address + page * kDevicePage + 40, 8}}, "page " + std::to_string(page)));
  return sets;
}

// The schedule that MIN gives for a sweep: the first pages stay, the rest pass through the last `through` frames.
struct SweepSchedule {
  SweepSchedule(const std::vector<SetId>& sets, std::size_t frames, std::size_t through) {
    const auto stay = static_cast<std::int32_t>(frames - through);
    const auto pages = static_cast<std::int32_t>(sets.size());
    const auto window = static_cast<std::int32_t>(through);
    for (const SetId set : sets) step_set.push_back(static_cast<std::int32_t>(set.value));
    for (std::int32_t page = 0; page < static_cast<std::int32_t>(frames); ++page) initial.push_back(page);
    // Page p of those that pass through takes the frame of the one `through` before it, once that was used.
    for (std::int32_t page = stay; page < pages; ++page) {
      const std::int32_t next = page + window < pages ? page + window : stay + (page + window - pages);
      const bool wraps = page + window >= pages;
      step.push_back(page + 1);
      deadline.push_back(wraps ? pages + next : next);
      page_in.push_back(next);
      evict.push_back(page);
    }
  }
  ScheduleArrays arrays() const { return {step_set, initial, step, deadline, page_in, evict}; }
  std::vector<std::int32_t> step_set, initial, step, deadline, page_in, evict;
};

inline constexpr std::uint64_t kLinkBytesPerSecond = 50'000'000'000;

// pager: null until it is made. The clock moves only while its caller waits for pages.
inline StandinOptions timed_device(std::size_t device_frames, const std::atomic<Pager*>& pager) {
  StandinOptions options;
  options.polls_step_time = true;
  options.host_waits = [&pager] {
    Pager* made = pager.load();
    if (made == nullptr) return true;
    Residency& residency = made->residency();
    const std::lock_guard lock(residency.mutex);
    return residency.waiters != nullptr || residency.closing;
  };
  options.host_to_device_bytes_per_second = kLinkBytesPerSecond;
  options.device_to_host_bytes_per_second = kLinkBytesPerSecond;
  options.device_memory_bytes = device_frames * kDevicePage;
  return options;
}

constexpr double link_ns(std::size_t pages) {
  return static_cast<double>(pages * kDevicePage) / static_cast<double>(kLinkBytesPerSecond) * 1e9;
}

}  // namespace tp::test
