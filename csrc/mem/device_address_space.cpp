// SPDX-License-Identifier: Apache-2.0
#include "mem/device_address_space.hpp"

#include <algorithm>
#include <vector>

#include "base/check.hpp"

namespace tp {
namespace {

cuda::DevicePtr device_pointer(const std::byte* address) { return reinterpret_cast<cuda::DevicePtr>(address); }

}  // namespace

DeviceAddressSpace::DeviceAddressSpace(std::shared_ptr<const CudaDevice> device, std::size_t page_bytes)
    : AddressSpace(page_bytes), device_(std::move(device)) {
  TP_CHECK(page_bytes % device_->facts().granularity_bytes == 0);
}

DeviceAddressSpace::~DeviceAddressSpace() {
  const CudaDevice::Current current(*device_);
  discard();
  for (const Region& region : regions())
    device_->driver().cuMemAddressFree.result(device_pointer(region.reservation), region.reservation_bytes);
}

AddressSpace::Region DeviceAddressSpace::reserve_region(std::size_t bytes) {
  const CudaDevice::Current current(*device_);
  cuda::DevicePtr address = 0;
  // One page more than needed: the driver may take an alignment above its granularity for a mere wish.
  const std::size_t reserved_bytes = bytes + page_bytes();
  device_->driver().cuMemAddressReserve(&address, reserved_bytes, std::size_t{0}, cuda::DevicePtr{0}, 0ull);
  const cuda::DevicePtr base = (address + page_bytes() - 1) / page_bytes() * page_bytes();
  return {reinterpret_cast<std::byte*>(address), reserved_bytes, reinterpret_cast<std::byte*>(base), {}};
}

// How many of the first pages lie one behind the other in one region. Two regions that happen to touch are two
// reservations, and no call of the driver is promised to work across.
std::size_t DeviceAddressSpace::run_length(std::span<const PageId> pages) const {
  std::size_t length = 1;
  while (length < pages.size() && pages[length].value == pages[0].value + length &&
         region_of(pages[length]).base == region_of(pages[0]).base) {
    ++length;
  }
  return length;
}

void DeviceAddressSpace::map(const DeviceFramePool& pool, std::span<PageMapping> mappings) {
  std::sort(mappings.begin(), mappings.end(),
            [](const PageMapping& left, const PageMapping& right) { return left.page < right.page; });
  if (mapped_.size() < page_count()) mapped_.resize(page_count());
  std::vector<PageId> pages;
  for (const PageMapping& mapping : mappings) {
    TP_CHECK(!mapped_[mapping.page.value]);
    device_->driver().cuMemMap(device_pointer(address(mapping.page)), page_bytes(), std::size_t{0},
                               pool.handle(mapping.frame), 0ull);
    mapped_[mapping.page.value] = true;
    pages.push_back(mapping.page);
  }
  driver_calls_ += mappings.size();
  const cuda::MemAccessDesc access = device_->read_write_access();
  for (std::span<const PageId> rest = pages; !rest.empty();) {
    const std::size_t length = run_length(rest);
    device_->driver().cuMemSetAccess(device_pointer(address(rest[0])), length * page_bytes(), &access, std::size_t{1});
    ++driver_calls_;
    rest = rest.subspan(length);
  }
}

void DeviceAddressSpace::unmap(std::span<PageId> pages) {
  std::sort(pages.begin(), pages.end());
  for (std::span<const PageId> rest = pages; !rest.empty();) {
    const std::size_t length = run_length(rest);
    for (std::size_t i = 0; i < length; ++i) TP_CHECK(mapped_[rest[i].value]);
    device_->driver().cuMemUnmap(device_pointer(address(rest[0])), length * page_bytes());
    for (std::size_t i = 0; i < length; ++i) mapped_[rest[i].value] = false;
    ++driver_calls_;
    rest = rest.subspan(length);
  }
}

void DeviceAddressSpace::discard() noexcept {
  for (std::uint32_t page = 0; page < mapped_.size(); ++page) {
    if (!mapped_[page]) continue;
    device_->driver().cuMemUnmap.result(device_pointer(address(PageId{page})), page_bytes());
    mapped_[page] = false;
  }
}

}  // namespace tp
