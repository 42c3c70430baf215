// SPDX-License-Identifier: Apache-2.0
// The Nth-failure sweep: one scenario, run again and again with the Nth result of the kernel replaced by a failure,
// once or from then on, until the injector no longer fires. Every failure must surface as a typed error, nothing may
// stay pinned, nothing may hang, no byte may be wrong, and what was modified must still be there.
#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <mutex>
#include <set>
#include <thread>

#include "pager/pager.hpp"
#include "test_files.hpp"

namespace tp {
namespace {

using test::pattern;
using test::PatternFile;

constexpr std::size_t kPage = kPageBytesMin;
constexpr std::size_t kWordsPerPage = kPage / 8;
constexpr std::size_t kPages = 14;
constexpr char kMemoryDirectory[] = "/dev/shm";

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::uint64_t kStride = 7;  // every site is swept without sanitizers; here a share of them
#else
constexpr std::uint64_t kStride = 1;
#endif

constexpr std::uint32_t kPiecesPerPage = 32;

enum class Persistence { once, sticky };

struct Plan {
  int result;  // what the kernel is made to say: -errno, or a byte count
  Persistence persistence;
  std::uint64_t at;  // the first result that is replaced
  std::uint32_t transfer_max_bytes = 0;
};

// Replaces results; says how often it did, and for which operations.
class Injector {
 public:
  explicit Injector(Plan plan) : plan_(plan) {}
  int operator()(const IoRequest& request, int raw_result) {
    const std::uint64_t number = seen_.fetch_add(1);
    const bool hit = plan_.persistence == Persistence::once ? number == plan_.at : number >= plan_.at;
    if (!hit || (armed_ == false)) return raw_result;
    ++fired;
    if (request.op == IoOp::write) ++fired_on_writes;
    return plan_.result;
  }
  void disarm() { armed_ = false; }
  std::atomic<std::uint64_t> fired{0}, fired_on_writes{0};

