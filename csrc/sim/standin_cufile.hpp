// SPDX-License-Identifier: Apache-2.0
// A cuFile without GPUDirect Storage, for tests: a shared library with the entry points of device/cufile_abi.hpp over
// pread(2) and pwrite(2), and the interface by which a test rules it. Cufile::load() takes the library's path; the test
// links it too, and gets the same object from tensorpager_standin_cufile().
//
// Memory is what the stand-in driver (standin_driver.hpp) has mapped with access, which the host can read and write at
// the same address, or plain host memory, as cuFile takes it too. Anything else is EFAULT.
//
// As strict as cuFile's documents, so that nobody relies on less: a transfer needs a current context of the stand-in
// driver; a descriptor's number is registered once; files opened with flags that cuFile refuses are refused; a
// registered buffer is named by its first address and an offset. What only a wrong program does is a violation.
//
// Threads: any, but reset() while no other thread is in the library. Errors: TP_CHECK.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "device/cufile_abi.hpp"
#include "sim/standin_driver.hpp"

namespace tp {

struct StandinCufileOptions {
  bool has_module = true;              // nvidia-fs is loaded; else compatibility mode
  bool supports_storage = true;        // the module knows a kind of storage of this machine
  bool allows_compatibility = true;    // allow_compat_mode
  bool is_open_elsewhere = false;      // cuFileDriverOpen says so
  bool needs_direct_files = false;     // as before release 1.7
  std::size_t admitted_bytes_max = 0;  // a transfer moves all and admits to at most this; 0 for all
};

struct StandinCufileFailure {
  std::string call = {};  // the entry point
  std::uint64_t nth = 1;  // counted from 1 since arm()
  // 5000 and up: cuFile's own. Below, for transfers alone: they return -1 and this is errno.
  int error = cufile::kErrorInternal;
  cuda::Result cuda_error = cuda::kSuccess;
  bool stays = false;  // that call and all later ones
};

struct StandinCufileLeaks {
  std::size_t sessions = 0, handles = 0, buffers = 0;
  std::size_t total() const { return sessions + handles + buffers; }
};

class TP_STANDIN_EXPORT StandinCufile {
 public:
  StandinCufile() = default;
  StandinCufile(const StandinCufile&) = delete;
  StandinCufile& operator=(const StandinCufile&) = delete;
  virtual ~StandinCufile() = default;

  // Forgets all there is. Returns what was left alive.
  virtual StandinCufileLeaks reset(const StandinCufileOptions& options = {}) = 0;
  virtual StandinCufileLeaks alive() const = 0;
  virtual void arm(const StandinCufileFailure& failure) = 0;  // replaces the last one, restarts fired()
  virtual std::uint64_t fired() const = 0;
  virtual std::uint64_t calls(const std::string& name) const = 0;
  virtual std::uint64_t registered_transfers() const = 0;   // into or out of registered buffers
  virtual std::vector<std::string> violations() const = 0;  // a line each
};

}  // namespace tp

extern "C" TP_STANDIN_EXPORT tp::StandinCufile* tensorpager_standin_cufile();
