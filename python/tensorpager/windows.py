# SPDX-License-Identifier: Apache-2.0
"""Module hooks that hold a module's parameters resident for the length of its call.

A *window* belongs to a module that owns paged parameters and has no child that owns any: no window spans a whole model.
Parameters of other modules are left to the guard, operation by operation (`paged_tensor.py`).

[Note: abandoned calls]
torch runs "always called" hooks when a forward raises an Exception, but not for KeyboardInterrupt and SystemExit. Each
thread therefore lists its open calls together with the frame of `Module._call_impl` that runs them; a call whose frame
is no longer on the stack when the thread enters its next one was abandoned, and its pages are released then.

[Note: one C call]
A signal that arrives while the core waits becomes a KeyboardInterrupt the moment acquire() has returned, before Python
can note that it did. `done.extend(map(acquire, (set_id,)))` acquires and notes it in one call of C code, which no
signal handler can interrupt.

[Note: unguarded modules]
A few modules of torch take a fused kernel only when no tensor has `__torch_function__`. They run with the guard off
in their thread, so that they take the same kernel, and give the same bits, as without paging.

Hooks are copied and pickled as `inert_hook`: a copy of a paged model is an ordinary model.

Threads: any number may run the same module; each keeps its own list.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from tensorpager.device import HOST, refuse_backward, stream_getter
from tensorpager.errors import BudgetError

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core
    from tensorpager.updates import Update

__all__ = [
    "Call",
    "EnterHook",
    "EnterUnguardedHook",
    "Hook",
    "LeaveHook",
    "UnguardedCall",
    "Window",
    "calling_frame",
    "drop_abandoned_calls",
    "droppers",
    "inert_hook",
    "is_on_stack",
]

_CALL_IMPL = torch.nn.Module._call_impl.__code__


class Window:
    """The pages of one module's own parameters. open: the calls that hold them, of all threads.

    stream: gives the handle of the current stream of the core's device; None on the host.
    updates: of the parameters, to be made before they are used (`updates.py`).
    """

    __slots__ = ("core", "name", "on_device", "open", "set_id", "stream", "updates")

    def __init__(self, core: Core, set_id: int, name: str) -> None:
        self.core = core
        self.on_device = core.device != HOST
        self.stream = stream_getter(core)
        self.set_id = set_id
        self.name = name
        self.open: list[Call] = []
        self.updates: list[Update] = []

    def settle(self) -> None:
        """Make the updates that the parameters are behind by. Blocks on I/O."""
        for update in list(self.updates):
            update.settle()


class Call:
    """One call of a module, run by `frame`. See [Note: one C call]."""

    __slots__ = ("_done", "_stream", "_window", "frame")

    def __init__(self, window: Window, frame: FrameType) -> None:
        self.frame = frame
        self._window = window
        self._stream = 0 if window.stream is None else window.stream()
        self._done: list[None] = []  # one entry once acquired, two once released

    def acquire(self) -> None:
        """Wait for the pages. Raises what the core's acquire raises."""
        window = self._window
        self._done.extend(map(window.core.acquire, (window.set_id,), (self._stream,)))
        window.open.append(self)

    def release(self) -> None:
        """Undo as much of acquire() as was done; again is harmless."""
        window = self._window
        if self in window.open:
            window.open.remove(self)
        if len(self._done) == 1:
            self._done.extend(map(window.core.release, (window.set_id,), (self._stream,)))


class UnguardedCall:
    """A module call in which the guard is off for this thread, whatever the call is left by."""

    __slots__ = ("_guard_off", "frame")

    def __init__(self, frame: FrameType) -> None:
        self.frame = frame
        self._guard_off: list[AbstractContextManager[None]] = []

    def acquire(self) -> None:
        """Switch the guard off."""
        switch = torch._C.DisableTorchFunctionSubclass()
        switch.__enter__()
        self._guard_off.append(switch)

    def release(self) -> None:
        """Switch it back as it was; again is harmless."""
        while self._guard_off:
            self._guard_off.pop().__exit__(None, None, None)


