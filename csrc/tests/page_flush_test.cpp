// SPDX-License-Identifier: Apache-2.0
// commit() of a pager with a pagefile: what it writes, that pages stay resident, that another process finds them as
// they were at the last commit, and nothing less after the failure of any call.
#include "pager/page_flush.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <map>
#include <random>
#include <thread>

#include "pager/pager.hpp"
#include "tests/pagefile_fixture.hpp"
#include "tests/test_files.hpp"
#include "tests/thrown_error.hpp"

namespace tp {
namespace {

using test::error_of;
using test::metadata_of;
using test::text_of;

constexpr std::size_t kPage = kPageBytesMin;
constexpr std::size_t kPages = 14;
constexpr std::size_t kFrames = 8;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::uint64_t kStride = 5;  // every site is swept without sanitizers; here a share of them
#else
constexpr std::uint64_t kStride = 1;
#endif

using Values = std::map<std::size_t, std::uint64_t>;  // by page; what is in none is 0

// A drive whose calls fail when told: the Nth of all, or all from then on.
class FailingFileSystem final : public FileSystem {
 public:
  std::uint64_t fail_at = ~std::uint64_t{0};
  bool sticky = false;
  int error_number = EIO;
  std::uint64_t calls = 0, fired = 0;

  int create(const std::string& path) override { return fails() ? -error_number : real_.create(path); }
  int open(const std::string& path) override { return fails() ? -error_number : real_.open(path); }
  void close(int file) noexcept override { real_.close(file); }
  std::int64_t size(int file) override { return fails() ? -error_number : real_.size(file); }
  std::int64_t pread(int file, std::span<std::byte> bytes, std::uint64_t offset_bytes) override {
    return fails() ? -error_number : real_.pread(file, bytes, offset_bytes);
  }
  std::int64_t pwrite(int file, std::span<const std::byte> bytes, std::uint64_t offset_bytes) override {
    return fails() ? -error_number : real_.pwrite(file, bytes, offset_bytes);
  }
  int preallocate(int file, std::uint64_t offset_bytes, std::uint64_t size_bytes) override {
    return fails() ? -error_number : real_.preallocate(file, offset_bytes, size_bytes);
  }
  int sync(int file) override { return fails() ? -error_number : real_.sync(file); }
  int lock(int file) override { return real_.lock(file); }
  int rename(const std::string& from, const std::string& to) override {
    return fails() ? -error_number : real_.rename(from, to);
  }
  int remove(const std::string& path) override { return fails() ? -error_number : real_.remove(path); }
  int sync_directory(const std::string& path) override { return fails() ? -error_number : real_.sync_directory(path); }

 private:
  bool fails() {
    const std::uint64_t number = calls++;
    const bool hit = sticky ? number >= fail_at : number == fail_at;
    fired += hit;
    return hit;
  }
  PosixFileSystem real_;
};

class CommitTest : public testing::Test {
 protected:
  void make(FileSystem& file_system = posix_file_system()) {
    directory_ = std::make_unique<test::TemporaryDirectory>(parent_);
    open_pager(Pagefile::create({directory_->path()}, kPage, growth(), file_system));
  }
  void reopen(FileSystem& file_system = posix_file_system()) {
    shut();
    Pagefile store = Pagefile::open({directory_->path()}, growth(), file_system);
    metadata_ = text_of(store.metadata());
    open_pager(std::move(store));
  }
  void shut() {
    pager_.reset();
    store_.reset();
  }
  static PagefileOptions growth() {
    PagefileOptions options;
    options.growth_bytes = 3 * kPage;
    return options;
  }
  PagerOptions options() const {
    PagerOptions result;
    result.budget_bytes = kFrames * kPage;
    result.engine = "pread";
    result.pagefile = store_;
    result.make_queue = make_queue_;
    return result;
  }
  void open_pager(Pagefile pagefile) {
    store_ = std::make_shared<PagefileStore>(std::move(pagefile));
    pager_ = std::make_unique<Pager>(options());
    region_ = pager_->map_spill(kPages * kPage);
  }
  std::uint64_t* word(std::size_t page, std::size_t index) const {
    return reinterpret_cast<std::uint64_t*>(region_.address + page * kPage) + index;
  }
  void write(std::size_t page, std::uint64_t value) {
    const SetId set = pager_->add_set({{region_.address + page * kPage, kPage}}, "page");
    pager_->acquire(set, {});
    for (const std::size_t index : kWords) *word(page, index) = value;
    pager_->release(set);
  }
  bool shows(std::size_t page, std::uint64_t value) {
    const SetId set = pager_->add_set({{region_.address + page * kPage, kPage}}, "page");
    pager_->acquire(set, {});
    bool same = true;
    for (const std::size_t index : kWords) same = same && *word(page, index) == value;
    pager_->release(set);
    return same;
  }
  bool shows(const Values& values) {
    for (std::size_t page = 0; page < kPages; ++page) {
      const auto found = values.find(page);
      if (!shows(page, found == values.end() ? 0 : found->second)) return false;
    }
    return true;
  }
  void commit(const std::string& metadata) { pager_->commit(metadata_of(metadata), {}); }
  std::uint64_t bytes_written() const { return pager_->io_counters().bytes_written; }

