// SPDX-License-Identifier: Apache-2.0
// The Python module: names, types and the GIL; no logic. Calls that can wait release the GIL and look for signals
// (Ctrl-C) meanwhile.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "base/error.hpp"
#include "bind/byte_tensor.hpp"
#include "bind/file_transfers.hpp"
#include "bind/interrupted.hpp"
#include "bind/recording.hpp"
#include "device/cufile.hpp"
#include "device/mapping_cost.hpp"
#include "io/probe.hpp"
#include "pager/event_ring.hpp"
#include "pager/page_size.hpp"
#include "pager/pager.hpp"

namespace py = pybind11;

namespace {

using tp::interrupted;
using tp::Pager;
using Int32Array = py::array_t<std::int32_t, py::array::c_style>;

const char* exception_name(const tp::Error& error) {
  switch (error.kind()) {
    case tp::ErrorKind::io: return error.error_number() == EBADMSG ? "CorruptPageError" : "IoError";
    case tp::ErrorKind::budget: return "BudgetError";
    case tp::ErrorKind::memory: return "MemoryMapError";
    case tp::ErrorKind::engine: return "EngineError";
    case tp::ErrorKind::closed: return "ClosedError";
    case tp::ErrorKind::forked: return "ForkedProcessError";
    case tp::ErrorKind::device: return "DeviceError";
    case tp::ErrorKind::invalid: return nullptr;
  }
  return nullptr;
}

void raise_python_error(const tp::Error& error) {
  const char* name = exception_name(error);
  if (name == nullptr) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return;
  }
  const py::object type = py::module_::import("tensorpager.errors").attr(name);
  const bool is_os_error = error.kind() == tp::ErrorKind::io;
  const py::object instance = is_os_error ? type(error.error_number(), error.what()) : type(error.what());
  PyErr_SetObject(type.ptr(), instance.ptr());
}

// A raw stream handle, as torch gives it. 0 is the legacy default stream; on the host it means nothing.
tp::cuda::Stream stream_of(std::uintptr_t handle) { return reinterpret_cast<tp::cuda::Stream>(handle); }

void acquire(Pager& pager, std::uint32_t set, std::uintptr_t stream) {
  const py::gil_scoped_release no_gil;
  pager.acquire(tp::SetId{set}, interrupted(), stream_of(stream));
}

// The GIL stays on the host, where nothing is called that could take time.
void release(Pager& pager, std::uint32_t set, std::uintptr_t stream) {
  if (pager.device() == nullptr) {
    pager.release(tp::SetId{set});
    return;
  }
  const py::gil_scoped_release no_gil;
  pager.release(tp::SetId{set}, stream_of(stream));
}

// What prefetch() gives: the ticket, and the pager that knows the streams. Python keeps the pager alive for it.
struct BoundTicket {
  BoundTicket(Pager& of_pager, std::unique_ptr<tp::Ticket> of_ticket) : pager(of_pager), ticket(std::move(of_ticket)) {}
  BoundTicket(const BoundTicket&) = delete;
  BoundTicket& operator=(const BoundTicket&) = delete;
  ~BoundTicket() {
    if (!waited_on) return;  // then no stream was told that the pages are there
    try {
      pager.release(*ticket, *waited_on);
    } catch (const tp::Error&) {  // still held, then, until the pager ends: better than taken from under a kernel
      static_cast<void>(ticket.release());
    }
  }

  Pager& pager;
  std::unique_ptr<tp::Ticket> ticket;
  std::optional<tp::cuda::Stream> waited_on;
};

std::int64_t hold(Pager& pager, std::uintptr_t address, std::uint64_t size_bytes, std::uintptr_t stream) {
  const py::gil_scoped_release no_gil;
  const auto set =
      pager.hold({reinterpret_cast<const std::byte*>(address), size_bytes}, interrupted(), stream_of(stream));
  return set ? static_cast<std::int64_t>(set->value) : -1;
}

// A capsule over bytes of the address space. It keeps the space, and with it the addresses, alive; not the pager.
py::capsule tensor(Pager& pager, std::uintptr_t address, std::uint64_t size_bytes) {
  const auto* begin = reinterpret_cast<const std::byte*>(address);
  const tp::PageId first = pager.space()->find(begin);
  const tp::PageId last = size_bytes == 0 ? first : pager.space()->find(begin + size_bytes - 1);
  if (!first.valid() || !last.valid())
    throw tp::Error(tp::ErrorKind::invalid, "tensor: the range lies outside the pager's address space");
  const bool on_device = pager.device() != nullptr && !pager.device_memory_is_host_memory();
  const tp::dlpack::Device device =
      on_device ? tp::dlpack::Device{tp::dlpack::kCuda, pager.device()->facts().ordinal} : tp::dlpack::Device{};
  return tp::byte_tensor(reinterpret_cast<std::byte*>(address), size_bytes, device, pager.space());
}

