// SPDX-License-Identifier: Apache-2.0
// The stand-in driver's captures, graphs and channels keep CUDA's rules, and show who breaks them: what may not be
// captured is refused with CUDA's errors, and a program that a device's few hardware queues would hang is stuck here
// too. Canaries as in standin_driver_test.cpp.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "standin_driver_fixture.hpp"

namespace tp {
namespace {

using cuda::DevicePtr;
using cuda::Result;
using test::all_are_unseen;
using test::Gate;
using test::kFrame;
using test::kOne;
using test::standin;
using test::StandinCanary;
using test::StandinDriverTest;

constexpr auto kThreadLocal = cuda::kStreamCaptureModeThreadLocal;

class StandinGraphTest : public StandinDriverTest {
 protected:
  void SetUp() override {
    standin().add_kernel({.name = "append",
                          .parameter_bytes = {sizeof(int)},
                          .run = [this](StandinLaunch& launch) { note(launch.parameter<int>(0)); },
                          .duration_ns = {}});
    start({});
  }
  void start(const StandinOptions& options) {
    begin(options);
    function = kernel("append");  // not during a capture
  }
  void note(int what) {
    const std::lock_guard lock(mutex);
    order.push_back(what);
  }
  std::vector<int> seen() {
    const std::lock_guard lock(mutex);
    return std::exchange(order, {});
  }
  void append(int what, cuda::Stream on) { launch(function, on, {&what}); }
  void begin_capture(cuda::Stream on, int mode = kThreadLocal) { driver.cuStreamBeginCapture(on, mode); }
  Result end_capture(cuda::Stream on, cuda::Graph* graph = nullptr) {
    cuda::Graph ignored = nullptr;
    return driver.cuStreamEndCapture.result(on, graph != nullptr ? graph : &ignored);
  }
  cuda::GraphExec instance(cuda::Graph graph) {
    cuda::GraphExec made = nullptr;
    driver.cuGraphInstantiateWithFlags(&made, graph, 0ull);
    return made;
  }
  cuda::GraphExec end_and_instantiate(cuda::Stream on) {
    cuda::Graph graph = nullptr;
    driver.cuStreamEndCapture(on, &graph);
    const cuda::GraphExec made = instance(graph);
    driver.cuGraphDestroy(graph);
    return made;
  }
  int status(cuda::Stream on) {
    int value = 0;
    driver.cuStreamIsCapturing(on, &value);
    return value;
  }
  // Adds a node to what `on` captures, behind what it has captured so far.
  Result capture_value_operations(cuda::Stream on, std::vector<cuda::StreamMemOp> operations) {
    int capturing = 0;
    cuda::Graph graph = nullptr;
    const cuda::GraphNode* after = nullptr;
    std::size_t count = 0;
    driver.cuStreamGetCaptureInfo(on, &capturing, static_cast<std::uint64_t*>(nullptr), &graph, &after, &count);
    EXPECT_EQ(capturing, cuda::kStreamCaptureStatusActive);
    cuda::BatchMemOpNodeParams params;
    driver.cuCtxGetCurrent(&params.context);
    params.count = static_cast<unsigned>(operations.size());
    params.operations = operations.data();
    cuda::GraphNode node = nullptr;
    const Result result = driver.cuGraphAddBatchMemOpNode.result(&node, graph, after, count, &params);
    if (result == cuda::kSuccess)
      driver.cuStreamUpdateCaptureDependencies(on, &node, std::size_t{1}, cuda::kStreamSetCaptureDependencies);
    return result;
  }

