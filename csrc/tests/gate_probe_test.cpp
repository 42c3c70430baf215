// SPDX-License-Identifier: Apache-2.0
// The probe says whether a graph may wait for copies that come later, and why not, and always ends.
#include "device/gate_probe.hpp"

#include <gtest/gtest.h>

#include <string>

#include "standin_driver_fixture.hpp"

namespace tp {
namespace {

using test::kFrame;
using test::standin;

constexpr std::chrono::milliseconds kPatience{200};

class GateProbeTest : public test::StandinDriverTest {
 protected:
  void start(const StandinOptions& options) {
    device.reset();
    begin(options);
    device = std::make_shared<CudaDevice>(driver, 0);
    compute = stream();
    copies = {stream(), stream()};
    made = handle();
  }
  void TearDown() override {
    device.reset();
    StandinDriverTest::TearDown();
  }
  GateFacts probe() { return probe_gates(device, compute, copies, made, kFrame, kPatience); }
  void expect_refused(const std::string& why) {
    const GateFacts facts = probe();
    EXPECT_FALSE(facts.usable);
    EXPECT_NE(facts.reason.find(why), std::string::npos) << facts.reason;
    driver.cuCtxSynchronize();  // whatever it found, nothing waits any more
    expect_nothing_left();
  }
  void expect_nothing_left() {
    EXPECT_EQ(standin().alive().graphs, 0u);
    EXPECT_EQ(standin().alive().registrations, 0u);
    EXPECT_EQ(standin().alive().handles, 1u);
    EXPECT_EQ(standin().alive().mappings, 0u);
    EXPECT_EQ(standin().alive().reservations, 0u);
    EXPECT_EQ(standin().alive().streams, 3u);
    EXPECT_TRUE(standin().violations().empty());
  }

  std::shared_ptr<CudaDevice> device;
  cuda::Stream compute = nullptr;
  std::vector<cuda::Stream> copies;
  cuda::AllocationHandle made = 0;
};

TEST_F(GateProbeTest, streams_with_queues_of_their_own_may_wait) {
  for (const std::size_t channels : {0u, 4u, 8u}) {
    start({.channels = channels});
    const GateFacts facts = probe();
    EXPECT_TRUE(facts.usable) << facts.reason;
    EXPECT_NE(facts.reason.find("get on"), std::string::npos);
    EXPECT_TRUE(standin().behind_waiters().empty());
    expect_nothing_left();
  }
}

TEST_F(GateProbeTest, a_queue_that_is_shared_with_copies_is_found_out) {
  for (const std::size_t channels : {1u, 2u}) {  // with two, the second copy stream has the compute stream's
    start({.channels = channels});
    expect_refused("shares a hardware queue");
  }
}

TEST_F(GateProbeTest, mapping_that_waits_for_the_device_is_found_out) {
  start({.mapping_waits = true});
  expect_refused("mapping frames waits for the device");
}

TEST_F(GateProbeTest, values_that_a_device_does_not_know_are_found_out) {
  start({.has_value_operations = false});
  expect_refused("can't be put into a graph");
}

TEST_F(GateProbeTest, it_waits_for_what_the_stream_holds) {
  start({});
  std::vector<std::byte> memory = bytes(test::kOne, 4096);
  const cuda::DevicePtr address = frame();
  driver.cuMemcpyHtoDAsync(address, memory.data(), std::size_t{4096}, compute);
  EXPECT_TRUE(probe().usable);
  EXPECT_EQ(driver.cuStreamQuery.result(compute), cuda::kSuccess);
}

TEST_F(GateProbeTest, every_failing_call_is_a_reason_and_ends) {
  const std::vector<std::string> calls = {
      "cuStreamCreateWithPriority", "cuStreamBeginCapture",        "cuStreamGetCaptureInfo", "cuGraphAddBatchMemOpNode",
      "cuStreamEndCapture",         "cuGraphInstantiateWithFlags", "cuStreamWriteValue32",   "cuMemHostRegister"};
  for (const std::string& call : calls) {
    SCOPED_TRACE(call);
    start({});
    standin().arm({.call = call, .result = cuda::kErrorNotSupported});
    const GateFacts facts = probe();
    EXPECT_FALSE(facts.usable);
    EXPECT_NE(facts.reason.find(call), std::string::npos) << facts.reason;
    standin().disarm();
    driver.cuCtxSynchronize();
    EXPECT_EQ(standin().alive().streams, 3u);
    EXPECT_EQ(standin().alive().reservations, call == "cuMemUnmap" ? 1u : 0u);
    EXPECT_EQ(standin().alive().graphs, 0u);
    EXPECT_EQ(standin().alive().registrations, 0u);
  }
  start({});
  standin().arm(
      {.call = "cuStreamWriteValue32", .result = cuda::kErrorIllegalAddress, .effect = StandinEffect::context});
  EXPECT_THROW(probe(), Error);
}

}  // namespace
}  // namespace tp
