// SPDX-License-Identifier: Apache-2.0
#include "sim/standin_memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <limits>
#include <utility>

#include "base/check.hpp"
#include "sim/standin_driver.hpp"

namespace tp {
namespace {

using cuda::DevicePtr;
using cuda::Result;

constexpr std::size_t kGranularity = StandinDriver::kGranularityBytes;
constexpr std::size_t kBasePageBytes = 4096;
constexpr Result kErrorHostMemoryAlreadyRegistered = 712;
constexpr Result kErrorHostMemoryNotRegistered = 713;

std::byte* pointer(DevicePtr address) { return reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(address)); }

DevicePtr address_of(const void* memory) { return static_cast<DevicePtr>(reinterpret_cast<std::uintptr_t>(memory)); }

std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Addresses without memory; null when there are none left.
std::byte* reserve_addresses(std::size_t size_bytes, std::size_t alignment_bytes) {
  const std::size_t asked_bytes = size_bytes + alignment_bytes;
  void* place = mmap(nullptr, asked_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (place == MAP_FAILED) return nullptr;
  auto* begin = static_cast<std::byte*>(place);
  std::byte* aligned = pointer(round_up(address_of(begin), alignment_bytes));
  if (aligned != begin) munmap(begin, static_cast<std::size_t>(aligned - begin));
  std::byte* end = aligned + size_bytes;
  if (end != begin + asked_bytes) munmap(end, static_cast<std::size_t>(begin + asked_bytes - end));
  return aligned;
}

bool empty_addresses(DevicePtr address, std::size_t size_bytes) {
  return mmap(pointer(address), size_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
              0) != MAP_FAILED;
}

}  // namespace

StandinAllocation::StandinAllocation(int memory_file, std::size_t offset_bytes, std::size_t bytes)
    : file(memory_file), file_offset_bytes(offset_bytes), size_bytes(bytes) {
  void* place = mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, static_cast<off_t>(offset_bytes));
  if (place == MAP_FAILED) return;
  memory = static_cast<std::byte*>(place);
  std::memset(memory, static_cast<int>(StandinDriver::kPoison), size_bytes);
}

StandinAllocation::~StandinAllocation() {
  if (memory == nullptr) return;
  munmap(memory, size_bytes);
  // The file only grows; what is behind it goes back.
  TP_CHECK(fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(file_offset_bytes),
                     static_cast<off_t>(size_bytes)) == 0);
}

StandinMemory::StandinMemory(std::size_t device_bytes, int device_count)
    : device_bytes_(device_bytes),
      file_(memfd_create("tensorpager-standin-device", MFD_CLOEXEC)),
      used_bytes_(std::make_shared<std::vector<std::size_t>>(static_cast<std::size_t>(device_count))) {
  TP_CHECK(file_ >= 0);
}

StandinMemory::~StandinMemory() {
  handles_.clear();
  mappings_.clear();
  for (const auto& [address, reservation] : reservations_) munmap(pointer(address), reservation.size_bytes);
  close(file_);
}

Result StandinMemory::info(int device, std::size_t* free_bytes, std::size_t* total_bytes) const {
  *total_bytes = device_bytes_;
  *free_bytes = device_bytes_ - (*used_bytes_)[static_cast<std::size_t>(device)];
  return cuda::kSuccess;
}

Result StandinMemory::reserve(DevicePtr* address, std::size_t size_bytes, std::size_t alignment_bytes) {
  if (size_bytes == 0 || size_bytes % kGranularity != 0) return cuda::kErrorInvalidValue;
  if ((alignment_bytes & (alignment_bytes - 1)) != 0) return cuda::kErrorInvalidValue;
  if (size_bytes > std::numeric_limits<std::size_t>::max() / 4) return cuda::kErrorOutOfMemory;
  std::byte* place = reserve_addresses(size_bytes, std::max(alignment_bytes, kGranularity));
  if (place == nullptr) return cuda::kErrorOutOfMemory;
  *address = address_of(place);
  reservations_[*address] = {size_bytes, false};
  return cuda::kSuccess;
}

Result StandinMemory::free_reservation(DevicePtr address, std::size_t size_bytes) {
  const auto found = reservations_.find(address);
  if (found == reservations_.end() || found->second.size_bytes != size_bytes || found->second.is_allocation)
    return cuda::kErrorInvalidValue;
  const auto mapped = mappings_.lower_bound(address);
  if (mapped != mappings_.end() && mapped->first < address + size_bytes) return cuda::kErrorInvalidValue;
  munmap(pointer(address), size_bytes);
  reservations_.erase(found);
  return cuda::kSuccess;
}

