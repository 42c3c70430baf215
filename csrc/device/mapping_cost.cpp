// SPDX-License-Identifier: Apache-2.0
#include "device/mapping_cost.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <chrono>

#include "base/check.hpp"
#include "base/limits.hpp"

namespace tp {
namespace {

constexpr int kRounds = 7;
constexpr std::size_t kLinkBytes = 8 * kMiB;

using Clock = std::chrono::steady_clock;

double elapsed_ns(Clock::time_point begin) {
  return std::chrono::duration<double, std::nano>(Clock::now() - begin).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Undoes each step that was done, whatever comes after.
class ScratchMapping {
 public:
  ScratchMapping(const CudaDevice& device, std::size_t size_bytes) : driver_(device.driver()), size_bytes_(size_bytes) {
    const cuda::MemAllocationProp prop = device.allocation_prop();
    driver_.cuMemAddressReserve(&address_, size_bytes, size_bytes, cuda::DevicePtr{0}, 0ull);
    const cuda::Result result = driver_.cuMemCreate.result(&handle_, size_bytes, &prop, 0ull);
    if (result == cuda::kSuccess) return;
    driver_.cuMemAddressFree.result(address_, size_bytes_);
    throw driver_.error("cuMemCreate", result);
  }
  ~ScratchMapping() {
    if (mapped_) driver_.cuMemUnmap.result(address_, size_bytes_);
    driver_.cuMemRelease.result(handle_);
    driver_.cuMemAddressFree.result(address_, size_bytes_);
  }
  ScratchMapping(const ScratchMapping&) = delete;
  ScratchMapping& operator=(const ScratchMapping&) = delete;

  void map(const cuda::MemAccessDesc& access) {
    driver_.cuMemMap(address_, size_bytes_, std::size_t{0}, handle_, 0ull);
    mapped_ = true;
    driver_.cuMemSetAccess(address_, size_bytes_, &access, std::size_t{1});
  }
  void unmap() {
    driver_.cuMemUnmap(address_, size_bytes_);
    mapped_ = false;
  }
  cuda::DevicePtr address() const noexcept { return address_; }

 private:
  const CudaDriver& driver_;
  std::size_t size_bytes_;
  cuda::DevicePtr address_ = 0;
  cuda::AllocationHandle handle_ = 0;
  bool mapped_ = false;
};

class ScratchHostMemory {
 public:
  ScratchHostMemory(const CudaDriver& driver, std::size_t size_bytes) : driver_(driver), size_bytes_(size_bytes) {
    memory_ = mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory_ == MAP_FAILED)
      throw Error(ErrorKind::memory, "no memory to measure the link with: " + describe_errno(errno), errno);
    const cuda::Result result = driver_.cuMemHostRegister.result(memory_, size_bytes, cuda::kHostRegisterPortable);
    if (result == cuda::kSuccess) return;
    munmap(memory_, size_bytes_);
    throw driver_.error("cuMemHostRegister", result);
  }
  ~ScratchHostMemory() {
    driver_.cuMemHostUnregister.result(memory_);
    munmap(memory_, size_bytes_);
  }
  ScratchHostMemory(const ScratchHostMemory&) = delete;
  ScratchHostMemory& operator=(const ScratchHostMemory&) = delete;
  const void* memory() const noexcept { return memory_; }

 private:
  const CudaDriver& driver_;
  std::size_t size_bytes_;
  void* memory_ = nullptr;
};

class ScratchStream {
 public:
  explicit ScratchStream(const CudaDevice& device) : driver_(device.driver()), stream_(device.make_stream()) {}
  ~ScratchStream() { driver_.cuStreamDestroy.result(stream_); }
  ScratchStream(const ScratchStream&) = delete;
  ScratchStream& operator=(const ScratchStream&) = delete;
  cuda::Stream get() const noexcept { return stream_; }

 private:
  const CudaDriver& driver_;
  cuda::Stream stream_;
};

}  // namespace

std::vector<MappingCost> measure_mapping_cost(const CudaDevice& device, std::size_t page_bytes_max) {
  const CudaDevice::Current current(device);
  const cuda::MemAccessDesc access = device.read_write_access();
  std::vector<MappingCost> costs;
  std::size_t page_bytes = std::max(kPageBytesMin, device.facts().granularity_bytes);
  for (; page_bytes <= page_bytes_max; page_bytes *= 2) {
    ScratchMapping mapping(device, page_bytes);
    std::vector<double> map_ns, unmap_ns;
    for (int round = 0; round < kRounds; ++round) {
      const Clock::time_point begin = Clock::now();
      mapping.map(access);
      map_ns.push_back(elapsed_ns(begin));
      const Clock::time_point middle = Clock::now();
      mapping.unmap();
      unmap_ns.push_back(elapsed_ns(middle));
    }
    costs.push_back({page_bytes, median(map_ns), median(unmap_ns)});
  }
  return costs;
}

double measure_link_bandwidth(const CudaDevice& device) {
  const CudaDevice::Current current(device);
  const CudaDriver& driver = device.driver();
  ScratchMapping mapping(device, std::max(kLinkBytes, device.facts().granularity_bytes));
  mapping.map(device.read_write_access());
  const ScratchHostMemory host(driver, kLinkBytes);
  const ScratchStream stream(device);
  std::vector<double> copy_ns;
  for (int round = 0; round < kRounds; ++round) {
    const Clock::time_point begin = Clock::now();
    driver.cuMemcpyHtoDAsync(mapping.address(), host.memory(), kLinkBytes, stream.get());
    driver.cuStreamSynchronize(stream.get());
    copy_ns.push_back(elapsed_ns(begin));
  }
  return static_cast<double>(kLinkBytes) / (median(copy_ns) * 1e-9);
}

std::size_t choose_page_bytes(const std::vector<MappingCost>& costs, double link_bytes_per_second) {
  TP_CHECK(!costs.empty() && link_bytes_per_second > 0);
  for (const MappingCost& cost : costs) {
    const double copy_ns = static_cast<double>(cost.page_bytes) / link_bytes_per_second * 1e9;
    if (cost.map_ns + cost.unmap_ns <= kMappingShareMax * copy_ns) return cost.page_bytes;
  }
  return costs.back().page_bytes;
}

}  // namespace tp
