// SPDX-License-Identifier: Apache-2.0
#include "pager/fault_handler.hpp"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <mutex>

#include "base/check.hpp"

namespace tp {
namespace {

struct Attached {
  std::atomic<AddressSpace*> space{nullptr};
  std::atomic<Residency*> residency{nullptr};
  std::atomic<unsigned> users{0};       // handlers inside
  std::atomic<unsigned> generation{0};  // fork_generation() of the process it belongs to
  std::atomic<bool> closed{false};      // kept for the message alone: gives way to an open pager
};

std::array<Attached, 64> attached;  // constant-initialised, never destroyed before the last thread
std::mutex attaching;               // not for handlers
std::atomic<unsigned> generation{0};
struct sigaction previous_action;

void say(const char* text) noexcept {
  const ssize_t written = write(STDERR_FILENO, text, std::strlen(text));
  static_cast<void>(written);  // there is nowhere left to report to
}

enum class Outcome { not_ours, served, refused };

// Whether the trapped access was a write. Where the processor does not tell, a write to a resident page traps again as
// such.
bool is_write([[maybe_unused]] const void* context) noexcept {
#if defined(__x86_64__)
  constexpr long long kPageFaultWrite = 2;  // bit 1 of the page-fault error code
  return (static_cast<const ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] & kPageFaultWrite) != 0;
#else
  return true;
#endif
}

Outcome serve(Attached& entry, const void* address, const void* context) noexcept {
  entry.users.fetch_add(1);
  Outcome outcome = Outcome::not_ours;
  AddressSpace* space = entry.space.load();
  Residency* residency = entry.residency.load();
  const PageId page = space != nullptr && residency != nullptr ? space->find(address) : PageId{};
  if (page.valid()) {
    const char* reason = "it belongs to the parent process: paged tensors can't be used in a child of fork()";
    outcome = entry.generation.load() == generation.load() && residency->touch(page, is_write(context), &reason)
                  ? Outcome::served
                  : Outcome::refused;
    if (outcome == Outcome::refused) {
      say("tensorpager: a paged tensor's memory was accessed directly and could not be brought in: ");
      say(reason);
      say("\n");
    }
  }
  entry.users.fetch_sub(1);
  return outcome;
}

void hand_on(int signal_number, siginfo_t* info, void* context) noexcept {
  if ((previous_action.sa_flags & SA_SIGINFO) != 0 && previous_action.sa_sigaction != nullptr) {
    previous_action.sa_sigaction(signal_number, info, context);
  } else if (previous_action.sa_handler != SIG_DFL && previous_action.sa_handler != SIG_IGN) {
    previous_action.sa_handler(signal_number);
  } else {
    // The access runs again after the return, traps again, and the default action ends the process at the right place.
    struct sigaction action = {};
    action.sa_handler = SIG_DFL;
    sigaction(SIGSEGV, &action, nullptr);
  }
}

void on_fault(int signal_number, siginfo_t* info, void* context) {
  const int saved_errno = errno;
  for (Attached& entry : attached) {
    if (entry.residency.load() == nullptr) continue;
    const Outcome outcome = serve(entry, info->si_addr, context);
    if (outcome == Outcome::not_ours) continue;
    errno = saved_errno;
    if (outcome == Outcome::served) return;
    break;
  }
  errno = saved_errno;
  hand_on(signal_number, info, context);
}

void install() {
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  // NODEFER: while one thread waits inside, its own later faults (in a handler of somebody else) must still be seen.
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  if (sigaction(SIGSEGV, &action, &previous_action) != 0) {
    throw Error(ErrorKind::memory, "could not install the fault handler: " + describe_errno(errno), errno);
  }
}

}  // namespace

void count_forks() {
  static std::once_flag counted;
  std::call_once(counted, [] {
    pthread_atfork([] { attaching.lock(); }, [] { attaching.unlock(); },
                   [] {
                     generation.fetch_add(1);
                     attaching.unlock();
                   });
  });
}

unsigned fork_generation() noexcept { return generation.load(std::memory_order_relaxed); }

namespace {

void free_entry(Attached& entry) noexcept {
  entry.residency = nullptr;
  if (entry.generation.load() != generation.load()) entry.users = 0;  // a child of fork() has none of those threads
  while (entry.users.load() != 0) sched_yield();
  entry.space = nullptr;
  entry.closed = false;
}

Attached* entry_of(const Residency& residency) noexcept {
  for (Attached& entry : attached) {
    if (entry.residency.load() == &residency) return &entry;
  }
  return nullptr;
}

}  // namespace

void attach_fault_handler(AddressSpace& space, Residency& residency) {
  count_forks();
  static std::once_flag installed;
  std::call_once(installed, install);
  const std::lock_guard lock(attaching);
  const auto is_free = [](const Attached& entry) { return entry.residency.load() == nullptr; };
  auto place = std::find_if(attached.begin(), attached.end(), is_free);
  if (place == attached.end()) {
    place = std::find_if(attached.begin(), attached.end(), [](const Attached& entry) { return entry.closed.load(); });
    if (place != attached.end()) free_entry(*place);
  }
  if (place == attached.end()) {
    throw Error(ErrorKind::memory, "too many pagers at a time (" + std::to_string(attached.size()) + "); close some");
  }
  place->generation = generation.load();
  place->space = &space;
  place->residency = &residency;
}

void retire_fault_handler(const Residency& residency) noexcept {
  const std::lock_guard lock(attaching);
  if (Attached* entry = entry_of(residency)) entry->closed = true;
}

void detach_fault_handler(const Residency& residency) noexcept {
  const std::lock_guard lock(attaching);
  if (Attached* entry = entry_of(residency)) free_entry(*entry);
}

}  // namespace tp
