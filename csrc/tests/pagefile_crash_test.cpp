// SPDX-License-Identifier: Apache-2.0
// A pagefile whose machine loses its power, whose process is killed, or one of whose calls fails: what it holds then.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <functional>
#include <optional>
#include <random>
#include <thread>

#include "pager/pagefile.hpp"
#include "pager/spill.hpp"
#include "tests/child_process.hpp"
#include "tests/pagefile_fixture.hpp"

namespace tp {
namespace {

using test::Content;
using test::error_of;
using test::has;
using test::kTestPageBytes;
using test::metadata_of;
using test::page_of;
using test::small_growth;
using test::write_salt;

// A failed call shows in what verify() returns; here it is thrown like any other.
void check_undamaged(const Pagefile& store) {
  const std::vector<DamagedPage> damaged = store.verify();
  if (damaged.empty()) return;
  EXPECT_TRUE(has(damaged.front().why, "could not read")) << damaged.front().why;
  throw Error(ErrorKind::io, damaged.front().why, EIO);
}

// A store under random use, and beside it what it should hold: now, at the last commit, and at one in flight.
class History {
 public:
  explicit History(std::uint64_t seed) : random_(seed) {
    directories_.assign({"/a", "/b", "/c"});
    directories_.resize(1 + below(3));
    options_ = small_growth(kTestPageBytes * (1 + below(4)));
    Pagefile::create(directories_, kTestPageBytes, options_, sim_);
    if (below(2) == 0) {
      sim_.crash(random_());
    } else {
      sim_.end_process();
    }
  }

  // Uses the store until a random call halts the machine, or the process; then ends it that way.
  void run_and_crash() {
    const std::uint64_t calls = below(2) == 0 ? 20 : 120;  // as often between opening and the first write
    sim_.halt_at(sim_.calls() + 1 + below(calls), below(2) == 0 ? SimEffect::happens : SimEffect::none);
    try {
      open_and_check();
      for (unsigned step = 0; step < 60; ++step) use();
    } catch (const Error& error) {
      EXPECT_TRUE(sim_.halted()) << error.what();
    }
    if (below(3) == 0) {
      sim_.end_process();
    } else {
      sim_.crash(random_());
    }
    store_.reset();
  }

  // Content equals the last commit that returned, or the one in flight; from here on, just that.
  void open_and_check() {
    store_.reset();
    store_.emplace(Pagefile::open(directories_, options_, sim_));
    const bool in_flight = in_flight_ && test::holds(*store_, *in_flight_);
    EXPECT_TRUE(in_flight || test::holds(*store_, committed_));
    check_undamaged(*store_);
    if (in_flight) committed_ = *in_flight_;
    in_flight_.reset();
    now_ = committed_;
  }

  std::uint64_t commits() const { return commits_; }

 private:
  std::uint64_t below(std::uint64_t end) { return random_() % end; }

  void use() {
    const std::uint64_t choice = below(20);
    if (now_.salts.empty() || choice == 0) {
      const auto count = static_cast<std::uint32_t>(1 + below(4));
      store_->grow(count);
      now_.salts.resize(now_.salts.size() + count);
      return;
    }
    const auto page = static_cast<std::uint32_t>(below(now_.salts.size()));
    if (choice <= 3) {
      commit();
    } else if (choice <= 5) {
      store_->discard(PageId{page});
      now_.salts[page] = 0;
    } else if (choice <= 8) {
      EXPECT_EQ(test::read_page(*store_, page), page_of(now_.salts[page]));
    } else if (choice <= 9) {
      store_->put_extent(store_->take_extent());
    } else {
      const std::uint64_t salt = random_() | 1;
      write_salt(*store_, page, salt);
      now_.salts[page] = salt;
    }
  }

  void commit() {
    now_.metadata = std::string(below(1500), 'a') + std::to_string(++commits_);
    in_flight_ = now_;
    store_->commit(metadata_of(now_.metadata));
    committed_ = now_;
    in_flight_.reset();
  }

