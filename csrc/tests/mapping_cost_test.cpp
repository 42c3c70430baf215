// SPDX-License-Identifier: Apache-2.0
// The page size that follows from what mapping costs, and the measuring of it.
#include "device/mapping_cost.hpp"

#include <gtest/gtest.h>

#include "device_sweep.hpp"
#include "standin_fixture.hpp"

namespace tp {
namespace {

using test::slow_device;
using test::StandinDevice;

TEST(MappingCost, the_smallest_page_whose_mapping_is_cheap_is_chosen) {
  const std::vector<MappingCost> costs{
      {2 * kMiB, 20'000, 10'000}, {4 * kMiB, 20'000, 10'000}, {8 * kMiB, 20'000, 10'000}, {16 * kMiB, 21'000, 10'000}};
  // At 50 GB/s 2 MiB take 42 us, 16 MiB 336 us; 5 % of the latter are less than the 31 us of mapping.
  EXPECT_EQ(choose_page_bytes(costs, 50e9), 16 * kMiB);
  EXPECT_EQ(choose_page_bytes(costs, 12e9), 8 * kMiB);
  EXPECT_EQ(choose_page_bytes(costs, 1e9), 2 * kMiB);
}

TEST(MappingCost, is_measured_for_every_page_size_and_leaves_nothing_behind) {
  StandinDevice device(slow_device(8, 32));
  {
    const CudaDevice measured(StandinDevice::driver(), 0);
    const std::vector<MappingCost> costs = measure_mapping_cost(measured, 16 * kMiB);
    ASSERT_EQ(costs.size(), 4u);
    for (const MappingCost& cost : costs) EXPECT_GT(cost.map_ns, 0);
    EXPECT_GT(measure_link_bandwidth(measured), 0);
  }
  device.close();
  EXPECT_EQ(device.standin().alive().total(), 0u);
}

}  // namespace
}  // namespace tp
