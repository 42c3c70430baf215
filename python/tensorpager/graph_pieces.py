# SPDX-License-Identifier: Apache-2.0
"""How a function's work and its page operations become graphs: cut in pieces, or one that waits at gates.

While the function is captured, its page operations come here (`Pager.redirect`) instead of the core. Those of the runs
before were noted, and from these follows what is held together (`piece_plan.py`). What is held changes at a *cut*.

In pieces, a cut ends a graph and begins the next one; between the two the host lets go and acquires. With gates, a cut
is a node of the one graph, at which it waits until the pages are there (`csrc/pager/gated_graph.hpp`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from tensorpager.paged_tensor import is_traced
from tensorpager.piece_plan import plan_pieces

if TYPE_CHECKING:
    from tensorpager._core import GatedGraph
    from tensorpager._core import Pager as Core

__all__ = [
    "CudaPieces",
    "GatedCapture",
    "GatedLaunch",
    "HeldLaunch",
    "Launch",
    "PageOperationNotes",
    "PieceCapture",
    "PieceRecorder",
    "redirected",
]

Replay = Callable[[], object]


class PieceRecorder(Protocol):
    """Captures what a thread asks of one stream, piece by piece. Pieces are replayed in the order of their capture."""

    @property
    def stream(self) -> int:
        """The raw handle of the stream that is captured."""

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Where the function runs: on the stream that is captured."""

    def begin(self) -> None:
        """A piece begins: nothing runs, and everything is captured, until end()."""

    def end(self) -> Replay | None:
        """What launches the piece on the current stream; None when there is nothing in it."""

    def abandon(self) -> None:
        """End a capture that failed; harmless when none is under way."""


class CudaPieces:
    """Pieces are graphs of torch's, whose memory comes from one pool, so that one's results reach the next.

    torch.AcceleratorError and RuntimeError of torch come out as they are.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._device = torch.device("cuda", core.device)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def stream(self) -> int:
        """As PieceRecorder."""
        return int(self._stream.cuda_stream)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """As PieceRecorder."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                yield
            torch.cuda.current_stream().wait_stream(self._stream)

    def begin(self) -> None:
        """As PieceRecorder. Calls of other threads are none of this capture's business."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._graph = graph

    def end(self) -> Replay | None:
        """As PieceRecorder."""
        graph, self._graph = self._graph, None
        assert graph is not None
        nothing = self._core.captured_nothing(self.stream)
        with warnings.catch_warnings():
            if nothing:
                warnings.filterwarnings("ignore", message=".*CUDA Graph is empty.*")
            graph.capture_end()
        # torch's own replay() is Python, in which a signal might come between the launch and its end.
        return None if nothing else super(torch.cuda.CUDAGraph, graph).replay

    def abandon(self) -> None:
        """As PieceRecorder."""
        graph, self._graph = self._graph, None
        if graph is not None:
            with contextlib.suppress(RuntimeError):  # the error that is on its way says why
                graph.capture_end()


class Launch(Protocol):
    """What a replay launches, one after the other."""

    @property
    def set_ids(self) -> tuple[int, ...]:
        """What is held for it, in order."""

    def run(self, core: Core, stream: int) -> None:
        """Launch it in the stream, with its pages held. Raises what the core's acquire raises."""


@dataclass(frozen=True)
class HeldLaunch:
    """A piece, the set that is held while it runs (None: before the first step), and the sets that it writes to."""

    set_id: int | None
    replay: Replay
    written: tuple[int, ...]

    @property
    def set_ids(self) -> tuple[int, ...]:
        """As Launch."""
        return () if self.set_id is None else (self.set_id,)

    def run(self, core: Core, stream: int) -> None:
        """As Launch. After an error nothing was launched."""
        if self.set_id is None:
            self.replay()
            return
        done: list[None] = []  # [Note: one C call] in windows.py
        try:
            done.extend(map(core.acquire, (self.set_id,), (stream,)))
            for set_id in self.written:  # before they are: an interrupted launch must not leave a write unknown
                core.mark_written(set_id)
            self.replay()
        finally:
            if done:
                core.release(self.set_id, stream)


