// SPDX-License-Identifier: Apache-2.0
// The io_uring engine.
//
// Slots. There are depth() slots; a request takes one until it completes, and at most one of its pieces is with the
//        kernel at a time. So depth() + 1 submission entries are enough (one for the wake poll), and the completion
//        ring, twice as large, can't overflow. An entry that can't be had is therefore a mistake of ours: an assertion.
//
//   submit()                 wait()
//     slot <- request          completions that are there -> slots -> TransferProgress
//     SQE <- first piece         finished: slot free, completion returned
//     io_uring_enter             again:    SQE <- next piece, sent with the next io_uring_enter
//                              none there: io_uring_enter waits for one (and sends what is pending)
//
// Wake.  File 0 is the eventfd; a one-shot POLL_ADD on it is always with the kernel. When it completes, wait() empties
//        the eventfd and arms the poll again. A poll names no memory, so it may outlive us.
// Memory. Registered memory is named by address only: the kernel keeps the physical pages, so transfers work wherever
//        (and whether) those pages are mapped now. This file never dereferences the memory of a request. Slices end at
//        multiples of registered_slice_bytes from the start of the registered range; a piece that would cross one
//        is cut there, and the rest goes the way of any remainder.
// Limits. A file is added to a table that has a place for each descriptor the process may open: a larger one would make
//        liburing raise RLIMIT_NOFILE behind the program's back.
#include <poll.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <thread>
#include <utility>

#include "base/check.hpp"
#include "base/error.hpp"
#include "io/io_queue.hpp"
#include "io/queue_counters.hpp"
#include "io/transfer_progress.hpp"
#include "io/uring_ring.hpp"
#include "io/wake_event.hpp"

namespace tp {
namespace {

constexpr std::uint64_t kWakeUserData = ~std::uint64_t{0};
constexpr unsigned kWakeFileIndex = 0;
constexpr std::chrono::microseconds kRefusedPause{100};

unsigned file_places() {
  rlimit limit{};
  TP_CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
  TP_CHECK(limit.rlim_cur > 1);
  return static_cast<unsigned>(std::min<rlim_t>(limit.rlim_cur, kFilesMax + 1));
}

struct Slot {
  TransferProgress progress;
  TransferPiece piece;  // what the kernel has now
  bool in_use = false;
};

class UringQueue final : public IoQueue {
 public:
  explicit UringQueue(const IoQueueOptions& options)
      : options_(options),
        file_places_(file_places()),
        process_(getpid()),
        ring_(options.depth + 1, file_places_, options.plain_ring ? UringRing::Flags::plain : UringRing::Flags::best) {
    TP_CHECK(options_.depth > 0 && options_.depth <= kIoDepthMax);
    slots_.resize(options_.depth);
    free_slots_.reserve(options_.depth);
    for (unsigned slot = options_.depth; slot > 0; --slot) free_slots_.push_back(slot - 1);
    ring_.set_file(kWakeFileIndex, wake_.descriptor());
    file_aligns_.push_back(1);
  }

  // Memory is never freed under a transfer. When the kernel takes nothing any more, what it never took is dropped; with
  // a transfer that it took and won't give back the process ends.
  ~UringQueue() override {
    if (getpid() != process_ || in_flight() == 0) return;
    std::vector<IoCompletion> completions;
    try {
      drain(completions);
    } catch (const Error&) {
      TP_CHECK(io_uring_sq_ready(ring_.get()) >= in_flight());
    }
  }

  unsigned depth() const noexcept override { return options_.depth; }
  IoQueueCounters counters() const noexcept override { return counters_.snapshot(); }
  IoQueueFacts facts() const override {
    return {"uring", !slices_.empty(), unregistered_reason_, ring_.features(), !slices_.empty()};
  }

  FileId add_file(int descriptor, std::uint32_t direct_align_bytes) override;
  void remove_file(FileId file) override;
  void register_memory(std::span<std::byte> memory) override;
  void submit(std::span<const IoRequest> requests) override;
  std::size_t wait(std::vector<IoCompletion>& completions, std::chrono::nanoseconds timeout) override;
  void wake() noexcept override { wake_.signal(); }
  void drain(std::vector<IoCompletion>& completions) override;

