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

  bool done() const noexcept { return waiter_.outcome.load(std::memory_order_acquire) != 0; }
  void wait(const Residency::Interrupted& interrupted) { residency_.finish_ticket(waiter_, interrupted); }
  void release() noexcept;  // idempotent; transfers in flight go on

 private:
  Residency& residency_;
  SetId set_;
  Waiter waiter_;
  bool released_ = false;
};

}  // namespace tp
