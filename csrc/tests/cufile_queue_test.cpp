// SPDX-License-Identifier: Apache-2.0
// What the cufile engine does beyond the contract that conformance_test.cpp holds against it: device memory, cuFile's
// own errors, and every call failing in turn.
#include "io/cufile_queue.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <optional>
#include <string>

#include "base/error.hpp"
#include "io/file.hpp"
#include "sim/standin_cufile.hpp"
#include "tests/io_fixture.hpp"

namespace tp {
namespace {

using test::fill_pattern;
using test::first_wrong;
using test::Memory;
using test::PatternFile;
using test::run_all;

const CudaDriver& driver() { return CudaDriver::load(TENSORPAGER_STANDIN_DRIVER); }

// Memory of the stand-in device, which the host can read at the same address.
class DeviceMemory {
 public:
  DeviceMemory(const CudaDevice& device, std::size_t size_bytes) : device_(device), size_bytes_(size_bytes) {
    const CudaDevice::Current current(device_);
    driver().cuMemAlloc(&address_, size_bytes);
  }
  ~DeviceMemory() {
    const CudaDevice::Current current(device_);
    driver().cuMemFree.result(address_);
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  std::byte* at(std::size_t offset) const { return reinterpret_cast<std::byte*>(address_) + offset; }
  std::span<std::byte> span() const { return {at(0), size_bytes_}; }

 private:
  const CudaDevice& device_;
  const std::size_t size_bytes_;
  cuda::DevicePtr address_ = 0;
};

std::size_t open_descriptors() {
  DIR* directory = opendir("/proc/self/fd");
  TP_CHECK(directory != nullptr);
  std::size_t count = 0;
  while (readdir(directory) != nullptr) ++count;
  closedir(directory);
  return count;
}

class CufileQueueTest : public testing::Test {
 protected:
  void SetUp() override {
    standin_driver().reset();
    standin().reset();
    device_.emplace(driver(), 0);
  }
  void TearDown() override {
    EXPECT_EQ(standin().violations(), std::vector<std::string>{});
    EXPECT_EQ(standin().reset().total(), 0u);
    device_.reset();
    EXPECT_EQ(standin_driver().violations(), std::vector<std::string>{});
    EXPECT_EQ(standin_driver().reset().total(), 0u);
  }
  static StandinCufile& standin() { return *tensorpager_standin_cufile(); }
  static StandinDriver& standin_driver() { return *tensorpager_standin_driver(); }
  std::unique_ptr<IoQueue> make(const IoQueueOptions& options = {}) const {
    return make_cufile_queue(options, Cufile::load(TENSORPAGER_STANDIN_CUFILE), *device_);
  }
  // Reads all of a file of 64 KiB in one request; the completion's error.
  IoCompletion read_once(IoQueue& queue, FileId file, std::byte* memory) const {
    const IoRequest request{1, IoOp::read, file, 0, memory, 64 * kKiB};
    return run_all(queue, {&request, 1}).at(1);
  }
  // A pass through all that the engine does: registered reads, other reads, writes. How many requests failed.
  unsigned run_a_program() const;

