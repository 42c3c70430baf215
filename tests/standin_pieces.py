# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs on the stand-in device, where torch computes on the CPU: each operation is a host function of the graph.

As with a graph of kernels, nothing runs while it is captured: results are allocated and filled with NaN (integers with
0), and what writes in place does nothing. A launch runs the operations on the thread of the stand-in's stream, in the
stream's order and while the caller goes on, on the same memory, and without the guard; on a page that is absent one
traps, and the process ends. So the results of a replay are there once its stream is through.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from standin import LIBRARY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from standin import StandinCore

Operation = tuple[Any, tuple[Any, ...], dict[str, Any], Any]

HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
THREAD_LOCAL = 1
NON_BLOCKING = 1


class Driver:
    """The stand-in's entry points, by name. Each call makes the device's context current."""

    def __init__(self) -> None:
        library = ctypes.CDLL(str(LIBRARY))
        self._find = library.cuGetProcAddress_v2
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), 0)

    def _call(self, name: str, *args: Any) -> None:
        function = ctypes.c_void_p()
        status = ctypes.c_int()
        self._find(name.encode(), ctypes.byref(function), 12000, ctypes.c_uint64(1), ctypes.byref(status))
        assert status.value == 0, name
        result = ctypes.CFUNCTYPE(ctypes.c_int)(function.value or 0)(*args)
        if result != 0:
            message = f"{name}: {result}"
            raise RuntimeError(message)

    def call(self, name: str, *args: Any) -> None:
        """RuntimeError when it fails."""
        self._call("cuCtxPushCurrent", self._context)
        try:
            self._call(name, *args)
        finally:
            self._call("cuCtxPopCurrent", None)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class _Tape(TorchDispatchMode):
    """Hands each operation on instead of running it."""

    def __init__(self, captured: Callable[[Operation], None]) -> None:
        super().__init__()
        self._captured = captured

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        written = [
            keywords[each.name] if each.name in keywords else args[place]
            for place, each in enumerate(func._schema.arguments)
            if each.alias_info is not None and each.alias_info.is_write and (each.name in keywords or place < len(args))
        ]
        if written:
            result = written[0] if len(func._schema.returns) == 1 else tuple(written)
        else:
            result = func(*args, **keywords)
            inputs = {each.untyped_storage().data_ptr() for each in _tensors((args, keywords))}
            for made in _tensors(result):
                if made.untyped_storage().data_ptr() not in inputs:
                    made.fill_(float("nan") if made.is_floating_point() else 0)
        self._captured((func, args, keywords, result))
        return result


def _run(operation: Operation) -> None:
    func, args, kwargs, result = operation
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        again = func(*args, **kwargs)
        for made, kept in zip(_tensors(again), _tensors(result), strict=True):
            if made.data_ptr() != kept.data_ptr():
                kept.copy_(made)


class StandinPieces:
    """In place of tensorpager.graphs.CudaPieces. launches: replays of pieces so far, of all graphs.

    errors: what operations of replays raised.
    """

    launches = 0
    errors: ClassVar[list[BaseException]] = []

    def __init__(self, core: StandinCore) -> None:
        self._core = core
        self._driver = Driver()
        stream = ctypes.c_void_p()
        self._driver.call("cuStreamCreateWithPriority", ctypes.byref(stream), NON_BLOCKING, 0)
        self.stream = stream.value or 0
        self._tape: _Tape | None = None
        self._operations: list[Operation] = []

    def running(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def begin(self) -> None:
        assert self._tape is None
        self._core.waits = False  # nobody may while a stream is captured
        self._driver.call("cuStreamBeginCapture", ctypes.c_void_p(self.stream), THREAD_LOCAL)
        self._operations = operations = []
        function = HOST_FUNCTION(lambda index: self._run(operations[index or 0]))
        self._kept = function

        def captured(operation: Operation) -> None:
            operations.append(operation)
            index = ctypes.c_void_p(len(operations) - 1)
            self._driver.call("cuLaunchHostFunc", ctypes.c_void_p(self.stream), function, index)

        self._tape = _Tape(captured)
        self._tape.__enter__()

    def _run(self, operation: Operation) -> None:
        try:
            _run(operation)
        except BaseException as error:
            StandinPieces.errors.append(error)

    def end(self) -> Callable[[], None] | None:
        self._end_tape()
        nothing = self._core.captured_nothing(self.stream)
        assert nothing == (not self._operations)
        kept = (self._kept, self._operations)
        graph, launched = ctypes.c_void_p(), ctypes.c_void_p()
        self._driver.call("cuStreamEndCapture", ctypes.c_void_p(self.stream), ctypes.byref(graph))
        self._core.waits = True
        if nothing:
            self._driver.call("cuGraphDestroy", graph)
            return None
        self._driver.call("cuGraphInstantiateWithFlags", ctypes.byref(launched), graph, ctypes.c_ulonglong(0))
        self._driver.call("cuGraphDestroy", graph)

        def replay() -> None:
            assert kept
            StandinPieces.launches += 1
            self._driver.call("cuGraphLaunch", launched, None)

        return replay

    def abandon(self) -> None:
        if self._tape is not None:
            self._end_tape()
            graph = ctypes.c_void_p()
            self._driver.call("cuStreamEndCapture", ctypes.c_void_p(self.stream), ctypes.byref(graph))
            self._driver.call("cuGraphDestroy", graph)
            self._core.waits = True

    def _end_tape(self) -> None:
        tape, self._tape = self._tape, None
        assert tape is not None
        tape.__exit__(None, None, None)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pager.capture() captures on the stand-in."""
    monkeypatch.setattr("tensorpager.graphs.CudaPieces", StandinPieces)
    monkeypatch.setattr(StandinPieces, "launches", 0)
    monkeypatch.setattr(StandinPieces, "errors", [])
    yield
    assert StandinPieces.errors == []
