// SPDX-License-Identifier: Apache-2.0
// The IoQueue contract (io/io_queue.hpp), held against every engine. A new engine is one more line in kEngines.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <filesystem>
#include <random>
#include <thread>

#include "base/error.hpp"
#include "io/cufile_queue.hpp"
#include "io/file.hpp"
#include "io/probe.hpp"
#include "sim/sim_queue.hpp"
#include "sim/standin_cufile.hpp"
#include "tests/child_process.hpp"
#include "tests/io_fixture.hpp"

namespace tp {
namespace {

using test::first_wrong;
using test::Memory;
using test::PatternFile;
using test::run_all;

std::unique_ptr<IoQueue> make_plain_uring_queue(IoQueueOptions options) {
  options.plain_ring = true;
  return make_uring_queue(options);
}

std::unique_ptr<IoQueue> make_sim_queue(const IoQueueOptions& options) {
  SimOptions sim;
  sim.queue = options;
  sim.seed = 20260102;
  sim.short_one_in = 8;
  return std::make_unique<SimQueue>(sim);
}

// The device of the engines that have one; the stand-in's, for one test.
std::unique_ptr<CudaDevice> standin_device;

std::unique_ptr<IoQueue> make_standin_cufile_queue(const IoQueueOptions& options) {
  return make_cufile_queue(options, Cufile::load(TENSORPAGER_STANDIN_CUFILE), *standin_device);
}

struct EngineCase {
  const char* name;
  std::unique_ptr<IoQueue> (*make)(const IoQueueOptions&);
};
const EngineCase kEngines[] = {
    {"uring", make_uring_queue},
    {"uring_plain", [](const IoQueueOptions& options) { return make_plain_uring_queue(options); }},
    {"pread", make_pread_queue},
    {"sim", make_sim_queue},
    {"cufile", make_standin_cufile_queue},
};

class ConformanceTest : public ::testing::TestWithParam<EngineCase> {
 protected:
  void SetUp() override {
    if (is_cufile()) {
      tensorpager_standin_driver()->reset();
      tensorpager_standin_cufile()->reset();
      standin_device = std::make_unique<CudaDevice>(CudaDriver::load(TENSORPAGER_STANDIN_DRIVER), 0);
    }
    if (std::string(GetParam().name).rfind("uring", 0) != 0) return;
    try {
      make({});
    } catch (const Error& error) {
      GTEST_SKIP() << error.what();
    }
  }
  void TearDown() override {
    if (!is_cufile()) return;
    EXPECT_EQ(tensorpager_standin_cufile()->violations(), std::vector<std::string>{});
    EXPECT_EQ(tensorpager_standin_cufile()->reset().total(), 0u);
    standin_device.reset();
    EXPECT_EQ(tensorpager_standin_driver()->violations(), std::vector<std::string>{});
    EXPECT_EQ(tensorpager_standin_driver()->reset().total(), 0u);
  }
  std::unique_ptr<IoQueue> make(const IoQueueOptions& options) const { return GetParam().make(options); }
  bool is_cufile() const { return std::string(GetParam().name) == "cufile"; }
  bool is_sim() const { return std::string(GetParam().name) == "sim"; }
};

std::string engine_name(const ::testing::TestParamInfo<EngineCase>& info) { return info.param.name; }
INSTANTIATE_TEST_SUITE_P(engines, ConformanceTest, ::testing::ValuesIn(kEngines), engine_name);

FileId add(IoQueue& queue, const File& file) { return queue.add_file(file.descriptor(), file.align_bytes()); }

IoRequest read_request(std::uint64_t token, FileId file, std::uint64_t offset, std::byte* memory, std::size_t size) {
  return {token, IoOp::read, file, offset, memory, static_cast<std::uint32_t>(size)};
}

// Reads `count` random ranges that are multiples of the file's alignment, many at a time, and checks every byte.
void read_random_ranges(IoQueue& queue, const File& file, FileId id, std::size_t count) {
  constexpr std::size_t kRangeBytesMax = 256 * kKiB;
  std::mt19937_64 random(count);
  const std::uint64_t align = file.align_bytes();
  const Memory memory(count * kRangeBytesMax);
  std::vector<IoRequest> requests;
  for (std::size_t at = 0; at < count; ++at) {
    const std::uint64_t offset = random() % file.size_bytes() / align * align;
    const std::uint64_t size = (1 + random() % (kRangeBytesMax / align)) * align;
    requests.push_back(read_request(at, id, offset, memory.at(at * kRangeBytesMax), size));
  }
  const auto completions = run_all(queue, requests);
  for (const IoRequest& request : requests) {
    const IoCompletion& completion = completions.at(request.token);
    ASSERT_EQ(completion.error, 0);
    const std::uint64_t in_file = file.size_bytes() - request.offset_bytes;
    ASSERT_EQ(completion.transferred_bytes, std::min<std::uint64_t>(request.size_bytes, in_file));
    const std::span<const std::byte> read{request.memory, completion.transferred_bytes};
    ASSERT_EQ(first_wrong(read, request.offset_bytes), read.size()) << "offset " << request.offset_bytes;
  }
}

TEST_P(ConformanceTest, buffered_reads_of_any_size_at_any_offset_bring_the_right_bytes) {
  const PatternFile pattern(3'000'017);
  const File file = File::open_checkpoint(pattern.path(), DirectPolicy::disabled);
  const auto queue = make({});
  read_random_ranges(*queue, file, add(*queue, file), 200);
}

TEST_P(ConformanceTest, direct_reads_at_the_alignment_of_the_file_bring_the_right_bytes) {
  const PatternFile pattern(3'000'017);
  const File file = File::open_checkpoint(pattern.path(), DirectPolicy::optional);
  if (!file.direct()) GTEST_SKIP() << file.direct_reason();
  const auto queue = make({});
  read_random_ranges(*queue, file, add(*queue, file), 200);
}

TEST_P(ConformanceTest, registered_memory_is_read_and_written_across_slices) {
  const PatternFile pattern(3'000'017);
  for (const DirectPolicy policy : {DirectPolicy::disabled, DirectPolicy::optional}) {
    const File file = File::open_checkpoint(pattern.path(), policy);
    IoQueueOptions options;
    options.registered_slice_bytes = 64 * kKiB;
    const auto queue = make(options);
    const Memory first(kMiB), second(kMiB);
    queue->register_memory(second.span());
    queue->register_memory(first.span());
    const FileId id = add(*queue, file);
    const IoRequest requests[] = {read_request(0, id, 0, first.at(0), kMiB),
                                  read_request(1, id, kMiB, second.at(0), kMiB)};
    const auto completions = run_all(*queue, requests);
    EXPECT_EQ(completions.at(0).transferred_bytes, kMiB);
    EXPECT_EQ(completions.at(1).transferred_bytes, kMiB);
    EXPECT_EQ(first_wrong(first.span(), 0), kMiB);
    EXPECT_EQ(first_wrong(second.span(), kMiB), kMiB);
    if (queue->facts().memory_registered) {
      EXPECT_GE(queue->counters().short_transfers, 30u);
    }
  }
}

TEST_P(ConformanceTest, memory_outside_of_what_is_registered_works_too) {
  const PatternFile pattern(200'000);
  const File file = File::open_checkpoint(pattern.path(), DirectPolicy::disabled);
  const auto queue = make({});
  const Memory registered(kMiB), other(kMiB);
  queue->register_memory(registered.span());
  const IoRequest request = read_request(0, add(*queue, file), 0, other.at(3), 100'000);
  EXPECT_EQ(run_all(*queue, {&request, 1}).at(0).transferred_bytes, 100'000u);
  EXPECT_EQ(first_wrong({other.at(3), 100'000}, 0), 100'000u);
}

// What the pager relies on: the pages behind a registered address may have been moved away by mremap.
TEST_P(ConformanceTest, registered_memory_is_named_by_its_first_address_for_ever) {
  const PatternFile pattern(kMiB);
  const File file = File::open_checkpoint(pattern.path(), DirectPolicy::optional);
  const auto queue = make({});
  const Memory frame(kMiB), home(kMiB);
  queue->register_memory(frame.span());
  if (!queue->facts().registered_pages_may_move) GTEST_SKIP() << queue->facts().memory_registered_reason;
  void* moved = mremap(frame.at(0), kMiB, kMiB, MREMAP_MAYMOVE | MREMAP_FIXED, home.at(0));
  ASSERT_EQ(moved, static_cast<void*>(home.at(0)));
  const IoRequest request = read_request(0, add(*queue, file), 0, frame.at(0), kMiB);
  EXPECT_EQ(run_all(*queue, {&request, 1}).at(0).transferred_bytes, kMiB);
  EXPECT_EQ(first_wrong(home.span(), 0), kMiB);
}

TEST_P(ConformanceTest, several_files_in_several_directories_at_once) {
  std::vector<std::unique_ptr<PatternFile>> patterns;
  std::vector<File> files;
  const auto queue = make({});
  std::vector<FileId> ids;
  for (const char* directory : {"/var/tmp", "/tmp", "/dev/shm", "/var/tmp"}) {
    if (!std::filesystem::exists(directory)) continue;
    patterns.push_back(std::make_unique<PatternFile>(512 * kKiB, 1 + patterns.size(), directory));
    files.push_back(File::open_checkpoint(patterns.back()->path(), DirectPolicy::optional));
    ids.push_back(add(*queue, files.back()));
  }
  constexpr std::size_t kPieceBytes = 64 * kKiB;
  const Memory memory(files.size() * 512 * kKiB);
  std::vector<IoRequest> requests;
  for (std::size_t offset = 0; offset < 512 * kKiB; offset += kPieceBytes) {
    for (std::size_t file = 0; file < files.size(); ++file) {
      requests.push_back(
          read_request(requests.size(), ids[file], offset, memory.at(file * 512 * kKiB + offset), kPieceBytes));
    }
  }
  for (const auto& [token, completion] : run_all(*queue, requests)) {
    EXPECT_EQ(completion.error, 0);
    EXPECT_EQ(completion.transferred_bytes, kPieceBytes);
  }
  for (std::size_t file = 0; file < files.size(); ++file) {
    EXPECT_EQ(first_wrong({memory.at(file * 512 * kKiB), 512 * kKiB}, 0, file + 1), 512 * kKiB);
  }
}

TEST_P(ConformanceTest, a_read_that_meets_the_end_of_the_file_completes_with_the_bytes_before_it) {
  constexpr std::uint64_t kFileBytes = 100'003;
  const PatternFile pattern(kFileBytes);
  for (const DirectPolicy policy : {DirectPolicy::disabled, DirectPolicy::optional}) {
    const File file = File::open_checkpoint(pattern.path(), policy);
    const auto queue = make({});
    const FileId id = add(*queue, file);
    const Memory memory(256 * kKiB);
    const IoRequest requests[] = {read_request(0, id, 0, memory.at(0), 128 * kKiB),
                                  read_request(1, id, 128 * kKiB, memory.at(128 * kKiB), 4096)};
    const auto completions = run_all(*queue, requests);
    EXPECT_EQ(completions.at(0).error, 0);
    EXPECT_EQ(completions.at(0).transferred_bytes, kFileBytes);
    EXPECT_EQ(first_wrong({memory.at(0), kFileBytes}, 0), kFileBytes);
    EXPECT_EQ(completions.at(1).error, 0);
    EXPECT_EQ(completions.at(1).transferred_bytes, 0u);
  }
}

TEST_P(ConformanceTest, a_hundred_thousand_short_transfers_lose_nothing) {
  constexpr std::size_t kFileBytes = 4 * kMiB + 77;
  constexpr std::size_t kRounds = 13;
  const PatternFile pattern(kFileBytes);
  const File file = File::open_checkpoint(pattern.path(), DirectPolicy::disabled);
  IoQueueOptions options;
  options.transfer_max_bytes = 512;
  const auto queue = make(options);
  const FileId id = add(*queue, file);
  const Memory memory(kFileBytes);
  for (std::size_t round = 0; round < kRounds; ++round) {
    std::fill_n(memory.at(0), kFileBytes, std::byte{0});
    std::vector<IoRequest> requests;
    for (std::size_t at = 0; at < kFileBytes; at += kMiB) {
      requests.push_back(read_request(at, id, at, memory.at(at), std::min(kFileBytes - at, kMiB)));
    }
    for (const auto& [token, completion] : run_all(*queue, requests)) ASSERT_EQ(completion.error, 0);
    ASSERT_EQ(first_wrong(memory.span(), 0), kFileBytes);
  }
  EXPECT_GE(queue->counters().short_transfers, 100'000u);
  EXPECT_EQ(queue->counters().bytes_read, kRounds * kFileBytes);
}

TEST_P(ConformanceTest, short_direct_transfers_restart_at_a_boundary) {
  const PatternFile pattern(2 * kMiB);
  const File file = File::open_checkpoint(pattern.path(), DirectPolicy::optional);
  if (!file.direct()) GTEST_SKIP() << file.direct_reason();
  IoQueueOptions options;
  std::atomic<std::uint64_t> calls{0};
  // Admits to less than was moved, at an odd byte; more than a block, so that each result gets further.
  options.filter = [&](const IoRequest&, int raw_result) {
    const std::uint64_t call = calls.fetch_add(1);
    const int less = static_cast<int>(file.align_bytes() + 1 + call * 997 % 5000);
    return raw_result > less && call % 4 != 0 ? less : raw_result;
  };
  const auto queue = make(options);
  const FileId id = add(*queue, file);
  const Memory memory(2 * kMiB);
  std::vector<IoRequest> requests;
  for (std::size_t at = 0; at < 2 * kMiB; at += 128 * kKiB)
    requests.push_back(read_request(at, id, at, memory.at(at), 128 * kKiB));
  for (const auto& [token, completion] : run_all(*queue, requests)) EXPECT_EQ(completion.transferred_bytes, 128 * kKiB);
  EXPECT_EQ(first_wrong(memory.span(), 0), 2 * kMiB);
  EXPECT_GT(queue->counters().short_transfers, 16u);
}

TEST_P(ConformanceTest, what_is_written_is_read_back) {
  for (const DirectPolicy policy : {DirectPolicy::disabled, DirectPolicy::optional}) {
    const File file = File::open_spill("/var/tmp", policy);
    IoQueueOptions options;
    options.transfer_max_bytes = 24 * kKiB;
    const auto queue = make(options);
    const FileId id = add(*queue, file);
    const Memory memory(4 * kMiB), back(4 * kMiB);
    test::fill_pattern(memory.span(), 0, 5);
    std::vector<IoRequest> writes, reads;
    for (std::size_t at = 0; at < 4 * kMiB; at += 256 * kKiB) {
      writes.push_back({at, IoOp::write, id, at, memory.at(at), 256 * kKiB});
      reads.push_back(read_request(at, id, at, back.at(at), 256 * kKiB));
    }
    for (const auto& [token, completion] : run_all(*queue, writes)) {
      EXPECT_EQ(completion.error, 0);
      EXPECT_EQ(completion.transferred_bytes, 256 * kKiB);
    }
    run_all(*queue, reads);
    EXPECT_EQ(first_wrong(back.span(), 0, 5), 4 * kMiB);
    EXPECT_EQ(queue->counters().bytes_written, 4 * kMiB);
    EXPECT_EQ(queue->counters().bytes_read, 4 * kMiB);
  }
}

TEST_P(ConformanceTest, transient_errors_are_retried) {
  const PatternFile pattern(kMiB);
  const File file = File::open_checkpoint(pattern.path(), DirectPolicy::disabled);
  IoQueueOptions options;
  std::atomic<std::uint64_t> calls{0};
  options.filter = [&](const IoRequest&, int raw_result) {
    const std::uint64_t call = calls.fetch_add(1);
    return call % 3 == 0 ? -EINTR : call % 3 == 1 ? -EAGAIN : raw_result;
  };
  const auto queue = make(options);
  const FileId id = add(*queue, file);
  const Memory memory(kMiB);
  std::vector<IoRequest> requests;
  for (std::size_t at = 0; at < kMiB; at += 32 * kKiB)
    requests.push_back(read_request(at, id, at, memory.at(at), 32 * kKiB));
  for (const auto& [token, completion] : run_all(*queue, requests)) EXPECT_EQ(completion.error, 0);
  EXPECT_EQ(first_wrong(memory.span(), 0), kMiB);
  EXPECT_GE(queue->counters().retries, 64u);
}

TEST_P(ConformanceTest, a_transient_error_that_stays_becomes_an_error) {
  const PatternFile pattern(kMiB);
  const File file = File::open_checkpoint(pattern.path(), DirectPolicy::disabled);
  for (const int error : {EINTR, EAGAIN}) {
    IoQueueOptions options;
    options.filter = [error](const IoRequest&, int) { return -error; };
    const auto queue = make(options);
    const Memory memory(8192);
    const IoRequest request = read_request(9, add(*queue, file), 0, memory.at(0), 8192);
    const IoCompletion completion = run_all(*queue, {&request, 1}).at(9);
    EXPECT_EQ(completion.error, error);
    EXPECT_EQ(completion.transferred_bytes, 0u);
    EXPECT_EQ(queue->counters().retries, kIoRetryMax);
  }
}

// Fails the Nth transfer for N = 1, 2, ... until there is no Nth: each time exactly one request reports it.
TEST_P(ConformanceTest, an_error_at_each_transfer_in_turn_is_reported_once_and_only_there) {
  const PatternFile pattern(256 * kKiB);
  const File file = File::open_checkpoint(pattern.path(), DirectPolicy::disabled);
  for (const int error : {EIO, ENOMEM}) {
    std::uint64_t nth = 1;
    for (bool fired = true; fired; ++nth) {
      std::atomic<std::uint64_t> calls{0};
      IoQueueOptions options;
      options.transfer_max_bytes = 8 * kKiB;
      options.filter = [&](const IoRequest&, int raw_result) {
        return calls.fetch_add(1) + 1 == nth ? -error : raw_result;
      };
      const auto queue = make(options);
      const FileId id = add(*queue, file);
      const Memory memory(256 * kKiB);
      std::vector<IoRequest> requests;
      for (std::size_t at = 0; at < 256 * kKiB; at += 32 * kKiB)
        requests.push_back(read_request(at, id, at, memory.at(at), 32 * kKiB));
      unsigned failed = 0;
      for (const auto& [token, completion] : run_all(*queue, requests)) {
        if (completion.error != 0) {
          EXPECT_EQ(completion.error, error);
          EXPECT_EQ(completion.transferred_bytes, 0u);
          ++failed;
        } else {
          EXPECT_EQ(first_wrong({memory.at(token), completion.transferred_bytes}, token), 32 * kKiB);
        }
      }
      fired = calls.load() >= nth;
      EXPECT_EQ(failed, fired ? 1u : 0u) << "transfer " << nth;
    }
    EXPECT_GT(nth, 32u);  // 8 requests of 4 transfers were each hit
  }
}

TEST_P(ConformanceTest, errors_of_the_kernel_reach_the_completion) {
  const PatternFile pattern(kMiB);
  const File file = File::open_checkpoint(pattern.path(), DirectPolicy::disabled);
  const auto queue = make({});
  const Memory memory(4096);
  const IoRequest request{3, IoOp::write, add(*queue, file), 0, memory.at(0), 4096};  // opened read-only
  EXPECT_EQ(run_all(*queue, {&request, 1}).at(3).error, EBADF);
}

TEST_P(ConformanceTest, a_file_that_shrinks_shows_as_bytes_that_are_missing) {
  const PatternFile pattern(kMiB);
  const File file = File::open_checkpoint(pattern.path(), DirectPolicy::optional);
  const auto queue = make({});
  const FileId id = add(*queue, file);
  ASSERT_EQ(truncate(pattern.path().c_str(), 300'000), 0);
  const Memory memory(kMiB);
  const IoRequest request = read_request(1, id, 0, memory.at(0), kMiB);
  const IoCompletion completion = run_all(*queue, {&request, 1}).at(1);
  EXPECT_EQ(completion.error, 0);
  EXPECT_EQ(completion.transferred_bytes, 300'000u);
}

TEST_P(ConformanceTest, a_descriptor_number_used_again_names_the_new_file) {
  const PatternFile first(8192, 1), second(8192, 2);
  const auto queue = make({});
  const Memory memory(16384);
  const int descriptor = open(first.path().c_str(), O_RDONLY | O_CLOEXEC);
  const IoRequest before = read_request(1, queue->add_file(descriptor, 1), 0, memory.at(0), 8192);
  run_all(*queue, {&before, 1});
  close(descriptor);
  ASSERT_EQ(open(second.path().c_str(), O_RDONLY | O_CLOEXEC), descriptor);
  const FileId id = queue->add_file(descriptor, 1);
  EXPECT_NE(id, before.file);
  const IoRequest after = read_request(2, id, 0, memory.at(8192), 8192);
  run_all(*queue, {&after, 1});
  EXPECT_EQ(first_wrong({memory.at(0), 8192}, 0, 1), 8192u);
  EXPECT_EQ(first_wrong({memory.at(8192), 8192}, 0, 2), 8192u);
  close(descriptor);
}

TEST_P(ConformanceTest, the_queue_takes_its_depth_and_drains) {
  const PatternFile pattern(kMiB);
  const File file = File::open_checkpoint(pattern.path(), DirectPolicy::optional);
  for (const unsigned depth : {1u, 3u, 64u, kIoDepthMax}) {
    IoQueueOptions options;
    options.depth = depth;
    const auto queue = make(options);
    ASSERT_EQ(queue->depth(), depth);
    const FileId id = add(*queue, file);
    const Memory memory(depth * 4096);
    std::vector<IoRequest> requests;
    for (unsigned at = 0; at < depth; ++at) {
      requests.push_back(read_request(at, id, at * 4096 % kMiB, memory.at(at * 4096), 4096));
    }
    for (int round = 0; round < 3; ++round) {
      queue->submit(requests);
      std::vector<IoCompletion> completions;
      queue->drain(completions);
      EXPECT_EQ(completions.size(), depth);
      queue->drain(completions);
      EXPECT_EQ(completions.size(), depth);
    }
    EXPECT_EQ(queue->counters().requests, 3 * depth);
    EXPECT_EQ(queue->counters().completions, 3 * depth);
  }
}

TEST_P(ConformanceTest, a_queue_destroyed_with_requests_in_flight_finishes_them_first) {
  const PatternFile pattern(4 * kMiB);
  const File file = File::open_checkpoint(pattern.path(), DirectPolicy::optional);
  for (int round = 0; round < 10; ++round) {
    const Memory memory(4 * kMiB);
    {
      const auto queue = make({});
      const FileId id = add(*queue, file);
      std::vector<IoRequest> requests;
      for (std::size_t at = 0; at < 4 * kMiB; at += 256 * kKiB)
        requests.push_back(read_request(at, id, at, memory.at(at), 256 * kKiB));
      queue->submit(requests);
    }
    // Nothing is still on its way into this memory: all of it has come.
    ASSERT_EQ(first_wrong(memory.span(), 0), 4 * kMiB);
  }
}

TEST_P(ConformanceTest, a_queue_made_on_one_thread_is_used_on_another_and_destroyed_on_the_first) {
  const PatternFile pattern(kMiB);
  const File file = File::open_checkpoint(pattern.path(), DirectPolicy::optional);
  const Memory memory(kMiB);
  const auto queue = make({});
  queue->register_memory(memory.span());
  const FileId id = add(*queue, file);
  std::thread owner([&] {
    const IoRequest request = read_request(1, id, 0, memory.at(0), kMiB);
    EXPECT_EQ(run_all(*queue, {&request, 1}).at(1).transferred_bytes, kMiB);
    const File later = File::open_checkpoint(pattern.path(), DirectPolicy::disabled);
    const IoRequest again = read_request(2, add(*queue, later), 0, memory.at(0), kMiB);
    EXPECT_EQ(run_all(*queue, {&again, 1}).at(2).transferred_bytes, kMiB);
  });
  owner.join();
  EXPECT_EQ(first_wrong(memory.span(), 0), kMiB);
}

TEST_P(ConformanceTest, a_child_of_fork_can_drop_its_copy_and_the_parent_goes_on) {
  const PatternFile pattern(kMiB);
  const File file = File::open_checkpoint(pattern.path(), DirectPolicy::optional);
  const Memory memory(kMiB);
  auto queue = make({});
  const FileId id = add(*queue, file);
  const IoRequest request = read_request(1, id, 0, memory.at(0), kMiB);
  run_all(*queue, {&request, 1});
  const test::ChildResult child = test::run_in_child([&] {
    queue.reset();
    return std::string("dropped");
  });
  EXPECT_EQ(child.status, 0);
  EXPECT_EQ(child.text, "dropped");
  std::fill_n(memory.at(0), kMiB, std::byte{0});
  EXPECT_EQ(run_all(*queue, {&request, 1}).at(1).transferred_bytes, kMiB);
  EXPECT_EQ(first_wrong(memory.span(), 0), kMiB);
}

TEST_P(ConformanceTest, a_removed_file_makes_room_for_another) {
  const PatternFile first(4096, 1), second(4096, 2);
  const auto queue = make({});
  const Memory memory(4096);
  for (unsigned at = 0; at < kFilesMax + 10; ++at) {
    const PatternFile& pattern = at % 2 == 0 ? first : second;
    const File file = File::open_checkpoint(pattern.path(), DirectPolicy::disabled);
    const FileId id = add(*queue, file);
    if (at % 1000 < 2) {
      const IoRequest request = read_request(at, id, 0, memory.at(0), 4096);
      run_all(*queue, {&request, 1});
      ASSERT_EQ(first_wrong(memory.span(), 0, 1 + at % 2), 4096u);
    }
    queue->remove_file(id);
  }
}

TEST_P(ConformanceTest, too_many_files_are_an_error) {
  const PatternFile pattern(4096);
  const File file = File::open_checkpoint(pattern.path(), DirectPolicy::disabled);
  const auto queue = make({});
  try {
    for (unsigned at = 0; at <= kFilesMax; ++at) add(*queue, file);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::invalid);
  }
}

}  // namespace
}  // namespace tp
