// SPDX-License-Identifier: Apache-2.0
// A durable store of pages of one size, which a crash at any moment leaves as the last commit made it (or the one in
// flight, whole). Bytes lie in one extent file a directory; what lies where is in the root, in the first directory,
// beside the lock. Formats: pagefile_root.hpp.
//
// Copy on write. A page's new bytes go to an extent that no page of the last commit and no page of now uses. commit()
// syncs the extent files, then puts a new root in place of the old one (temporary name, sync, rename, sync of the
// directory); only then are the extents of the commit before free. Pages that did not change are not written again.
//
// Writing through another queue: take_extent(), write page_bytes there, then written(), in any order with a commit: a
// page counts with the commit when written() came before. The queue must have reported that the write is done, and no
// read of the page's former extent may be in flight, since that extent may be taken at once. Or write(), which does all
// of it.
//
// Failures. Error(io), naming file, page and offset; EBADMSG where bytes are not those that were written. A full disk
// changes nothing: pages stay readable, and a later write or commit may succeed. When a sync or the rename of the root
// fails, nobody knows what the drive holds beyond the last commit: from then on whatever changes the store throws one
// and the same error, and the store must be opened anew. Nothing is tried again in hope.
//
// A commit that others make too. prepare() does all of a commit but its last step: what it writes is on the drive, its
// root under another name. publish() makes it the last commit, by one rename; abandon() drops it. Until one of them,
// neither it nor the last commit loses an extent, and pages may be written that belong to none of the two. Whoever dies
// in between leaves it prepared: open() then shows the last commit, and refuses to change anything before publish() or
// abandon() has been called. So if nobody publishes before all have prepared, and all publish when one has, the commit
// is there for all of them or for none, whoever dies and whenever.
//
// open() syncs the directory, so that what it shows stays. It takes no room: a store on a full disk can be read. The
// first take_extent() then writes the root once more, because the process before may have seen that sync fail (a second
// one proves nothing), and extents that only the root before uses may be taken over when no crash can bring it back.
//
// Threads: one at a time. Blocking: all but the getters, grow(), written(), put_extent() and discard(). The FileSystem
// must outlive it. Lock: one Pagefile has a store open at a time, on this machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "base/ids.hpp"
#include "base/limits.hpp"
#include "io/durable_file.hpp"
#include "pager/extent_file.hpp"
#include "pager/pagefile_root.hpp"

namespace tp {

struct PagefileOptions {
  // How the directories share the pages, one number each: their measured bandwidth. Empty: equally.
  std::vector<double> weights;
  std::uint64_t growth_bytes = 64 * kMiB;  // an extent file grows by this, or by a page when that is more
};

struct DamagedPage {
  PageId page;
  std::string file;
  std::uint64_t offset_bytes = 0;
  std::string why;
};

class Pagefile {
 public:
  // The directories must exist. Refuses those that hold a pagefile already.
  static Pagefile create(const std::vector<std::string>& directories, std::uint64_t page_bytes,
                         const PagefileOptions& options = {}, FileSystem& file_system = posix_file_system());
  // The last commit. The same directories in the same order.
  static Pagefile open(const std::vector<std::string>& directories, const PagefileOptions& options = {},
                       FileSystem& file_system = posix_file_system());

  std::uint64_t page_bytes() const noexcept { return committed_.page_bytes; }
  std::uint32_t page_count() const noexcept { return static_cast<std::uint32_t>(pages_.size()); }
  std::uint64_t commit_number() const noexcept { return committed_.commit_number; }  // of the last commit; 0: created
  std::span<const std::byte> metadata() const noexcept { return committed_.metadata; }
  bool stopped() const noexcept { return stopped_.has_value(); }  // a sync failed: it takes no more writes
  const StoreId& store_id() const noexcept { return committed_.store; }
  const PageRecord& record(PageId page) const;
  const ExtentFile& extent_file(std::uint32_t stripe) const;  // its descriptor, its path, how full it is
  std::uint32_t stripe_count() const noexcept { return static_cast<std::uint32_t>(stripes_.size()); }

  PageId grow(std::uint32_t count);  // appends pages of zeros, which take no room; the first of them
  Extent take_extent();
  void put_extent(Extent extent);  // one that was taken and will hold no page after all
  void written(PageId page, Extent extent, std::uint64_t checksum, std::uint32_t generation);
  void discard(PageId page);  // zeros again

  void write(PageId page, std::span<const std::byte> bytes);
  void read(PageId page, std::span<std::byte> bytes) const;  // as it is now, committed or not
  void commit(std::span<const std::byte> metadata);
  void prepare(std::span<const std::byte> metadata);
  void publish();
  void abandon();
  bool prepared() const noexcept { return prepared_.has_value(); }  // by prepare(), or found by open()
  std::span<const std::byte> prepared_metadata() const noexcept;    // of the commit after the last; empty: none
  void refuse_when_undecided() const;                               // Error(io), EBUSY, when one is prepared
  // Reads a page of the last commit, through the page cache: what was written lately may come from memory. Nothing when
  // its bytes are those that were written. verify(): every page.
  std::optional<DamagedPage> check(PageId page) const;
  std::vector<DamagedPage> verify() const;

 private:
  Pagefile(FileSystem& file_system, const std::vector<std::string>& directories, DurableFile lock,
           const PagefileOptions& options);
  void create_stripes(const std::vector<std::string>& directories);
  void open_stripes(const std::vector<std::string>& directories);
  void find_prepared();
  void refuse_when_stopped() const;
  [[noreturn]] void stop(const Error& cause, std::uint64_t commit_in_flight);
  void settle_root();
  PagefileRoot next_root(std::span<const std::byte> metadata);
  void store_root(const PagefileRoot& root);
  void put_root(const PagefileRoot& root, const std::string& path, std::uint64_t commit_in_flight);
  DurableFile write_temporary_root(const PagefileRoot& root);
  std::uint32_t emptiest_stripe() const;
  bool kept(std::size_t page, Extent extent) const;
  void free_extent(Extent extent);
  void free_unkept(const PagefileRoot& root);
  std::string damage(const PageRecord& record, PageId page, std::span<std::byte> bytes) const;

  FileSystem* file_system_;
  std::string directory_;  // the first: root and lock
  DurableFile lock_;
  std::vector<double> weights_;
  std::uint64_t growth_bytes_;
  std::vector<ExtentFile> stripes_;
  PagefileRoot committed_;         // the last commit
  std::vector<PageRecord> pages_;  // now
  std::optional<PagefileRoot> prepared_;
  bool found_prepared_ = false;   // by open(), and nobody has decided yet
  std::set<Extent> taken_;        // by take_extent(), and holding no page yet
  bool root_settled_ = true;      // false: found by open(), perhaps never synced
  std::optional<Error> stopped_;  // why nothing may change any more
};

}  // namespace tp
