// SPDX-License-Identifier: Apache-2.0
// The transfers between files and memory that have been asked for and not been waited for: which block is to be sent
// next, what has come back, and who waits. No I/O: the workers do that (transfer_worker.hpp).
//
// Order. Transfers are finished in any order, but with the result that one after another would have: one does not begin
//        before those that were asked for earlier and touch the same bytes, of a file or of memory, are finished.
//        Blocks of one transfer are sent in the order of offsets, but for its cached ones (transfer_blocks.hpp).
//
// Threads: any. Blocking: wait() and wait_for() alone. Errors: what a transfer failed with is thrown by whoever waits
// for it, once.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/error.hpp"
#include "io/file.hpp"
#include "io/transfer_blocks.hpp"

namespace tp {

struct FileTransfer {
  FileTransfer(IoOp transfer_op, File transfer_file, std::uint64_t transfer_offset_bytes,
               std::span<std::byte> transfer_memory, std::uint32_t block_bytes);
  FileTransfer(const FileTransfer&) = delete;
  FileTransfer& operator=(const FileTransfer&) = delete;

  const IoOp op;
  const File file;
  std::optional<File> cached;  // the same file, not direct: where a block is cached
  const std::uint64_t offset_bytes;
  const std::span<std::byte> memory;
  const dev_t device;  // with inode: which file it is, by whatever name
  const ino_t inode;

  // PendingTransfers' own, under its lock.
  std::uint64_t id = 0;
  bool alone = false;  // somebody waits for this one by its id: wait() leaves it out
  TransferBlocks blocks;
  std::uint32_t in_flight = 0;
  bool begun = false, abandoned = false;
  std::optional<Error> failure;  // the first
};

class PendingTransfers {
 public:
  using Pointer = std::shared_ptr<FileTransfer>;
  struct Taken {
    Pointer transfer;
    TransferBlock block;
  };
  // look: called, with no lock held, when a worker that found no block may find one now: a transfer was added, or, with
  // several workers, finished.
  PendingTransfers(std::function<void()> look, bool several_workers);

  // Called by who waits, ten times a second; what it throws ends the waiting, and the transfers go on.
  using Interrupted = std::function<void()>;

  // Returns its id: 1, 2, ... With alone, wait_for() it, which nobody else must; if that is interrupted it becomes one
  // of those that wait() waits for.
  std::uint64_t add(Pointer transfer, bool alone);
  void drain();  // waits for all of them, and leaves what they failed with for whoever asks
  // Waits for those added before. Returns how many; counted once, by whoever waits first. Throws the first failure, of
  // the order in which they were added, when none of them is under way any more.
  std::size_t wait(const Interrupted& interrupted);
  void wait_for(std::uint64_t id, const Interrupted& interrupted);

  // For workers. take(): a block to send now; may_bounce: whether it may be a bounced one. Each comes back by done().
  std::optional<Taken> take(bool may_bounce);
  void done(const Pointer& transfer, std::optional<Error> failure);
  bool all_taken(const Pointer& transfer) const;  // no block of it will be given out any more
  void fail_all(const Error& error);              // those of which nothing is in flight, now and from now on

 private:
  struct Finished {
    std::uint64_t id;
    bool alone;
    std::optional<Error> failure;
  };

  bool may_begin(std::size_t place) const;
  bool given_out(const FileTransfer& transfer) const;
  bool finish_where_done();
  void let_wait_take(std::uint64_t id);
  void wait_until(std::unique_lock<std::mutex>& lock, const std::function<bool()>& done,
                  const Interrupted& interrupted);

  const std::function<void()> look_;
  const bool several_workers_;
  mutable std::mutex mutex_;  // guards the rest
  std::condition_variable finished_some_;
  std::deque<Pointer> unfinished_;  // in the order of ids
  std::vector<Finished> finished_;  // not yet waited for
  std::uint64_t last_id_ = 0;
  std::optional<Error> broken_;
};

}  // namespace tp
