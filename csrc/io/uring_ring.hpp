// SPDX-License-Identifier: Apache-2.0
// An io_uring instance that can do little: it is set up with the best flags the kernel takes, and restricted to the
// five opcodes the uring engine uses, on registered files only, before it is enabled. What is refused is explained.
//
// Threads. The ring is made disabled. Anyone may register files and memory until enable(); the thread that calls that
//          becomes the ring's one user (IORING_SETUP_SINGLE_ISSUER names the enabling thread the issuer). Destroying
//          is for any thread, with nothing in flight.
// Fork.    Its mappings are not inherited (dontfork); a child only closes the descriptor.
// Errors.  Error(engine) with the likely cause: seccomp, sysctl, kernel version, limits.
#pragma once

#include <liburing.h>

#include <span>
#include <string>
#include <vector>

namespace tp {

class UringRing {
 public:
  enum class Flags { best, plain };  // plain: what kernel 5.11 has

  UringRing(unsigned entries, unsigned files_max, Flags flags);
  ~UringRing();
  UringRing(const UringRing&) = delete;
  UringRing& operator=(const UringRing&) = delete;

  io_uring* get() noexcept { return &ring_; }
  const std::vector<std::string>& features() const noexcept { return features_; }
  bool enabled() const noexcept { return enabled_; }

  void enable();  // on the thread that will use the ring
  void set_file(unsigned index, int descriptor);
  void clear_file(unsigned index);
  // 0, or the errno value: memory comes in slices of at most kRegisteredBufferBytesMax. All or nothing; again replaces.
  int register_buffers(std::span<const iovec> slices);

 private:
  void set_up(unsigned entries, Flags flags);
  void restrict();

  io_uring ring_{};
  int process_ = 0;
  bool enabled_ = false;
  bool buffers_registered_ = false;
  std::vector<std::string> features_;
};

// Why the kernel refused to register memory and what to do, for facts().
std::string explain_register_refusal(int error_number, std::size_t size_bytes);

}  // namespace tp
