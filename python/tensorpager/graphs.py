# SPDX-License-Identifier: Apache-2.0
"""A function of a paged model, captured once as pieces of a CUDA graph and replayed with paging underneath.

A graph keeps the addresses that its kernels read, and a paged tensor has one address for life. So a captured kernel
stays right however often the tensor's pages leave and come back, as long as they are there while it runs. Whoever
replays sees to that: between two pieces, on the host, it lets go of the pages of the one and acquires those of the
next. An acquire makes the stream wait for copies that are on their way, and the host goes on; so the pieces of a step
are in the stream long before it gets to them.

Nothing in the stream ever waits for what is asked for later. Hence nothing can deadlock, whichever streams share a
hardware queue, and a page that can't be had is an exception between two pieces: what comes after has not been launched.

The function is run a few times first, and its page operations are noted. From these follows where to cut
(`piece_plan.py`). While it is captured, its page operations come here (`Pager.redirect`) instead of the core.

Threads: a graph is captured and replayed by one thread at a time; its inputs and outputs are the same memory each time.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from tensorpager.device import HOST, stream_getter
from tensorpager.errors import ClosedError, PagedTensorError
from tensorpager.paged_tensor import PagedTensor, is_traced
from tensorpager.piece_plan import plan_pieces
from tensorpager.windows import drop_abandoned_calls

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core
    from tensorpager.passes import PassDirector

__all__ = ["PIECES_IN_BUDGET", "PagedGraph", "PieceRecorder", "capture"]

#: A piece holds at most this part of the budget. One is computing while the next ones are on their way.
PIECES_IN_BUDGET = 8

Replay = Callable[[], None]


class PieceRecorder(Protocol):
    """Captures what a thread asks of one stream, piece by piece. Pieces are replayed in the order of their capture."""

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
        nothing = self._core.captured_nothing(self._stream.cuda_stream)
        with warnings.catch_warnings():
            if nothing:
                warnings.filterwarnings("ignore", message=".*CUDA Graph is empty.*")
            graph.capture_end()
        return None if nothing else graph.replay

    def abandon(self) -> None:
        """As PieceRecorder."""
        graph, self._graph = self._graph, None
        if graph is not None:
            with contextlib.suppress(RuntimeError):  # the error that is on its way says why
                graph.capture_end()


@dataclass(frozen=True)
class _HeldPiece:
    """A piece, the set that is held while it runs (None: before the first step), and the sets that it writes to."""

    set_id: int | None
    replay: Replay
    written: tuple[int, ...]

    def run(self, core: Core, stream: int) -> None:
        """Launch it with its pages held. What the core's acquire raises comes out, and nothing was launched."""
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


