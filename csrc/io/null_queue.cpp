// SPDX-License-Identifier: Apache-2.0
// The null engine: every request is done at once, and neither memory nor files are touched. What it "reads" is whatever
// the memory held, so it is for measuring everything that isn't I/O, and never chosen by "auto".
//
// It is also the template for a new engine. A real one differs in three places: submit() starts transfers (and never
// waits for them), wait() takes the kernel's raw results through the filter to TransferProgress (transfer_progress.hpp,
// which says when a request is finished), and the destructor drains. Then add the name to probe.cpp; the conformance
// suite runs over every engine that the probe knows.
#include <utility>

#include "base/check.hpp"
#include "base/error.hpp"
#include "io/io_queue.hpp"
#include "io/queue_counters.hpp"
#include "io/wake_event.hpp"

namespace tp {
namespace {

class NullQueue final : public IoQueue {
 public:
  explicit NullQueue(const IoQueueOptions& options) : depth_(options.depth) {
    TP_CHECK(depth_ > 0 && depth_ <= kIoDepthMax);
    done_.reserve(depth_);
  }

  unsigned depth() const noexcept override { return depth_; }
  IoQueueFacts facts() const override { return {"null", false, "the null engine transfers nothing", {}}; }
  IoQueueCounters counters() const noexcept override { return counters_.snapshot(); }

  FileId add_file(int descriptor, std::uint32_t direct_align_bytes) override {
    TP_CHECK(descriptor >= 0);
    TP_CHECK(direct_align_bytes > 0);
    if (files_ == kFilesMax) throw Error(ErrorKind::invalid, "too many files for one IoQueue (kFilesMax)");
    return FileId{files_++};
  }

  void remove_file(FileId file) override { TP_CHECK(file.value < files_); }

  void register_memory(std::span<std::byte> memory) override {
    TP_CHECK(!memory.empty());
    TP_CHECK(counters_.snapshot().requests == 0);
  }

  void submit(std::span<const IoRequest> requests) override {
    TP_CHECK(done_.size() + requests.size() <= depth_);
    for (const IoRequest& request : requests) {
      TP_CHECK(request.file.value < files_);
      counters_.count_request();
      counters_.count_completion(request.op, done_.emplace_back(IoCompletion{request.token, 0, request.size_bytes}));
    }
  }

  std::size_t wait(std::vector<IoCompletion>& completions, std::chrono::nanoseconds timeout) override {
    if (done_.empty()) {
      wait_for_events(wake_, nullptr, Deadline(timeout));
      counters_.count_system_call();
      wake_.consume();
      return 0;
    }
    const std::size_t count = done_.size();
    completions.insert(completions.end(), done_.begin(), done_.end());
    done_.clear();
    return count;
  }

  void wake() noexcept override { wake_.signal(); }

  void drain(std::vector<IoCompletion>& completions) override {
    while (!done_.empty()) wait(completions, kWaitForever);
  }

 private:
  const unsigned depth_;
  std::uint32_t files_ = 0;
  std::vector<IoCompletion> done_;  // submitted, not yet returned by wait()
  WakeEvent wake_;
  QueueCounters counters_;
};

}  // namespace

std::unique_ptr<IoQueue> make_null_queue(const IoQueueOptions& options) { return std::make_unique<NullQueue>(options); }

}  // namespace tp
