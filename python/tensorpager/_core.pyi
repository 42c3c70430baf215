# SPDX-License-Identifier: Apache-2.0
"""Native core of tensorpager (draft of the contract; the final file is generated from the build)."""

import numpy as np
import numpy.typing as npt

class EngineCandidate:
    engine: str
    usable: bool
    reason: str

class DirectoryFacts:
    directory: str
    file_system: str
    direct: bool
    align_bytes: int
    reason: str

def probe_engines() -> list[EngineCandidate]: ...
def probe_directory(directory: str) -> DirectoryFacts: ...

class Region:
    """Part of the address space backed by one file (a checkpoint, read-only) or by spill."""
    address: int        # multiple of page_bytes; byte i of the file lives at address + i
    size_bytes: int
    first_page: int
    page_count: int

class Pager:
    """Page table, frames, executor thread. All methods may be called from any thread and release the GIL while waiting."""
    def __init__(self, *, budget_bytes: int, page_bytes: int = 0, engine: str = "auto", io_depth: int = 0,
                 inflight_bytes: int = 0, spill_directory: str = "", event_capacity: int = 65536) -> None:
        """budget_bytes // page_bytes frames are allocated now. page_bytes 0: 2 MiB, more for very large budgets.
        spill_directory: where modified pages go (opened at the first writeback); "" means none: modifying then raises."""
    # -- address space; before or between runs
    def map_file(self, path: str) -> Region: ...              # IoError
    def map_spill(self, size_bytes: int) -> Region: ...       # zero-filled, writable
    def tensor(self, address: int, size_bytes: int) -> object:
        """DLPack capsule: 1-D uint8 tensor over [address, address + size_bytes) with a storage of its own; keeps the
        address space alive as long as any alias lives."""
    def contains(self, address: int) -> bool: ...
    # -- sets: the pages of one step
    def add_set(self, ranges: list[tuple[int, int]], name: str) -> int:
        """ranges: (address, size_bytes). Returns the set id. The same pages give the same id (first name wins)."""
    def set_pages(self, set_id: int) -> npt.NDArray[np.int32]: ...
    def set_name(self, set_id: int) -> str: ...
    # -- residency
    def acquire(self, set_id: int) -> None:
        """Blocks until every page of the set is resident and forbids eviction until release(set_id). Counted, nests.
        BudgetError, IoError, ClosedError, ForkedProcessError; KeyboardInterrupt leaves nothing acquired."""
    def release(self, set_id: int) -> None: ...
    def hold(self, address: int, size_bytes: int) -> int:
        """acquire() for a byte range (a stray access); returns a set id for release(), or -1 when more than the budget
        is asked for outside any step: then nothing is pinned and each page is brought in when it is touched."""
    def begin_pass(self) -> None:
        """The model's root module is entered: the schedule's cursor goes to the next start of the cycle."""
    # -- recording and schedule
    def record_begin(self, dry: bool) -> None:
        """Record this thread's acquire/release/hold calls. dry: they do nothing else (for a run on fake tensors)."""
    def record_end(self) -> npt.NDArray[np.int32]:
        """Events in order: +(set_id + 1) for acquire, -(set_id + 1) for release."""
    def set_schedule(self, *, step_set: npt.NDArray[np.int32], initial_pages: npt.NDArray[np.int32],
                     action_step: npt.NDArray[np.int32], action_deadline: npt.NDArray[np.int32],
                     action_page_in: npt.NDArray[np.int32], action_evict: npt.NDArray[np.int32]) -> None:
        """One cycle, repeated for ever. See tensorpager/plan.py for the meaning of each array. Validated; ValueError."""
    def clear_schedule(self) -> None: ...
    # -- facts
    page_bytes: int
    page_count: int
    frame_count: int
    pinnable_page_count: int
    budget_bytes: int
    def resident_pages(self) -> npt.NDArray[np.bool_]: ...
    def page_states(self) -> npt.NDArray[np.uint8]: ...
    def stats(self) -> dict[str, int | str | bool]: ...
    def reset_stats(self) -> None: ...
    def events(self) -> npt.NDArray[np.void]:
        """Oldest first. Fields: time_ns u8, kind u1 (see EVENT_KINDS), page i4, frame i4, step i4, thread u4."""
    def close(self) -> None: ...
    closed: bool

EVENT_KINDS: list[str]
