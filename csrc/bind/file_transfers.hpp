// SPDX-License-Identifier: Apache-2.0
// The part of the Python module that moves bytes between files and memory, and gives out memory that suits it.
#pragma once

#include <pybind11/pybind11.h>

namespace tp {

void bind_file_transfers(pybind11::module_& module);

}  // namespace tp
