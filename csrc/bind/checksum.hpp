// SPDX-License-Identifier: Apache-2.0
// Checksums for what Python writes to files of its own.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/tree_checksum.hpp"

namespace tp {

inline std::uint64_t checksum_of(const pybind11::buffer& bytes) {
  const pybind11::buffer_info info = bytes.request();
  if (info.ndim != 1 || info.itemsize != 1 || (info.size > 0 && info.strides[0] != 1))
    throw pybind11::value_error("tree_checksum takes bytes that lie one after the other");
  const std::span<const std::byte> span(static_cast<const std::byte*>(info.ptr), static_cast<std::size_t>(info.size));
  const pybind11::gil_scoped_release no_gil;
  return tree_checksum(span);
}

inline void bind_checksum(pybind11::module_& module) {
  module.def("tree_checksum", &checksum_of, pybind11::arg("bytes"),
             "XXH3-64 of every 4 KiB, then of the hashes, and so on until one is left: base/tree_checksum.hpp. Bytes "
             "that differ in trailing zeros alone may have the same. ValueError.");
}

}  // namespace tp
