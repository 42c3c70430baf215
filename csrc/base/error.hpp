// SPDX-License-Identifier: Apache-2.0
// Two kinds of wrong. *Errors* (this file) are what a user or the machine can cause: typed, and their message says
// what failed, where, likely why, and what to do. *Assertions* (check.hpp) are mistakes in this code.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace tp {

// One value per exception class of tensorpager.errors; csrc/bind maps them by name.
enum class ErrorKind {
  io,       // a transfer or a call on a file failed -> IoError
  budget,   // what must be resident at once does not fit -> BudgetError
  memory,   // the kernel refused memory or a mapping -> MemoryMapError
  engine,   // an engine was asked for that can't run here -> EngineError
  closed,   // used after close() -> ClosedError
  forked,   // used in a child of fork() -> ForkedProcessError
  device,   // the device or its driver failed -> DeviceError
  invalid,  // an argument is out of range -> ValueError
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, std::string message, int error_number = 0)
      : std::runtime_error(std::move(message)), kind_(kind), error_number_(error_number) {}
  ErrorKind kind() const noexcept { return kind_; }
  int error_number() const noexcept { return error_number_; }  // errno value, or 0

 private:
  ErrorKind kind_;
  int error_number_;
};

// "Input/output error (EIO)": the words and the name, since people search for both.
std::string describe_errno(int error_number);

}  // namespace tp