  static constexpr std::size_t kWords[] = {0, 511, 65536, kPage / 8 - 1};
  std::string parent_ = "/dev/shm";
  std::unique_ptr<test::TemporaryDirectory> directory_;
  std::shared_ptr<PagefileStore> store_;
  std::function<std::unique_ptr<IoQueue>()> make_queue_;
  std::unique_ptr<Pager> pager_;
  Region region_;
  std::string metadata_;
};

TEST_F(CommitTest, another_pager_finds_what_was_committed_and_no_more) {
  parent_ = "/var/tmp";  // a drive
  make();
  for (std::size_t page = 0; page < 12; ++page) write(page, page + 100);
  commit("first");
  EXPECT_EQ(pager_->commit_number(), 1u);
  write(3, 999);  // and is lost
  for (std::size_t page = 4; page < 12; ++page) write(page, 999);
  reopen();
  EXPECT_EQ(metadata_, "first");
  Values values;
  for (std::size_t page = 0; page < 12; ++page) values[page] = page + 100;
  EXPECT_TRUE(shows(values));
}

TEST_F(CommitTest, pages_stay_resident_and_only_the_changed_ones_are_written) {
  make();
  for (std::size_t page = 0; page < 6; ++page) write(page, page + 1);
  commit("first");
  EXPECT_EQ(bytes_written(), 6 * kPage);
  const std::uint64_t page_ins = pager_->residency().counters().page_ins;
  for (std::size_t page = 0; page < 6; ++page) EXPECT_TRUE(shows(page, page + 1));
  EXPECT_EQ(pager_->residency().counters().page_ins, page_ins);
  EXPECT_EQ(pager_->residency().pinned_pages(), 0u);
  write(2, 77);  // traps again, or it would not be seen
  commit("second");
  EXPECT_EQ(bytes_written(), 7 * kPage);
  commit("third");
  EXPECT_EQ(bytes_written(), 7 * kPage);
  reopen();
  EXPECT_EQ(metadata_, "third");
  EXPECT_TRUE(shows({{0, 1}, {1, 2}, {2, 77}, {3, 4}, {4, 5}, {5, 6}}));
}

TEST_F(CommitTest, extents_of_older_commits_are_used_again) {
  make();
  for (std::uint64_t round = 1; round <= 20; ++round) {
    for (std::size_t page = 0; page < kPages; ++page) write(page, round * 100 + page);
    commit("round");
  }
  // Now, and the last commit's: no more than two of each page, beside what growing takes at a time.
  EXPECT_LE(pager_->spill_bytes(), 2 * kPages * kPage);
  const File file = File::open_checkpoint(directory_->path() + "/pages.tensorpager", DirectPolicy::disabled);
  EXPECT_LE(file.size_bytes(), (2 * kPages + 4) * kPage);
}

TEST_F(CommitTest, discarded_pages_are_zeros_in_the_next_commit) {
  make();
  for (std::size_t page = 0; page < 10; ++page) write(page, 5);
  commit("first");
  pager_->discard({region_.address, 4 * kPage});
  write(1, 6);
  commit("second");
  reopen();
  Values values{{1, 6}};
  for (std::size_t page = 4; page < 10; ++page) values[page] = 5;
  EXPECT_TRUE(shows(values));
}

TEST_F(CommitTest, a_page_that_is_written_meanwhile_is_refused_and_kept) {
  // By a thread of the program's: the engine's own take no signals.
  std::atomic<std::uint64_t*> target{nullptr};
  std::atomic<bool> hit{false}, done{false};
  std::thread writer([&] {
    target.wait(nullptr);
    *target.load() = 4711;
    done = true;
    done.notify_all();
  });
  make_queue_ = [&] {
    IoQueueOptions queue_options;
    queue_options.depth = 32;
    queue_options.filter = [&](const IoRequest& request, int raw) {
      if (request.op != IoOp::write || request.offset_bytes % kPage != 0 || hit.exchange(true)) return raw;
      target = reinterpret_cast<std::uint64_t*>(request.memory);
      target.notify_all();
      done.wait(false);
      return raw;
    };
    return make_pread_queue(queue_options);
  };
  make();
  for (std::size_t page = 0; page < 3; ++page) write(page, 1);
  const Error error = error_of([&] { commit("first"); });
  writer.join();
  EXPECT_EQ(error.kind(), ErrorKind::invalid);
  EXPECT_NE(std::string(error.what()).find("while commit()"), std::string::npos) << error.what();
  EXPECT_EQ(pager_->commit_number(), 0u);
  EXPECT_EQ(pager_->residency().pinned_pages(), 0u);
  std::size_t changed = 0;
  for (std::size_t page = 0; page < 3; ++page) changed += *word(page, 0) == 4711;
  EXPECT_EQ(changed, 1u);
  commit("second");
  std::vector<std::uint64_t> first;
  for (std::size_t page = 0; page < 3; ++page) first.push_back(*word(page, 0));
  reopen();
  for (std::size_t page = 0; page < 3; ++page) {
    EXPECT_EQ(*word(page, 0), first[page]);
    EXPECT_EQ(*word(page, 511), 1u);
  }
}

TEST_F(CommitTest, without_a_pagefile_it_is_refused) {
  PagerOptions plain;
  plain.budget_bytes = kFrames * kPage;
  plain.spill_directory = "/var/tmp";
  Pager pager(plain);
  const Error error = error_of([&] { pager.commit({}, {}); });
  EXPECT_EQ(error.kind(), ErrorKind::invalid);
}

TEST_F(CommitTest, a_pagefile_of_other_pages_is_refused) {
  make();
  PagerOptions larger = options();
  larger.page_bytes = 2 * kPage;
  const Error error = error_of([&] { const Pager pager(larger); });
  EXPECT_EQ(error.kind(), ErrorKind::invalid);
  EXPECT_NE(std::string(error.what()).find("2097152"), std::string::npos) << error.what();
}

TEST_F(CommitTest, a_budget_that_open_steps_hold_is_refused) {
  make();
  write(7, 3);
  const SetId set = pager_->add_set({{region_.address, (kFrames - kFaultFrames) * kPage}}, "held");
  pager_->acquire(set, {});
  const Error error = error_of([&] { commit("first"); });
  EXPECT_EQ(error.kind(), ErrorKind::invalid);
  pager_->release(set);
  commit("first");
  EXPECT_EQ(pager_->commit_number(), 1u);
}

TEST_F(CommitTest, an_interruption_leaves_all_as_it_was) {
  make();
  for (std::size_t page = 0; page < 8; ++page) write(page, 9);
  int calls = 0;
  EXPECT_THROW(pager_->commit({},
                              [&] {
                                if (++calls == 3) throw std::runtime_error("interrupted");
                              }),
               std::runtime_error);
  EXPECT_EQ(pager_->commit_number(), 0u);
  EXPECT_EQ(pager_->residency().pinned_pages(), 0u);
  commit("after");
  reopen();
  Values values;
  for (std::size_t page = 0; page < 8; ++page) values[page] = 9;
  EXPECT_TRUE(shows(values));
}

TEST_F(CommitTest, other_threads_read_while_it_runs) {
  make();
  for (std::size_t page = 0; page < kPages; ++page) write(page, page + 1);
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> wrong{0}, reads{0};
  std::thread reader([&] {
    std::mt19937 random(7);
    while (!stop) {
      const std::size_t page = random() % kPages;
      wrong += *word(page, 511) != page + 1;
      ++reads;
    }
  });
  for (std::uint64_t round = 0; round < 5; ++round) commit("round");
  while (reads < 100) std::this_thread::yield();
  stop = true;
  reader.join();
  EXPECT_EQ(wrong, 0u);
  EXPECT_EQ(pager_->commit_number(), 5u);
}

// Lives of one store, each ending without a word after its last commit.
TEST_F(CommitTest, random_lives_go_on_from_the_last_commit) {
  for (std::uint32_t seed = 0; seed < 6; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    shut();
    make();
    Values now, committed;
    std::uint64_t value = 0;
    for (int life = 0; life < 4; ++life) {
      for (int step = 0; step < 60; ++step) {
        const std::size_t page = random() % kPages;
        switch (random() % 8) {
          case 0:
            commit(std::to_string(value));
            committed = now;
            break;
          case 1:
            if (pager_->discard({region_.address + page * kPage, kPage}) > 0) {
              pager_->wanted({region_.address + page * kPage, kPage});
              write(page, ++value);
              now[page] = value;
            }
            break;
          case 2:
          case 3: ASSERT_TRUE(shows(page, now.contains(page) ? now[page] : 0)); break;
          default: write(page, ++value); now[page] = value;
        }
      }
      reopen();
      ASSERT_TRUE(shows(committed));
      now = committed;
    }
    shut();
    const Pagefile store = Pagefile::open({directory_->path()});
    EXPECT_TRUE(store.verify().empty());
  }
}

struct FailureCase {
  const char* name;
  int error_number;
  bool sticky;
};

class CommitFailureTest : public CommitTest, public testing::WithParamInterface<FailureCase> {
 protected:
  // Two commits with writebacks between them. What was committed is in `committed`; what holds now in `now`.
  void scenario() {
    Values at_commit;
    const auto attempt = [&](auto action) {
      try {
        action();
      } catch (const Error& error) {
        EXPECT_TRUE(error.kind() == ErrorKind::io) << error.what();
        ++errors_;
        return false;
      }
      return true;
    };
    for (std::uint64_t round = 1; round <= 2; ++round) {
      for (std::size_t page = 0; page < 10; ++page) {
        if (attempt([&] { write(page, round * 100 + page); })) now_[page] = round * 100 + page;
      }
      at_commit = now_;
      if (attempt([&] { commit(std::to_string(round)); })) {
        committed_ = at_commit;
        maybe_committed_.reset();
      } else if (!maybe_committed_) {
        maybe_committed_ = at_commit;  // the root may be in place although its directory's sync failed
      }
    }
  }
  // A page whose frame can't be had because no writeback works can't be asked for; nothing else may be missing.
  void check_memory() {
    for (const auto& [page, value] : now_) {
      try {
        EXPECT_TRUE(shows(page, value)) << "page " << page;
      } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::io) << error.what();
      }
    }
  }
  void check_drive() {
    reopen();
    EXPECT_TRUE(shows(committed_) || (maybe_committed_ && shows(*maybe_committed_)));
    shut();
    EXPECT_TRUE(Pagefile::open({directory_->path()}).verify().empty());
  }
  Values now_, committed_;
  std::optional<Values> maybe_committed_;
  std::uint64_t errors_ = 0;
};