  std::mt19937_64 random_;
  SimFileSystem sim_;
  std::vector<std::string> directories_;
  PagefileOptions options_;
  std::optional<Pagefile> store_;
  Content now_, committed_;
  std::optional<Content> in_flight_;
  std::uint64_t commits_ = 0;
};

TEST(PagefileCrashTest, after_a_crash_at_any_call_the_last_commit_is_there_or_the_one_in_flight) {
  std::uint64_t commits = 0;
  for (std::uint64_t seed = 0; seed < 300 && !testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    History history(seed);
    for (unsigned life = 0; life < 6; ++life) history.run_and_crash();
    history.open_and_check();
    commits += history.commits();
  }
  EXPECT_GT(commits, 1000u) << "histories too short to tell anything";
}

TEST(PagefileCrashTest, a_crash_while_a_store_is_created_leaves_an_empty_one_or_an_error_with_a_name) {
  const std::vector<std::string> directories = {"/a", "/b"};
  bool halted = true;
  for (std::uint64_t call = 1; halted; ++call) {
    for (std::uint64_t seed = 0; seed < 8; ++seed) {
      SimFileSystem sim;
      sim.halt_at(call, seed % 2 == 0 ? SimEffect::happens : SimEffect::none);
      try {
        Pagefile::create(directories, kTestPageBytes, small_growth(), sim);
      } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::io);
      }
      halted = sim.halted();
      sim.crash(seed);
      try {
        EXPECT_TRUE(test::holds(Pagefile::open(directories, small_growth(), sim), {}));
      } catch (const Error& error) {
        EXPECT_TRUE(halted) << error.what();
        EXPECT_TRUE(has(error.what(), "/a") || has(error.what(), "/b")) << error.what();
      }
    }
  }
}

// The process died between the rename and the sync of the directory, the next one shows what it finds, and then the
// machine dies: what was shown must not be taken back.
TEST(PagefileCrashTest, what_a_store_shows_when_opened_no_later_crash_takes_back) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    SimFileSystem sim;
    Pagefile store = test::committed_store(sim, 1);
    write_salt(store, 0, 10);
    sim.halt_at_next(SimCall::sync_directory);
    EXPECT_EQ(error_of([&] { store.commit(metadata_of("second")); }).error_number(), EIO);
    sim.end_process();
    const Content shown = {{10}, "second"};
    EXPECT_TRUE(test::holds(Pagefile::open({"/a"}, {}, sim), shown));
    sim.crash(seed);
    EXPECT_TRUE(test::holds(Pagefile::open({"/a"}, {}, sim), shown));
  }
}

// A fixed use of a store in steps that can be repeated, for failing each of its calls in turn.
class Script {
 public:
  explicit Script(SimFileSystem& sim) : sim_(sim) {
    Pagefile store = Pagefile::create(kDirectories, kTestPageBytes, small_growth(), sim_);
    store.grow(4);
    for (std::uint32_t page = 0; page < 3; ++page) write_salt(store, page, page + 1);
    store.commit(metadata_of("first"));
    committed_ = now_ = {{1, 2, 3, 0}, "first"};
  }

  // Stops at a step after which the store refuses to go on. Whether it came to the end.
  bool run() {
    const std::vector<std::function<void()>> steps = {
        [&] { store_.emplace(Pagefile::open(kDirectories, small_growth(), sim_)); },
        [&] { write(0, 10); },
        [&] { write(3, 11); },
        [&] { read(3); },
        [&] { commit("second"); },
        [&] { write(0, 12); },
        [&] { write(0, 13); },
        [&] { discard(1); },
        [&] { commit("third"); },
        [&] { write(1, 14); },
        [&] { read(1); },
        [&] { commit("fourth"); },
        [&] { check_undamaged(*store_); },
    };
    for (const auto& step : steps) {
      if (!run_step(step)) return false;
    }
    return true;
  }

  const Content& committed() const { return committed_; }
  const std::optional<Content>& in_flight() const { return in_flight_; }
  void close() { store_.reset(); }
  Pagefile open() { return Pagefile::open(kDirectories, small_growth(), sim_); }

 private:
  static inline const std::vector<std::string> kDirectories = {"/a", "/b"};

