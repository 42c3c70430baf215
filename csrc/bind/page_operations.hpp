// SPDX-License-Identifier: Apache-2.0
// Pager's page operations as Python calls them: without the GIL where they may wait, and, on a thread that asked for
// it, as calls of a Python object instead.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bind/interrupted.hpp"
#include "pager/pager.hpp"

namespace tp {

// Where one thread's page operations go. What the handler calls itself goes through to the pager.
class Redirection {
 public:
  static Redirection& of_this_thread() {
    thread_local Redirection redirection;
    return redirection;
  }
  // The handler that takes an operation of this pager; null: the pager does.
  static pybind11::handle handler(const Pager& pager) {
    const Redirection& here = of_this_thread();
    return here.pager_ == &pager && !here.handles_ ? pybind11::handle(here.handler_) : pybind11::handle();
  }
  void set(const Pager& pager, const pybind11::object& handler) {
    Py_CLEAR(handler_);
    pager_ = handler.is_none() ? nullptr : &pager;
    if (pager_ != nullptr) handler_ = pybind11::object(handler).release().ptr();
  }
  template <class... Arguments>
  static pybind11::object call(pybind11::handle handler, const char* method, Arguments... arguments) {
    const Handling handling;
    return handler.attr(method)(arguments...);
  }

 private:
  struct Handling {
    Handling() { of_this_thread().handles_ = true; }
    ~Handling() { of_this_thread().handles_ = false; }
    Handling(const Handling&) = delete;
    Handling& operator=(const Handling&) = delete;
  };

  const Pager* pager_ = nullptr;
  PyObject* handler_ = nullptr;  // owned; a thread that ends without having reset it leaks it
  bool handles_ = false;
};

// A raw stream handle, as torch gives it. 0 is the legacy default stream; on the host it means nothing.
inline cuda::Stream stream_of(std::uintptr_t handle) { return reinterpret_cast<cuda::Stream>(handle); }

inline void acquire(Pager& pager, std::uint32_t set, std::uintptr_t stream) {
  if (const pybind11::handle handler = Redirection::handler(pager)) {
    Redirection::call(handler, "acquire", set, stream);
    return;
  }
  const pybind11::gil_scoped_release no_gil;
  pager.acquire(SetId{set}, interrupted(), stream_of(stream));
}

// The GIL stays on the host, where nothing is called that could take time.
inline void release(Pager& pager, std::uint32_t set, std::uintptr_t stream) {
  if (const pybind11::handle handler = Redirection::handler(pager)) {
    Redirection::call(handler, "release", set, stream);
    return;
  }
  if (pager.device() == nullptr) {
    pager.release(SetId{set});
    return;
  }
  const pybind11::gil_scoped_release no_gil;
  pager.release(SetId{set}, stream_of(stream));
}

inline void mark_written(Pager& pager, std::uint32_t set) {
  if (const pybind11::handle handler = Redirection::handler(pager)) {
    Redirection::call(handler, "mark_written", set);
  } else {
    pager.mark_written(SetId{set});
  }
}

inline std::int64_t hold(Pager& pager, std::uintptr_t address, std::uint64_t size_bytes, std::uintptr_t stream) {
  if (const pybind11::handle handler = Redirection::handler(pager))
    return Redirection::call(handler, "hold", address, size_bytes, stream).cast<std::int64_t>();
  const pybind11::gil_scoped_release no_gil;
  const auto set =
      pager.hold({reinterpret_cast<const std::byte*>(address), size_bytes}, interrupted(), stream_of(stream));
  return set ? static_cast<std::int64_t>(set->value) : -1;
}

}  // namespace tp