std::uint32_t add_set(Pager& pager, const std::vector<std::pair<std::uintptr_t, std::uint64_t>>& ranges,
                      const std::string& name) {
  std::vector<tp::AddressRange> address_ranges;
  address_ranges.reserve(ranges.size());
  for (const auto& [address, size_bytes] : ranges)
    address_ranges.push_back({reinterpret_cast<const std::byte*>(address), size_bytes});
  return pager.add_set(address_ranges, name).value;
}

Int32Array set_pages(const Pager& pager, std::uint32_t set) {
  const std::vector<tp::PageId>& pages = pager.set(tp::SetId{set}).pages;
  Int32Array result(static_cast<py::ssize_t>(pages.size()));
  std::int32_t* out = result.mutable_data();
  for (const tp::PageId page : pages) *out++ = static_cast<std::int32_t>(page.value);
  return result;
}

std::span<const std::int32_t> view(const Int32Array& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}

void set_schedule(Pager& pager, const Int32Array& step_set, const Int32Array& initial_pages,
                  const Int32Array& action_step, const Int32Array& action_deadline, const Int32Array& action_page_in,
                  const Int32Array& action_evict) {
  pager.set_schedule({view(step_set), view(initial_pages), view(action_step), view(action_deadline),
                      view(action_page_in), view(action_evict)});
}

std::uint32_t add_schedule(Pager& pager, const Int32Array& step_set, const Int32Array& initial_pages,
                           const Int32Array& action_step, const Int32Array& action_deadline,
                           const Int32Array& action_page_in, const Int32Array& action_evict, bool common) {
  return pager
      .add_schedule({view(step_set), view(initial_pages), view(action_step), view(action_deadline),
                     view(action_page_in), view(action_evict)},
                    common ? tp::ScheduleKind::common : tp::ScheduleKind::exact)
      .value;
}

std::optional<std::uint32_t> followed_schedule(const Pager& pager) {
  const std::optional<tp::ScheduleId> id = pager.followed_schedule();
  return id ? std::optional(id->value) : std::nullopt;
}

// Not array_t in the signature: its text would name a C++ type, which the generated stub can't express.
py::array events(const Pager& pager) {
  const std::vector<tp::Event> snapshot = pager.residency().events();
  return py::array_t<tp::Event>(static_cast<py::ssize_t>(snapshot.size()), snapshot.data());
}

py::array_t<std::uint8_t> page_states(const Pager& pager) {
  const std::vector<std::uint8_t> states = pager.residency().page_states();
  return py::array_t<std::uint8_t>(static_cast<py::ssize_t>(states.size()), states.data());
}

void add_counters(py::dict& result, const Pager& pager) {
  const tp::Counters counts = pager.residency().counters();
  result["acquires"] = counts.acquires;
  result["releases"] = counts.releases;
  result["page_accesses"] = counts.page_accesses;
  result["page_accesses_resident"] = counts.page_accesses_resident;
  result["page_ins"] = counts.page_ins;
  result["prefetches"] = counts.prefetches;
  result["faults"] = counts.faults;
  result["zero_fills"] = counts.zero_fills;
  result["host_hits"] = counts.host_hits;
  result["dequantised"] = counts.dequantised;
  result["dequantised_on_device"] = counts.dequantised_on_device;
  result["reads"] = counts.reads;
  result["direct_reads"] = counts.direct_reads;
  result["copies_out"] = counts.copies_out;
  result["evictions"] = counts.evictions;
  result["writebacks"] = counts.writebacks;
  result["stalls"] = counts.stalls;
  result["stall_ns"] = counts.stall_ns;
  result["touches"] = counts.touches;
  result["failures"] = counts.failures;
  result["passes"] = counts.passes;
  result["pinned_pages_max"] = counts.pinned_pages_max;
}