  // The failure happens once: a step that may be repeated then succeeds, or the store has stopped and says so.
  bool run_step(const std::function<void()>& step) {
    try {
      step();
      return true;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::io);
      EXPECT_NE(error.error_number(), 0);
      EXPECT_TRUE(has(error.what(), "/a") || has(error.what(), "/b")) << error.what();
      if (store_ && has(error.what(), "takes no more writes")) {
        EXPECT_STREQ(error_of([&] { store_->commit({}); }).what(), error.what());
        return false;
      }
    }
    step();
    return true;
  }

  void write(std::uint32_t page, std::uint64_t salt) {
    write_salt(*store_, page, salt);
    now_.salts[page] = salt;
  }
  void discard(std::uint32_t page) {
    store_->discard(PageId{page});
    now_.salts[page] = 0;
  }
  void read(std::uint32_t page) const { EXPECT_EQ(test::read_page(*store_, page), page_of(now_.salts[page])); }
  void commit(const std::string& metadata) {
    in_flight_ = now_;
    in_flight_->metadata = metadata;
    store_->commit(metadata_of(metadata));
    committed_ = now_ = *in_flight_;
    in_flight_.reset();
  }

  SimFileSystem& sim_;
  std::optional<Pagefile> store_;
  Content now_, committed_;
  std::optional<Content> in_flight_;
};

// Whether the failure has hit a call.
bool fail_and_check(const SimCallFailure& failure, std::uint64_t seed) {
  SimFileSystem sim;
  Script script(sim);
  sim.fail(failure);
  const bool finished = script.run();
  const bool fired = sim.fired();
  EXPECT_TRUE(finished || fired);
  sim.fail({.nth = 1000000});
  if (seed % 2 == 0) {  // the process first, and what it finds is used on before the machine goes too
    script.close();
    Pagefile store = script.open();
    const Content content = test::holds(store, script.committed()) ? script.committed() : *script.in_flight();
    for (std::uint32_t page = 0; page < 3; ++page) write_salt(store, page, 1000 + page);
    sim.crash(seed);
    EXPECT_TRUE(test::holds(script.open(), content));
    return fired;
  }
  sim.crash(seed);
  script.close();
  const Pagefile store = script.open();
  const bool in_flight = script.in_flight() && test::holds(store, *script.in_flight());
  EXPECT_TRUE(in_flight || test::holds(store, script.committed()));
  EXPECT_TRUE(store.verify().empty());
  return fired;
}

TEST(PagefileCrashTest, whatever_call_fails_the_error_is_typed_and_the_last_commit_is_there) {
  for (std::size_t kind = 0; kind < kSimCalls; ++kind) {
    const auto call = static_cast<SimCall>(kind);
    const bool transfers = call == SimCall::pread || call == SimCall::pwrite;
    std::vector<int> errors = {EIO, ENOSPC, EINTR};
    if (transfers) errors.push_back(0);
    for (const int error : errors) {
      for (const SimEffect effect : {SimEffect::none, SimEffect::happens}) {
        std::uint64_t hits = 0;
        for (bool fired = true; fired && !testing::Test::HasFailure(); hits += fired) {
          fired = false;
          for (std::uint64_t seed = 0; seed < 6; ++seed) {
            SCOPED_TRACE("call kind " + std::to_string(kind) + ", number " + std::to_string(hits + 1) + ", error " +
                         std::to_string(error) + ", seed " + std::to_string(seed));
            fired = fail_and_check({.call = call, .nth = hits + 1, .error = error, .effect = effect}, seed);
          }
        }
        EXPECT_GT(hits, 0u) << "kind " << kind << " is never called";
      }
    }
  }
}

// The real drive, and processes that die at any moment.
class PagefileKillTest : public ::testing::Test {
 protected:
  static constexpr std::uint32_t kPages = 12;
  static constexpr std::size_t kPageBytes = 64 * kKiB;

