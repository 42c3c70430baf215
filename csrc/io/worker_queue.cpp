// SPDX-License-Identifier: Apache-2.0
//   owner                            worker (min(depth, threads_max) of them)
//   submit() -> todo (mutex)  -->  takes a task, calls transfer() until TransferProgress says finished
//   wait()   <- done (mutex)  <--  appends the completion; signals done_event_ when done was empty
//
// Invariant under the mutex: done_event_ is signalled exactly when done holds something. So a wait() that finds done
// empty can block on done_event_ and wake_ together and miss neither.
#include "io/worker_queue.hpp"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.hpp"
#include "base/error.hpp"
#include "base/signals_blocked.hpp"
#include "io/queue_counters.hpp"
#include "io/wake_event.hpp"

namespace tp {
namespace {

struct OpenFile {
  BlockingTransfers::File file = 0;
  std::uint32_t align_bytes = 1;  // 0: removed
};

struct Task {
  BlockingTransfers::File file = 0;  // copied from the file table, which only the owner reads
  TransferProgress progress;
};

// What the owner and the workers share.
struct Shared {
  std::mutex mutex;  // guards the rest
  std::condition_variable todo_ready;
  std::deque<Task> todo;
  std::vector<IoCompletion> done;
  bool stopping = false;
  std::condition_variable started;
  std::size_t started_workers = 0;
  std::exception_ptr refusal;  // what the first worker that could not start threw
};

class WorkerQueue final : public IoQueue {
 public:
  WorkerQueue(const char* name, const IoQueueOptions& options, unsigned threads_max,
              std::unique_ptr<BlockingTransfers> transfers)
      : options_(options), process_(getpid()), transfers_(std::move(transfers)) {
    TP_CHECK(options_.depth > 0 && options_.depth <= kIoDepthMax);
    const unsigned threads = std::min(options_.depth, threads_max);
    workers_.reserve(threads);
    const SignalsBlocked signals_blocked;
    try {
      while (workers_.size() < threads) workers_.emplace_back([this] { work(); });
    } catch (const std::system_error& error) {
      stop();
      throw Error(ErrorKind::engine,
                  "the " + std::string(name) + " engine could not start its " + std::to_string(threads) +
                      " threads: " + describe_errno(error.code().value()) +
                      ". Raise the limit on processes (`ulimit -u`, pids cgroup).",
                  error.code().value());
    }
    if (const std::exception_ptr refusal = wait_until_started()) {
      stop();
      std::rethrow_exception(refusal);
    }
  }

  ~WorkerQueue() override {
    if (getpid() != process_) {  // a child of fork() has the object but not the threads
      for (std::thread& worker : workers_) worker.detach();
      static_cast<void>(shared_.release());  // destroying a condition variable waits for its waiters, who are not here
      static_cast<void>(transfers_.release());
      return;
    }
    stop();  // workers finish what has been submitted first: memory may be freed after this
  }

  unsigned depth() const noexcept override { return options_.depth; }
  IoQueueFacts facts() const override { return transfers_->facts(); }
  IoQueueCounters counters() const noexcept override { return counters_.snapshot(); }

  FileId add_file(int descriptor, std::uint32_t direct_align_bytes) override {
    TP_CHECK(descriptor >= 0);
    TP_CHECK(direct_align_bytes > 0);
    if (files_.size() == kFilesMax && empty_places_.empty())
      throw Error(ErrorKind::invalid, "too many files for one IoQueue (kFilesMax)");
    const OpenFile file{transfers_->add_file(descriptor), direct_align_bytes};
    if (empty_places_.empty()) {
      files_.push_back(file);
      return FileId{static_cast<std::uint32_t>(files_.size() - 1)};
    }
    const FileId place = empty_places_.back();
    empty_places_.pop_back();
    files_[place.value] = file;
    return place;
  }

  void remove_file(FileId file) override {
    TP_CHECK(file.value < files_.size() && files_[file.value].align_bytes != 0);
    files_[file.value].align_bytes = 0;
    empty_places_.push_back(file);
  }

  void register_memory(std::span<std::byte> memory) override {
    TP_CHECK(!memory.empty());
    TP_CHECK(counters_.snapshot().requests == 0);
    transfers_->register_memory(memory);
  }

  void submit(std::span<const IoRequest> requests) override {
    TP_CHECK(in_flight_ + requests.size() <= options_.depth);
    if (requests.empty()) return;
    {
      const std::lock_guard lock(shared_->mutex);
      for (const IoRequest& request : requests) {
        TP_CHECK(request.file.value < files_.size() && files_[request.file.value].align_bytes != 0);
        const OpenFile& file = files_[request.file.value];
        shared_->todo.push_back({file.file, {request, file.align_bytes, options_.transfer_max_bytes}});
        counters_.count_request();
      }
    }
    in_flight_ += static_cast<unsigned>(requests.size());
    if (requests.size() == 1) {
      shared_->todo_ready.notify_one();
    } else {
      shared_->todo_ready.notify_all();
    }
  }