std::shared_ptr<StandinAllocation> StandinMemory::new_allocation(std::size_t size_bytes, int device) {
  std::size_t& used_bytes = (*used_bytes_)[static_cast<std::size_t>(device)];
  if (size_bytes > device_bytes_ - used_bytes) return nullptr;
  const std::size_t file_bytes = round_up(size_bytes, kBasePageBytes);
  if (ftruncate(file_, static_cast<off_t>(file_bytes_ + file_bytes)) != 0) return nullptr;
  auto made = std::make_unique<StandinAllocation>(file_, file_bytes_, file_bytes);
  if (made->memory == nullptr) return nullptr;
  file_bytes_ += file_bytes;
  used_bytes += size_bytes;
  return {made.release(), [used = used_bytes_, device, size_bytes](StandinAllocation* allocation) {
            (*used)[static_cast<std::size_t>(device)] -= size_bytes;
            delete allocation;
          }};
}

Result StandinMemory::create(cuda::AllocationHandle* handle, std::size_t size_bytes, int device) {
  if (size_bytes == 0 || size_bytes % kGranularity != 0) return cuda::kErrorInvalidValue;
  std::shared_ptr<StandinAllocation> allocation = new_allocation(size_bytes, device);
  if (allocation == nullptr) return cuda::kErrorOutOfMemory;
  *handle = next_handle_++;
  handles_[*handle] = std::move(allocation);
  return cuda::kSuccess;
}

Result StandinMemory::release(cuda::AllocationHandle handle) {
  return handles_.erase(handle) != 0 ? cuda::kSuccess : cuda::kErrorInvalidValue;
}

const StandinMemory::Reservation* StandinMemory::reservation_around(DevicePtr address, std::size_t size_bytes) const {
  auto next = reservations_.upper_bound(address);
  if (next == reservations_.begin()) return nullptr;
  const auto& [begin, reservation] = *std::prev(next);
  const std::size_t inside_bytes = address - begin;
  if (inside_bytes >= reservation.size_bytes || size_bytes > reservation.size_bytes - inside_bytes) return nullptr;
  return &reservation;
}

Result StandinMemory::map(DevicePtr address, std::size_t size_bytes, cuda::AllocationHandle handle) {
  if (size_bytes == 0 || size_bytes % kGranularity != 0 || address % kGranularity != 0) return cuda::kErrorInvalidValue;
  const auto found = handles_.find(handle);
  if (found == handles_.end() || found->second->size_bytes < size_bytes) return cuda::kErrorInvalidValue;
  const Reservation* around = reservation_around(address, size_bytes);
  if (around == nullptr || around->is_allocation) return cuda::kErrorInvalidValue;
  const auto next = mappings_.lower_bound(address);
  if (next != mappings_.end() && next->first < address + size_bytes) return cuda::kErrorInvalidValue;
  if (next != mappings_.begin()) {
    const auto& [begin, before] = *std::prev(next);
    if (begin + before.size_bytes > address) return cuda::kErrorInvalidValue;
  }
  if (mmap(pointer(address), size_bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, found->second->file,
           static_cast<off_t>(found->second->file_offset_bytes)) == MAP_FAILED)
    return cuda::kErrorMapFailed;
  mappings_[address] = {size_bytes, found->second, 0};
  return cuda::kSuccess;
}

std::pair<StandinMemory::Mappings::iterator, StandinMemory::Mappings::iterator> StandinMemory::whole_mappings(
    DevicePtr address, std::size_t size_bytes) {
  const auto first = mappings_.find(address);
  auto last = first;
  DevicePtr at = address;
  while (last != mappings_.end() && last->first == at && at < address + size_bytes) {
    at += last->second.size_bytes;
    ++last;
  }
  if (at != address + size_bytes || first == last) return {mappings_.end(), mappings_.end()};
  return {first, last};
}

Result StandinMemory::unmap(DevicePtr address, std::size_t size_bytes) {
  const auto [first, last] = whole_mappings(address, size_bytes);
  if (first == last) return cuda::kErrorInvalidValue;
  const Reservation* around = reservation_around(address, size_bytes);
  if (around == nullptr || around->is_allocation) return cuda::kErrorInvalidValue;
  if (!empty_addresses(address, size_bytes)) return cuda::kErrorUnmapFailed;
  mappings_.erase(first, last);
  return cuda::kSuccess;
}

