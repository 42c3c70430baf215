// SPDX-License-Identifier: Apache-2.0
// An eventfd: signalled by any thread or signal handler, consumed by one. Signals merge; none is lost.
#pragma once

#include <chrono>

namespace tp {

// What wait() takes for "no timeout".
inline constexpr std::chrono::nanoseconds kWaitForever = std::chrono::nanoseconds::max();

class WakeEvent {
 public:
  WakeEvent();  // throws Error(engine) when the process has no descriptor left
  ~WakeEvent();
  WakeEvent(const WakeEvent&) = delete;
  WakeEvent& operator=(const WakeEvent&) = delete;

  int descriptor() const noexcept { return descriptor_; }
  void signal() noexcept;   // one write(2), keeps errno
  bool consume() noexcept;  // true when it had been signalled; does not block

 private:
  int descriptor_ = -1;
};

// A point in time at which a wait gives up; kWaitForever never comes.
class Deadline {
 public:
  explicit Deadline(std::chrono::nanoseconds timeout);
  bool endless() const noexcept { return endless_; }
  std::chrono::nanoseconds remaining() const;  // 0 when past

 private:
  bool endless_;
  std::chrono::steady_clock::time_point at_;
};

// Blocks until one of two events is signalled (the second may be null) or the deadline. Consumes neither. A signal
// handler that runs meanwhile does not end it.
void wait_for_events(const WakeEvent& first, const WakeEvent* second, const Deadline& deadline);

}  // namespace tp
