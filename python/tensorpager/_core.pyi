# SPDX-License-Identifier: Apache-2.0
# Generated from the extension: change csrc/bind, then run "make stubs".
"""
Native core of tensorpager: address space, frames, I/O engines, executor. Use through tensorpager.page().
"""

import collections.abc
import typing

import numpy
import numpy.typing
import typing_extensions

__all__: list[str] = [
    "CufileFacts",
    "DamagedPage",
    "DirectoryFacts",
    "EVENT_KINDS",
    "EngineCandidate",
    "FileTransfers",
    "PAGE_STATES",
    "Pagefile",
    "Pager",
    "QuantisedFile",
    "Region",
    "Ticket",
    "choose_host_page_bytes",
    "device_memory",
    "is_locked",
    "is_locked_base",
    "locked_memory_stats",
    "locked_tensor",
    "mapping_costs",
    "probe_cufile",
    "probe_directory",
    "probe_engines",
]

class EngineCandidate:
    """
    An I/O engine and whether, and why, it can run here.
    """
    @property
    def engine(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def usable(self) -> bool: ...

class DirectoryFacts:
    """
    What a directory's file system offers.
    """
    @property
    def align_bytes(self) -> int: ...
    @property
    def direct(self) -> bool: ...
    @property
    def directory(self) -> str: ...
    @property
    def file_system(self) -> str: ...
    @property
    def reason(self) -> str: ...

class CufileFacts:
    """
    Whether cuFile (GPUDirect Storage) works here, and directly.
    """
    @property
    def direct(self) -> bool: ...
    @property
    def reason(self) -> str: ...
    @property
    def usable(self) -> bool: ...

class Region:
    """
    Part of the address space backed by one file or by spill.
    """
    @property
    def address(self) -> int: ...
    @property
    def first_page(self) -> int: ...
    @property
    def page_count(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...

class Ticket:
    """
    An acquire under way. It holds its pages until release() or its end.
    """
    def release(self, stream: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        """
        Let the pages go. Idempotent.
        """
    def wait(self, stream: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        """
        Wait until every page is resident. IoError, BudgetError, ClosedError, KeyboardInterrupt.
        """
    @property
    def done(self) -> bool:
        """
        Whether wait() would return, or raise, at once.
        """

class QuantisedFile:
    """
    Pages of 16-bit numbers as 8-bit codes with a float32 scale for each block, in a file without a name; for Pager.map_quantised. One thread.
    """
    def __init__(
        self,
        *,
        directory: str,
        page_bytes: typing.SupportsInt | typing.SupportsIndex,
        codes: str,
        numbers: str,
        block_elements: typing.SupportsInt | typing.SupportsIndex = 128,
    ) -> None:
        """
        codes: 'int8', 'float8_e4m3fn' or 'float8_e5m2'. numbers: 'bfloat16' or 'float16'. block_elements: a power of two from 8 to 65536. IoError, ValueError.
        """
    def append(self, numbers: typing.Annotated[numpy.typing.ArrayLike, numpy.uint16]) -> int:
        """
        Quantise and write the numbers (uint16: their bits), from a new page on. Returns that page's place. IoError; ValueError for infinities and NaN.
        """
    @property
    def record_count(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...

class DamagedPage:
    """
    A page of a pagefile whose bytes are not those that were written.
    """
    @property
    def file(self) -> str: ...
    @property
    def offset_bytes(self) -> int: ...
    @property
    def page(self) -> int: ...
    @property
    def why(self) -> str: ...

class Pagefile:
    """
    A durable store of pages, open: nobody else can open it meanwhile. One thread.
    """
    @staticmethod
    def create(
        directories: collections.abc.Sequence[str],
        *,
        page_bytes: typing.SupportsInt | typing.SupportsIndex,
        weights: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex] = [],
    ) -> Pagefile:
        """
        In directories that exist and hold none. weights: how they share the pages. IoError, ValueError.
        """
    @staticmethod
    def open(
        directories: collections.abc.Sequence[str],
        *,
        weights: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex] = [],
    ) -> Pagefile:
        """
        The last commit. The same directories in the same order. IoError.
        """
    def check(self, page: typing.SupportsInt | typing.SupportsIndex) -> DamagedPage | None:
        """
        Reads a page of the last commit. What is wrong with it, or None. IndexError.
        """
    def close(self) -> None: ...
    def read(self, page: typing.SupportsInt | typing.SupportsIndex) -> bytearray:
        """
        The page's bytes. IoError when they are not those that were written; IndexError.
        """
    def stored(self, page: typing.SupportsInt | typing.SupportsIndex) -> bool:
        """
        Whether the page takes room; one that does not is all zeros. IndexError.
        """
    @property
    def commit_number(self) -> int: ...
    @property
    def metadata(self) -> bytes: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def page_count(self) -> int: ...

class FileTransfers:
    """
    Transfers between files and memory at addresses, done by threads of its own. owner: an object that keeps the memory alive, held until the transfer has been waited for. Any thread; waiting releases the GIL. Dropping it waits for all.
    """
    def __init__(
        self,
        *,
        block_bytes: typing.SupportsInt | typing.SupportsIndex,
        depth: typing.SupportsInt | typing.SupportsIndex,
        threads: typing.SupportsInt | typing.SupportsIndex = 1,
        one_at_a_time: bool = False,
        engine: str = "auto",
    ) -> None:
        """
        EngineError, ValueError.
        """
    def read(
        self,
        path: bytes,
        offset_bytes: typing.SupportsInt | typing.SupportsIndex,
        address: typing.SupportsInt | typing.SupportsIndex,
        size_bytes: typing.SupportsInt | typing.SupportsIndex,
        owner: typing.Any,
    ) -> None:
        """
        start_read(), and wait for this one alone. KeyboardInterrupt: wait() waits for it then.
        """
    def start_read(
        self,
        path: bytes,
        offset_bytes: typing.SupportsInt | typing.SupportsIndex,
        address: typing.SupportsInt | typing.SupportsIndex,
        size_bytes: typing.SupportsInt | typing.SupportsIndex,
        owner: typing.Any,
    ) -> None:
        """
        IoError when the file can't be opened or ends before the range does; MemoryMapError, ForkedProcessError.
        """
    def start_write(
        self,
        path: bytes,
        offset_bytes: typing.SupportsInt | typing.SupportsIndex,
        address: typing.SupportsInt | typing.SupportsIndex,
        size_bytes: typing.SupportsInt | typing.SupportsIndex,
        owner: typing.Any,
    ) -> None:
        """
        Makes the file where there is none, mode 0600, and room in it. IoError when the disk has none; MemoryMapError, ForkedProcessError.
        """
    def start_write_to(
        self,
        descriptor: typing.SupportsInt | typing.SupportsIndex,
        offset_bytes: typing.SupportsInt | typing.SupportsIndex,
        address: typing.SupportsInt | typing.SupportsIndex,
        size_bytes: typing.SupportsInt | typing.SupportsIndex,
        owner: typing.Any,
    ) -> None:
        """
        To a file that is open for writing. IoError, MemoryMapError, ForkedProcessError.
        """
    def stats(self) -> dict[str, typing.Any]: ...
    def wait(self) -> int:
        """
        Wait for those started; how many, each counted once. IoError of the first that failed, when all are done. KeyboardInterrupt, after which they go on.
        """
    def write(
        self,
        path: bytes,
        offset_bytes: typing.SupportsInt | typing.SupportsIndex,
        address: typing.SupportsInt | typing.SupportsIndex,
        size_bytes: typing.SupportsInt | typing.SupportsIndex,
        owner: typing.Any,
    ) -> None:
        """
        start_write(), and wait for this one alone. KeyboardInterrupt: wait() waits for it then.
        """

class Pager:
    """
    Page table, frames and executor thread. Any thread; waiting releases the GIL.
    """
    def __init__(
        self,
        *,
        budget_bytes: typing.SupportsInt | typing.SupportsIndex,
        page_bytes: typing.SupportsInt | typing.SupportsIndex = 0,
        engine: str = "auto",
        io_depth: typing.SupportsInt | typing.SupportsIndex = 0,
        inflight_bytes: typing.SupportsInt | typing.SupportsIndex = 0,
        spill_directory: str = "",
        event_capacity: typing.SupportsInt | typing.SupportsIndex = 65536,
        device: typing.SupportsInt | typing.SupportsIndex = -1,
        host_budget_bytes: typing.SupportsInt | typing.SupportsIndex = 0,
        driver_library: str = "",
        transport: str = "auto",
        cufile_library: str = "",
        pagefile: Pagefile | None = None,
    ) -> None:
        """
        Allocates budget_bytes // page_bytes frames at once. device: -1 for the host, or a CUDA device's number; then the frames are its memory, and host_budget_bytes (0: 1 GiB) is for the tier beneath. driver_library: for tests, a stand-in for the driver whose device memory is host memory. transport, of files to a device: 'auto' (cuFile where it is direct), 'host' or 'cufile'. pagefile: where modified pages go instead of the spill, so that commit() can be called; taken over. BudgetError, MemoryMapError, EngineError, DeviceError, ValueError.
        """
    def acquire(
        self, set_id: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex = 0
    ) -> None:
        """
        Wait until every page of the set is resident and forbid eviction until release(). Counted. On a device: until the copies are issued, and the stream (a raw handle) waits for them. Raises BudgetError, IoError, DeviceError, ClosedError, ForkedProcessError, KeyboardInterrupt; then nothing is acquired.
        """
    def add_schedule(
        self,
        *,
        step_set: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        initial_pages: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        action_step: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        action_deadline: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        action_page_in: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        action_evict: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        common: bool = False,
    ) -> int:
        """
        Know one more schedule (see set_schedule) beside the others; returns its id. The first is followed at once. A pass that leaves the followed one for steps with which another begins goes on with that one. common: it is what several passes have in common, so steps that are not in it are no reason to leave it. ValueError.
        """
    def add_set(
        self,
        ranges: collections.abc.Sequence[
            tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex]
        ],
        name: str,
    ) -> int:
        """
        Pages of (address, size_bytes) ranges that one step needs together; returns the set id. Equal pages, equal id.
        """
    def begin_pass(self) -> None:
        """
        The model's root is entered: the schedule's position goes to the next start of its cycle.
        """
    def clear_schedule(self) -> None:
        """
        Forget every schedule.
        """
    def close(self) -> None:
        """
        Drain transfers, fail those who wait, free the memory. Idempotent.
        """
    def commit(self, metadata: bytes) -> None:
        """
        Make what the pages hold now the pagefile's next commit, with this metadata. Blocks until it is on the drive; nobody may write to the pages meanwhile. ValueError without a pagefile, or when a page was written to all the same; IoError, and then the commit before is whole; KeyboardInterrupt.
        """
    def contains(self, address: typing.SupportsInt | typing.SupportsIndex) -> bool: ...
    def discard(
        self, address: typing.SupportsInt | typing.SupportsIndex, size_bytes: typing.SupportsInt | typing.SupportsIndex
    ) -> int:
        """
        Forget what the whole pages of a range in spill regions hold, dirty or spilled: they need not be written, nor read. Until they are acquired, held, or wanted() again they show zeros or what they held, and what is written to them may be lost. Pages in use, of files and on a device stay as they are. Returns how many were discarded. ValueError.
        """
    def events(self) -> numpy.ndarray:
        """
        The last events, oldest first; see EVENT_KINDS.
        """
    def follow_schedule(self, schedule_id: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Follow a known schedule from the start of its cycle. ValueError.
        """
    def forget_schedule(self, schedule_id: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        If it is followed, the known one that was followed before it is followed next. ValueError.
        """
    def hold(
        self,
        address: typing.SupportsInt | typing.SupportsIndex,
        size_bytes: typing.SupportsInt | typing.SupportsIndex,
        stream: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> int:
        """
        acquire() for a byte range; returns the set id for release(), or -1 when it is more than the budget can hold at once: then nothing is pinned and every page comes in as it is touched, which a device can't do: BudgetError.
        """
    def map_file(self, path: str, aligned_offset_bytes: typing.SupportsInt | typing.SupportsIndex = 0) -> Region:
        """
        Reserve addresses for a file, read-only: byte i is at Region.address + i. On a device the byte at aligned_offset_bytes lies at a multiple of 256. IoError.
        """
    def map_quantised(self, file: QuantisedFile) -> Region:
        """
        Reserve addresses for the pages of a file, record i at Region.address + i * page_bytes. Takes the file over. ValueError.
        """
    def map_spill(self, size_bytes: typing.SupportsInt | typing.SupportsIndex) -> Region:
        """
        Reserve addresses for new bytes, zero until written.
        """
    def mark_written(self, set_id: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        The device writes to the pages of the set, which is acquired. ValueError if it is not.
        """
    def note_modified(
        self, address: typing.SupportsInt | typing.SupportsIndex, size_bytes: typing.SupportsInt | typing.SupportsIndex
    ) -> None:
        """
        For the recording alone: the open step modifies the range. wanted() and discard() are noted by themselves. ValueError.
        """
    def page_states(self) -> numpy.typing.NDArray[numpy.uint8]:
        """
        State of every page, uint8: an index into PAGE_STATES.
        """
    def prefetch(self, set_id: typing.SupportsInt | typing.SupportsIndex) -> Ticket:
        """
        Begin to acquire a set without waiting; returns a Ticket. Served after demand. BudgetError, ClosedError.
        """
    def record_begin(self, dry: bool) -> None:
        """
        Record this thread's acquire, hold and release; dry: they do nothing else.
        """
    def record_end(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        Events in order, int32: +(set_id + 1) acquire, -(set_id + 1) release.
        """
    def recorded_contents(self) -> numpy.typing.NDArray[numpy.int32]:
        """
        What the recording that ended last noted, int32 [notes, 4] in order: the events before it; first page, and the one behind the last; 0: modified (by the step acquired last, if it is open and has the page, else by the next that has), 1: ended (nobody will want what the page held).
        """
    def release(
        self, set_id: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex = 0
    ) -> None:
        """
        Let the pages go: on a device, once the stream has done all it holds now.
        """
    def reset_stats(self) -> None: ...
    def set_name(self, set_id: typing.SupportsInt | typing.SupportsIndex) -> str: ...
    def set_pages(self, set_id: typing.SupportsInt | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.int32]:
        """
        Ascending page numbers of a set, int32.
        """
    def set_schedule(
        self,
        *,
        step_set: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        initial_pages: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        action_step: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        action_deadline: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        action_page_in: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
        action_evict: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
    ) -> None:
        """
        One cycle, repeated for ever; tensorpager.pass_plan defines the arrays (int32). ValueError names array and index. It is followed from its start, and every other one forgotten.
        """
    def stats(self) -> dict[str, typing.Any]:
        """
        Counters since the start or reset_stats().
        """
    def synchronize(self, stream: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        """
        Wait until the stream has done all it holds; nothing on the host.
        """
    def tensor(
        self, address: typing.SupportsInt | typing.SupportsIndex, size_bytes: typing.SupportsInt | typing.SupportsIndex
    ) -> typing_extensions.CapsuleType:
        """
        DLPack capsule of a 1-D uint8 tensor over the range, with a storage of its own; keeps the addresses reserved.
        """
    def wanted(
        self, address: typing.SupportsInt | typing.SupportsIndex, size_bytes: typing.SupportsInt | typing.SupportsIndex
    ) -> None:
        """
        End a discard() without bringing anything in: from now on what is written to the range is kept. ValueError.
        """
    @property
    def budget_bytes(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    @property
    def commit_number(self) -> int:
        """
        Of the last commit; 0 before the first.
        """
    @property
    def device(self) -> int:
        """
        Number of the CUDA device, -1 on the host.
        """
    @property
    def device_memory_is_host_memory(self) -> bool:
        """
        With a stand-in for the driver: tensors are the CPU's.
        """
    @property
    def followed_schedule(self) -> int | None:
        """
        Id of the schedule that is followed, or None. A pass may change it at any acquire.
        """
    @property
    def frame_count(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def page_count(self) -> int: ...
    @property
    def pinnable_page_count(self) -> int:
        """
        Most pages that steps may hold at once: the frames less those kept for stray accesses.
        """
    @property
    def quantised_reason(self) -> str:
        """
        Why a device's quantised pages are made on the host; empty when they are not.
        """
    @property
    def transport(self) -> str:
        """
        How pages of files get to the device: 'host' or 'cufile'; empty without a device.
        """
    @property
    def transport_reason(self) -> str:
        """
        Why that one.
        """

def choose_host_page_bytes(budget_bytes: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    The page size of a host pager with this budget, unless another is asked for.
    """

def device_memory(device: typing.SupportsInt | typing.SupportsIndex) -> tuple[int, int]:
    """
    (free, total) bytes of a CUDA device now. EngineError when it can't be used, DeviceError.
    """

def is_locked(
    address: typing.SupportsInt | typing.SupportsIndex, size_bytes: typing.SupportsInt | typing.SupportsIndex
) -> bool:
    """
    Whether the range lies in one locked_tensor() that lives.
    """

def is_locked_base(address: typing.SupportsInt | typing.SupportsIndex) -> bool:
    """
    Whether a locked_tensor() that lives starts there.
    """

def locked_memory_stats() -> dict[str, typing.Any]: ...
def locked_tensor(size_bytes: typing.SupportsInt | typing.SupportsIndex) -> typing_extensions.CapsuleType:
    """
    DLPack capsule of a 1-D uint8 tensor in huge pages, locked in RAM where the limit on that allows it. Its memory is used again when it dies. MemoryMapError.
    """

def mapping_costs(
    device: typing.SupportsInt | typing.SupportsIndex,
    page_bytes_max: typing.SupportsInt | typing.SupportsIndex = 33554432,
    driver_library: str = "",
) -> dict[str, typing.Any]:
    """
    Measured now: medians of mapping and unmapping a page of each size, ns, and the link's bandwidth. EngineError, DeviceError.
    """

def probe_cufile() -> CufileFacts:
    """
    Loads cuFile, opens it and closes it. Raises nothing.
    """

def probe_directory(directory: str) -> DirectoryFacts:
    """
    What the directory's file system offers; IoError if it can't be written.
    """

def probe_engines() -> list[EngineCandidate]:
    """
    Engines, best first, each with its reason.
    """

EVENT_KINDS: list[str]
PAGE_STATES: list[str]
