// SPDX-License-Identifier: Apache-2.0
// Files with a pattern that tells every byte's place, for tests.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

namespace tp::test {

// Eight bytes that name their own index: a page shown at the wrong address, or a stale one, can't pass for the right
// one.
inline std::uint64_t pattern(std::uint64_t word, std::uint64_t salt = 0) {
  return (word + salt * 0x10001) * 0x9e3779b97f4a7c15ull + 1;
}

class PatternFile {
 public:
  explicit PatternFile(std::uint64_t size_bytes, std::uint64_t salt = 0, const std::string& directory = "/var/tmp")
      : size_bytes_(size_bytes) {
    path_ = directory + "/tensorpager-test-XXXXXX";
    const int descriptor = mkstemp(path_.data());
    if (descriptor < 0) throw std::runtime_error("mkstemp in " + directory);
    std::vector<std::uint64_t> words((size_bytes + 7) / 8);
    for (std::size_t i = 0; i < words.size(); ++i) words[i] = pattern(i, salt);
    const auto* bytes = reinterpret_cast<const char*>(words.data());
    for (std::uint64_t done = 0; done < size_bytes;) {
      const ssize_t written = write(descriptor, bytes + done, size_bytes - done);
      if (written <= 0) throw std::runtime_error("write");
      done += static_cast<std::uint64_t>(written);
    }
    fsync(descriptor);
    close(descriptor);
  }
  ~PatternFile() { unlink(path_.c_str()); }
  PatternFile(const PatternFile&) = delete;
  PatternFile& operator=(const PatternFile&) = delete;
  const std::string& path() const { return path_; }
  std::uint64_t size_bytes() const { return size_bytes_; }

 private:
  std::string path_;
  std::uint64_t size_bytes_;
};

// A directory of its own, removed with what is in it.
class TemporaryDirectory {
 public:
  explicit TemporaryDirectory(const std::string& parent) : path_(parent + "/tensorpager-test-XXXXXX") {
    if (mkdtemp(path_.data()) == nullptr) throw std::runtime_error("mkdtemp in " + parent);
  }
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace tp::test
