// SPDX-License-Identifier: Apache-2.0
#include "device/number_arrays.hpp"

#include <algorithm>
#include <array>
#include <bit>

#include "device/number_formats.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tp::kernel {
namespace {

#define TP_ALWAYS_INLINE inline __attribute__((always_inline))

// Floats between codes and numbers: small enough for the first level of cache.
constexpr std::size_t kPiece = 1024;
// Adding and taking away 1.5 * 2^23 rounds a float of magnitude below 2^22 to an integer, ties to even.
constexpr float kRoundingMagic = 12582912.0F;

using CodeTable = std::array<float, 256>;

CodeTable make_table(QuantisedFormat format) {
  CodeTable table{};
  for (unsigned code = 0; code < table.size(); ++code)
    table[code] = float_of_code(static_cast<std::uint8_t>(code), format);
  return table;
}

const CodeTable& table_of(QuantisedFormat format) {
  static const CodeTable kE4m3 = make_table(QuantisedFormat::fp8_e4m3), kE5m2 = make_table(QuantisedFormat::fp8_e5m2);
  return format == QuantisedFormat::fp8_e4m3 ? kE4m3 : kE5m2;
}

// The loops are plain, for the compiler to vectorise: once for any processor, once for those with AVX2.

TP_ALWAYS_INLINE void widen_codes(const std::uint8_t* codes, std::size_t count, QuantisedFormat from, float scale,
                                  float* products) {
  if (from == QuantisedFormat::int8) {
    for (std::size_t i = 0; i < count; ++i)
      products[i] = static_cast<float>(static_cast<std::int8_t>(codes[i])) * scale;
    return;
  }
  const CodeTable& table = table_of(from);
  for (std::size_t i = 0; i < count; ++i) products[i] = table[codes[i]] * scale;
}

TP_ALWAYS_INLINE void round_to_bfloat16(const float* values, std::size_t count, std::uint16_t* numbers) {
  for (std::size_t i = 0; i < count; ++i) {
    const auto bits = std::bit_cast<std::uint32_t>(values[i]);
    numbers[i] = static_cast<std::uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
  }
}

TP_ALWAYS_INLINE float widen_bfloat16(const std::uint16_t* numbers, std::size_t count, float* floats) {
  std::int32_t largest = 0;
  for (std::size_t i = 0; i < count; ++i) {
    floats[i] = std::bit_cast<float>(static_cast<std::uint32_t>(numbers[i]) << 16);
    largest = std::max(largest, static_cast<std::int32_t>(numbers[i] & 0x7FFFu));
  }
  return std::bit_cast<float>(largest << 16);
}

TP_ALWAYS_INLINE float largest_magnitude(const float* floats, std::size_t count) {
  std::int32_t largest = 0;  // of the bits: as integers they are ordered as the magnitudes, NaN above all
  for (std::size_t i = 0; i < count; ++i)
    largest = std::max(largest, static_cast<std::int32_t>(std::bit_cast<std::uint32_t>(floats[i]) & 0x7FFFFFFFu));
  return std::bit_cast<float>(largest);
}

TP_ALWAYS_INLINE void round_to_int8(const float* floats, std::size_t count, float scale, std::uint8_t* codes) {
  for (std::size_t i = 0; i < count; ++i) {
    const float bounded = std::min(std::max(floats[i] / scale, -127.0F), 127.0F);
    codes[i] = static_cast<std::uint8_t>(static_cast<std::int32_t>((bounded + kRoundingMagic) - kRoundingMagic));
  }
}

void numbers_of_codes_plain(const std::uint8_t* codes, std::size_t count, QuantisedFormat from, float scale,
                            FloatFormat to, std::uint16_t* numbers) {
  std::array<float, kPiece> products;
  widen_codes(codes, count, from, scale, products.data());
  if (to == FloatFormat::bfloat16) return round_to_bfloat16(products.data(), count, numbers);
  for (std::size_t i = 0; i < count; ++i) numbers[i] = float16_of_float(products[i]);
}

float floats_of_numbers_plain(const std::uint16_t* numbers, std::size_t count, FloatFormat from, float* floats) {
  if (from == FloatFormat::bfloat16) return widen_bfloat16(numbers, count, floats);
  for (std::size_t i = 0; i < count; ++i) floats[i] = float_of_number(numbers[i], FloatFormat::float16);
  return largest_magnitude(floats, count);
}

void int8_of_floats_plain(const float* floats, std::size_t count, float scale, std::uint8_t* codes) {
  round_to_int8(floats, count, scale, codes);
}

#if defined(__x86_64__)
#define TP_AVX2 __attribute__((target("avx2,f16c")))

TP_AVX2 void numbers_of_codes_avx2(const std::uint8_t* codes, std::size_t count, QuantisedFormat from, float scale,
                                   FloatFormat to, std::uint16_t* numbers) {
  std::array<float, kPiece> products;
  widen_codes(codes, count, from, scale, products.data());
  if (to == FloatFormat::bfloat16) return round_to_bfloat16(products.data(), count, numbers);
  std::size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(products.data() + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(numbers + i), eight);
  }
  for (; i < count; ++i) numbers[i] = float16_of_float(products[i]);
}

TP_AVX2 float floats_of_numbers_avx2(const std::uint16_t* numbers, std::size_t count, FloatFormat from, float* floats) {
  if (from == FloatFormat::bfloat16) return widen_bfloat16(numbers, count, floats);
  std::size_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(floats + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers + i))));
  for (; i < count; ++i) floats[i] = float_of_number(numbers[i], FloatFormat::float16);
  return largest_magnitude(floats, count);
}

TP_AVX2 void int8_of_floats_avx2(const float* floats, std::size_t count, float scale, std::uint8_t* codes) {
  round_to_int8(floats, count, scale, codes);
}

bool has_avx2() {
  static const bool kHasIt = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  return kHasIt;
}
#else
constexpr bool has_avx2() { return false; }
constexpr auto numbers_of_codes_avx2 = numbers_of_codes_plain;
constexpr auto floats_of_numbers_avx2 = floats_of_numbers_plain;
constexpr auto int8_of_floats_avx2 = int8_of_floats_plain;
#endif

}  // namespace

void numbers_of_codes(const std::uint8_t* codes, std::size_t count, QuantisedFormat from, float scale, FloatFormat to,
                      std::uint16_t* numbers) {
  const auto convert = has_avx2() ? numbers_of_codes_avx2 : numbers_of_codes_plain;
  for (std::size_t done = 0; done < count; done += kPiece)
    convert(codes + done, std::min(kPiece, count - done), from, scale, to, numbers + done);
}

float floats_of_numbers(const std::uint16_t* numbers, std::size_t count, FloatFormat from, float* floats) {
  return (has_avx2() ? floats_of_numbers_avx2 : floats_of_numbers_plain)(numbers, count, from, floats);
}

void codes_of_floats(const float* floats, std::size_t count, float scale, QuantisedFormat to, std::uint8_t* codes) {
  switch (to) {
    case QuantisedFormat::int8:
      return (has_avx2() ? int8_of_floats_avx2 : int8_of_floats_plain)(floats, count, scale, codes);
    case QuantisedFormat::fp8_e4m3:
      for (std::size_t i = 0; i < count; ++i) codes[i] = fp8_code_of_float(floats[i] / scale, 4, 7, 0x7E);
      return;
    case QuantisedFormat::fp8_e5m2:
      for (std::size_t i = 0; i < count; ++i) codes[i] = fp8_code_of_float(floats[i] / scale, 5, 15, 0x7B);
      return;
  }
}

}  // namespace tp::kernel
