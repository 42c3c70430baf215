// SPDX-License-Identifier: Apache-2.0
// What a stream has captured so far, and nodes put behind it that no call on a stream makes.
//
// Threads: the one that captures. Blocking: never. Errors: Error(device); Error(invalid) when the stream captures
// nothing.
#pragma once

#include <span>

#include "device/cuda_device.hpp"

namespace tp {

// Whether the stream is captured and no work of it is in the graph yet.
bool captured_nothing(const CudaDevice& device, cuda::Stream stream);

// Waits and writes that the graph does, one after the other, behind what the stream has captured and before what it
// captures next. Not more than kStreamMemOpsMax.
void capture_value_operations(const CudaDevice& device, cuda::Stream stream, std::span<cuda::StreamMemOp> operations);

}  // namespace tp
