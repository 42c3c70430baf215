// SPDX-License-Identifier: Apache-2.0
// Whether a graph may wait, in a stream, for copies that are asked for after it was launched.
//
// CUDA promises nothing of the kind: an order that is made by values is invisible to it, streams share a few hardware
// queues, and a call may wait for the device. So it is tried, with a graph that nothing depends on: while it stands at
// its gate, the copy streams have to get on, and frames have to be mapped and unmapped. The host opens the gate in any
// case, so the probe ends whatever it finds.
//
// It finds out about these streams as they are now. It can't know of streams that a captured function forks by itself.
//
// Threads: any; none of the streams is captured. Blocking: until the stream has done what it holds, and then at most
// `patience` twice. Errors: Error(device) only when the context is lost.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "device/cuda_device.hpp"

namespace tp {

struct GateFacts {
  bool usable = false;
  std::string reason;  // of either
};

inline constexpr std::chrono::milliseconds kGateProbePatience{1000};

// frame: any; for a moment it is mapped at one more address, where nobody looks.
GateFacts probe_gates(const std::shared_ptr<const CudaDevice>& device, cuda::Stream stream,
                      const std::vector<cuda::Stream>& copy_streams, cuda::AllocationHandle frame,
                      std::size_t frame_bytes, std::chrono::milliseconds patience = kGateProbePatience);

}  // namespace tp
