// SPDX-License-Identifier: Apache-2.0
// Names, types, the GIL, and who keeps memory alive; no logic.
#include "bind/file_transfers.hpp"

#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "base/error.hpp"
#include "bind/byte_tensor.hpp"
#include "bind/interrupted.hpp"
#include "io/file_transfers.hpp"
#include "io/locked_memory.hpp"

namespace tp {
namespace {

namespace py = pybind11;

// The transfers, and the owners of the memory of those that have not been waited for.
class OwningTransfers {
 public:
  OwningTransfers(std::uint64_t block_bytes, unsigned depth, unsigned threads, bool one_at_a_time,
                  const std::string& engine) {
    const py::gil_scoped_release no_gil;
    FileTransferOptions options;
    options.block_bytes = block_bytes;
    options.depth = depth;
    options.threads = threads;
    options.one_at_a_time = one_at_a_time;
    options.engine = engine;
    transfers_ = std::make_unique<FileTransfers>(options);
  }
  OwningTransfers(const OwningTransfers&) = delete;
  OwningTransfers& operator=(const OwningTransfers&) = delete;
  ~OwningTransfers() {
    const py::gil_scoped_release no_gil;
    transfers_.reset();  // waits for all of them; the owners go after that, with the lock
  }

  template <typename Start>
  void start(py::object owner, const Start& start_one) {
    std::uint64_t id = 0;
    {
      const py::gil_scoped_release no_gil;
      id = start_one(*transfers_, false);
    }
    keep(id, std::move(owner));
  }

  template <typename Start>
  void start_and_wait(py::object owner, const Start& start_one) {
    std::uint64_t id = 0;
    try {
      const py::gil_scoped_release no_gil;
      id = start_one(*transfers_, true);
      transfers_->wait_for(id, interrupted());
    } catch (const py::error_already_set&) {  // goes on: wait() is who waits for it now
      keep(id, std::move(owner));
      throw;
    }
  }

  std::size_t wait() {
    Owners waited_for = take_owners();  // they go at the end, whether or not a transfer failed
    try {
      const py::gil_scoped_release no_gil;
      return transfers_->wait(interrupted());
    } catch (const py::error_already_set&) {  // the transfers go on
      const std::lock_guard lock(mutex_);
      owners_.merge(waited_for);
      throw;
    }
  }

  py::dict stats() const {
    const FileTransferCounters counters = transfers_->counters();
    py::dict result;
    result["engine"] = transfers_->engine();
    result["io_requests"] = counters.queues.requests;
    result["bytes_read"] = counters.queues.bytes_read;
    result["bytes_written"] = counters.queues.bytes_written;
    result["bounced_bytes"] = counters.bounced_bytes;
    result["short_transfers"] = counters.queues.short_transfers;
    result["io_retries"] = counters.queues.retries;
    result["io_system_calls"] = counters.queues.system_calls;
    return result;
  }

 private:
  using Owners = std::map<std::uint64_t, py::object>;  // by transfer

  void keep(std::uint64_t id, py::object owner) {
    const std::lock_guard lock(mutex_);
    owners_.emplace(id, std::move(owner));
  }
  Owners take_owners() {
    const std::lock_guard lock(mutex_);
    return std::exchange(owners_, {});
  }

