// SPDX-License-Identifier: Apache-2.0
#include "device/quantised_page.hpp"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "base/check.hpp"
#include "base/error.hpp"
#include "base/limits.hpp"
#include "device/number_arrays.hpp"

namespace tp {
namespace {

using kernel::FloatFormat;
using kernel::QuantisedFormat;

constexpr std::uint32_t kBlockElementsMin = 8, kBlockElementsMax = 65536;
// Numbers made at a time where they overwrite their codes: the codes are copied away first.
constexpr std::size_t kPieceElements = 4096;

float largest_code(QuantisedFormat format) {
  switch (format) {
    case QuantisedFormat::int8: return 127.0F;
    case QuantisedFormat::fp8_e4m3: return 448.0F;
    case QuantisedFormat::fp8_e5m2: return 57344.0F;
  }
  TP_CHECK(false);
  return 0;
}

std::size_t checksum_offset(const QuantisedLayout& layout, std::size_t page_bytes) {
  return record_bytes(layout, page_bytes) - sizeof(std::uint64_t);
}

}  // namespace

void check_layout(const QuantisedLayout& layout) {
  const std::uint32_t block = layout.block_elements;
  if (block >= kBlockElementsMin && block <= kBlockElementsMax && std::has_single_bit(block)) return;
  throw Error(ErrorKind::invalid, "block_elements is " + std::to_string(block) + "; it must be a power of two from " +
                                      std::to_string(kBlockElementsMin) + " to " + std::to_string(kBlockElementsMax));
}

std::size_t numbers_in_page(std::size_t page_bytes) noexcept { return page_bytes / sizeof(std::uint16_t); }

std::size_t scales_offset_bytes(std::size_t page_bytes) noexcept { return numbers_in_page(page_bytes); }

std::size_t record_bytes(const QuantisedLayout& layout, std::size_t page_bytes) noexcept {
  const std::size_t numbers = numbers_in_page(page_bytes);
  const std::size_t used = numbers + numbers / layout.block_elements * sizeof(float) + sizeof(std::uint64_t);
  return (used + kDirectAlignFallbackBytes - 1) / kDirectAlignFallbackBytes * kDirectAlignFallbackBytes;
}

void quantise_record(std::span<const std::uint16_t> numbers, const QuantisedLayout& layout, std::size_t page_bytes,
                     std::uint64_t record_index, std::byte* record) {
  check_layout(layout);
  TP_CHECK(numbers.size() <= numbers_in_page(page_bytes));
  std::memset(record, 0, record_bytes(layout, page_bytes));
  auto* codes = reinterpret_cast<std::uint8_t*>(record);
  auto* scales = reinterpret_cast<float*>(record + scales_offset_bytes(page_bytes));
  std::vector<float> values(layout.block_elements);
  for (std::size_t begin = 0; begin < numbers.size(); begin += layout.block_elements) {
    const std::size_t count = std::min<std::size_t>(layout.block_elements, numbers.size() - begin);
    const float largest = kernel::floats_of_numbers(&numbers[begin], count, layout.numbers, values.data());
    if (!std::isfinite(largest)) {
      throw Error(ErrorKind::invalid, "number " + std::to_string(begin) + " or one of the " + std::to_string(count) +
                                          " from there is infinite or NaN, which 8-bit codes with a scale can't tell");
    }
    const float scale = largest / largest_code(layout.codes);
    if (!std::isnormal(scale)) continue;  // all of them are zero, or as good as zero: bfloat16 goes down to 9e-41
    scales[begin / layout.block_elements] = scale;
    kernel::codes_of_floats(values.data(), count, scale, layout.codes, codes + begin);
  }
  const std::size_t end = checksum_offset(layout, page_bytes);
  const std::uint64_t checksum = XXH3_64bits_withSeed(record, end, record_index);
  std::memcpy(record + end, &checksum, sizeof checksum);
}

bool record_intact(const std::byte* record, const QuantisedLayout& layout, std::size_t page_bytes,
                   std::uint64_t record_index) noexcept {
  const std::size_t end = checksum_offset(layout, page_bytes);
  std::uint64_t checksum = 0;
  std::memcpy(&checksum, record + end, sizeof checksum);
  return XXH3_64bits_withSeed(record, end, record_index) == checksum;
}

void dequantise_in_place(std::byte* page, const QuantisedLayout& layout, std::size_t page_bytes) {
  const std::size_t numbers = numbers_in_page(page_bytes);
  std::vector<float> scales(numbers / layout.block_elements);
  std::memcpy(scales.data(), page + scales_offset_bytes(page_bytes), scales.size() * sizeof(float));
  const std::size_t piece = std::max<std::size_t>(kPieceElements, layout.block_elements);
  std::vector<std::uint8_t> codes(piece);
  // From the end: the numbers of a piece cover codes from its own on, never those before.
  for (std::size_t end = numbers; end > 0;) {
    const std::size_t begin = end - std::min(piece, end);
    std::memcpy(codes.data(), page + begin, end - begin);
    for (std::size_t block = begin; block < end; block += layout.block_elements) {
      kernel::numbers_of_codes(codes.data() + (block - begin), layout.block_elements, layout.codes,
                               scales[block / layout.block_elements], layout.numbers,
                               reinterpret_cast<std::uint16_t*>(page) + block);
    }
    end = begin;
  }
}

}  // namespace tp
