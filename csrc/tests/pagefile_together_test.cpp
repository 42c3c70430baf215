// SPDX-License-Identifier: Apache-2.0
// Commits that several pagefiles make together: prepared by all, then published by all, whoever dies and whenever.
#include <gtest/gtest.h>

#include <cerrno>
#include <functional>
#include <memory>
#include <optional>
#include <random>

#include "pager/pagefile.hpp"
#include "tests/pagefile_fixture.hpp"

namespace tp {
namespace {

using test::committed_store;
using test::Content;
using test::error_of;
using test::has;
using test::kTestPageBytes;
using test::metadata_of;
using test::small_growth;
using test::text_of;
using test::write_salt;

const std::string kPreparedPath = "/a/root.tensorpager.prepared";
const Content kFirst = {{1, 2}, "first"};
const Content kSecond = {{10, 2}, "second"};

// A store whose commit 2 is prepared, as kSecond, over commit 1, kFirst.
Pagefile prepared_store(SimFileSystem& sim) {
  Pagefile store = committed_store(sim, 2);
  write_salt(store, 0, 10);
  store.prepare(metadata_of("second"));
  return store;
}

Pagefile open(SimFileSystem& sim) { return Pagefile::open({"/a"}, small_growth(), sim); }

TEST(PagefileTogetherTest, a_prepared_commit_is_none_until_it_is_published_and_then_it_stays) {
  SimFileSystem sim;
  Pagefile store = prepared_store(sim);
  EXPECT_TRUE(store.prepared());
  EXPECT_EQ(store.commit_number(), 1u);
  EXPECT_EQ(text_of(store.metadata()), "first");
  EXPECT_EQ(text_of(store.prepared_metadata()), "second");
  store.publish();
  EXPECT_FALSE(store.prepared());
  EXPECT_EQ(store.commit_number(), 2u);
  EXPECT_FALSE(sim.exists(kPreparedPath));
  sim.crash(1);
  EXPECT_TRUE(test::holds(open(sim), kSecond));
}

TEST(PagefileTogetherTest, an_abandoned_commit_leaves_the_last_one_and_gives_back_its_room) {
  SimFileSystem sim;
  Pagefile store = prepared_store(sim);
  EXPECT_EQ(store.extent_file(0).used_count(), 3u);
  store.discard(PageId{0});
  EXPECT_EQ(store.extent_file(0).used_count(), 3u) << "the prepared commit still needs it";
  store.abandon();
  EXPECT_EQ(store.extent_file(0).used_count(), 2u);
  EXPECT_FALSE(sim.exists(kPreparedPath));
  store.commit(metadata_of("other"));
  EXPECT_EQ(store.commit_number(), 2u);
  sim.crash(1);
  EXPECT_TRUE(test::holds(open(sim), {{0, 2}, "other"}));
}

TEST(PagefileTogetherTest, what_was_prepared_is_found_after_a_crash_and_either_decision_can_be_made) {
  for (const bool publish : {true, false}) {
    for (std::uint64_t seed = 0; seed < 10; ++seed) {
      SimFileSystem sim;
      prepared_store(sim);
      sim.crash(seed);
      {
        Pagefile store = open(sim);
        ASSERT_TRUE(store.prepared());
        EXPECT_EQ(text_of(store.prepared_metadata()), "second");
        EXPECT_TRUE(test::holds(store, kFirst));
        publish ? store.publish() : store.abandon();
        EXPECT_TRUE(test::holds(store, publish ? kSecond : kFirst));
        EXPECT_EQ(store.extent_file(0).used_count(), 2u);
        for (std::uint64_t salt = 100; salt < 110; ++salt) write_salt(store, 1, salt);
      }
      sim.crash(seed + 1);
      EXPECT_TRUE(test::holds(open(sim), publish ? kSecond : kFirst));
    }
  }
}

TEST(PagefileTogetherTest, an_undecided_store_can_be_read_and_not_changed) {
  SimFileSystem sim;
  prepared_store(sim);
  Pagefile store = open(sim);
  EXPECT_TRUE(store.verify().empty());
  const std::function<void()> changes[] = {
      [&] { store.grow(1); },
      [&] { store.take_extent(); },
      [&] { store.discard(PageId{0}); },
      [&] { write_salt(store, 0, 5); },
      [&] { store.commit({}); },
      [&] { store.prepare({}); },
      [&] { store.refuse_when_undecided(); },
  };
  for (const auto& change : changes) {
    const Error error = error_of(change);
    EXPECT_EQ(error.error_number(), EBUSY);
    EXPECT_TRUE(has(error.what(), "has prepared commit 2")) << error.what();
  }
  store.abandon();
  for (std::size_t each = 0; each < 5; ++each) changes[each]();
}

TEST(PagefileTogetherTest, no_second_commit_while_one_is_undecided_but_pages_may_be_written) {
  SimFileSystem sim;
  Pagefile store = prepared_store(sim);
  write_salt(store, 0, 20);
  store.grow(1);
  write_salt(store, 2, 21);
  EXPECT_EQ(error_of([&] { store.commit({}); }).error_number(), EBUSY);
  EXPECT_EQ(error_of([&] { store.prepare({}); }).error_number(), EBUSY);
  store.publish();
  EXPECT_EQ(test::read_page(store, 0), test::page_of(20)) << "what was written since is there still";
  EXPECT_EQ(store.extent_file(0).used_count(), 4u);  // two of the commit, two of now
  {
    const Pagefile moved = std::move(store);
    sim.end_process();
  }
  EXPECT_TRUE(test::holds(open(sim), kSecond));
}

TEST(PagefileTogetherTest, without_a_prepared_commit_there_is_nothing_to_decide) {
  SimFileSystem sim;
  Pagefile store = committed_store(sim, 1);
  EXPECT_EQ(error_of([&] { store.publish(); }).kind(), ErrorKind::invalid);
  EXPECT_EQ(error_of([&] { store.abandon(); }).kind(), ErrorKind::invalid);
  EXPECT_TRUE(store.prepared_metadata().empty());
}

TEST(PagefileTogetherTest, a_prepared_root_of_another_store_or_time_is_refused_or_dropped) {
  SimFileSystem sim;
  prepared_store(sim);
  const std::vector<std::byte> second = sim.contents(kPreparedPath);
  {
    Pagefile store = open(sim);
    store.publish();
    EXPECT_FALSE(sim.exists(kPreparedPath));
  }
  // As a lost removal would bring it back.
  sim.close(sim.create(kPreparedPath));
  sim.replace(kPreparedPath, second);
  {
    const Pagefile store = open(sim);
    EXPECT_FALSE(store.prepared());
    EXPECT_FALSE(sim.exists(kPreparedPath));
    EXPECT_TRUE(test::holds(store, kSecond));
  }
  SimFileSystem other;
  prepared_store(other);
  sim.close(sim.create(kPreparedPath));
  sim.replace(kPreparedPath, other.contents(kPreparedPath));
  const Error error = error_of([&] { open(sim); });
  EXPECT_EQ(error.error_number(), EBADMSG);
  EXPECT_TRUE(has(error.what(), "another pagefile")) << error.what();
  std::vector<std::byte> damaged = second;
  damaged[damaged.size() / 2] ^= std::byte{1};
  sim.replace(kPreparedPath, damaged);
  EXPECT_EQ(error_of([&] { open(sim); }).error_number(), EBADMSG);
}

// Whatever call of prepare(), publish() or abandon() fails: the store says so, and what it holds is one of the two.
TEST(PagefileTogetherTest, whatever_call_fails_the_store_holds_the_last_commit_or_the_prepared_one) {
  for (const bool publish : {true, false}) {
    for (std::size_t kind = 0; kind < kSimCalls; ++kind) {
      bool fired = true;
      for (std::uint64_t nth = 1; fired && !testing::Test::HasFailure(); ++nth) {
        for (std::uint64_t seed = 0; seed < 4; ++seed) {
          SCOPED_TRACE("call kind " + std::to_string(kind) + ", number " + std::to_string(nth));
          SimFileSystem sim;
          bool decided = false;
          {
            Pagefile store = committed_store(sim, 2);
            write_salt(store, 0, 10);
            sim.fail({.call = static_cast<SimCall>(kind),
                      .nth = nth,
                      .error = EIO,
                      .effect = seed % 2 == 0 ? SimEffect::none : SimEffect::happens});
            try {
              store.prepare(metadata_of("second"));
              publish ? store.publish() : store.abandon();
              decided = true;
            } catch (const Error& error) {
              EXPECT_EQ(error.kind(), ErrorKind::io);
              EXPECT_TRUE(has(error.what(), "/a")) << error.what();
            }
          }
          fired = sim.fired();
          EXPECT_TRUE(fired || decided);
          sim.crash(seed);
          Pagefile store = open(sim);
          const bool last = test::holds(store, kFirst);
          EXPECT_TRUE(last || test::holds(store, kSecond));
          if (decided) {
            EXPECT_NE(last, publish);
          }
          if (store.prepared()) {
            EXPECT_TRUE(last);
            store.publish();
            EXPECT_TRUE(test::holds(store, kSecond));
          }
        }
      }
    }
  }
}

// Several machines, each with a store of its own, that commit together until one of them, or all, die at a random call.
class Ensemble {
 public:
  explicit Ensemble(std::uint64_t seed) : random_(seed), members_(2 + below(2)) {
    for (Member& member : members_) {
      Pagefile store = Pagefile::create({"/a"}, kTestPageBytes, small_growth(), *member.sim);
      store.grow(3);
      store.commit(metadata_of("0"));
      member.committed = {{0, 0, 0}, "0"};
    }
  }

