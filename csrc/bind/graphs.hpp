// SPDX-License-Identifier: Apache-2.0
// The part of Pager's Python class that CUDA graphs need: page operations that go to a capture instead, sets joined to
// larger ones, and what a stream has captured.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "bind/page_operations.hpp"
#include "device/graph_capture.hpp"
#include "pager/pager.hpp"

namespace tp {

inline std::uint32_t join_sets(Pager& pager, const std::vector<std::uint32_t>& sets, const std::string& name) {
  std::vector<AddressRange> ranges;
  for (const std::uint32_t set : sets) {
    for (const PageId page : pager.set(SetId{set}).pages) ranges.push_back({pager.space()->address(page), 1});
  }
  return pager.add_set(ranges, name).value;
}

inline void bind_gated_graph(pybind11::module_& module) {
  namespace py = pybind11;
  py::class_<GatedGraph>(module, "GatedGraph",
                         "One CUDA graph that waits for its pages; see csrc/pager/gated_graph.hpp. One thread.",
                         py::release_gil_before_calling_cpp_dtor())
      .def(
          "step",
          [](GatedGraph& self, std::uint32_t set, std::uintptr_t stream) { self.step(SetId{set}, stream_of(stream)); },
          py::arg("set_id"), py::arg("stream"),
          "What the stream, which is being captured, captures from now on uses these pages alone. DeviceError, "
          "ValueError.")
      .def(
          "writes", [](GatedGraph& self, std::uint32_t set) { self.writes(SetId{set}); }, py::arg("set_id"),
          "The step that is being captured modifies these pages, which are of its set. ValueError.")
      .def(
          "end", [](GatedGraph& self, std::uintptr_t stream) { self.end(stream_of(stream)); }, py::arg("stream"),
          "The last of it was captured. DeviceError, ValueError.")
      .def(
          "replay",
          [](GatedGraph& self, std::uintptr_t stream, const py::typing::Callable<py::object()>& launch) {
            const py::gil_scoped_release no_gil;
            self.replay(stream_of(stream), [&launch] {
              const py::gil_scoped_acquire gil;
              launch();
            });
          },
          py::arg("stream"), py::arg("launch"),
          "launch() launches the graph in the stream, the one that it was made for; returns when its last gate is "
          "open. "
          "Signals wait as long. After an error nothing of the pager can be used: IoError, BudgetError, DeviceError, "
          "ClosedError; ValueError.")
      .def_property_readonly("step_count", &GatedGraph::step_count);
}

inline void bind_graphs(pybind11::class_<Pager>& pager) {
  namespace py = pybind11;
  pager
      .def(
          "probe_gates",
          [](Pager& self, std::uintptr_t stream) {
            const py::gil_scoped_release no_gil;
            const GateFacts facts = self.probe_gates(stream_of(stream));
            return std::pair(facts.usable, facts.reason);
          },
          py::arg("stream"),
          "Whether a graph in this stream may wait for pages that are asked for after its launch, and why. Tried out; "
          "waits for the stream. DeviceError.")
      .def(
          "make_gated_graph",
          [](Pager& self, std::uintptr_t stream, std::size_t steps_max) {
            const py::gil_scoped_release no_gil;
            return self.make_gated_graph(stream_of(stream), steps_max);
          },
          py::arg("stream"), py::arg("steps_max"), py::keep_alive<0, 1>(),
          "A graph that is launched in this stream. EngineError with the reason where probe_gates() says no; "
          "DeviceError.");
  pager
      .def(
          "redirect",
          [](const Pager& self, const py::object& handler) { Redirection::of_this_thread().set(self, handler); },
          py::arg("handler"),
          "From now on this thread's acquire, release, hold and mark_written of this pager are calls of the handler's "
          "methods of these names, with every argument; what a handler calls itself is not. None ends that. One pager "
          "at a time.")
      .def("join_sets", &join_sets, py::arg("set_ids"), py::arg("name"),
           "The set of all pages of these sets; see add_set. ValueError.")
      .def(
          "captured_nothing",
          [](const Pager& self, std::uintptr_t stream) {
            if (self.device() == nullptr) throw Error(ErrorKind::invalid, "the host has no streams to capture");
            return captured_nothing(*self.device(), stream_of(stream));
          },
          py::arg("stream"),
          "Whether no work of a stream, which is being captured, is in the graph yet. DeviceError, ValueError.");
}

}  // namespace tp
