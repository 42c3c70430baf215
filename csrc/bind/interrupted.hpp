// SPDX-License-Identifier: Apache-2.0
// What calls that wait look at meanwhile: whether Python has a signal to handle (Ctrl-C).
#pragma once

#include <pybind11/pybind11.h>

#include <functional>

namespace tp {

inline const std::function<void()>& interrupted() {
  static const std::function<void()> callback = [] {
    const pybind11::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
  };
  return callback;
}

}  // namespace tp
