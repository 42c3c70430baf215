# SPDX-License-Identifier: Apache-2.0
"""The order in which attention goes through the pages of a KV cache, again and again, and the plan for it.

A pass enters one layer after the other: all that is stored of a layer is held while its attention runs, and let go when
the next one is entered or the model's forward ends. So a pass is one sweep over the pages, from the first layer to the
last, and what stays between two of them is planned as for weights (pass_plan.py), knowing that each pass writes to the
last pages of every layer.

A context grows with every pass. Sets of pages therefore end at the end of a *block*, a few tokens ahead, and a plan
holds until a block is full. Pages ahead that nobody has written come and go without I/O.

Threads: one at a time. Blocking: enter() waits for the drive.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tensorpager.contents import MODIFIED, Contents
from tensorpager.errors import BudgetError, ClosedError
from tensorpager.pass_plan import PageSchedule, Steps, plan_pass
from tensorpager.windows import Hook, Window

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core

__all__ = ["ForwardEndsHook", "Sweep", "Track", "block_pages"]

#: A block has at least so many tokens, and a page. Its pages ahead are held and kept as if they were written to, so a
#: block is no larger than planning now and then asks for: 0.1 s for 32 layers.
BLOCK_TOKENS_MIN = 8
#: And so much of what is stored: a context of any length is planned for some hundred times at most.
BLOCK_SHARE = 1 / 128


def block_pages(page_count: int, pages_per_token: float) -> int:
    """How many pages of a layer a set of them is to have that needs page_count: up to the end of a block."""
    block = max(1, int(page_count * BLOCK_SHARE), int(np.ceil(BLOCK_TOKENS_MIN * pages_per_token)))
    return -(-page_count // block) * block


@dataclass(eq=False)
class Track:
    """One layer's records in the address space: one for each token, of all rows of the batch, keys before values.

    address: of record 0, at the start of a page. first, end: the records that attention reads are first .. end - 1.
    capacity: records that there are addresses for. record_bytes 0: nothing is stored yet.
    """

    number: int  # of the layer: a pass goes through them in this order
    window: Window
    address: int = 0
    record_bytes: int = 0
    capacity: int = 0
    first: int = 0
    end: int = 0
    set_ids: dict[tuple[int, int], int] = field(default_factory=dict)  # by address and size in bytes

    def pages(self, added: int, page_bytes: int) -> tuple[int, int, int]:
        """What a pass that adds so many records wants: pages from, to, and the one from which on it writes, counted
        from the track's first."""
        begin = self.first * self.record_bytes // page_bytes
        needed = -(-((self.end + added) * self.record_bytes) // page_bytes)
        there_are = -(-(self.capacity * self.record_bytes) // page_bytes)
        until = begin + block_pages(max(1, needed - begin), self.record_bytes / page_bytes)
        written = self.end * self.record_bytes // page_bytes if added else until
        return begin, max(needed, min(until, there_are)), written


@dataclass
class _Held:
    """The set that is held, and on which stream. For the way it is noted see [Note: one C call] in windows.py."""

    set_id: int
    stream: int
    done: list[None] = field(default_factory=list)  # one entry once acquired, two once released


class Sweep:
    """Holds one layer's pages after the other, and plans ahead. `core`: a pager that pages nothing else."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._tracks: list[Track] = []
        self._current: Track | None = None
        self._held: list[_Held] = []
        self._thread_id: int | None = None
        self._last_number = -1
        self._began: tuple[float, int] | None = None  # when this pass did, and tokens that it adds
        #: Told of each pass whose end is known: tokens that it added, and seconds.
        self.on_pass: Callable[[int, float], None] | None = None
        self._planned: tuple[tuple[int, int, int], ...] = ()
        self.schedule: PageSchedule | None = None
        self.plan_failure: str | None = None
        self.plan_count = 0

    def track(self, number: int, name: str) -> Track:
        """A new layer, without records. It takes part once it has some."""
        track = Track(number, Window(self._core, -1, name))
        self._tracks.append(track)
        self._tracks.sort(key=lambda each: each.number)
        return track

    def forward_ends(self) -> None:
        """The forward of a model has ended in this thread: let go of the last layer that this thread has entered."""
        if self._thread_id != threading.get_ident():
            return
        self.leave()
        began, self._began = self._began, None
        if began is not None and self.on_pass is not None:
            self.on_pass(began[1], time.perf_counter() - began[0])

    def is_at(self, track: Track) -> bool:
        """Whether the layer was entered last, and not left."""
        return self._current is track

    def enter(self, track: Track, added: int) -> None:
        """Attention comes to a layer, with so many new records: hold what it reads and writes. Blocks on I/O.

        What is more than can be held at once is not: it comes in as it is touched. On a device that is BudgetError.
        IoError, ClosedError.
        """
        self.leave()
        if self._core.closed:
            msg = "the KV cache was closed: its keys and values are gone from memory"
            raise ClosedError(msg)
        if track.number <= self._last_number:
            self._core.begin_pass()
            self._plan(added)
        if track.number <= self._last_number or self._last_number < 0:
            self._began = (time.perf_counter(), added)
        self._last_number = track.number
        set_id, page_count, _ = self._set(track, added)
        self._current = track
        self._thread_id = threading.get_ident()
        window = track.window
        if window.on_device or page_count <= self._core.pinnable_page_count:
            held = _Held(set_id, 0 if window.stream is None else window.stream())
            self._held.append(held)
            held.done.extend(map(self._core.acquire, (set_id,), (held.stream,)))
            window.open.append(held)  # type: ignore[arg-type]

    def leave(self) -> None:
        """Let go of the layer that was entered last; again is harmless."""
        while self._held:
            held = self._held[-1]
            open_calls: list[Any] = [] if self._current is None else self._current.window.open
            if held in open_calls:
                open_calls.remove(held)
            if len(held.done) == 1:
                held.done.extend(map(self._core.release, (held.set_id,), (held.stream,)))
            self._held.pop()
        self._current = None

    def forget(self) -> None:
        """What was planned does not hold any more: the next pass is planned for anew."""
        self.leave()
        self._planned = ()
        self._last_number = -1
        self._began = None
        self.schedule = None
        self._core.clear_schedule()

    def _set(self, track: Track, added: int) -> tuple[int, int, int]:
        """The set of a pass's pages of the layer, how many they are, and how many of them, the last, it writes to."""
        page_bytes = self._core.page_bytes
        begin, end, written = track.pages(added, page_bytes)
        span = (track.address + begin * page_bytes, (end - begin) * page_bytes)
        set_id = track.set_ids.get(span)
        if set_id is None:
            set_id = track.set_ids[span] = self._core.add_set([span], track.window.name)
        return set_id, end - begin, end - written

    def _plan(self, added: int) -> None:
        wanted = tuple(self._set(track, added) for track in self._tracks if track.end > 0)
        if not wanted or wanted == self._planned:
            return
        self._planned = wanted
        self.plan_count += 1
        try:
            self.schedule = self._schedule_for(wanted)
        except BudgetError as error:
            self.plan_failure = str(error)
            self.schedule = None
            self._core.clear_schedule()
            return
        self._core.set_schedule(
            step_set=self.schedule.step_set,
            initial_pages=self.schedule.initial_pages,
            action_step=self.schedule.action_step,
            action_deadline=self.schedule.action_deadline,
            action_page_in=self.schedule.action_page_in,
            action_evict=self.schedule.action_evict,
        )

    def _schedule_for(self, wanted: tuple[tuple[int, int, int], ...]) -> PageSchedule:
        core = self._core
        index = np.arange(len(wanted))
        pages = {set_id: core.set_pages(set_id) for set_id, _, _ in wanted}
        last = np.array([int(pages[set_id][-1]) + 1 for set_id, _, _ in wanted], np.int64)
        written = np.array([count for _, _, count in wanted], np.int64)
        steps = Steps(np.array([set_id for set_id, _, _ in wanted], np.int32), index.astype(np.int32), pages)
        change = np.full(int(np.count_nonzero(written)), MODIFIED, np.int64)
        modified = Contents(index[written > 0], (last - written)[written > 0], last[written > 0], change)
        return plan_pass(
            steps,
            frame_count=core.frame_count,
            page_bytes=core.page_bytes,
            page_count=core.page_count,
            step_name=lambda step: core.set_name(int(steps.step_set[step])),
            contents=modified,
        )


class ForwardEndsHook(Hook):
    """Forward hook (always called) of a paged model: its caches let go of the last layer."""

    __slots__ = ("_sweeps",)

    def __init__(self, sweeps: weakref.WeakSet[Sweep]) -> None:
        self._sweeps = sweeps

    def __call__(self, _module: torch.nn.Module, _args: tuple[Any, ...], _output: object) -> None:
        """Release."""
        for sweep in list(self._sweeps):
            sweep.forward_ends()
