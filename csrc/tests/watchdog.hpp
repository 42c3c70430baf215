// SPDX-License-Identifier: Apache-2.0
// Programs that may hang on the stand-in device, with an end to it.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>

#include "base/error.hpp"
#include "sim/standin_driver.hpp"

namespace tp::test {

inline constexpr std::chrono::seconds kHangsAfter{30};  // a machine that is busy is not a hang

// Whether the program ends. It does not when the device has been stuck, looked at again and again, for `stuck_for`, or
// when nothing else tells within kHangsAfter: then the context is lost, which ends every wait for the device, and what
// the program throws for it is caught.
inline bool ends(StandinDriver& standin, const std::function<void()>& program,
                 std::chrono::milliseconds stuck_for = std::chrono::milliseconds(300)) {
  std::atomic<bool> ended{false};
  std::thread thread([&] {
    try {
      program();
    } catch (const Error&) {
      if (standin.context_error() == cuda::kSuccess) throw;
    }
    ended = true;
  });
  const auto begin = std::chrono::steady_clock::now();
  auto went_on = begin;
  bool hangs = false;
  while (!ended && !hangs) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const auto now = std::chrono::steady_clock::now();
    if (!standin.is_stuck()) went_on = now;
    hangs = now - went_on > stuck_for || now - begin > kHangsAfter;
  }
  if (!ended) standin.lose_context(cuda::kErrorLaunchFailed);
  thread.join();
  return !hangs;
}

}  // namespace tp::test
