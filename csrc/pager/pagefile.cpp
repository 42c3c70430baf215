// SPDX-License-Identifier: Apache-2.0
#include "pager/pagefile.hpp"

#include <sys/random.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "base/check.hpp"
#include "pager/spill.hpp"

namespace tp {
namespace {

std::string root_path(const std::string& directory) { return directory + "/root.tensorpager"; }
std::string temporary_root_path(const std::string& directory) { return directory + "/root.tensorpager.new"; }
std::string prepared_root_path(const std::string& directory) { return directory + "/root.tensorpager.prepared"; }
std::string lock_path(const std::string& directory) { return directory + "/lock.tensorpager"; }
std::string extent_path(const std::string& directory) { return directory + "/pages.tensorpager"; }

[[noreturn]] void throw_invalid(const std::string& message) { throw Error(ErrorKind::invalid, message); }

void check_arguments(const std::vector<std::string>& directories, const PagefileOptions& options) {
  if (directories.empty() || directories.size() > kPagefileDirectoriesMax) {
    throw_invalid("a pagefile lies in 1 to " + std::to_string(kPagefileDirectoriesMax) + " directories, not in " +
                  std::to_string(directories.size()));
  }
  if (!options.weights.empty() && options.weights.size() != directories.size()) {
    throw_invalid(std::to_string(options.weights.size()) + " weights for " + std::to_string(directories.size()) +
                  " directories; give one each, or none");
  }
  if (options.growth_bytes > kPagefileGrowthBytesMax) {
    throw_invalid("extent files that grow by " + std::to_string(options.growth_bytes) + " bytes; at most " +
                  std::to_string(kPagefileGrowthBytesMax) + " are possible");
  }
  for (const double weight : options.weights) {
    if (!std::isfinite(weight) || weight <= 0) throw_invalid("a weight must be a positive number; it is a bandwidth");
  }
}

StoreId new_store_id() {
  StoreId id;
  // Up to 256 bytes come whole and without waiting, once the machine has booted.
  TP_CHECK(getentropy(id.words.data(), sizeof id.words) == 0);
  return id;
}

DurableFile open_lock(FileSystem& file_system, const std::string& path) {
  try {
    return DurableFile::create(file_system, path);
  } catch (const Error& error) {
    if (error.error_number() != EEXIST) throw;
  }
  return DurableFile::open(file_system, path);
}

DurableFile take_lock(FileSystem& file_system, const std::string& directory) {
  DurableFile lock = open_lock(file_system, lock_path(directory));
  if (lock.lock() == LockResult::held) return lock;
  throw Error(ErrorKind::io,
              "the pagefile in " + directory +
                  " is open in another process, or twice in this one; close it there, one at a time may have it",
              EWOULDBLOCK);
}

DurableFile open_root(FileSystem& file_system, const std::string& directory) {
  try {
    return DurableFile::open(file_system, root_path(directory));
  } catch (const Error& error) {
    if (error.error_number() != ENOENT) throw;
  }
  throw Error(ErrorKind::io,
              directory + " holds no pagefile (there is no " + root_path(directory) +
                  "); check the path and the order of the directories, or create one",
              ENOENT);
}

bool exists(FileSystem& file_system, const std::string& path) {
  try {
    DurableFile::open(file_system, path);
    return true;
  } catch (const Error& error) {
    if (error.error_number() != ENOENT) throw;
    return false;
  }
}

void refuse_to_replace(FileSystem& file_system, const std::vector<std::string>& directories) {
  std::vector<std::string> paths = {root_path(directories.front()), prepared_root_path(directories.front())};
  for (const std::string& directory : directories) paths.push_back(extent_path(directory));
  for (const std::string& path : paths) {
    if (!exists(file_system, path)) continue;
    throw Error(ErrorKind::io,
                path +
                    " is there already: of a pagefile, or of a creation that was interrupted. Open that one, remove "
                    "its files, or name another directory",
                EEXIST);
  }
}

PagefileRoot read_root(const DurableFile& file) {
  const std::uint64_t size_bytes = file.size_bytes();
  std::array<std::byte, kRootHeaderBytes> header{};
  const std::size_t header_bytes = file.read(0, header);
  // The header says how long the file must be; memory is asked for when the file is as long.
  if (header_bytes < header.size() || root_size_bytes(header, file.path()) != size_bytes) {
    throw Error(
        ErrorKind::io,
        file.path() + " has " + std::to_string(size_bytes) +
            " bytes, which is not what it says; it was cut off or damaged. Bring back a copy of the whole store",
        EBADMSG);
  }
  std::vector<std::byte> bytes(size_bytes);
  bytes.resize(file.read(0, bytes));
  return decode_root(bytes, file.path());
}

}  // namespace

Pagefile::Pagefile(FileSystem& file_system, const std::vector<std::string>& directories, DurableFile lock,
                   const PagefileOptions& options)
    : file_system_(&file_system),
      directory_(directories.front()),
      lock_(std::move(lock)),
      weights_(options.weights),
      growth_bytes_(options.growth_bytes) {
  if (weights_.empty()) weights_.assign(directories.size(), 1.0);
  TP_CHECK(weights_.size() == directories.size());
}

Pagefile Pagefile::create(const std::vector<std::string>& directories, std::uint64_t page_bytes,
                          const PagefileOptions& options, FileSystem& file_system) {
  check_arguments(directories, options);
  if (!valid_pagefile_page_bytes(page_bytes)) {
    throw_invalid("pages of " + std::to_string(page_bytes) + " bytes; a power of two from " +
                  std::to_string(kPagefilePageBytesMin) + " to " + std::to_string(kPageBytesMax) + " is needed");
  }
  Pagefile pagefile(file_system, directories, take_lock(file_system, directories.front()), options);
  refuse_to_replace(file_system, directories);
  pagefile.committed_.store = new_store_id();
  pagefile.committed_.page_bytes = page_bytes;
  pagefile.committed_.stripe_count = static_cast<std::uint32_t>(directories.size());
  pagefile.create_stripes(directories);
  return pagefile;
}

// What fails takes the files away again that it made, as far as that goes: there is nothing in them.
void Pagefile::create_stripes(const std::vector<std::string>& directories) {
  TP_CHECK(stripes_.empty());
  stripes_.reserve(directories.size());
  try {
    for (const std::string& directory : directories) {
      const auto stripe = static_cast<std::uint32_t>(stripes_.size());
      const ExtentHeader header{committed_.store, stripe, page_bytes()};
      stripes_.push_back(ExtentFile::create(*file_system_, extent_path(directory), header, growth_bytes_));
      sync_directory(*file_system_, directory);
    }
    store_root(committed_);
  } catch (const Error& error) {
    file_system_->remove(root_path(directory_));
    for (const ExtentFile& stripe : stripes_) file_system_->remove(stripe.path());
    throw Error(error.kind(), std::string("the pagefile was not created: ") + error.what(), error.error_number());
  }
}

Pagefile Pagefile::open(const std::vector<std::string>& directories, const PagefileOptions& options,
                        FileSystem& file_system) {
  check_arguments(directories, options);
  open_root(file_system, directories.front());  // or a lock would be left behind in a directory that holds no store
  Pagefile pagefile(file_system, directories, take_lock(file_system, directories.front()), options);
  remove_file(file_system, temporary_root_path(directories.front()));
  pagefile.committed_ = read_root(open_root(file_system, directories.front()));
  pagefile.find_prepared();
  sync_directory(file_system, directories.front());  // what is shown now, no later crash takes back
  pagefile.root_settled_ = false;
  if (pagefile.committed_.stripe_count != directories.size()) {
    throw Error(ErrorKind::io,
                "the pagefile in " + directories.front() + " lies in " +
                    std::to_string(pagefile.committed_.stripe_count) + " directories, and " +
                    std::to_string(directories.size()) + " were named; name all of them, in the order of its creation",
                EINVAL);
  }
  pagefile.open_stripes(directories);
  return pagefile;
}

// One of a commit that is there already was abandoned, and a crash has brought its name back.
void Pagefile::find_prepared() {
  const std::string path = prepared_root_path(directory_);
  if (!exists(*file_system_, path)) return;
  PagefileRoot found = read_root(DurableFile::open(*file_system_, path));
  if (found.store == committed_.store && found.commit_number <= commit_number()) {
    remove_file(*file_system_, path);
    return;
  }
  if (found.store != committed_.store || found.commit_number != commit_number() + 1 ||
      found.page_bytes != committed_.page_bytes || found.stripe_count != committed_.stripe_count) {
    throw Error(ErrorKind::io,
                path + " is of another pagefile, or of another commit than the one after " +
                    std::to_string(commit_number()) + "; bring back a copy of the whole store",
                EBADMSG);
  }
  prepared_ = std::move(found);
  found_prepared_ = true;
}

void Pagefile::open_stripes(const std::vector<std::string>& directories) {
  TP_CHECK(stripes_.empty() && directories.size() == committed_.stripe_count);
  std::vector<std::vector<std::uint64_t>> used(directories.size());
  for (const PageRecord& record : committed_.pages) {
    if (record.extent.valid()) used[record.extent.stripe].push_back(record.extent.offset_bytes);
  }
  for (std::size_t page = 0; prepared_ && page < prepared_->pages.size(); ++page) {
    const Extent extent = prepared_->pages[page].extent;
    const bool shared = page < committed_.pages.size() && committed_.pages[page].extent == extent;
    if (extent.valid() && !shared) used[extent.stripe].push_back(extent.offset_bytes);
  }
  stripes_.reserve(directories.size());
  for (std::uint32_t stripe = 0; stripe < directories.size(); ++stripe) {
    std::sort(used[stripe].begin(), used[stripe].end());
    if (std::adjacent_find(used[stripe].begin(), used[stripe].end()) != used[stripe].end()) {
      throw Error(ErrorKind::io,
                  "the last commit and the prepared one in " + directory_ +
                      " have different pages in the same place; bring back a copy of the whole store",
                  EBADMSG);
    }
    const ExtentHeader header{committed_.store, stripe, page_bytes()};
    stripes_.push_back(
        ExtentFile::open(*file_system_, extent_path(directories[stripe]), header, growth_bytes_, used[stripe]));
  }
  pages_ = committed_.pages;
}

const PageRecord& Pagefile::record(PageId page) const {
  TP_CHECK(page.value < pages_.size());
  return pages_[page.value];
}

const ExtentFile& Pagefile::extent_file(std::uint32_t stripe) const {
  TP_CHECK(stripe < stripes_.size());
  return stripes_[stripe];
}

void Pagefile::refuse_when_stopped() const {
  if (stopped_) throw *stopped_;
  if (found_prepared_) refuse_when_undecided();
}

void Pagefile::refuse_when_undecided() const {
  if (!prepared_) return;
  throw Error(ErrorKind::io,
              "the pagefile in " + directory_ + " has prepared commit " + std::to_string(commit_number() + 1) +
                  " together with others, and does not know whether they have it: until that is decided it takes no "
                  "other. Resume with all of them",
              EBUSY);
}

std::span<const std::byte> Pagefile::prepared_metadata() const noexcept {
  return prepared_ ? std::span<const std::byte>(prepared_->metadata) : std::span<const std::byte>();
}

// From here on whatever changes the store throws this. `commit_in_flight` is the last commit's number unless the new
// root may be in place already.
void Pagefile::stop(const Error& cause, std::uint64_t commit_in_flight) {
  TP_CHECK(!stopped_ && commit_in_flight >= commit_number());
  std::string kept = "commit " + std::to_string(commit_number());
  if (commit_in_flight != commit_number()) kept += ", or " + std::to_string(commit_in_flight) + ",";
  stopped_.emplace(
      ErrorKind::io,
      std::string(cause.what()) +
          ". What was written since the last commit may be lost, and trying again "
          "can't tell: this store takes no more writes. Stop the work that needs them; " +
          kept +
          " is whole on the drive. Look after the drive (the kernel's log), then close the store and open it "
          "again",
      cause.error_number());
  throw *stopped_;
}

PageId Pagefile::grow(std::uint32_t count) {
  refuse_when_stopped();
  const PageId first{page_count()};
  if (count > std::numeric_limits<std::uint32_t>::max() - first.value) {
    throw_invalid("a pagefile has fewer than 4294967296 pages; it has " + std::to_string(first.value) + ", and " +
                  std::to_string(count) + " more were asked for");
  }
  pages_.resize(pages_.size() + count);
  return first;
}

// By what it holds for its share: drives of unequal speed fill, and are read, in the same time.
std::uint32_t Pagefile::emptiest_stripe() const {
  TP_CHECK(!stripes_.empty() && stripes_.size() == weights_.size());
  std::uint32_t best = 0;
  double best_load = std::numeric_limits<double>::infinity();
  for (std::uint32_t stripe = 0; stripe < stripes_.size(); ++stripe) {
    const double load = static_cast<double>(stripes_[stripe].used_count() + 1) / weights_[stripe];
    if (load < best_load) {
      best = stripe;
      best_load = load;
    }
  }
  return best;
}

Extent Pagefile::take_extent() {
  refuse_when_stopped();
  settle_root();
  const std::uint32_t stripe = emptiest_stripe();
  const Extent extent{stripe, stripes_[stripe].take()};
  const bool fresh = taken_.insert(extent).second;
  TP_CHECK(fresh);
  return extent;
}

void Pagefile::put_extent(Extent extent) {
  const std::size_t taken = taken_.erase(extent);
  TP_CHECK(taken == 1);
  free_extent(extent);
}

void Pagefile::free_extent(Extent extent) {
  TP_CHECK(extent.stripe < stripes_.size());
  stripes_[extent.stripe].put(extent.offset_bytes);
}

// Whether the last commit, or the prepared one, has the page there.
bool Pagefile::kept(std::size_t page, Extent extent) const {
  const auto has = [&](const PagefileRoot& root) {
    return page < root.pages.size() && root.pages[page].extent == extent;
  };
  return has(committed_) || (prepared_ && has(*prepared_));
}

// The extents of a root that is neither any more.
void Pagefile::free_unkept(const PagefileRoot& root) {
  for (std::size_t page = 0; page < root.pages.size(); ++page) {
    const Extent extent = root.pages[page].extent;
    const bool used_now = page < pages_.size() && pages_[page].extent == extent;
    if (extent.valid() && !used_now && !kept(page, extent)) free_extent(extent);
  }
}

void Pagefile::written(PageId page, Extent extent, std::uint64_t checksum, std::uint32_t generation) {
  const std::size_t taken = taken_.erase(extent);
  TP_CHECK(page.value < pages_.size() && taken == 1);
  PageRecord& record = pages_[page.value];
  if (record.extent.valid() && !kept(page.value, record.extent)) free_extent(record.extent);
  record = {extent, generation, checksum};
  stripes_[extent.stripe].mark_written();
}

// The generation stays: bytes written later must not have the number of those before.
void Pagefile::discard(PageId page) {
  refuse_when_stopped();
  TP_CHECK(page.value < pages_.size());
  PageRecord& record = pages_[page.value];
  if (record.extent.valid() && !kept(page.value, record.extent)) free_extent(record.extent);
  record = {Extent{}, record.generation, 0};
}

void Pagefile::write(PageId page, std::span<const std::byte> bytes) {
  refuse_when_stopped();
  TP_CHECK(page.value < pages_.size() && bytes.size() == page_bytes());
  const Extent extent = take_extent();
  try {
    stripes_[extent.stripe].write(extent.offset_bytes, bytes);
  } catch (const Error& error) {
    put_extent(extent);
    throw Error(error.kind(),
                "page " + std::to_string(page.value) +
                    " of the pagefile was not written, and keeps the bytes it had: " + error.what(),
                error.error_number());
  }
  const std::uint32_t generation = pages_[page.value].generation + 1;
  written(page, extent, page_checksum(bytes.data(), bytes.size(), page, generation), generation);
}

// Empty when the page's bytes are in `bytes` now, else what is wrong with them.
std::string Pagefile::damage(const PageRecord& record, PageId page, std::span<std::byte> bytes) const {
  TP_CHECK(record.extent.valid() && record.extent.stripe < stripes_.size());
  const std::size_t count = stripes_[record.extent.stripe].read(record.extent.offset_bytes, bytes);
  if (count < bytes.size()) return "the file is too short, it ends after " + std::to_string(count) + " bytes of it";
  const std::uint64_t checksum = page_checksum(bytes.data(), bytes.size(), page, record.generation);
  return checksum == record.checksum ? "" : "wrong checksum, these are not the bytes that were written";
}

void Pagefile::read(PageId page, std::span<std::byte> bytes) const {
  TP_CHECK(page.value < pages_.size() && bytes.size() == page_bytes());
  const PageRecord& record = pages_[page.value];
  if (!record.extent.valid()) {
    std::fill(bytes.begin(), bytes.end(), std::byte{0});
    return;
  }
  const std::string why = damage(record, page, bytes);
  if (why.empty()) return;
  throw Error(ErrorKind::io,
              "page " + std::to_string(page.value) + " at offset " + std::to_string(record.extent.offset_bytes) +
                  " of " + stripes_[record.extent.stripe].path() + ": " + why +
                  ". A failing drive, or another program wrote there; bring back a copy of the store",
              EBADMSG);
}

std::optional<DamagedPage> Pagefile::check(PageId page) const {
  if (page.value >= committed_.pages.size()) {
    throw_invalid("page " + std::to_string(page.value) + " is not among the " +
                  std::to_string(committed_.pages.size()) + " of the last commit");
  }
  const PageRecord& record = committed_.pages[page.value];
  if (!record.extent.valid()) return std::nullopt;
  std::vector<std::byte> bytes(page_bytes());
  std::string why;
  try {
    why = damage(record, page, bytes);
  } catch (const Error& error) {
    why = error.what();
  }
  if (why.empty()) return std::nullopt;
  return DamagedPage{page, stripes_[record.extent.stripe].path(), record.extent.offset_bytes, why};
}

std::vector<DamagedPage> Pagefile::verify() const {
  std::vector<DamagedPage> damaged;
  for (std::uint32_t page = 0; page < committed_.pages.size(); ++page) {
    if (std::optional<DamagedPage> found = check(PageId{page})) damaged.push_back(*std::move(found));
  }
  return damaged;
}

// Syncs what it names.
PagefileRoot Pagefile::next_root(std::span<const std::byte> metadata) {
  refuse_when_stopped();
  refuse_when_undecided();
  if (metadata.size() > kPagefileMetadataBytesMax) {
    throw_invalid(std::to_string(metadata.size()) + " bytes of metadata; a commit takes " +
                  std::to_string(kPagefileMetadataBytesMax) + " at most, put more into pages");
  }
  PagefileRoot next{
      store_id(), commit_number() + 1, page_bytes(), stripe_count(), pages_, {metadata.begin(), metadata.end()}};
  try {
    for (ExtentFile& stripe : stripes_) stripe.sync();
  } catch (const Error& error) {
    stop(error, commit_number());
  }
  return next;
}

void Pagefile::commit(std::span<const std::byte> metadata) {
  PagefileRoot next = next_root(metadata);
  store_root(next);
  const PagefileRoot before = std::exchange(committed_, std::move(next));
  free_unkept(before);
}

void Pagefile::prepare(std::span<const std::byte> metadata) {
  PagefileRoot next = next_root(metadata);
  put_root(next, prepared_root_path(directory_), commit_number());
  prepared_ = std::move(next);
}

void Pagefile::publish() {
  if (stopped_) throw *stopped_;
  if (!prepared_) throw_invalid("no commit is prepared that could be published or abandoned");
  try {
    rename_over(*file_system_, prepared_root_path(directory_), root_path(directory_));
    sync_directory(*file_system_, directory_);
  } catch (const Error& error) {
    stop(error, prepared_->commit_number);
  }
  if (found_prepared_) {
    pages_ = prepared_->pages;
  } else {
    root_settled_ = true;
  }
  found_prepared_ = false;
  const PagefileRoot before = std::exchange(committed_, *std::exchange(prepared_, std::nullopt));
  free_unkept(before);
}

void Pagefile::abandon() {
  if (stopped_) throw *stopped_;
  if (!prepared_) throw_invalid("no commit is prepared that could be published or abandoned");
  try {
    remove_file(*file_system_, prepared_root_path(directory_));
    sync_directory(*file_system_, directory_);
  } catch (const Error& error) {
    stop(error, commit_number());
  }
  found_prepared_ = false;
  const PagefileRoot dropped = *std::exchange(prepared_, std::nullopt);
  free_unkept(dropped);
}

void Pagefile::settle_root() {
  if (root_settled_) return;
  store_root(committed_);
  TP_CHECK(root_settled_);
}

void Pagefile::store_root(const PagefileRoot& root) {
  put_root(root, root_path(directory_), root.commit_number);
  root_settled_ = true;
}

// A failure before the first sync changes nothing. From then on it may have happened, or not, or half.
void Pagefile::put_root(const PagefileRoot& root, const std::string& path, std::uint64_t commit_in_flight) {
  TP_CHECK(!stopped_);
  DurableFile file = write_temporary_root(root);
  try {
    file.sync();
  } catch (const Error& error) {
    stop(error, commit_number());
  }
  try {
    rename_over(*file_system_, file.path(), path);
    sync_directory(*file_system_, directory_);
  } catch (const Error& error) {
    stop(error, commit_in_flight);
  }
}

DurableFile Pagefile::write_temporary_root(const PagefileRoot& root) {
  const std::string path = temporary_root_path(directory_);
  const std::vector<std::byte> bytes = encode_root(root);
  try {
    remove_file(*file_system_, path);  // one that a failure has left
    DurableFile file = DurableFile::create(*file_system_, path);
    file.preallocate(0, bytes.size());  // so that a full disk is met here, not by the sync
    file.write(0, bytes);
    return file;
  } catch (const Error& error) {
    file_system_->remove(path);
    throw Error(error.kind(),
                "the root of commit " + std::to_string(root.commit_number) +
                    " was not written, and nothing has changed; the call may be made again: " + error.what(),
                error.error_number());
  }
}

}  // namespace tp
