// SPDX-License-Identifier: Apache-2.0
#include "sim/standin_graph.hpp"

#include <algorithm>
#include <utility>

namespace tp {

using cuda::Result;

StandinCapture::Member* StandinCapture::find(const StandinStreamPointer& stream) {
  const auto found =
      std::find_if(members.begin(), members.end(), [&](const Member& each) { return each.stream == stream; });
  return found != members.end() ? &*found : nullptr;
}

void StandinGraphs::clear() {
  captures_.clear();
  graphs_.clear();
  execs_.clear();
}

// ---------------------------------------------------------------- captures

std::optional<StandinGraphs::Member> StandinGraphs::find(const StandinStreamPointer& stream) {
  for (const std::shared_ptr<StandinCapture>& capture : captures_) {
    if (StandinCapture::Member* member = capture->find(stream)) return Member{capture, member};
  }
  return std::nullopt;
}

Result StandinGraphs::begin(const StandinStreamPointer& stream, int mode, cuda::Graph handle) {
  if (find(stream)) return cuda::kErrorIllegalState;
  auto capture = std::make_shared<StandinCapture>();
  capture->id = ++captures_begun_;
  capture->mode = mode;
  capture->thread = std::this_thread::get_id();
  capture->handle = handle;
  capture->graph = std::make_shared<StandinGraph>();
  capture->members.push_back({stream, {}});
  captures_.push_back(std::move(capture));
  return cuda::kSuccess;
}

Result StandinGraphs::end(const StandinStreamPointer& stream, cuda::Graph* graph) {
  *graph = nullptr;
  const std::optional<Member> found = find(stream);
  if (!found) return cuda::kErrorIllegalState;
  const std::shared_ptr<StandinCapture> capture = found->capture;
  if (capture->members.front().stream != stream) {
    capture->is_invalidated = true;
    return cuda::kErrorStreamCaptureUnmatched;
  }
  if (capture->mode != cuda::kStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id())
    return cuda::kErrorStreamCaptureWrongThread;
  std::erase(captures_, capture);
  if (capture->is_invalidated) return cuda::kErrorStreamCaptureInvalidated;
  // Everything of the other streams has to come before the end of the first one.
  std::vector<bool> joined(capture->graph->nodes.size());
  std::vector<std::size_t> left = capture->members.front().frontier;
  while (!left.empty()) {
    const std::size_t node = left.back();
    left.pop_back();
    if (joined[node]) continue;
    joined[node] = true;
    left.insert(left.end(), capture->graph->nodes[node].after.begin(), capture->graph->nodes[node].after.end());
  }
  for (const StandinCapture::Member& member : capture->members) {
    for (const std::size_t node : member.frontier) {
      if (!joined[node]) return cuda::kErrorStreamCaptureUnjoined;
    }
  }
  capture->graph->lane_count = capture->members.size();
  graphs_[capture->handle] = capture->graph;
  *graph = capture->handle;
  return cuda::kSuccess;
}

bool StandinGraphs::captures_blocking_stream() const {
  return std::any_of(captures_.begin(), captures_.end(), [](const auto& capture) {
    return std::any_of(capture->members.begin(), capture->members.end(), [](const StandinCapture::Member& member) {
      return (member.stream->flags & cuda::kStreamNonBlocking) == 0;
    });
  });
}

std::optional<Result> StandinGraphs::add(const StandinStreamPointer& stream, const StandinOperation& operation,
                                         bool legacy) {
  if (legacy && captures_blocking_stream()) {
    invalidate_all();
    return cuda::kErrorStreamCaptureImplicit;
  }
  const std::optional<Member> found = find(stream);
  if (!found) return std::nullopt;
  if (found->capture->is_invalidated) return cuda::kErrorStreamCaptureInvalidated;
  const auto lane = static_cast<std::size_t>(found->member - found->capture->members.data());
  StandinGraph& graph = *found->capture->graph;
  add_node(graph, {{operation}, lane, found->member->frontier}, new_node_handle());
  found->member->frontier = {graph.nodes.size() - 1};
  return cuda::kSuccess;
}

std::optional<StandinCapturePoint> StandinGraphs::record(const StandinStreamPointer& stream) {
  const std::optional<Member> found = find(stream);
  if (!found) return std::nullopt;
  return StandinCapturePoint{found->capture, found->member->frontier};
}

std::optional<Result> StandinGraphs::wait(const StandinStreamPointer& stream, const StandinCapturePoint& point,
                                          bool legacy) {
  const std::optional<Member> found = find(stream);
  if (found && found->capture->is_invalidated) return cuda::kErrorStreamCaptureInvalidated;
  if (point.capture == nullptr) {
    if (!found) return std::nullopt;
    found->capture->is_invalidated = true;
    return cuda::kErrorStreamCaptureIsolation;
  }
  if (std::find(captures_.begin(), captures_.end(), point.capture) == captures_.end()) return cuda::kErrorCapturedEvent;
  if (legacy || point.capture->is_invalidated) {
    point.capture->is_invalidated = true;
    return legacy ? cuda::kErrorStreamCaptureImplicit : cuda::kErrorStreamCaptureInvalidated;
  }
  if (found && found->capture != point.capture) {
    found->capture->is_invalidated = point.capture->is_invalidated = true;
    return cuda::kErrorStreamCaptureMerge;
  }
  if (!found) {
    point.capture->members.push_back({stream, point.nodes});
    return cuda::kSuccess;
  }
  std::vector<std::size_t>& frontier = found->member->frontier;
  for (const std::size_t node : point.nodes) {
    if (std::find(frontier.begin(), frontier.end(), node) == frontier.end()) frontier.push_back(node);
  }
  return cuda::kSuccess;
}

Result StandinGraphs::refuse_in_capture(const StandinStreamPointer& stream) {
  const std::optional<Member> found = find(stream);
  if (!found) return cuda::kSuccess;
  found->capture->is_invalidated = true;
  return cuda::kErrorStreamCaptureUnsupported;
}

bool StandinGraphs::allows_unsafe_call(int thread_mode) {
  bool allowed = true;
  for (const std::shared_ptr<StandinCapture>& capture : captures_) {
    const bool own = capture->thread == std::this_thread::get_id();
    const bool forbids =
        thread_mode != cuda::kStreamCaptureModeRelaxed &&
        ((own && capture->mode != cuda::kStreamCaptureModeRelaxed) ||
         (thread_mode == cuda::kStreamCaptureModeGlobal && capture->mode == cuda::kStreamCaptureModeGlobal));
    if (!forbids) continue;
    capture->is_invalidated = true;
    allowed = false;
  }
  return allowed;
}

bool StandinGraphs::invalidate_all() {
  for (const std::shared_ptr<StandinCapture>& capture : captures_) capture->is_invalidated = true;
  return !captures_.empty();
}

// ---------------------------------------------------------------- graphs

std::shared_ptr<StandinGraph> StandinGraphs::find(cuda::Graph graph) const {
  for (const std::shared_ptr<StandinCapture>& capture : captures_) {
    if (capture->handle == graph) return capture->graph;
  }
  const auto found = graphs_.find(graph);
  return found != graphs_.end() ? found->second : nullptr;
}

bool StandinGraphs::is_node(const StandinGraph& graph, cuda::GraphNode node, std::size_t* index) const {
  const auto found = std::find(graph.handles.begin(), graph.handles.end(), node);
  if (found == graph.handles.end()) return false;
  *index = static_cast<std::size_t>(found - graph.handles.begin());
  return true;
}

void StandinGraphs::add_node(StandinGraph& graph, StandinNode node, cuda::GraphNode handle) {
  graph.nodes.push_back(std::move(node));
  graph.handles.push_back(handle);
}

Result StandinGraphs::instantiate(cuda::Graph graph, cuda::GraphExec handle, StandinStreams& streams) {
  const auto found = graphs_.find(graph);
  if (found == graphs_.end()) return cuda::kErrorInvalidValue;
  Exec exec{*found->second, {}, nullptr};
  for (std::size_t lane = 1; lane < exec.graph.lane_count; ++lane) exec.lanes.push_back(streams.create_lane_locked());
  execs_.emplace(handle, std::move(exec));
  return cuda::kSuccess;
}

Result StandinGraphs::launch(cuda::GraphExec handle, const StandinStreamPointer& stream, StandinStreams& streams,
                             const StandinOperation& begin) {
  const auto found = execs_.find(handle);
  if (found == execs_.end()) return cuda::kErrorInvalidHandle;
  Exec& exec = found->second;
  const auto first = std::make_shared<StandinOperation>(begin);
  if (exec.last_launch != nullptr) first->after.push_back(exec.last_launch);
  streams.enqueue_locked(stream, first);
  const auto last = std::make_shared<StandinOperation>();
  last->call = begin.call;
  std::vector<StandinOperationPointer> ends;  // by node
  for (const StandinNode& node : exec.graph.nodes) {
    std::vector<StandinOperationPointer> after{first};
    for (const std::size_t before : node.after) after.push_back(ends[before]);
    for (const StandinOperation& part : node.operations) {
      const auto operation = std::make_shared<StandinOperation>(part);
      operation->after = std::exchange(after, {});
      streams.enqueue_locked(node.lane == 0 ? stream : exec.lanes[node.lane - 1], operation);
      after = {operation};
    }
    ends.push_back(after.front());
    last->after.push_back(after.front());
  }
  streams.enqueue_locked(stream, last);
  exec.last_launch = last;
  return cuda::kSuccess;
}

bool StandinGraphs::destroy(cuda::GraphExec handle, StandinStreams& streams) {
  const auto found = execs_.find(handle);
  if (found == execs_.end()) return false;
  for (const StandinStreamPointer& lane : found->second.lanes) streams.destroy_lane_locked(lane);
  execs_.erase(found);
  return true;
}

}  // namespace tp
