// SPDX-License-Identifier: Apache-2.0
// Bytes between files and memory: any size, any offset, any alignment of either, cut into blocks of which several are
// in flight at a time, direct where the file system takes that.
//
// Threads.   Any. The transfers are done by threads of its own.
// Blocking.  start_read() and start_write() open the file, and make room for what is written, so that a full disk is
//            met there. wait() and wait_for() wait for transfers; the destructor waits for all of them.
// Ownership. Memory that is read into or written from is the transfer's until it has been waited for.
// Order.     As if one transfer after another was done (pending_transfers.hpp).
// Durable.   Nothing is synced: what was written is the kernel's when the transfer has been waited for, and on the
// drive
//            when somebody has called fsync.
// Errors.    Error(io) names file, offset and what failed: at the start for a path, a range that the file does not
// have,
//            or a disk without room; by waiting for what happened meanwhile. A transfer that failed leaves the memory
//            it read into, or the range it wrote, undefined. Error(invalid), Error(memory), Error(engine).
//            Error(forked) in a child of fork(), where nothing is touched.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "io/io_queue.hpp"
#include "io/pending_transfers.hpp"
#include "io/transfer_worker.hpp"

namespace tp {

struct FileTransferOptions {
  std::uint64_t block_bytes = kMiB;  // of one request; rounded up to 4 KiB, at most kRequestBytesMax
  unsigned depth = kIoDepthDefault;  // blocks in flight, of each thread; at most kIoDepthMax
  unsigned threads = 1;              // up to kTransferThreadsMax
  bool one_at_a_time = false;        // a system call for each block
  std::string engine = "auto";
  // For tests: makes the engines instead.
  std::function<std::unique_ptr<IoQueue>(const IoQueueOptions&)> make_queue;
};

struct FileTransferCounters {
  IoQueueCounters queues;
  std::uint64_t bounced_bytes = 0;  // that were copied because memory or offset was not aligned
};

class FileTransfers {
 public:
  using Interrupted = PendingTransfers::Interrupted;

  explicit FileTransfers(const FileTransferOptions& options);
  ~FileTransfers();
  FileTransfers(const FileTransfers&) = delete;
  FileTransfers& operator=(const FileTransfers&) = delete;

  // They return the transfer's id. alone: for wait_for(), see PendingTransfers::add.
  std::uint64_t start_read(const std::string& path, std::uint64_t offset_bytes, std::span<std::byte> memory,
                           bool alone = false);
  // Makes the file where there is none, mode 0600, and leaves what it has outside of the range as it is.
  std::uint64_t start_write(const std::string& path, std::uint64_t offset_bytes, std::span<const std::byte> memory,
                            bool alone = false);
  // To the file of a descriptor that is open for writing; it may be closed at once.
  std::uint64_t start_write(int descriptor, std::uint64_t offset_bytes, std::span<const std::byte> memory,
                            bool alone = false);

  std::size_t wait(const Interrupted& interrupted = {});
  void wait_for(std::uint64_t id, const Interrupted& interrupted = {});

  const std::string& engine() const noexcept { return engine_; }
  FileTransferCounters counters() const;

 private:
  std::uint64_t start(IoOp op, File file, std::uint64_t offset_bytes, std::span<std::byte> memory, bool alone);
  std::uint64_t start_write(File file, std::uint64_t offset_bytes, std::span<const std::byte> memory, bool alone);
  void make_bounce_memory();
  void throw_in_child() const;

  const pid_t process_;
  const std::uint32_t block_bytes_;
  std::string engine_;
  std::mutex bounce_mutex_;  // of making the workers' memory
  std::unique_ptr<PendingTransfers> pending_;
  std::vector<std::unique_ptr<TransferWorker>> workers_;
};

}  // namespace tp
