// SPDX-License-Identifier: Apache-2.0
// The Python classes of a pagefile.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "pager/page_size.hpp"
#include "pager/pagefile.hpp"

namespace tp {

// A pagefile of Python's until a pager takes it over.
struct OwnedPagefile {
  std::optional<Pagefile> pagefile;
  Pagefile& get() {
    if (pagefile) return *pagefile;
    throw Error(ErrorKind::closed, "the pagefile was closed, or given to a pager, which commits to it from now on");
  }
};

inline PageId page_of(OwnedPagefile& self, std::uint32_t page) {
  if (page >= self.get().page_count()) throw pybind11::index_error("page " + std::to_string(page));
  return PageId{page};
}

using PagefileClass = pybind11::class_<OwnedPagefile, std::shared_ptr<OwnedPagefile>>;

inline void bind_pagefile_commits(PagefileClass& pagefile) {
  namespace py = pybind11;
  pagefile.def_property_readonly("page_bytes", [](OwnedPagefile& self) { return self.get().page_bytes(); })
      .def_property_readonly("page_count", [](OwnedPagefile& self) { return self.get().page_count(); })
      .def_property_readonly("commit_number", [](OwnedPagefile& self) { return self.get().commit_number(); })
      .def_property_readonly("metadata",
                             [](OwnedPagefile& self) {
                               const std::span<const std::byte> bytes = self.get().metadata();
                               return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
                             })
      .def_property_readonly(
          "prepared", [](OwnedPagefile& self) { return self.get().prepared(); },
          "Whether the commit after the last is prepared, and publish() or abandon() has to decide on it.")
      .def_property_readonly("prepared_metadata",
                             [](OwnedPagefile& self) {
                               const std::span<const std::byte> bytes = self.get().prepared_metadata();
                               return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
                             })
      .def(
          "publish", [](OwnedPagefile& self) { self.get().publish(); }, py::call_guard<py::gil_scoped_release>(),
          "Make the prepared commit the last one. IoError, ValueError.")
      .def(
          "abandon", [](OwnedPagefile& self) { self.get().abandon(); }, py::call_guard<py::gil_scoped_release>(),
          "Drop the prepared commit. IoError, ValueError.");
}

inline void bind_pagefile_pages(PagefileClass& pagefile) {
  namespace py = pybind11;
  pagefile
      .def(
          "stored",
          [](OwnedPagefile& self, std::uint32_t page) { return self.get().record(page_of(self, page)).extent.valid(); },
          py::arg("page"), "Whether the page takes room; one that does not is all zeros. IndexError.")
      .def(
          "read",
          [](OwnedPagefile& self, std::uint32_t page) {
            const PageId id = page_of(self, page);
            py::bytearray result;
            if (PyByteArray_Resize(result.ptr(), static_cast<Py_ssize_t>(self.get().page_bytes())) != 0)
              throw py::error_already_set();
            const std::span<std::byte> bytes(reinterpret_cast<std::byte*>(PyByteArray_AS_STRING(result.ptr())),
                                             self.get().page_bytes());
            const py::gil_scoped_release no_gil;
            self.get().read(id, bytes);
            return result;
          },
          py::arg("page"), "The page's bytes. IoError when they are not those that were written; IndexError.")
      .def(
          "check", [](OwnedPagefile& self, std::uint32_t page) { return self.get().check(page_of(self, page)); },
          py::arg("page"), py::call_guard<py::gil_scoped_release>(),
          "Reads a page of the last commit. What is wrong with it, or None. IndexError.");
}

inline void bind_pagefile(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("choose_host_page_bytes", &choose_host_page_bytes, py::arg("budget_bytes"),
             "The page size of a host pager with this budget, unless another is asked for.");
  py::class_<DamagedPage>(module, "DamagedPage", "A page of a pagefile whose bytes are not those that were written.")
      .def_property_readonly("page", [](const DamagedPage& self) { return self.page.value; })
      .def_readonly("file", &DamagedPage::file)
      .def_readonly("offset_bytes", &DamagedPage::offset_bytes)
      .def_readonly("why", &DamagedPage::why);
  PagefileClass pagefile(module, "Pagefile",
                         "A durable store of pages, open: nobody else can open it meanwhile. One thread.");
  pagefile
      .def_static(
          "create",
          [](const std::vector<std::string>& directories, std::uint64_t page_bytes,
             const std::vector<double>& weights) {
            PagefileOptions options;
            options.weights = weights;
            return OwnedPagefile{Pagefile::create(directories, page_bytes, options)};
          },
          py::arg("directories"), py::kw_only(), py::arg("page_bytes"), py::arg("weights") = std::vector<double>{},
          py::call_guard<py::gil_scoped_release>(),
          "In directories that exist and hold none. weights: how they share the pages. IoError, ValueError.")
      .def_static(
          "open",
          [](const std::vector<std::string>& directories, const std::vector<double>& weights) {
            PagefileOptions options;
            options.weights = weights;
            return OwnedPagefile{Pagefile::open(directories, options)};
          },
          py::arg("directories"), py::kw_only(), py::arg("weights") = std::vector<double>{},
          py::call_guard<py::gil_scoped_release>(), "The last commit. The same directories in the same order. IoError.")
      .def("close", [](OwnedPagefile& self) { self.pagefile.reset(); });
  bind_pagefile_commits(pagefile);
  bind_pagefile_pages(pagefile);
}

}  // namespace tp
