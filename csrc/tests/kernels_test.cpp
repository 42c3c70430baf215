// SPDX-License-Identifier: Apache-2.0
// The kernels: their references against definitions and libraries, then one set of vectors through the launcher, on the
// stand-in (whose kernels are the references) and on a GPU where there is one.
#include "device/kernels.hpp"

#include <gtest/gtest.h>
#include <xxhash.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "base/tree_checksum.hpp"
#include "device/number_formats.hpp"
#include "standin_fixture.hpp"
#include "standin_kernels.hpp"

namespace tp {
namespace {

using kernel::CopyJob;
using kernel::DequantiseJob;
using kernel::FloatFormat;
using kernel::QuantisedFormat;
using test::host_address;

std::vector<std::byte> random_bytes(std::size_t size, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::byte> bytes(size);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

// ---------------------------------------------------------------- the references

TEST(TreeChecksum, of_one_chunk_is_the_hash_of_the_library) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    const std::vector<std::byte> bytes = random_bytes(4096, seed);
    std::uint64_t hash = 0;
    const kernel::HashJob job{host_address(&hash), host_address(bytes.data()), bytes.size()};
    kernel::hash_chunks_reference({&job, 1});
    EXPECT_EQ(hash, XXH3_64bits(bytes.data(), bytes.size()));
    EXPECT_EQ(tree_checksum(bytes), hash);
  }
}

TEST(TreeChecksum, of_many_chunks_is_that_of_their_hashes) {
  const std::vector<std::byte> bytes = random_bytes(3 * 4096 + 5, 1);
  std::vector<std::byte> filled = bytes;
  filled.resize(4 * 4096);
  std::vector<std::uint64_t> hashes(512);
  for (std::size_t chunk = 0; chunk < 4; ++chunk) hashes[chunk] = XXH3_64bits(filled.data() + chunk * 4096, 4096);
  EXPECT_EQ(tree_checksum(bytes), XXH3_64bits(hashes.data(), 4096));
}

TEST(TreeChecksum, differs_when_any_bit_does) {
  std::vector<std::byte> bytes = random_bytes(5 * 4096 + 100, 2);
  const std::uint64_t before = tree_checksum(bytes);
  for (const std::size_t place : {std::size_t{0}, std::size_t{4095}, std::size_t{4096}, bytes.size() - 1}) {
    for (int bit = 0; bit < 8; ++bit) {
      bytes[place] ^= std::byte{1} << bit;
      EXPECT_NE(tree_checksum(bytes), before) << place << ' ' << bit;
      bytes[place] ^= std::byte{1} << bit;
    }
  }
  EXPECT_EQ(tree_checksum(bytes), before);
}

// By the text of the formats: sign, exponent, fraction.
double value_of(std::uint32_t code, int exponent_bits, int fraction_bits, bool has_infinities) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(code >> fraction_bits) & ((1 << exponent_bits) - 1);
  const int fraction = static_cast<int>(code) & ((1 << fraction_bits) - 1);
  const double sign = (code >> (exponent_bits + fraction_bits) & 1) != 0 ? -1 : 1;
  const bool top = exponent == (1 << exponent_bits) - 1;
  if (has_infinities && top) return fraction == 0 ? sign * INFINITY : NAN;
  if (!has_infinities && top && fraction == (1 << fraction_bits) - 1) return NAN;
  const double significand = std::ldexp(fraction, -fraction_bits) + (exponent == 0 ? 0 : 1);
  return sign * std::ldexp(significand, std::max(exponent, 1) - bias);
}

TEST(NumberFormats, every_code_has_the_value_of_its_format) {
  for (std::uint32_t code = 0; code < 256; ++code) {
    const auto byte = static_cast<std::uint8_t>(code);
    EXPECT_EQ(kernel::float_of_code(byte, QuantisedFormat::int8), code < 128 ? int(code) : int(code) - 256);
    for (const bool e4m3 : {true, false}) {
      const double expected = e4m3 ? value_of(code, 4, 3, false) : value_of(code, 5, 2, true);
      const float value = kernel::float_of_code(byte, e4m3 ? QuantisedFormat::fp8_e4m3 : QuantisedFormat::fp8_e5m2);
      if (std::isnan(expected)) {
        EXPECT_TRUE(std::isnan(value)) << code;
      } else {
        EXPECT_EQ(value, expected) << code;
        EXPECT_EQ(std::signbit(value), std::signbit(expected)) << code;
      }
    }
  }
  EXPECT_EQ(kernel::float_of_code(0x7E, QuantisedFormat::fp8_e4m3), 448.0f);    // the largest, of the specification
  EXPECT_EQ(kernel::float_of_code(0x7B, QuantisedFormat::fp8_e5m2), 57344.0f);  // likewise
}

