// SPDX-License-Identifier: Apache-2.0
// Assertions: a false one is a mistake in this code, never in its input, and ends the process with the place.
// TP_CHECK stays on in release (control path). TP_DCHECK is for the hot path and is compiled out in release.
#pragma once

namespace tp {
[[noreturn]] void check_failed(const char* expression, const char* file, int line) noexcept;
}  // namespace tp

#define TP_CHECK(expression) \
  (static_cast<bool>(expression) ? void(0) : ::tp::check_failed(#expression, __FILE__, __LINE__))

#ifdef NDEBUG
#define TP_DCHECK(expression) void(0)
#else
#define TP_DCHECK(expression) TP_CHECK(expression)
#endif