  std::mutex mutex_;  // of owners_: there are Pythons without a GIL
  Owners owners_;
  std::unique_ptr<FileTransfers> transfers_;
};

auto reading(const std::string& path, std::uint64_t offset_bytes, std::uintptr_t address, std::uint64_t size_bytes) {
  return [=](FileTransfers& transfers, bool alone) {
    return transfers.start_read(path, offset_bytes, {reinterpret_cast<std::byte*>(address), size_bytes}, alone);
  };
}

template <typename Target>  // a path, or a descriptor
auto writing(const Target& target, std::uint64_t offset_bytes, std::uintptr_t address, std::uint64_t size_bytes) {
  return [=](FileTransfers& transfers, bool alone) {
    return transfers.start_write(target, offset_bytes, {reinterpret_cast<const std::byte*>(address), size_bytes},
                                 alone);
  };
}

void bind_transfers(py::module_& module) {
  py::class_<OwningTransfers>(module, "FileTransfers",
                              "Transfers between files and memory at addresses, done by threads of its own. owner: an "
                              "object that keeps the memory alive, held until the transfer has been waited for. Any "
                              "thread; waiting releases the GIL. Dropping it waits for all.")
      .def(py::init<std::uint64_t, unsigned, unsigned, bool, const std::string&>(), py::kw_only(),
           py::arg("block_bytes"), py::arg("depth"), py::arg("threads") = 1, py::arg("one_at_a_time") = false,
           py::arg("engine") = "auto", "EngineError, ValueError.")
      .def(
          "start_read",
          [](OwningTransfers& self, const py::bytes& path, std::uint64_t offset_bytes, std::uintptr_t address,
             std::uint64_t size_bytes, py::object owner) {
            self.start(std::move(owner), reading(std::string(path), offset_bytes, address, size_bytes));
          },
          py::arg("path"), py::arg("offset_bytes"), py::arg("address"), py::arg("size_bytes"), py::arg("owner"),
          "IoError when the file can't be opened or ends before the range does; MemoryMapError, ForkedProcessError.")
      .def(
          "start_write",
          [](OwningTransfers& self, const py::bytes& path, std::uint64_t offset_bytes, std::uintptr_t address,
             std::uint64_t size_bytes, py::object owner) {
            self.start(std::move(owner), writing(std::string(path), offset_bytes, address, size_bytes));
          },
          py::arg("path"), py::arg("offset_bytes"), py::arg("address"), py::arg("size_bytes"), py::arg("owner"),
          "Makes the file where there is none, mode 0600, and room in it. IoError when the disk has none; "
          "MemoryMapError, ForkedProcessError.")
      .def(
          "start_write_to",
          [](OwningTransfers& self, int descriptor, std::uint64_t offset_bytes, std::uintptr_t address,
             std::uint64_t size_bytes, py::object owner) {
            self.start(std::move(owner), writing(descriptor, offset_bytes, address, size_bytes));
          },
          py::arg("descriptor"), py::arg("offset_bytes"), py::arg("address"), py::arg("size_bytes"), py::arg("owner"),
          "To a file that is open for writing. IoError, MemoryMapError, ForkedProcessError.")
      .def(
          "read",
          [](OwningTransfers& self, const py::bytes& path, std::uint64_t offset_bytes, std::uintptr_t address,
             std::uint64_t size_bytes, py::object owner) {
            self.start_and_wait(std::move(owner), reading(std::string(path), offset_bytes, address, size_bytes));
          },
          py::arg("path"), py::arg("offset_bytes"), py::arg("address"), py::arg("size_bytes"), py::arg("owner"),
          "start_read(), and wait for this one alone. KeyboardInterrupt: wait() waits for it then.")
      .def(
          "write",
          [](OwningTransfers& self, const py::bytes& path, std::uint64_t offset_bytes, std::uintptr_t address,
             std::uint64_t size_bytes, py::object owner) {
            self.start_and_wait(std::move(owner), writing(std::string(path), offset_bytes, address, size_bytes));
          },
          py::arg("path"), py::arg("offset_bytes"), py::arg("address"), py::arg("size_bytes"), py::arg("owner"),
          "start_write(), and wait for this one alone. KeyboardInterrupt: wait() waits for it then.")
      .def("wait", &OwningTransfers::wait,
           "Wait for those started; how many, each counted once. IoError of the first that failed, when all are done. "
           "KeyboardInterrupt, after which they go on.")
      .def("stats", &OwningTransfers::stats);
}

void bind_locked_memory(py::module_& module) {
  module.def(
      "locked_tensor",
      [](std::uint64_t size_bytes) {
        if (size_bytes == 0) throw Error(ErrorKind::invalid, "a locked tensor of 0 bytes");
        LockedMemory* pool = &locked_memory();
        std::span<std::byte> memory;
        {
          const py::gil_scoped_release no_gil;
          memory = pool->take(size_bytes);
        }
        const std::shared_ptr<void> owner(memory.data(), [pool](void* base) {
          if (pool == &locked_memory()) pool->put(static_cast<std::byte*>(base));  // not in a child of fork()
        });
        return byte_tensor(memory.data(), size_bytes, {}, owner);
      },
      py::arg("size_bytes"),
      "DLPack capsule of a 1-D uint8 tensor in huge pages, locked in RAM where the limit on that allows it. Its memory "
      "is used again when it dies. MemoryMapError.");
  module.def(
      "is_locked",
      [](std::uintptr_t address, std::uint64_t size_bytes) {
        return locked_memory().contains(reinterpret_cast<const std::byte*>(address), size_bytes);
      },
      py::arg("address"), py::arg("size_bytes"), "Whether the range lies in one locked_tensor() that lives.");
  module.def(
      "is_locked_base",
      [](std::uintptr_t address) { return locked_memory().starts_at(reinterpret_cast<const std::byte*>(address)); },
      py::arg("address"), "Whether a locked_tensor() that lives starts there.");
  module.def("locked_memory_stats", [] {
    const LockedMemoryCounters counters = locked_memory().counters();
    py::dict result;
    result["bytes_taken"] = counters.bytes_taken;
    result["bytes_free"] = counters.bytes_free;
    result["bytes_locked"] = counters.bytes_locked;
    result["blocks_made"] = counters.blocks_made;
    return result;
  });
}

}  // namespace

void bind_file_transfers(py::module_& module) {
  bind_transfers(module);
  bind_locked_memory(module);
}

}  // namespace tp
