// SPDX-License-Identifier: Apache-2.0
// Gates hold a graph back, one launch at a time, and marks say how far it is.
#include "device/gate_array.hpp"

#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "device/event_timeline.hpp"
#include "standin_driver_fixture.hpp"

namespace tp {
namespace {

using test::standin;

class GateArrayTest : public test::StandinDriverTest {
 protected:
  void SetUp() override {
    begin({});
    device = std::make_shared<CudaDevice>(driver, 0);
    compute = stream();
    helper = stream();
  }
  void TearDown() override {
    device.reset();
    StandinDriverTest::TearDown();
  }
  cuda::GraphExec capture(GateArray& gates) {
    driver.cuStreamBeginCapture(compute, cuda::kStreamCaptureModeThreadLocal);
    for (std::size_t step = 0; step < gates.count(); ++step) gates.capture_step(step, compute);
    gates.capture_end(gates.count() - 1, compute);
    cuda::Graph graph = nullptr;
    driver.cuStreamEndCapture(compute, &graph);
    cuda::GraphExec exec = nullptr;
    driver.cuGraphInstantiateWithFlags(&exec, graph, 0ull);
    driver.cuGraphDestroy(graph);
    return exec;
  }
  bool comes_to(const std::uint32_t* mark) {
    for (int look = 0; look < 5000; ++look) {
      if (std::atomic_ref(*const_cast<std::uint32_t*>(mark)).load() != 0) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return false;
  }

  std::shared_ptr<CudaDevice> device;
  cuda::Stream compute = nullptr, helper = nullptr;
};

TEST_F(GateArrayTest, each_launch_finds_the_gates_closed_and_sets_the_marks_in_order) {
  GateArray gates(device, 3);
  const cuda::GraphExec graph = capture(gates);
  for (int launch = 0; launch < 3; ++launch) {
    driver.cuGraphLaunch(graph, compute);
    for (std::size_t step = 0; step < 3; ++step) {
      EXPECT_EQ(driver.cuStreamQuery.result(compute), cuda::kErrorNotReady);
      EXPECT_EQ(*gates.mark(step), 0u);
      if (step == 1) {
        gates.open(step);
      } else {
        gates.open_behind(step, helper);
      }
      if (step > 0) EXPECT_TRUE(comes_to(gates.mark(step - 1)));
    }
    driver.cuStreamSynchronize(compute);
    for (std::size_t step = 0; step < 3; ++step) {
      EXPECT_FALSE(gates.is_open(step));
      EXPECT_EQ(*gates.mark(step), 1u);
      gates.clear_mark(step);
    }
  }
}

TEST_F(GateArrayTest, a_mark_is_a_point_of_a_timeline) {
  GateArray gates(device, 2);
  EventTimeline timeline(device);
  const cuda::GraphExec graph = capture(gates);
  const std::uint64_t before = timeline.record(helper);
  driver.cuGraphLaunch(graph, compute);
  const std::uint64_t first = timeline.record_mark(gates.mark(0));
  const std::uint64_t between = timeline.record(helper);
  const std::uint64_t second = timeline.record_mark(gates.mark(1));
  EXPECT_EQ(second, 4u);
  driver.cuStreamSynchronize(helper);
  EXPECT_EQ(timeline.poll(), before);  // what comes behind the mark is there, and not counted yet
  gates.open(0);
  gates.open(1);
  driver.cuStreamSynchronize(compute);
  EXPECT_EQ(timeline.poll(), second);
  EXPECT_GE(timeline.reached(), std::max(first, between));
}

TEST_F(GateArrayTest, a_mark_that_a_lost_context_will_never_set_is_an_error) {
  GateArray gates(device, 1);
  EventTimeline timeline(device);
  timeline.record_mark(gates.mark(0));
  EXPECT_EQ(timeline.poll(), 0u);
  standin().lose_context(cuda::kErrorIllegalAddress);
  EXPECT_THROW(timeline.poll(), Error);
}

TEST_F(GateArrayTest, what_is_not_captured_takes_no_gate) {
  GateArray gates(device, 1);
  EXPECT_THROW(gates.capture_step(0, compute), Error);
  driver.cuStreamBeginCapture(compute, cuda::kStreamCaptureModeRelaxed);
  EXPECT_EQ(driver.cuStreamQuery.result(compute), cuda::kErrorStreamCaptureUnsupported);
  try {
    gates.capture_step(0, compute);
    FAIL() << "the capture was invalid";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::invalid);
    EXPECT_NE(std::string(error.what()).find("invalidated"), std::string::npos) << error.what();
  }
}

TEST_F(GateArrayTest, every_failing_call_leaves_nothing_behind) {
  for (const char* call : {"cuMemHostRegister", "cuMemHostGetDevicePointer"}) {
    standin().arm({.call = call, .result = cuda::kErrorOutOfMemory});
    EXPECT_THROW(GateArray(device, 5), Error) << call;
    standin().disarm();
    EXPECT_EQ(standin().alive().registrations, 0u) << call;
  }
  {
    const GateArray gates(device, 5);
  }
  EXPECT_EQ(standin().alive().registrations, 0u);
}

}  // namespace
}  // namespace tp
