// SPDX-License-Identifier: Apache-2.0
// The simulator itself: deterministic by seed, injects what it was told and counts it, catches broken promises.
#include "sim/sim_queue.hpp"

#include <gtest/gtest.h>

#include <cerrno>
#include <set>

#include "tests/io_fixture.hpp"

namespace tp {
namespace {

using test::first_wrong;

std::vector<std::byte> pattern_bytes(std::size_t size) {
  std::vector<std::byte> bytes(size);
  test::fill_pattern(bytes, 0);
  return bytes;
}

std::vector<IoRequest> page_reads(FileId file, std::vector<std::byte>& memory, std::size_t size) {
  std::vector<IoRequest> requests;
  for (std::size_t at = 0; at < memory.size(); at += size) {
    requests.push_back({at, IoOp::read, file, at, memory.data() + at, static_cast<std::uint32_t>(size)});
  }
  return requests;
}

// The order in which 16 reads of one submit() complete under a seed.
std::vector<std::uint64_t> completion_order(std::uint64_t seed) {
  std::vector<std::byte> bytes = pattern_bytes(16 * 4096), memory(16 * 4096);
  SimOptions options;
  options.seed = seed;
  options.short_one_in = 4;
  SimQueue queue(options);
  queue.submit(page_reads(queue.add_memory_file(bytes), memory, 4096));
  std::vector<IoCompletion> completions;
  while (completions.size() < 16) queue.wait(completions, kWaitForever);
  std::vector<std::uint64_t> order;
  for (const IoCompletion& completion : completions) order.push_back(completion.token);
  EXPECT_EQ(first_wrong(memory, 0), memory.size());
  return order;
}

TEST(SimQueueTest, equal_seeds_give_equal_runs_and_others_differ) {
  std::set<std::vector<std::uint64_t>> orders;
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    EXPECT_EQ(completion_order(seed), completion_order(seed));
    orders.insert(completion_order(seed));
  }
  EXPECT_EQ(orders.size(), 20u);
}

TEST(SimQueueTest, an_error_at_each_transfer_once_and_sticky_until_the_injector_no_longer_fires) {
  for (const Recurrence recurrence : {Recurrence::once, Recurrence::sticky}) {
    std::uint64_t nth = 1;
    for (bool fired = true; fired; ++nth) {
      std::vector<std::byte> bytes = pattern_bytes(8 * 4096), memory(8 * 4096);
      SimOptions options;
      options.seed = nth;
      options.queue.transfer_max_bytes = 1024;
      options.injector = std::make_shared<SimInjector>();
      options.injector->arm({nth, EIO, recurrence, IoOp::read});
      SimQueue queue(options);
      unsigned failed = 0;
      for (const auto& [token, completion] :
           test::run_all(queue, page_reads(queue.add_memory_file(bytes), memory, 4096))) {
        failed += completion.error == EIO;
        if (completion.error == 0) {
          EXPECT_EQ(first_wrong({memory.data() + token, 4096}, token), 4096u);
        }
      }
      EXPECT_EQ(failed, options.injector->fired());
      fired = failed > 0;
    }
    EXPECT_EQ(nth, 8u * 4 + 2);  // 32 transfers were hit; the 33rd is not there
  }
}

TEST(SimQueueTest, an_injector_for_writes_leaves_reads_alone) {
  std::vector<std::byte> bytes = pattern_bytes(4096), memory(4096);
  SimOptions options;
  options.injector = std::make_shared<SimInjector>();
  options.injector->arm({1, ENOSPC, Recurrence::sticky, IoOp::write});
  SimQueue queue(options);
  const FileId file = queue.add_memory_file(bytes);
  EXPECT_EQ(test::run_all(queue, page_reads(file, memory, 4096)).at(0).error, 0);
  const IoRequest write{1, IoOp::write, file, 0, memory.data(), 4096};
  EXPECT_EQ(test::run_all(queue, {&write, 1}).at(1).error, ENOSPC);
  EXPECT_EQ(options.injector->fired(), 1u);
  options.injector->disarm();
  EXPECT_EQ(test::run_all(queue, {&write, 1}).at(1).error, 0);
}

TEST(SimQueueTest, writes_land_and_make_the_file_longer) {
  std::vector<std::byte> bytes, memory = pattern_bytes(10'000), back(10'000);
  SimOptions options;
  options.short_one_in = 2;
  SimQueue queue(options);
  const FileId file = queue.add_memory_file(bytes);
  const IoRequest write{1, IoOp::write, file, 0, memory.data(), 10'000};
  EXPECT_EQ(test::run_all(queue, {&write, 1}).at(1).transferred_bytes, 10'000u);
  EXPECT_EQ(bytes, memory);
  const IoRequest read{2, IoOp::read, file, 0, back.data(), 10'000};
  test::run_all(queue, {&read, 1});
  EXPECT_EQ(back, memory);
}

TEST(SimQueueTest, memory_of_a_read_holds_poison_until_it_has_come) {
  std::vector<std::byte> bytes = pattern_bytes(4096), memory = pattern_bytes(4096);
  SimQueue queue({});
  queue.submit(page_reads(queue.add_memory_file(bytes), memory, 4096));
  EXPECT_EQ(memory, std::vector<std::byte>(4096, SimQueue::kPoison));
  std::vector<IoCompletion> completions;
  queue.drain(completions);
  EXPECT_EQ(memory, bytes);
}

TEST(SimQueueDeathTest, memory_of_a_write_that_changes_in_flight_is_caught) {
  const auto change_in_flight = [] {
    std::vector<std::byte> bytes, memory(4096);
    SimQueue queue({});
    const IoRequest write{1, IoOp::write, queue.add_memory_file(bytes), 0, memory.data(), 4096};
    queue.submit({&write, 1});
    memory[100] = std::byte{1};
    std::vector<IoCompletion> completions;
    queue.drain(completions);
  };
  EXPECT_DEATH(change_in_flight(), "written.data");
}

}  // namespace
}  // namespace tp