  // Trains and commits until a member dies; the others then find that it is gone, wherever they are.
  void live_and_die() {
    resume();
    Member& first = members_[below(members_.size())];
    first.sim->halt_at(first.sim->calls() + 1 + below(60), below(2) == 0 ? SimEffect::happens : SimEffect::none);
    if (below(3) == 0) {
      Member& other = members_[below(members_.size())];
      other.sim->halt_at(other.sim->calls() + 1 + below(60), SimEffect::none);
    }
    while (train() && commit()) continue;
    for (Member& member : members_) {
      member.store.reset();
      below(2) == 0 && !member.sim->halted() ? member.sim->end_process() : member.sim->crash(random_());
    }
  }

  // By the rule: if one has published, all who have prepared do; else nobody does. Then all are at one commit.
  void resume() {
    std::uint64_t highest = 0;
    for (Member& member : members_) {
      member.store.reset();
      member.store.emplace(open(*member.sim));
      highest = std::max(highest, member.store->commit_number());
    }
    for (Member& member : members_) {
      if (member.store->prepared()) {
        member.store->commit_number() < highest ? member.store->publish() : member.store->abandon();
      }
      ASSERT_EQ(member.store->commit_number(), highest);
    }
    const bool in_flight =
        members_.front().in_flight && test::holds(*members_.front().store, *members_.front().in_flight);
    EXPECT_TRUE(in_flight || !one_published_) << "a commit that one has published is gone";
    for (Member& member : members_) {
      if (in_flight) member.committed = *member.in_flight;
      EXPECT_TRUE(test::holds(*member.store, member.committed)) << "one has the commit and another has not";
      EXPECT_TRUE(member.store->verify().empty());
      member.in_flight.reset();
    }
    one_published_ = false;
  }