class PageOperationNotes:
    """The page operations of a thread, done as they come, and noted; those of a run on fake tensors are not."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._open: list[int] = []
        self.events: list[int] = []

    def acquire(self, set_id: int, stream: int) -> None:
        """Do it, and note it."""
        self._core.acquire(set_id, stream)
        self._note(set_id)

    def release(self, set_id: int, stream: int) -> None:
        """Do it, and note it."""
        if set_id in self._open and not is_traced():  # else of something that was acquired before
            self._open.remove(set_id)
            self.events.append(-(set_id + 1))
        self._core.release(set_id, stream)

    def hold(self, address: int, size_bytes: int, stream: int) -> int:
        """Do it, and note it."""
        set_id = self._core.hold(address, size_bytes, stream)
        self._note(set_id)
        return set_id

    def _note(self, set_id: int) -> None:
        if not is_traced():
            self._open.append(set_id)
            self.events.append(set_id + 1)

    def mark_written(self, set_id: int) -> None:
        """Do it."""
        self._core.mark_written(set_id)


class PieceCapture:
    """The page operations of a thread whose work is captured: they decide where pieces begin, and what is held."""

    def __init__(self, core: Core, recorder: PieceRecorder, events: Sequence[int], pages_max: int) -> None:
        self._core = core
        self._recorder = recorder
        self._planned = {
            piece.first: piece.sets
            for piece in plan_pieces(events, lambda set_id: core.set_pages(set_id).tolist(), pages_max)
        }
        self._acquires = 0
        self._open: list[int] = []
        self._held: tuple[int, int] | None = None  # set id, stream
        self._held_pages: frozenset[int] = frozenset()
        self._written: list[int] = []
        self._capturing = False
        self.launches: list[Launch] = []

    def begin(self) -> None:
        """The function is about to run."""
        self._recorder.begin()
        self._capturing = True

    def acquire(self, set_id: int, stream: int) -> None:
        """The pages are held from here on; a cut where they are not yet. Raises what the core's acquire raises."""
        pages = frozenset(self._core.set_pages(set_id).tolist())
        if not pages <= self._held_pages:
            # A function that takes another way now than when it was noted is held step by step from here.
            planned = self._planned.get(self._acquires, ())
            self._cut(list(dict.fromkeys([*self._open, set_id, *(planned if set_id in planned else ())])), stream)
        self._acquires += 1
        self._open.append(set_id)

    def release(self, set_id: int, stream: int) -> None:
        """Nothing, until the piece ends."""
        if set_id in self._open:
            self._open.remove(set_id)  # and let go with the piece
        else:
            self._core.release(set_id, stream)  # of something that was acquired before

    def hold(self, address: int, size_bytes: int, stream: int) -> int:
        """As acquire(), of the pages of a range."""
        set_id = self._core.add_set([(address, size_bytes)], "an access in a captured graph")
        self.acquire(set_id, stream)
        return set_id

    def mark_written(self, set_id: int) -> None:
        """Note that the piece writes to pages that it holds."""
        if set_id not in self._written:
            self._written.append(set_id)

    def end(self) -> None:
        """The function has returned."""
        self._end_piece()

    def abandon(self) -> None:
        """It has raised."""
        if self._capturing:
            self._recorder.abandon()
        self._let_go()

    def _cut(self, sets: list[int], stream: int) -> None:
        self._end_piece()
        self._take_hold(sets, stream)
        self.begin()

    def _take_hold(self, sets: list[int], stream: int) -> int:
        name = f"{self._core.set_name(sets[0])} and {len(sets) - 1} more" if len(sets) > 1 else ""
        joined = self._core.join_sets(sets, name) if len(sets) > 1 else sets[0]
        self._core.acquire(joined, stream)
        self._held = (joined, stream)
        self._held_pages = frozenset(self._core.set_pages(joined).tolist())
        return joined

    def _end_piece(self) -> None:
        self._capturing = False
        replay = self._recorder.end()
        held = None if self._held is None else self._held[0]
        self._let_go()
        if replay is not None:
            self.launches.append(HeldLaunch(held, replay, tuple(self._written)))
        self._written = []

    def _let_go(self) -> None:
        held, self._held, self._held_pages = self._held, None, frozenset()
        if held is not None:
            self._core.release(*held)


@dataclass(frozen=True)
class GatedLaunch:
    """The one graph of a function, which waits for its pages."""

    set_ids: tuple[int, ...]
    gated: GatedGraph
    replay: Replay

    def run(self, core: Core, stream: int) -> None:  # noqa: ARG002 (it has the core)
        """As Launch. After an error the pager is of no more use."""
        self.gated.replay(stream, self.replay)


class GatedCapture(PieceCapture):
    """The page operations of a thread whose work is captured as one graph: each cut is a gate of it.

    Meanwhile pages are held in another stream, since kernels are launched with checked addresses.
    """

    def __init__(
        self, core: Core, recorder: PieceRecorder, events: Sequence[int], pages_max: int, launch_stream: int
    ) -> None:
        super().__init__(core, recorder, events, pages_max)
        acquires = sum(event > 0 for event in events)
        # One more for a function that takes another way now than when it was noted.
        self._gated = core.make_gated_graph(launch_stream, 2 * acquires + 1)
        self._holding_stream = launch_stream
        self._set_ids: list[int] = []

    def mark_written(self, set_id: int) -> None:
        """As PieceCapture."""
        self._gated.writes(set_id)

    def end(self) -> None:
        """As PieceCapture."""
        self._gated.end(self._recorder.stream)
        self._capturing = False
        replay = self._recorder.end()
        self._let_go()
        if replay is not None:
            self.launches.append(GatedLaunch(tuple(self._set_ids), self._gated, replay))

    def _cut(self, sets: list[int], stream: int) -> None:  # noqa: ARG002 (which is captured)
        self._let_go()
        joined = self._take_hold(sets, self._holding_stream)
        self._gated.step(joined, self._recorder.stream)
        self._set_ids.append(joined)


@contextlib.contextmanager
def redirected(core: Core, handler: PageOperationNotes | PieceCapture) -> Iterator[None]:
    """This thread's page operations go to the handler."""
    core.redirect(handler)
    try:
        yield
    finally:
        core.redirect(None)
