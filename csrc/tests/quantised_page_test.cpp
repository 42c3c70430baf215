// SPDX-License-Identifier: Apache-2.0
// Records of quantised pages: every code is the nearest, what comes back is code times scale, and damage is seen.
#include "device/quantised_page.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "base/limits.hpp"
#include "device/number_arrays.hpp"
#include "device/number_formats.hpp"
#include "thrown_error.hpp"

namespace tp {
namespace {

using kernel::FloatFormat;
using kernel::QuantisedFormat;

constexpr std::size_t kPage = kPageBytesMin;
constexpr std::size_t kNumbers = kPage / 2;

TEST(NumberFormats, every_float16_comes_back_from_float) {
  for (std::uint32_t number = 0; number < 65536; ++number) {
    const bool nan = (number & 0x7FFFu) > 0x7C00u;
    const float value = kernel::float_of_number(static_cast<std::uint16_t>(number), FloatFormat::float16);
    EXPECT_EQ(std::isnan(value), nan);
    if (!nan) ASSERT_EQ(kernel::float16_of_float(value), number);
  }
}

// By looking at every code there is.
void expect_nearest(float value, QuantisedFormat format, std::uint8_t code) {
  std::uint8_t best = 0;
  double best_distance = std::numeric_limits<double>::infinity();
  for (unsigned candidate = 0; candidate < 256; ++candidate) {
    const double there = kernel::float_of_code(static_cast<std::uint8_t>(candidate), format);
    if (!std::isfinite(there) || std::signbit(static_cast<float>(there)) != std::signbit(value)) continue;
    const double distance = std::fabs(there - static_cast<double>(value));
    if (distance < best_distance || (distance == best_distance && candidate % 2 == 0)) {
      best_distance = distance;
      best = static_cast<std::uint8_t>(candidate);
    }
  }
  ASSERT_EQ(code, best) << value;
}

TEST(NumberFormats, fp8_codes_are_the_nearest_ties_to_even) {
  std::mt19937 random(1);
  for (int round = 0; round < 20'000; ++round) {
    // Any exponent from far below the smallest number to beyond the largest, and every tie between neighbours.
    const std::uint32_t bits = (random() & 0x80000000u) | (100 + random() % 45) << 23 | (random() & 0x7FFFFFu);
    const float value = std::bit_cast<float>(round % 2 == 0 ? bits : bits & 0xFFF80000u);
    expect_nearest(value, QuantisedFormat::fp8_e4m3, kernel::fp8_code_of_float(value, 4, 7, 0x7E));
    expect_nearest(value, QuantisedFormat::fp8_e5m2, kernel::fp8_code_of_float(value, 5, 15, 0x7B));
  }
}

TEST(NumberArrays, are_bit_for_bit_what_one_number_is) {
  constexpr std::array<QuantisedFormat, 3> kFormats{QuantisedFormat::int8, QuantisedFormat::fp8_e4m3,
                                                    QuantisedFormat::fp8_e5m2};
  std::mt19937 random(5);
  for (const QuantisedFormat format : kFormats) {
    for (const FloatFormat numbers_format : {FloatFormat::bfloat16, FloatFormat::float16}) {
      for (const std::size_t count : {std::size_t{1}, std::size_t{7}, std::size_t{8}, std::size_t{3001}}) {
        // Products from below the smallest number to beyond the largest.
        const float scale =
            std::ldexp(1.0F + static_cast<float>(random() % 1000) / 1000, static_cast<int>(random() % 40) - 30);
        std::vector<std::uint8_t> codes(count);
        for (std::uint8_t& code : codes) {
          do code = static_cast<std::uint8_t>(random());
          while (!std::isfinite(kernel::float_of_code(code, format)));
        }
        std::vector<std::uint16_t> numbers(count);
        kernel::numbers_of_codes(codes.data(), count, format, scale, numbers_format, numbers.data());
        std::vector<float> floats(count);
        const float largest = kernel::floats_of_numbers(numbers.data(), count, numbers_format, floats.data());
        float largest_seen = 0;
        for (std::size_t i = 0; i < count; ++i) {
          ASSERT_EQ(numbers[i], kernel::code_of_float(kernel::float_of_code(codes[i], format) * scale, numbers_format));
          ASSERT_EQ(floats[i], kernel::float_of_number(numbers[i], numbers_format));
          largest_seen = std::max(largest_seen, std::fabs(floats[i]));
        }
        ASSERT_EQ(largest, largest_seen);
      }
    }
  }
}

TEST(NumberArrays, of_int8_round_ties_to_even_and_stop_at_127) {
  const std::vector<float> floats{0.5F, 1.5F, 2.5F, -0.5F, -1.5F, 126.5F, 127.4F, 1000, -1000, -126.5F, 0.49999997F};
  const std::vector<std::int8_t> expected{0, 2, 2, 0, -2, 126, 127, 127, -127, -126, 0};
  std::vector<std::uint8_t> codes(floats.size());
  kernel::codes_of_floats(floats.data(), floats.size(), 1.0F, QuantisedFormat::int8, codes.data());
  for (std::size_t i = 0; i < floats.size(); ++i)
    EXPECT_EQ(static_cast<std::int8_t>(codes[i]), expected[i]) << floats[i];
}

std::vector<std::uint16_t> some_numbers(std::size_t count, FloatFormat format, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, 0.02F);
  std::vector<std::uint16_t> numbers(count);
  for (std::uint16_t& number : numbers) number = kernel::code_of_float(normal(random), format);
  return numbers;
}

struct Case {
  QuantisedLayout layout;
  float relative_error_max;  // of the largest of a block
};

class QuantisedPage : public testing::TestWithParam<Case> {
 protected:
  static std::vector<std::byte> page_of(const std::vector<std::uint16_t>& numbers, const QuantisedLayout& layout) {
    std::vector<std::byte> page(kPage, std::byte{0xAA});
    quantise_record(numbers, layout, kPage, 7, page.data());
    EXPECT_TRUE(record_intact(page.data(), layout, kPage, 7));
    dequantise_in_place(page.data(), layout, kPage);
    return page;
  }
};

TEST_P(QuantisedPage, comes_back_within_half_a_step_of_each_block) {
  const QuantisedLayout& layout = GetParam().layout;
  const std::vector<std::uint16_t> numbers = some_numbers(kNumbers - 1000, layout.numbers, 2);
  const std::vector<std::byte> page = page_of(numbers, layout);
  const auto* back = reinterpret_cast<const std::uint16_t*>(page.data());
  for (std::size_t begin = 0; begin < numbers.size(); begin += layout.block_elements) {
    const std::size_t end = std::min<std::size_t>(begin + layout.block_elements, numbers.size());
    float largest = 0;
    for (std::size_t i = begin; i < end; ++i)
      largest = std::max(largest, std::fabs(kernel::float_of_number(numbers[i], layout.numbers)));
    for (std::size_t i = begin; i < end; ++i) {
      const float before = kernel::float_of_number(numbers[i], layout.numbers);
      const float after = kernel::float_of_number(back[i], layout.numbers);
      ASSERT_LE(std::fabs(after - before), largest * GetParam().relative_error_max) << i;
    }
  }
  for (std::size_t i = numbers.size(); i < kNumbers; ++i) ASSERT_EQ(back[i], 0) << i;
}

TEST_P(QuantisedPage, is_little_more_than_half_as_large) {
  const QuantisedLayout& layout = GetParam().layout;
  const std::size_t size = record_bytes(layout, kPage);
  EXPECT_EQ(size % 4096, 0u);
  EXPECT_GE(size, kNumbers + kNumbers / layout.block_elements * 4 + 8);
  EXPECT_LT(size, kNumbers + kNumbers / layout.block_elements * 4 + 8 + 4096);
}

INSTANTIATE_TEST_SUITE_P(
    layouts, QuantisedPage,
    testing::Values(Case{{QuantisedFormat::int8, FloatFormat::bfloat16, 128}, 0.5F / 127 + 1.0F / 256},
                    Case{{QuantisedFormat::int8, FloatFormat::float16, 8}, 0.5F / 127 + 1.0F / 2048},
                    Case{{QuantisedFormat::fp8_e4m3, FloatFormat::bfloat16, 65536}, 1.0F / 16 + 1.0F / 256},
                    Case{{QuantisedFormat::fp8_e5m2, FloatFormat::float16, 4096}, 1.0F / 8 + 1.0F / 2048}));

TEST(QuantisedRecord, of_zeros_and_of_the_smallest_numbers_is_zeros) {
  const QuantisedLayout layout;
  std::vector<std::uint16_t> numbers(kNumbers, 0);
  numbers[5] = 0x8000;    // minus zero
  numbers[300] = 0x0001;  // 9e-41
  std::vector<std::byte> page(kPage);
  quantise_record(numbers, layout, kPage, 0, page.data());
  dequantise_in_place(page.data(), layout, kPage);
  for (std::size_t i = 0; i < kPage; ++i) ASSERT_EQ(page[i], std::byte{0}) << i;
}

TEST(QuantisedRecord, refuses_what_codes_cannot_tell) {
  const QuantisedLayout layout;
  std::vector<std::byte> record(kPage);
  for (const std::uint16_t number : {std::uint16_t{0x7F80}, std::uint16_t{0xFF80}, std::uint16_t{0x7FC0}}) {
    std::vector<std::uint16_t> numbers(1000, 0x3F80);
    numbers[900] = number;
    const Error error = test::error_of([&] { quantise_record(numbers, layout, kPage, 0, record.data()); });
    EXPECT_EQ(error.kind(), ErrorKind::invalid);
    EXPECT_NE(std::string(error.what()).find("number 896"), std::string::npos) << error.what();
  }
}

TEST(QuantisedRecord, shows_every_flipped_bit_and_every_other_place) {
  const QuantisedLayout layout;
  std::vector<std::byte> record(kPage);
  quantise_record(some_numbers(kNumbers, layout.numbers, 3), layout, kPage, 3, record.data());
  EXPECT_FALSE(record_intact(record.data(), layout, kPage, 2));
  std::mt19937 random(4);
  const std::size_t size = record_bytes(layout, kPage);
  for (int round = 0; round < 500; ++round) {
    const std::size_t place = round < 8 ? size - 8 + static_cast<std::size_t>(round) : random() % size;
    const std::byte bit = std::byte{1} << (random() % 8);
    record[place] ^= bit;
    ASSERT_FALSE(record_intact(record.data(), layout, kPage, 3)) << place;
    record[place] ^= bit;
  }
  EXPECT_TRUE(record_intact(record.data(), layout, kPage, 3));
}

TEST(QuantisedRecord, takes_blocks_of_powers_of_two_alone) {
  for (const std::uint32_t block : {0u, 4u, 12u, 100u, 131072u}) {
    const Error error = test::error_of([&] { check_layout({QuantisedFormat::int8, FloatFormat::bfloat16, block}); });
    EXPECT_EQ(error.kind(), ErrorKind::invalid);
    EXPECT_NE(std::string(error.what()).find("block_elements is " + std::to_string(block)), std::string::npos);
  }
  check_layout({QuantisedFormat::int8, FloatFormat::bfloat16, 8});
  check_layout({QuantisedFormat::int8, FloatFormat::bfloat16, 65536});
}

}  // namespace
}  // namespace tp