  std::mutex mutex;
  std::vector<int> order;
  cuda::Function function = nullptr;
};

cuda::StreamMemOp wait_for(const Gate& gate, std::uint32_t value) {
  return {.operation = cuda::kStreamMemOpWaitValue32,
          .address = gate.address,
          .value = value,
          .flags = cuda::kStreamWaitValueEqual};
}

cuda::StreamMemOp write_to(const Gate& gate, std::uint32_t value) {
  return {.operation = cuda::kStreamMemOpWriteValue32, .address = gate.address, .value = value};
}

// Until nothing goes on any more; false when that takes too long.
bool becomes_stuck() {
  for (int look = 0; look < 2000; ++look) {
    if (standin().is_stuck()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

// ---------------------------------------------------------------- graphs

TEST_F(StandinGraphTest, WhatIsCapturedRunsWithEveryLaunchAndNotBefore) {
  const cuda::Stream on = stream();
  begin_capture(on);
  EXPECT_EQ(status(on), cuda::kStreamCaptureStatusActive);
  int what = 1;
  append(what, on);
  what = 5;  // the value was baked in
  append(2, on);
  const cuda::GraphExec graph = end_and_instantiate(on);
  EXPECT_EQ(status(on), cuda::kStreamCaptureStatusNone);
  driver.cuStreamSynchronize(on);
  EXPECT_EQ(seen(), std::vector<int>{});
  for (int replay = 0; replay < 3; ++replay) driver.cuGraphLaunch(graph, on);
  driver.cuStreamSynchronize(on);
  EXPECT_EQ(seen(), (std::vector<int>{1, 2, 1, 2, 1, 2}));
  driver.cuGraphExecDestroy(graph);
  EXPECT_EQ(driver.cuGraphLaunch.result(graph, on), cuda::kErrorInvalidHandle);
}

TEST_F(StandinGraphTest, ALaunchComesAfterItsStreamAndAfterTheLastLaunchOfTheSameGraph) {
  Gate gate(driver);
  const cuda::Stream first = stream(), second = stream();
  begin_capture(first);
  append(7, first);
  const cuda::GraphExec graph = end_and_instantiate(first);
  append(1, first);
  gate.hold(first);
  driver.cuGraphLaunch(graph, first);
  append(2, first);
  driver.cuGraphLaunch(graph, second);  // another stream, but not before the launch that is held back
  append(3, second);
  ASSERT_TRUE(becomes_stuck());
  EXPECT_EQ(seen(), std::vector<int>{1});
  gate.open();
  driver.cuCtxSynchronize();
  const std::vector<int> all = seen();
  ASSERT_EQ(all.size(), 4u);
  EXPECT_EQ(all.front(), 7);
  EXPECT_EQ(std::count(all.begin(), all.end(), 7), 2);
  EXPECT_EQ(all.back() == 2 || all.back() == 3, true);
}

TEST_F(StandinGraphTest, LanesThatAnEventForksRunSideBySideAndJoin) {
  Gate gate(driver);
  const cuda::Stream first = stream(), second = stream();
  const cuda::Event forked = event(), joined = event();
  begin_capture(first);
  append(1, first);
  driver.cuEventRecord(forked, first);
  driver.cuStreamWaitEvent(second, forked, 0u);
  EXPECT_EQ(status(second), cuda::kStreamCaptureStatusActive);
  ASSERT_EQ(capture_value_operations(first, {wait_for(gate, 1), write_to(gate, 0)}), cuda::kSuccess);
  append(3, first);
  append(2, second);
  driver.cuEventRecord(joined, second);
  driver.cuStreamWaitEvent(first, joined, 0u);
  append(4, first);
  const cuda::GraphExec graph = end_and_instantiate(first);
  for (int replay = 0; replay < 2; ++replay) {
    driver.cuGraphLaunch(graph, second);
    ASSERT_TRUE(becomes_stuck());
    EXPECT_EQ(seen(), (std::vector<int>{1, 2}));
    gate.open();
    driver.cuStreamSynchronize(second);
    EXPECT_EQ(seen(), (std::vector<int>{3, 4}));
    EXPECT_EQ(std::atomic_ref(gate.value).load(), 0u);  // as before, for the next launch
  }
}

TEST_F(StandinGraphTest, CopiesAndFillsAreCaptured) {
  std::vector<std::byte> host = bytes(kOne), back = bytes(std::byte{9});
  add(host);
  add(back);
  const DevicePtr address = frame();
  const cuda::Stream on = stream();
  begin_capture(on);
  driver.cuMemsetD8Async(address, static_cast<unsigned char>(3), kFrame, on);
  driver.cuMemcpyHtoDAsync(address, host.data(), kFrame / 2, on);
  driver.cuMemcpyDtoHAsync(back.data(), address, kFrame, on);
  const cuda::GraphExec graph = end_and_instantiate(on);
  for (int replay = 0; replay < 2; ++replay) {
    std::fill(host.begin(), host.end(), static_cast<std::byte>(replay));
    driver.cuGraphLaunch(graph, on);
    driver.cuStreamSynchronize(on);
    EXPECT_EQ(back[kFrame / 2 - 1], static_cast<std::byte>(replay));
    EXPECT_EQ(back[kFrame / 2], std::byte{3});
  }
}

TEST_F(StandinGraphTest, ResetTellsOfGraphsThatWereLeft) {
  const cuda::Stream on = stream();
  begin_capture(on);
  append(1, on);
  cuda::Graph graph = nullptr;
  driver.cuStreamEndCapture(on, &graph);
  instance(graph);
  EXPECT_EQ(standin().alive().graphs, 2u);
  driver.cuGraphDestroy(graph);
  EXPECT_EQ(driver.cuGraphDestroy.result(graph), cuda::kErrorInvalidValue);
  EXPECT_EQ(standin().reset().graphs, 1u);
}

// ---------------------------------------------------------------- what may not be captured

TEST_F(StandinGraphTest, ACaptureBeginsOnceAndEndsWhereItBegan) {
  const cuda::Stream on = stream(), other = stream();
  EXPECT_EQ(driver.cuStreamBeginCapture.result(nullptr, kThreadLocal), cuda::kErrorStreamCaptureUnsupported);
  EXPECT_EQ(end_capture(on), cuda::kErrorIllegalState);
  begin_capture(on);
  EXPECT_EQ(driver.cuStreamBeginCapture.result(on, kThreadLocal), cuda::kErrorIllegalState);
  cuda::Context context = nullptr;
  driver.cuCtxGetCurrent(&context);
  std::thread([&] {
    driver.cuCtxSetCurrent(context);
    EXPECT_EQ(end_capture(on), cuda::kErrorStreamCaptureWrongThread);
  }).join();
  const cuda::Event forked = event();
  driver.cuEventRecord(forked, on);
  driver.cuStreamWaitEvent(other, forked, 0u);
  append(1, other);
  cuda::Graph graph = reinterpret_cast<cuda::Graph>(std::uintptr_t{1});
  EXPECT_EQ(end_capture(on, &graph), cuda::kErrorStreamCaptureUnjoined);
  EXPECT_EQ(graph, nullptr);
  EXPECT_EQ(status(on), cuda::kStreamCaptureStatusNone);
  EXPECT_EQ(status(other), cuda::kStreamCaptureStatusNone);
  begin_capture(on);
  driver.cuEventRecord(forked, on);
  driver.cuStreamWaitEvent(other, forked, 0u);
  EXPECT_EQ(end_capture(other), cuda::kErrorStreamCaptureUnmatched);
  EXPECT_EQ(end_capture(on), cuda::kErrorStreamCaptureInvalidated);
}

TEST_F(StandinGraphTest, NothingMayCrossTheCapturesBorder) {
  const cuda::Stream on = stream(), other = stream();
  const cuda::Event outside = event(), inside = event();
  driver.cuEventRecord(outside, other);
  begin_capture(on, cuda::kStreamCaptureModeRelaxed);
  append(1, on);
  driver.cuEventRecord(inside, on);
  EXPECT_EQ(driver.cuEventQuery.result(inside), cuda::kErrorCapturedEvent);
  EXPECT_EQ(driver.cuStreamWaitEvent.result(on, outside, 0u), cuda::kErrorStreamCaptureIsolation);
  EXPECT_EQ(status(on), cuda::kStreamCaptureStatusInvalidated);
  EXPECT_EQ(driver.cuEventRecord.result(outside, on), cuda::kErrorStreamCaptureInvalidated);
  cuda::Graph graph = nullptr;
  EXPECT_EQ(end_capture(on, &graph), cuda::kErrorStreamCaptureInvalidated);
  EXPECT_EQ(driver.cuStreamWaitEvent.result(on, inside, 0u), cuda::kErrorCapturedEvent);
  append(2, on);  // usable again
  driver.cuStreamSynchronize(on);
  EXPECT_EQ(seen(), std::vector<int>{2});
  begin_capture(on);
  begin_capture(other);
  driver.cuEventRecord(inside, on);
  EXPECT_EQ(driver.cuStreamWaitEvent.result(other, inside, 0u), cuda::kErrorStreamCaptureMerge);
  EXPECT_EQ(end_capture(on), cuda::kErrorStreamCaptureInvalidated);
  EXPECT_EQ(end_capture(other), cuda::kErrorStreamCaptureInvalidated);
}

TEST_F(StandinGraphTest, WaitingForACapturedStreamInvalidatesTheCapture) {
  const cuda::Stream on = stream();
  const std::vector<std::function<Result()>> waits = {
      [&] { return driver.cuStreamSynchronize.result(on); },
      [&] { return driver.cuStreamQuery.result(on); },
      [&] { return driver.cuCtxSynchronize.result(); },
      [&] { return driver.cuStreamDestroy.result(on); },
  };
  for (const std::function<Result()>& wait : waits) {
    begin_capture(on, cuda::kStreamCaptureModeRelaxed);
    EXPECT_EQ(wait(), cuda::kErrorStreamCaptureUnsupported);
    EXPECT_EQ(end_capture(on), cuda::kErrorStreamCaptureInvalidated);
  }
}

TEST_F(StandinGraphTest, TheLegacyStreamCanNotBeUsedWhileABlockingOneIsCaptured) {
  const cuda::Stream blocking = stream(0), free = stream();
  begin_capture(free);
  append(1, nullptr);
  EXPECT_EQ(end_capture(free), cuda::kSuccess);
  begin_capture(blocking);
  int capturing = 0;
  EXPECT_EQ(driver.cuStreamIsCapturing.result(nullptr, &capturing), cuda::kErrorStreamCaptureImplicit);
  EXPECT_EQ(status(blocking), cuda::kStreamCaptureStatusActive);
  EXPECT_EQ(driver.cuLaunchHostFunc.result(nullptr, +[](void*) {}, nullptr), cuda::kErrorStreamCaptureImplicit);
  EXPECT_EQ(end_capture(blocking), cuda::kErrorStreamCaptureInvalidated);
}

TEST_F(StandinGraphTest, UnsafeCallsAreForbiddenByTheModesOfCaptureAndThread) {
  const cuda::Stream on = stream();
  const cuda::Event done = event();
  cuda::Context context = nullptr;
  driver.cuCtxGetCurrent(&context);
  const auto in_another_thread = [&](int mode) {
    Result result = cuda::kSuccess;
    std::thread([&] {
      driver.cuCtxSetCurrent(context);
      driver.cuThreadExchangeStreamCaptureMode(&mode);
      result = driver.cuEventQuery.result(done);
    }).join();
    return result;
  };
  struct Case {
    int capture_mode, thread_mode;
    bool own_thread, is_allowed;
  };
  constexpr auto kGlobal = cuda::kStreamCaptureModeGlobal, kRelaxed = cuda::kStreamCaptureModeRelaxed;
  for (const Case& each : {
           Case{kGlobal, kGlobal, true, false},
           Case{kThreadLocal, kGlobal, true, false},
           Case{kRelaxed, kGlobal, true, true},
           Case{kGlobal, kGlobal, false, false},
           Case{kGlobal, kThreadLocal, false, true},
           Case{kGlobal, kRelaxed, false, true},
           Case{kThreadLocal, kGlobal, false, true},
       }) {
    SCOPED_TRACE(std::to_string(each.capture_mode) + " " + std::to_string(each.thread_mode));
    begin_capture(on, each.capture_mode);
    const Result result = each.own_thread ? driver.cuEventQuery.result(done) : in_another_thread(each.thread_mode);
    EXPECT_EQ(result, each.is_allowed ? cuda::kSuccess : cuda::kErrorStreamCaptureUnsupported);
    EXPECT_EQ(end_capture(on), each.is_allowed ? cuda::kSuccess : cuda::kErrorStreamCaptureInvalidated);
  }
}

TEST_F(StandinGraphTest, ValueOperationsCanBeMissing) {
  begin({.has_value_operations = false});
  Gate gate(driver);
  const cuda::Stream on = stream();
  EXPECT_EQ(driver.cuStreamWaitValue32.result(on, gate.address, 1u, 1u), cuda::kErrorNotSupported);
  EXPECT_EQ(driver.cuStreamWriteValue32.result(on, gate.address, 1u, 0u), cuda::kErrorNotSupported);
  begin_capture(on);
  EXPECT_EQ(capture_value_operations(on, {wait_for(gate, 1)}), cuda::kErrorNotSupported);
  EXPECT_EQ(end_capture(on), cuda::kSuccess);
  standin().reset();
}

// ---------------------------------------------------------------- channels

TEST_F(StandinGraphTest, WhatComesBehindAWaiterOnItsChannelWaitsToo) {
  for (const std::size_t channels : {1u, 2u}) {
    SCOPED_TRACE(std::to_string(channels));
    start({.channels = channels});
    seen();
    Gate gate(driver);
    const cuda::Stream first = stream(), second = stream();
    gate.hold(first);
    append(1, second);
    ASSERT_TRUE(becomes_stuck());
    const std::vector<std::string> blocked = standin().blocked();
    if (channels == 1) {
      EXPECT_EQ(seen(), std::vector<int>{});
      ASSERT_EQ(standin().behind_waiters().size(), 1u);
      EXPECT_EQ(standin().behind_waiters()[0],
                "cuLaunchKernel of stream 2 is behind cuStreamWaitValue32 of stream 1 in channel 0");
      EXPECT_EQ(blocked, (std::vector<std::string>{"cuStreamWaitValue32 of stream 1 waits for a value",
                                                   "cuLaunchKernel of stream 2 is behind cuStreamWaitValue32 in "
                                                   "channel 0"}));
    } else {
      EXPECT_EQ(seen(), std::vector<int>{1});
      EXPECT_TRUE(standin().behind_waiters().empty());
      EXPECT_EQ(blocked, std::vector<std::string>{"cuStreamWaitValue32 of stream 1 waits for a value"});
    }
    gate.open();
    driver.cuCtxSynchronize();
    EXPECT_FALSE(standin().is_stuck());
    EXPECT_EQ(seen().size(), channels == 1 ? 1u : 0u);
  }
}

TEST_F(StandinGraphTest, AWaitForAnEventHoldsItsChannelUpAsWell) {
  start({.channels = 2});
  Gate gate(driver);
  const cuda::Stream first = stream(), second = stream(), third = stream(), fourth = stream();
  const cuda::Event done = event();
  gate.hold(first);  // channel 1
  driver.cuEventRecord(done, first);
  driver.cuStreamWaitEvent(second, done, 0u);  // channel 0
  append(1, fourth);                           // channel 0, and nothing to do with it
  ASSERT_TRUE(becomes_stuck());
  EXPECT_EQ(seen(), std::vector<int>{});
  EXPECT_EQ(standin().behind_waiters().size(), 1u);
  append(2, third);  // channel 1, behind the gate
  EXPECT_EQ(standin().behind_waiters().size(), 2u);
  gate.open();
  driver.cuCtxSynchronize();
  EXPECT_EQ(seen().size(), 2u);
}

// The program that DESIGN.md warns of: a graph waits for a flag that a copy stream is to write, and is launched before
// the copy is asked for. On one channel the copy is behind the wait for good.
TEST_F(StandinGraphTest, AGraphThatWaitsForWhatComesLaterHangsOnASharedChannel) {
  for (const std::size_t channels : {1u, 2u}) {
    start({.channels = channels});
    seen();
    Gate gate(driver);
    const DevicePtr address = frame();
    const cuda::Stream compute = stream(), copies = stream();
    begin_capture(compute);
    ASSERT_EQ(capture_value_operations(compute, {wait_for(gate, 1), write_to(gate, 0)}), cuda::kSuccess);
    append(1, compute);
    const cuda::GraphExec graph = end_and_instantiate(compute);
    driver.cuGraphLaunch(graph, compute);
    driver.cuMemsetD8Async(address, static_cast<unsigned char>(1), kFrame, copies);
    driver.cuStreamWriteValue32(copies, gate.address, 1u, 0u);
    if (channels == 1) {
      EXPECT_TRUE(becomes_stuck());
      EXPECT_EQ(standin().behind_waiters().size(), 2u);  // the fill and the write
      EXPECT_EQ(seen(), std::vector<int>{});
      standin().reset();
    } else {
      driver.cuStreamSynchronize(compute);
      EXPECT_EQ(seen(), std::vector<int>{1});
      EXPECT_TRUE(standin().behind_waiters().empty());
    }
  }
}

TEST_F(StandinGraphTest, MappingMayWaitForTheDevice) {
  begin({.mapping_waits = true});
  Gate gate(driver);
  const cuda::Stream on = stream();
  const DevicePtr address = frame();
  gate.hold(on);
  std::atomic<bool> unmapped{false};
  cuda::Context context = nullptr;
  driver.cuCtxGetCurrent(&context);
  std::thread mapper([&] {
    driver.cuCtxSetCurrent(context);
    driver.cuMemUnmap(address, kFrame);
    unmapped = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_FALSE(unmapped);
  gate.open();
  mapper.join();
  EXPECT_TRUE(unmapped);
}

// ---------------------------------------------------------------- canaries

TEST_F(StandinCanary, AGraphThatDoesNotWaitForItsCopy) {
  static std::atomic<int> wrong;
  standin().add_kernel({.name = "check graph",
                        .parameter_bytes = {8},
                        .run =
                            [](StandinLaunch& launch) {
                              std::vector<std::byte> seen(kSmall);
                              launch.read(launch.parameter<DevicePtr>(0), seen.data(), kSmall);
                              if (!all_are_unseen(seen, kOne)) ++wrong;
                            },
                        .duration_ns = {}});
  expect_caught([&](bool waits) {
    wrong = 0;
    std::vector<std::byte> staging = bytes(kOne, kSmall);
    DevicePtr address = frame();
    const cuda::Function check = kernel("check graph");
    const cuda::Stream copies = stream(), compute = stream();
    const cuda::Event copied = event();
    driver.cuStreamBeginCapture(compute, kThreadLocal);
    launch(check, compute, {&address});
    cuda::Graph graph = nullptr;
    cuda::GraphExec exec = nullptr;
    driver.cuStreamEndCapture(compute, &graph);
    driver.cuGraphInstantiateWithFlags(&exec, graph, 0ull);
    driver.cuMemcpyHtoDAsync(address, staging.data(), kSmall, copies);
    driver.cuEventRecord(copied, copies);
    if (waits) driver.cuStreamWaitEvent(compute, copied, 0u);
    driver.cuGraphLaunch(exec, compute);
    driver.cuStreamSynchronize(compute);
    driver.cuStreamSynchronize(copies);
    return wrong != 0;
  });
}

}  // namespace
}  // namespace tp
