// SPDX-License-Identifier: Apache-2.0
// Which engines can run here, best first, each with the reason it can or can't. probe() tries things for real (sets up
// a ring, registers memory, opens a file direct) and leaves nothing behind. Blocking, any thread, throws nothing for
// an engine that can't run.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "io/io_queue.hpp"

namespace tp {

struct EngineCandidate {
  std::string engine;
  bool usable = false;
  std::string reason;  // one sentence: what it has, or what stops it and what to do about it
};

struct DirectoryFacts {
  std::string directory;
  std::string file_system;  // "ext4", "tmpfs", "btrfs", ...
  bool direct = false;
  std::uint32_t align_bytes = 1;
  std::string reason;
};

std::vector<EngineCandidate> probe_engines();
DirectoryFacts probe_directory(const std::string& directory);  // throws Error(io) if it can't be written

// engine: "auto" takes the first usable candidate that transfers bytes (not "null"); a name that can't run here throws
// Error(engine) with the reason.
std::unique_ptr<IoQueue> make_io_queue(const std::string& engine, const IoQueueOptions& options);

}  // namespace tp
