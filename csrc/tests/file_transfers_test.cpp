// SPDX-License-Identifier: Apache-2.0
// FileTransfers over every engine that moves bytes of files, the simulated one with short transfers and failures among
// them, on a file system with direct I/O and on one without.
#include "io/file_transfers.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "base/error.hpp"
#include "io/probe.hpp"
#include "sim/sim_queue.hpp"
#include "tests/child_process.hpp"
#include "tests/io_fixture.hpp"
#include "tests/thrown_error.hpp"

namespace tp {
namespace {

using test::error_of;
using test::fill_pattern;
using test::first_wrong;
using test::has;
using test::Memory;
using test::PatternFile;
using test::TemporaryDirectory;

std::string contents(const std::string& path) {
  std::string text(std::filesystem::file_size(path), '\0');
  std::ifstream(path, std::ios::binary).read(text.data(), static_cast<std::streamsize>(text.size()));
  return text;
}

std::span<const std::byte> bytes_of(const std::string& text) { return std::as_bytes(std::span(text)); }

struct Engine {
  const char* name;
  const char* directory;  // /var/tmp: direct I/O, where the machine has it; /dev/shm: never
};
const Engine kEngines[] = {
    {"uring", "/var/tmp"}, {"pread", "/var/tmp"}, {"sim", "/var/tmp"}, {"uring", "/dev/shm"}, {"pread", "/dev/shm"}};

class FileTransfersTest : public ::testing::TestWithParam<Engine> {
 protected:
  void SetUp() override {
    if (std::string(GetParam().name) != "uring") return;
    try {
      make_io_queue("uring", {});
    } catch (const Error& error) {
      GTEST_SKIP() << error.what();
    }
  }

  // Small blocks, so that there are many.
  FileTransferOptions options(unsigned threads = 1) const {
    FileTransferOptions options;
    options.block_bytes = 16 * kKiB;
    options.depth = 3;
    options.threads = threads;
    options.engine = GetParam().name;
    if (options.engine != "sim") return options;
    options.make_queue = [injector = injector_, seed = std::uint64_t{0}](const IoQueueOptions& queue) mutable {
      SimOptions sim;
      sim.queue = queue;
      sim.seed = ++seed;
      sim.short_one_in = 4;
      sim.injector = injector;
      return std::make_unique<SimQueue>(sim);
    };
    return options;
  }
  std::string in_directory(const std::string& name) const { return directory_.path() + "/" + name; }

