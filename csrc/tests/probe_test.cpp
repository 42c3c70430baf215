// SPDX-License-Identifier: Apache-2.0
#include "io/probe.hpp"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include <cerrno>
#include <filesystem>

#include "base/error.hpp"
#include "tests/child_process.hpp"

namespace tp {
namespace {

void expect_has(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << text;
}

EngineCandidate candidate(const std::string& engine) {
  for (const EngineCandidate& known : probe_engines()) {
    if (known.engine == engine) return known;
  }
  throw std::runtime_error("no candidate " + engine);
}

bool uring_usable() { return candidate("uring").usable; }

// What a user sees: which engine "auto" takes, and why uring can't run.
std::string auto_and_uring_reason() {
  const std::string taken = make_io_queue("auto", {})->facts().engine;
  return taken + " | " + candidate("uring").reason;
}

TEST(ProbeTest, candidates_come_best_first_each_with_a_reason) {
  const std::vector<EngineCandidate> candidates = probe_engines();
  ASSERT_EQ(candidates.size(), 3u);
  EXPECT_EQ(candidates[0].engine, "uring");
  EXPECT_EQ(candidates[1].engine, "pread");
  EXPECT_EQ(candidates[2].engine, "null");
  for (const EngineCandidate& known : candidates) EXPECT_FALSE(known.reason.empty());
  EXPECT_TRUE(candidates[1].usable);
}

TEST(ProbeTest, auto_takes_the_first_usable_and_never_null) {
  const std::string taken = make_io_queue("auto", {})->facts().engine;
  EXPECT_EQ(taken, uring_usable() ? "uring" : "pread");
  EXPECT_EQ(make_io_queue("null", {})->facts().engine, "null");
}

TEST(ProbeTest, probing_leaves_no_descriptor_open) {
  const auto open_descriptors = [] {
    return std::distance(std::filesystem::directory_iterator("/proc/self/fd"), std::filesystem::directory_iterator());
  };
  probe_engines();
  const auto before = open_descriptors();
  for (int round = 0; round < 5; ++round) probe_engines();
  EXPECT_EQ(open_descriptors(), before);
}

TEST(ProbeTest, an_unknown_engine_is_an_error_that_lists_the_known) {
  try {
    make_io_queue("libaio", {});
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::engine);
    expect_has(error.what(), "libaio");
    expect_has(error.what(), "uring, pread, null");
  }
}

TEST(ProbeTest, io_uring_denied_by_seccomp_falls_back_and_says_so) {
  for (const long call : {SYS_io_uring_setup, SYS_io_uring_enter}) {
    const test::ChildResult result = test::run_in_child([call] {
      test::deny_system_call(call, EPERM);
      return auto_and_uring_reason();
    });
    EXPECT_EQ(result.status, 0);
    expect_has(result.text, "pread | ");
    if (!uring_usable()) continue;  // some other reason came first
    expect_has(result.text, "seccomp");
    expect_has(result.text, "EPERM");
  }
}

TEST(ProbeTest, io_uring_hidden_by_a_sandbox_falls_back_and_says_so) {
  const test::ChildResult result = test::run_in_child([] {
    test::deny_system_call(SYS_io_uring_setup, ENOSYS);
    return auto_and_uring_reason();
  });
  EXPECT_EQ(result.status, 0);
  expect_has(result.text, "pread | ");
  expect_has(result.text, "ENOSYS");
  expect_has(result.text, "sandbox");
}

TEST(ProbeTest, an_engine_asked_for_by_name_that_cannot_run_is_an_error) {
  const test::ChildResult result = test::run_in_child([]() -> std::string {
    test::deny_system_call(SYS_io_uring_setup, EPERM);
    try {
      make_io_queue("uring", {});
    } catch (const Error& error) {
      return error.kind() == ErrorKind::engine ? "Error(engine)" : "another kind";
    }
    return "made";
  });
  EXPECT_EQ(result.text, "Error(engine)");
}

TEST(ProbeTest, a_kernel_without_the_newest_flags_still_runs_the_engine) {
  if (!uring_usable()) GTEST_SKIP() << candidate("uring").reason;
  IoQueueOptions options;
  options.plain_ring = true;
  const IoQueueFacts facts = make_io_queue("uring", options)->facts();
  EXPECT_EQ(facts.kernel_features, (std::vector<std::string>{"EXT_ARG", "RESTRICTIONS"}));
}

// 64 KiB of locked memory, and no privilege to exceed it: transfers go on, unregistered, and facts() has the reason.
TEST(ProbeTest, a_small_memlock_limit_leaves_memory_unregistered_with_the_reason) {
  if (geteuid() == 0 && !uring_usable()) GTEST_SKIP() << candidate("uring").reason;
  const test::ChildResult result = test::run_in_child([]() -> std::string {
    const rlimit limit{64 * kKiB, 64 * kKiB};
    if (setrlimit(RLIMIT_MEMLOCK, &limit) != 0) return "setrlimit";
    // A user nobody else is: locked memory is counted per user. This also drops CAP_IPC_LOCK.
    if (geteuid() == 0 && setresuid(61234, 61234, 61234) != 0) return "setresuid";
    const std::size_t size = 4 * kMiB;
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return "mmap";
    const std::unique_ptr<IoQueue> queue = make_io_queue("uring", {});
    queue->register_memory({static_cast<std::byte*>(memory), size});
    const FileId file = queue->add_file(memfd_create("memlock", MFD_CLOEXEC), 1);
    const IoRequest request{1, IoOp::write, file, 0, static_cast<std::byte*>(memory), static_cast<std::uint32_t>(kMiB)};
    queue->submit({&request, 1});
    std::vector<IoCompletion> completions;
    queue->drain(completions);
    const IoQueueFacts facts = queue->facts();
    return std::string(facts.memory_registered ? "registered" : "unregistered") + ", wrote " +
           std::to_string(completions.at(0).transferred_bytes) + ", " + facts.memory_registered_reason;
  });
  EXPECT_EQ(result.status, 0);
  expect_has(result.text, "unregistered, wrote 1048576");
  expect_has(result.text, "RLIMIT_MEMLOCK is 65536 bytes");
}

TEST(ProbeTest, a_directory_is_described_and_left_empty) {
  std::string name = "/var/tmp/tensorpager-probe-test-XXXXXX";
  ASSERT_NE(mkdtemp(name.data()), nullptr);
  const DirectoryFacts facts = probe_directory(name);
  EXPECT_EQ(facts.directory, name);
  EXPECT_FALSE(facts.file_system.empty());
  EXPECT_FALSE(facts.reason.empty());
  EXPECT_EQ(facts.direct, facts.align_bytes > 1);
  EXPECT_TRUE(std::filesystem::is_empty(name));
  std::filesystem::remove(name);
}

TEST(ProbeTest, a_directory_in_memory_is_not_direct) {
  if (!std::filesystem::exists("/dev/shm")) GTEST_SKIP() << "no /dev/shm";
  const DirectoryFacts facts = probe_directory("/dev/shm");
  EXPECT_EQ(facts.file_system, "tmpfs");
  EXPECT_FALSE(facts.direct);
  expect_has(facts.reason, "memory");
}

TEST(ProbeTest, a_directory_that_cannot_be_written_is_an_error) {
  try {
    probe_directory("/proc/self/fdinfo");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::io);
    expect_has(error.what(), "/proc/self/fdinfo");
  }
}

}  // namespace
}  // namespace tp
