// SPDX-License-Identifier: Apache-2.0
#include "base/error.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "base/check.hpp"

namespace tp {

std::string describe_errno(int error_number) {
  const char* words = strerrordesc_np(error_number);  // thread-safe, glibc 2.32
  const char* name = strerrorname_np(error_number);
  if (words == nullptr || name == nullptr) return "errno " + std::to_string(error_number);
  return std::string(words) + " (" + name + ")";
}

void check_failed(const char* expression, const char* file, int line) noexcept {
  std::fprintf(stderr, "tensorpager: assertion failed: %s (%s:%d). This is a bug; please report it.\n", expression,
               file, line);
  std::abort();
}

}  // namespace tp
