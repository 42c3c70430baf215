// SPDX-License-Identifier: Apache-2.0
// cuFile's table: what load() says when there is no cuFile, what a failing call says, and whether transfers are direct.
#include "device/cufile.hpp"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <functional>
#include <string>

#include "base/error.hpp"
#include "sim/standin_cufile.hpp"
#include "tests/test_files.hpp"
#include "thrown_error.hpp"

namespace tp {
namespace {

using test::error_of;
using test::has;

class CufileTest : public testing::Test {
 protected:
  void SetUp() override { standin().reset(); }
  void TearDown() override {
    EXPECT_EQ(standin().violations(), std::vector<std::string>{});
    EXPECT_EQ(standin().reset().total(), 0u);
  }
  static StandinCufile& standin() { return *tensorpager_standin_cufile(); }
  static const Cufile& library() { return Cufile::load(TENSORPAGER_STANDIN_CUFILE); }
  // As doctor asks, on a machine where nvidia-fs shows its statistics.
  CufileFacts probe() const { return probe_cufile(TENSORPAGER_STANDIN_CUFILE, statistics_.path()); }

  const test::PatternFile statistics_{8};
};

TEST_F(CufileTest, ALibraryThatIsNotThereIsAnEngineErrorWithTheReason) {
  const Error error = error_of([] { Cufile::load("/no/such/libcufile.so.0"); });
  EXPECT_EQ(error.kind(), ErrorKind::engine);
  EXPECT_TRUE(has(error.what(), "/no/such/libcufile.so.0")) << error.what();
  EXPECT_TRUE(has(error.what(), "nvidia-gds")) << error.what();
}

TEST_F(CufileTest, ALibraryThatLacksAnEntryPointIsAnEngineErrorThatNamesIt) {
  const Error error = error_of([] { Cufile::load("libm.so.6"); });
  EXPECT_EQ(error.kind(), ErrorKind::engine);
  EXPECT_TRUE(has(error.what(), "libm.so.6 has no cuFileDriverOpen")) << error.what();
}

TEST_F(CufileTest, ALibraryIsLoadedOnceAndSaysItsVersion) {
  EXPECT_EQ(&library(), &library());
  EXPECT_EQ(library().version(), "1.11");
}

TEST_F(CufileTest, AnOldReleaseWithoutVersionAndCountedCloseWorks) {
  const Cufile& old = Cufile::load(TENSORPAGER_STANDIN_CUFILE_OLD);
  EXPECT_EQ(old.version(), "");
  for (int round = 0; round < 2; ++round) {
    const CufileSession session(old);
    EXPECT_EQ(session.properties().nvfs.major_version, 2u);
  }
  const CufileFacts facts = probe_cufile(TENSORPAGER_STANDIN_CUFILE_OLD, statistics_.path());
  EXPECT_TRUE(facts.direct) << facts.reason;
}

TEST_F(CufileTest, SessionsOfSeveralOwnersAreCounted) {
  const CufileSession first(library());
  {
    const CufileSession second(library());
    EXPECT_EQ(standin().alive().sessions, 2u);
  }
  EXPECT_EQ(standin().alive().sessions, 1u);
}

TEST_F(CufileTest, ASessionThatSomebodyElseOpenedIsSharedAndLeftOpen) {
  standin().reset({.is_open_elsewhere = true});
  {
    const CufileSession session(library());
  }
  EXPECT_EQ(standin().calls("cuFileDriverClose"), 0u);
  EXPECT_TRUE(probe().direct) << probe().reason;
}

TEST_F(CufileTest, ASessionThatCantOpenIsAnEngineErrorThatSaysWhatToDo) {
  standin().arm({.call = "cuFileDriverOpen", .error = cufile::kErrorPermissionDenied});
  const Error error = error_of([] { const CufileSession session(library()); });
  EXPECT_EQ(error.kind(), ErrorKind::engine);
  EXPECT_EQ(error.error_number(), cufile::kErrorPermissionDenied);
  EXPECT_TRUE(has(error.what(), "cuFileDriverOpen failed: CU_FILE_PERMISSION_DENIED (5025)")) << error.what();
  EXPECT_TRUE(has(error.what(), "/dev/nvidia-fs")) << error.what();
}

TEST_F(CufileTest, ASessionWhosePropertiesCantBeReadIsClosedAgain) {
  standin().arm({.call = "cuFileDriverGetProperties", .error = cufile::kErrorDriverVersionMismatch});
  const Error error = error_of([] { const CufileSession session(library()); });
  EXPECT_EQ(error.kind(), ErrorKind::engine);
  EXPECT_TRUE(has(error.what(), "CU_FILE_DRIVER_VERSION_MISMATCH")) << error.what();
  EXPECT_EQ(standin().alive().sessions, 0u);
}

TEST_F(CufileTest, ACallAboutAFileIsAnIoErrorAndAnyOtherADeviceError) {
  const CufileSession session(library());
  cufile::Handle handle = nullptr;
  cufile::Descriptor descriptor;
  descriptor.file.descriptor = -1;
  const Error of_file = error_of([&] { library().cuFileHandleRegister(&handle, &descriptor); });
  EXPECT_EQ(of_file.kind(), ErrorKind::io);
  EXPECT_TRUE(has(of_file.what(), "cuFileHandleRegister failed: CU_FILE_INVALID_FILE_TYPE")) << of_file.what();
  standin().arm({.call = "cuFileBufDeregister", .error = cufile::kErrorCudaDriver, .cuda_error = 719});
  const Error of_memory = error_of([&] { library().cuFileBufDeregister(static_cast<const void*>(&handle)); });
  EXPECT_EQ(of_memory.kind(), ErrorKind::device);
  EXPECT_TRUE(has(of_memory.what(), "CUresult 719")) << of_memory.what();
}

TEST_F(CufileTest, EveryErrorHasAnErrnoValueAndANumber) {
  for (int error = 5001; error < 5060; ++error) {
    EXPECT_GT(errno_of_cufile(error), 0) << error;
    EXPECT_TRUE(has(describe_cufile({error}), "(" + std::to_string(error) + ")")) << error;
  }
  EXPECT_TRUE(has(describe_cufile({5999}), "unknown error (5999)"));
}

TEST_F(CufileTest, AMachineWithNvidiaFsIsDirect) {
  const CufileFacts facts = probe();
  EXPECT_TRUE(facts.usable);
  EXPECT_TRUE(facts.direct);
  EXPECT_TRUE(has(facts.reason, "cuFile 1.11 with nvidia-fs 2.20")) << facts.reason;
  EXPECT_TRUE(has(facts.reason, "go through host memory")) << facts.reason;
  standin().reset({.allows_compatibility = false});
  EXPECT_TRUE(probe().direct);
  EXPECT_TRUE(has(probe().reason, "are refused")) << probe().reason;
}

TEST_F(CufileTest, CompatibilityModeIsUsableAndNotDirect) {
  standin().reset({.has_module = false});
  const CufileFacts facts = probe();
  EXPECT_TRUE(facts.usable);
  EXPECT_FALSE(facts.direct);
  EXPECT_TRUE(has(facts.reason, "compatibility mode")) << facts.reason;
  EXPECT_TRUE(has(facts.reason, "modprobe nvidia-fs")) << facts.reason;
}

TEST_F(CufileTest, AModuleThatSupportsNoStorageHereIsNotDirect) {
  standin().reset({.supports_storage = false});
  EXPECT_TRUE(probe().usable);
  EXPECT_FALSE(probe().direct);
  EXPECT_TRUE(has(probe().reason, "gdscheck")) << probe().reason;
}

TEST_F(CufileTest, AModuleThatIsNotThereForThisProcessIsNotDirect) {
  const CufileFacts facts = probe_cufile(TENSORPAGER_STANDIN_CUFILE, "/no/such/stats");
  EXPECT_TRUE(facts.usable);
  EXPECT_FALSE(facts.direct);
  EXPECT_TRUE(has(facts.reason, "/no/such/stats")) << facts.reason;
}

TEST_F(CufileTest, CompatibilityModeByTheEnvironmentIsNotDirect) {
  setenv("CUFILE_FORCE_COMPAT_MODE", "true", 1);
  const CufileFacts facts = probe();
  unsetenv("CUFILE_FORCE_COMPAT_MODE");
  EXPECT_TRUE(facts.usable);
  EXPECT_FALSE(facts.direct);
  EXPECT_TRUE(has(facts.reason, "CUFILE_FORCE_COMPAT_MODE")) << facts.reason;
}

TEST_F(CufileTest, ProbingNeverThrowsAndSaysWhyItIsNotUsable) {
  const CufileFacts missing = probe_cufile("/no/such/libcufile.so.0");
  EXPECT_FALSE(missing.usable);
  EXPECT_FALSE(missing.direct);
  EXPECT_TRUE(has(missing.reason, "no cuFile")) << missing.reason;
  for (const char* call : {"cuFileDriverOpen", "cuFileDriverGetProperties"}) {
    standin().arm({.call = call, .error = cufile::kErrorPlatformNotSupported});
    const CufileFacts facts = probe();
    EXPECT_FALSE(facts.usable);
    EXPECT_FALSE(facts.direct);
    EXPECT_TRUE(has(facts.reason, call)) << facts.reason;
    EXPECT_EQ(standin().alive().total(), 0u);
  }
}

}  // namespace
}  // namespace tp
