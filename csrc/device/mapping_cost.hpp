// SPDX-License-Identifier: Apache-2.0
// What it costs to put a page under its address on this device, against what it costs to fill it: from both follows the
// page size.
//
// Threads: any. Blocking: for some milliseconds of driver calls and copies. Errors: Error(device), Error(memory).
#pragma once

#include <cstdint>
#include <vector>

#include "device/cuda_device.hpp"

namespace tp {

struct MappingCost {
  std::size_t page_bytes = 0;
  double map_ns = 0;    // cuMemMap and cuMemSetAccess of one page; medians
  double unmap_ns = 0;  // cuMemUnmap
};

// One entry for each power of two from the device's granularity (2 MiB at least) to page_bytes_max.
std::vector<MappingCost> measure_mapping_cost(const CudaDevice& device, std::size_t page_bytes_max);
// Bytes per second from registered host memory to the device, in copies of 8 MiB.
double measure_link_bandwidth(const CudaDevice& device);
// The smallest page of which mapping and unmapping take at most kMappingShareMax of the time to copy it; the largest
// measured when there is none.
std::size_t choose_page_bytes(const std::vector<MappingCost>& costs, double link_bytes_per_second);

inline constexpr double kMappingShareMax = 0.05;

}  // namespace tp