 private:
  unsigned in_flight() const noexcept { return options_.depth - static_cast<unsigned>(free_slots_.size()); }
  void become_owner();
  io_uring_sqe* next_sqe();
  void arm_wake();
  void queue_piece(unsigned slot_index);
  std::size_t reap(std::vector<IoCompletion>& completions);
  bool handle(unsigned slot_index, int raw_result, std::vector<IoCompletion>& completions);
  void flush();
  void enter(const Deadline& deadline);
  void count_refusal(int rc);

  const IoQueueOptions options_;
  const unsigned file_places_;
  const pid_t process_;
  UringRing ring_;
  WakeEvent wake_;
  bool woken_ = false;  // wake() seen, wait() not yet told
  std::thread::id owner_;
  QueueCounters counters_;

  std::vector<std::uint32_t> file_aligns_;  // by place in the file table, 0 for an empty one; place 0 is the eventfd
  std::vector<unsigned> empty_places_;      // below file_aligns_.size()
  std::vector<iovec> slices_;               // registered memory by address; the index is the kernel's buffer index
  std::string unregistered_reason_ = "no memory has been registered yet";
  std::vector<Slot> slots_;
  std::vector<unsigned> free_slots_;
  unsigned refused_in_row_ = 0;
};

FileId UringQueue::add_file(int descriptor, std::uint32_t direct_align_bytes) {
  TP_CHECK(descriptor >= 0);
  TP_CHECK(direct_align_bytes > 0);
  TP_CHECK(!ring_.enabled() || owner_ == std::this_thread::get_id());
  const bool again = !empty_places_.empty();
  const auto place = again ? empty_places_.back() : static_cast<unsigned>(file_aligns_.size());
  if (place == file_places_) {
    throw Error(ErrorKind::invalid, "too many files for one IoQueue: " + std::to_string(file_places_ - 1) +
                                        " (kFilesMax, or RLIMIT_NOFILE when the queue was made)");
  }
  ring_.set_file(place, descriptor);
  counters_.count_system_call();
  if (again) {
    empty_places_.pop_back();
  } else {
    file_aligns_.push_back(0);
  }
  file_aligns_[place] = direct_align_bytes;
  return FileId{place};
}

void UringQueue::remove_file(FileId file) {
  TP_CHECK(file.value != kWakeFileIndex && file.value < file_aligns_.size() && file_aligns_[file.value] != 0);
  TP_CHECK(!ring_.enabled() || owner_ == std::this_thread::get_id());
  ring_.clear_file(file.value);
  counters_.count_system_call();
  file_aligns_[file.value] = 0;
  empty_places_.push_back(file.value);
}

void UringQueue::register_memory(std::span<std::byte> memory) {
  TP_CHECK(!memory.empty());
  TP_CHECK(!ring_.enabled());
  TP_CHECK(options_.registered_slice_bytes > 0 && options_.registered_slice_bytes <= kRegisteredBufferBytesMax);
  std::vector<iovec> slices = slices_;
  for (std::size_t at = 0; at < memory.size(); at += options_.registered_slice_bytes) {
    slices.push_back({memory.data() + at, std::min(memory.size() - at, options_.registered_slice_bytes)});
  }
  const auto by_address = [](const iovec& left, const iovec& right) { return left.iov_base < right.iov_base; };
  std::sort(slices.begin(), slices.end(), by_address);
  const int error_number = ring_.register_buffers(slices);
  counters_.count_system_call();
  if (error_number == 0) {
    slices_ = std::move(slices);
    unregistered_reason_.clear();
    return;
  }
  std::size_t wanted_bytes = 0;
  for (const iovec& slice : slices) wanted_bytes += slice.iov_len;
  slices_.clear();
  unregistered_reason_ = explain_register_refusal(error_number, wanted_bytes);
}

void UringQueue::submit(std::span<const IoRequest> requests) {
  become_owner();
  TP_CHECK(requests.size() <= free_slots_.size());
  for (const IoRequest& request : requests) {
    TP_CHECK(request.file.value != kWakeFileIndex && request.file.value < file_aligns_.size());
    TP_CHECK(file_aligns_[request.file.value] != 0);
    const unsigned slot_index = free_slots_.back();
    free_slots_.pop_back();
    Slot& slot = slots_[slot_index];
    TP_CHECK(!slot.in_use);
    slot.in_use = true;
    slot.progress = TransferProgress(request, file_aligns_[request.file.value], options_.transfer_max_bytes);
    counters_.count_request();
    queue_piece(slot_index);
  }
  flush();
}

std::size_t UringQueue::wait(std::vector<IoCompletion>& completions, std::chrono::nanoseconds timeout) {
  become_owner();
  const Deadline deadline(timeout);
  for (bool last_look = false;;) {
    if (const std::size_t count = reap(completions)) {
      flush();
      return count;
    }
    if (woken_ || last_look) {
      woken_ = false;
      return 0;
    }
    enter(deadline);
    last_look = !deadline.endless() && deadline.remaining().count() == 0;
  }
}

void UringQueue::drain(std::vector<IoCompletion>& completions) {
  if (in_flight() == 0) return;
  become_owner();
  const Deadline never(kWaitForever);
  while (in_flight() > 0) {
    if (reap(completions) == 0) enter(never);
  }
}

void UringQueue::become_owner() {
  if (!ring_.enabled()) {
    ring_.enable();
    owner_ = std::this_thread::get_id();
    arm_wake();
  }
  TP_CHECK(owner_ == std::this_thread::get_id());
}

io_uring_sqe* UringQueue::next_sqe() {
  io_uring_sqe* sqe = io_uring_get_sqe(ring_.get());
  TP_CHECK(sqe != nullptr);  // see Slots above
  return sqe;
}

void UringQueue::arm_wake() {
  io_uring_sqe* sqe = next_sqe();
  io_uring_prep_poll_add(sqe, static_cast<int>(kWakeFileIndex), POLLIN);
  io_uring_sqe_set_flags(sqe, IOSQE_FIXED_FILE);
  io_uring_sqe_set_data64(sqe, kWakeUserData);
}

// The registered slice that holds an address, or null. Slices are sorted and do not overlap.
const iovec* find_slice(const std::vector<iovec>& slices, const std::byte* address) {
  const auto after = std::upper_bound(
      slices.begin(), slices.end(), address,
      [](const std::byte* at, const iovec& slice) { return at < static_cast<const std::byte*>(slice.iov_base); });
  if (after == slices.begin()) return nullptr;
  const iovec& slice = *(after - 1);
  const auto* base = static_cast<const std::byte*>(slice.iov_base);
  return address < base + slice.iov_len ? &slice : nullptr;
}

void UringQueue::queue_piece(unsigned slot_index) {
  Slot& slot = slots_[slot_index];
  TP_CHECK(slot.in_use);
  const IoRequest& request = slot.progress.request();
  slot.piece = slot.progress.next_piece();
  const iovec* slice = find_slice(slices_, slot.piece.memory);
  if (slice != nullptr) {
    const std::byte* slice_end = static_cast<const std::byte*>(slice->iov_base) + slice->iov_len;
    slot.piece = slot.progress.next_piece(static_cast<std::uint64_t>(slice_end - slot.piece.memory));
  }
  const TransferPiece& piece = slot.piece;
  const int file = static_cast<int>(request.file.value);
  io_uring_sqe* sqe = next_sqe();
  if (slice != nullptr) {
    const int buffer = static_cast<int>(slice - slices_.data());
    if (request.op == IoOp::read) {
      io_uring_prep_read_fixed(sqe, file, piece.memory, piece.size_bytes, piece.offset_bytes, buffer);
    } else {
      io_uring_prep_write_fixed(sqe, file, piece.memory, piece.size_bytes, piece.offset_bytes, buffer);
    }
  } else if (request.op == IoOp::read) {
    io_uring_prep_read(sqe, file, piece.memory, piece.size_bytes, piece.offset_bytes);
  } else {
    io_uring_prep_write(sqe, file, piece.memory, piece.size_bytes, piece.offset_bytes);
  }
  io_uring_sqe_set_flags(sqe, IOSQE_FIXED_FILE);
  io_uring_sqe_set_data64(sqe, slot_index);
}

std::size_t UringQueue::reap(std::vector<IoCompletion>& completions) {
  std::size_t count = 0;
  unsigned head = 0;
  unsigned seen = 0;
  io_uring_cqe* cqe = nullptr;
  bool wake_seen = false;
  io_uring_for_each_cqe(ring_.get(), head, cqe) {
    ++seen;
    if (cqe->user_data == kWakeUserData) {
      TP_CHECK(cqe->res > 0 || cqe->res == -ENOMEM);  // not armed: a wake too many is better than one too few
      wake_seen = true;
    } else if (handle(static_cast<unsigned>(cqe->user_data), cqe->res, completions)) {
      ++count;
    }
  }
  io_uring_cq_advance(ring_.get(), seen);
  if (wake_seen) {
    wake_.consume();
    woken_ = true;
    arm_wake();
  }
  return count;
}

// True when the request of the slot is finished.
bool UringQueue::handle(unsigned slot_index, int raw_result, std::vector<IoCompletion>& completions) {
  TP_CHECK(slot_index < slots_.size());
  Slot& slot = slots_[slot_index];
  TP_CHECK(slot.in_use);
  const IoRequest& request = slot.progress.request();
  if (options_.filter) raw_result = options_.filter(request, raw_result);
  const TransferProgress::Verdict verdict = slot.progress.advance(slot.piece, raw_result);
  counters_.count_result(slot.progress);
  if (verdict == TransferProgress::Verdict::again) {
    queue_piece(slot_index);
    return false;
  }
  const IoCompletion completion = slot.progress.completion();
  counters_.count_completion(request.op, completion);
  completions.push_back(completion);
  slot.in_use = false;
  free_slots_.push_back(slot_index);
  return true;
}

// Sends what is pending, waits for nothing. What the kernel does not take now goes with the next enter().
void UringQueue::flush() {
  if (io_uring_sq_ready(ring_.get()) == 0) return;
  const int rc = io_uring_submit(ring_.get());
  counters_.count_system_call();
  count_refusal(rc);
}

// Sends what is pending and waits for a completion (the wake poll is one) or the deadline.
void UringQueue::enter(const Deadline& deadline) {
  __kernel_timespec left{};
  if (!deadline.endless()) {
    const auto left_ns = deadline.remaining().count();
    left.tv_sec = left_ns / 1'000'000'000;
    left.tv_nsec = left_ns % 1'000'000'000;
  }
  io_uring_cqe* cqe = nullptr;
  const int rc = io_uring_submit_and_wait_timeout(ring_.get(), &cqe, 1, deadline.endless() ? nullptr : &left, nullptr);
  counters_.count_system_call();
  if (rc == -ETIME) return;
  count_refusal(rc);
}

// io_uring_enter itself, not a transfer, said no: EAGAIN for want of kernel memory, EBUSY while completions wait to be
// seen, EINTR for a signal. Nothing is lost (entries stay in the ring), so it is tried again, kIoRetryMax times.
void UringQueue::count_refusal(int rc) {
  if (rc >= 0) {
    refused_in_row_ = 0;
    return;
  }
  if (rc == -EINTR) return;
  const bool transient = rc == -EAGAIN || rc == -EBUSY;
  if (!transient || ++refused_in_row_ > kIoRetryMax) {
    throw Error(ErrorKind::io, "io_uring_enter failed: " + describe_errno(-rc), -rc);
  }
  std::this_thread::sleep_for(kRefusedPause);
}

}  // namespace

std::unique_ptr<IoQueue> make_uring_queue(const IoQueueOptions& options) {
  return std::make_unique<UringQueue>(options);
}

}  // namespace tp
