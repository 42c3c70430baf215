# SPDX-License-Identifier: Apache-2.0
"""The root module's hooks: where a pass begins and ends, and which schedule the core follows.

Before the first pass the steps are found on fake tensors (`fake_pass.py`) and planned. Every pass is recorded by the
core; one that took other steps than the schedule's is planned for from what was recorded, a few times at most. After
that the passes differ for good, and what most of them have in common is planned for (`expected_pass.py`).

Which of several known passes comes next is told from the shapes of the arguments: a prompt, a token, another length.
The core knows all of their schedules. A pass that leaves the one expected for the steps of another that began in the
same way goes on with that one, from that very step (`csrc/pager/tape.hpp`); one that is none of them is served on
demand, and the rest of the schedule is still followed.

While a model is trained with an optimizer of `page(model, optimizer)`, a pass is all that happens up to the optimizer's
step: forward, backward, more of both when gradients are accumulated, and the step.

Threads: passes may run concurrently; one of them at a time is recorded.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from tensorpager.backward import end_abandoned_backward
from tensorpager.contents import Contents
from tensorpager.device import HOST, refuse_backward
from tensorpager.errors import BudgetError, TraceError
from tensorpager.expected_pass import PassHistory
from tensorpager.pass_plan import PageSchedule, plan_pass, steps_from_events
from tensorpager.windows import Hook, calling_frame, is_on_stack

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core

__all__ = ["PASS_PLANS_MAX", "PassDirector", "RootEnterHook", "RootLeaveHook"]

#: Different passes that are planned for; any other is served on demand.
PASS_PLANS_MAX = 8
#: Once there are more, a schedule for what they have in common is made after so many passes, again and again.
EXPECT_EVERY_PASSES = 16
#: A pass with gradients that never comes to an optimizer's step ends after so many forwards.
TRAINING_FORWARDS_MAX = 512
#: A pass is planned for anew when its contents turn out to be others, so often at most.
PLANS_OF_CONTENTS_MAX = 3
#: Captured graphs whose schedules the core knows at a time; any other's is told to it again when it is replayed.
REPLAYS_KNOWN_MAX = 4
#: So many passes that took other steps than expected are told of, once.
TELL_AFTER_PASSES = 16

Shapes = tuple[tuple[int, ...] | None, ...]


class _OpenPasses(threading.local):
    """The frames of this thread's open calls of the root module; see [Note: abandoned calls] in windows.py.

    ignored: its calls are no passes now.
    """

    def __init__(self) -> None:
        self.frames: list[FrameType] = []
        self.ignored = False


class PassDirector:
    """Gives the core its schedule. Made for one model; knows the core, not the model."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._open = _OpenPasses()
        self._lock = threading.Lock()  # over the fields below
        self._recorded_thread: int | None = None
        self.trains = False  # an optimizer tells of its steps
        self.before_tracing: Callable[[], None] = _nothing
        self._forwards = 0  # of the training pass that is recorded; 0: none is
        self._stepped = False  # it ends with the next forward
        self._tried_to_trace = False
        self._schedules: dict[
            bytes, PageSchedule | None
        ] = {}  # by the events of the pass; None: it could not be planned
        self._notes: dict[bytes, bytes] = {}  # of the contents that a schedule was made for, by the events of the pass
        self._plans_of_contents: dict[bytes, int] = {}
        self._known: dict[int, tuple[bytes, PageSchedule]] = {}  # what the core knows, by its id
        self._common: int | None = None  # of these, the one for what passes have in common
        self._replays: dict[bytes, PageSchedule | None] = {}  # of captured graphs, by their events
        self._followed_at_begin: int | None = None  # of the recorded pass
        self._previous_pass: bytes | None = None
        self.trace_failure: str | None = None
        self.plan_failure: str | None = None
        self.plan_count = 0
        self.expected_plan_count = 0
        self.pass_count = 0
        self.mispredicted_pass_count = 0
        self._history = PassHistory()
        self._unplanned_count = 0
        self._pass_of_shapes: dict[Shapes, bytes | None] = {}  # None: these shapes led to different passes
        self._shapes: Shapes = ()
        self._told = False

    @property
    def events(self) -> npt.NDArray[np.int32] | None:
        """The recorded pass whose schedule the core follows (see `_core.Pager.record_end`), or None."""
        current = self._current
        return None if current is None else np.frombuffer(current, np.int32)

    @property
    def schedule(self) -> PageSchedule | None:
        """The schedule that the core follows, or None. A pass under way may change it at any step."""
        followed = self._followed()
        return None if followed is None else followed[1]

    @property
    def _current(self) -> bytes | None:
        followed = self._followed()
        return None if followed is None else followed[0]

    def _followed(self) -> tuple[bytes, PageSchedule] | None:
        followed = self._core.followed_schedule
        return None if followed is None else self._known.get(followed)

    def enter(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> None:
        """The root module is called. Nested calls belong to the outermost one's pass."""
        if self._open.ignored:
            return
        frames = self._open.frames
        while frames and not is_on_stack(frames[-1]):
            frames.pop()
        if not frames:
            if self._core.device != HOST:
                refuse_backward(model)
            end_abandoned_backward()
            if self._goes_on():
                frames.append(frame)
                return
            self._end_recording()  # of an abandoned pass, if any
            self._trace_once(model, args, kwargs)
            self._foresee(args, kwargs)
            self._core.begin_pass()
            self._begin_recording()
            if self.trains and torch.is_grad_enabled() and self._recorded_thread == threading.get_ident():
                self._forwards = 1
        frames.append(frame)

    @property
    def in_pass(self) -> bool:
        """Whether this thread is in a call of the root module."""
        return any(is_on_stack(frame) for frame in self._open.frames)

    @contextlib.contextmanager
    def ignoring_calls(self) -> Iterator[None]:
        """Calls of the root module by this thread are no passes meanwhile: they are captured, not run."""
        self._open.ignored = True
        try:
            yield
        finally:
            self._open.ignored = False

    def begin_replay(self, events: npt.NDArray[np.int32]) -> None:
        """A pass begins that takes exactly these steps, as a captured graph does: follow its schedule, made if new."""
        key = events.tobytes()
        with self._lock:
            if key != self._current:
                self._follow_replay(key, events)
        self._core.begin_pass()

    def _follow_replay(self, key: bytes, events: npt.NDArray[np.int32]) -> None:
        schedule = self._replays.pop(key) if key in self._replays else self._schedule_for(events)
        self._replays[key] = schedule  # the last one used is the last
        if schedule is None:
            return
        numbers = {known: number for number, (known, _) in self._known.items() if number != self._common}
        if key not in numbers:
            known_replays = [replay for replay in self._replays if replay in numbers]
            for replay in known_replays[: max(0, len(known_replays) + 1 - REPLAYS_KNOWN_MAX)]:
                self._core.forget_schedule(numbers[replay])
                del self._known[numbers[replay]]
            numbers[key] = self._make_known(key, schedule, common=False)
        self._core.follow_schedule(numbers[key])

    def _goes_on(self) -> bool:
        """Whether this thread's training pass goes on with another forward."""
        if self._forwards == 0 or self._recorded_thread != threading.get_ident():
            return False
        if self._stepped or self._forwards == TRAINING_FORWARDS_MAX:
            self._end_training_pass(completed=self._stepped)
            return False
        self._forwards += 1
        return True

    def step_done(self, *, pass_goes_on: bool) -> None:
        """An optimizer has made a step: the pass is over, or will be when the next begins.

        pass_goes_on: the step was part of backward, or has left updates for later, some of which may be made before.
        """
        if self._forwards == 0 or self._recorded_thread != threading.get_ident():
            return
        if pass_goes_on:
            self._stepped = True
        else:
            self._end_training_pass(completed=True)

    def _end_training_pass(self, *, completed: bool) -> None:
        self._forwards = 0
        self._stepped = False
        events = self._end_recording()
        if completed and events is not None and len(events) > 0:
            self._follow(events, self._core.recorded_contents())

    def leave(self, frame: FrameType, *, completed: bool) -> None:
        """The call ends that runs in `frame`."""
        frames = self._open.frames
        if frame not in frames:
            return  # enter() raised
        del frames[frames.index(frame) :]
        if frames or self._forwards > 0:
            return
        events = self._end_recording()
        if completed and events is not None and len(events) > 0:
            self._follow(events)

    def _begin_recording(self) -> None:
        with self._lock:
            if self._recorded_thread is not None:
                return
            self._core.record_begin(False)
            self._followed_at_begin = self._core.followed_schedule
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
            if self.trains and torch.is_grad_enabled():
                return  # a forward alone is no pass of training
            from tensorpager.fake_pass import record_on_fakes

            self.before_tracing()

            try:
                events = record_on_fakes(model, self._core, args, kwargs)
            except TraceError as error:
                self.trace_failure = str(error)
            else:
                self._plan(events)
            self._tried_to_trace = True

    def _foresee(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Follow the pass that arguments of these shapes led to the last time, when there is a schedule for it."""
        shapes = tuple(
            tuple(value.shape) if isinstance(value, torch.Tensor) else None for value in (*args, *kwargs.values())
        )
        with self._lock:
            self._shapes = shapes
            key = self._pass_of_shapes.get(shapes)
            if key is not None and key != self._current:
                self._put(key, self._schedules[key])

    def _follow(self, events: npt.NDArray[np.int32], notes: npt.NDArray[np.int32] | None = None) -> None:
        """A pass took these steps. Plan for it if it is new; go back to a known one when it comes twice in a row.

        Its schedule is asked for at its end: one that the core switched to in time was expected, one that it only began
        like was not. Then the core goes back to what it followed before.
        """
        key = events.tobytes()
        with self._lock:
            repeated = key == self._previous_pass
            self._previous_pass = key
            self._history.add(events)
            self.pass_count += 1
            if self._current not in (None, key):
                self.mispredicted_pass_count += 1
                self._follow_as_before()
            if key not in self._schedules and len(self._schedules) >= PASS_PLANS_MAX:
                self._expect()
            elif key not in self._schedules or self._contents_differ(key, notes):
                self._plan(events, notes)
            elif key != self._current and repeated:
                self._put(key, self._schedules[key])
            if self._schedules.get(key) is not None:
                known = self._pass_of_shapes.setdefault(self._shapes, key)
                if known != key:
                    self._pass_of_shapes[self._shapes] = None
            tell = not self._told and self.mispredicted_pass_count >= TELL_AFTER_PASSES
            self._told = self._told or tell
        if tell:
            _tell(self.mispredicted_pass_count, self.pass_count)

    def _follow_as_before(self) -> None:
        began = self._followed_at_begin
        if began in self._known and began != self._core.followed_schedule:
            self._core.follow_schedule(began)

    def _expect(self) -> None:
        """A pass that will have no schedule of its own. Now and then, plan for what the last ones have in common."""
        self._unplanned_count += 1
        if self._unplanned_count % EXPECT_EVERY_PASSES != 1:
            return
        expected = self._history.expected()
        key = expected.tobytes()
        if len(expected) == 0 or key == self._current:
            return
        known = self._schedules.get(key)
        schedule = known or self._schedule_for(expected)
        if schedule is None:
            return
        self.expected_plan_count += 1
        if known is not None:
            self._put(key, known)
            return
        outdated, self._common = self._common, self._make_known(key, schedule, common=True)
        self._core.follow_schedule(self._common)
        if outdated is not None:
            self._core.forget_schedule(outdated)
            del self._known[outdated]

    def _contents_differ(self, key: bytes, notes: npt.NDArray[np.int32] | None) -> bool:
        """The steps are known, but what they do to the pages is not what their schedule was made for."""
        if notes is None or self._schedules[key] is None or self._notes.get(key) == notes.tobytes():
            return False
        return self._plans_of_contents.get(key, 0) < PLANS_OF_CONTENTS_MAX

    def _plan(self, events: npt.NDArray[np.int32], notes: npt.NDArray[np.int32] | None = None) -> None:
        key = events.tobytes()
        outdated = self._schedules.get(key)
        self._schedules[key] = None
        schedule = self._schedule_for(events, notes)
        if notes is not None:
            self._notes[key] = notes.tobytes()
            self._plans_of_contents[key] = self._plans_of_contents.get(key, 0) + 1
        if schedule is None:
            self._schedules[key] = outdated
            return
        self.plan_count += 1
        self._schedules[key] = schedule
        self._core.follow_schedule(self._make_known(key, schedule, common=False))
        for number in [number for number, (_, known) in self._known.items() if known is outdated]:
            self._core.forget_schedule(number)
            del self._known[number]

    def _schedule_for(
        self, events: npt.NDArray[np.int32], notes: npt.NDArray[np.int32] | None = None
    ) -> PageSchedule | None:
        core = self._core
        pages = {int(set_id): core.set_pages(int(set_id)) for set_id in np.unique(np.abs(events)) - 1}
        try:
            steps = steps_from_events(events, pages)
        except ValueError as error:  # another thread's open steps, or a hold that did not fit: not a whole pass
            self.plan_failure = str(error)
            return None
        try:
            return plan_pass(
                steps,
                frame_count=core.frame_count,
                page_bytes=core.page_bytes,
                page_count=core.page_count,
                step_name=lambda step: core.set_name(int(steps.step_set[step])),
                contents=None if notes is None else Contents.from_notes(notes, events),
            )
        except BudgetError as error:  # acquire() raises it at that very step, or the step is not taken after all
            self.plan_failure = str(error)
            return None

    def _put(self, key: bytes, schedule: PageSchedule | None) -> None:
        if schedule is None:
            return
        known = (
            number for number, (known_key, _) in self._known.items() if known_key == key and number != self._common
        )
        number = next(known, None)
        self._core.follow_schedule(self._make_known(key, schedule, common=False) if number is None else number)

    def _make_known(self, key: bytes, schedule: PageSchedule, *, common: bool) -> int:
        number = self._core.add_schedule(
            step_set=schedule.step_set,
            initial_pages=schedule.initial_pages,
            action_step=schedule.action_step,
            action_deadline=schedule.action_deadline,
            action_page_in=schedule.action_page_in,
            action_evict=schedule.action_evict,
            common=common,
        )
        self._known[number] = (key, schedule)
        return number


def _nothing() -> None:
    return None


def _tell(mispredicted: int, passes: int) -> None:
    message = (
        f"{mispredicted} of the first {passes} passes of the paged model took other steps than its schedules expected, "
        "as models do that choose experts, leave early, or are called in several ways. Results are not affected. What "
        "was not expected is read when it is needed, which is slower; Pager.stats() counts it (mispredicted_passes, "
        "faults). This is told once."
    )
    warnings.warn(message, UserWarning, stacklevel=2)


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