py::dict stats(const Pager& pager) {
  py::dict result;
  add_counters(result, pager);
  const tp::IoQueueFacts facts = pager.io_facts();
  result["engine"] = facts.engine;
  result["memory_registered"] = facts.memory_registered;
  result["memory_registered_reason"] = facts.memory_registered_reason;
  const tp::IoQueueCounters io = pager.io_counters();
  result["io_requests"] = io.requests;
  result["bytes_read"] = io.bytes_read;
  result["bytes_written"] = io.bytes_written;
  result["short_transfers"] = io.short_transfers;
  result["io_retries"] = io.retries;
  result["io_system_calls"] = io.system_calls;
  const tp::TapeCounters tape = pager.residency().tape_counters();
  result["schedule_position"] = tape.position;
  result["schedule_switches"] = tape.switches;
  result["schedule_jumps"] = tape.jumps;
  result["off_schedule_acquires"] = tape.off_schedule;
  result["budget_bytes"] = pager.budget_bytes();
  result["resident_bytes_max"] = pager.bytes_in_use_max();
  result["pinned_pages"] = pager.residency().pinned_pages();
  result["bytes_to_device"] = pager.bytes_to_device();
  result["bytes_to_host"] = pager.bytes_to_host();
  result["host_budget_bytes"] = pager.host_budget_bytes();
  result["host_bytes_max"] = pager.host_bytes_in_use_max();
  result["spill_bytes"] = pager.spill_bytes();
  result["events_overwritten"] = pager.residency().events_overwritten();
  return result;
}

tp::Transport transport_of(const std::string& name) {
  if (name == "auto") return tp::Transport::automatic;
  if (name == "host") return tp::Transport::host_tier;
  if (name == "cufile") return tp::Transport::cufile;
  throw tp::Error(tp::ErrorKind::invalid, "transport is '" + name + "'; it must be 'auto', 'host' or 'cufile'");
}

// A pagefile of Python's until a pager takes it over.
struct OwnedPagefile {
  std::optional<tp::Pagefile> pagefile;
  tp::Pagefile& get() {
    if (pagefile) return *pagefile;
    throw tp::Error(tp::ErrorKind::closed,
                    "the pagefile was closed, or given to a pager, which commits to it from now on");
  }
};

tp::PageId page_of(OwnedPagefile& self, std::uint32_t page) {
  if (page >= self.get().page_count()) throw py::index_error("page " + std::to_string(page));
  return tp::PageId{page};
}

void bind_pagefile(py::module_& module) {
  module.def("choose_host_page_bytes", &tp::choose_host_page_bytes, py::arg("budget_bytes"),
             "The page size of a host pager with this budget, unless another is asked for.");
  py::class_<tp::DamagedPage>(module, "DamagedPage",
                              "A page of a pagefile whose bytes are not those that were written.")
      .def_property_readonly("page", [](const tp::DamagedPage& self) { return self.page.value; })
      .def_readonly("file", &tp::DamagedPage::file)
      .def_readonly("offset_bytes", &tp::DamagedPage::offset_bytes)
      .def_readonly("why", &tp::DamagedPage::why);
  py::class_<OwnedPagefile, std::shared_ptr<OwnedPagefile>>(
      module, "Pagefile", "A durable store of pages, open: nobody else can open it meanwhile. One thread.")
      .def_static(
          "create",
          [](const std::vector<std::string>& directories, std::uint64_t page_bytes,
             const std::vector<double>& weights) {
            tp::PagefileOptions options;
            options.weights = weights;
            return OwnedPagefile{tp::Pagefile::create(directories, page_bytes, options)};
          },
          py::arg("directories"), py::kw_only(), py::arg("page_bytes"), py::arg("weights") = std::vector<double>{},
          py::call_guard<py::gil_scoped_release>(),
          "In directories that exist and hold none. weights: how they share the pages. IoError, ValueError.")
      .def_static(
          "open",
          [](const std::vector<std::string>& directories, const std::vector<double>& weights) {
            tp::PagefileOptions options;
            options.weights = weights;
            return OwnedPagefile{tp::Pagefile::open(directories, options)};
          },
          py::arg("directories"), py::kw_only(), py::arg("weights") = std::vector<double>{},
          py::call_guard<py::gil_scoped_release>(), "The last commit. The same directories in the same order. IoError.")
      .def_property_readonly("page_bytes", [](OwnedPagefile& self) { return self.get().page_bytes(); })
      .def_property_readonly("page_count", [](OwnedPagefile& self) { return self.get().page_count(); })
      .def_property_readonly("commit_number", [](OwnedPagefile& self) { return self.get().commit_number(); })
      .def_property_readonly("metadata",
                             [](OwnedPagefile& self) {
                               const std::span<const std::byte> bytes = self.get().metadata();
                               return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
                             })
      .def(
          "stored",
          [](OwnedPagefile& self, std::uint32_t page) { return self.get().record(page_of(self, page)).extent.valid(); },
          py::arg("page"), "Whether the page takes room; one that does not is all zeros. IndexError.")
      .def(
          "read",
          [](OwnedPagefile& self, std::uint32_t page) {
            const tp::PageId id = page_of(self, page);
            py::bytearray result;
            if (PyByteArray_Resize(result.ptr(), static_cast<Py_ssize_t>(self.get().page_bytes())) != 0)
              throw py::error_already_set();
            const std::span<std::byte> bytes(reinterpret_cast<std::byte*>(PyByteArray_AS_STRING(result.ptr())),
                                             self.get().page_bytes());
            const py::gil_scoped_release no_gil;
            self.get().read(id, bytes);
            return result;
          },
          py::arg("page"), "The page's bytes. IoError when they are not those that were written; IndexError.")
      .def(
          "check", [](OwnedPagefile& self, std::uint32_t page) { return self.get().check(page_of(self, page)); },
          py::arg("page"), py::call_guard<py::gil_scoped_release>(),
          "Reads a page of the last commit. What is wrong with it, or None. IndexError.")
      .def("close", [](OwnedPagefile& self) { self.pagefile.reset(); });
}