  void SetUp() override {
    std::string name = "/var/tmp/tensorpager-pagefile-test-XXXXXX";
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    directory_ = name;
    directories_ = {directory_ + "/a", directory_ + "/b"};
    for (const std::string& each : directories_) std::filesystem::create_directory(each);
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  // Every third page or so changes with each commit, by a rule that parent and child know.
  static bool changes(std::uint64_t commit, std::uint32_t page) { return (commit * 7 + page * 5) % 3 == 0; }
  static Content content_at(std::uint64_t commit) {
    Content content{std::vector<std::uint64_t>(kPages, 0), std::to_string(commit)};
    for (std::uint64_t each = 1; each <= commit; ++each) {
      for (std::uint32_t page = 0; page < kPages; ++page) {
        if (changes(each, page)) content.salts[page] = each;
      }
    }
    return content;
  }

  static void write_changes(Pagefile& store, std::uint64_t commit) {
    for (std::uint32_t page = 0; page < kPages; ++page) {
      if (changes(commit, page)) write_salt(store, page, commit);
    }
  }

  // Never returns. Says after each commit which one it was.
  [[noreturn]] void write_until_killed(int out) const {
    try {
      Pagefile store = Pagefile::open(directories_, small_growth(kMiB));
      for (std::uint64_t commit = store.commit_number() + 1;; ++commit) {
        write_changes(store, commit);
        store.commit(metadata_of(std::to_string(commit)));
        if (::write(out, &commit, sizeof commit) != sizeof commit) _exit(2);
      }
    } catch (const Error&) {
      _exit(1);
    }
  }

  enum class KillFrom { the_start, the_first_commit };

  // The last commit that the child knows to have returned; `before` when it came to none.
  std::uint64_t run_child_and_kill_it(KillFrom from, std::chrono::microseconds after, std::uint64_t before) const {
    int ends[2];
    EXPECT_EQ(pipe(ends), 0);
    const pid_t child = fork();
    if (child == 0) write_until_killed(ends[1]);
    close(ends[1]);
    std::uint64_t last = before;
    if (from == KillFrom::the_first_commit) {
      EXPECT_EQ(read(ends[0], &last, sizeof last), ssize_t{sizeof last});
    }
    std::this_thread::sleep_for(after);
    kill(child, SIGKILL);
    int status = 0;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFSIGNALED(status)) << "the child ended by itself, with status " << WEXITSTATUS(status);
    while (read(ends[0], &last, sizeof last) == sizeof last) continue;
    close(ends[0]);
    return last;
  }

  std::string directory_;
  std::vector<std::string> directories_;
};

TEST_F(PagefileKillTest, a_process_killed_at_any_moment_leaves_its_last_commit_on_the_real_file_system) {
  {
    Pagefile store = Pagefile::create(directories_, kPageBytes, small_growth(kMiB));
    store.grow(kPages);
    write_changes(store, 1);
    store.commit(metadata_of("1"));
  }
  std::mt19937_64 random(7);
  std::uint64_t last = 1;
  for (unsigned round = 0; round < 20; ++round) {
    const KillFrom from = round % 2 == 0 ? KillFrom::the_first_commit : KillFrom::the_start;
    const std::uint64_t known = run_child_and_kill_it(from, std::chrono::microseconds(random() % 40000), last);
    const Pagefile store = Pagefile::open(directories_, small_growth(kMiB));
    EXPECT_TRUE(store.commit_number() == known || store.commit_number() == known + 1)
        << store.commit_number() << " after " << known;
    EXPECT_TRUE(store.verify().empty());
    EXPECT_TRUE(test::holds(store, content_at(store.commit_number()))) << "round " << round;
    last = store.commit_number();
  }
  EXPECT_GE(last, 11u);  // one at least in every second round
}

TEST_F(PagefileKillTest, a_store_that_is_open_in_another_process_is_refused) {
  const Pagefile store = Pagefile::create(directories_, kPageBytes);
  const test::ChildResult result =
      test::run_in_child([&]() -> std::string { return error_of([&] { Pagefile::open(directories_); }).what(); });
  EXPECT_TRUE(has(result.text, "is open in another process")) << result.text;
}

}  // namespace
}  // namespace tp
