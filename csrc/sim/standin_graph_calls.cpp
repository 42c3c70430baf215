// SPDX-License-Identifier: Apache-2.0
// The stand-in driver's entry points of stream capture and graphs.
#include <utility>

#include "sim/standin_world.hpp"

namespace tp {

using cuda::Result;

// An operation that a stream is asked for: run, or captured.
Result StandinWorld::submit_locked(const StandinStreamPointer& stream, const StandinOperationPointer& operation) {
  if (const auto captured = graphs_.add(stream, *operation, stream == streams_->legacy())) return *captured;
  streams_->enqueue_locked(stream, operation);
  return cuda::kSuccess;
}

Result StandinWorld::cuStreamBeginCapture(cuda::Stream handle, int mode) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  if (stream == nullptr) return cuda::kErrorInvalidHandle;
  if (mode < 0 || mode > cuda::kStreamCaptureModeRelaxed) return cuda::kErrorInvalidValue;
  if (stream == streams_->legacy()) return cuda::kErrorStreamCaptureUnsupported;
  return graphs_.begin(stream, mode, new_handle_locked<cuda::Graph>());
}

Result StandinWorld::cuStreamEndCapture(cuda::Stream handle, cuda::Graph* graph) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  return stream != nullptr ? graphs_.end(stream, graph) : cuda::kErrorInvalidHandle;
}

Result StandinWorld::cuStreamIsCapturing(cuda::Stream handle, int* status) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  if (stream == nullptr) return cuda::kErrorInvalidHandle;
  if (stream == streams_->legacy() && graphs_.captures_blocking_stream()) return cuda::kErrorStreamCaptureImplicit;
  const auto found = graphs_.find(stream);
  *status = !found                           ? cuda::kStreamCaptureStatusNone
            : found->capture->is_invalidated ? cuda::kStreamCaptureStatusInvalidated
                                             : cuda::kStreamCaptureStatusActive;
  return cuda::kSuccess;
}

Result StandinWorld::cuStreamGetCaptureInfo(cuda::Stream handle, int* status, std::uint64_t* id, cuda::Graph* graph,
                                            const cuda::GraphNode** dependencies, std::size_t* dependency_count) {
  const Result result = cuStreamIsCapturing(handle, status);
  const Lock lock(mutex_);
  if (result != cuda::kSuccess || *status != cuda::kStreamCaptureStatusActive) return result;
  const auto found = graphs_.find(streams_->find_locked(handle));
  if (id != nullptr) *id = found->capture->id;
  if (graph != nullptr) *graph = found->capture->handle;
  dependencies_.clear();  // the driver's own, valid until the next call
  for (const std::size_t node : found->member->frontier) dependencies_.push_back(found->capture->graph->handles[node]);
  if (dependencies != nullptr) *dependencies = dependencies_.data();
  if (dependency_count != nullptr) *dependency_count = dependencies_.size();
  return cuda::kSuccess;
}

Result StandinWorld::cuStreamUpdateCaptureDependencies(cuda::Stream handle, cuda::GraphNode* dependencies,
                                                       std::size_t dependency_count, unsigned flags) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  if (stream == nullptr) return cuda::kErrorInvalidHandle;
  const auto found = graphs_.find(stream);
  if (!found || found->capture->is_invalidated) return cuda::kErrorIllegalState;
  if (flags > cuda::kStreamSetCaptureDependencies) return cuda::kErrorInvalidValue;
  std::vector<std::size_t> nodes(dependency_count);
  for (std::size_t at = 0; at < dependency_count; ++at) {
    if (!graphs_.is_node(*found->capture->graph, dependencies[at], &nodes[at])) return cuda::kErrorInvalidValue;
  }
  std::vector<std::size_t>& frontier = found->member->frontier;
  if (flags == cuda::kStreamSetCaptureDependencies) frontier.clear();
  frontier.insert(frontier.end(), nodes.begin(), nodes.end());
  return cuda::kSuccess;
}

