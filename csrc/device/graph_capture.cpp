// SPDX-License-Identifier: Apache-2.0
#include "device/graph_capture.hpp"

#include "base/check.hpp"

namespace tp {
namespace {

struct Captured {
  cuda::Graph graph = nullptr;
  const cuda::GraphNode* last = nullptr;  // the driver's, until the next call on the stream
  std::size_t last_count = 0;
};

Captured captured_of(const CudaDevice& device, cuda::Stream stream) {
  Captured result;
  int status = cuda::kStreamCaptureStatusNone;
  device.driver().cuStreamGetCaptureInfo(stream, &status, static_cast<std::uint64_t*>(nullptr), &result.graph,
                                         &result.last, &result.last_count);
  if (status == cuda::kStreamCaptureStatusActive) return result;
  throw Error(ErrorKind::invalid, status == cuda::kStreamCaptureStatusNone
                                      ? "the stream is not being captured into a CUDA graph"
                                      : "the capture of the stream was invalidated by an error; end it");
}

}  // namespace

bool captured_nothing(const CudaDevice& device, cuda::Stream stream) {
  const CudaDevice::Current current(device);
  return captured_of(device, stream).last_count == 0;
}

void capture_value_operations(const CudaDevice& device, cuda::Stream stream, std::span<cuda::StreamMemOp> operations) {
  TP_CHECK(operations.size() <= cuda::kStreamMemOpsMax);
  const CudaDevice::Current current(device);
  const CudaDriver& driver = device.driver();
  const Captured captured = captured_of(device, stream);
  cuda::BatchMemOpNodeParams params;
  driver.cuCtxGetCurrent(&params.context);
  params.count = static_cast<unsigned>(operations.size());
  params.operations = operations.data();
  cuda::GraphNode node = nullptr;
  driver.cuGraphAddBatchMemOpNode(&node, captured.graph, captured.last, captured.last_count, &params);
  driver.cuStreamUpdateCaptureDependencies(stream, &node, std::size_t{1}, cuda::kStreamSetCaptureDependencies);
}

}  // namespace tp
