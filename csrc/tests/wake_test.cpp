// SPDX-License-Identifier: Apache-2.0
// The waiting half of the IoQueue contract: wakes, timeouts, polls. The null engine keeps it like every other.
#include <gtest/gtest.h>
#include <signal.h>

#include <atomic>
#include <numeric>
#include <thread>

#include "base/error.hpp"
#include "sim/sim_queue.hpp"
#include "tests/io_fixture.hpp"

namespace tp {
namespace {

using test::Memory;

struct EngineCase {
  const char* name;
  std::unique_ptr<IoQueue> (*make)(const IoQueueOptions&);
};
const EngineCase kEngines[] = {
    {"uring", make_uring_queue},
    {"pread", make_pread_queue},
    {"null", make_null_queue},
    {"sim",
     [](const IoQueueOptions& options) -> std::unique_ptr<IoQueue> {
       return std::make_unique<SimQueue>(SimOptions{.queue = options, .injector = nullptr});
     }},
};

class WakeTest : public ::testing::TestWithParam<EngineCase> {
 protected:
  void SetUp() override {
    try {
      queue_ = GetParam().make({});
    } catch (const Error& error) {
      GTEST_SKIP() << error.what();
    }
  }
  std::unique_ptr<IoQueue> queue_;
  std::vector<IoCompletion> completions_;
};

std::string engine_name(const ::testing::TestParamInfo<EngineCase>& info) { return info.param.name; }
INSTANTIATE_TEST_SUITE_P(engines, WakeTest, ::testing::ValuesIn(kEngines), engine_name);

TEST_P(WakeTest, a_wake_before_the_wait_ends_it) {
  queue_->wake();
  EXPECT_EQ(queue_->wait(completions_, kWaitForever), 0u);
}

TEST_P(WakeTest, a_wake_from_another_thread_ends_the_wait) {
  for (int round = 0; round < 200; ++round) {
    std::thread waker([this] { queue_->wake(); });
    EXPECT_EQ(queue_->wait(completions_, kWaitForever), 0u);
    waker.join();
  }
}

// Two threads hand a turn to and fro: a lost wake would hang here.
TEST_P(WakeTest, no_wake_is_lost) {
  constexpr int kTurns = 2000;
  std::atomic<int> turn{0};
  std::thread waker([&] {
    for (int at = 0; at < kTurns; ++at) {
      turn.store(at + 1);
      queue_->wake();
      while (turn.load() == at + 1) std::this_thread::yield();
    }
  });
  for (int at = 0; at < kTurns; ++at) {
    while (turn.load() != at + 1) EXPECT_EQ(queue_->wait(completions_, kWaitForever), 0u);
    turn.store(-1);
    while (at + 1 < kTurns && turn.load() == -1) queue_->wait(completions_, kWaitForever);
  }
  waker.join();
}

TEST_P(WakeTest, wakes_merge) {
  for (int at = 0; at < 100; ++at) queue_->wake();
  EXPECT_EQ(queue_->wait(completions_, kWaitForever), 0u);
  // At most one more wait returns for them; then a poll finds nothing and a new wake is needed.
  queue_->wait(completions_, std::chrono::nanoseconds(0));
  queue_->wake();
  EXPECT_EQ(queue_->wait(completions_, kWaitForever), 0u);
}

IoQueue* g_queue_of_handler = nullptr;
std::atomic<int> g_handled{0};

TEST_P(WakeTest, a_signal_handler_may_wake) {
#ifdef __SANITIZE_THREAD__
  // ThreadSanitizer queues a signal and runs its handler at the next call that it intercepts. One that comes between
  // its own look at that queue and the kernel's wait is never handled. The other builds run this.
  GTEST_SKIP() << "ThreadSanitizer may delay the handler for ever";
#endif
  g_queue_of_handler = queue_.get();
  g_handled = 0;
  struct sigaction action{}, before{};
  action.sa_handler = [](int) {
    g_handled.fetch_add(1);
    g_queue_of_handler->wake();
  };
  ASSERT_EQ(sigaction(SIGUSR1, &action, &before), 0);
  const pthread_t waiting = pthread_self();
  for (int round = 0; round < 50; ++round) {
    std::thread sender([waiting] { pthread_kill(waiting, SIGUSR1); });
    EXPECT_EQ(queue_->wait(completions_, kWaitForever), 0u);
    sender.join();
  }
  EXPECT_EQ(g_handled.load(), 50);
  ASSERT_EQ(sigaction(SIGUSR1, &before, nullptr), 0);
}

TEST_P(WakeTest, a_wait_with_nothing_in_flight_ends_at_the_timeout) {
  EXPECT_EQ(queue_->wait(completions_, std::chrono::nanoseconds(0)), 0u);
  EXPECT_EQ(queue_->wait(completions_, std::chrono::milliseconds(2)), 0u);
  EXPECT_TRUE(completions_.empty());
}

TEST_P(WakeTest, a_wake_during_a_drain_is_for_the_next_wait) {
  const test::PatternFile pattern(kMiB);
  const int descriptor = open(pattern.path().c_str(), O_RDONLY | O_CLOEXEC);
  const Memory memory(kMiB);
  const IoRequest request{1, IoOp::read,   queue_->add_file(descriptor, 1),
                          0, memory.at(0), static_cast<std::uint32_t>(kMiB)};
  for (int round = 0; round < 50; ++round) {
    completions_.clear();
    queue_->submit({&request, 1});
    queue_->wake();
    queue_->drain(completions_);
    ASSERT_EQ(completions_.size(), 1u);
    ASSERT_EQ(queue_->wait(completions_, kWaitForever), 0u);
  }
  close(descriptor);
}

TEST_P(WakeTest, wakes_and_completions_together_lose_neither) {
  const test::PatternFile pattern(64 * kKiB);
  const int descriptor = open(pattern.path().c_str(), O_RDONLY | O_CLOEXEC);
  const Memory memory(64 * kKiB);
  const FileId file = queue_->add_file(descriptor, 1);
  std::atomic<bool> stop{false};
  std::thread waker([&] {
    while (!stop.load()) {
      queue_->wake();
      std::this_thread::yield();
    }
  });
  constexpr std::uint64_t kRequests = 3000;
  std::vector<std::uint64_t> free_places(16);  // completions come in any order: a place is taken until its own is here
  std::iota(free_places.begin(), free_places.end(), 0);
  std::uint64_t submitted = 0;
  std::size_t completed = 0;
  while (completed < kRequests) {
    while (submitted < kRequests && submitted - completed < queue_->depth() && !free_places.empty()) {
      const std::uint64_t place = free_places.back();
      free_places.pop_back();
      const IoRequest request{place, IoOp::read, file, place * 4096, memory.at(place * 4096), 4096};
      queue_->submit({&request, 1});
      ++submitted;
    }
    queue_->wait(completions_, kWaitForever);
    for (; completed < completions_.size(); ++completed) free_places.push_back(completions_[completed].token);
  }
  stop = true;
  waker.join();
  EXPECT_EQ(completions_.size(), kRequests);
  close(descriptor);
}

TEST(NullQueueTest, memory_and_files_are_not_touched) {
  const auto queue = make_null_queue({});
  Memory memory(4096);
  std::fill_n(memory.at(0), 4096, std::byte{0x11});
  const IoRequest request{5, IoOp::read, queue->add_file(0, 1), 0, memory.at(0), 4096};
  const auto completions = test::run_all(*queue, {&request, 1});
  EXPECT_EQ(completions.at(5).transferred_bytes, 4096u);
  EXPECT_EQ(*memory.at(0), std::byte{0x11});
  EXPECT_EQ(*memory.at(4095), std::byte{0x11});
}

TEST(IoQueueDeathTest, more_than_depth_in_flight_is_a_mistake) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  const auto overfill = [] {
    IoQueueOptions options;
    options.depth = 2;
    const auto queue = make_null_queue(options);
    Memory memory(4096);
    const IoRequest request{1, IoOp::read, queue->add_file(0, 1), 0, memory.at(0), 1};
    const IoRequest requests[] = {request, request, request};
    queue->submit(requests);
  };
  EXPECT_DEATH(overfill(), "assertion failed");
}

}  // namespace
}  // namespace tp