// No other code is nearer; of two as near, the even one.
void expect_nearest(float value, FloatFormat format) {
  const bool is_half = format == FloatFormat::float16;
  const auto decoded = [=](std::uint32_t code) {
    return is_half ? value_of(code, 5, 10, true) : value_of(code, 8, 7, true);
  };
  const std::uint16_t code = kernel::code_of_float(value, format);
  if (std::isnan(value)) {
    EXPECT_EQ(code, is_half ? 0x7E00 : 0x7FC0);
    return;
  }
  ASSERT_EQ(std::signbit(value), code >> 15 != 0) << value;
  const std::uint16_t infinity = is_half ? 0x7C00 : 0x7F80;
  const std::uint16_t magnitude = code & 0x7FFF;
  ASSERT_LE(magnitude, infinity) << value;
  // For rounding infinity stands where the next number would.
  const double top = is_half ? 65536.0 : std::ldexp(1.0, 128);
  const auto place = [&](std::uint32_t other) { return other == infinity ? top : decoded(other); };
  const double wanted = std::min(std::abs(static_cast<double>(value)), top);
  const double here = std::abs(place(magnitude) - wanted);
  for (const int step : {-1, 1}) {
    const int other = magnitude + step;
    if (other < 0 || other > infinity) continue;
    const double there = std::abs(place(static_cast<std::uint32_t>(other)) - wanted);
    ASSERT_TRUE(here < there || (here == there && magnitude % 2 == 0)) << value << ' ' << code;
  }
}

TEST(NumberFormats, floats_go_to_the_nearest_16_bit_number) {
  std::mt19937 random(7);
  for (const FloatFormat format : {FloatFormat::bfloat16, FloatFormat::float16}) {
    for (const float value :
         {0.0f, -0.0f, 1.0f, 65504.0f, 65519.99f, 65520.0f, -65520.0f, 1e-8f, 2.9802322e-8f, 2.98023224e-8f,
          5.9604645e-8f, 6.0975552e-5f, 6.1035156e-5f, std::numeric_limits<float>::infinity(),
          -std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN(),
          std::numeric_limits<float>::max(), std::numeric_limits<float>::denorm_min()})
      expect_nearest(value, format);
    for (int i = 0; i < 200'000; ++i) {
      const auto bits = static_cast<std::uint32_t>(random());
      expect_nearest(kernel::float_of_bits(bits), format);
      expect_nearest(kernel::float_of_bits(bits & 0xFFFFF000u), format);  // ties
      expect_nearest(kernel::float_of_bits((bits & 0x80FFFFFFu) + (102u << 23) + (bits >> 24 & 31u) * (1u << 23)),
                     format);
    }
  }
}

// ---------------------------------------------------------------- through the launcher

class KernelsTest : public testing::TestWithParam<const char*> {
 protected:
  // bench/gpu_check.py sets the variable: there a test that does not run is a failure.
  static void cannot_run(const char* reason) {
    if (std::getenv("TENSORPAGER_REQUIRE_GPU") != nullptr) FAIL() << reason;
    GTEST_SKIP() << reason;
  }
  void SetUp() override {
    const bool on_gpu = GetParam() == std::string("gpu");
    if (!on_gpu) {
      StandinOptions options;
      options.device_memory_bytes = std::size_t{256} << 20;
      standin_ = std::make_unique<test::StandinDevice>(options);
      test::add_kernels(standin_->standin());
      device_ = std::make_shared<CudaDevice>(test::StandinDevice::driver(), 0);
      kernels_ =
          std::make_unique<Kernels>(device_, std::as_bytes(std::span<const char, sizeof kStandinImage>(kStandinImage)));
    } else {
      try {
        device_ = std::make_shared<CudaDevice>(CudaDriver::system(), 0);
      } catch (const Error& error) {
        return cannot_run(error.what());
      }
      if (kernel_image().empty()) return cannot_run("built without nvcc");
      kernels_ = std::make_unique<Kernels>(device_);
    }
    current_ = std::make_unique<CudaDevice::Current>(*device_);
    stream_ = device_->make_stream();
  }
  void TearDown() override {
    if (device_ == nullptr) return;
    for (const cuda::DevicePtr memory : allocated_) driver().cuMemFree.result(memory);
    for (void* memory : registered_) driver().cuMemHostUnregister.result(memory);
    if (stream_ != nullptr) driver().cuStreamDestroy.result(stream_);
    kernels_.reset();
    current_.reset();
    device_.reset();
  }

