// SPDX-License-Identifier: Apache-2.0
#include "io/uring_ring.hpp"

#include <sys/resource.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>

#include "base/check.hpp"
#include "base/error.hpp"

namespace tp {
namespace {

struct SetupFlags {
  unsigned flags;
  std::vector<std::string> names;
};

// Best first, with the kernel each needs. R_DISABLED (5.10) is not negotiable: restrictions need it.
std::vector<SetupFlags> setup_candidates(UringRing::Flags wanted) {
  const SetupFlags plain{0, {}};
  if (wanted == UringRing::Flags::plain) return {plain};
  return {
      // 6.1: completions are processed when the owner asks for them, with no interrupt of whatever it was doing.
      {IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_SUBMIT_ALL,
       {"SINGLE_ISSUER", "DEFER_TASKRUN", "SUBMIT_ALL"}},
      {IORING_SETUP_COOP_TASKRUN | IORING_SETUP_SUBMIT_ALL, {"COOP_TASKRUN", "SUBMIT_ALL"}},  // 5.19
      plain,
  };
}

// The first word of a small file of /proc, empty when it can't be read.
std::string read_proc_word(const char* path) {
  std::ifstream file(path);
  std::string word;
  file >> word;
  return word;
}

std::string explain_setup_refusal(int error_number) {
  const std::string disabled = read_proc_word("/proc/sys/kernel/io_uring_disabled");  // Linux 6.6+
  switch (error_number) {
    case EPERM:
    case EACCES:
      if (disabled == "2") {
        return "io_uring is switched off on this machine: the sysctl kernel.io_uring_disabled is 2. An administrator "
               "can "
               "set it to 0, or the pread engine can be used";
      }
      if (disabled == "1" && geteuid() != 0) {
        return "io_uring is limited to privileged processes: the sysctl kernel.io_uring_disabled is 1. Run with "
               "CAP_SYS_ADMIN, join the group of kernel.io_uring_group, or use the pread engine";
      }
      return "io_uring_setup is denied by a seccomp filter, as default container profiles do. Run the container with a "
             "profile that allows io_uring_setup, io_uring_enter and io_uring_register, or use the pread engine";
    case ENOSYS:
      if (!disabled.empty()) {
        return "the kernel has io_uring, but a seccomp filter or sandbox hides it. Allow io_uring_setup, "
               "io_uring_enter "
               "and io_uring_register there, or use the pread engine";
      }
      return "io_uring is missing: the kernel is older than 5.11, was built without CONFIG_IO_URING, or a sandbox "
             "hides "
             "it. Use the pread engine";
    case ENOMEM:
      return "there is no memory for the rings; before Linux 5.12 they count against RLIMIT_MEMLOCK (`ulimit -l`)";
    case EMFILE:
    case ENFILE: return "no file descriptor is left; raise `ulimit -n`";
    case EINVAL: return "the kernel is older than 5.11, which the uring engine needs. Use the pread engine";
    default: return "io_uring_setup failed";
  }
}

Error engine_error(const std::string& explanation, int error_number) {
  return {ErrorKind::engine, explanation + " [" + describe_errno(error_number) + "].", error_number};
}

}  // namespace

UringRing::UringRing(unsigned entries, unsigned files_max, Flags flags) : process_(getpid()) {
  TP_CHECK(entries > 0);
  TP_CHECK(files_max > 0);
  set_up(entries, flags);
  try {
    const int rc = io_uring_ring_dontfork(&ring_);
    if (rc < 0) throw engine_error("the rings could not be kept out of children (MADV_DONTFORK)", -rc);
    // -1 marks an empty place: a sparse table on every kernel, without IORING_RSRC_REGISTER_SPARSE (5.19).
    const std::vector<int> empty(files_max, -1);
    const int files_rc = io_uring_register_files(&ring_, empty.data(), files_max);
    if (files_rc < 0) throw engine_error("a table of registered files was refused", -files_rc);
    restrict();
    // A filter may let io_uring_setup through and refuse this. A ring that is not enabled says EBADFD.
    const int enter_rc = io_uring_enter(static_cast<unsigned>(ring_.ring_fd), 0, 0, 0, nullptr);
    if (enter_rc < 0 && enter_rc != -EBADFD) throw engine_error(explain_setup_refusal(-enter_rc), -enter_rc);
  } catch (...) {
    io_uring_queue_exit(&ring_);
    throw;
  }
}

UringRing::~UringRing() {
  // io_uring_queue_exit reads the shared rings, which a child of fork() has not got.
  if (getpid() == process_) {
    io_uring_queue_exit(&ring_);
  } else {
    close(ring_.ring_fd);
  }
}

void UringRing::set_up(unsigned entries, Flags flags) {
  int rc = -EINVAL;
  for (const SetupFlags& candidate : setup_candidates(flags)) {
    io_uring_params params{};
    params.flags = IORING_SETUP_R_DISABLED | candidate.flags;
    rc = io_uring_queue_init_params(entries, &ring_, &params);
    if (rc == 0) {
      features_ = candidate.names;
      break;
    }
    if (rc != -EINVAL) break;  // EINVAL: flags this kernel does not know
  }
  if (rc < 0) throw engine_error(explain_setup_refusal(-rc), -rc);

  // NODROP and SUBMIT_STABLE (5.5): completions are never lost, iovecs not kept. EXT_ARG (5.11): waits with a timeout.
  constexpr unsigned needed = IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE | IORING_FEAT_EXT_ARG;
  if ((ring_.features & needed) != needed) {
    io_uring_queue_exit(&ring_);
    throw engine_error(explain_setup_refusal(EINVAL), EINVAL);
  }
  features_.emplace_back("EXT_ARG");
}

void UringRing::restrict() {
  std::array<io_uring_restriction, 8> allowed{};
  std::size_t count = 0;
  // POLL_ADD is how wake() reaches a blocked wait(). Files are still added after the ring is enabled; memory is not.
  for (const auto opcode :
       {IORING_OP_READ, IORING_OP_WRITE, IORING_OP_READ_FIXED, IORING_OP_WRITE_FIXED, IORING_OP_POLL_ADD}) {
    allowed[count].opcode = IORING_RESTRICTION_SQE_OP;
    allowed[count++].sqe_op = static_cast<__u8>(opcode);
  }
  allowed[count].opcode = IORING_RESTRICTION_REGISTER_OP;
  allowed[count++].register_op = IORING_REGISTER_FILES_UPDATE;
  allowed[count].opcode = IORING_RESTRICTION_SQE_FLAGS_ALLOWED;
  allowed[count++].sqe_flags = IOSQE_FIXED_FILE;
  allowed[count].opcode = IORING_RESTRICTION_SQE_FLAGS_REQUIRED;
  allowed[count++].sqe_flags = IOSQE_FIXED_FILE;
  TP_CHECK(count == allowed.size());
  const int rc = io_uring_register_restrictions(&ring_, allowed.data(), static_cast<unsigned>(count));
  if (rc < 0) throw engine_error("the ring could not be restricted to the opcodes in use (Linux 5.10+)", -rc);
  features_.emplace_back("RESTRICTIONS");
}

void UringRing::enable() {
  TP_CHECK(!enabled_);
  TP_CHECK(getpid() == process_);
  const int rc = io_uring_enable_rings(&ring_);
  if (rc < 0) throw engine_error("the ring could not be enabled", -rc);
  enabled_ = true;
}

void UringRing::set_file(unsigned index, int descriptor) {
  TP_CHECK(descriptor >= 0);
  const int rc = io_uring_register_files_update(&ring_, index, &descriptor, 1);
  if (rc == 1) return;
  const int error_number = rc < 0 ? -rc : EINVAL;
  throw Error(ErrorKind::io,
              "descriptor " + std::to_string(descriptor) +
                  " could not be registered with io_uring: " + describe_errno(error_number),
              error_number);
}

void UringRing::clear_file(unsigned index) {
  const int nothing = -1;
  const int rc = io_uring_register_files_update(&ring_, index, &nothing, 1);
  if (rc == 1) return;
  const int error_number = rc < 0 ? -rc : EINVAL;
  throw Error(ErrorKind::io, "io_uring would not let go of a file: " + describe_errno(error_number), error_number);
}

int UringRing::register_buffers(std::span<const iovec> slices) {
  TP_CHECK(!enabled_);
  TP_CHECK(!slices.empty());
  if (buffers_registered_) TP_CHECK(io_uring_unregister_buffers(&ring_) == 0);
  const int rc = io_uring_register_buffers(&ring_, slices.data(), static_cast<unsigned>(slices.size()));
  buffers_registered_ = rc == 0;
  return -rc;
}

std::string explain_register_refusal(int error_number, std::size_t size_bytes) {
  TP_CHECK(error_number > 0);
  std::string reason = "the kernel refused to register " + std::to_string(size_bytes) + " bytes of memory [" +
                       describe_errno(error_number) + "]";
  if (error_number != ENOMEM && error_number != EPERM) return reason;
  rlimit limit{};
  TP_CHECK(getrlimit(RLIMIT_MEMLOCK, &limit) == 0);
  if (limit.rlim_cur == RLIM_INFINITY || limit.rlim_cur >= size_bytes) {
    return reason + "; RLIMIT_MEMLOCK would allow it, unless other processes of this user hold registered memory";
  }
  return reason + ": RLIMIT_MEMLOCK is " + std::to_string(limit.rlim_cur) +
         " bytes. Raise it (`ulimit -l`, LimitMEMLOCK=, --ulimit memlock=-1) or go on without: it costs CPU time only";
}

}  // namespace tp
