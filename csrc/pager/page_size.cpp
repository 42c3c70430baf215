// SPDX-License-Identifier: Apache-2.0
#include "pager/page_size.hpp"

#include <algorithm>
#include <cstdio>
#include <string>

#include "base/error.hpp"
#include "base/limits.hpp"

namespace tp {
namespace {

constexpr unsigned long kMapCountFallback = 65530;

unsigned long mapping_count_max() {
  std::FILE* file = std::fopen("/proc/sys/vm/max_map_count", "re");
  if (file == nullptr) return kMapCountFallback;
  unsigned long count = 0;
  if (std::fscanf(file, "%lu", &count) != 1) count = kMapCountFallback;
  std::fclose(file);
  return count;
}

}  // namespace

std::size_t choose_host_page_bytes(std::uint64_t budget_bytes) {
  const std::uint64_t frames_max = std::max(1024ul, mapping_count_max() / 3 * 2 / 3);
  std::size_t page_bytes = kPageBytesMin;
  while (page_bytes < kPageBytesMax && budget_bytes / page_bytes > frames_max) page_bytes *= 2;
  return page_bytes;
}

std::size_t checked_page_bytes(std::uint64_t page_bytes, std::uint64_t budget_bytes) {
  if (page_bytes == 0) return choose_host_page_bytes(budget_bytes);
  const bool power_of_two = (page_bytes & (page_bytes - 1)) == 0;
  if (!power_of_two || page_bytes < kPageBytesMin || page_bytes > kPageBytesMax) {
    throw Error(ErrorKind::invalid,
                "page_bytes is " + std::to_string(page_bytes) + "; it must be a power of two from 2 MiB to 64 MiB");
  }
  return page_bytes;
}

}  // namespace tp
