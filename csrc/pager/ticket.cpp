// SPDX-License-Identifier: Apache-2.0
#include "pager/ticket.hpp"

#include "base/check.hpp"

namespace tp {

Ticket::Ticket(Residency& residency, SetId set) : residency_(residency), set_(set) {
  waiter_.prefetch = true;
  residency_.begin_ticket(set, waiter_);
  TP_CHECK(!waiter_.pages.empty() || done());
}

void Ticket::release(std::uint64_t release_point) noexcept {
  if (released_) return;
  released_ = true;
  residency_.end_ticket(set_, waiter_, release_point);
}

}  // namespace tp
