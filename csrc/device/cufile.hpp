// SPDX-License-Identifier: Apache-2.0
// cuFile (GPUDirect Storage), loaded at run time: transfers between files and device memory. The only way to it:
// nothing else names one of its functions or links against it.
//
// Each entry point is a member of its own name. Those that return a status check it when called like a function, and
// throw; .result() hands the status out, for destructors and for refusals that are an answer.
//
// Direct or not. Where the kernel module nvidia-fs is missing, cuFile still works: it reads into host memory and copies
// ("compatibility mode"), which saves nothing over our own host tier. probe_cufile() tells the two apart by what the
// library says of the module, and by the module's own statistics in /proc.
//
// Threads: any; a thread that transfers, or registers memory, has the memory's context current. Blocking: opening a
// session talks to the kernel module and may start CUDA (100s of ms); transfers block. Ownership: the library stays
// loaded until the process ends; a session is closed by its owner, which no other owner notices. Fork: a child must
// not call it. Errors: load() throws Error(engine) with the reason. A call throws Error(io) when it is about a file,
// else
//   Error(device), whose message names the call, what cuFile calls the error and what to do, and whose error_number()
//   is cuFile's. Opening a session throws Error(engine), since that is what stops an engine.
#pragma once

#include <string>
#include <utility>

#include "base/error.hpp"
#include "device/cufile_abi.hpp"

namespace tp {

class Cufile;

// "CU_FILE_IO_NOT_SUPPORTED (5008): ...": the library's name of an error, likely why, and what to do.
std::string describe_cufile(cufile::Status status);
// The errno value nearest to an error of cuFile, for completions. Never 0.
int errno_of_cufile(int error) noexcept;

Error cufile_error(const char* call, cufile::Status status);

template <class Signature>
class CufileEntryPoint;

template <class... Parameters>
class CufileEntryPoint<cufile::Status(Parameters...)> {
 public:
  explicit CufileEntryPoint(const char* name) noexcept : name_(name) {}

  template <class... Arguments>
  cufile::Status result(Arguments... arguments) const noexcept {
    return function_(arguments...);
  }
  template <class... Arguments>
  void operator()(Arguments... arguments) const {
    const cufile::Status status = function_(arguments...);
    if (status.error != cufile::kSuccess) throw cufile_error(name_, status);
  }

 private:
  friend class Cufile;
  using Pointer = cufile::Status (*)(Parameters...);

  const char* name_;
  Pointer function_ = nullptr;
};

class Cufile {
 public:
  // The library of this machine, loaded by the first call; the same object every time.
  static const Cufile& system();
  // Another library with the same entry points; for tests. Never unloaded.
  static const Cufile& load(const std::string& library_path);

  Cufile(const Cufile&) = delete;
  Cufile& operator=(const Cufile&) = delete;

  const std::string& library_path() const noexcept { return library_path_; }
  std::string version() const;  // "1.11"; empty where the library is too old to say

  using Handle = cufile::Handle;
  using Descriptor = cufile::Descriptor;
  using DriverProperties = cufile::DriverProperties;
#define TP_CUFILE_MEMBER(name, parameters) CufileEntryPoint<cufile::Status parameters> name{#name};
  TP_CUFILE_STATUS_ENTRY_POINTS(TP_CUFILE_MEMBER)
#undef TP_CUFILE_MEMBER
#define TP_CUFILE_MEMBER(name, result, parameters) result(*name) parameters = nullptr;
  TP_CUFILE_OTHER_ENTRY_POINTS(TP_CUFILE_MEMBER)
#undef TP_CUFILE_MEMBER

 private:
  friend class CufileSession;
  using Close = cufile::Status (*)();
  using GetVersion = cufile::Status (*)(int* version);
  explicit Cufile(const std::string& library_path);

  std::string library_path_;
  void* library_ = nullptr;
  Close close_counted_ = nullptr;     // null in releases that do not count: see CufileSession
  GetVersion get_version_ = nullptr;  // null in old libraries
};

// cuFile open for its owner. What was registered is deregistered before.
class CufileSession {
 public:
  explicit CufileSession(const Cufile& library);
  // Closes what was opened where the library counts its users (cuFileDriverClose_v2). An older one would close the
  // session of everybody in the process, so there it stays open until the process ends.
  ~CufileSession();
  CufileSession(const CufileSession&) = delete;
  CufileSession& operator=(const CufileSession&) = delete;

  const Cufile& library() const noexcept { return library_; }
  const cufile::DriverProperties& properties() const noexcept { return properties_; }

 private:
  void close() noexcept;
  const Cufile& library_;
  bool opened_ = false;
  cufile::DriverProperties properties_;
};

struct CufileFacts {
  bool usable = false;  // transfers work, some way or other
  bool direct = false;  // they go past host memory, for files on storage that nvidia-fs supports
  std::string reason;   // one sentence
};

inline constexpr const char* kCufileLibrary = "libcufile.so.0";
inline constexpr const char* kNvidiaFsStatistics = "/proc/driver/nvidia-fs/stats";

// Of an open session.
CufileFacts cufile_facts(const CufileSession& session, const std::string& statistics_path = kNvidiaFsStatistics);
// Loads the library, opens it and closes it. Never throws.
CufileFacts probe_cufile(const std::string& library_path = kCufileLibrary,
                         const std::string& statistics_path = kNvidiaFsStatistics) noexcept;

}  // namespace tp