std::unique_ptr<Pager> make_pager(std::uint64_t budget_bytes, std::size_t page_bytes, const std::string& engine,
                                  unsigned io_depth, std::uint64_t inflight_bytes, const std::string& spill_directory,
                                  std::size_t event_capacity, int device, std::uint64_t host_budget_bytes,
                                  const std::string& driver_library, const std::string& transport,
                                  const std::string& cufile_library,
                                  const std::optional<std::shared_ptr<OwnedPagefile>>& pagefile) {
  const py::gil_scoped_release no_gil;
  tp::PagerOptions options;
  options.budget_bytes = budget_bytes;
  options.page_bytes = page_bytes;
  options.engine = engine;
  options.io_depth = io_depth;
  options.inflight_bytes = inflight_bytes;
  options.spill_directory = spill_directory;
  options.event_capacity = event_capacity;
  if (device >= 0) {
    const bool stand_in = !driver_library.empty();
    const tp::CudaDriver& driver = stand_in ? tp::CudaDriver::load(driver_library) : tp::CudaDriver::system();
    options.device =
        tp::DeviceOptions{&driver, device, host_budget_bytes, stand_in, transport_of(transport), cufile_library};
  }
  if (pagefile) {
    options.pagefile = std::make_shared<tp::PagefileStore>(std::move((*pagefile)->get()));
    (*pagefile)->pagefile.reset();
  }
  return std::make_unique<Pager>(options);
}

std::pair<std::uint64_t, std::uint64_t> device_memory(int ordinal) {
  const tp::CudaDevice device(tp::CudaDriver::system(), ordinal);
  return {device.free_bytes(), device.facts().total_bytes};
}

py::dict mapping_costs(int ordinal, std::size_t page_bytes_max, const std::string& driver_library) {
  std::vector<tp::MappingCost> costs;
  double link_bytes_per_second = 0;
  std::string name;
  {
    const py::gil_scoped_release no_gil;
    const bool stand_in = !driver_library.empty();
    const tp::CudaDevice device(stand_in ? tp::CudaDriver::load(driver_library) : tp::CudaDriver::system(), ordinal);
    name = device.facts().name;
    costs = tp::measure_mapping_cost(device, page_bytes_max);
    link_bytes_per_second = tp::measure_link_bandwidth(device);
  }
  py::list rows;
  for (const tp::MappingCost& cost : costs)
    rows.append(py::dict(py::arg("page_bytes") = cost.page_bytes, py::arg("map_ns") = cost.map_ns,
                         py::arg("unmap_ns") = cost.unmap_ns));
  return py::dict(py::arg("device") = name, py::arg("link_bytes_per_second") = link_bytes_per_second,
                  py::arg("costs") = rows);
}