  const CudaDriver& driver() const { return device_->driver(); }
  cuda::DevicePtr allocate(std::size_t size) {
    cuda::DevicePtr memory = 0;
    driver().cuMemAlloc(&memory, std::max<std::size_t>(size, 16));
    allocated_.push_back(memory);
    return memory;
  }
  cuda::DevicePtr uploaded(std::span<const std::byte> bytes) {
    const cuda::DevicePtr memory = allocate(bytes.size());
    driver().cuMemcpyHtoDAsync(memory, static_cast<const void*>(bytes.data()), bytes.size(), stream_);
    driver().cuStreamSynchronize(stream_);
    return memory;
  }
  std::vector<std::byte> downloaded(cuda::DevicePtr memory, std::size_t size) {
    std::vector<std::byte> bytes(size);
    driver().cuMemcpyDtoHAsync(static_cast<void*>(bytes.data()), memory, size, stream_);
    driver().cuStreamSynchronize(stream_);
    return bytes;
  }
  // Registered host memory as the device sees it.
  cuda::DevicePtr registered(std::vector<std::byte>& bytes) {
    driver().cuMemHostRegister(static_cast<void*>(bytes.data()), bytes.size(),
                               cuda::kHostRegisterPortable | cuda::kHostRegisterDeviceMap);
    registered_.push_back(bytes.data());
    cuda::DevicePtr address = 0;
    driver().cuMemHostGetDevicePointer(&address, static_cast<void*>(bytes.data()), 0u);
    return address;
  }

  std::unique_ptr<test::StandinDevice> standin_;
  std::shared_ptr<CudaDevice> device_;
  std::unique_ptr<Kernels> kernels_;
  std::unique_ptr<CudaDevice::Current> current_;
  cuda::Stream stream_ = nullptr;
  std::vector<cuda::DevicePtr> allocated_;
  std::vector<void*> registered_;
};

TEST_P(KernelsTest, gather_copies_every_piece_and_nothing_beside_it) {
  constexpr std::size_t kRoom = std::size_t{8} << 20;
  std::vector<std::byte> source = random_bytes(kRoom, 3);
  const std::vector<std::byte> before = random_bytes(kRoom, 4);
  const cuda::DevicePtr from = registered(source), to = uploaded(before);
  std::vector<std::byte> expected = before;
  std::vector<CopyJob> jobs;
  std::mt19937_64 random(5);
  // More than a launch takes. The destinations follow one another with gaps; alignments of every kind.
  for (std::size_t place = 0; jobs.size() < 400;) {
    const std::size_t align = std::size_t{1} << random() % 6;
    const std::size_t size = jobs.size() % 10 == 0 ? random() % 60'000 : random() % 3000;
    const std::size_t begin = random() % (kRoom - size) / align * align;
    place = (place + align - 1) / align * align;
    ASSERT_LE(place + size, kRoom);
    jobs.push_back({to + place, from + begin, size});
    std::memcpy(expected.data() + place, source.data() + begin, size);
    place += size + random() % 40;
  }
  kernels_->gather(jobs, stream_);
  EXPECT_TRUE(downloaded(to, kRoom) == expected);
}

