// SPDX-License-Identifier: Apache-2.0
// A DLPack capsule of a one-dimensional uint8 tensor over bytes that somebody else owns, and keeps for as long as the
// tensor or anything over its storage lives.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "bind/dlpack.hpp"

namespace tp {

struct ByteTensor {
  std::shared_ptr<void> owner;
  std::int64_t shape[1];
  dlpack::ManagedTensor managed;
};

inline pybind11::capsule byte_tensor(std::byte* memory, std::uint64_t size_bytes, dlpack::Device device,
                                     std::shared_ptr<void> owner) {
  auto* tensor = new ByteTensor{std::move(owner), {static_cast<std::int64_t>(size_bytes)}, {}};
  tensor->managed.tensor = {memory, device, 1, {1, 8, 1}, tensor->shape, nullptr, 0};
  tensor->managed.context = tensor;
  tensor->managed.deleter = [](dlpack::ManagedTensor* managed) { delete static_cast<ByteTensor*>(managed->context); };
  return pybind11::capsule(&tensor->managed, "dltensor", [](PyObject* capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor") == 0) return;  // consumed: the tensor owns it now
    auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  });
}

}  // namespace tp
