// SPDX-License-Identifier: Apache-2.0
// The reference engine: a few threads that call pread(2) and pwrite(2). It needs nothing of the kernel, so it is what
// runs where io_uring is refused, and what every other engine is compared with. Its threads are worker_queue.cpp's.
#include <unistd.h>

#include <cerrno>

#include "io/io_queue.hpp"
#include "io/worker_queue.hpp"

namespace tp {
namespace {

// More threads than this read no faster from one drive (bench/io_queue_bench) and only add context switches.
constexpr unsigned kThreadsMax = 8;

class PreadTransfers final : public BlockingTransfers {
 public:
  IoQueueFacts facts() const override {
    return {"pread", false, "the pread engine has no use for registered memory", {}};
  }
  File add_file(int descriptor) override { return static_cast<File>(descriptor); }
  void register_memory(std::span<std::byte>) override {}

  int transfer(IoOp op, File file, const TransferPiece& piece) noexcept override {
    const auto descriptor = static_cast<int>(file);
    const auto offset = static_cast<off_t>(piece.offset_bytes);
    const ssize_t moved = op == IoOp::read ? pread(descriptor, piece.memory, piece.size_bytes, offset)
                                           : pwrite(descriptor, piece.memory, piece.size_bytes, offset);
    return moved < 0 ? -errno : static_cast<int>(moved);
  }
};

}  // namespace

std::unique_ptr<IoQueue> make_pread_queue(const IoQueueOptions& options) {
  return make_worker_queue("pread", options, kThreadsMax, std::make_unique<PreadTransfers>());
}

}  // namespace tp
