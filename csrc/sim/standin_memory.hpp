// SPDX-License-Identifier: Apache-2.0
// Memory of the stand-in driver: reservations, allocations, what is mapped where, and registered host memory.
//
// Allocations are ranges of one memory file. Each is mapped twice: where the test maps it, and, from its creation on,
// at a place of its own through which operations reach it. So an operation that has looked an address up may go on
// after it was unmapped, as a device's would, and meets the memory that was there.
//
// Threads: none; the driver's lock is around each call. The pieces that find() gives stay usable without it. Errors:
// the CUresult that the entry point of the same name is to return.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "device/cuda_abi.hpp"

namespace tp {

// A range of the memory file, with its own mapping. Gone with the last mapping or operation that holds it.
struct StandinAllocation {
  StandinAllocation(int file, std::size_t file_offset_bytes, std::size_t size_bytes);
  StandinAllocation(const StandinAllocation&) = delete;
  StandinAllocation& operator=(const StandinAllocation&) = delete;
  ~StandinAllocation();

  const int file;
  const std::size_t file_offset_bytes;
  const std::size_t size_bytes;
  std::byte* memory = nullptr;  // null: there was none
};

struct StandinPiece {
  std::shared_ptr<StandinAllocation> allocation;  // null: host memory
  std::byte* memory = nullptr;
  std::size_t size_bytes = 0;
};

enum class StandinHostMemory : std::uint8_t { registered, unregistered, partly_registered };

class StandinMemory {
 public:
  StandinMemory(std::size_t device_bytes, int device_count);
  StandinMemory(const StandinMemory&) = delete;
  StandinMemory& operator=(const StandinMemory&) = delete;
  ~StandinMemory();

  cuda::Result info(int device, std::size_t* free_bytes, std::size_t* total_bytes) const;
  cuda::Result reserve(cuda::DevicePtr* address, std::size_t size_bytes, std::size_t alignment_bytes);
  cuda::Result free_reservation(cuda::DevicePtr address, std::size_t size_bytes);
  cuda::Result create(cuda::AllocationHandle* handle, std::size_t size_bytes, int device);
  cuda::Result release(cuda::AllocationHandle handle);
  cuda::Result map(cuda::DevicePtr address, std::size_t size_bytes, cuda::AllocationHandle handle);
  cuda::Result unmap(cuda::DevicePtr address, std::size_t size_bytes);
  cuda::Result set_access(cuda::DevicePtr address, std::size_t size_bytes, int flags);
  cuda::Result allocate(cuda::DevicePtr* address, std::size_t size_bytes, int device);
  cuda::Result free_allocation(cuda::DevicePtr address);

  cuda::Result register_host(void* memory, std::size_t size_bytes);
  cuda::Result unregister_host(void* memory);
  StandinHostMemory host_memory(const void* memory, std::size_t size_bytes) const;

  // The memory behind a range, in order of addresses; false when any of it may not be touched.
  bool find(cuda::DevicePtr address, std::size_t size_bytes, bool writes, std::vector<StandinPiece>& pieces) const;

  std::size_t handles() const { return handles_.size(); }
  std::size_t mappings() const { return mappings_.size() - allocations_; }
  std::size_t reservations() const { return reservations_.size() - allocations_; }
  std::size_t allocations() const { return allocations_; }
  std::size_t registrations() const { return registrations_.size(); }

 private:
  struct Mapping {
    std::size_t size_bytes = 0;
    std::shared_ptr<StandinAllocation> allocation;
    int access = 0;
  };
  struct Reservation {
    std::size_t size_bytes = 0;
    bool is_allocation = false;  // made by cuMemAlloc
  };
  using Mappings = std::map<cuda::DevicePtr, Mapping>;

  const Reservation* reservation_around(cuda::DevicePtr address, std::size_t size_bytes) const;
  // First and behind the last of the mappings that together are the range; both end() when there are none such.
  std::pair<Mappings::iterator, Mappings::iterator> whole_mappings(cuda::DevicePtr address, std::size_t size_bytes);
  std::shared_ptr<StandinAllocation> new_allocation(std::size_t size_bytes, int device);

  const std::size_t device_bytes_;
  int file_ = -1;
  std::size_t file_bytes_ = 0;
  std::shared_ptr<std::vector<std::size_t>> used_bytes_;  // by device; outlived by allocations that operations hold
  cuda::AllocationHandle next_handle_ = 1;
  std::map<cuda::AllocationHandle, std::shared_ptr<StandinAllocation>> handles_;
  std::map<cuda::DevicePtr, Reservation> reservations_;
  Mappings mappings_;
  std::size_t allocations_ = 0;
  std::map<const std::byte*, std::size_t> registrations_;
};

}  // namespace tp
