// SPDX-License-Identifier: Apache-2.0
// What the kernels must give, in plain C++ over host memory: the same jobs, whose addresses are the host's. For tests,
// and for whoever has no device. Threads: any. Blocking: no.
#pragma once

#include <span>

#include "device/kernel_jobs.hpp"

namespace tp::kernel {

void gather_reference(std::span<const CopyJob> jobs);
void hash_chunks_reference(std::span<const HashJob> jobs);
void dequantise_reference(std::span<const DequantiseJob> jobs, std::uint64_t block_elements, QuantisedFormat from,
                          FloatFormat to);

}  // namespace tp::kernel