void bind_probe(py::module_& module) {
  py::class_<tp::EngineCandidate>(module, "EngineCandidate", "An I/O engine and whether, and why, it can run here.")
      .def_readonly("engine", &tp::EngineCandidate::engine)
      .def_readonly("usable", &tp::EngineCandidate::usable)
      .def_readonly("reason", &tp::EngineCandidate::reason);
  py::class_<tp::DirectoryFacts>(module, "DirectoryFacts", "What a directory's file system offers.")
      .def_readonly("directory", &tp::DirectoryFacts::directory)
      .def_readonly("file_system", &tp::DirectoryFacts::file_system)
      .def_readonly("direct", &tp::DirectoryFacts::direct)
      .def_readonly("align_bytes", &tp::DirectoryFacts::align_bytes)
      .def_readonly("reason", &tp::DirectoryFacts::reason);
  module.def("probe_engines", &tp::probe_engines, py::call_guard<py::gil_scoped_release>(),
             "Engines, best first, each with its reason.");
  module.def("device_memory", &device_memory, py::arg("device"), py::call_guard<py::gil_scoped_release>(),
             "(free, total) bytes of a CUDA device now. EngineError when it can't be used, DeviceError.");
  py::class_<tp::CufileFacts>(module, "CufileFacts", "Whether cuFile (GPUDirect Storage) works here, and directly.")
      .def_readonly("usable", &tp::CufileFacts::usable)
      .def_readonly("direct", &tp::CufileFacts::direct)
      .def_readonly("reason", &tp::CufileFacts::reason);
  module.def(
      "probe_cufile", [] { return tp::probe_cufile(); }, py::call_guard<py::gil_scoped_release>(),
      "Loads cuFile, opens it and closes it. Raises nothing.");
  module.def("mapping_costs", &mapping_costs, py::arg("device"), py::arg("page_bytes_max") = std::size_t{32} << 20,
             py::arg("driver_library") = "",
             "Measured now: medians of mapping and unmapping a page of each size, ns, and the link's bandwidth. "
             "EngineError, DeviceError.");
  module.def("probe_directory", &tp::probe_directory, py::arg("directory"), py::call_guard<py::gil_scoped_release>(),
             "What the directory's file system offers; IoError if it can't be written.");
}

void bind_pager_commits(py::class_<Pager>& pager) {
  pager
      .def(
          "commit",
          [](Pager& self, const py::bytes& metadata) {
            const std::string_view view = metadata;
            const py::gil_scoped_release no_gil;
            self.commit(std::as_bytes(std::span(view)), interrupted());
          },
          py::arg("metadata"),
          "Make what the pages hold now the pagefile's next commit, with this metadata. Blocks until it is on the "
          "drive; nobody may write to the pages meanwhile. ValueError without a pagefile, or when a page was written "
          "to "
          "all the same; IoError, and then the commit before is whole; KeyboardInterrupt.")
      .def_property_readonly("commit_number", &Pager::commit_number, "Of the last commit; 0 before the first.");
}