  std::uint64_t commits() const { return commits_; }
  std::uint64_t dropped() const { return dropped_; }

 private:
  struct Member {
    std::unique_ptr<SimFileSystem> sim = std::make_unique<SimFileSystem>();
    std::optional<Pagefile> store;
    Content committed, now;
    std::optional<Content> in_flight;
  };

  std::uint64_t below(std::uint64_t end) { return random_() % end; }

  static bool alive(const std::function<void()>& step) {
    try {
      step();
      return true;
    } catch (const Error&) {
      return false;
    }
  }

  bool train() {
    for (Member& member : members_) {
      member.now = member.committed;
      for (unsigned write = 0; write < 1 + below(3); ++write) {
        const auto page = static_cast<std::uint32_t>(below(3));
        const std::uint64_t salt = random_() | 1;
        if (!alive([&] { write_salt(*member.store, page, salt); })) return false;
        member.now.salts[page] = salt;
      }
    }
    return true;
  }

  // A member that fails to prepare makes all the others abandon; one that dies after all have prepared does not.
  bool commit() {
    bool all_prepared = true;
    const std::string number = std::to_string(++commits_);
    for (Member& member : members_) {
      member.now.metadata = number;
      member.in_flight = member.now;
    }
    for (Member& member : members_)
      all_prepared = all_prepared && alive([&] { member.store->prepare(metadata_of(number)); });
    bool all_decided = true;
    for (Member& member : members_) {
      if (!member.store->prepared()) continue;
      if (below(8) == 0) return false;  // dies, and with it all, before it decides
      all_decided = alive([&] { all_prepared ? member.store->publish() : member.store->abandon(); }) && all_decided;
      one_published_ = one_published_ || (all_prepared && all_decided);
    }
    dropped_ += !all_prepared;
    if (!all_prepared || !all_decided) return false;
    for (Member& member : members_) member.committed = *std::exchange(member.in_flight, std::nullopt);
    one_published_ = false;
    return true;
  }

  std::mt19937_64 random_;
  std::vector<Member> members_;
  std::uint64_t commits_ = 0, dropped_ = 0;
  bool one_published_ = false;  // the commit in flight
};

TEST(PagefileTogetherTest, whoever_dies_at_any_call_all_have_the_commit_or_none) {
  std::uint64_t commits = 0, dropped = 0;
  for (std::uint64_t seed = 0; seed < 200 && !testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Ensemble ensemble(seed);
    for (unsigned life = 0; life < 6; ++life) ensemble.live_and_die();
    ensemble.resume();
    commits += ensemble.commits();
    dropped += ensemble.dropped();
  }
  EXPECT_GT(commits, 1000u) << "histories too short to tell anything";
  EXPECT_GT(dropped, 100u);
}

}  // namespace
}  // namespace tp
