// SPDX-License-Identifier: Apache-2.0
// The IoQueue contract. Read this first; null_queue.cpp is the shortest engine and the template for a new one.
//
// Threads.    One thread, the owner, calls everything but wake(). The first submit() or wait() makes its caller the
// owner;
//             until then another thread may construct the queue, add files and register memory. The owner destroys the
//             queue, or drains it and lets another thread do so. wake() may be called from any thread and from a signal
//             handler (it is one write to an eventfd), and makes the current or the next wait() return. Wakes merge;
//             none is lost, and drain() leaves them for wait().
// Blocking.   submit() never blocks on I/O. wait() blocks until a completion, a wake() or the timeout. drain() blocks
//             until nothing is in flight. Nothing else blocks.
// Ownership.  Memory named in a request belongs to the queue from submit() until its completion has been returned by
//             wait(): nobody reads, writes or frees it. Disk I/O that has started can't be cancelled, so the destructor
//             drains; memory must outlive the queue. File descriptors stay the caller's; one may be closed when no
//             request will name it again (its FileId is never given to another, unless it is removed).
// Registered  Where facts().registered_pages_may_move holds, the kernel keeps the physical pages that stood behind
// memory.     registered memory then: a request names the address that was registered even when the pages have been
//             moved with mremap since, and no engine dereferences it. Otherwise the address must be mapped, readable
//             and writable, while a request is in flight, and what was registered stays where it is. A request lies
//             wholly in registered memory or wholly outside.
// Room.       At most depth() requests may be in flight; the caller counts (submitting more is an assertion).
// Alignment.  Memory, offset and size of a request obey the file's alignment (File::align) when it was opened direct.
// Finished.   A request completes once. Short transfers, EINTR and EAGAIN are finished inside the engine. A completion
//             has error == 0 and transferred_bytes == size_bytes, with one exception: a read that meets end of file
//             completes with error == 0 and the bytes before it (a file that shrank shows here; the caller knows how
//             much must be there). Otherwise error is an errno value and the memory's content is undefined.
// Order.      None between requests.
// Errors.     Constructors throw Error(engine) when the engine can't run, with the reason; register_memory falls back
//             to unregistered transfers where the kernel refuses (RLIMIT_MEMLOCK) and says so in facts(). Error(io)
//             from submit() or wait() means that the kernel refuses the queue itself: all that is left is to destroy
//             it.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/ids.hpp"
#include "base/limits.hpp"

namespace tp {

enum class IoOp : std::uint8_t { read, write };

struct IoRequest {
  std::uint64_t token = 0;  // the caller's; comes back in the completion
  IoOp op = IoOp::read;
  FileId file;
  std::uint64_t offset_bytes = 0;
  std::byte* memory = nullptr;
  std::uint32_t size_bytes = 0;  // 1 .. kRequestBytesMax
};

struct IoCompletion {
  std::uint64_t token = 0;
  int error = 0;  // 0, or an errno value
  std::uint32_t transferred_bytes = 0;
};

// For tests only: sees every raw result of the kernel (bytes, 0 for end of file, or -errno) before the engine does and
// returns what the engine is to see instead. Called on whichever thread took the result. Empty in production.
using RawResultFilter = std::function<int(const IoRequest& request, int raw_result)>;

struct IoQueueOptions {
  unsigned depth = kIoDepthDefault;
  // A single kernel transfer is cut to this; tests set 512 to see short transfers everywhere. 0 means no cap.
  std::uint32_t transfer_max_bytes = 0;
  RawResultFilter filter;
  // For tests: the uring engine sets its ring up as on the oldest kernel it runs on.
  bool plain_ring = false;
  // Registered memory is handed to the kernel in slices of at most this; tests set less to cross many boundaries.
  std::size_t registered_slice_bytes = kRegisteredBufferBytesMax;
};

struct IoQueueFacts {
  std::string engine;                        // "uring", "pread", "null", "sim", "cufile"
  bool memory_registered = false;            // transfers use registered memory
  std::string memory_registered_reason;      // why not, when not
  std::vector<std::string> kernel_features;  // e.g. "DEFER_TASKRUN", "RESTRICTIONS"
  bool registered_pages_may_move = false;    // see "Registered memory"; never without memory_registered
};

struct IoQueueCounters {
  std::uint64_t requests = 0, completions = 0, bytes_read = 0, bytes_written = 0;
  std::uint64_t short_transfers = 0;  // raw results that left a remainder
  std::uint64_t retries = 0;          // EINTR, EAGAIN
  std::uint64_t system_calls = 0;     // made by the owner thread and the engine's own threads

  IoQueueCounters& operator+=(const IoQueueCounters& other) noexcept {
    return combine(other, [](std::uint64_t mine, std::uint64_t others) { return mine + others; });
  }
  IoQueueCounters& operator-=(const IoQueueCounters& other) noexcept {
    return combine(other, [](std::uint64_t mine, std::uint64_t others) { return mine - others; });
  }

 private:
  template <typename Operation>
  IoQueueCounters& combine(const IoQueueCounters& other, Operation operation) noexcept {
    for (std::uint64_t IoQueueCounters::* counter :
         {&IoQueueCounters::requests, &IoQueueCounters::completions, &IoQueueCounters::bytes_read,
          &IoQueueCounters::bytes_written, &IoQueueCounters::short_transfers, &IoQueueCounters::retries,
          &IoQueueCounters::system_calls})
      this->*counter = operation(this->*counter, other.*counter);
    return *this;
  }
};

class IoQueue {
 public:
  virtual ~IoQueue() = default;

  virtual unsigned depth() const noexcept = 0;
  virtual IoQueueFacts facts() const = 0;
  virtual IoQueueCounters counters() const noexcept = 0;  // any thread

  // At any time. direct_align_bytes is what the file asks of memory, offset and size (1 = buffered).
  virtual FileId add_file(int descriptor, std::uint32_t direct_align_bytes) = 0;
  // No request in flight names the file, and none will: its place is for the next. The descriptor may be closed before.
  virtual void remove_file(FileId file) = 0;
  // Before the first submit() or wait(); several calls add up. Memory is touched in (the kernel faults it).
  virtual void register_memory(std::span<std::byte> memory) = 0;

  virtual void submit(std::span<const IoRequest> requests) = 0;
  // Appends to completions; returns how many. 0 on wake or timeout. A zero timeout polls.
  virtual std::size_t wait(std::vector<IoCompletion>& completions, std::chrono::nanoseconds timeout) = 0;
  virtual void wake() noexcept = 0;
  virtual void drain(std::vector<IoCompletion>& completions) = 0;
};

std::unique_ptr<IoQueue> make_uring_queue(const IoQueueOptions& options);
std::unique_ptr<IoQueue> make_pread_queue(const IoQueueOptions& options);
std::unique_ptr<IoQueue> make_null_queue(const IoQueueOptions& options);

}  // namespace tp