void bind_pager_paging(py::class_<Pager>& pager) {
  pager
      .def("add_set", &add_set, py::arg("ranges"), py::arg("name"),
           "Pages of (address, size_bytes) ranges that one step needs together; returns the set id. Equal pages, equal "
           "id.")
      .def("set_pages", &set_pages, py::arg("set_id"), "Ascending page numbers of a set, int32.")
      .def(
          "set_name", [](const Pager& self, std::uint32_t set) { return self.set(tp::SetId{set}).name; },
          py::arg("set_id"))
      .def("acquire", &acquire, py::arg("set_id"), py::arg("stream") = 0,
           "Wait until every page of the set is resident and forbid eviction until release(). Counted. On a device: "
           "until the copies are issued, and the stream (a raw handle) waits for them. Raises BudgetError, IoError, "
           "DeviceError, ClosedError, ForkedProcessError, KeyboardInterrupt; then nothing is acquired.")
      .def("release", &release, py::arg("set_id"), py::arg("stream") = 0,
           "Let the pages go: on a device, once the stream has done all it holds now.")
      .def(
          "mark_written", [](Pager& self, std::uint32_t set) { self.mark_written(tp::SetId{set}); }, py::arg("set_id"),
          "The device writes to the pages of the set, which is acquired. ValueError if it is not.")
      .def(
          "discard",
          [](Pager& self, std::uintptr_t address, std::uint64_t size_bytes) {
            return self.discard({reinterpret_cast<const std::byte*>(address), size_bytes});
          },
          py::arg("address"), py::arg("size_bytes"), py::call_guard<py::gil_scoped_release>(),
          "Forget what the whole pages of a range in spill regions hold, dirty or spilled: they need not be written, "
          "nor read. Until they are acquired, held, or wanted() again they show zeros or what they held, and what is "
          "written to them may be lost. Pages in use, of files and on a device stay as they are. Returns how many were "
          "discarded. ValueError.")
      .def(
          "wanted",
          [](Pager& self, std::uintptr_t address, std::uint64_t size_bytes) {
            self.wanted({reinterpret_cast<const std::byte*>(address), size_bytes});
          },
          py::arg("address"), py::arg("size_bytes"), py::call_guard<py::gil_scoped_release>(),
          "End a discard() without bringing anything in: from now on what is written to the range is kept. ValueError.")
      .def(
          "synchronize",
          [](Pager& self, std::uintptr_t stream) {
            const py::gil_scoped_release no_gil;
            self.synchronize(stream_of(stream));
          },
          py::arg("stream") = 0, "Wait until the stream has done all it holds; nothing on the host.")
      .def("hold", &hold, py::arg("address"), py::arg("size_bytes"), py::arg("stream") = 0,
           "acquire() for a byte range; returns the set id for release(), or -1 when it is more than the budget can "
           "hold at once: then "
           "nothing is pinned and every page comes in as it is touched, which a device can't do: BudgetError.")
      .def(
          "prefetch",
          [](Pager& self, std::uint32_t set) {
            return std::make_unique<BoundTicket>(self, self.prefetch(tp::SetId{set}));
          },
          py::arg("set_id"), py::keep_alive<0, 1>(),
          "Begin to acquire a set without waiting; returns a Ticket. Served after demand. BudgetError, ClosedError.")
      .def("begin_pass", &Pager::begin_pass,
           "The model's root is entered: the schedule's position goes to the next start of its cycle.")
      .def("set_schedule", &set_schedule, py::kw_only(), py::arg("step_set"), py::arg("initial_pages"),
           py::arg("action_step"), py::arg("action_deadline"), py::arg("action_page_in"), py::arg("action_evict"),
           "One cycle, repeated for ever; tensorpager.pass_plan defines the arrays (int32). ValueError names array and "
           "index. It is followed from its start, and every other one forgotten.")
      .def("clear_schedule", &Pager::clear_schedule, "Forget every schedule.");
}

void bind_pager_schedules(py::class_<Pager>& pager) {
  pager
      .def(
          "add_schedule", &add_schedule, py::kw_only(), py::arg("step_set"), py::arg("initial_pages"),
          py::arg("action_step"), py::arg("action_deadline"), py::arg("action_page_in"), py::arg("action_evict"),
          py::arg("common") = false,
          "Know one more schedule (see set_schedule) beside the others; returns its id. The first is followed at once. "
          "A pass that leaves the followed one for steps with which another begins goes on with that one. common: it "
          "is what several passes have in common, so steps that are not in it are no reason to leave it. ValueError.")
      .def(
          "follow_schedule", [](Pager& self, std::uint32_t id) { self.follow_schedule(tp::ScheduleId{id}); },
          py::arg("schedule_id"), "Follow a known schedule from the start of its cycle. ValueError.")
      .def(
          "forget_schedule", [](Pager& self, std::uint32_t id) { self.forget_schedule(tp::ScheduleId{id}); },
          py::arg("schedule_id"),
          "If it is followed, the known one that was followed before it is followed next. ValueError.")
      .def_property_readonly("followed_schedule", &followed_schedule,
                             "Id of the schedule that is followed, or None. A pass may change it at any acquire.");
}

void bind_ticket(py::module_& module) {
  py::class_<BoundTicket>(module, "Ticket", "An acquire under way. It holds its pages until release() or its end.")
      .def_property_readonly(
          "done", [](const BoundTicket& self) { return self.ticket->done(); },
          "Whether wait() would return, or raise, at once.")
      .def(
          "wait",
          [](BoundTicket& self, std::uintptr_t stream) {
            const py::gil_scoped_release no_gil;
            self.pager.wait(*self.ticket, interrupted(), stream_of(stream));
            self.waited_on = stream_of(stream);
          },
          py::arg("stream") = 0,
          "Wait until every page is resident. IoError, BudgetError, ClosedError, KeyboardInterrupt.")
      .def(
          "release",
          [](BoundTicket& self, std::uintptr_t stream) {
            self.pager.release(*self.ticket, stream_of(stream));
            self.waited_on.reset();
          },
          py::arg("stream") = 0, "Let the pages go. Idempotent.");
}

