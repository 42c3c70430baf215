// SPDX-License-Identifier: Apache-2.0
#include "sim/sim_file_system.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/check.hpp"

namespace tp {
namespace {

std::string directory_of(const std::string& path) { return path.substr(0, path.rfind('/')); }

}  // namespace

void SimFileSystem::Image::write(std::uint64_t offset_bytes, std::span<const std::byte> bytes) {
  for (std::size_t done = 0; done < bytes.size();) {
    const std::uint64_t at = offset_bytes + done;
    const std::size_t within = at % kSectorBytes;
    const std::size_t count = std::min(kSectorBytes - within, bytes.size() - done);
    std::memcpy(sectors[at / kSectorBytes].data() + within, bytes.data() + done, count);
    done += count;
  }
  size_bytes = std::max(size_bytes, offset_bytes + bytes.size());
}

void SimFileSystem::Image::read(std::uint64_t offset_bytes, std::span<std::byte> bytes) const {
  TP_CHECK(offset_bytes + bytes.size() <= size_bytes);
  for (std::size_t done = 0; done < bytes.size();) {
    const std::uint64_t at = offset_bytes + done;
    const std::size_t within = at % kSectorBytes;
    const std::size_t count = std::min(kSectorBytes - within, bytes.size() - done);
    const auto sector = sectors.find(at / kSectorBytes);
    if (sector == sectors.end()) {
      std::memset(bytes.data() + done, 0, count);
    } else {
      std::memcpy(bytes.data() + done, sector->second.data() + within, count);
    }
    done += count;
  }
}

void SimFileSystem::NameChange::apply(Names& names) const {
  if (!removed.empty()) names.erase(removed);
  if (!made.empty()) names[made] = file;
}

void SimFileSystem::fail(const SimCallFailure& failure) {
  TP_CHECK(failure.nth > 0);
  failure_ = failure;
  matching_ = 0;
  fired_ = false;
}

void SimFileSystem::halt_at(std::uint64_t call, SimEffect effect) {
  halt_at_ = call;
  halt_effect_ = effect;
}

void SimFileSystem::halt_at_next(SimCall call) {
  halt_at_next_ = call;
  halt_effect_ = SimEffect::none;
}

// What is to become of this call.
SimFileSystem::Outcome SimFileSystem::begin(SimCall call) {
  ++calls_;
  ++calls_by_kind_[static_cast<std::size_t>(call)];
  if (halted_) return {EIO, false, false};
  if ((halt_at_ != 0 && calls_ >= halt_at_) || halt_at_next_ == call) {
    halted_ = true;
    return {EIO, halt_effect_ == SimEffect::happens, false};
  }
  if (!failure_ || failure_->call != call) return {};
  ++matching_;
  if (matching_ < failure_->nth || matching_ - failure_->nth >= failure_->times) return {};
  fired_ = true;
  if (failure_->error == 0) return {0, true, true};
  return {failure_->error, failure_->effect == SimEffect::happens, true};
}

SimFileSystem::SimFile& SimFileSystem::opened(int file) {
  const auto found = handles_.find(file);
  TP_CHECK(found != handles_.end());
  return *found->second;
}

SimFileSystem::SimFile& SimFileSystem::named(const std::string& path) const {
  const auto found = names_.find(path);
  TP_CHECK(found != names_.end());
  return *found->second;
}

int SimFileSystem::add_handle(const std::shared_ptr<SimFile>& file) {
  const int handle = next_handle_++;  // never one that was used before: a late close() does no harm
  handles_.emplace(handle, file);
  return handle;
}

void SimFileSystem::change_names(NameChange change) {
  change.apply(names_);
  unsynced_names_.push_back(std::move(change));
}

int SimFileSystem::create(const std::string& path) {
  const Outcome outcome = begin(SimCall::create);
  if (outcome.happens && names_.contains(path)) return -EEXIST;
  if (outcome.happens) change_names({"", path, std::make_shared<SimFile>()});
  return outcome.error != 0 ? -outcome.error : add_handle(names_.at(path));
}

int SimFileSystem::open(const std::string& path) {
  const Outcome outcome = begin(SimCall::open);
  if (outcome.error != 0) return -outcome.error;
  const auto found = names_.find(path);
  return found == names_.end() ? -ENOENT : add_handle(found->second);
}

void SimFileSystem::close(int file) noexcept {
  const auto found = handles_.find(file);
  if (found == handles_.end()) return;  // ended with its process, or in a crash
  if (found->second->lock_holder == file) found->second->lock_holder = -1;
  handles_.erase(found);
}

std::int64_t SimFileSystem::size(int file) {
  const Outcome outcome = begin(SimCall::size);
  return outcome.error != 0 ? -outcome.error : static_cast<std::int64_t>(opened(file).seen.size_bytes);
}

std::int64_t SimFileSystem::pread(int file, std::span<std::byte> bytes, std::uint64_t offset_bytes) {
  const Outcome outcome = begin(SimCall::pread);
  if (outcome.error != 0) return -outcome.error;
  const Image& image = opened(file).seen;
  if (offset_bytes >= image.size_bytes) return 0;
  std::size_t count = std::min<std::uint64_t>(bytes.size(), image.size_bytes - offset_bytes);
  if (outcome.half) count = (count + 1) / 2;
  image.read(offset_bytes, bytes.first(count));
  return static_cast<std::int64_t>(count);
}

std::int64_t SimFileSystem::pwrite(int file, std::span<const std::byte> bytes, std::uint64_t offset_bytes) {
  const Outcome outcome = begin(SimCall::pwrite);
  if (!outcome.happens && !outcome.half) return -outcome.error;
  TP_CHECK(!bytes.empty());
  SimFile& written = opened(file);
  const std::size_t count = outcome.half ? (bytes.size() + 1) / 2 : bytes.size();
  const std::uint64_t size_before = written.seen.size_bytes;
  written.seen.write(offset_bytes, bytes.first(count));
  written.size_unsynced |= written.seen.size_bytes != size_before;
  const std::uint64_t last = (offset_bytes + count - 1) / kSectorBytes;
  for (std::uint64_t sector = offset_bytes / kSectorBytes; sector <= last; ++sector) written.unsynced.insert(sector);
  written.written_bytes += count;
  return outcome.error != 0 ? -outcome.error : static_cast<std::int64_t>(count);
}

int SimFileSystem::preallocate(int file, std::uint64_t offset_bytes, std::uint64_t size_bytes) {
  const Outcome outcome = begin(SimCall::preallocate);
  if (!outcome.happens) return -outcome.error;
  SimFile& extended = opened(file);
  if (offset_bytes + size_bytes > extended.seen.size_bytes) {
    extended.seen.size_bytes = offset_bytes + size_bytes;
    extended.size_unsynced = true;
  }
  return -outcome.error;
}

int SimFileSystem::sync(int file) {
  const Outcome outcome = begin(SimCall::sync);
  if (halted_ && !outcome.happens) return -outcome.error;
  SimFile& synced = opened(file);
  if (outcome.error == 0 || halted_) {
    for (const std::uint64_t sector : synced.unsynced) synced.durable.sectors[sector] = synced.seen.sectors.at(sector);
    if (synced.size_unsynced) synced.durable.size_bytes = synced.seen.size_bytes;
  }
  synced.unsynced.clear();
  synced.size_unsynced = false;
  return -outcome.error;
}

int SimFileSystem::lock(int file) {
  const Outcome outcome = begin(SimCall::lock);
  if (outcome.error != 0) return -outcome.error;
  SimFile& locked = opened(file);
  if (locked.lock_holder >= 0 && locked.lock_holder != file) return -EWOULDBLOCK;
  locked.lock_holder = file;
  return 0;
}

int SimFileSystem::rename(const std::string& from, const std::string& to) {
  const Outcome outcome = begin(SimCall::rename);
  if (!outcome.happens) return -outcome.error;
  const auto found = names_.find(from);
  if (found == names_.end()) return -ENOENT;
  change_names({from, to, found->second});
  return -outcome.error;
}

int SimFileSystem::remove(const std::string& path) {
  const Outcome outcome = begin(SimCall::remove);
  if (!outcome.happens) return -outcome.error;
  if (!names_.contains(path)) return -ENOENT;
  change_names({path, "", nullptr});
  return -outcome.error;
}

int SimFileSystem::sync_directory(const std::string& path) {
  const Outcome outcome = begin(SimCall::sync_directory);
  if (halted_ && !outcome.happens) return -outcome.error;
  std::vector<NameChange> elsewhere;
  for (NameChange& change : unsynced_names_) {
    if (directory_of(change.made.empty() ? change.removed : change.made) != path) {
      elsewhere.push_back(std::move(change));
    } else if (outcome.error == 0 || halted_) {
      change.apply(durable_names_);
    }
  }
  unsynced_names_ = std::move(elsewhere);
  return -outcome.error;
}

void SimFileSystem::crash_file(SimFile& file, std::mt19937_64& random) {
  const std::uint64_t kept_of_8 = std::array{0u, 1u, 4u, 7u, 8u}[random() % 5];
  if (file.size_unsynced && random() % 2 == 0) file.durable.size_bytes = file.seen.size_bytes;
  for (const std::uint64_t sector : file.unsynced) {
    const bool kept = random() % 8 < kept_of_8;
    if (kept && sector * kSectorBytes < file.durable.size_bytes) {
      file.durable.sectors[sector] = file.seen.sectors.at(sector);
    }
  }
  file.unsynced.clear();
  file.size_unsynced = false;
  file.seen = file.durable;
}

void SimFileSystem::crash(std::uint64_t seed) {
  std::mt19937_64 random(seed);
  end_process();
  for (const NameChange& change : unsynced_names_) {
    if (random() % 2 == 0) change.apply(durable_names_);
  }
  unsynced_names_.clear();
  names_ = durable_names_;
  for (const auto& [path, file] : names_) crash_file(*file, random);
}

void SimFileSystem::end_process() {
  for (const auto& [handle, file] : handles_) file->lock_holder = -1;
  handles_.clear();
  halted_ = false;
  halt_at_ = 0;
  halt_at_next_.reset();
  failure_.reset();
}

std::uint64_t SimFileSystem::written_bytes(const std::string& path) const { return named(path).written_bytes; }

std::vector<std::byte> SimFileSystem::contents(const std::string& path) const {
  const Image& image = named(path).seen;
  std::vector<std::byte> bytes(image.size_bytes);
  image.read(0, bytes);
  return bytes;
}

void SimFileSystem::overwrite(const std::string& path, std::uint64_t offset_bytes, std::span<const std::byte> bytes) {
  SimFile& file = named(path);
  file.seen.write(offset_bytes, bytes);
  file.durable.write(offset_bytes, bytes);
}

void SimFileSystem::replace(const std::string& path, std::span<const std::byte> bytes) {
  SimFile& file = named(path);
  file.seen = Image{};
  file.seen.write(0, bytes);
  file.durable = file.seen;
  file.unsynced.clear();
}

void SimFileSystem::truncate(const std::string& path, std::uint64_t size_bytes) {
  std::vector<std::byte> bytes = contents(path);
  TP_CHECK(size_bytes <= bytes.size());
  bytes.resize(size_bytes);
  replace(path, bytes);
}

void SimFileSystem::exchange(const std::string& one, const std::string& other) {
  TP_CHECK(names_.contains(one) && names_.contains(other));
  std::swap(names_.at(one), names_.at(other));
  durable_names_ = names_;
  unsynced_names_.clear();
}

}  // namespace tp