TEST_P(CommitFailureTest, of_every_call_of_the_pagefile) {
  std::uint64_t swept = 0;
  for (std::uint64_t at = 0;; at += kStride) {
    SCOPED_TRACE(at);
    shut();
    FailingFileSystem file_system;
    file_system.error_number = GetParam().error_number;
    make(file_system);
    file_system.sticky = GetParam().sticky;
    file_system.fail_at = file_system.calls + at;
    now_.clear(), committed_.clear(), maybe_committed_.reset();
    errors_ = 0;
    scenario();
    check_memory();
    const std::uint64_t fired = file_system.fired;
    file_system.fail_at = ~std::uint64_t{0};
    check_drive();
    if (fired == 0) break;
    ++swept;
  }
  EXPECT_GT(swept, 15u / kStride);  // growing, syncs, roots
}

TEST_P(CommitFailureTest, of_every_transfer) {
  std::uint64_t swept = 0, told = 0;
  for (std::uint64_t at = 0;; at += kStride) {
    SCOPED_TRACE(at);
    auto seen = std::make_shared<std::atomic<std::uint64_t>>(0);
    auto fired = std::make_shared<std::atomic<std::uint64_t>>(0);
    auto armed = std::make_shared<std::atomic<bool>>(true);
    make_queue_ = [=] {
      IoQueueOptions queue_options;
      queue_options.depth = 32;
      queue_options.filter = [=](const IoRequest&, int raw) {
        const std::uint64_t number = seen->fetch_add(1);
        if (!*armed || (GetParam().sticky ? number < at : number != at)) return raw;
        ++*fired;
        return -GetParam().error_number;
      };
      return make_pread_queue(queue_options);
    };
    shut();
    make();
    now_.clear(), committed_.clear(), maybe_committed_.reset();
    errors_ = 0;
    scenario();
    *armed = false;
    // A writeback that nobody waited for is only counted: its page stays, and the next commit writes it.
    told += errors_ > 0 || pager_->residency().counters().failures > 0;
    check_memory();
    check_drive();
    if (*fired == 0) break;
    ++swept;
  }
  EXPECT_GT(swept, 20u / kStride);
  EXPECT_EQ(told, swept);
}

INSTANTIATE_TEST_SUITE_P(Calls, CommitFailureTest,
                         testing::Values(FailureCase{"eio_once", EIO, false}, FailureCase{"enospc_once", ENOSPC, false},
                                         FailureCase{"enospc_from_then_on", ENOSPC, true}),
                         [](const auto& each) { return std::string(each.param.name); });

}  // namespace
}  // namespace tp