Result StandinWorld::cuGraphAddBatchMemOpNode(cuda::GraphNode* node, cuda::Graph handle,
                                              const cuda::GraphNode* dependencies, std::size_t dependency_count,
                                              const cuda::BatchMemOpNodeParams* params) {
  const Lock lock(mutex_);
  const std::shared_ptr<StandinGraph> graph = graphs_.find(handle);
  const bool is_valid = graph != nullptr && params != nullptr && params->flags == 0 && params->count > 0 &&
                        params->count <= cuda::kStreamMemOpsMax && is_context_locked(params->context);
  if (!is_valid) return cuda::kErrorInvalidValue;
  StandinNode made;
  made.after.resize(dependency_count);
  for (std::size_t at = 0; at < dependency_count; ++at) {
    if (!graphs_.is_node(*graph, dependencies[at], &made.after[at])) return cuda::kErrorInvalidValue;
  }
  if (!made.after.empty()) made.lane = graph->nodes[made.after.front()].lane;
  constexpr const char* kCall = "cuGraphAddBatchMemOpNode";
  for (unsigned at = 0; at < params->count; ++at) {
    const cuda::StreamMemOp& each = params->operations[at];
    const auto value = static_cast<std::uint32_t>(each.value);
    StandinOperation& operation = made.operations.emplace_back();
    const Result result = each.operation == cuda::kStreamMemOpWaitValue32
                              ? make_wait_value_locked(kCall, each.address, value, each.flags, operation)
                          : each.operation == cuda::kStreamMemOpWriteValue32
                              ? make_write_value_locked(kCall, each.address, value, each.flags, operation)
                              : cuda::kErrorNotSupported;
    if (result != cuda::kSuccess) return result;
  }
  *node = graphs_.new_node_handle();
  graphs_.add_node(*graph, std::move(made), *node);
  return cuda::kSuccess;
}

Result StandinWorld::cuGraphInstantiateWithFlags(cuda::GraphExec* exec, cuda::Graph graph, unsigned long long flags) {
  const Lock lock(mutex_);
  if (flags != 0) return cuda::kErrorInvalidValue;
  *exec = new_handle_locked<cuda::GraphExec>();
  return graphs_.instantiate(graph, *exec, *streams_);
}

Result StandinWorld::cuGraphLaunch(cuda::GraphExec exec, cuda::Stream handle) {
  const Lock lock(mutex_);
  const StandinStreamPointer stream = streams_->find_locked(handle);
  if (stream == nullptr) return cuda::kErrorInvalidHandle;
  if (stream == streams_->legacy() && graphs_.captures_blocking_stream()) return cuda::kErrorStreamCaptureImplicit;
  // On a device it would become a child graph; nothing here launches into a capture.
  if (const Result refused = graphs_.refuse_in_capture(stream); refused != cuda::kSuccess) return refused;
  return graphs_.launch(exec, stream, *streams_, *operation_locked("cuGraphLaunch"));
}

Result StandinWorld::cuGraphExecDestroy(cuda::GraphExec exec) {
  const Lock lock(mutex_);
  return graphs_.destroy(exec, *streams_) ? cuda::kSuccess : cuda::kErrorInvalidValue;
}

Result StandinWorld::cuGraphDestroy(cuda::Graph graph) {
  const Lock lock(mutex_);
  return graphs_.destroy(graph) ? cuda::kSuccess : cuda::kErrorInvalidValue;
}

Result StandinWorld::cuThreadExchangeStreamCaptureMode(int* mode) {
  const Lock lock(mutex_);
  if (mode == nullptr || *mode < 0 || *mode > cuda::kStreamCaptureModeRelaxed) return cuda::kErrorInvalidValue;
  std::swap(*mode, thread_locked().capture_mode);
  return cuda::kSuccess;
}

}  // namespace tp
