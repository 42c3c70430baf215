# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs on the stand-in device, where torch computes on the CPU: a tape of operations in place of a graph.

As with a graph, nothing runs while it is captured: results are allocated and filled with NaN (integers with 0), and
what writes in place does nothing. A replay runs the operations again on the same memory, without the guard, so on a
page that is absent it traps, and the process ends.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tensorpager._core import Pager as Core

Operation = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

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
        self.operations.append((func, args, keywords, result))
        return result


def _run(operations: list[Operation]) -> None:
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        for func, args, kwargs, result in operations:
            again = func(*args, **kwargs)
            for made, kept in zip(_tensors(again), _tensors(result), strict=True):
                if made.data_ptr() != kept.data_ptr():
                    kept.copy_(made)


class TapePieces:
    """In place of tensorpager.graphs.CudaPieces. launches: replays of pieces so far, of all graphs."""

    launches = 0

    def __init__(self, core: Core) -> None:
        self._core = core
        self._tape: _Tape | None = None

    def running(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def begin(self) -> None:
        assert self._tape is None
        self._tape = _Tape()
        self._tape.__enter__()

    def end(self) -> Callable[[], None] | None:
        tape, self._tape = self._tape, None
        assert tape is not None
        tape.__exit__(None, None, None)

        def replay() -> None:
            TapePieces.launches += 1
            _run(tape.operations)

        return replay if tape.operations else None

    def abandon(self) -> None:
        tape, self._tape = self._tape, None
        if tape is not None:
            tape.__exit__(None, None, None)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[TapePieces]]:
    """Pager.capture() makes tapes. Gives their class, for its count."""
    monkeypatch.setattr("tensorpager.graphs.CudaPieces", TapePieces)
    monkeypatch.setattr(TapePieces, "launches", 0)
    return TapePieces