void bind_pager_facts(py::class_<Pager>& pager) {
  pager.def_property_readonly("page_bytes", &Pager::page_bytes)
      .def_property_readonly("page_count", [](const Pager& self) { return self.space()->page_count(); })
      .def_property_readonly("frame_count", &Pager::frame_count)
      .def_property_readonly(
          "pinnable_page_count", [](const Pager& self) { return self.residency().pinnable_pages(); },
          "Most pages that steps may hold at once: the frames less those kept for stray accesses.")
      .def_property_readonly("budget_bytes", &Pager::budget_bytes)
      .def_property_readonly("transport", &Pager::transport,
                             "How pages of files get to the device: 'host' or 'cufile'; empty without a device.")
      .def_property_readonly("transport_reason", &Pager::transport_reason, "Why that one.")
      .def_property_readonly(
          "device", [](const Pager& self) { return self.device() == nullptr ? -1 : self.device()->facts().ordinal; },
          "Number of the CUDA device, -1 on the host.")
      .def_property_readonly("device_memory_is_host_memory", &Pager::device_memory_is_host_memory,
                             "With a stand-in for the driver: tensors are the CPU's.")
      .def_property_readonly("closed", &Pager::closed)
      .def_property_readonly("quantised_reason", &Pager::quantised_reason,
                             "Why a device's quantised pages are made on the host; empty when they are not.")
      .def("page_states", &page_states, "State of every page, uint8: an index into PAGE_STATES.")
      .def("stats", &stats, "Counters since the start or reset_stats().")
      .def("reset_stats", &Pager::reset_statistics)
      .def("events", &events, "The last events, oldest first; see EVENT_KINDS.")
      .def("close", &Pager::close, py::call_guard<py::gil_scoped_release>(),
           "Drain transfers, fail those who wait, free the memory. Idempotent.");
}

tp::kernel::QuantisedFormat code_format(const std::string& name) {
  if (name == "int8") return tp::kernel::QuantisedFormat::int8;
  if (name == "float8_e4m3fn") return tp::kernel::QuantisedFormat::fp8_e4m3;
  if (name == "float8_e5m2") return tp::kernel::QuantisedFormat::fp8_e5m2;
  throw tp::Error(tp::ErrorKind::invalid,
                  "weights can't be stored as '" + name + "': choose 'int8', 'float8_e4m3fn' or 'float8_e5m2'");
}

tp::kernel::FloatFormat number_format(const std::string& name) {
  if (name == "bfloat16") return tp::kernel::FloatFormat::bfloat16;
  if (name == "float16") return tp::kernel::FloatFormat::float16;
  throw tp::Error(tp::ErrorKind::invalid, "numbers are 'bfloat16' or 'float16', not '" + name + "'");
}

std::uint64_t append_numbers(tp::QuantisedFile& self, const py::array_t<std::uint16_t, py::array::c_style>& numbers) {
  const std::span<const std::uint16_t> all(numbers.data(), static_cast<std::size_t>(numbers.size()));
  const py::gil_scoped_release released;
  return self.append(all);
}

void bind_quantised_file(py::module_& module) {
  py::class_<tp::QuantisedFile>(module, "QuantisedFile",
                                "Pages of 16-bit numbers as 8-bit codes with a float32 scale for each block, in a file "
                                "without a name; for Pager.map_quantised. One thread.")
      .def(py::init([](const std::string& directory, std::size_t page_bytes, const std::string& codes,
                       const std::string& numbers, std::uint32_t block_elements) {
             const tp::QuantisedLayout layout{code_format(codes), number_format(numbers), block_elements};
             return tp::QuantisedFile(directory, layout, page_bytes);
           }),
           py::kw_only(), py::arg("directory"), py::arg("page_bytes"), py::arg("codes"), py::arg("numbers"),
           py::arg("block_elements") = tp::QuantisedLayout{}.block_elements,
           "codes: 'int8', 'float8_e4m3fn' or 'float8_e5m2'. numbers: 'bfloat16' or 'float16'. block_elements: a power "
           "of two from 8 to 65536. IoError, ValueError.")
      .def("append", &append_numbers, py::arg("numbers"),
           "Quantise and write the numbers (uint16: their bits), from a new page on. Returns that page's place. "
           "IoError; ValueError for infinities and NaN.")
      .def_property_readonly("record_count", &tp::QuantisedFile::record_count)
      .def_property_readonly("size_bytes", &tp::QuantisedFile::size_bytes);
}

