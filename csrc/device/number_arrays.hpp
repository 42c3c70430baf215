// SPDX-License-Identifier: Apache-2.0
// The conversions of number_formats.hpp for whole arrays on the host, with the processor's vector instructions where it
// has them (AVX2 and F16C, asked for at run time). Bit for bit the same, but for NaN, which is not to be given.
//
// Threads: any. Blocking: no. Errors: none.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/kernel_jobs.hpp"

namespace tp::kernel {

// numbers[i] = codes[i] * scale, rounded.
void numbers_of_codes(const std::uint8_t* codes, std::size_t count, QuantisedFormat from, float scale, FloatFormat to,
                      std::uint16_t* numbers);
// Returns the largest magnitude; infinite or NaN when one of them is.
float floats_of_numbers(const std::uint16_t* numbers, std::size_t count, FloatFormat from, float* floats);
// codes[i] = floats[i] / scale, rounded; what is beyond the largest code becomes that.
void codes_of_floats(const float* floats, std::size_t count, float scale, QuantisedFormat to, std::uint8_t* codes);

}  // namespace tp::kernel
