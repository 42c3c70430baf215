// SPDX-License-Identifier: Apache-2.0
// The stand-in driver keeps CUDA's rules, and catches who breaks them. The second half are canaries: programs that are
// wrong on purpose, which have to be caught in some of the seeds, and the same programs put right, in none.
#include "sim/standin_driver.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "standin_driver_fixture.hpp"

namespace tp {
namespace {

using cuda::DevicePtr;
using cuda::Result;
using test::all_are_unseen;
using test::Gate;
using test::kFrame;
using test::kGigabyte;
using test::kOne;
using test::kTwo;
using test::overwrite_unseen;
using test::standin;
using test::StandinCanary;
using test::StandinDriverTest;

TEST_F(StandinDriverTest, TheDeviceIsDescribed) {
  int value = 0;
  driver.cuDeviceGetCount(&value);
  EXPECT_EQ(value, 1);
  driver.cuDeviceGetAttribute(&value, cuda::kAttributeVirtualMemoryManagementSupported, 0);
  EXPECT_EQ(value, 1);
  driver.cuDeviceGetAttribute(&value, cuda::kAttributeAsyncEngineCount, 0);
  EXPECT_EQ(value, 2);
  std::array<char, 32> text{};
  driver.cuDeviceGetPCIBusId(text.data(), 32, 0);
  EXPECT_STREQ(text.data(), "0000:01:00.0");
  EXPECT_EQ(driver.cuDeviceGetName.result(text.data(), 3, 0), cuda::kErrorInvalidValue);
  EXPECT_EQ(driver.cuDeviceGetName.result(text.data(), 32, 1), cuda::kErrorInvalidDevice);
  begin({.device_count = 2, .attributes = {{cuda::kAttributeVirtualMemoryManagementSupported, 0}}});
  driver.cuDeviceGetAttribute(&value, cuda::kAttributeVirtualMemoryManagementSupported, 1);
  EXPECT_EQ(value, 0);
}

TEST_F(StandinDriverTest, CallsNeedACurrentContextOfTheirThread) {
  std::thread([&] {
    cuda::Event made = nullptr;
    EXPECT_EQ(driver.cuEventCreate.result(&made, 0u), cuda::kErrorInvalidContext);
  }).join();
  EXPECT_EQ(standin().violations().size(), 1u);
  driver.cuDevicePrimaryCtxRelease(0);
  cuda::Event made = nullptr;
  EXPECT_EQ(driver.cuEventCreate.result(&made, 0u), 709);  // CUDA_ERROR_CONTEXT_IS_DESTROYED
  EXPECT_EQ(driver.cuDevicePrimaryCtxRelease.result(0), cuda::kErrorInvalidContext);
}

TEST_F(StandinDriverTest, ContextsAreAStackOfTheThread) {
  cuda::Context context = nullptr, popped = nullptr;
  driver.cuCtxGetCurrent(&context);
  driver.cuCtxPushCurrent(context);
  driver.cuCtxPopCurrent(&popped);
  EXPECT_EQ(popped, context);
  driver.cuCtxPopCurrent(&popped);
  EXPECT_EQ(driver.cuCtxPopCurrent.result(&popped), cuda::kErrorInvalidContext);
}

TEST_F(StandinDriverTest, FramesAreMappedWholeAndAligned) {
  const DevicePtr space = reserve(4 * kFrame);
  const cuda::AllocationHandle both = handle(2 * kFrame);
  const auto map_result = [&](DevicePtr address, std::size_t size_bytes, std::size_t offset_bytes) {
    return driver.cuMemMap.result(address, size_bytes, offset_bytes, both, 0ull);
  };
  EXPECT_EQ(map_result(space + 4096, kFrame, 0), cuda::kErrorInvalidValue);
  EXPECT_EQ(map_result(space, kFrame + 4096, 0), cuda::kErrorInvalidValue);
  EXPECT_EQ(map_result(space, kFrame, kFrame), cuda::kErrorInvalidValue);
  EXPECT_EQ(map_result(space, 3 * kFrame, 0), cuda::kErrorInvalidValue);
  EXPECT_EQ(map_result(space + 3 * kFrame, 2 * kFrame, 0), cuda::kErrorInvalidValue);
  EXPECT_EQ(map_result(space, 2 * kFrame, 0), cuda::kSuccess);
  EXPECT_EQ(map_result(space + kFrame, 2 * kFrame, 0), cuda::kErrorInvalidValue);
  EXPECT_EQ(driver.cuMemUnmap.result(space, kFrame), cuda::kErrorInvalidValue);
  EXPECT_EQ(driver.cuMemUnmap.result(space, 3 * kFrame), cuda::kErrorInvalidValue);
  EXPECT_EQ(driver.cuMemAddressFree.result(space, 4 * kFrame), cuda::kErrorInvalidValue);
  driver.cuMemUnmap(space, 2 * kFrame);
  EXPECT_EQ(driver.cuMemAddressFree.result(space, kFrame), cuda::kErrorInvalidValue);
  driver.cuMemAddressFree(space, 4 * kFrame);
  driver.cuMemRelease(both);
  EXPECT_EQ(driver.cuMemRelease.result(both), cuda::kErrorInvalidValue);
  cuda::AllocationHandle made = 0;
  const cuda::MemAllocationProp prop;
  EXPECT_EQ(driver.cuMemCreate.result(&made, kFrame / 2, &prop, 0ull), cuda::kErrorInvalidValue);
}

TEST_F(StandinDriverTest, ReservationsAreAligned) {
  DevicePtr address = 0;
  driver.cuMemAddressReserve(&address, 3 * kFrame, 16 * kFrame, DevicePtr{0}, 0ull);
  EXPECT_EQ(address % (16 * kFrame), 0u);
  EXPECT_EQ(driver.cuMemAddressReserve.result(&address, kFrame + 1, std::size_t{0}, DevicePtr{0}, 0ull),
            cuda::kErrorInvalidValue);
}

TEST_F(StandinDriverTest, AHandleHasOneMemoryAtAllItsAddressesAndAfterItsRelease) {
  const DevicePtr space = reserve(2 * kFrame);
  const cuda::AllocationHandle shared = handle();
  map(space, shared);
  map(space + kFrame, shared);
  driver.cuMemRelease(shared);
  driver.cuMemsetD8Async(space, static_cast<unsigned char>(7), kFrame, nullptr);
  driver.cuStreamSynchronize(nullptr);
  EXPECT_EQ(*reinterpret_cast<unsigned char*>(space + kFrame + 5), 7);
  driver.cuMemUnmap(space, kFrame);
  EXPECT_EQ(*reinterpret_cast<unsigned char*>(space + kFrame), 7);
  EXPECT_EQ(standin().alive().mappings, 1u);
}

TEST_F(StandinDriverTest, NewMemoryIsPoisonedAndMovesWithItsFrame) {
  std::vector<std::byte> host = bytes(kOne);
  add(host);
  const DevicePtr space = reserve(2 * kFrame);
  const cuda::AllocationHandle frame = handle();
  map(space, frame);
  driver.cuMemcpyDtoHAsync(host.data(), space, kFrame, nullptr);
  driver.cuStreamSynchronize(nullptr);
  EXPECT_EQ(host, bytes(StandinDriver::kPoison));
  driver.cuMemsetD8Async(space, static_cast<unsigned char>(1), kFrame, nullptr);
  driver.cuStreamSynchronize(nullptr);
  driver.cuMemUnmap(space, kFrame);
  map(space + kFrame, frame);
  driver.cuMemcpyDtoHAsync(host.data(), space + kFrame, kFrame, nullptr);
  driver.cuStreamSynchronize(nullptr);
  EXPECT_EQ(host, bytes(kOne));
}

TEST_F(StandinDriverTest, TheHostTrapsWhereNothingIsMapped) {
  const DevicePtr space = reserve(kFrame);
  EXPECT_DEATH({ *reinterpret_cast<volatile char*>(space) = 1; }, "");
  driver.cuMemMap(space, kFrame, std::size_t{0}, handle(), 0ull);
  EXPECT_DEATH({ *reinterpret_cast<volatile char*>(space) = 1; }, "");
}

TEST_F(StandinDriverTest, MemoryIsABudget) {
  begin({.device_memory_bytes = 3 * kFrame});
  const cuda::AllocationHandle first = handle(2 * kFrame);
  DevicePtr small = 0;
  driver.cuMemAlloc(&small, kFrame / 2);
  std::size_t free_bytes = 0, total_bytes = 0;
  driver.cuMemGetInfo(&free_bytes, &total_bytes);
  EXPECT_EQ(free_bytes, kFrame / 2);
  EXPECT_EQ(total_bytes, 3 * kFrame);
  cuda::AllocationHandle second = 0;
  const cuda::MemAllocationProp prop;
  EXPECT_EQ(driver.cuMemCreate.result(&second, kFrame, &prop, 0ull), cuda::kErrorOutOfMemory);
  EXPECT_EQ(driver.cuMemAlloc.result(&small, kFrame), cuda::kErrorOutOfMemory);
  driver.cuMemFree(small);
  driver.cuMemRelease(first);
  driver.cuMemGetInfo(&free_bytes, &total_bytes);
  EXPECT_EQ(free_bytes, total_bytes);
}

TEST_F(StandinDriverTest, ACopyToWhatIsNotMappedLosesTheContext) {
  std::vector<std::byte> host = bytes(kOne);
  add(host);
  const DevicePtr address = frame();
  driver.cuMemcpyHtoDAsync(address + 8, host.data(), kFrame, nullptr);  // 8 bytes too far
  EXPECT_EQ(driver.cuStreamSynchronize.result(nullptr), cuda::kErrorIllegalAddress);
  EXPECT_EQ(standin().context_error(), cuda::kErrorIllegalAddress);
  EXPECT_EQ(driver.cuMemUnmap.result(address, kFrame), cuda::kErrorIllegalAddress);
  const char* name = nullptr;
  EXPECT_EQ(driver.cuGetErrorName.result(700, &name), cuda::kSuccess);
  EXPECT_STREQ(name, "CUDA_ERROR_ILLEGAL_ADDRESS");
}

TEST_F(StandinDriverTest, AMappingWithoutAccessCanNotBeTouched) {
  const DevicePtr address = reserve(kFrame);
  driver.cuMemMap(address, kFrame, std::size_t{0}, handle(), 0ull);
  driver.cuMemsetD8Async(address, static_cast<unsigned char>(0), kFrame, nullptr);
  EXPECT_EQ(driver.cuStreamSynchronize.result(nullptr), cuda::kErrorIllegalAddress);
}

TEST_F(StandinDriverTest, HostMemoryIsRegisteredOnce) {
  std::vector<std::byte> host = bytes(kOne);
  add(host);
  EXPECT_EQ(driver.cuMemHostRegister.result(host.data() + 4096, std::size_t{4096}, 0u), 712);
  EXPECT_EQ(driver.cuMemHostUnregister.result(host.data() + 4096), 713);
  DevicePtr address = 0;
  driver.cuMemHostGetDevicePointer(&address, host.data() + 8, 0u);
  EXPECT_EQ(address, reinterpret_cast<std::uintptr_t>(host.data() + 8));
  const DevicePtr device = frame();
  driver.cuMemcpyHtoDAsync(device, host.data(), kFrame, nullptr);
  EXPECT_EQ(standin().unregistered_copies(), 0u);
  driver.cuStreamSynchronize(nullptr);
  driver.cuMemHostUnregister(host.data());
  EXPECT_EQ(driver.cuMemHostGetDevicePointer.result(&address, host.data(), 0u), cuda::kErrorInvalidValue);
  driver.cuMemcpyHtoDAsync(device, host.data(), kFrame, nullptr);
  driver.cuStreamSynchronize(nullptr);
  EXPECT_EQ(standin().unregistered_copies(), 1u);
  driver.cuMemHostRegister(host.data(), kFrame / 2, 0u);
  EXPECT_EQ(driver.cuMemcpyHtoDAsync.result(device, host.data(), kFrame, nullptr), cuda::kErrorInvalidValue);
}

TEST_F(StandinDriverTest, StreamsWaitForValuesAndWriteThem) {
  Gate gate(driver);
  const cuda::Stream first = stream(), second = stream(), third = stream();
  gate.hold(first);
  driver.cuStreamWriteValue32(first, gate.address, 5u, 0u);
  driver.cuStreamWaitValue32(second, gate.address, 5u, 1u);  // equal
  EXPECT_EQ(driver.cuStreamQuery.result(second), cuda::kErrorNotReady);
  gate.open();
  driver.cuStreamSynchronize(second);
  EXPECT_EQ(std::atomic_ref(gate.value).load(), 5u);
  driver.cuStreamWaitValue32(third, gate.address, 2u, 0u);  // at least
  driver.cuStreamSynchronize(third);
  EXPECT_EQ(driver.cuStreamWaitValue32.result(third, gate.address + 2, 0u, 0u), cuda::kErrorInvalidValue);
}

TEST_F(StandinDriverTest, AWaitTakesTheRecordThatIsTheLatestAtTheCall) {
  Gate gate(driver);
  const cuda::Stream held = stream(), other = stream();
  const cuda::Event done = event();
  driver.cuStreamWaitEvent(other, done, 0u);  // never recorded
  driver.cuStreamSynchronize(other);
  EXPECT_EQ(driver.cuEventQuery.result(done), cuda::kSuccess);
  driver.cuEventRecord(done, other);
  driver.cuEventSynchronize(done);
  driver.cuStreamWaitEvent(other, done, 0u);
  gate.hold(held);
  driver.cuEventRecord(done, held);
  EXPECT_EQ(driver.cuEventQuery.result(done), cuda::kErrorNotReady);
  driver.cuStreamSynchronize(other);  // what it waits for is the first record
  driver.cuStreamWaitEvent(other, done, 0u);
  EXPECT_EQ(driver.cuStreamQuery.result(other), cuda::kErrorNotReady);
  driver.cuEventDestroy(done);
  gate.open();
  driver.cuStreamSynchronize(other);
  EXPECT_EQ(driver.cuEventQuery.result(done), cuda::kErrorInvalidHandle);
}

TEST_F(StandinDriverTest, TheLegacyStreamOrdersItselfWithBlockingStreamsAlone) {
  Gate gate(driver);
  const cuda::Stream blocking = stream(0), free = stream();
  gate.hold(blocking);
  driver.cuLaunchHostFunc(nullptr, +[](void*) {}, nullptr);
  EXPECT_EQ(driver.cuStreamQuery.result(nullptr), cuda::kErrorNotReady);
  driver.cuLaunchHostFunc(free, +[](void*) {}, nullptr);
  driver.cuStreamSynchronize(free);
  const cuda::Stream later = stream(0);
  driver.cuLaunchHostFunc(later, +[](void*) {}, nullptr);
  EXPECT_EQ(driver.cuStreamQuery.result(later), cuda::kErrorNotReady);
  gate.open();
  driver.cuStreamSynchronize(later);
  EXPECT_EQ(driver.cuStreamQuery.result(nullptr), cuda::kSuccess);
}

TEST_F(StandinDriverTest, HostFunctionsRunInOrderAndMayNotCallTheDriver) {
  struct Seen {
    const CudaDriver* driver;
    std::vector<int> order;
    Result result = cuda::kSuccess;
  } seen{&driver, {}};
  const cuda::Stream on = stream();
  const auto first = +[](void* data) { static_cast<Seen*>(data)->order.push_back(1); };
  const auto second = +[](void* data) {
    auto& each = *static_cast<Seen*>(data);
    each.order.push_back(2);
    each.result = each.driver->cuStreamQuery.result(nullptr);
  };
  driver.cuLaunchHostFunc(on, first, &seen);
  driver.cuLaunchHostFunc(on, second, &seen);
  driver.cuStreamSynchronize(on);
  EXPECT_EQ(seen.order, (std::vector<int>{1, 2}));
  EXPECT_EQ(seen.result, cuda::kErrorNotPermitted);
}

TEST_F(StandinDriverTest, ADestroyedStreamDrains) {
  const DevicePtr address = frame();
  Gate gate(driver);
  const cuda::Stream on = stream();
  const cuda::Event done = event();
  gate.hold(on);
  driver.cuMemsetD8Async(address, static_cast<unsigned char>(9), kFrame, on);
  driver.cuEventRecord(done, on);
  driver.cuStreamDestroy(on);
  EXPECT_EQ(driver.cuStreamQuery.result(on), cuda::kErrorInvalidHandle);
  gate.open();
  driver.cuEventSynchronize(done);
  EXPECT_EQ(*reinterpret_cast<unsigned char*>(address), 9);
}

TEST_F(StandinDriverTest, KernelsTakeTheirParametersAtTheLaunch) {
  standin().add_kernel({.name = "store",
                        .parameter_bytes = {8, 4},
                        .run =
                            [](StandinLaunch& launch) {
                              const auto value = launch.parameter<std::uint32_t>(1);
                              launch.write(launch.parameter<DevicePtr>(0), &value, sizeof value);
                            },
                        .duration_ns = [](const StandinLaunch& launch) { return launch.parameter<std::uint32_t>(1); }});
  const DevicePtr address = frame();
  DevicePtr target = address;
  std::uint32_t value = 1234;
  Gate gate(driver);
  const cuda::Stream on = stream();
  gate.hold(on);
  launch(kernel("store"), on, {&target, &value});
  target = 0;
  value = 0;
  gate.open();
  driver.cuStreamSynchronize(on);
  EXPECT_EQ(*reinterpret_cast<std::uint32_t*>(address), 1234u);
  EXPECT_EQ(standin().busy_ns(StandinEngine::kernel), 1234u);
  cuda::Module module = nullptr;
  EXPECT_EQ(driver.cuModuleLoadData.result(&module, "ELF"), cuda::kErrorInvalidImage);
  driver.cuModuleLoadData(&module, kStandinImage);
  cuda::Function function = nullptr;
  EXPECT_EQ(driver.cuModuleGetFunction.result(&function, module, "no such"), cuda::kErrorNotFound);
}

TEST_F(StandinDriverTest, CopiesOfOneDirectionShareAnEngineAndDirectionsDoNot) {
  begin({.host_to_device_bytes_per_second = kGigabyte, .device_to_host_bytes_per_second = kGigabyte});
  std::vector<std::byte> host = bytes(kOne), other = bytes(kOne), back = bytes(kOne);
  const cuda::Stream first = stream(), second = stream(), third = stream();
  const DevicePtr a = frame(), b = frame(), c = frame();
  driver.cuMemcpyHtoDAsync(a, host.data(), kFrame, first);
  driver.cuMemcpyHtoDAsync(b, other.data(), kFrame, second);
  driver.cuMemcpyDtoHAsync(back.data(), c, kFrame, third);
  EXPECT_EQ(standin().device_end_ns(), 2 * kFrame);
  driver.cuStreamSynchronize(third);
  EXPECT_EQ(standin().host_now_ns(), kFrame);
  driver.cuStreamSynchronize(first);
  driver.cuStreamSynchronize(second);
  EXPECT_EQ(standin().host_now_ns(), 2 * kFrame);
  EXPECT_EQ(standin().busy_ns(StandinEngine::host_to_device), 2 * kFrame);
  EXPECT_EQ(standin().bytes(StandinEngine::device_to_host), kFrame);
}

TEST_F(StandinDriverTest, TimeFollowsStreamsEventsAndTheHost) {
  begin({.host_to_device_bytes_per_second = kGigabyte, .device_bytes_per_second = kGigabyte});
  std::vector<std::byte> host = bytes(kOne);
  const cuda::Stream copies = stream(), compute = stream();
  const cuda::Event copied = event(), start = event(), end = event(), untimed = event(cuda::kEventDisableTiming);
  const DevicePtr address = frame(), other = frame();
  driver.cuEventRecord(start, copies);
  driver.cuMemcpyHtoDAsync(address, host.data(), kFrame, copies);
  driver.cuEventRecord(copied, copies);
  driver.cuStreamWaitEvent(compute, copied, 0u);
  driver.cuMemcpyDtoDAsync(other, address, kFrame, compute);
  driver.cuEventRecord(end, compute);
  driver.cuEventRecord(untimed, compute);
  driver.cuEventSynchronize(end);
  float milliseconds = 0;
  driver.cuEventElapsedTime(&milliseconds, start, end);
  EXPECT_FLOAT_EQ(milliseconds, 2 * static_cast<float>(kFrame) / 1e6f);
  EXPECT_EQ(driver.cuEventElapsedTime.result(&milliseconds, start, untimed), cuda::kErrorInvalidHandle);
  EXPECT_EQ(standin().host_now_ns(), 2 * kFrame);
  standin().advance_host_ns(1000);
  standin().host_reached_ns(5);
  driver.cuMemsetD8Async(other, static_cast<unsigned char>(0), kFrame, compute);
  EXPECT_EQ(standin().device_end_ns(), 3 * kFrame + 1000);
}

TEST_F(StandinDriverTest, PollsCanStepTheClockFromEndToEnd) {
  begin({.polls_step_time = true, .host_to_device_bytes_per_second = kGigabyte});
  std::vector<std::byte> host = bytes(kOne);
  const cuda::Stream on = stream();
  const cuda::Event early = event(), late = event();
  const DevicePtr address = frame();
  driver.cuMemcpyHtoDAsync(address, host.data(), std::size_t{1000}, on);
  driver.cuEventRecord(early, on);
  driver.cuMemcpyHtoDAsync(address, host.data(), std::size_t{1000}, on);
  driver.cuEventRecord(late, on);
  EXPECT_EQ(driver.cuEventQuery.result(late), cuda::kErrorNotReady);
  EXPECT_LE(standin().host_now_ns(), 1000u);
  while (driver.cuEventQuery.result(early) != cuda::kSuccess) std::this_thread::yield();
  EXPECT_EQ(standin().host_now_ns(), 1000u);
  while (driver.cuEventQuery.result(late) != cuda::kSuccess) std::this_thread::yield();
  EXPECT_EQ(standin().host_now_ns(), 2000u);
}

TEST_F(StandinDriverTest, OperationsCanTakeRealTime) {
  begin({.real_seconds_per_simulated_second = 10, .host_to_device_bytes_per_second = kGigabyte});
  std::vector<std::byte> host = bytes(kOne);
  const DevicePtr address = frame();
  const cuda::Stream on = stream();
  const auto before = std::chrono::steady_clock::now();
  driver.cuMemcpyHtoDAsync(address, host.data(), kFrame, on);
  driver.cuStreamSynchronize(on);
  EXPECT_GE(std::chrono::steady_clock::now() - before, std::chrono::milliseconds(20));  // ten times 2 MiB at 1 GB/s
}

TEST_F(StandinDriverTest, FailuresComeOnceForEverOrWithTheContext) {
  standin().arm({.call = "cuStreamQuery", .nth = 2, .result = cuda::kErrorUnknown});
  EXPECT_EQ(driver.cuStreamQuery.result(nullptr), cuda::kSuccess);
  EXPECT_EQ(driver.cuStreamQuery.result(nullptr), cuda::kErrorUnknown);
  EXPECT_EQ(driver.cuStreamQuery.result(nullptr), cuda::kSuccess);
  EXPECT_EQ(standin().fired(), 1u);
  EXPECT_EQ(standin().calls("cuStreamQuery"), 3u);
  standin().arm({.nth = 2, .result = cuda::kErrorUnknown, .effect = StandinEffect::sticky});
  EXPECT_EQ(driver.cuStreamQuery.result(nullptr), cuda::kSuccess);
  EXPECT_EQ(driver.cuStreamQuery.result(nullptr), cuda::kErrorUnknown);
  EXPECT_EQ(driver.cuStreamSynchronize.result(nullptr), cuda::kErrorUnknown);
  standin().disarm();
  EXPECT_EQ(driver.cuStreamQuery.result(nullptr), cuda::kSuccess);
  standin().arm({.call = "cuStreamQuery", .result = cuda::kErrorLaunchFailed, .effect = StandinEffect::context});
  EXPECT_EQ(driver.cuStreamQuery.result(nullptr), cuda::kErrorLaunchFailed);
  EXPECT_EQ(driver.cuStreamSynchronize.result(nullptr), cuda::kErrorLaunchFailed);
}

TEST_F(StandinDriverTest, AFailedOperationIsHeardOfLater) {
  const DevicePtr address = frame();
  standin().arm({.call = "cuMemsetD8Async", .result = cuda::kErrorLaunchFailed, .effect = StandinEffect::operation});
  EXPECT_EQ(driver.cuMemsetD8Async.result(address, static_cast<unsigned char>(0), kFrame, nullptr), cuda::kSuccess);
  EXPECT_EQ(driver.cuStreamSynchronize.result(nullptr), cuda::kErrorLaunchFailed);
}

TEST_F(StandinDriverTest, ALostContextEndsEveryWait) {
  Gate gate(driver);
  const cuda::Stream on = stream();
  gate.hold(on);
  std::thread([&] { standin().lose_context(cuda::kErrorIllegalAddress); }).join();
  EXPECT_EQ(driver.cuStreamSynchronize.result(on), cuda::kErrorIllegalAddress);
}

// For the sanitizers: the buffer is gone when the call has said that the context is lost.
TEST_F(StandinDriverTest, WhoeverIsToldOfALostContextMayFreeHostMemory) {
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    begin({.seed = seed, .delay_max = std::chrono::microseconds(1000)});
    const DevicePtr address = frame();
    const cuda::Stream on = stream();
    std::vector<std::byte> host = bytes(kOne);
    driver.cuMemcpyHtoDAsync(address, host.data(), kFrame, on);
    std::this_thread::sleep_for(std::chrono::microseconds(100 * seed));
    standin().lose_context(cuda::kErrorLaunchFailed);
    EXPECT_EQ(driver.cuStreamQuery.result(on), cuda::kErrorLaunchFailed);
  }
}

TEST_F(StandinDriverTest, ResetTellsWhatWasLeft) {
  std::vector<std::byte> host = bytes(kOne);
  add(host);
  Gate gate(driver);
  frame();
  reserve(kFrame);
  DevicePtr small = 0;
  driver.cuMemAlloc(&small, std::size_t{100});
  event();
  gate.hold(stream());  // for ever
  const StandinLeaks leaks = standin().reset();
  EXPECT_EQ(leaks.handles, 1u);
  EXPECT_EQ(leaks.mappings, 1u);
  EXPECT_EQ(leaks.reservations, 2u);
  EXPECT_EQ(leaks.allocations, 1u);
  EXPECT_EQ(leaks.registrations, 2u);
  EXPECT_EQ(leaks.streams, 1u);
  EXPECT_EQ(leaks.events, 1u);
  EXPECT_EQ(leaks.contexts, 1u);
  EXPECT_EQ(leaks.operations, 1u);
  EXPECT_EQ(standin().alive().total(), 0u);
}

TEST_F(StandinCanary, AHostFrameThatIsFilledAgainBeforeItsCopyIsDone) {
  expect_caught([&](bool waits) {
    std::vector<std::byte> staging = bytes(kOne, kSmall), back = bytes(kTwo, kSmall);
    const DevicePtr address = frame();
    const cuda::Stream on = stream();
    driver.cuMemcpyHtoDAsync(address, staging.data(), kSmall, on);
    if (waits) driver.cuStreamSynchronize(on);
    overwrite_unseen(staging, kTwo);
    driver.cuMemcpyDtoHAsync(back.data(), address, kSmall, on);
    driver.cuStreamSynchronize(on);
    return !all_are_unseen(back, kOne);
  });
}

TEST_F(StandinCanary, ACopyThatNobodyWaitsFor) {
  expect_caught([&](bool waits) {
    std::vector<std::byte> back = bytes(kTwo, kSmall);
    const DevicePtr address = frame();
    const cuda::Stream on = stream();
    driver.cuMemsetD8Async(address, static_cast<unsigned char>(1), kSmall, on);
    driver.cuMemcpyDtoHAsync(back.data(), address, kSmall, on);
    if (waits) driver.cuStreamSynchronize(on);
    const bool is_wrong = !all_are_unseen(back, kOne);
    driver.cuStreamSynchronize(on);
    return is_wrong;
  });
}

TEST_F(StandinCanary, AKernelThatDoesNotWaitForTheCopy) {
  static std::atomic<int> wrong;
  standin().add_kernel({.name = "check",
                        .parameter_bytes = {8},
                        .run =
                            [](StandinLaunch& launch) {
                              std::vector<std::byte> seen(kSmall);
                              launch.read(launch.parameter<DevicePtr>(0), seen.data(), kSmall);
                              if (!all_are_unseen(seen, kOne)) ++wrong;
                            },
                        .duration_ns = {}});
  expect_caught([&](bool waits) {
    wrong = 0;
    std::vector<std::byte> staging = bytes(kOne, kSmall);
    DevicePtr address = frame();
    const cuda::Stream copies = stream(), compute = stream();
    const cuda::Event copied = event();
    driver.cuMemcpyHtoDAsync(address, staging.data(), kSmall, copies);
    driver.cuEventRecord(copied, copies);
    if (waits) driver.cuStreamWaitEvent(compute, copied, 0u);
    launch(kernel("check"), compute, {&address});
    driver.cuStreamSynchronize(compute);
    driver.cuStreamSynchronize(copies);
    return wrong != 0;
  });
}

TEST_F(StandinCanary, AFrameThatIsTakenBeforeItsKernelRan) {
  standin().add_kernel({.name = "read",
                        .parameter_bytes = {8},
                        .run =
                            [](StandinLaunch& launch) {
                              std::vector<std::byte> seen(kSmall);
                              launch.read(launch.parameter<DevicePtr>(0), seen.data(), kSmall);
                            },
                        .duration_ns = {}});
  expect_caught([&](bool waits) {
    DevicePtr address = frame();
    const cuda::Stream on = stream();
    launch(kernel("read"), on, {&address});
    if (waits) driver.cuStreamSynchronize(on);
    driver.cuMemUnmap.result(address, kFrame);
    driver.cuStreamSynchronize.result(on);
    return false;
  });
}

TEST_F(StandinCanary, HostMemoryThatIsUnregisteredBeforeItsCopyRan) {
  expect_caught([&](bool waits) {
    std::vector<std::byte> staging = bytes(kOne, kSmall);
    add(staging);
    const DevicePtr address = frame();
    const cuda::Stream on = stream();
    driver.cuMemcpyHtoDAsync(address, staging.data(), kSmall, on);
    if (waits) driver.cuStreamSynchronize(on);
    driver.cuMemHostUnregister(staging.data());
    driver.cuStreamSynchronize(on);
    return false;
  });
}

}  // namespace
}  // namespace tp
