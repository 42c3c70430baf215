// SPDX-License-Identifier: Apache-2.0
// An acquire under way: its pages are pinned from the start and come in behind demand, while the caller goes on.
//
// Threads: one at a time. Blocking: wait() only. Ownership: the pins are the ticket's until release() or its end; it
// must not outlive the pager's residency. Errors: wait() throws what a blocking acquire would have thrown; the pins
// stay until release().
#pragma once

#include "pager/residency.hpp"

namespace tp {

class Ticket {
 public:
  Ticket(Residency& residency, SetId set);  // Error(budget), Error(closed), Error(invalid)
  ~Ticket() { release(); }
  Ticket(const Ticket&) = delete;
  Ticket& operator=(const Ticket&) = delete;

  SetId set() const noexcept { return set_; }
  bool done() const noexcept { return waiter_.outcome.load(std::memory_order_acquire) != 0; }
  // As Residency::acquire: the point of the copies, on a device.
  std::uint64_t wait(const Residency::Interrupted& interrupted) {
    return residency_.finish_ticket(set_, waiter_, interrupted);
  }
  // Idempotent; transfers in flight go on. release_point as in Residency::release.
  void release(std::uint64_t release_point = 0) noexcept;

 private:
  Residency& residency_;
  SetId set_;
  Waiter waiter_;
  bool released_ = false;
};

}  // namespace tp