 private:
  Plan plan_;
  std::atomic<std::uint64_t> seen_{0};
  std::atomic<bool> armed_{true};
};

PagerOptions options_with(const std::shared_ptr<Injector>& injector, std::uint32_t transfer_max_bytes = 0) {
  PagerOptions options;
  options.budget_bytes = 8 * kPage;
  options.spill_directory = kMemoryDirectory;
  options.make_queue = [injector, transfer_max_bytes] {
    IoQueueOptions queue_options;
    queue_options.depth = 32;
    queue_options.transfer_max_bytes = transfer_max_bytes;
    queue_options.filter = [injector](const IoRequest& request, int raw) { return (*injector)(request, raw); };
    return make_pread_queue(queue_options);
  };
  return options;
}

struct Outcome {
  std::size_t errors = 0;
  std::size_t wrong_bytes = 0;
};

// Acquires every page in turn; writes to every third, so that writebacks follow; then reads everything back. Pages
// whose acquire failed are left alone. `modified` says which pages hold the new value.
void sweep_pages(Pager& pager, const Region& region, bool modify, std::set<std::size_t>& modified, Outcome& outcome) {
  auto* words = reinterpret_cast<std::uint64_t*>(region.address);
  for (std::size_t page = 0; page < kPages; ++page) {
    const SetId set = pager.add_set({{region.address + page * kPage, kPage}}, "page " + std::to_string(page));
    try {
      pager.acquire(set, {});
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::io) << error.what();
      EXPECT_NE(std::string(error.what()).find("page"), std::string::npos) << error.what();
      ++outcome.errors;
      continue;
    }
    const std::uint64_t first = modified.contains(page) ? page + 1 : pattern(page * kWordsPerPage);
    outcome.wrong_bytes += words[page * kWordsPerPage] != first;
    outcome.wrong_bytes += words[page * kWordsPerPage + 77] != pattern(page * kWordsPerPage + 77);
    outcome.wrong_bytes += words[(page + 1) * kWordsPerPage - 1] != pattern((page + 1) * kWordsPerPage - 1);
    if (modify && page % 3 == 0) {
      words[page * kWordsPerPage] = page + 1;
      modified.insert(page);
    }
    pager.release(set);
  }
}

// Runs the scenario under the plan; true when the injector fired.
bool run_scenario(const PatternFile& file, Plan plan, Outcome& total, std::uint64_t& fired_on_writes) {
  const auto injector = std::make_shared<Injector>(plan);
  Pager pager(options_with(injector, plan.transfer_max_bytes));
  const Region region = pager.map_file(file.path());
  std::set<std::size_t> modified;
  Outcome outcome;
  sweep_pages(pager, region, true, modified, outcome);
  sweep_pages(pager, region, false, modified, outcome);
  EXPECT_EQ(pager.residency().pinned_pages(), 0u);
  EXPECT_EQ(outcome.wrong_bytes, 0u);
  // The drive is well again: everything that was ever written must be there, and everything else readable, unless a
  // writeback failed; then modified pages stay in memory, and the rest still has frames to come to.
  injector->disarm();
  Outcome after;
  sweep_pages(pager, region, false, modified, after);
  EXPECT_EQ(after.wrong_bytes, 0u);
  EXPECT_EQ(after.errors, 0u);
  EXPECT_LE(pager.bytes_in_use_max(), 8 * kPage);
  total.errors += outcome.errors;
  fired_on_writes += injector->fired_on_writes;
  return injector->fired > 0;
}

class FailureTest : public testing::TestWithParam<int> {};

TEST_P(FailureTest, every_result_of_the_kernel_may_fail_once_or_for_ever) {
  const PatternFile file(kPages * kPage, 0, kMemoryDirectory);
  Outcome total;
  std::uint64_t fired_on_writes = 0, sites = 0;
  const bool transient = GetParam() == -EINTR || GetParam() == -EAGAIN;
  for (const Persistence persistence : {Persistence::once, Persistence::sticky}) {
    // A transient failure for ever costs a thousand retries a request: a few places stand for all, and the pieces are
    // small, since the kernel really moves each of them every time.
    const bool retries_for_ever = transient && persistence == Persistence::sticky;
    const std::uint32_t piece_bytes = retries_for_ever ? kPage / kPiecesPerPage : 0;
    const std::uint64_t stride = retries_for_ever ? 10 * kPiecesPerPage : kStride;
    for (std::uint64_t at = 0;; at += stride) {
      SCOPED_TRACE("result " + std::to_string(at) + (persistence == Persistence::once ? " once" : " sticky"));
      if (!run_scenario(file, {GetParam(), persistence, at, piece_bytes}, total, fired_on_writes)) break;
      ASSERT_FALSE(testing::Test::HasFailure());
      ++sites;
      ASSERT_LT(at, 500 * stride) << "the injector still fires: the scenario does not end";
    }
  }
  // Fourteen reads, the writebacks, and the reads after them, twice over.
  EXPECT_GE(sites, (transient ? 20u : 40u) / kStride);
  if (kStride == 1) {
    EXPECT_GT(fired_on_writes, 0u);
  }
  // A transient failure is finished when it comes once, and an error only when it never ends.
  EXPECT_GT(total.errors, transient ? 0u : sites / 4);
  RecordProperty("sites", static_cast<int>(sites));
}

INSTANTIATE_TEST_SUITE_P(results, FailureTest, testing::Values(-EIO, -ENOMEM, -EAGAIN, -EINTR, -ENOSPC, 0),
                         [](const auto& result) {
                           return result.param == 0 ? std::string("end_of_file")
                                                    : std::string(strerrorname_np(-result.param));
                         });

TEST(Failure, a_page_that_failed_once_comes_the_next_time) {
  const PatternFile file(kPages * kPage, 0, kMemoryDirectory);
  const auto injector = std::make_shared<Injector>(Plan{-EIO, Persistence::once, 0});
  Pager pager(options_with(injector));
  const Region region = pager.map_file(file.path());
  const SetId set = pager.add_set({{region.address, kPage}}, "first");
  EXPECT_THROW(pager.acquire(set, {}), Error);
  EXPECT_EQ(pager.residency().counters().failures, 1u);
  pager.acquire(set, {});
  EXPECT_EQ(reinterpret_cast<const std::uint64_t*>(region.address)[3], pattern(3));
  pager.release(set);
}

TEST(Failure, a_prefetch_that_fails_is_tried_again_by_who_needs_the_page) {
  const PatternFile file(kPages * kPage, 0, kMemoryDirectory);
  const auto injector = std::make_shared<Injector>(Plan{-EIO, Persistence::once, 0});
  Pager pager(options_with(injector));
  const Region region = pager.map_file(file.path());
  const SetId set = pager.add_set({{region.address, kPage}}, "first");
  const std::vector<std::int32_t> steps{static_cast<std::int32_t>(set.value)}, initial{0}, none;
  pager.set_schedule({steps, initial, none, none, none, none});
  while (pager.residency().counters().failures == 0) std::this_thread::yield();
  pager.acquire(set, {});
  EXPECT_EQ(reinterpret_cast<const std::uint64_t*>(region.address)[3], pattern(3));
  pager.release(set);
}

}  // namespace
}  // namespace tp
