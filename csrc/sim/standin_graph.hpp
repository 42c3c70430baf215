// SPDX-License-Identifier: Apache-2.0
// Stream capture and graphs of the stand-in driver.
//
// While a stream is captured, what it is asked for becomes nodes of a graph instead of operations; edges are its own
// order and events. A launch makes operations of the nodes, with the values that they had when they were captured.
// Those captured from one stream are a *lane*: the lanes of a launch run side by side, as far as the edges allow, the
// first of them on the stream that it is launched in. A launch begins when that stream has come to it and the launch
// before of the same graph is through.
//
// What CUDA forbids during capture is refused with CUDA's errors, and invalidates the capture where CUDA says so.
//
// Threads: none; the driver's lock is around each call. Ownership: a launch keeps its operations, not its graph.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "device/cuda_abi.hpp"
#include "sim/standin_stream.hpp"

namespace tp {

// Its operations are done one after the other.
struct StandinNode {
  std::vector<StandinOperation> operations;
  std::size_t lane = 0;
  std::vector<std::size_t> after;  // nodes before it in the graph
};

struct StandinGraph {
  std::vector<StandinNode> nodes;
  std::vector<cuda::GraphNode> handles;  // by node
  std::size_t lane_count = 1;
};

struct StandinCapture {
  struct Member {
    StandinStreamPointer stream;
    std::vector<std::size_t> frontier;  // what the next node of this stream comes after
  };

  std::uint64_t id = 0;
  int mode = 0;
  std::thread::id thread;
  bool is_invalidated = false;
  cuda::Graph handle = nullptr;
  std::shared_ptr<StandinGraph> graph;
  std::vector<Member> members;  // by lane; the first began it

  Member* find(const StandinStreamPointer& stream);
};

// Where an event was recorded that was recorded into a capture.
struct StandinCapturePoint {
  std::shared_ptr<StandinCapture> capture;  // null: it was not
  std::vector<std::size_t> nodes;
};

class StandinGraphs {
 public:
  struct Member {
    std::shared_ptr<StandinCapture> capture;
    StandinCapture::Member* member = nullptr;
  };

  void clear();
  std::size_t count() const { return graphs_.size() + execs_.size(); }

  // ---- captures
  cuda::Result begin(const StandinStreamPointer& stream, int mode, cuda::Graph handle);
  cuda::Result end(const StandinStreamPointer& stream, cuda::Graph* graph);
  std::optional<Member> find(const StandinStreamPointer& stream);
  // Of a stream that is not captured, nothing: it runs the operation. `legacy`: the stream is the legacy default one.
  std::optional<cuda::Result> add(const StandinStreamPointer& stream, const StandinOperation& operation, bool legacy);
  std::optional<StandinCapturePoint> record(const StandinStreamPointer& stream);
  std::optional<cuda::Result> wait(const StandinStreamPointer& stream, const StandinCapturePoint& point, bool legacy);
  // The result of a call that no captured stream takes.
  cuda::Result refuse_in_capture(const StandinStreamPointer& stream);
  // The legacy stream depends on every blocking one; while such a one is captured it can't be used.
  bool captures_blocking_stream() const;
  // A call that CUDA calls potentially unsafe, by a thread in this mode: false when a capture forbids it, which then is
  // invalid.
  bool allows_unsafe_call(int thread_mode);
  bool invalidate_all();  // whether there was any

  // ---- graphs
  std::shared_ptr<StandinGraph> find(cuda::Graph graph) const;
  bool is_node(const StandinGraph& graph, cuda::GraphNode node, std::size_t* index) const;
  void add_node(StandinGraph& graph, StandinNode node, cuda::GraphNode handle);
  cuda::Result instantiate(cuda::Graph graph, cuda::GraphExec handle, StandinStreams& streams);
  cuda::Result launch(cuda::GraphExec exec, const StandinStreamPointer& stream, StandinStreams& streams,
                      const StandinOperation& begin);
  bool destroy(cuda::Graph graph) { return graphs_.erase(graph) != 0; }
  bool destroy(cuda::GraphExec exec, StandinStreams& streams);

  cuda::GraphNode new_node_handle() { return reinterpret_cast<cuda::GraphNode>(next_node_++); }

 private:
  struct Exec {
    StandinGraph graph;
    std::vector<StandinStreamPointer> lanes;  // of all lanes but the first
    StandinOperationPointer last_launch;      // its end
  };

  std::vector<std::shared_ptr<StandinCapture>> captures_;
  std::map<cuda::Graph, std::shared_ptr<StandinGraph>> graphs_;
  std::map<cuda::GraphExec, Exec> execs_;
  std::uint64_t captures_begun_ = 0;
  std::uintptr_t next_node_ = 0x100000;
};

}  // namespace tp
