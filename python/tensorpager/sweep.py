# SPDX-License-Identifier: Apache-2.0
"""Reads files through the core in file order and says how fast: the bandwidth a paged run can be held against.

Same engine, same transfer sizes, same frames as a model's pages; no torch. The reads are O_DIRECT where the file
system has it, so the page cache plays no part.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tensorpager._core import Pager

__all__ = ["Sweep", "set_sweep_schedule", "sweep_files"]

BUDGET_BYTES = 128 * 2**20
PAGES_A_STEP = 4


@dataclass(frozen=True)
class Sweep:
    """What was read, in which wall and CPU time (of the whole process), by which engine.

    bytes_read counts what was read ahead for a next pass as well: it was read in that time.
    """

    bytes_read: int
    seconds: float
    cpu_seconds: float
    engine: str

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.bytes_read / self.seconds


def sweep_files(
    paths: Sequence[str | os.PathLike[str]], *, engine: str = "auto", bytes_max: int = 2**62, start: float = 0.0
) -> Sweep:
    """Page the files in once, in order, bytes_max of them at most, and drop each page at once.

    start: where to begin, as a share of the pages. Opening the files, allocating the frames and planning are outside
    of the time measured. IoError, EngineError, BudgetError as for a pager.
    """
    from tensorpager._core import Pager as Core

    core = Core(budget_bytes=BUDGET_BYTES, engine=engine)
    try:
        regions = [core.map_file(os.fspath(path)) for path in paths]
        addresses = [
            (region.address + offset, min(core.page_bytes, region.size_bytes - offset))
            for region in regions
            for offset in range(0, region.size_bytes, core.page_bytes)
        ]
        first = int(start * len(addresses))
        addresses = (addresses[first:] + addresses[:first])[: max(1, bytes_max // core.page_bytes)]
        sets = [
            core.add_set(addresses[place : place + PAGES_A_STEP], f"step {place // PAGES_A_STEP}")
            for place in range(0, len(addresses), PAGES_A_STEP)
        ]
        begin, begin_cpu = time.perf_counter(), time.process_time()
        set_sweep_schedule(core, sets)
        for set_id in sets:
            core.acquire(set_id)
            core.release(set_id)
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
        stats = core.stats()
        return Sweep(int(stats["bytes_read"]), seconds, cpu_seconds, str(stats["engine"]))
    finally:
        core.close()


def set_sweep_schedule(core: Pager, sets: list[int]) -> None:
    """One pass, repeated, first in, first out: each page takes the frame of the one read a budget before it."""
    pages = np.concatenate([core.set_pages(set_id) for set_id in sets])
    step_of = np.repeat(np.arange(len(sets)), [len(core.set_pages(set_id)) for set_id in sets])
    resident = min(core.frame_count, len(pages))
    action_count = len(pages) if resident < len(pages) else 0
    evicted = np.arange(action_count)
    wanted = evicted + resident
    next_pass = wanted >= len(pages)
    deadline = step_of[wanted % len(pages)] + next_pass * len(sets)
    core.set_schedule(
        step_set=np.array(sets, np.int32),
        initial_pages=pages[:resident],
        action_step=(step_of[evicted] + 1).astype(np.int32),
        action_deadline=deadline.astype(np.int32),
        action_page_in=pages[wanted % len(pages)],
        action_evict=pages[evicted],
    )
