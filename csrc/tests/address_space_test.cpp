// SPDX-License-Identifier: Apache-2.0
#include "mem/host_address_space.hpp"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>

#include "base/error.hpp"
#include "base/limits.hpp"

namespace tp {
namespace {

class AddressSpaceTest : public testing::Test {
 protected:
  HostAddressSpace space{kPageBytesMin};
  FramePool pool{8 * kMiB, kPageBytesMin};

  FrameId filled(int value) {
    const FrameId frame = pool.take();
    pool.set_access(frame, SlotAccess::read_write);
    std::memset(pool.slot(frame), value, kPageBytesMin);
    return frame;
  }
};

TEST_F(AddressSpaceTest, addresses_are_aligned_contiguous_and_found_again) {
  const PageRange first = space.reserve(3);
  const PageRange second = space.reserve(2);
  EXPECT_EQ(second.first, 3u);
  EXPECT_EQ(space.page_count(), 5u);
  std::byte* base = space.address(PageId{first.first});
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(base) % kPageBytesMin, 0u);
  EXPECT_EQ(space.address(PageId{2}), base + 2 * kPageBytesMin);
  for (std::uint32_t page = 0; page < 5; ++page) {
    EXPECT_EQ(space.find(space.address(PageId{page})), PageId{page});
    EXPECT_EQ(space.find(space.address(PageId{page}) + kPageBytesMin - 1), PageId{page});
  }
  EXPECT_FALSE(space.find(base + 3 * kPageBytesMin).valid() && space.find(base + 3 * kPageBytesMin).value < 3);
  EXPECT_FALSE(space.find(nullptr).valid());
}

TEST_F(AddressSpaceTest, a_frame_moves_under_an_address_and_back_with_its_bytes) {
  space.reserve(2);
  std::byte* address = space.address(PageId{1});
  for (int round = 0; round < 3; ++round) {
    const FrameId frame = filled(round + 1);
    space.map(pool, frame, PageId{1});
    EXPECT_EQ(address[0], std::byte(round + 1));
    EXPECT_EQ(address[kPageBytesMin - 1], std::byte(round + 1));
    space.unmap(pool, frame, PageId{1}, SlotAccess::read_write);
    EXPECT_EQ(pool.slot(frame)[12345], std::byte(round + 1));
    pool.put(frame);
  }
}

TEST_F(AddressSpaceTest, absent_pages_trap_resident_ones_are_read_only_until_allowed) {
  space.reserve(2);
  std::byte* address = space.address(PageId{0});
  EXPECT_EXIT(static_cast<void>(*const_cast<volatile std::byte*>(address)), testing::KilledBySignal(SIGSEGV), "");
  const FrameId frame = filled(9);
  space.map(pool, frame, PageId{0});
  EXPECT_EQ(address[7], std::byte{9});
  EXPECT_EXIT(address[7] = std::byte{1}, testing::KilledBySignal(SIGSEGV), "");
  space.allow_write(PageId{0});
  address[7] = std::byte{1};
  space.unmap(pool, frame, PageId{0}, SlotAccess::read);
  EXPECT_EQ(pool.slot(frame)[7], std::byte{1});
  EXPECT_EXIT(static_cast<void>(*const_cast<volatile std::byte*>(address)), testing::KilledBySignal(SIGSEGV), "");
}

TEST_F(AddressSpaceTest, map_works_whatever_access_the_slot_has) {
  space.reserve(3);
  const SlotAccess accesses[] = {SlotAccess::none, SlotAccess::read, SlotAccess::read_write};
  for (std::uint32_t i = 0; i < 3; ++i) {
    const FrameId frame = filled(40 + static_cast<int>(i));
    pool.set_access(frame, accesses[i]);
    space.map(pool, frame, PageId{i});
    EXPECT_EQ(*space.address(PageId{i}), std::byte(40 + i));
    EXPECT_EXIT(*space.address(PageId{i}) = std::byte{1}, testing::KilledBySignal(SIGSEGV), "");
    space.unmap(pool, frame, PageId{i}, SlotAccess::none);
    EXPECT_EQ(pool.access(frame), SlotAccess::none);
    pool.put(frame);
  }
}

TEST_F(AddressSpaceTest, a_child_of_fork_does_not_have_the_memory) {
  space.reserve(1);
  const FrameId frame = filled(3);
  space.map(pool, frame, PageId{0});
  const pid_t child = fork();
  if (child == 0) {
    std::signal(SIGSEGV, SIG_DFL);
    const volatile std::byte value = *space.address(PageId{0});
    _exit(static_cast<int>(value));
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
  EXPECT_EQ(*space.address(PageId{0}), std::byte{3});
}

TEST_F(AddressSpaceTest, discard_makes_every_page_absent) {
  space.reserve(1);
  space.map(pool, filled(5), PageId{0});
  space.discard();
  EXPECT_EXIT(static_cast<void>(*const_cast<volatile std::byte*>(space.address(PageId{0}))),
              testing::KilledBySignal(SIGSEGV), "");
}

TEST_F(AddressSpaceTest, refuses_more_pages_than_ids_exist_for) {
  try {
    space.reserve(0x80000000ull);
    FAIL() << "2^31 pages were accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::invalid);
  }
}

}  // namespace
}  // namespace tp
