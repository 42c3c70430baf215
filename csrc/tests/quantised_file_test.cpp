// SPDX-License-Identifier: Apache-2.0
// Pages of a quantised file in a pager, on the host, on a device by its kernels and on one that has none: the same
// bits, half the bytes read, and what is written stays.
#include "pager/quantised_file.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "device_sweep.hpp"
#include "standin_fixture.hpp"
#include "standin_kernels.hpp"
#include "thrown_error.hpp"

namespace tp {
namespace {

constexpr std::size_t kPage = test::kDevicePage;
constexpr std::size_t kNumbers = kPage / 2;

std::vector<std::uint16_t> some_numbers(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::uint16_t> numbers(count);
  for (std::uint16_t& number : numbers)  // bfloat16 of magnitudes from 2^-7 to 2
    number = static_cast<std::uint16_t>((random() & 0x8000u) | (120 + random() % 8) << 7 | (random() & 0x7Fu));
  return numbers;
}

class QuantisedFileTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (on_device()) standin_ = std::make_unique<test::StandinDevice>(StandinOptions{});
    if (with_kernels()) test::add_kernels(standin_->standin());
  }
  void TearDown() override {
    if (standin_ == nullptr) return;
    EXPECT_TRUE(standin_->standin().violations().empty());
  }
  bool on_device() const { return std::string(GetParam()) != "host"; }
  bool with_kernels() const { return std::string(GetParam()) == "kernels"; }
  PagerOptions options(std::size_t frames) const {
    PagerOptions result = test::device_options(frames, 4);
    result.device->kernels = {};
    if (with_kernels())
      result.device->kernels = std::as_bytes(std::span<const char, sizeof kStandinImage>(kStandinImage));
    if (!on_device()) result.device.reset();
    return result;
  }
  static void see(Pager& pager, std::byte* page, const std::function<void()>& look, bool writes = false) {
    const std::optional<SetId> held = pager.hold({page, kPage}, {});
    ASSERT_TRUE(held.has_value());
    pager.synchronize(nullptr);
    look();
    if (writes) pager.mark_written(*held);
    pager.release(*held);
  }
  // What each page must show.
  static std::vector<std::vector<std::byte>> expected_pages(std::span<const std::uint16_t> numbers,
                                                            const QuantisedLayout& layout) {
    std::vector<std::vector<std::byte>> pages;
    for (std::size_t begin = 0; begin < numbers.size(); begin += kNumbers) {
      std::vector<std::byte>& page = pages.emplace_back(kPage);
      quantise_record(numbers.subspan(begin, std::min(kNumbers, numbers.size() - begin)), layout, kPage, 0,
                      page.data());
      dequantise_in_place(page.data(), layout, kPage);
    }
    return pages;
  }

  std::unique_ptr<test::StandinDevice> standin_;
};

TEST_P(QuantisedFileTest, pages_are_the_same_numbers_everywhere_for_half_the_bytes) {
  const QuantisedLayout layout;
  QuantisedFile file("/var/tmp", layout, kPage);
  const std::vector<std::uint16_t> first = some_numbers(10 * kNumbers, 1), second = some_numbers(kNumbers + 77, 2);
  EXPECT_EQ(file.append(first), 0u);
  EXPECT_EQ(file.append(second), 10u);
  EXPECT_EQ(file.record_count(), 12u);
  std::vector<std::vector<std::byte>> expected = expected_pages(first, layout);
  for (std::vector<std::byte>& page : expected_pages(second, layout)) expected.push_back(std::move(page));

  Pager pager(options(8));
  const Region region = pager.map_quantised(std::move(file));
  ASSERT_EQ(region.pages.count, expected.size());
  EXPECT_EQ(pager.quantised_reason().empty(), GetParam() != std::string("no_kernels"));
  for (int pass = 0; pass < 2; ++pass) {
    for (std::size_t i = 0; i < expected.size(); ++i) {
      std::byte* page = region.address + i * kPage;
      see(pager, page, [&] { ASSERT_EQ(std::memcmp(page, expected[i].data(), kPage), 0) << i; });
    }
  }
  const Counters counts = pager.residency().counters();
  EXPECT_EQ(counts.page_ins, 24u);
  EXPECT_EQ(counts.writebacks, 0u);
  const std::uint64_t reads = on_device() ? counts.reads : counts.page_ins;
  EXPECT_EQ(pager.io_counters().bytes_read, reads * record_bytes(layout, kPage));
  EXPECT_LT(record_bytes(layout, kPage), kPage * 53 / 100);
  EXPECT_EQ(counts.dequantised, with_kernels() ? counts.page_ins : reads);
  EXPECT_EQ(counts.dequantised_on_device, with_kernels() ? 24u : 0u);
  if (with_kernels()) EXPECT_EQ(pager.bytes_to_device(), 24 * (kNumbers + kNumbers / 128 * 4));
  if (on_device() && !with_kernels()) EXPECT_EQ(pager.bytes_to_device(), 24 * kPage);
}