  std::shared_ptr<SimInjector> injector_ = std::make_shared<SimInjector>();
  TemporaryDirectory directory_{GetParam().directory};
};

std::string engine_name(const ::testing::TestParamInfo<Engine>& info) {
  return std::string(info.param.name) + (has(info.param.directory, "shm") ? "_in_memory" : "");
}
INSTANTIATE_TEST_SUITE_P(engines, FileTransfersTest, ::testing::ValuesIn(kEngines), engine_name);

constexpr std::size_t kSizes[] = {1, 511, 512, 4095, 4096, 4097, 16384, 1'000'003};
constexpr std::uint64_t kOffsets[] = {0, 1, 512, 4096, 5000};
constexpr std::size_t kMisaligned[] = {0, 1, 64, 512};

TEST_P(FileTransfersTest, reads_any_size_at_any_offset_to_any_address) {
  const PatternFile pattern(1'100'000, 0, directory_.path());
  const Memory memory(1'200'000);
  for (const unsigned threads : {1u, 3u}) {
    FileTransfers transfers(options(threads));
    for (const std::size_t size : kSizes) {
      for (const std::uint64_t offset : kOffsets) {
        for (const std::size_t misaligned : kMisaligned) {
          std::fill_n(memory.at(0), size + misaligned + 1, std::byte{0x77});
          const std::span<std::byte> own{memory.at(misaligned), size};
          transfers.start_read(pattern.path(), offset, own);
          ASSERT_EQ(transfers.wait(), 1u);
          ASSERT_EQ(first_wrong(own, offset), size) << size << " bytes at " << offset << ", address " << misaligned;
          ASSERT_EQ(*memory.at(misaligned + size), std::byte{0x77});
          ASSERT_TRUE(misaligned == 0 || *memory.at(misaligned - 1) == std::byte{0x77});
        }
      }
    }
  }
}

TEST_P(FileTransfersTest, writes_any_size_at_any_offset_and_nothing_beside_it) {
  const Memory memory(1'200'000);
  const std::string before(1'100'000, 'x');
  for (const unsigned threads : {1u, 3u}) {
    FileTransfers transfers(options(threads));
    for (const std::size_t size : kSizes) {
      for (const std::uint64_t offset : kOffsets) {
        const std::string path = in_directory("written");
        std::ofstream(path, std::ios::binary | std::ios::trunc) << before;
        const std::size_t misaligned = kMisaligned[(size + offset) % 4];
        const std::span<std::byte> own{memory.at(misaligned), size};
        fill_pattern(own, offset, threads);
        transfers.start_write(path, offset, own);
        ASSERT_EQ(transfers.wait(), 1u);
        const std::string after = contents(path);
        ASSERT_EQ(after.size(), before.size());
        ASSERT_EQ(first_wrong(bytes_of(after).subspan(offset, size), offset, threads), size) << size << " " << offset;
        ASSERT_EQ(after.substr(0, offset), before.substr(0, offset));
        ASSERT_EQ(after.substr(offset + size), before.substr(offset + size));
      }
    }
  }
}

TEST_P(FileTransfersTest, a_new_file_has_the_bytes_and_is_its_owners_alone) {
  FileTransfers transfers(options());
  const Memory memory(1'000'003);
  fill_pattern(memory.span(), 0);
  transfers.start_write(in_directory("new"), 0, memory.span());
  EXPECT_EQ(transfers.wait(), 1u);
  const std::string after = contents(in_directory("new"));
  EXPECT_EQ(after.size(), 1'000'003u);
  EXPECT_EQ(first_wrong(bytes_of(after), 0), 1'000'003u);
  struct stat status{};
  ASSERT_EQ(stat(in_directory("new").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 07777, 0600u);
}

TEST_P(FileTransfersTest, many_at_once_are_done_as_if_one_after_another) {
  constexpr std::size_t kBytes = 50'001;
  for (const unsigned threads : {1u, 3u}) {
    FileTransfers transfers(options(threads));
    const Memory memory(16 * kBytes);
    const auto part = [&memory](std::size_t at) { return std::span<std::byte>{memory.at(at * kBytes), kBytes}; };
    fill_pattern(part(0), 0, threads);
    // Each is written from where the one before it was read to: none may begin before that is finished.
    for (std::size_t at = 0; at + 1 < 16; ++at) {
      transfers.start_write(in_directory("chain"), 1000 * at, part(at));
      transfers.start_read(in_directory("chain"), 1000 * at, part(at + 1));
    }
    EXPECT_EQ(transfers.wait(), 30u);
    for (std::size_t at = 0; at < 16; ++at) ASSERT_EQ(first_wrong(part(at), 0, threads), kBytes) << at;
  }
}

TEST_P(FileTransfersTest, neighbours_that_share_pages_keep_each_others_bytes) {
  for (const unsigned threads : {1u, 3u}) {
    FileTransfers transfers(options(threads));
    const Memory memory(2 * kMiB);
    fill_pattern(memory.span(), 0, threads);
    std::mt19937_64 random(threads);
    std::uint64_t at = 0;
    while (at < memory.span().size()) {
      const std::uint64_t size = std::min<std::uint64_t>(1 + random() % 60'000, memory.span().size() - at);
      transfers.start_write(in_directory("parts"), at, memory.span().subspan(at, size));
      at += size;
    }
    transfers.wait();
    EXPECT_EQ(first_wrong(bytes_of(contents(in_directory("parts"))), 0, threads), 2 * kMiB);
  }
}

TEST_P(FileTransfersTest, each_is_counted_once) {
  const PatternFile pattern(kMiB, 0, directory_.path());
  FileTransfers transfers(options());
  const Memory memory(4 * kMiB);
  EXPECT_EQ(transfers.wait(), 0u);
  for (std::size_t at = 0; at < 3; ++at) transfers.start_read(pattern.path(), 0, {memory.at(at * kMiB), kMiB});
  const std::uint64_t alone = transfers.start_read(pattern.path(), 0, {memory.at(3 * kMiB), kMiB}, true);
  transfers.wait_for(alone);
  EXPECT_EQ(first_wrong({memory.at(3 * kMiB), kMiB}, 0), kMiB);
  EXPECT_EQ(transfers.wait(), 3u);
  EXPECT_EQ(transfers.wait(), 0u);
  transfers.start_read(pattern.path(), 0, {memory.at(0), 0});
  EXPECT_EQ(transfers.wait(), 1u) << "one of no bytes is one";
}

TEST_P(FileTransfersTest, a_wait_that_is_interrupted_leaves_the_transfer_to_the_next) {
  const PatternFile pattern(kMiB, 0, directory_.path());
  FileTransferOptions slow = options();
  slow.make_queue = [](const IoQueueOptions& queue) {
    SimOptions sim;
    sim.queue = queue;
    sim.queue.filter = [](const IoRequest&, int raw_result) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
      return raw_result;
    };
    return std::make_unique<SimQueue>(sim);
  };
  FileTransfers transfers(slow);
  const Memory memory(kMiB);
  const auto interrupt = [] { throw Error(ErrorKind::closed, "interrupted"); };
  const std::uint64_t alone = transfers.start_read(pattern.path(), 0, memory.span(), true);
  EXPECT_EQ(error_of([&] { transfers.wait_for(alone, interrupt); }).kind(), ErrorKind::closed);
  EXPECT_EQ(error_of([&] { transfers.wait(interrupt); }).kind(), ErrorKind::closed);
  EXPECT_EQ(transfers.wait(), 1u);
  EXPECT_EQ(first_wrong(memory.span(), 0), kMiB);
}

TEST_P(FileTransfersTest, destroyed_it_finishes_what_was_begun) {
  const Memory memory(kMiB);
  fill_pattern(memory.span(), 0);
  {
    FileTransfers transfers(options(2));
    for (std::size_t at = 0; at < 16; ++at)
      transfers.start_write(in_directory("last"), at * 65536, memory.span().subspan(at * 65536, 65536));
  }
  EXPECT_EQ(first_wrong(bytes_of(contents(in_directory("last"))), 0), kMiB);
}

TEST_P(FileTransfersTest, files_are_let_go_of) {
  const auto open_files = [] {
    return std::distance(std::filesystem::directory_iterator("/proc/self/fd"), std::filesystem::directory_iterator());
  };
  const PatternFile pattern(4096, 0, directory_.path());
  FileTransfers transfers(options());
  const Memory memory(4096);
  const auto before = open_files();
  for (unsigned at = 0; at < kFilesMax + 10; ++at) {
    transfers.start_read(pattern.path(), 0, memory.span());
    transfers.wait();
  }
  for (int patience = 0; open_files() > before && patience < 1000; ++patience)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // the worker lets go after it has told
  EXPECT_EQ(open_files(), before);
}

TEST_P(FileTransfersTest, what_ends_too_early_is_an_error_at_the_start) {
  const PatternFile pattern(10'000, 0, directory_.path());
  FileTransfers transfers(options());
  const Memory memory(10'000);
  const Error error = error_of([&] { transfers.start_read(pattern.path(), 1, memory.span()); });
  EXPECT_EQ(error.kind(), ErrorKind::io);
  EXPECT_EQ(error.error_number(), 0);
  EXPECT_TRUE(has(error.what(), pattern.path() + " has 10000 bytes: 10000 bytes at offset 1")) << error.what();
  EXPECT_EQ(transfers.wait(), 0u);
}

TEST_P(FileTransfersTest, what_can_not_be_opened_is_an_error_at_the_start) {
  FileTransfers transfers(options());
  const Memory memory(100);
  const auto kind_and_number = [&](const std::function<void()>& body, int number) {
    const Error error = error_of(body);
    EXPECT_EQ(error.kind(), ErrorKind::io) << error.what();
    EXPECT_EQ(error.error_number(), number) << error.what();
  };
  kind_and_number([&] { transfers.start_read(in_directory("absent"), 0, memory.span()); }, ENOENT);
  kind_and_number([&] { transfers.start_write(in_directory("no/such/directory"), 0, memory.span()); }, ENOENT);
  kind_and_number([&] { transfers.start_read(directory_.path(), 0, memory.span()); }, EISDIR);
  kind_and_number([&] { transfers.start_write(directory_.path(), 0, memory.span()); }, EISDIR);
  kind_and_number([&] { transfers.start_write(-1, 0, memory.span()); }, EBADF);
  ASSERT_EQ(mkfifo(in_directory("pipe").c_str(), 0600), 0);
  kind_and_number([&] { transfers.start_read(in_directory("pipe"), 0, memory.span()); }, EINVAL);
  kind_and_number([&] { transfers.start_write(in_directory("pipe"), 0, memory.span()); }, ENXIO);
  const PatternFile pattern(100, 0, directory_.path());
  const int reading = open(pattern.path().c_str(), O_RDONLY | O_CLOEXEC);
  kind_and_number([&] { transfers.start_write(reading, 0, memory.span()); }, EBADF);
  close(reading);
  EXPECT_EQ(transfers.wait(), 0u);
}

TEST_P(FileTransfersTest, arguments_out_of_range_are_refused) {
  const auto refused = [this](const std::function<void(FileTransferOptions&)>& change) {
    FileTransferOptions changed = options();
    change(changed);
    EXPECT_EQ(error_of([&] { FileTransfers{changed}; }).kind(), ErrorKind::invalid);
  };
  refused([](FileTransferOptions& options) { options.block_bytes = 0; });
  refused([](FileTransferOptions& options) { options.depth = 0; });
  refused([](FileTransferOptions& options) { options.threads = 0; });
  refused([](FileTransferOptions& options) { options.threads = kTransferThreadsMax + 1; });
  FileTransfers transfers(options());
  const Memory memory(4096);
  for (const std::uint64_t offset : {~std::uint64_t{0}, std::uint64_t{1} << 63, (std::uint64_t{1} << 63) - 4096}) {
    EXPECT_EQ(error_of([&] { transfers.start_write(in_directory("far"), offset, memory.span()); }).kind(),
              ErrorKind::invalid);
  }
}

TEST_P(FileTransfersTest, a_file_that_shrinks_is_an_error_that_names_the_byte) {
  const PatternFile pattern(kMiB, 0, directory_.path());
  FileTransferOptions shrinking = options();
  shrinking.depth = 1;
  shrinking.make_queue = [this, &pattern, make = shrinking.make_queue](IoQueueOptions queue) {
    queue.filter = [&pattern, calls = 0](const IoRequest&, int raw_result) mutable {
      if (++calls == 3) TP_CHECK(truncate(pattern.path().c_str(), 400'000) == 0);
      return raw_result;
    };
    return make ? make(queue) : make_io_queue(GetParam().name, queue);
  };
  FileTransfers transfers(shrinking);
  const Memory memory(kMiB);
  transfers.start_read(pattern.path(), 0, memory.span());
  const Error error = error_of([&] { transfers.wait(); });
  EXPECT_EQ(error.kind(), ErrorKind::io);
  EXPECT_TRUE(has(error.what(), pattern.path() + " ended at byte 400000")) << error.what();
  EXPECT_EQ(transfers.wait(), 0u);
}

TEST_P(FileTransfersTest, a_descriptor_is_written_to_and_may_be_closed_at_once) {
  FileTransfers transfers(options());
  const Memory memory(100'001);
  fill_pattern(memory.span(), 7);
  const int descriptor = open(in_directory("by_number").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  const int flags = fcntl(descriptor, F_GETFL);
  transfers.start_write(descriptor, 7, memory.span());
  EXPECT_EQ(fcntl(descriptor, F_GETFL), flags) << "it is the caller's, and stays as it is";
  close(descriptor);
  EXPECT_EQ(transfers.wait(), 1u);
  EXPECT_EQ(first_wrong(bytes_of(contents(in_directory("by_number"))).subspan(7), 7), 100'001u);
}

TEST_P(FileTransfersTest, a_child_of_fork_is_refused_and_can_drop_it) {
  const PatternFile pattern(4096, 0, directory_.path());
  auto transfers = std::make_unique<FileTransfers>(options());
  const Memory memory(4096);
  const test::ChildResult child = test::run_in_child([&] {
    std::string refusals;
    for (const auto& call :
         std::vector<std::function<void()>>{[&] { transfers->start_read(pattern.path(), 0, memory.span()); },
                                            [&] { transfers->start_write(in_directory("child"), 0, memory.span()); },
                                            [&] { transfers->wait(); }, [&] { transfers->counters(); }}) {
      if (error_of(call).kind() == ErrorKind::forked) refusals += "forked ";
    }
    transfers.reset();
    return refusals;
  });
  EXPECT_EQ(child.text, "forked forked forked forked ");
  EXPECT_EQ(child.status, 0);
  transfers->start_read(pattern.path(), 0, memory.span());
  EXPECT_EQ(transfers->wait(), 1u);
}

TEST_P(FileTransfersTest, bytes_are_counted_and_those_that_were_copied) {
  const PatternFile pattern(kMiB, 0, directory_.path());
  const bool direct = File::open_checkpoint(pattern.path(), DirectPolicy::optional).direct();
  FileTransfers transfers(options());
  const Memory memory(2 * kMiB);
  transfers.start_read(pattern.path(), 0, {memory.at(0), kMiB});
  transfers.start_write(in_directory("counted"), 0, {memory.at(kMiB), kMiB});
  transfers.wait();
  EXPECT_EQ(transfers.counters().queues.requests, 2 * kMiB / (16 * kKiB));
  EXPECT_EQ(transfers.counters().queues.bytes_read, kMiB);
  EXPECT_EQ(transfers.counters().queues.bytes_written, kMiB);
  EXPECT_EQ(transfers.counters().bounced_bytes, 0u);
  transfers.start_read(pattern.path(), 0, {memory.at(64), kMiB});
  transfers.wait();
  EXPECT_EQ(transfers.counters().bounced_bytes, direct ? kMiB : 0u);
}

// ---------------------------------------------------------------- failures

class FailingTransfersTest : public FileTransfersTest {};
INSTANTIATE_TEST_SUITE_P(engines, FailingTransfersTest, ::testing::Values(Engine{"sim", "/var/tmp"}), engine_name);

// Each transfer of the kernel failing in turn, until none does any more.
TEST_P(FailingTransfersTest, every_transfer_that_fails_is_an_error_and_the_next_one_works) {
  const PatternFile pattern(300'000, 0, directory_.path());
  const Memory memory(300'000);
  const auto once = [&](FileTransfers& transfers, IoOp op) {
    const std::span<std::byte> own{memory.at(64), 200'001};
    if (op == IoOp::read) {
      transfers.start_read(pattern.path(), 5000, own);
    } else {
      fill_pattern(own, 5000);
      transfers.start_write(in_directory("failing"), 5000, own);
    }
    return transfers.wait();
  };
  for (const IoOp op : {IoOp::read, IoOp::write}) {
    for (const unsigned threads : {1u, 2u}) {
      unsigned failed = 0;
      for (std::uint64_t nth = 1;; ++nth) {
        FileTransfers transfers(options(threads));
        injector_->arm({nth, op == IoOp::read ? EIO : ENOSPC, Recurrence::sticky, op});
        const bool fired = [&] {
          try {
            once(transfers, op);
            return false;
          } catch (const Error& error) {
            EXPECT_EQ(error.kind(), ErrorKind::io);
            EXPECT_EQ(error.error_number(), op == IoOp::read ? EIO : ENOSPC);
            EXPECT_TRUE(has(error.what(), " bytes at offset ")) << error.what();
            EXPECT_TRUE(has(error.what(), directory_.path())) << error.what();
            return true;
          }
        }();
        EXPECT_EQ(fired, injector_->fired() > 0);
        injector_->disarm();
        EXPECT_EQ(once(transfers, op), 1u);
        if (!fired) break;
        ++failed;
      }
      EXPECT_GT(failed, 13u);
    }
  }
}

TEST_P(FailingTransfersTest, of_several_that_fail_the_first_is_told_and_how_many) {
  const PatternFile pattern(100'000, 0, directory_.path());
  FileTransfers transfers(options());
  const Memory memory(300'000);
  injector_->arm({1, EIO, Recurrence::sticky, IoOp::read});
  for (std::size_t at = 0; at < 3; ++at) transfers.start_read(pattern.path(), at, {memory.at(100'000 * at), 50'000});
  const Error error = error_of([&] { transfers.wait(); });
  EXPECT_TRUE(has(error.what(), "(EIO)")) << error.what();
  EXPECT_TRUE(has(error.what(), "2 more of 3")) << error.what();
  injector_->disarm();
  EXPECT_EQ(transfers.wait(), 0u);
}

// An engine that the kernel refuses to go on with.
class RefusedQueue final : public IoQueue {
 public:
  explicit RefusedQueue(std::unique_ptr<IoQueue> queue) : queue_(std::move(queue)) {}
  unsigned depth() const noexcept override { return queue_->depth(); }
  IoQueueFacts facts() const override { return queue_->facts(); }
  IoQueueCounters counters() const noexcept override { return queue_->counters(); }
  FileId add_file(int descriptor, std::uint32_t align) override { return queue_->add_file(descriptor, align); }
  void remove_file(FileId file) override { queue_->remove_file(file); }
  void register_memory(std::span<std::byte> memory) override { queue_->register_memory(memory); }
  void submit(std::span<const IoRequest> requests) override {
    if (++submits_ == 3) throw Error(ErrorKind::io, "io_uring_enter failed", ENXIO);
    queue_->submit(requests);
  }
  std::size_t wait(std::vector<IoCompletion>& completions, std::chrono::nanoseconds timeout) override {
    return queue_->wait(completions, timeout);
  }
  void wake() noexcept override { queue_->wake(); }
  void drain(std::vector<IoCompletion>& completions) override { queue_->drain(completions); }

 private:
  std::unique_ptr<IoQueue> queue_;
  int submits_ = 0;
};

TEST_P(FailingTransfersTest, an_engine_that_is_refused_fails_all_transfers_from_then_on) {
  const PatternFile pattern(kMiB, 0, directory_.path());
  FileTransferOptions refused = options();
  refused.make_queue = [make = refused.make_queue](const IoQueueOptions& queue) mutable {
    return std::make_unique<RefusedQueue>(make(queue));
  };
  FileTransfers transfers(refused);
  const Memory memory(2 * kMiB);
  for (std::size_t at = 0; at < 2; ++at) transfers.start_read(pattern.path(), 0, {memory.at(at * kMiB), kMiB});
  const Error error = error_of([&] { transfers.wait(); });
  EXPECT_EQ(error.error_number(), ENXIO);
  EXPECT_TRUE(has(error.what(), "1 more of 2")) << error.what();
  EXPECT_EQ(error_of([&] { transfers.start_read(pattern.path(), 0, memory.span().first(kMiB)); }).error_number(),
            ENXIO);
}

// ---------------------------------------------------------------- disks without room

std::string full_disk(const std::string& path, std::size_t size_bytes, const std::string& engine) {
  FileTransferOptions options;
  options.engine = engine;
  FileTransfers transfers(options);
  const Memory memory(size_bytes);
  const Error error = error_of([&] { transfers.start_write(path, 0, memory.span()); });
  return std::to_string(error.error_number()) + " " + error.what();
}

TEST(FullDiskTest, is_met_at_the_start_and_leaves_the_file_as_long_as_it_was) {
  const TemporaryDirectory directory("/var/tmp");
  const std::string path = directory.path() + "/file";
  std::ofstream(path) << "five!";
  const test::ChildResult denied = test::run_in_child([&path] {
    test::deny_system_call(SYS_fallocate, ENOSPC);
    return full_disk(path, kMiB, "pread");
  });
  EXPECT_EQ(denied.text.substr(0, 3), std::to_string(ENOSPC) + " ");
  EXPECT_TRUE(has(denied.text, "1048576 bytes at offset 0 in " + path)) << denied.text;
  EXPECT_EQ(contents(path), "five!");
  const test::ChildResult limited = test::run_in_child([&path] {
    const rlimit limit{65536, 65536};
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0 || signal(SIGXFSZ, SIG_IGN) == SIG_ERR) return std::string("setrlimit");
    return full_disk(path, kMiB, "pread");
  });
  EXPECT_EQ(limited.text.substr(0, 3), std::to_string(EFBIG) + " ");
  EXPECT_EQ(contents(path), "five!");
  struct stat status{};
  ASSERT_EQ(stat(path.c_str(), &status), 0);
  EXPECT_LE(status.st_blocks * 512, 65536) << "the room that was had is given back";
}

TEST(FullDiskTest, a_file_that_has_its_room_is_not_asked_for_it_again) {
  const TemporaryDirectory directory("/var/tmp");
  const std::string path = directory.path() + "/file";
  const test::ChildResult child = test::run_in_child([&path] {
    FileTransferOptions options;
    options.engine = "pread";
    FileTransfers transfers(options);
    const Memory memory(kMiB);
    transfers.start_write(path, 0, memory.span());
    if (transfers.wait() != 1) return std::string("not written");
    test::deny_system_call(SYS_fallocate, ENOSPC);
    transfers.start_write(path, 4096, memory.span().first(65536));
    return std::to_string(transfers.wait());
  });
  EXPECT_EQ(child.text, "1");
}

}  // namespace
}  // namespace tp
