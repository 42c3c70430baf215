// SPDX-License-Identifier: Apache-2.0
// The part of Pager's Python class that CUDA graphs need: page operations that go to a capture instead, sets joined to
// larger ones, and what a stream has captured.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
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

inline void bind_graphs(pybind11::class_<Pager>& pager) {
  namespace py = pybind11;
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
            return captured_nothing(*self.device(), reinterpret_cast<cuda::Stream>(stream));
          },
          py::arg("stream"),
          "Whether no work of a stream, which is being captured, is in the graph yet. DeviceError, ValueError.");
}

}  // namespace tp
