# SPDX-License-Identifier: Apache-2.0
"""Backward through a paged model: the module whose gradient comes in is made resident ahead of its nodes.

A hook on the tensors that a module returned tells when backward has come to it; the module before is let go then, the
last one when backward ends. Nothing but speed depends on it: an access without it traps, and is served.

Threads: autograd runs the nodes of the CPU in the thread that called backward(). Not for a device.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from tensorpager.errors import BudgetError
from tensorpager.paged_tensor import PagedTensor, span_of
from tensorpager.windows import Hook, Window, droppers

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core

__all__ = ["BackwardHook", "HeldRanges", "end_abandoned_backward"]


class HeldRanges:
    """Holds byte ranges while it is open, if they fit; the guard then leaves them alone. For one thread."""

    def __init__(self, core: Core, window: Window, spans: list[tuple[int, int]]) -> None:
        self._core = core
        self._window = window
        self._spans = spans
        self.acquired: list[int] = []

    def __enter__(self) -> None:
        if not self._spans:
            return
        set_id = self._core.add_set(self._spans, self._window.name)
        if len(self._core.set_pages(set_id)) > self._core.pinnable_page_count:
            return  # one parameter with all that belongs to it: then operation by operation
        try:
            self._core.acquire(set_id)
        except BudgetError:  # beside what other threads hold
            return
        self.acquired.append(set_id)
        self._window.open.append(self)  # type: ignore[arg-type]

    def __exit__(self, *_: object) -> None:
        for set_id in self.acquired:
            self._window.open.remove(self)  # type: ignore[arg-type]
            self._core.release(set_id)


class _Backward(threading.local):
    """What this thread's backward holds: the module it is in."""

    def __init__(self) -> None:
        self.held: list[HeldRanges] = []
        self.window: Window | None = None

    def enter(self, window: Window, spans: list[tuple[int, int]]) -> None:
        """The gradient of the module's output is there: let go of the module before, and hold this one."""
        if self.window is window:
            return
        if self.window is None:
            torch.autograd.Variable._execution_engine.queue_callback(self.leave)
        self._release()
        self.window = window
        held = HeldRanges(window.core, window, spans)
        held.__enter__()
        self.held.append(held)

    def leave(self) -> None:
        """Backward has ended, or was abandoned."""
        self.window = None
        self._release()

    def drop(self) -> bool:
        """Let go of the module that backward is in: one that is run again needs the room. What is used traps."""
        holds = any(held.acquired for held in self.held)
        self._release()
        return holds

    def _release(self) -> None:
        while self.held:
            self.held.pop().__exit__()


_backward = _Backward()
droppers.append(_backward.drop)


def end_abandoned_backward() -> None:
    """Let go of what a backward held that ended in an error."""
    _backward.leave()


class BackwardHook(Hook):
    """Forward hook of a module with a window: makes it resident when backward comes to it."""

    __slots__ = ("_parameters", "_window")

    def __init__(self, window: Window, parameters: list[PagedTensor]) -> None:
        self._window = window
        self._parameters = [weakref.ref(parameter) for parameter in parameters]

    def __call__(self, _module: torch.nn.Module, _args: tuple[Any, ...], output: object) -> None:
        """Watch for the gradients of the output."""
        if torch.is_grad_enabled():
            for tensor in _tensors(output):
                if tensor.requires_grad and tensor.grad_fn is not None:
                    tensor.register_hook(self._enter)  # type: ignore[no-untyped-call]

    def _enter(self, _gradient: torch.Tensor) -> None:
        spans = []
        for reference in self._parameters:
            parameter = reference()
            if parameter is None:
                continue
            spans.append(span_of(parameter))
            with torch._C.DisableTorchFunctionSubclass():
                gradient = parameter.grad
            if type(gradient) is PagedTensor:  # it is added to
                spans.append(span_of(gradient))
        _backward.enter(self._window, sorted(set(spans)))


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):  # transformers' outputs too
        for item in value.values():
            yield from _tensors(item)
