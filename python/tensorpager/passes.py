# SPDX-License-Identifier: Apache-2.0
"""The root module's hooks: where a pass begins and ends, and which schedule the core follows.

Before the first pass the steps are found on fake tensors (`fake_pass.py`) and planned. Every pass is recorded by the
core; one that took other steps than the schedule's is planned for from what was recorded, a few times at most. Between
passes only: a pass that leaves the schedule is served on demand.

Threads: passes may run concurrently; one of them at a time is recorded.
"""

from __future__ import annotations

import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from tensorpager.errors import BudgetError, TraceError
from tensorpager.pass_plan import PageSchedule, plan_pass, steps_from_events
from tensorpager.windows import Hook, calling_frame, is_on_stack

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core

__all__ = ["PASS_PLANS_MAX", "PassDirector", "RootEnterHook", "RootLeaveHook"]

#: Different passes that are planned for; any other is served on demand.
PASS_PLANS_MAX = 8


class _OpenPasses(threading.local):
    """The frames of this thread's open calls of the root module; see [Note: abandoned calls] in windows.py."""

    def __init__(self) -> None:
        self.frames: list[FrameType] = []


class PassDirector:
    """Gives the core its schedule. Made for one model; knows the core, not the model."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._open = _OpenPasses()
        self._lock = threading.Lock()  # over the fields below
        self._recorded_thread: int | None = None
        self._tried_to_trace = False
        self._schedules: dict[
            bytes, PageSchedule | None
        ] = {}  # by the events of the pass; None: it could not be planned
        self._current: bytes | None = None
        self._previous_pass: bytes | None = None
        self.schedule: PageSchedule | None = None
        self.trace_failure: str | None = None
        self.plan_failure: str | None = None
        self.plan_count = 0

    @property
    def events(self) -> npt.NDArray[np.int32] | None:
        """The recorded pass whose schedule the core follows (see `_core.Pager.record_end`), or None."""
        current = self._current
        return None if current is None else np.frombuffer(current, np.int32)

    def enter(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> None:
        """The root module is called. Nested calls belong to the outermost one's pass."""
        frames = self._open.frames
        while frames and not is_on_stack(frames[-1]):
            frames.pop()
        if not frames:
            self._end_recording()  # of an abandoned pass, if any
            self._trace_once(model, args, kwargs)
            self._core.begin_pass()
            self._begin_recording()
        frames.append(frame)

    def leave(self, frame: FrameType, *, completed: bool) -> None:
        """The call ends that runs in `frame`."""
        frames = self._open.frames
        if frame not in frames:
            return  # enter() raised
        del frames[frames.index(frame) :]
        if frames:
            return
        events = self._end_recording()
        if completed and events is not None and len(events) > 0:
            self._follow(events)

    def _begin_recording(self) -> None:
        with self._lock:
            if self._recorded_thread is not None:
                return
            self._core.record_begin(False)
            self._recorded_thread = threading.get_ident()

    def _end_recording(self) -> npt.NDArray[np.int32] | None:
        with self._lock:
            if self._recorded_thread != threading.get_ident():
                return None
            self._recorded_thread = None
            return self._core.record_end()

    def _trace_once(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self._lock:
            if self._tried_to_trace or self._recorded_thread is not None:
                return
            from tensorpager.fake_pass import record_on_fakes

            try:
                events = record_on_fakes(model, self._core, args, kwargs)
            except TraceError as error:
                self.trace_failure = str(error)
            else:
                self._plan(events)
            self._tried_to_trace = True

    def _follow(self, events: npt.NDArray[np.int32]) -> None:
        """A pass took these steps. Plan for it if it is new; go back to a known one when it comes twice in a row."""
        key = events.tobytes()
        with self._lock:
            repeated = key == self._previous_pass
            self._previous_pass = key
            if key == self._current:
                return
            if key in self._schedules:
                if repeated:
                    self._put(key, self._schedules[key])
            elif len(self._schedules) < PASS_PLANS_MAX:
                self._plan(events)

    def _plan(self, events: npt.NDArray[np.int32]) -> None:
        core = self._core
        pages = {int(set_id): core.set_pages(int(set_id)) for set_id in np.unique(np.abs(events)) - 1}
        key = events.tobytes()
        self._schedules[key] = None
        try:
            steps = steps_from_events(events, pages)
        except ValueError as error:  # another thread's open steps, or a hold that did not fit: not a whole pass
            self.plan_failure = str(error)
            return
        try:
            schedule = plan_pass(
                steps,
                frame_count=core.frame_count,
                page_bytes=core.page_bytes,
                page_count=core.page_count,
                step_name=lambda step: core.set_name(int(steps.step_set[step])),
            )
        except BudgetError as error:  # acquire() raises it at that very step, or the step is not taken after all
            self.plan_failure = str(error)
            return
        self.plan_count += 1
        self._schedules[key] = schedule
        self._put(key, schedule)

    def _put(self, key: bytes, schedule: PageSchedule | None) -> None:
        if schedule is None:
            return
        self._core.set_schedule(
            step_set=schedule.step_set,
            initial_pages=schedule.initial_pages,
            action_step=schedule.action_step,
            action_deadline=schedule.action_deadline,
            action_page_in=schedule.action_page_in,
            action_evict=schedule.action_evict,
        )
        self._current = key
        self.schedule = schedule


class RootEnterHook(Hook):
    """Forward pre-hook (with kwargs) of the root module."""

    __slots__ = ("_director",)

    def __init__(self, director: PassDirector) -> None:
        self._director = director

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a pass. Plans before the first one; raises what the core raises."""
        self._director.enter(module, args, kwargs, calling_frame(1))


class RootLeaveHook(Hook):
    """Forward hook (always called) of the root module. torch passes None as the output when forward raised."""

    __slots__ = ("_director",)

    def __init__(self, director: PassDirector) -> None:
        self._director = director

    def __call__(self, _module: torch.nn.Module, _args: tuple[Any, ...], output: object) -> None:
        """End it, and plan anew if it took other steps."""
        self._director.leave(calling_frame(1), completed=output is not None)