TEST_P(QuantisedFileTest, what_is_written_to_a_page_stays_exact) {
  QuantisedFile file("/var/tmp", {}, kPage);
  const std::vector<std::uint16_t> numbers = some_numbers(14 * kNumbers, 3);
  file.append(numbers);
  std::vector<std::vector<std::byte>> expected = expected_pages(numbers, {});
  Pager pager(options(8));
  const Region region = pager.map_quantised(std::move(file));
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (i % 3 == 2) continue;
    std::byte* page = region.address + i * kPage;
    const std::uint64_t value = 0x0123456789ABCDEF + i;  // no code and scale give these
    std::memcpy(expected[i].data() + 8 * i, &value, sizeof value);
    see(pager, page, [&] { std::memcpy(page + 8 * i, &value, sizeof value); }, true);
  }
  for (int pass = 0; pass < 2; ++pass) {
    for (std::size_t i = 0; i < expected.size(); ++i) {
      std::byte* page = region.address + i * kPage;
      see(pager, page, [&] { ASSERT_EQ(std::memcmp(page, expected[i].data(), kPage), 0) << i; });
    }
  }
  EXPECT_GT(pager.residency().counters().writebacks, 0u);
}

TEST_P(QuantisedFileTest, a_damaged_record_is_an_error_that_names_it) {
  const QuantisedLayout layout;
  QuantisedFile file("/dev/shm", layout, kPage);
  file.append(some_numbers(4 * kNumbers, 4));
  File damaged = File(std::move(file.file()));
  const std::uint64_t place = 2 * record_bytes(layout, kPage) + 12345;
  unsigned char byte = 0;
  ASSERT_EQ(pread(damaged.descriptor(), &byte, 1, static_cast<off_t>(place)), 1);
  byte ^= 0x10;
  ASSERT_EQ(pwrite(damaged.descriptor(), &byte, 1, static_cast<off_t>(place)), 1);
  file.file() = std::move(damaged);
  Pager pager(options(10));
  const Region region = pager.map_quantised(std::move(file));
  const Error error = test::error_of([&] { pager.hold({region.address + 2 * kPage, 8}, {}); });
  EXPECT_EQ(error.kind(), ErrorKind::io);
  EXPECT_NE(std::string(error.what()).find("checksum"), std::string::npos) << error.what();
  EXPECT_NE(std::string(error.what()).find("page 2"), std::string::npos) << error.what();
  see(pager, region.address + kPage, [] {});
}

INSTANTIATE_TEST_SUITE_P(tiers, QuantisedFileTest, testing::Values("host", "kernels", "no_kernels"),
                         [](const auto& tier) { return std::string(tier.param); });

TEST(QuantisedFile, without_the_device_the_numbers_come_from_the_drive) {
  test::StandinDevice standin{StandinOptions{}};
  test::add_kernels(standin.standin());
  QuantisedFile file("/var/tmp", {}, kPage);
  const std::vector<std::uint16_t> numbers = some_numbers(3 * kNumbers, 5);
  file.append(numbers);
  PagerOptions options = test::device_options(8, 8);
  options.device->kernels = std::as_bytes(std::span<const char, sizeof kStandinImage>(kStandinImage));
  Pager pager(options);
  const Region region = pager.map_quantised(std::move(file));
  std::vector<std::byte> resident(3 * kPage), read(3 * kPage);
  const std::optional<SetId> held = pager.hold({region.address, 3 * kPage}, {});
  ASSERT_TRUE(held.has_value());
  pager.synchronize(nullptr);
  std::memcpy(resident.data(), region.address, resident.size());
  pager.release(*held);
  pager.read_without_device({region.address, 3 * kPage}, read.data());
  EXPECT_EQ(read, resident);
}

