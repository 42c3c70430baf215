// SPDX-License-Identifier: Apache-2.0
// Eight-bit numbers to float, and float to 16-bit numbers, by their bits, so that a kernel and its reference agree in
// every bit, subnormals and NaNs included.
//
// Formats: OCP 8-bit Floating Point Specification 1.0 (E4M3 has no infinities; S.1111.111 is its NaN), IEEE 754-2019
// binary16, and bfloat16 as the upper half of binary32. Rounding is to nearest, ties to even. A NaN becomes the
// positive quiet one: what sign a product has that is none, processors don't agree on.
#pragma once

#include <cstdint>

#include "device/kernel_jobs.hpp"
#include "device/portable.hpp"

namespace tp::kernel {

TP_HOST_DEVICE inline float float_of_bits(std::uint32_t bits) {
  union {
    std::uint32_t bits;
    float value;
  } both = {bits};
  return both.value;
}

TP_HOST_DEVICE inline std::uint32_t bits_of_float(float value) {
  union {
    float value;
    std::uint32_t bits;
  } both = {value};
  return both.bits;
}

// A float with the sign, exponent and fraction of a small format; exponent_bias is the format's own.
TP_HOST_DEVICE inline float widened(std::uint32_t code, unsigned exponent_bits, unsigned exponent_bias) {
  const unsigned fraction_bits = 7 - exponent_bits;
  const std::uint32_t sign = (code & 0x80u) << 24;
  const std::uint32_t exponent = (code & 0x7Fu) >> fraction_bits;
  const std::uint32_t fraction = code & ((1u << fraction_bits) - 1);
  if (exponent == 0) {  // exact: a small integer times a power of two
    const float unit = float_of_bits((127 + 1 - exponent_bias - fraction_bits) << 23);
    const float magnitude = static_cast<float>(fraction) * unit;
    return float_of_bits(bits_of_float(magnitude) | sign);
  }
  return float_of_bits(sign | (exponent + 127 - exponent_bias) << 23 | fraction << (23 - fraction_bits));
}

TP_HOST_DEVICE inline float float_of_code(std::uint8_t code, QuantisedFormat format) {
  if (format == QuantisedFormat::int8) return static_cast<float>(static_cast<std::int8_t>(code));
  const std::uint32_t sign = (code & 0x80u) << 24;
  if (format == QuantisedFormat::fp8_e4m3) {
    if ((code & 0x7Fu) == 0x7Fu) return float_of_bits(sign | 0x7FC00000u);
    return widened(code, 4, 7);
  }
  if ((code & 0x7Fu) > 0x7Cu) return float_of_bits(sign | 0x7FC00000u);
  if ((code & 0x7Fu) == 0x7Cu) return float_of_bits(sign | 0x7F800000u);
  return widened(code, 5, 15);
}

TP_HOST_DEVICE inline std::uint16_t bfloat16_of_float(float value) {
  const std::uint32_t bits = bits_of_float(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0u;
  return static_cast<std::uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

TP_HOST_DEVICE inline std::uint16_t float16_of_float(float value) {
  const std::uint32_t bits = bits_of_float(value);
  const std::uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return 0x7E00u;
  if (magnitude >= 0x477FF000u) return static_cast<std::uint16_t>(sign | 0x7C00u);  // 65520 and above round up to it
  if (magnitude < 0x38800000u) {  // below the smallest normal number, 2^-14: counted in units of 2^-24
    const std::uint32_t exponent = magnitude >> 23;
    if (exponent < 102) return static_cast<std::uint16_t>(sign);  // below half a unit
    const std::uint32_t significand = (magnitude & 0x7FFFFFu) | 0x800000u;
    const std::uint32_t shift = 126 - exponent;
    const std::uint32_t half = 1u << (shift - 1), rest = significand & ((1u << shift) - 1);
    std::uint32_t units = significand >> shift;
    if (rest > half || (rest == half && (units & 1u) != 0)) ++units;
    return static_cast<std::uint16_t>(sign | units);
  }
  const std::uint32_t rebiased = magnitude - (112u << 23);
  return static_cast<std::uint16_t>(sign | (rebiased + 0xFFFu + (rebiased >> 13 & 1u)) >> 13);
}

TP_HOST_DEVICE inline float float_of_number(std::uint16_t number, FloatFormat format) {
  if (format == FloatFormat::bfloat16) return float_of_bits(static_cast<std::uint32_t>(number) << 16);
  const std::uint32_t sign = (number & 0x8000u) << 16, exponent = number >> 10 & 0x1Fu, fraction = number & 0x3FFu;
  if (exponent == 0x1F) return float_of_bits(sign | 0x7F800000u | fraction << 13);
  if (exponent != 0) return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = static_cast<float>(fraction) * float_of_bits((127 - 24) << 23);
  return float_of_bits(bits_of_float(magnitude) | sign);
}

// To an 8-bit number; what is beyond the largest (by its code) becomes that. Not for NaN.
TP_HOST_DEVICE inline std::uint8_t fp8_code_of_float(float value, unsigned exponent_bits, unsigned exponent_bias,
                                                     std::uint32_t largest_code) {
  const unsigned fraction_bits = 7 - exponent_bits, dropped_bits = 23 - fraction_bits;
  const std::uint32_t sign = bits_of_float(value) >> 24 & 0x80u, magnitude = bits_of_float(value) & 0x7FFFFFFFu;
  std::uint32_t code = 0;
  if (magnitude >> 23 >= 127 + 1 - exponent_bias) {
    const std::uint32_t rounded = magnitude + (1u << (dropped_bits - 1)) - 1 + (magnitude >> dropped_bits & 1u);
    code = (rounded >> dropped_bits) - ((127 - exponent_bias) << fraction_bits);
  } else {  // below the smallest normal number: a sum with a float whose last bit is worth a unit rounds to units
    const float magic = float_of_bits((127 + 1 - exponent_bias - fraction_bits + 23) << 23);
    code = bits_of_float(float_of_bits(magnitude) + magic) & 0x7FFFFFu;
  }
  return static_cast<std::uint8_t>(sign | (code < largest_code ? code : largest_code));
}

TP_HOST_DEVICE inline std::uint16_t code_of_float(float value, FloatFormat format) {
  return format == FloatFormat::bfloat16 ? bfloat16_of_float(value) : float16_of_float(value);
}

}  // namespace tp::kernel
