// SPDX-License-Identifier: Apache-2.0
// A run of steps on the stand-in device, whose kernels are captured: in pieces, or as one graph.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "device_sweep.hpp"
#include "standin_fixture.hpp"

namespace tp::test {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr std::uint64_t kRunSeeds = 4;
#else
inline constexpr std::uint64_t kRunSeeds = 12;
#endif
inline constexpr std::size_t kRunPages = 12, kRunFrames = 6, kRunHostFrames = 8, kRunPagesAStep = 2;
inline constexpr std::size_t kRunSteps = kRunPages / kRunPagesAStep;
inline constexpr int kRunReplays = 3;

inline StandinOptions slow_run_device(std::uint64_t seed, std::size_t channels) {
  StandinOptions options = slow_device(seed, kRunFrames);
  options.channels = channels;
  return options;
}

// A file of pages that steps use two by two, each with a kernel that looks at both.
class CapturedRun {
 public:
  explicit CapturedRun(const StandinOptions& options)
      : device_(options),
        file_(kRunPages * kDevicePage, 7, kMemoryDirectory),
        pager_(device_options(kRunFrames, kRunHostFrames)) {
    region_ = pager_.map_file(file_.path());
    for (std::size_t step = 0; step < kRunSteps; ++step) {
      sets_.push_back(pager_.add_set({{page(step * kRunPagesAStep), kRunPagesAStep * kDevicePage}}, "step"));
      KernelWork& work = device_.new_work();
      for (std::size_t each = 0; each < kRunPagesAStep; ++each) {
        const std::size_t word = (step * kRunPagesAStep + each) * kWordsPerPage + 5;
        work.checks.push_back({device_pointer(region_.address + 8 * word), pattern(word, 7)});
      }
      works_.push_back(&work);
    }
  }
  static const CudaDriver& driver() { return StandinDevice::driver(); }
  StandinDevice& device() { return device_; }
  std::string path() const { return file_.path(); }
  Pager& pager() { return pager_; }
  SetId set(std::size_t step) const { return sets_[step]; }
  std::size_t step_count() const { return step_count_; }
  void use_first_steps(std::size_t count) { step_count_ = count; }
  cuda::Stream stream() const { return device_.stream(); }
  void follow_schedule() {
    const std::vector<std::int32_t> steps = [this] {
      std::vector<std::int32_t> result;
      for (const SetId set : sets_) result.push_back(static_cast<std::int32_t>(set.value));
      return result;
    }();
    std::vector<std::int32_t> initial, step, deadline, page_in, evict;
    for (std::int32_t page = 0; page < static_cast<std::int32_t>(kRunFrames); ++page) initial.push_back(page);
    for (std::int32_t page = 0; page < static_cast<std::int32_t>(kRunPages); ++page) {
      step.push_back(page / 2 + 1);
      deadline.push_back(page / 2 + static_cast<std::int32_t>(kRunFrames) / 2);
      page_in.push_back((page + static_cast<std::int32_t>(kRunFrames)) % static_cast<std::int32_t>(kRunPages));
      evict.push_back(page);
    }
    pager_.set_schedule({steps, initial, step, deadline, page_in, evict});
  }
  cuda::GraphExec capture(const std::function<void()>& ask) { return device_.capture(ask); }
  cuda::GraphExec capture_step(std::size_t step) {
    return capture([&] { device_.launch(*works_[step], stream()); });
  }
  void launch(cuda::GraphExec graph) { device_.launch(graph); }
  void launch_kernel(std::size_t step) { device_.launch(*works_[step], stream()); }
  void synchronize() { device_.synchronize(stream()); }
  bool is_right() {
    return device_.wrong() == 0 && device_.standin().context_error() == cuda::kSuccess &&
           device_.standin().violations().empty();
  }

 private:
  std::byte* page(std::size_t number) const { return region_.address + number * kDevicePage; }

  StandinDevice device_;
  const PatternFile file_;
  Pager pager_;
  Region region_;
  std::vector<SetId> sets_;
  std::size_t step_count_ = kRunSteps;
  std::vector<KernelWork*> works_;
};

}  // namespace tp::test
