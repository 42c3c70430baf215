// SPDX-License-Identifier: Apache-2.0
// The stand-in driver as its own tests use it: call by call.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <vector>

#include "device/driver.hpp"
#include "sim/standin_driver.hpp"

namespace tp::test {

inline constexpr std::size_t kFrame = StandinDriver::kGranularityBytes;
inline constexpr std::uint64_t kGigabyte = 1'000'000'000;  // a second's worth at the rates below is a nanosecond a byte
inline constexpr int kSeeds = 30;

inline StandinDriver& standin() { return *tensorpager_standin_driver(); }
inline const CudaDriver& cuda_driver() { return CudaDriver::load(TENSORPAGER_STANDIN_DRIVER); }

class StandinDriverTest : public testing::Test {
 protected:
  void SetUp() override { begin({}); }
  void TearDown() override { standin().reset(); }

  void begin(const StandinOptions& options) {
    standin().reset(options);
    cuda::Context context = nullptr;
    driver.cuDevicePrimaryCtxRetain(&context, 0);
    driver.cuCtxSetCurrent(context);
  }
  cuda::Stream stream(unsigned flags = cuda::kStreamNonBlocking) {
    cuda::Stream made = nullptr;
    driver.cuStreamCreateWithPriority(&made, flags, 0);
    return made;
  }
  cuda::Event event(unsigned flags = 0) {
    cuda::Event made = nullptr;
    driver.cuEventCreate(&made, flags);
    return made;
  }
  cuda::AllocationHandle handle(std::size_t size_bytes = kFrame) {
    cuda::AllocationHandle made = 0;
    const cuda::MemAllocationProp prop;
    driver.cuMemCreate(&made, size_bytes, &prop, 0ull);
    return made;
  }
  cuda::DevicePtr reserve(std::size_t size_bytes) {
    cuda::DevicePtr address = 0;
    driver.cuMemAddressReserve(&address, size_bytes, std::size_t{0}, cuda::DevicePtr{0}, 0ull);
    return address;
  }
  void map(cuda::DevicePtr address, cuda::AllocationHandle allocation) {
    driver.cuMemMap(address, kFrame, std::size_t{0}, allocation, 0ull);
    const cuda::MemAccessDesc access;
    driver.cuMemSetAccess(address, kFrame, &access, std::size_t{1});
  }
  cuda::DevicePtr frame() {
    const cuda::DevicePtr address = reserve(kFrame);
    map(address, handle());
    return address;
  }
  std::vector<std::byte> bytes(std::byte value, std::size_t size_bytes = kFrame) {
    return std::vector<std::byte>(size_bytes, value);
  }
  void add(std::vector<std::byte>& memory) { driver.cuMemHostRegister(memory.data(), memory.size(), 0u); }
  cuda::Function kernel(const char* name) {
    cuda::Module module = nullptr;
    cuda::Function function = nullptr;
    driver.cuModuleLoadData(&module, kStandinImage);
    driver.cuModuleGetFunction(&function, module, name);
    return function;
  }
  void launch(cuda::Function function, cuda::Stream on, std::vector<void*> parameters) {
    driver.cuLaunchKernel(function, 1u, 1u, 1u, 1u, 1u, 1u, 0u, on, parameters.data(), nullptr);
  }

  const CudaDriver& driver = cuda_driver();
};

// Writes that the thread sanitizer does not see, for programs that race on purpose.
__attribute__((no_sanitize("thread"))) inline void overwrite_unseen(std::vector<std::byte>& memory, std::byte value) {
  volatile std::byte* to = memory.data();
  const std::size_t size_bytes = memory.size();
  for (std::size_t at = 0; at < size_bytes; ++at) to[at] = value;
}

__attribute__((no_sanitize("thread"))) inline bool all_are_unseen(const std::vector<std::byte>& memory,
                                                                  std::byte value) {
  const volatile std::byte* from = memory.data();
  const std::size_t size_bytes = memory.size();
  for (std::size_t at = 0; at < size_bytes; ++at) {
    if (from[at] != value) return false;
  }
  return true;
}

inline constexpr std::byte kOne{1}, kTwo{2};

// Holds a stream back until it is let go.
struct Gate {
  explicit Gate(const CudaDriver& loaded) : driver(loaded) {
    driver.cuMemHostRegister(&value, sizeof value, 0u);
    driver.cuMemHostGetDevicePointer(&address, &value, 0u);
  }
  void hold(cuda::Stream stream, std::uint32_t until = 1) { driver.cuStreamWaitValue32(stream, address, until, 0u); }
  void open(std::uint32_t to = 1) { std::atomic_ref(value).store(to, std::memory_order_release); }

  const CudaDriver& driver;
  alignas(4) std::uint32_t value = 0;
  cuda::DevicePtr address = 0;
};

// Canaries. Each program is told whether to do what it should.
class StandinCanary : public StandinDriverTest {
 protected:
  // In how many seeds the program is caught: it says so, or the context is lost.
  int caught(const std::function<bool(bool waits)>& program, bool waits) {
    int seeds = 0;
    for (int seed = 1; seed <= kSeeds; ++seed) {
      begin({.seed = static_cast<std::uint64_t>(seed),
             .delay_max = std::chrono::microseconds(300),
             .hides_races = !waits});
      const bool is_wrong = program(waits);
      seeds += is_wrong || standin().context_error() != cuda::kSuccess || !standin().violations().empty();
    }
    standin().reset();
    return seeds;
  }
  void expect_caught(const std::function<bool(bool waits)>& program) {
    EXPECT_EQ(caught(program, true), 0);
    EXPECT_GT(caught(program, false), 0);
  }
  static constexpr std::size_t kSmall = 64 * 1024;
};

}  // namespace tp::test
