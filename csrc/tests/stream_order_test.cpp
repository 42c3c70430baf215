// SPDX-License-Identifier: Apache-2.0
// Page operations and captures: what can't be done in a captured stream is refused and leaves the capture as it is, and
// a pager goes on, and ends, while somebody else captures.
#include "pager/stream_order.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <string>
#include <thread>

#include "device_sweep.hpp"
#include "standin_fixture.hpp"

namespace tp {
namespace {

using test::device_options;
using test::device_pointer;
using test::kDevicePage;
using test::KernelWork;
using test::kMemoryDirectory;
using test::kWordsPerPage;
using test::one_set_per_page;
using test::pattern;
using test::PatternFile;
using test::slow_device;
using test::StandinDevice;
using test::sweep;

constexpr std::size_t kPages = 6, kFrames = 4;

class StreamOrderTest : public testing::Test {
 protected:
  StreamOrderTest() {
    region = pager.map_file(file.path(), 0);
    sets = one_set_per_page(pager, region);
  }
  ~StreamOrderTest() override { EXPECT_TRUE(device.standin().violations().empty()); }

  const CudaDriver& driver() { return StandinDevice::driver(); }
  void begin_capture(cuda::Stream stream, int mode = cuda::kStreamCaptureModeThreadLocal) {
    const CudaDevice::Current current(*pager.device());
    driver().cuStreamBeginCapture(stream, mode);
  }
  // What ending the capture says; the graph is destroyed.
  cuda::Result end_capture(cuda::Stream stream) {
    const CudaDevice::Current current(*pager.device());
    cuda::Graph graph = nullptr;
    const cuda::Result result = driver().cuStreamEndCapture.result(stream, &graph);
    if (graph != nullptr) driver().cuGraphDestroy(graph);
    return result;
  }
  void check_page(std::size_t page, cuda::Stream stream) {
    KernelWork& work = device.new_work();
    const std::size_t word = page * kWordsPerPage + 5;
    work.checks.push_back({device_pointer(region.address + 8 * word), pattern(word, 7)});
    device.launch(work, stream);
  }
  void use_page(std::size_t page, cuda::Stream stream) {
    pager.acquire(sets[page], {}, stream);
    check_page(page, stream);
    pager.release(sets[page], stream);
  }
  void expect_refused(const std::function<void()>& call) {
    try {
      call();
      FAIL() << "nothing was refused";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::device);
      EXPECT_NE(std::string(error.what()).find("CUDA graph is captured"), std::string::npos) << error.what();
      EXPECT_NE(std::string(error.what()).find("Pager.capture()"), std::string::npos) << error.what();
    }
  }

