// SPDX-License-Identifier: Apache-2.0
// The part of Pager's Python class that records a pass: its steps, and what becomes of the pages' contents.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "pager/pager.hpp"

namespace tp {

inline pybind11::array_t<std::int32_t> record_end(Pager& pager) {
  const std::vector<std::int32_t> events = pager.recorder().end();
  return pybind11::array_t<std::int32_t>(static_cast<pybind11::ssize_t>(events.size()), events.data());
}

inline pybind11::array_t<std::int32_t> recorded_contents(Pager& pager) {
  const std::vector<ContentNote> notes = pager.recorder().contents();
  pybind11::array_t<std::int32_t> result({static_cast<pybind11::ssize_t>(notes.size()), pybind11::ssize_t{4}});
  auto rows = result.mutable_unchecked<2>();
  for (pybind11::ssize_t row = 0; row < rows.shape(0); ++row) {
    const ContentNote& note = notes[static_cast<std::size_t>(row)];
    rows(row, 0) = note.position;
    rows(row, 1) = static_cast<std::int32_t>(note.pages.first);
    rows(row, 2) = static_cast<std::int32_t>(note.pages.first + note.pages.count);
    rows(row, 3) = static_cast<std::int32_t>(note.change);
  }
  return result;
}

inline void bind_recording(pybind11::class_<Pager>& pager) {
  namespace py = pybind11;
  pager
      .def(
          "record_begin", [](Pager& self, bool dry) { self.recorder().begin(dry); }, py::arg("dry"),
          "Record this thread's acquire, hold and release; dry: they do nothing else.")
      .def("record_end", &record_end, "Events in order, int32: +(set_id + 1) acquire, -(set_id + 1) release.")
      .def("recorded_contents", &recorded_contents,
           "What the recording that ended last noted, int32 [notes, 4] in order: the events before it; first page, and "
           "the one behind the last; 0: modified (by the step acquired last, if it is open and has the page, else by "
           "the next that has), 1: ended (nobody will want what the page held).")
      .def(
          "note_modified",
          [](Pager& self, std::uintptr_t address, std::uint64_t size_bytes) {
            self.note_modified({reinterpret_cast<const std::byte*>(address), size_bytes});
          },
          py::arg("address"), py::arg("size_bytes"),
          "For the recording alone: the open step modifies the range. wanted() and discard() are noted by themselves. "
          "ValueError.");
}

}  // namespace tp