class _OpenCalls(threading.local):
    """The open calls of this thread, innermost last."""

    def __init__(self) -> None:
        self.calls: list[Call | UnguardedCall] = []


_open = _OpenCalls()


#: Called with nothing when a module's pages don't fit beside what its thread holds: let go of what only speed depends
#: on, and say whether there was some. See backward.py.
droppers: list[Callable[[], bool]] = []


def let_go_of_extras() -> bool:
    """Whether something was held that nobody has to hold, and is not any more."""
    return any(drop() for drop in droppers)


def inert_hook(*_: object) -> None:
    """What hooks become in a copy of a paged model: nothing."""


def _make_inert_hook() -> Callable[..., None]:
    return inert_hook


class Hook:
    """Base of all hooks of this package. A copy, by any means, does nothing.

    traced: the tracer's copy of a model keeps the hook itself.
    """

    __slots__ = ()
    traced = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert_hook

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert_hook, ()


class EnterHook(Hook):
    """Forward pre-hook: waits until the window's pages are resident. Raises what the core's acquire raises."""

    __slots__ = ("window",)
    traced = True

    def __init__(self, window: Window) -> None:
        self.window = window

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """Acquire."""
        if self.window.on_device:
            refuse_backward(module, args)
        calls = _open.calls
        if calls:
            drop_abandoned_calls()
        if self.window.updates:
            self.window.settle()
        frame = sys._getframe(1)
        if frame.f_code is not _CALL_IMPL and frame.f_back is not None:  # calling_frame(), inlined: this is every call
            frame = frame.f_back
        call = Call(self.window, frame)
        calls.append(call)
        try:
            call.acquire()
        except BudgetError:
            if not let_go_of_extras():
                raise
            call.acquire()


class EnterUnguardedHook(Hook):
    """Forward pre-hook of a module that is to run without the guard; before that of its window."""

    __slots__ = ()
    traced = True

    def __call__(self, module: torch.nn.Module, _args: tuple[Any, ...]) -> None:
        """Switch the guard off."""
        drop_abandoned_calls()
        for parameter in module.parameters():  # the guard would
            backing = getattr(parameter, "_tp_backing", None)
            if backing is not None and backing.update is not None:
                backing.update.settle()
        call = UnguardedCall(calling_frame(1))
        _open.calls.append(call)
        call.acquire()


class LeaveHook(Hook):
    """Forward hook that is always called: undoes what this very call's enter hooks did, if they did."""

    __slots__ = ()
    traced = True

    def __call__(self, _module: torch.nn.Module, _args: tuple[Any, ...], _output: object) -> None:
        """Release."""
        calls = _open.calls
        frame = sys._getframe(1)
        if frame.f_code is not _CALL_IMPL and frame.f_back is not None:
            frame = frame.f_back
        if calls and calls[-1].frame is not frame and any(call.frame is frame for call in calls):
            while calls[-1].frame is not frame:  # calls inside this one were abandoned, and forward went on
                calls[-1].release()
                del calls[-1]
        while calls and calls[-1].frame is frame:
            calls[-1].release()
            del calls[-1]


def calling_frame(depth: int) -> FrameType:
    """The frame that stands for the module call whose hook is `depth` frames up (1: the caller of this function)."""
    frame = sys._getframe(depth + 1)
    if frame.f_code is not _CALL_IMPL and frame.f_back is not None:
        frame = frame.f_back
    return frame


def is_on_stack(frame: FrameType) -> bool:
    """Whether a frame is among the callers of this function."""
    caller: FrameType | None = sys._getframe(1)
    while caller is not None:
        if caller is frame:
            return True
        caller = caller.f_back
    return False


def drop_abandoned_calls() -> None:
    """Undo this thread's calls that are no longer on the stack: [Note: abandoned calls]. Those still running stay."""
    calls = _open.calls
    while calls and not is_on_stack(calls[-1].frame):
        calls[-1].release()
        del calls[-1]