  std::size_t wait(std::vector<IoCompletion>& completions, std::chrono::nanoseconds timeout) override {
    const Deadline deadline(timeout);
    for (bool last_look = false;;) {
      if (const std::size_t count = take_done(completions)) return count;
      if (wake_.consume() || last_look) return 0;
      wait_for_events(wake_, &done_event_, deadline);
      counters_.count_system_call();
      last_look = !deadline.endless() && deadline.remaining().count() == 0;
    }
  }

  void wake() noexcept override { wake_.signal(); }

  // Leaves wake_ alone: a wake() during drain() is for the next wait().
  void drain(std::vector<IoCompletion>& completions) override {
    const Deadline never(kWaitForever);
    while (in_flight_ > 0) {
      if (take_done(completions) == 0) wait_for_events(done_event_, nullptr, never);
    }
  }

 private:
  std::size_t take_done(std::vector<IoCompletion>& completions) {
    const std::lock_guard lock(shared_->mutex);
    const std::size_t count = shared_->done.size();
    if (count == 0) return 0;
    TP_CHECK(count <= in_flight_);
    completions.insert(completions.end(), shared_->done.begin(), shared_->done.end());
    shared_->done.clear();
    TP_CHECK(done_event_.consume());
    in_flight_ -= static_cast<unsigned>(count);
    return count;
  }

  void work() {
    pthread_setname_np(pthread_self(), "tensorpager-io");
    if (!start()) return;
    for (;;) {
      std::unique_lock lock(shared_->mutex);
      shared_->todo_ready.wait(lock, [this] { return shared_->stopping || !shared_->todo.empty(); });
      if (shared_->todo.empty()) return;
      Task task = std::move(shared_->todo.front());
      shared_->todo.pop_front();
      lock.unlock();

      transfer(task);
      const IoCompletion completion = task.progress.completion();
      counters_.count_completion(task.progress.request().op, completion);
      lock.lock();
      shared_->done.push_back(completion);
      if (shared_->done.size() == 1) done_event_.signal();
    }
  }

  bool start() {
    std::exception_ptr refusal;
    try {
      transfers_->start_worker();
    } catch (...) {
      refusal = std::current_exception();
    }
    const std::lock_guard lock(shared_->mutex);
    if (shared_->refusal == nullptr) shared_->refusal = refusal;
    ++shared_->started_workers;
    shared_->started.notify_one();
    return refusal == nullptr;
  }

  std::exception_ptr wait_until_started() {
    std::unique_lock lock(shared_->mutex);
    shared_->started.wait(lock, [this] { return shared_->started_workers == workers_.size(); });
    return shared_->refusal;
  }

  void transfer(Task& task) {
    const IoRequest& request = task.progress.request();
    TransferProgress::Verdict verdict = TransferProgress::Verdict::again;
    while (verdict == TransferProgress::Verdict::again) {
      const TransferPiece piece =
          task.progress.next_piece(transfers_->bytes_in_one_piece(task.progress.next_piece().memory));
      int raw_result = transfers_->transfer(request.op, task.file, piece);
      counters_.count_system_call();
      if (options_.filter) raw_result = options_.filter(request, raw_result);
      verdict = task.progress.advance(piece, raw_result);
      counters_.count_result(task.progress);
    }
  }

  void stop() {
    {
      const std::lock_guard lock(shared_->mutex);
      shared_->stopping = true;
    }
    shared_->todo_ready.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  const IoQueueOptions options_;
  const pid_t process_;
  std::vector<OpenFile> files_;       // owner only
  std::vector<FileId> empty_places_;  // in files_; owner only
  unsigned in_flight_ = 0;            // owner only
  WakeEvent wake_;
  WakeEvent done_event_;
  QueueCounters counters_;

  std::unique_ptr<BlockingTransfers> transfers_;
  std::unique_ptr<Shared> shared_ = std::make_unique<Shared>();
  std::vector<std::thread> workers_;
};

}  // namespace

std::unique_ptr<IoQueue> make_worker_queue(const char* name, const IoQueueOptions& options, unsigned threads_max,
                                           std::unique_ptr<BlockingTransfers> transfers) {
  return std::make_unique<WorkerQueue>(name, options, threads_max, std::move(transfers));
}

}  // namespace tp
