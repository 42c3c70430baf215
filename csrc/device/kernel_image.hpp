// SPDX-License-Identifier: Apache-2.0
// The compiled kernels: machine code for the architectures of CMakeLists.txt, and PTX, which the driver compiles for
// any newer one. Empty where no nvcc was found when this was built.
#pragma once

#include <cstddef>
#include <span>

namespace tp {

std::span<const std::byte> kernel_image() noexcept;

}  // namespace tp
