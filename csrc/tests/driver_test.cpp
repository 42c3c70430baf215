// SPDX-License-Identifier: Apache-2.0
// The driver's table: what load() says when there is no driver, and what each call says when it fails.
#include "device/driver.hpp"

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "base/error.hpp"
#include "sim/standin_driver.hpp"
#include "thrown_error.hpp"

namespace tp {
namespace {

using test::error_of;
using test::has;

using cuda::Result;

class DriverTest : public testing::Test {
 protected:
  void SetUp() override { standin().reset(); }
  void TearDown() override { standin().reset(); }
  static StandinDriver& standin() { return *tensorpager_standin_driver(); }
  static const CudaDriver& driver() { return CudaDriver::load(TENSORPAGER_STANDIN_DRIVER); }
};

// Every call of the table but the two that name errors, which can't fail; with arguments that nobody looks at, since a
// failure comes first.
template <class... Parameters>
void call(const CudaEntryPoint<Result(Parameters...)>& entry) {
  entry(std::remove_cvref_t<Parameters>{}...);
}
std::map<std::string, std::function<void()>> calls_of(const CudaDriver& driver) {
  std::map<std::string, std::function<void()>> calls;
#define TP_TEST_CALL(name, parameters) calls[#name] = [&driver] { call(driver.name); };
  TP_CUDA_ENTRY_POINTS(TP_TEST_CALL)
#undef TP_TEST_CALL
  calls.erase("cuGetErrorName");
  calls.erase("cuGetErrorString");
  return calls;
}

ErrorKind kind_of(Result result) { return result == cuda::kErrorOutOfMemory ? ErrorKind::memory : ErrorKind::device; }

TEST_F(DriverTest, ALibraryThatIsNotThereIsAnEngineErrorWithTheReason) {
  const Error error = error_of([] { CudaDriver::load("/no/such/libcuda.so.1"); });
  EXPECT_EQ(error.kind(), ErrorKind::engine);
  EXPECT_TRUE(has(error.what(), "no CUDA driver")) << error.what();
  EXPECT_TRUE(has(error.what(), "/no/such/libcuda.so.1")) << error.what();
  EXPECT_TRUE(has(error.what(), "12.0")) << error.what();
}

TEST_F(DriverTest, ALibraryThatIsNoDriverIsAnEngineError) {
  const Error error = error_of([] { CudaDriver::load("libm.so.6"); });
  EXPECT_EQ(error.kind(), ErrorKind::engine);
  EXPECT_TRUE(has(error.what(), "libm.so.6")) << error.what();
}

// Another spelling of the path is another table of the same library.
std::string spelled_anew() {
  static std::string path = TENSORPAGER_STANDIN_DRIVER;
  path.insert(path.rfind('/'), "/.");
  return path;
}

TEST_F(DriverTest, ADriverThatLacksAnEntryPointIsAnEngineErrorThatNamesIt) {
  standin().reset({.missing_entry_point = "cuMemUnmap"});
  const Error error = error_of([] { CudaDriver::load(spelled_anew()); });
  EXPECT_EQ(error.kind(), ErrorKind::engine);
  EXPECT_TRUE(has(error.what(), "cuMemUnmap")) << error.what();
}

TEST_F(DriverTest, AnOlderDriverIsAnEngineErrorThatSaysSo) {
  standin().reset({.driver_version = 11080});
  const Error error = error_of([] { CudaDriver::load(spelled_anew()); });
  EXPECT_EQ(error.kind(), ErrorKind::engine);
  EXPECT_TRUE(has(error.what(), "the driver is older")) << error.what();
  EXPECT_TRUE(has(error.what(), "12.0")) << error.what();
}

TEST_F(DriverTest, AMachineWithoutADeviceIsAnEngineError) {
  standin().reset({.device_count = 0});
  const Error error = error_of([] { CudaDriver::load(spelled_anew()); });
  EXPECT_EQ(error.kind(), ErrorKind::engine);
  EXPECT_EQ(error.error_number(), cuda::kErrorNoDevice);
  EXPECT_TRUE(has(error.what(), "CUDA_ERROR_NO_DEVICE")) << error.what();
}

TEST_F(DriverTest, AFailedLoadIsTriedAgain) {
  const std::string path = spelled_anew();
  standin().reset({.device_count = 0});
  EXPECT_THROW(CudaDriver::load(path), Error);
  standin().reset();
  EXPECT_EQ(CudaDriver::load(path).library_path(), path);
}

TEST_F(DriverTest, TheVersionIsTheDriversOwn) {
  EXPECT_EQ(driver().version(), 13000);
  standin().reset({.driver_version = 12040});
  EXPECT_EQ(CudaDriver::load(spelled_anew()).version(), 12040);
}

TEST_F(DriverTest, OneTableForOnePath) { EXPECT_EQ(&driver(), &driver()); }

TEST_F(DriverTest, EveryCallThatFailsOnceIsATypedErrorThatNamesIt) {
  for (const auto& [name, call] : calls_of(driver())) {
    for (const Result result :
         {cuda::kErrorOutOfMemory, cuda::kErrorNotReady, cuda::kErrorIllegalAddress, cuda::kErrorDeinitialized}) {
      standin().arm({.call = name, .result = result});
      const Error error = error_of(call);
      EXPECT_EQ(error.kind(), kind_of(result)) << name << ' ' << result;
      EXPECT_EQ(error.error_number(), result) << name;
      EXPECT_TRUE(has(error.what(), name + " failed")) << error.what();
      EXPECT_EQ(has(error.what(), "context is lost"), context_is_lost(result)) << error.what();
      EXPECT_EQ(standin().fired(), 1u) << name;
    }
  }
}

TEST_F(DriverTest, EveryCallThatKeepsFailingSaysItEachTime) {
  for (const auto& [name, call] : calls_of(driver())) {
    for (const Result result :
         {cuda::kErrorOutOfMemory, cuda::kErrorNotReady, cuda::kErrorIllegalAddress, cuda::kErrorDeinitialized}) {
      standin().arm({.call = name, .result = result, .effect = StandinEffect::sticky});
      for (int time = 0; time < 3; ++time) EXPECT_EQ(error_of(call).error_number(), result) << name;
      EXPECT_EQ(standin().fired(), 3u) << name;
    }
  }
}

TEST_F(DriverTest, ResultHandsOutWhatTheCallSays) {
  standin().arm({.call = "cuEventQuery", .result = cuda::kErrorNotReady});
  EXPECT_EQ(driver().cuEventQuery.result(nullptr), cuda::kErrorNotReady);
}

TEST_F(DriverTest, AnErrorThatTheDriverCannotNameIsStillAnError) {
  const Error error = driver().error("cuMemMap", 12345);
  EXPECT_EQ(error.kind(), ErrorKind::device);
  EXPECT_TRUE(has(error.what(), "cuMemMap failed")) << error.what();
  EXPECT_TRUE(has(error.what(), "12345")) << error.what();
}

TEST(ContextIsLost, AfterTheErrorsThatCudaSaysItOf) {
  for (const Result result : {4, 214, 220, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 911})
    EXPECT_TRUE(context_is_lost(result)) << result;
  for (const Result result : {0, 1, 2, 3, 100, 101, 200, 201, 400, 500, 600, 701, 709, 712, 800, 801, 999})
    EXPECT_FALSE(context_is_lost(result)) << result;
}

}  // namespace
}  // namespace tp
