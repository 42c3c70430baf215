// SPDX-License-Identifier: Apache-2.0
// A FileSystem in memory whose machine can lose its power. Every file has two images: what programs see, and what the
// drive holds. Writes, new sizes and names reach the first; sync() and sync_directory() take them to the second.
//
// crash(): of what was not synced an arbitrary subset is kept, by sectors of 512 bytes (so pages tear), by operations
// on names (so a rename may have happened and the creation of another file before it not), and a new size may be kept
// or not. end_process(): a process died and the machine did not; nothing is lost, its files and locks are closed.
//
// Failures. fail(): the Nth call of a kind reports an error, or transfers half. A write that fails has written half. A
// sync that fails drops what it should have synced: it is seen as before, later syncs succeed, and a crash loses it
// (what Linux does, "fsyncgate"), so that whoever retries is found out. halt_at(): from that call on, of any kind, each
// fails and does nothing; the call itself may have happened. A crash() must follow.
//
// Directories are not modelled: any path has one, up to its last '/'. Equal seeds and calls give equal runs. One
// thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "io/file_system.hpp"

namespace tp {

enum class SimCall : std::uint8_t {
  create,
  open,
  size,
  pread,
  pwrite,
  preallocate,
  sync,
  lock,
  rename,
  remove,
  sync_directory,
};
inline constexpr std::size_t kSimCalls = 11;

enum class SimEffect : std::uint8_t { none, happens };

struct SimCallFailure {
  SimCall call = SimCall::pwrite;
  std::uint64_t nth = 1;  // counted from 1, from fail() on
  int error = 5;          // errno value, EIO; 0: half of the bytes are transferred, and that is reported
  std::uint64_t times = 1;
  SimEffect effect = SimEffect::none;  // of creations, renames and removals: whether it happens all the same
};

class SimFileSystem final : public FileSystem {
 public:
  static constexpr std::size_t kSectorBytes = 512;

  void fail(const SimCallFailure& failure);
  bool fired() const noexcept { return fired_; }       // since fail()
  void halt_at(std::uint64_t call, SimEffect effect);  // of calls()
  void halt_at_next(SimCall call);                     // the call itself does not happen
  bool halted() const noexcept { return halted_; }
  void crash(std::uint64_t seed);
  void end_process();

  std::uint64_t calls() const noexcept { return calls_; }
  std::uint64_t calls(SimCall call) const noexcept { return calls_by_kind_[static_cast<std::size_t>(call)]; }
  std::uint64_t written_bytes(const std::string& path) const;  // by pwrite, in all
  bool exists(const std::string& path) const { return names_.contains(path); }

  // What a bad drive or another program does: both images, at once.
  std::vector<std::byte> contents(const std::string& path) const;
  void overwrite(const std::string& path, std::uint64_t offset_bytes, std::span<const std::byte> bytes);
  void replace(const std::string& path, std::span<const std::byte> bytes);
  void truncate(const std::string& path, std::uint64_t size_bytes);
  void exchange(const std::string& one, const std::string& other);

  int create(const std::string& path) override;
  int open(const std::string& path) override;
  void close(int file) noexcept override;
  std::int64_t size(int file) override;
  std::int64_t pread(int file, std::span<std::byte> bytes, std::uint64_t offset_bytes) override;
  std::int64_t pwrite(int file, std::span<const std::byte> bytes, std::uint64_t offset_bytes) override;
  int preallocate(int file, std::uint64_t offset_bytes, std::uint64_t size_bytes) override;
  int sync(int file) override;
  int lock(int file) override;
  int rename(const std::string& from, const std::string& to) override;
  int remove(const std::string& path) override;
  int sync_directory(const std::string& path) override;

 private:
  using Sector = std::array<std::byte, kSectorBytes>;
  struct Image {
    std::map<std::uint64_t, Sector> sectors;  // those never written are zeros
    std::uint64_t size_bytes = 0;
    void write(std::uint64_t offset_bytes, std::span<const std::byte> bytes);
    void read(std::uint64_t offset_bytes, std::span<std::byte> bytes) const;
  };
  struct SimFile {
    Image seen, durable;
    std::set<std::uint64_t> unsynced;  // sectors
    bool size_unsynced = false;
    int lock_holder = -1;
    std::uint64_t written_bytes = 0;
  };
  using Names = std::map<std::string, std::shared_ptr<SimFile>>;
  struct NameChange {
    std::string removed, made;  // either may be empty
    std::shared_ptr<SimFile> file;
    void apply(Names& names) const;
  };
  struct Outcome {
    int error = 0;  // to report
    bool happens = true;
    bool half = false;
  };

  Outcome begin(SimCall call);
  SimFile& opened(int file);
  SimFile& named(const std::string& path) const;
  int add_handle(const std::shared_ptr<SimFile>& file);
  void change_names(NameChange change);
  static void crash_file(SimFile& file, std::mt19937_64& random);

  Names names_, durable_names_;
  std::vector<NameChange> unsynced_names_;
  std::map<int, std::shared_ptr<SimFile>> handles_;
  int next_handle_ = 1;
  std::uint64_t calls_ = 0;
  std::array<std::uint64_t, kSimCalls> calls_by_kind_{};
  std::optional<SimCallFailure> failure_;
  std::uint64_t matching_ = 0;
  bool fired_ = false;
  std::uint64_t halt_at_ = 0;  // 0: never
  std::optional<SimCall> halt_at_next_;
  SimEffect halt_effect_ = SimEffect::none;
  bool halted_ = false;
};

}  // namespace tp
