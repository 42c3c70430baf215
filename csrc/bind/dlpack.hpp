// SPDX-License-Identifier: Apache-2.0
// The part of DLPack's C ABI (version 0.8, unversioned capsules) that hands out a one-dimensional byte tensor.
#pragma once

#include <cstdint>

namespace tp::dlpack {

inline constexpr std::int32_t kCpu = 1, kCuda = 2;

struct Device {
  std::int32_t type = kCpu;
  std::int32_t id = 0;
};

struct DataType {
  std::uint8_t code;  // 1: unsigned integer
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t dimensions;
  DataType type;
  std::int64_t* shape;
  std::int64_t* strides;  // null: compact
  std::uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor* self);
};

static_assert(sizeof(Tensor) == 48 && sizeof(ManagedTensor) == 64, "the ABI that every reader of DLPack compiles in");

}  // namespace tp::dlpack