TEST_P(KernelsTest, tree_checksums_are_those_of_the_host) {
  std::vector<std::size_t> sizes{1, 7, 8, 4095, 4096, 4097, 2 << 20, (2 << 20) + 1, (2 << 20) + 4096, 20 << 20};
  for (std::size_t i = 0; i < 300; ++i) sizes.push_back(1 + i * 97);
  std::vector<Kernels::ChecksumJob> jobs;
  std::vector<std::uint64_t> expected;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    const std::vector<std::byte> bytes = random_bytes(sizes[i], 100 + i);
    jobs.push_back({uploaded(bytes), sizes[i]});
    expected.push_back(tree_checksum(bytes));
  }
  const std::size_t result_bytes = jobs.size() * sizeof(std::uint64_t);
  const cuda::DevicePtr checksums = allocate(result_bytes);
  const cuda::DevicePtr scratch = allocate(Kernels::scratch_bytes(jobs.size(), 20 << 20));
  kernels_->tree_checksums(jobs, checksums, scratch, stream_);
  const std::vector<std::byte> bytes = downloaded(checksums, result_bytes);
  std::vector<std::uint64_t> result(jobs.size());
  std::memcpy(result.data(), bytes.data(), result_bytes);
  for (std::size_t i = 0; i < sizes.size(); ++i) EXPECT_EQ(result[i], expected[i]) << sizes[i];
}

TEST_P(KernelsTest, dequantise_gives_the_bits_of_the_reference) {
  for (const QuantisedFormat from : {QuantisedFormat::int8, QuantisedFormat::fp8_e4m3, QuantisedFormat::fp8_e5m2}) {
    for (const FloatFormat to : {FloatFormat::bfloat16, FloatFormat::float16}) {
      for (const std::uint64_t block_elements : {8u, 64u, 128u}) {
        const std::size_t count = 256 * 64 + 5;
        std::vector<std::byte> codes(count);
        for (std::size_t i = 0; i < count; ++i) codes[i] = static_cast<std::byte>(i / 3 + i);
        std::vector<float> scales((count + block_elements - 1) / block_elements);
        std::mt19937 random(9);
        for (float& scale : scales)
          scale = std::ldexp(1.0f + static_cast<float>(random() % 1000) / 1000, static_cast<int>(random() % 60) - 40);
        std::vector<std::byte> scale_bytes(scales.size() * sizeof(float));
        std::memcpy(scale_bytes.data(), scales.data(), scale_bytes.size());
        std::vector<std::uint16_t> expected(count);
        const DequantiseJob here{host_address(expected.data()), host_address(codes.data()), host_address(scales.data()),
                                 count};
        kernel::dequantise_reference({&here, 1}, block_elements, from, to);

        const cuda::DevicePtr source = registered(codes);
        const DequantiseJob job{allocate(2 * count), source, uploaded(scale_bytes), count};
        kernels_->dequantise({&job, 1}, block_elements, from, to, stream_);
        const std::vector<std::byte> result = downloaded(job.destination, 2 * count);
        EXPECT_EQ(std::memcmp(result.data(), expected.data(), 2 * count), 0)
            << static_cast<int>(from) << ' ' << static_cast<int>(to) << ' ' << block_elements;
        driver().cuMemHostUnregister(registered_.back());
        registered_.pop_back();
      }
    }
  }
}

TEST_P(KernelsTest, jobs_that_break_their_rules_are_refused) {
  const cuda::DevicePtr memory = allocate(4096);
  const Kernels::ChecksumJob odd{memory + 4, 100}, empty{memory, 0};
  EXPECT_THROW(kernels_->tree_checksums({&odd, 1}, memory, memory, stream_), Error);
  EXPECT_THROW(kernels_->tree_checksums({&empty, 1}, memory, memory, stream_), Error);
  const DequantiseJob job{memory + 8, memory, memory, 16}, right{memory, memory, memory, 16};
  EXPECT_THROW(kernels_->dequantise({&job, 1}, 64, QuantisedFormat::int8, FloatFormat::bfloat16, stream_), Error);
  EXPECT_THROW(kernels_->dequantise({&right, 1}, 4, QuantisedFormat::int8, FloatFormat::bfloat16, stream_), Error);
}

INSTANTIATE_TEST_SUITE_P(devices, KernelsTest, testing::Values("standin", "gpu"),
                         [](const auto& each) { return std::string(each.param); });

TEST(KernelImage, another_driver_refuses_it_with_a_reason) {
  test::StandinDevice device(StandinOptions{});
  const auto cuda_device = std::make_shared<CudaDevice>(test::StandinDevice::driver(), 0);
  try {
    const Kernels kernels(cuda_device);
    FAIL() << "the stand-in takes no fatbin";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::engine);
    EXPECT_NE(std::string(error.what()).find(kernel_image().empty() ? "nvcc" : "refuses"), std::string::npos);
  }
}

}  // namespace
}  // namespace tp