TEST(QuantisedFile, kernels_see_the_numbers_whatever_the_timing) {
  constexpr std::size_t kPages = 9;
  const std::vector<std::uint16_t> numbers = some_numbers(kPages * kNumbers, 10);
  std::vector<std::byte> expected(kPages * kPage);
  for (std::size_t i = 0; i < kPages; ++i) {
    quantise_record(std::span(numbers).subspan(i * kNumbers, kNumbers), {}, kPage, i, &expected[i * kPage]);
    dequantise_in_place(&expected[i * kPage], {}, kPage);
  }
  std::uint64_t made = 0;
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    test::StandinDevice device(test::slow_device(seed, 4));
    test::add_kernels(device.standin());
    QuantisedFile file("/dev/shm", {}, kPage);
    file.append(numbers);
    PagerOptions options = test::device_options(4, 4 + seed % 4);
    options.device->kernels = std::as_bytes(std::span<const char, sizeof kStandinImage>(kStandinImage));
    Pager pager(options);
    const Region region = pager.map_quantised(std::move(file));
    std::vector<SetId> sets;
    for (std::size_t i = 0; i < kPages; ++i) sets.push_back(pager.add_set({{region.address + i * kPage, 8}}, "page"));
    for (std::size_t step = 0; step < 40; ++step) {
      const std::size_t page = random() % kPages;
      pager.acquire(sets[page], {}, device.stream());
      test::KernelWork& work = device.new_work();
      for (int check = 0; check < 16; ++check) {
        const std::size_t offset = page * kPage + random() % (kPage / 8) * 8;
        std::uint64_t word = 0;
        std::memcpy(&word, &expected[offset], sizeof word);
        work.checks.push_back({test::device_pointer(region.address + offset), word});
      }
      device.launch(work, device.stream());
      pager.release(sets[page], device.stream());
    }
    device.synchronize(device.stream());
    made += pager.residency().counters().dequantised_on_device;
    pager.close();
    ASSERT_EQ(device.wrong(), 0u);
    ASSERT_TRUE(device.standin().violations().empty()) << device.standin().violations().front();
  }
  EXPECT_GT(made, 100u);
}

TEST(QuantisedFile, for_other_pages_or_without_any_is_refused) {
  PagerOptions options;
  options.budget_bytes = 16 * kPage;
  options.page_bytes = kPage;
  options.spill_directory = "/var/tmp";
  Pager pager(options);
  EXPECT_EQ(test::error_of([&] { pager.map_quantised(QuantisedFile("/var/tmp", {}, kPage)); }).kind(),
            ErrorKind::invalid);
  QuantisedFile once("/var/tmp", {}, kPage);
  once.append(some_numbers(100, 6));
  pager.map_quantised(std::move(once));
  EXPECT_EQ(test::error_of([&] { once.append(some_numbers(100, 6)); }).kind(), ErrorKind::invalid);
  EXPECT_EQ(test::error_of([&] { pager.map_quantised(std::move(once)); }).kind(), ErrorKind::invalid);
  QuantisedFile other("/var/tmp", {}, 2 * kPage);
  other.append(some_numbers(100, 6));
  EXPECT_EQ(test::error_of([&] { pager.map_quantised(std::move(other)); }).kind(), ErrorKind::invalid);
  EXPECT_EQ(test::error_of([&] { QuantisedFile("/nowhere", {}, kPage); }).kind(), ErrorKind::io);
}

TEST(QuantisedFile, of_numbers_that_codes_cannot_tell_is_as_before) {
  QuantisedFile file("/var/tmp", {}, kPage);
  file.append(some_numbers(10, 7));
  std::vector<std::uint16_t> numbers = some_numbers(2 * kNumbers, 8);
  numbers[kNumbers + 5] = 0x7F80;
  EXPECT_EQ(test::error_of([&] { file.append(numbers); }).kind(), ErrorKind::invalid);
  EXPECT_EQ(file.record_count(), 1u);
  EXPECT_EQ(file.append(some_numbers(10, 9)), 1u);
}

}  // namespace
}  // namespace tp
