# SPDX-License-Identifier: Apache-2.0
"""A function of a paged model, captured once as pieces of a CUDA graph and replayed with paging underneath.

A graph keeps the addresses that its kernels read, and a paged tensor has one address for life. So a captured kernel
stays right however often the tensor's pages leave and come back, as long as they are there while it runs. Whoever
replays sees to that: between two pieces, on the host, it lets go of the pages of the one and acquires those of the
next. An acquire makes the stream wait for copies that are on their way, and the host goes on; so the pieces of a step
are in the stream long before it gets to them.

Nothing in the stream ever waits for what is asked for later. Hence nothing can deadlock, whichever streams share a
hardware queue, and a page that can't be had is an exception between two pieces: what comes after has not been launched.

With gates=True the function is one graph instead, which waits for its pages where a piece would begin. That is one
launch, and what the invariant above forbids: see `csrc/pager/gated_graph.hpp` for what it takes and what it costs.

Threads: a graph is captured and replayed by one thread at a time; its inputs and outputs are the same memory each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tensorpager.device import HOST, stream_getter
from tensorpager.errors import ClosedError, PagedTensorError
from tensorpager.graph_pieces import (
    CudaPieces,
    GatedCapture,
    Launch,
    PageOperationNotes,
    PieceCapture,
    PieceRecorder,
    redirected,
)
from tensorpager.paged_tensor import PagedTensor
from tensorpager.windows import drop_abandoned_calls

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core
    from tensorpager.passes import PassDirector

__all__ = ["PIECES_IN_BUDGET", "PagedGraph", "capture"]

#: A piece holds at most this part of the budget. In simulated time, with compute and link equally slow, pieces of a
#: 16th take 1.03 times what either takes, of an eighth 1.09, of a quarter 1.22; with one of them twice as slow 1.00 to
#: 1.02, but for a quarter (csrc/tests/graph_pieces_test.cpp).
PIECES_IN_BUDGET = 16


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
    replay. set_ids: what is held in a replay, in order.
    """

    def __init__(
        self, core: Core, director: PassDirector, launches: list[Launch], inputs: _Inputs, output: Any
    ) -> None:
        self._core = core
        self._director = director
        self._launches = launches
        self._inputs = inputs
        self._stream = stream_getter(core)
        self.output = output
        self.set_ids = [set_id for launch in launches for set_id in launch.set_ids]
        self._events = np.array([event for set_id in self.set_ids for event in (set_id + 1, -(set_id + 1))], np.int32)

    @property
    def pieces(self) -> int:
        """How many graphs a replay launches."""
        return len(self._launches)

    def replay(self) -> None:
        """Run it on the current stream with the inputs as they are. Returns when the last piece is launched.

        Raises what the core's acquire raises (IoError, BudgetError, DeviceError, ClosedError, KeyboardInterrupt). Then
        the pieces before have run, none after, and the output is of no use; the next replay begins at the start. With
        gates it is the end of the pager, and ValueError in another stream than the one that was current at the capture.
        """
        core = self._core
        stream = 0 if self._stream is None else self._stream()
        if len(self._events) > 0:
            self._director.begin_replay(self._events)
        elif core.closed:
            msg = "the pager is closed: the weights that this graph reads are no longer in memory"
            raise ClosedError(msg)
        for launch in self._launches:
            launch.run(core, stream)

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
    gates: bool,
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
    stream = stream_getter(core)
    launch_stream = 0 if stream is None else stream()
    with torch.inference_mode(False):  # they are written to with every call, wherever that is
        inputs = _Inputs(args, kwargs)
    recorder: PieceRecorder = CudaPieces(core)
    with torch.no_grad(), recorder.running():
        for _ in range(warmup):
            notes = PageOperationNotes(core)
            with redirected(core, notes):
                function(*inputs.args, **inputs.kwargs)
        pages_max = _pages_max(core, notes.events, piece_bytes)
        captured = (
            GatedCapture(core, recorder, notes.events, pages_max, launch_stream)
            if gates
            else PieceCapture(core, recorder, notes.events, pages_max)
        )
        with director.ignoring_calls(), redirected(core, captured):
            try:
                captured.begin()
                output = function(*inputs.args, **inputs.kwargs)
                captured.end()
            except BaseException:
                captured.abandon()
                raise
    return PagedGraph(core, director, captured.launches, inputs, output)


def _pages_max(core: Core, events: list[int], piece_bytes: int) -> int:
    """How many pages a piece may hold: all of a run's, if it never has to let go of any."""
    if piece_bytes > 0:
        return max(1, piece_bytes // core.page_bytes)
    pages = {page for set_id in {abs(event) - 1 for event in events} for page in core.set_pages(set_id).tolist()}
    return max(1, len(pages) if len(pages) <= core.pinnable_page_count else core.frame_count // PIECES_IN_BUDGET)