class _Notes:
    """The page operations of a thread, done as they come, and noted; those of a run on fake tensors are not."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._open: list[int] = []
        self.events: list[int] = []

    def acquire(self, set_id: int, stream: int) -> None:
        self._core.acquire(set_id, stream)
        self._note(set_id)

    def release(self, set_id: int, stream: int) -> None:
        if set_id in self._open and not is_traced():  # else of something that was acquired before
            self._open.remove(set_id)
            self.events.append(-(set_id + 1))
        self._core.release(set_id, stream)

    def hold(self, address: int, size_bytes: int, stream: int) -> int:
        set_id = self._core.hold(address, size_bytes, stream)
        self._note(set_id)
        return set_id

    def _note(self, set_id: int) -> None:
        if not is_traced():
            self._open.append(set_id)
            self.events.append(set_id + 1)

    def mark_written(self, set_id: int) -> None:
        self._core.mark_written(set_id)


class _Capture:
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
        self.pieces: list[_HeldPiece] = []

    def begin(self) -> None:
        """The function is about to run."""
        self._recorder.begin()
        self._capturing = True

    def acquire(self, set_id: int, stream: int) -> None:
        pages = frozenset(self._core.set_pages(set_id).tolist())
        if not pages <= self._held_pages:
            # A function that takes another way now than when it was noted is held step by step from here.
            planned = self._planned.get(self._acquires, ())
            self._cut(list(dict.fromkeys([*self._open, set_id, *(planned if set_id in planned else ())])), stream)
        self._acquires += 1
        self._open.append(set_id)

    def release(self, set_id: int, stream: int) -> None:
        if set_id in self._open:
            self._open.remove(set_id)  # and let go with the piece
        else:
            self._core.release(set_id, stream)  # of something that was acquired before

    def hold(self, address: int, size_bytes: int, stream: int) -> int:
        set_id = self._core.add_set([(address, size_bytes)], "an access in a captured graph")
        self.acquire(set_id, stream)
        return set_id

    def mark_written(self, set_id: int) -> None:
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
        name = f"{self._core.set_name(sets[0])} and {len(sets) - 1} more" if len(sets) > 1 else ""
        joined = self._core.join_sets(sets, name) if len(sets) > 1 else sets[0]
        self._core.acquire(joined, stream)
        self._held = (joined, stream)
        self._held_pages = frozenset(self._core.set_pages(joined).tolist())
        self.begin()

    def _end_piece(self) -> None:
        self._capturing = False
        replay = self._recorder.end()
        held = None if self._held is None else self._held[0]
        self._let_go()
        if replay is not None:
            self.pieces.append(_HeldPiece(held, replay, tuple(self._written)))
        self._written = []

    def _let_go(self) -> None:
        held, self._held, self._held_pages = self._held, None, frozenset()
        if held is not None:
            self._core.release(*held)


class _Inputs:
    """The arguments of a captured function: tensors as copies that stay where they are, others as they were given."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args = tuple(_kept(value) for value in args)
        self.kwargs = {name: _kept(value) for name, value in kwargs.items()}

    def fill(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy the values of a call. ValueError when it differs in more than the values of tensors."""
        if len(args) != len(self.args) or kwargs.keys() != self.kwargs.keys():
            msg = (
                f"the graph was captured with {len(self.args)} arguments and the keywords {sorted(self.kwargs)}; it "
                f"is called with {len(args)} and {sorted(kwargs)}"
            )
            raise ValueError(msg)
        pairs = [(str(place), kept, args[place]) for place, kept in enumerate(self.args)]
        pairs += [(name, kept, kwargs[name]) for name, kept in self.kwargs.items()]
        for name, kept, given in pairs:
            _check_alike(name, kept, given)
        for _, kept, given in pairs:
            if _is_input(kept):
                kept.copy_(given, non_blocking=True)


def _is_input(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, PagedTensor)


def _kept(value: Any) -> Any:
    return value.detach().clone() if _is_input(value) else value


_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def _check_alike(name: str, kept: Any, given: Any) -> None:
    if _is_input(kept) and _is_input(given):
        if kept.shape == given.shape and kept.dtype == given.dtype:
            return
        what = f"{tuple(kept.shape)} of {kept.dtype}", f"{tuple(given.shape)} of {given.dtype}"
    elif kept is given or (type(kept) is type(given) and isinstance(kept, _PLAIN) and kept == given):
        return
    else:
        what = f"{kept!r:.60}", f"{given!r:.60}"
    msg = (
        f"argument {name} was {what[0]} when the graph was captured and is {what[1]} now: a graph replays one way "
        "only. Capture another graph, or give what varies as a tensor"
    )
    raise ValueError(msg)


class PagedGraph:
    """A captured function. Made by Pager.capture(); usable until the pager is closed.

    output: what the function returned; its tensors are the same memory each time, and hold the values of the last
    replay. pieces: how many graphs are launched for a replay. set_ids: what is held for them, in order.
    """

    def __init__(
        self, core: Core, director: PassDirector, pieces: list[_HeldPiece], inputs: _Inputs, output: Any
    ) -> None:
        self._core = core
        self._director = director
        self._pieces = pieces
        self._inputs = inputs
        self._stream = stream_getter(core)
        self.output = output
        self.set_ids = [piece.set_id for piece in pieces if piece.set_id is not None]
        self._events = np.array([event for set_id in self.set_ids for event in (set_id + 1, -(set_id + 1))], np.int32)

    @property
    def pieces(self) -> int:
        """Launches of a replay."""
        return len(self._pieces)

    def replay(self) -> None:
        """Run it on the current stream with the inputs as they are. Returns when the last piece is launched.

        Raises what the core's acquire raises (IoError, BudgetError, DeviceError, ClosedError, KeyboardInterrupt). Then
        the pieces before have run, none after, and the output is of no use; the next replay begins at the start.
        """
        core = self._core
        stream = 0 if self._stream is None else self._stream()
        if len(self._events) > 0:
            self._director.begin_replay(self._events)
        elif core.closed:
            msg = "the pager is closed: the weights that this graph reads are no longer in memory"
            raise ClosedError(msg)
        for piece in self._pieces:
            piece.run(core, stream)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it with these inputs, and return `output`. Tensors of its output change with the next call.

        Arguments as for the capture; tensors of the same shapes and dtypes, on any device. ValueError otherwise, and
        what replay() raises.
        """
        self._inputs.fill(args, kwargs)
        self.replay()
        return self.output


def capture(
    core: Core,
    director: PassDirector,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    warmup: int,
    piece_bytes: int,
) -> PagedGraph:
    """See Pager.capture(). piece_bytes: 0 for a PIECES_IN_BUDGET-th of the budget."""
    drop_abandoned_calls()
    if core.device == HOST:
        msg = "capture() makes CUDA graphs: page the model to a device (device='cuda')"
        raise PagedTensorError(msg)
    if director.in_pass:
        msg = "capture() was called inside of a call of the paged model: capture the function that calls it"
        raise PagedTensorError(msg)
    if warmup < 1:
        msg = f"warmup is {warmup}: the function has to run at least once before it is captured"
        raise ValueError(msg)
    pages_max = max(1, (piece_bytes or core.budget_bytes // PIECES_IN_BUDGET) // core.page_bytes)
    inputs = _Inputs(args, kwargs)
    recorder: PieceRecorder = CudaPieces(core)
    with torch.no_grad(), recorder.running():
        for _ in range(warmup):
            notes = _Notes(core)
            with _redirected(core, notes):
                function(*inputs.args, **inputs.kwargs)
        captured = _Capture(core, recorder, notes.events, pages_max)
        with director.ignoring_calls(), _redirected(core, captured):
            try:
                captured.begin()
                output = function(*inputs.args, **inputs.kwargs)
                captured.end()
            except BaseException:
                captured.abandon()
                raise
    return PagedGraph(core, director, captured.pieces, inputs, output)


@contextlib.contextmanager
def _redirected(core: Core, handler: _Notes | _Capture) -> Iterator[None]:
    core.redirect(handler)
    try:
        yield
    finally:
        core.redirect(None)
