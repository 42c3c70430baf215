// SPDX-License-Identifier: Apache-2.0
// Pages that are read straight into device frames, by the stand-in for cuFile: which ones, and what happens when a read
// fails. That they show the right bytes is the business of pager_test and device_pager_test, which run on it too.
#include "pager/direct_reader.hpp"

#include <gtest/gtest.h>

#include "device_sweep.hpp"
#include "sim/standin_cufile.hpp"
#include "standin_fixture.hpp"

namespace tp {
namespace {

using test::device_options;
using test::kDevicePage;
using test::kMemoryDirectory;
using test::one_set_per_page;
using test::PatternFile;
using test::slow_device;
using test::StandinDevice;
using test::sweep;
using test::SweepSchedule;

TEST(DirectReader, a_read_that_cufile_fails_names_the_file_and_can_be_tried_again) {
  tensorpager_standin_cufile()->reset();
  StandinDevice device(slow_device(4, 4));
  const PatternFile file(6 * kDevicePage - 8, 7, kMemoryDirectory);
  {
    Pager pager(device_options(4, 5, Transport::cufile));
    EXPECT_EQ(pager.transport(), "cufile");
    const Region region = pager.map_file(file.path(), 8);
    const std::vector<SetId> sets = one_set_per_page(pager, region);
    for (std::size_t page = 2; page < 6; ++page) {  // the host tier is full then, but for the frame that it keeps free
      pager.acquire(sets[page], {}, device.stream());
      pager.release(sets[page], device.stream());
    }
    for (const char* call : {"cuFileHandleRegister", "cuFileRead"}) {
      tensorpager_standin_cufile()->arm({call, 1, cufile::kErrorInternal, cuda::kSuccess, false});
      try {
        pager.acquire(sets[1], {}, device.stream());
        FAIL() << call;
      } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::io) << error.what();
      }
      EXPECT_EQ(tensorpager_standin_cufile()->fired(), 1u);
      EXPECT_EQ(pager.residency().pinned_pages(), 0u);
    }
    sweep(device, pager, region, {sets[0], sets[1], sets[2], sets[3], sets[4], sets[5]}, 2);
    EXPECT_EQ(pager.residency().counters().failures, 2u);
    EXPECT_GE(pager.residency().counters().direct_reads, 4u);
  }
  EXPECT_EQ(tensorpager_standin_cufile()->alive().total(), 0u);
}

// What the schedule will ask the host tier for is read through it, and read once.
TEST(DirectReader, straight_reads_leave_the_host_tier_what_it_can_hold) {
  tensorpager_standin_cufile()->reset();
  constexpr std::size_t kPages = 20, kFrames = 6;
  for (const std::size_t host_frames : {std::size_t{4}, kPages + 12}) {
    StandinDevice device(slow_device(4, kFrames));
    const PatternFile file(kPages * kDevicePage, 7, kMemoryDirectory);
    Pager pager(device_options(kFrames, host_frames, Transport::cufile));
    const Region region = pager.map_file(file.path());
    const std::vector<SetId> sets = one_set_per_page(pager, region);
    const SweepSchedule schedule(sets, kFrames, 4);
    pager.set_schedule(schedule.arrays());
    sweep(device, pager, region, sets, 4);
    const Counters counts = pager.residency().counters();
    if (host_frames > kPages) {
      EXPECT_LE(counts.reads + counts.direct_reads, kPages);
      EXPECT_GT(counts.host_hits, 2 * kPages);
    } else {
      EXPECT_GT(counts.direct_reads, 2 * kPages);
      EXPECT_LE(counts.reads + counts.direct_reads, counts.page_ins);
    }
  }
}

TEST(DirectReader, cufile_is_chosen_where_it_is_direct_alone) {
  tensorpager_standin_cufile()->reset();
  StandinDevice device(slow_device(4, 4));
  PagerOptions options = device_options(4, 5, Transport::automatic);
  {
    const Pager pager(options);  // this machine has no nvidia-fs
    EXPECT_EQ(pager.transport(), "host");
    EXPECT_NE(pager.transport_reason().find("not direct"), std::string::npos) << pager.transport_reason();
  }
  options.device->transport = Transport::cufile;
  options.device->cufile_library = "libno-such-cufile.so";
  try {
    const Pager pager(options);
    FAIL() << "there is no such library";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::engine);
    EXPECT_NE(std::string(error.what()).find("libno-such-cufile.so"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace tp