  std::optional<CudaDevice> device_;
  const PatternFile pattern_{64 * kKiB};
  const File file_ = File::open_checkpoint(pattern_.path(), DirectPolicy::disabled);
};

FileId add(IoQueue& queue, const File& file) { return queue.add_file(file.descriptor(), file.align_bytes()); }

// Whom a failing call may meet: the constructor, add_file() or completions, typed each time.
template <class Body>
std::optional<Error> error_of(Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    return error;
  }
  return std::nullopt;
}

unsigned CufileQueueTest::run_a_program() const {
  constexpr std::size_t kPieceBytes = 8 * kKiB;
  IoQueueOptions options;
  options.depth = 4;
  options.registered_slice_bytes = 32 * kKiB;
  const DeviceMemory registered(*device_, 64 * kKiB), other(*device_, 64 * kKiB);
  File spill = File::open_spill("/var/tmp", DirectPolicy::disabled);
  spill.preallocate(0, 64 * kKiB);  // so that what was not written is read as zeros
  const auto queue = make(options);
  queue->register_memory(registered.span());
  const FileId file = add(*queue, file_), spill_file = add(*queue, spill);
  unsigned failed = 0;
  const auto run = [&](IoOp op, FileId id, const DeviceMemory& memory) {
    std::vector<IoRequest> requests;
    for (std::size_t at = 0; at < 64 * kKiB; at += kPieceBytes)
      requests.push_back({at, op, id, at, memory.at(at), static_cast<std::uint32_t>(kPieceBytes)});
    for (const auto& [token, completion] : run_all(*queue, requests)) {
      failed += completion.error != 0 ? 1 : 0;
      EXPECT_EQ(completion.transferred_bytes, completion.error != 0 ? 0 : kPieceBytes);
    }
  };
  run(IoOp::read, file, registered);
  run(IoOp::write, spill_file, registered);
  run(IoOp::read, spill_file, other);
  if (failed == 0) {
    EXPECT_EQ(first_wrong(other.span(), 0), 64 * kKiB);
  }
  return failed;
}

TEST_F(CufileQueueTest, DeviceMemoryIsReadAndWrittenThroughItsRegistration) {
  EXPECT_EQ(run_a_program(), 0u);
  EXPECT_EQ(standin().registered_transfers(), 16u);
  EXPECT_EQ(standin().calls("cuFileBufRegister"), 2u);
  EXPECT_EQ(standin().calls("cuFileRead"), 16u);
  EXPECT_EQ(standin().calls("cuFileWrite"), 8u);
  EXPECT_EQ(standin_driver().operations(), 0u);  // nothing was copied through a stream
}

TEST_F(CufileQueueTest, FactsTellWhetherTransfersAreDirect) {
  EXPECT_EQ(make()->facts().engine, "cufile");
  EXPECT_FALSE(make()->facts().memory_registered);
  EXPECT_FALSE(make()->facts().memory_registered_reason.empty());
  standin().reset({.has_module = false});
  const auto queue = make();
  EXPECT_EQ(queue->facts().kernel_features, std::vector<std::string>{"COMPATIBILITY_MODE"});
  const DeviceMemory memory(*device_, 64 * kKiB);
  queue->register_memory(memory.span());
  EXPECT_TRUE(queue->facts().memory_registered);
  EXPECT_FALSE(queue->facts().registered_pages_may_move);
  EXPECT_EQ(read_once(*queue, add(*queue, file_), memory.at(0)).error, 0);
  EXPECT_EQ(first_wrong(memory.span(), 0), 64 * kKiB);
}

TEST_F(CufileQueueTest, AnAddressThatIsNotMappedIsAnErrorOfItsRequestAlone) {
  const auto queue = make();
  const FileId file = add(*queue, file_);
  const DeviceMemory memory(*device_, 64 * kKiB);
  cuda::DevicePtr reserved = 0;
  {
    const CudaDevice::Current current(*device_);
    driver().cuMemAddressReserve(&reserved, StandinDriver::kGranularityBytes, std::size_t{0}, cuda::DevicePtr{0}, 0ull);
  }
  EXPECT_EQ(read_once(*queue, file, reinterpret_cast<std::byte*>(reserved)).error, EFAULT);
  EXPECT_EQ(read_once(*queue, file, memory.at(0)).error, 0);
  EXPECT_EQ(first_wrong(memory.span(), 0), 64 * kKiB);
  const CudaDevice::Current current(*device_);
  driver().cuMemAddressFree(reserved, StandinDriver::kGranularityBytes);
}

TEST_F(CufileQueueTest, ErrorsOfCufileBecomeTheNearestErrnoValue) {
  const auto queue = make();
  const FileId file = add(*queue, file_);
  const DeviceMemory memory(*device_, 64 * kKiB);
  const std::pair<int, int> expected[] = {{cufile::kErrorCudaPointerRange, EFAULT},
                                          {cufile::kErrorGpuMemoryPinningFailed, ENOMEM},
                                          {cufile::kErrorIoNotSupported, EOPNOTSUPP},
                                          {cufile::kErrorCudaContextMismatch, EINVAL},
                                          {cufile::kErrorInternal, EIO},
                                          {5047, EIO},
                                          {ENOSPC, ENOSPC}};
  for (const auto& [error, error_number] : expected) {
    standin().arm({.call = "cuFileRead", .error = error});
    const IoCompletion completion = read_once(*queue, file, memory.at(0));
    EXPECT_EQ(completion.error, error_number) << error;
    EXPECT_EQ(completion.transferred_bytes, 0u);
  }
}

TEST_F(CufileQueueTest, TransientErrorsAreFinishedInside) {
  const auto queue = make();
  const FileId file = add(*queue, file_);
  const DeviceMemory memory(*device_, 64 * kKiB);
  for (const int error : {EINTR, EAGAIN}) {
    std::fill_n(memory.at(0), 64 * kKiB, std::byte{0});
    const std::uint64_t retries_before = queue->counters().retries;
    standin().arm({.call = "cuFileRead", .error = error});
    EXPECT_EQ(read_once(*queue, file, memory.at(0)).error, 0);
    EXPECT_EQ(first_wrong(memory.span(), 0), 64 * kKiB);
    EXPECT_EQ(queue->counters().retries, retries_before + 1);
    standin().arm({.call = "cuFileRead", .error = error, .stays = true});
    EXPECT_EQ(read_once(*queue, file, memory.at(0)).error, error);
    EXPECT_EQ(standin().fired(), kIoRetryMax + 1);
  }
}

TEST_F(CufileQueueTest, ShortResultsAreFinishedInside) {
  for (const DirectPolicy policy : {DirectPolicy::disabled, DirectPolicy::optional}) {
    const File file = File::open_checkpoint(pattern_.path(), policy);
    standin().reset({.admitted_bytes_max = 5000});
    const auto queue = make();
    const DeviceMemory memory(*device_, 64 * kKiB);
    EXPECT_EQ(read_once(*queue, add(*queue, file), memory.at(0)).transferred_bytes, 64 * kKiB);
    EXPECT_EQ(first_wrong(memory.span(), 0), 64 * kKiB);
    EXPECT_GE(queue->counters().short_transfers, 12u);
    EXPECT_GE(standin().calls("cuFileRead"), 13u);
  }
}

TEST_F(CufileQueueTest, MemoryThatCantBeRegisteredIsTransferredAllTheSame) {
  for (std::uint64_t nth = 1; nth <= 2; ++nth) {
    standin().arm({.call = "cuFileBufRegister", .nth = nth, .error = cufile::kErrorCudaMemoryTypeInvalid});
    IoQueueOptions options;
    options.registered_slice_bytes = 32 * kKiB;
    const auto queue = make(options);
    const DeviceMemory memory(*device_, 64 * kKiB), more(*device_, 64 * kKiB);
    queue->register_memory(memory.span());
    queue->register_memory(more.span());
    EXPECT_EQ(standin().fired(), 1u);
    EXPECT_EQ(standin().alive().buffers, 0u);
    const IoQueueFacts facts = queue->facts();
    EXPECT_FALSE(facts.memory_registered);
    EXPECT_NE(facts.memory_registered_reason.find("CU_FILE_CUDA_MEMORY_TYPE_INVALID"), std::string::npos)
        << facts.memory_registered_reason;
    EXPECT_EQ(read_once(*queue, add(*queue, file_), memory.at(0)).error, 0);
    EXPECT_EQ(first_wrong(memory.span(), 0), 64 * kKiB);
  }
}

TEST_F(CufileQueueTest, ABufferedFileIsRefusedWhereCufileRefusesIt) {
  standin().reset({.needs_direct_files = true});
  const auto queue = make();
  const std::optional<Error> error = error_of([&] { add(*queue, file_); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->kind(), ErrorKind::io);
  EXPECT_NE(std::string(error->what()).find("O_DIRECT"), std::string::npos) << error->what();
  const File direct = File::open_checkpoint(pattern_.path(), DirectPolicy::optional);
  if (!direct.direct()) GTEST_SKIP() << direct.direct_reason();
  const DeviceMemory memory(*device_, 64 * kKiB);
  EXPECT_EQ(read_once(*queue, add(*queue, direct), memory.at(0)).error, 0);
  EXPECT_EQ(first_wrong(memory.span(), 0), 64 * kKiB);
}

TEST_F(CufileQueueTest, WhatIsNoRegularFileIsAnIoError) {
  const auto queue = make();
  const int directory = open("/var/tmp", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  const std::optional<Error> error = error_of([&] { queue->add_file(directory, 1); });
  close(directory);
  ASSERT_TRUE(error);
  EXPECT_EQ(error->kind(), ErrorKind::io);
  const std::optional<Error> closed = error_of([&] { queue->add_file(directory, 1); });
  ASSERT_TRUE(closed);
  EXPECT_EQ(closed->kind(), ErrorKind::io);
  EXPECT_EQ(closed->error_number(), EBADF);
}

// Flags of a file without a name stay with its descriptor, and cuFile refuses them.
TEST_F(CufileQueueTest, FilesWithFlagsThatCufileRefusesAreOpenedAnewAndClosed) {
  const std::size_t before = open_descriptors();
  {
    const File spill = File::open_spill("/var/tmp", DirectPolicy::optional);
    const auto queue = make();
    const FileId id = add(*queue, spill);
    const DeviceMemory memory(*device_, 64 * kKiB), back(*device_, 64 * kKiB);
    fill_pattern(memory.span(), 0, 7);
    const IoRequest write{1, IoOp::write, id, 0, memory.at(0), 64 * kKiB};
    EXPECT_EQ(run_all(*queue, {&write, 1}).at(1).error, 0);
    EXPECT_EQ(read_once(*queue, id, back.at(0)).error, 0);
    EXPECT_EQ(first_wrong(back.span(), 0, 7), 64 * kKiB);
  }
  EXPECT_EQ(open_descriptors(), before);
}

TEST_F(CufileQueueTest, TwoQueuesCanHaveOneDescriptor) {
  const std::size_t before = open_descriptors();
  {
    const auto first = make(), second = make();
    const FileId in_first = add(*first, file_), in_second = add(*second, file_);
    const DeviceMemory memory(*device_, 64 * kKiB), other(*device_, 64 * kKiB);
    EXPECT_EQ(read_once(*first, in_first, memory.at(0)).error, 0);
    EXPECT_EQ(read_once(*second, in_second, other.at(0)).error, 0);
    EXPECT_EQ(first_wrong(memory.span(), 0), 64 * kKiB);
    EXPECT_EQ(first_wrong(other.span(), 0), 64 * kKiB);
  }
  EXPECT_EQ(open_descriptors(), before);
}

// Fails the Nth call of each name for N = 1, 2, ... until there is no Nth: typed, in its place, and nothing is left.
TEST_F(CufileQueueTest, EachCallOfCufileFailingInTurnIsATypedErrorAndNoHang) {
  const char* calls[] = {"cuFileDriverOpen",  "cuFileDriverGetProperties", "cuFileHandleRegister",
                         "cuFileBufRegister", "cuFileBufDeregister",       "cuFileRead",
                         "cuFileWrite",       "cuFileDriverClose"};
  for (const std::string call : calls) {
    std::uint64_t nth = 1;
    for (bool fired = true; fired; ++nth) {
      standin().reset();
      standin().arm({.call = call, .nth = nth, .error = cufile::kErrorNvfsDriver});
      unsigned failed = 0;
      const std::optional<Error> error = error_of([&] { failed = run_a_program(); });
      fired = standin().fired() > 0;
      const bool is_transfer = call == "cuFileRead" || call == "cuFileWrite";
      EXPECT_EQ(failed, fired && is_transfer ? 1u : 0u) << call << " " << nth;
      const bool stops = call.rfind("cuFileDriver", 0) == 0 && call != "cuFileDriverClose";
      EXPECT_EQ(error.has_value(), fired && (stops || call == "cuFileHandleRegister")) << call << " " << nth;
      if (error) {
        EXPECT_EQ(error->kind(), stops ? ErrorKind::engine : ErrorKind::io) << error->what();
        EXPECT_NE(std::string(error->what()).find(call), std::string::npos) << error->what();
      }
      const bool leaves = call == "cuFileBufDeregister" || call == "cuFileDriverClose";
      EXPECT_EQ(standin().alive().total(), fired && leaves ? 1u : 0u) << call << " " << nth;
    }
    EXPECT_GT(nth, 2u) << call;
  }
  standin().reset();
}

// The driver below fails where the engine needs it: to make the context current, on each worker.
TEST_F(CufileQueueTest, AWorkerWithoutAContextIsATypedErrorAndNoHang) {
  std::uint64_t nth = 1;
  for (bool fired = true; fired; ++nth) {
    standin_driver().arm({.call = "cuCtxSetCurrent", .nth = nth, .result = cuda::kErrorInvalidContext});
    IoQueueOptions options;
    options.depth = 4;
    const std::optional<Error> error = error_of([&] { make(options); });
    fired = standin_driver().fired() > 0;
    EXPECT_EQ(error.has_value(), fired);
    if (error) {
      EXPECT_EQ(error->kind(), ErrorKind::device) << error->what();
    }
    EXPECT_EQ(standin().alive().total(), 0u);
  }
  EXPECT_EQ(nth, 6u);  // four workers
  standin_driver().disarm();
}

}  // namespace
}  // namespace tp