  StandinDevice device{slow_device(6, kFrames)};
  const PatternFile file{kPages * kDevicePage - 8, 7, kMemoryDirectory};
  Pager pager{device_options(kFrames, 5)};
  Region region;
  std::vector<SetId> sets;
};

TEST_F(StreamOrderTest, what_would_wait_is_refused_in_a_capture_which_stays_valid) {
  const std::unique_ptr<Ticket> ticket = pager.prefetch(sets[1]);
  begin_capture(device.stream());
  expect_refused([&] { pager.acquire(sets[0], {}, device.stream()); });
  expect_refused([&] { pager.hold({region.address, 8}, {}, device.stream()); });
  expect_refused([&] { pager.wait(*ticket, {}, device.stream()); });
  expect_refused([&] { pager.synchronize(device.stream()); });
  EXPECT_EQ(pager.residency().counters().acquires, 0u);
  EXPECT_EQ(end_capture(device.stream()), cuda::kSuccess);
  pager.wait(*ticket, {}, device.stream());
  pager.release(*ticket, device.stream());
  use_page(0, device.stream());
  device.synchronize(device.stream());
  EXPECT_EQ(pager.residency().pinned_pages(), 0u);
  EXPECT_EQ(device.wrong(), 0u);
}

TEST_F(StreamOrderTest, the_legacy_stream_is_refused_while_a_blocking_one_is_captured) {
  cuda::Stream blocking = nullptr;
  {
    const CudaDevice::Current current(*pager.device());
    driver().cuStreamCreateWithPriority(&blocking, 0u, 0);
  }
  begin_capture(blocking);
  expect_refused([&] { pager.acquire(sets[0], {}, nullptr); });
  use_page(1, device.stream());  // any other may be used
  EXPECT_EQ(end_capture(blocking), cuda::kSuccess);
  use_page(0, nullptr);
  device.synchronize(nullptr);
  EXPECT_EQ(device.wrong(), 0u);
}

// A graph that reads a page is captured inside of a step: what it keeps is the address, and nothing runs.
TEST_F(StreamOrderTest, a_release_in_a_capture_is_kept_until_the_capture_is_over) {
  pager.acquire(sets[0], {}, device.stream());
  const std::unique_ptr<Ticket> ticket = pager.prefetch(sets[1]);
  pager.wait(*ticket, {}, device.stream());
  begin_capture(device.stream());
  check_page(0, device.stream());
  pager.release(sets[0], device.stream());
  pager.release(*ticket, device.stream());
  EXPECT_EQ(pager.residency().pinned_pages(), 2u);
  const cuda::Stream other = device.make_stream();
  use_page(2, other);  // paging goes on, the two stay
  use_page(3, other);
  use_page(4, other);
  EXPECT_EQ(pager.residency().pinned_pages(), 2u);
  EXPECT_EQ(end_capture(device.stream()), cuda::kSuccess);
  use_page(5, other);
  EXPECT_EQ(pager.residency().pinned_pages(), 0u);
  sweep(device, pager, region, sets, 2);
  EXPECT_EQ(pager.residency().counters().failures, 0u);
}

TEST_F(StreamOrderTest, paging_goes_on_beside_a_capture_of_any_mode_and_does_not_spoil_it) {
  const cuda::Stream other = device.make_stream();
  for (const int mode : {cuda::kStreamCaptureModeGlobal, cuda::kStreamCaptureModeThreadLocal}) {
    SCOPED_TRACE(mode);
    begin_capture(other, mode);
    for (int pass = 0; pass < 3; ++pass) {
      for (std::size_t page = 0; page < kPages; ++page) use_page(page, device.stream());
    }
    std::thread([&] {
      for (std::size_t page = 0; page < kPages; ++page) use_page(page, device.stream());
    }).join();
    EXPECT_EQ(end_capture(other), cuda::kSuccess);
  }
  device.synchronize(device.stream());
  EXPECT_EQ(device.wrong(), 0u);
  EXPECT_GE(pager.residency().counters().evictions, 20u);
}

TEST_F(StreamOrderTest, closing_beside_a_capture_gives_everything_back_and_does_not_spoil_it) {
  const cuda::Stream other = device.make_stream();
  for (std::size_t page = 0; page < kPages; ++page) use_page(page, device.stream());
  device.synchronize(device.stream());
  // The executor has looked at the events: nothing has to be waited for.
  for (std::size_t page = 0; page < kPages; ++page) use_page(page, device.stream());
  device.synchronize(device.stream());
  begin_capture(other, cuda::kStreamCaptureModeGlobal);
  pager.close();
  EXPECT_EQ(end_capture(other), cuda::kSuccess);
  EXPECT_EQ(device.standin().alive().mappings, 0u);
  EXPECT_EQ(device.standin().alive().handles, 0u);
  EXPECT_EQ(device.wrong(), 0u);
}

// What nobody can wait for stays where it is: the kernel that was not released yet reads right bytes.
TEST_F(StreamOrderTest, closing_in_the_middle_of_a_step_and_a_capture_takes_nothing_away) {
  const cuda::Stream other = device.make_stream();
  pager.acquire(sets[0], {}, device.stream());
  for (int i = 0; i < 5; ++i) check_page(0, device.stream());
  begin_capture(other, cuda::kStreamCaptureModeGlobal);
  pager.close();
  EXPECT_EQ(end_capture(other), cuda::kErrorStreamCaptureInvalidated);  // it had to ask whether it might wait
  device.synchronize(device.stream());
  EXPECT_EQ(device.wrong(), 0u);
  EXPECT_EQ(device.standin().context_error(), cuda::kSuccess);
  EXPECT_GT(device.standin().alive().mappings, 0u);
  EXPECT_THROW(pager.acquire(sets[0], {}, device.stream()), Error);
}

}  // namespace
}  // namespace tp
