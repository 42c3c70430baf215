// SPDX-License-Identifier: Apache-2.0
// Reads a file from start to end through one engine into a small set of reused huge-page frames, as the pager does, and
// prints one line of JSON. Cold: the file is read with O_DIRECT, so the page cache plays no part.
//
//   io_queue_bench FILE [engine=auto] [request_bytes=1048576] [depth=8] [frames=64] [register=1]
#include <sys/mman.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/check.hpp"
#include "base/error.hpp"
#include "io/file.hpp"
#include "io/probe.hpp"
#include "io/wake_event.hpp"

namespace {

struct Arguments {
  std::string path;
  std::string engine = "auto";
  std::uint64_t request_bytes = tp::kIoRequestBytesMax;
  std::uint64_t depth = 8;
  std::uint64_t frames = 64;
  std::uint64_t use_registered = 1;
};

Arguments parse(int count, char** words) {
  if (count < 2) throw tp::Error(tp::ErrorKind::invalid, "usage: io_queue_bench FILE [engine= request_bytes= ...]");
  Arguments arguments;
  arguments.path = words[1];
  for (int at = 2; at < count; ++at) {
    const std::string word = words[at];
    const std::size_t equals = word.find('=');
    if (equals == std::string::npos) throw tp::Error(tp::ErrorKind::invalid, word + ": name=value expected");
    const std::string name = word.substr(0, equals), value = word.substr(equals + 1);
    if (name == "engine") {
      arguments.engine = value;
    } else if (name == "request_bytes") {
      arguments.request_bytes = std::stoull(value);
    } else if (name == "depth") {
      arguments.depth = std::stoull(value);
    } else if (name == "frames") {
      arguments.frames = std::stoull(value);
    } else if (name == "register") {
      arguments.use_registered = std::stoull(value);
    } else {
      throw tp::Error(tp::ErrorKind::invalid, word + ": unknown argument");
    }
  }
  if (arguments.frames < arguments.depth)
    throw tp::Error(tp::ErrorKind::invalid, "fewer frames than requests in flight");
  return arguments;
}

double cpu_seconds() {
  rusage usage{};
  TP_CHECK(getrusage(RUSAGE_SELF, &usage) == 0);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// Frames of huge pages, touched before the clock starts: the pager reuses frames, too.
std::byte* make_frames(std::size_t size_bytes) {
  const std::size_t padded_bytes = size_bytes + tp::kPageBytesMin;
  void* mapped = mmap(nullptr, padded_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TP_CHECK(mapped != MAP_FAILED);
  const auto start = reinterpret_cast<std::uintptr_t>(mapped);
  const std::uintptr_t aligned = (start + tp::kPageBytesMin - 1) / tp::kPageBytesMin * tp::kPageBytesMin;
  auto* frames = reinterpret_cast<std::byte*>(aligned);
  madvise(frames, size_bytes, MADV_HUGEPAGE);
  for (std::size_t at = 0; at < size_bytes; at += 4096) frames[at] = std::byte{0};
  return frames;
}

// Keeps `depth` requests in flight; a completion's frame takes the next request. Returns the bytes read.
std::uint64_t read_through(tp::IoQueue& queue, tp::FileId id, const tp::File& file, std::byte* frames,
                           const Arguments& arguments) {
  const std::uint64_t align = file.align_bytes();
  std::vector<std::uint64_t> free_frames(arguments.frames);
  for (std::uint64_t frame = 0; frame < arguments.frames; ++frame) free_frames[frame] = frame;
  std::vector<tp::IoRequest> requests;
  std::vector<tp::IoCompletion> completions;
  std::uint64_t next = 0, in_flight = 0, read_bytes = 0;
  while (next < file.size_bytes() || in_flight > 0) {
    requests.clear();
    while (in_flight < arguments.depth && next < file.size_bytes()) {
      const std::uint64_t left = (file.size_bytes() - next + align - 1) / align * align;
      const std::uint64_t size = std::min(arguments.request_bytes, left);
      const std::uint64_t frame = free_frames.front();
      free_frames.erase(free_frames.begin());
      requests.push_back({frame, tp::IoOp::read, id, next, frames + frame * arguments.request_bytes,
                          static_cast<std::uint32_t>(size)});
      next += size;
      ++in_flight;
    }
    queue.submit(requests);
    completions.clear();
    queue.wait(completions, tp::kWaitForever);
    for (const tp::IoCompletion& completion : completions) {
      if (completion.error != 0) throw tp::Error(tp::ErrorKind::io, "read of " + file.path(), completion.error);
      read_bytes += completion.transferred_bytes;
      free_frames.push_back(completion.token);
      --in_flight;
    }
  }
  return read_bytes;
}

void run(const Arguments& arguments) {
  const tp::File file = tp::File::open_checkpoint(arguments.path, tp::DirectPolicy::required);
  const std::size_t memory_bytes = arguments.frames * arguments.request_bytes;
  std::byte* frames = make_frames(memory_bytes);
  tp::IoQueueOptions options;
  options.depth = static_cast<unsigned>(arguments.depth);
  const auto queue = tp::make_io_queue(arguments.engine, options);
  if (arguments.use_registered != 0) queue->register_memory({frames, memory_bytes});
  const tp::FileId id = queue->add_file(file.descriptor(), file.align_bytes());

  const double cpu_before = cpu_seconds();
  const auto start = std::chrono::steady_clock::now();
  const std::uint64_t read_bytes = read_through(*queue, id, file, frames, arguments);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const double cpu = cpu_seconds() - cpu_before;
  const double gib = static_cast<double>(read_bytes) / static_cast<double>(tp::kGiB);
  if (read_bytes != file.size_bytes()) throw tp::Error(tp::ErrorKind::io, "the file changed while it was read");
  std::printf(
      "{\"engine\": \"%s\", \"bytes\": %llu, \"gib_per_s\": %.4f, \"cpu_s_per_gib\": %.5f, \"request_bytes\": %llu, "
      "\"depth\": %llu, \"registered\": %s, \"system_calls\": %llu}\n",
      queue->facts().engine.c_str(), static_cast<unsigned long long>(read_bytes), gib / seconds, cpu / gib,
      static_cast<unsigned long long>(arguments.request_bytes), static_cast<unsigned long long>(arguments.depth),
      queue->facts().memory_registered ? "true" : "false",
      static_cast<unsigned long long>(queue->counters().system_calls));
}

}  // namespace

int main(int count, char** words) {
  try {
    run(parse(count, words));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "io_queue_bench: %s\n", error.what());
    return 1;
  }
}
