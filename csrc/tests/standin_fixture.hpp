// SPDX-License-Identifier: Apache-2.0
// A pager on the stand-in device, and kernels that look at its memory late, as a device would.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "pager/pager.hpp"
#include "sim/standin_driver.hpp"
#include "test_files.hpp"

namespace tp::test {

inline constexpr std::size_t kDevicePage = kPageBytesMin;

struct WordCheck {
  cuda::DevicePtr address;
  std::uint64_t expected;
};
struct WordWrite {
  cuda::DevicePtr address;
  std::uint64_t value;
};

// What one launch is to look at and to write, and what it found. Lives until the device is through.
struct KernelWork {
  std::vector<WordCheck> checks;
  std::vector<WordWrite> writes;
  std::atomic<std::uint64_t>* wrong = nullptr;
  std::uint64_t duration_ns = 0;
};

inline void run_kernel_work(StandinLaunch& launch) {
  const auto* work = launch.parameter<const KernelWork*>(0);
  for (const WordCheck& check : work->checks) {
    std::uint64_t value = 0;
    if (!launch.read(check.address, &value, sizeof value)) return;
    if (value != check.expected) ++*work->wrong;
  }
  for (const WordWrite& write : work->writes) {
    if (!launch.write(write.address, &write.value, sizeof write.value)) return;
  }
}

// The stand-in, reset for one test, with a compute stream.
class StandinDevice {
 public:
  explicit StandinDevice(const StandinOptions& options) : standin_(*tensorpager_standin_driver()) {
    standin_.reset(options);
    standin_.add_kernel({"work", {sizeof(const KernelWork*)}, run_kernel_work, [](const StandinLaunch& launch) {
                           return launch.parameter<const KernelWork*>(0)->duration_ns;
                         }});
    device_ = std::make_unique<CudaDevice>(driver(), 0);
    const CudaDevice::Current current(*device_);
    stream_ = device_->make_stream();
    driver().cuModuleLoadData(&module_, static_cast<const void*>(kStandinImage));
    driver().cuModuleGetFunction(&function_, module_, "work");
  }
  ~StandinDevice() {
    close();
    standin_.reset();  // ends the threads of its streams
  }

  static const CudaDriver& driver() { return CudaDriver::load(TENSORPAGER_STANDIN_DRIVER); }
  StandinDriver& standin() { return standin_; }
  cuda::Stream stream() const { return stream_; }
  cuda::Stream make_stream() const { return device_->make_stream(); }

  KernelWork& new_work() {
    KernelWork& work = work_.emplace_back();
    work.wrong = &wrong_;
    return work;
  }
  void launch(const KernelWork& work, cuda::Stream stream) {
    const CudaDevice::Current current(*device_);
    const KernelWork* parameter = &work;
    void* parameters[] = {&parameter};
    driver().cuLaunchKernel(function_, 1u, 1u, 1u, 1u, 1u, 1u, 0u, stream, parameters, static_cast<void**>(nullptr));
  }
  // A graph of what `ask` asks of the stream. Lives as long as the device.
  cuda::GraphExec capture(const std::function<void()>& ask) {
    const CudaDevice::Current current(*device_);
    cuda::Graph graph = nullptr;
    cuda::GraphExec exec = nullptr;
    driver().cuStreamBeginCapture(stream_, cuda::kStreamCaptureModeThreadLocal);
    ask();
    driver().cuStreamEndCapture(stream_, &graph);
    driver().cuGraphInstantiateWithFlags(&exec, graph, 0ull);
    driver().cuGraphDestroy(graph);
    return graphs_.emplace_back(exec);
  }
  void launch(cuda::GraphExec graph) {
    const CudaDevice::Current current(*device_);
    driver().cuGraphLaunch(graph, stream_);
  }
  void synchronize(cuda::Stream stream) {
    const CudaDevice::Current current(*device_);
    driver().cuStreamSynchronize(stream);
  }
  std::uint64_t wrong() const { return wrong_.load(); }
  // Gives back all of its own; what is alive then is somebody else's.
  void close() {
    if (device_ == nullptr) return;
    auto current = std::make_unique<CudaDevice::Current>(*device_);
    driver().cuStreamSynchronize.result(stream_);
    for (const cuda::GraphExec graph : graphs_) driver().cuGraphExecDestroy.result(graph);
    driver().cuStreamDestroy.result(stream_);
    driver().cuModuleUnload.result(module_);
    current.reset();
    device_.reset();
  }

 private:
  StandinDriver& standin_;
  std::unique_ptr<CudaDevice> device_;
  cuda::Stream stream_ = nullptr;
  cuda::Module module_ = nullptr;
  cuda::Function function_ = nullptr;
  std::vector<cuda::GraphExec> graphs_;
  std::deque<KernelWork> work_;
  std::atomic<std::uint64_t> wrong_{0};
};

// transport: cufile is the stand-in's, too.
inline PagerOptions device_options(std::size_t device_frames, std::size_t host_frames,
                                   Transport transport = Transport::host_tier) {
  PagerOptions options;
  options.budget_bytes = device_frames * kDevicePage;
  options.page_bytes = kDevicePage;
  options.engine = "pread";
  options.spill_directory = "/dev/shm";
  options.event_capacity = 1 << 18;
  options.device = DeviceOptions{&StandinDevice::driver(),  0, host_frames * (kDevicePage + 4 * kKiB), true, transport,
                                 TENSORPAGER_STANDIN_CUFILE};
  return options;
}

inline cuda::DevicePtr device_pointer(const std::byte* address) { return reinterpret_cast<cuda::DevicePtr>(address); }

}  // namespace tp::test
