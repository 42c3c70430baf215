// SPDX-License-Identifier: Apache-2.0
// New threads inherit the signal mask: with all signals blocked while they start, handlers run on the program's own.
#pragma once

#include <pthread.h>
#include <signal.h>

#include "base/check.hpp"

namespace tp {

class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    TP_CHECK(pthread_sigmask(SIG_SETMASK, &all, &before_) == 0);
  }
  ~SignalsBlocked() { TP_CHECK(pthread_sigmask(SIG_SETMASK, &before_, nullptr) == 0); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

}  // namespace tp