Result StandinMemory::set_access(DevicePtr address, std::size_t size_bytes, int flags) {
  const auto [first, last] = whole_mappings(address, size_bytes);
  if (first == last || (flags != 0 && flags != 1 && flags != cuda::kAccessReadWrite)) return cuda::kErrorInvalidValue;
  const int protection = flags == 0 ? PROT_NONE : flags == 1 ? PROT_READ : PROT_READ | PROT_WRITE;
  if (mprotect(pointer(address), size_bytes, protection) != 0) return cuda::kErrorUnknown;
  for (auto each = first; each != last; ++each) each->second.access = flags;
  return cuda::kSuccess;
}

Result StandinMemory::allocate(DevicePtr* address, std::size_t size_bytes, int device) {
  if (size_bytes == 0) return cuda::kErrorInvalidValue;
  std::shared_ptr<StandinAllocation> allocation = new_allocation(size_bytes, device);
  if (allocation == nullptr) return cuda::kErrorOutOfMemory;
  const std::size_t reserved_bytes = round_up(size_bytes, kGranularity);
  std::byte* place = reserve_addresses(reserved_bytes, kGranularity);
  if (place == nullptr) return cuda::kErrorOutOfMemory;
  if (mmap(place, allocation->size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file_,
           static_cast<off_t>(allocation->file_offset_bytes)) == MAP_FAILED) {
    munmap(place, reserved_bytes);
    return cuda::kErrorOutOfMemory;
  }
  *address = address_of(place);
  reservations_[*address] = {reserved_bytes, true};
  mappings_[*address] = {size_bytes, std::move(allocation), cuda::kAccessReadWrite};
  ++allocations_;
  return cuda::kSuccess;
}

Result StandinMemory::free_allocation(DevicePtr address) {
  const auto found = reservations_.find(address);
  if (found == reservations_.end() || !found->second.is_allocation) return cuda::kErrorInvalidValue;
  munmap(pointer(address), found->second.size_bytes);
  mappings_.erase(address);
  reservations_.erase(found);
  --allocations_;
  return cuda::kSuccess;
}

Result StandinMemory::register_host(void* memory, std::size_t size_bytes) {
  if (memory == nullptr || size_bytes == 0) return cuda::kErrorInvalidValue;
  if (host_memory(memory, size_bytes) != StandinHostMemory::unregistered) return kErrorHostMemoryAlreadyRegistered;
  registrations_[static_cast<const std::byte*>(memory)] = size_bytes;
  return cuda::kSuccess;
}

Result StandinMemory::unregister_host(void* memory) {
  return registrations_.erase(static_cast<const std::byte*>(memory)) != 0 ? cuda::kSuccess
                                                                          : kErrorHostMemoryNotRegistered;
}

StandinHostMemory StandinMemory::host_memory(const void* memory, std::size_t size_bytes) const {
  const auto* begin = static_cast<const std::byte*>(memory);
  const auto next = registrations_.upper_bound(begin);
  if (next != registrations_.begin()) {
    const auto& [registered, registered_bytes] = *std::prev(next);
    if (begin + size_bytes <= registered + registered_bytes) return StandinHostMemory::registered;
    if (begin < registered + registered_bytes) return StandinHostMemory::partly_registered;
  }
  if (next != registrations_.end() && next->first < begin + size_bytes) return StandinHostMemory::partly_registered;
  return StandinHostMemory::unregistered;
}

bool StandinMemory::find(DevicePtr address, std::size_t size_bytes, bool writes,
                         std::vector<StandinPiece>& pieces) const {
  if (host_memory(pointer(address), size_bytes) == StandinHostMemory::registered) {
    pieces.push_back({nullptr, pointer(address), size_bytes});
    return true;
  }
  while (size_bytes > 0) {
    const auto next = mappings_.upper_bound(address);
    if (next == mappings_.begin()) return false;
    const auto& [begin, mapping] = *std::prev(next);
    const std::size_t inside_bytes = address - begin;
    if (inside_bytes >= mapping.size_bytes || mapping.access < (writes ? cuda::kAccessReadWrite : 1)) return false;
    const std::size_t piece_bytes = std::min(size_bytes, mapping.size_bytes - inside_bytes);
    pieces.push_back({mapping.allocation, mapping.allocation->memory + inside_bytes, piece_bytes});
    address += piece_bytes;
    size_bytes -= piece_bytes;
  }
  return true;
}

}  // namespace tp
