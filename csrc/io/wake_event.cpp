// SPDX-License-Identifier: Apache-2.0
#include "io/wake_event.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>

#include "base/check.hpp"
#include "base/error.hpp"

namespace tp {

WakeEvent::WakeEvent() : descriptor_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (descriptor_ >= 0) return;
  const int error_number = errno;
  throw Error(ErrorKind::engine,
              "eventfd() failed: " + describe_errno(error_number) +
                  ". The process is probably out of file descriptors; raise `ulimit -n`.",
              error_number);
}

WakeEvent::~WakeEvent() { close(descriptor_); }

void WakeEvent::signal() noexcept {
  // May run in a signal handler: only write(2), and errno as it was. EAGAIN means 2^64-2 signals are pending already.
  const int errno_before = errno;
  const std::uint64_t one = 1;
  const ssize_t written = write(descriptor_, &one, sizeof(one));
  TP_CHECK(written == sizeof(one) || errno == EAGAIN);
  errno = errno_before;
}

bool WakeEvent::consume() noexcept {
  std::uint64_t count = 0;
  const ssize_t got = read(descriptor_, &count, sizeof(count));
  TP_CHECK(got == sizeof(count) || errno == EAGAIN);
  return got == sizeof(count);
}

Deadline::Deadline(std::chrono::nanoseconds timeout) : endless_(timeout == kWaitForever) {
  using Clock = std::chrono::steady_clock;
  TP_CHECK(timeout.count() >= 0);
  const Clock::time_point now = Clock::now();
  // A timeout that the clock can't hold is as good as endless.
  if (timeout > Clock::time_point::max() - now) endless_ = true;
  at_ = endless_ ? Clock::time_point::max() : now + timeout;
}

std::chrono::nanoseconds Deadline::remaining() const {
  TP_CHECK(!endless_);
  const auto left = at_ - std::chrono::steady_clock::now();
  return std::max(std::chrono::nanoseconds(left), std::chrono::nanoseconds(0));
}

void wait_for_events(const WakeEvent& first, const WakeEvent* second, const Deadline& deadline) {
  std::array<pollfd, 2> polled{{{first.descriptor(), POLLIN, 0}, {second ? second->descriptor() : -1, POLLIN, 0}}};
  for (;;) {
    timespec left{};
    if (!deadline.endless()) {
      const auto left_ns = deadline.remaining().count();
      left.tv_sec = left_ns / 1'000'000'000;
      left.tv_nsec = left_ns % 1'000'000'000;
    }
    const int ready = ppoll(polled.data(), polled.size(), deadline.endless() ? nullptr : &left, nullptr);
    if (ready >= 0) return;
    TP_CHECK(errno == EINTR);
  }
}

}  // namespace tp