void bind_region(py::module_& module) {
  py::class_<tp::Region>(module, "Region", "Part of the address space backed by one file or by spill.")
      .def_property_readonly("address",
                             [](const tp::Region& self) { return reinterpret_cast<std::uintptr_t>(self.address); })
      .def_readonly("size_bytes", &tp::Region::size_bytes)
      .def_property_readonly("first_page", [](const tp::Region& self) { return self.pages.first; })
      .def_property_readonly("page_count", [](const tp::Region& self) { return self.pages.count; });
}

}  // namespace

PYBIND11_MODULE(_core, module, py::mod_gil_not_used()) {
  module.doc() =
      "Native core of tensorpager: address space, frames, I/O engines, executor. Use through tensorpager.page().";
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const tp::Error& error) {
      raise_python_error(error);
    }
  });
  PYBIND11_NUMPY_DTYPE(tp::Event, time_ns, page, frame, step, set, thread, kind);
  py::list kinds, states;
  for (const char* name : tp::kEventKindNames) kinds.append(name);
  for (std::size_t state = 0; state < tp::kPageStateCount; ++state)
    states.append(tp::page_state_name(static_cast<tp::PageState>(state)));
  module.attr("EVENT_KINDS") = kinds;
  module.attr("PAGE_STATES") = states;

  bind_probe(module);
  bind_region(module);

  bind_ticket(module);
  bind_quantised_file(module);
  bind_pagefile(module);
  tp::bind_file_transfers(module);
  py::class_<Pager> pager(module, "Pager",
                          "Page table, frames and executor thread. Any thread; waiting releases the GIL.");
  pager
      .def(
          py::init(&make_pager), py::kw_only(), py::arg("budget_bytes"), py::arg("page_bytes") = 0,
          py::arg("engine") = "auto", py::arg("io_depth") = 0, py::arg("inflight_bytes") = 0,
          py::arg("spill_directory") = "", py::arg("event_capacity") = 65536, py::arg("device") = -1,
          py::arg("host_budget_bytes") = 0, py::arg("driver_library") = "", py::arg("transport") = "auto",
          py::arg("cufile_library") = "", py::arg("pagefile") = py::none(),
          "Allocates budget_bytes // page_bytes frames at once. device: -1 for the host, or a CUDA device's number; "
          "then the frames are its memory, and host_budget_bytes (0: 1 GiB) is for the tier beneath. driver_library: "
          "for tests, a stand-in for the driver whose device memory is host memory. transport, of files to a device: "
          "'auto' "
          "(cuFile where it is direct), 'host' or 'cufile'. pagefile: where modified pages go instead of the spill, so "
          "that commit() can be called; taken over. BudgetError, MemoryMapError, EngineError, DeviceError, "
          "ValueError.")
      .def("map_file", &Pager::map_file, py::arg("path"), py::arg("aligned_offset_bytes") = 0,
           py::call_guard<py::gil_scoped_release>(),
           "Reserve addresses for a file, read-only: byte i is at Region.address + i. On a device the byte at "
           "aligned_offset_bytes lies at a multiple of 256. IoError.")
      .def("map_spill", &Pager::map_spill, py::arg("size_bytes"), py::call_guard<py::gil_scoped_release>(),
           "Reserve addresses for new bytes, zero until written.")
      .def(
          "map_quantised", [](Pager& self, tp::QuantisedFile& file) { return self.map_quantised(std::move(file)); },
          py::arg("file"), py::call_guard<py::gil_scoped_release>(),
          "Reserve addresses for the pages of a file, record i at Region.address + i * page_bytes. Takes the file "
          "over. "
          "ValueError.")
      .def("tensor", &tensor, py::arg("address"), py::arg("size_bytes"),
           "DLPack capsule of a 1-D uint8 tensor over the range, with a storage of its own; keeps the addresses "
           "reserved.")
      .def(
          "contains",
          [](const Pager& self, std::uintptr_t address) {
            return self.space()->find(reinterpret_cast<const void*>(address)).valid();
          },
          py::arg("address"));
  bind_pager_paging(pager);
  bind_pager_commits(pager);
  tp::bind_recording(pager);
  bind_pager_schedules(pager);
  bind_pager_facts(pager);
}
