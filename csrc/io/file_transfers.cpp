// SPDX-License-Identifier: Apache-2.0
#include "io/file_transfers.hpp"

#include <unistd.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "base/error.hpp"
#include "base/limits.hpp"
#include "io/probe.hpp"

namespace tp {
namespace {

std::uint32_t block_bytes_of(const FileTransferOptions& options) {
  if (options.block_bytes == 0) throw Error(ErrorKind::invalid, "the size of a block is 0 bytes; it must be 1 or more");
  const std::uint64_t bytes = std::min<std::uint64_t>(options.block_bytes, kRequestBytesMax);
  return static_cast<std::uint32_t>((bytes + kDirectAlignFallbackBytes - 1) / kDirectAlignFallbackBytes *
                                    kDirectAlignFallbackBytes);
}

IoQueueOptions queue_options_of(const FileTransferOptions& options) {
  if (options.depth == 0) throw Error(ErrorKind::invalid, "the depth of the queue is 0; it must be 1 or more");
  if (options.threads == 0 || options.threads > kTransferThreadsMax) {
    throw Error(ErrorKind::invalid, std::to_string(options.threads) + " threads for transfers; give 1 to " +
                                        std::to_string(kTransferThreadsMax));
  }
  IoQueueOptions queue_options;
  queue_options.depth = std::min(options.depth, kIoDepthMax);
  return queue_options;
}

// Bounced memory is aligned to this; a file that asks for more goes through the page cache.
template <typename Open>
File open_for_blocks(const Open& open) {
  File file = open(DirectPolicy::optional);
  return file.align_bytes() <= kDirectAlignFallbackBytes ? std::move(file) : open(DirectPolicy::disabled);
}

void check_range(std::uint64_t offset_bytes, std::size_t size_bytes) {
  constexpr auto kEndMax = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  if (offset_bytes <= kEndMax - kRequestBytesMax && size_bytes <= kEndMax - kRequestBytesMax - offset_bytes) return;
  throw Error(ErrorKind::invalid, std::to_string(size_bytes) + " bytes at offset " + std::to_string(offset_bytes) +
                                      " end behind the end of any file");
}

std::span<std::byte> written_memory(std::span<const std::byte> memory) {
  return {const_cast<std::byte*>(memory.data()), memory.size()};  // requests of both kinds name it alike
}

}  // namespace

FileTransfers::FileTransfers(const FileTransferOptions& options)
    : process_(getpid()), block_bytes_(block_bytes_of(options)) {
  const IoQueueOptions queue_options = queue_options_of(options);
  const auto look = [this] {
    for (const std::unique_ptr<TransferWorker>& worker : workers_) worker->wake();
  };
  pending_ = std::make_unique<PendingTransfers>(look, options.threads > 1);
  while (workers_.size() < options.threads) {
    std::unique_ptr<IoQueue> queue =
        options.make_queue ? options.make_queue(queue_options) : make_io_queue(options.engine, queue_options);
    engine_ = queue->facts().engine;
    workers_.push_back(
        std::make_unique<TransferWorker>(std::move(queue), *pending_, block_bytes_, options.one_at_a_time));
  }
}

FileTransfers::~FileTransfers() {
  if (getpid() != process_) {  // a child of fork() has the objects but not the threads
    for (std::unique_ptr<TransferWorker>& worker : workers_) static_cast<void>(worker.release());
    static_cast<void>(pending_.release());
    return;
  }
  pending_->drain();
}

std::uint64_t FileTransfers::start_read(const std::string& path, std::uint64_t offset_bytes,
                                        std::span<std::byte> memory, bool alone) {
  throw_in_child();
  check_range(offset_bytes, memory.size());
  File file = open_for_blocks([&path](DirectPolicy policy) { return File::open_checkpoint(path, policy); });
  if (file.size_bytes() < offset_bytes + memory.size()) {
    throw Error(ErrorKind::io, path + " has " + std::to_string(file.size_bytes()) + " bytes: " +
                                   std::to_string(memory.size()) + " bytes at offset " + std::to_string(offset_bytes) +
                                   " end behind that. Its writer may not have finished, or the tensor is another's");
  }
  return start(IoOp::read, std::move(file), offset_bytes, memory, alone);
}

std::uint64_t FileTransfers::start_write(const std::string& path, std::uint64_t offset_bytes,
                                         std::span<const std::byte> memory, bool alone) {
  throw_in_child();
  check_range(offset_bytes, memory.size());
  File file = open_for_blocks([&path](DirectPolicy policy) { return File::open_to_write(path, policy); });
  return start_write(std::move(file), offset_bytes, memory, alone);
}

std::uint64_t FileTransfers::start_write(int descriptor, std::uint64_t offset_bytes, std::span<const std::byte> memory,
                                         bool alone) {
  throw_in_child();
  check_range(offset_bytes, memory.size());
  File file = open_for_blocks([descriptor](DirectPolicy policy) { return File::reopen_to_write(descriptor, policy); });
  return start_write(std::move(file), offset_bytes, memory, alone);
}

std::uint64_t FileTransfers::start_write(File file, std::uint64_t offset_bytes, std::span<const std::byte> memory,
                                         bool alone) {
  if (!memory.empty()) file.make_room(offset_bytes, memory.size());
  return start(IoOp::write, std::move(file), offset_bytes, written_memory(memory), alone);
}

std::uint64_t FileTransfers::start(IoOp op, File file, std::uint64_t offset_bytes, std::span<std::byte> memory,
                                   bool alone) {
  auto transfer = std::make_shared<FileTransfer>(op, std::move(file), offset_bytes, memory, block_bytes_);
  if (transfer->blocks.any_cached()) {
    transfer->cached = File::reopen_to_write(transfer->file.descriptor(), DirectPolicy::disabled);
  }
  if (transfer->blocks.any_bounced()) make_bounce_memory();
  return pending_->add(std::move(transfer), alone);
}

std::size_t FileTransfers::wait(const Interrupted& interrupted) {
  throw_in_child();
  return pending_->wait(interrupted);
}

void FileTransfers::wait_for(std::uint64_t id, const Interrupted& interrupted) {
  throw_in_child();
  pending_->wait_for(id, interrupted);
}

FileTransferCounters FileTransfers::counters() const {
  throw_in_child();
  FileTransferCounters counters;
  for (const std::unique_ptr<TransferWorker>& worker : workers_) {
    counters.queues += worker->counters();
    counters.bounced_bytes += worker->bounced_bytes();
  }
  return counters;
}

void FileTransfers::make_bounce_memory() {
  const std::lock_guard lock(bounce_mutex_);
  for (const std::unique_ptr<TransferWorker>& worker : workers_) worker->make_bounce_memory();
}

void FileTransfers::throw_in_child() const {
  if (getpid() == process_) return;
  throw Error(ErrorKind::forked,
              "these file transfers belong to the parent process: a child of fork() has not its threads. Make a handle "
              "in the child, or start workers with the 'spawn' method");
}

}  // namespace tp
