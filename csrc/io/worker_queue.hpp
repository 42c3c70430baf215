// SPDX-License-Identifier: Apache-2.0
// An IoQueue for an interface whose calls block: a few threads that call it. What is called is a BlockingTransfers, one
// for each engine (pread_queue.cpp, cufile_queue.cpp); all of the contract in io_queue.hpp that is not the call itself
// is met here, once.
//
// Threads.    start_worker() and transfer() run on the workers, several at once; the rest where the contract says, none
//             of it while a worker looks: files and memory named in a request were added before its submit(). The last
//             thread that uses the queue destroys the BlockingTransfers, after its workers have ended.
// Errors.     As the contract says; transfer() throws nothing. What start_worker() throws comes out of
//             make_worker_queue().
// Fork.       In a child of fork() neither the workers nor the BlockingTransfers are touched, nor is it destroyed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "io/io_queue.hpp"
#include "io/transfer_progress.hpp"

namespace tp {

class BlockingTransfers {
 public:
  // The engine's own name of a file: a descriptor, a handle.
  using File = std::uintptr_t;

  virtual ~BlockingTransfers() = default;
  virtual IoQueueFacts facts() const = 0;
  virtual File add_file(int descriptor) = 0;
  virtual void register_memory(std::span<std::byte> memory) = 0;

  // Before anything else on that thread.
  virtual void start_worker() {}
  // How far one call may go from here on: to the end of a registered slice, or without limit.
  virtual std::uint64_t bytes_in_one_piece(const std::byte*) const { return ~std::uint64_t{0}; }
  // Bytes, 0 for end of file, or -errno.
  virtual int transfer(IoOp op, File file, const TransferPiece& piece) noexcept = 0;
};

// name: of the engine, for the message when its threads can't start. threads_max: what the interface gains from.
std::unique_ptr<IoQueue> make_worker_queue(const char* name, const IoQueueOptions& options, unsigned threads_max,
                                           std::unique_ptr<BlockingTransfers> transfers);

}  // namespace tp
