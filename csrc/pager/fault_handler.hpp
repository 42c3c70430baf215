// SPDX-License-Identifier: Apache-2.0
// Demand paging of last resort: a raw access to an absent page (autograd's backward, a C++ extension, memcpy) traps,
// the page is brought in, and the access continues. The first write to a clean page traps too, and the page becomes
// dirty.
//
// How: one SIGSEGV handler for the process, installed with the first pager and never removed. For an address of a
// registered space it blocks the
//   faulting thread in Residency::touch() until the executor has done it; for any other address, or when the page can't
//   be had, it hands the signal to whoever had it before (after a message on stderr in our case), which ends the
//   process as without us.
// Why this is safe inside a signal handler: the signal is synchronous. It interrupts code that dereferences a paged
// tensor, never code
//   that holds our lock, and touch() allocates nothing when it succeeds.
// Limits: a system call given an absent page fails with EFAULT instead of trapping. A child of fork() has no executor:
// it gets the message. Threads: any. attach/detach by the pager's owner; detach waits for handlers that are using the
// pager.
#pragma once

#include "mem/address_space.hpp"
#include "pager/residency.hpp"

namespace tp {

void attach_fault_handler(AddressSpace& space, Residency& residency);  // Error(memory) beyond 64 pagers at a time
// After closing: an access still gets the message that says so, until detached or until the place is needed.
void retire_fault_handler(const Residency& residency) noexcept;
void detach_fault_handler(const Residency& residency) noexcept;

// True in a child of fork() of the process that created `generation`.
unsigned fork_generation() noexcept;
// From the first call on, fork_generation() counts. Pagers of both kinds need it.
void count_forks();

}  // namespace tp
