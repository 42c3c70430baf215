# SPDX-License-Identifier: Apache-2.0
"""A schedule as plain data: what is resident, what is paged in over what, and when. With its JSON form and a verifier.

A schedule describes one pass of the model and is repeated for ever. It refers to nothing outside itself: page numbers,
set ids and step indices are all there is. Its meaning is defined by `simulate`, a few lines that execute it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from tensorpager.steps import INT32_MAX, Int32Array, Steps

SCHEDULE_FORMAT = "tensorpager-schedule"
SCHEDULE_VERSION = 1


@dataclass(frozen=True, eq=False)
class PageSchedule:
    """One pass, repeated for ever.

    step_set: int32 [S], the set each step acquires, in order.
    initial_pages: int32 [I], pages resident when a pass starts (steady state), in order of first use. From a cold start
    the executor pages these in first, in this order. I <= frame_count.
    Actions, int32 [A] each, carried out strictly in order:
    action_page_in: the page to read. action_evict: the page whose frame it takes, -1 for a free frame.
    action_step: the action may be carried out once steps 0..action_step-1 of this pass have been acquired and the
    evicted page is no longer in use. action_deadline: the step that first needs the page; S or more is step (value -
    S) of the next pass. Both never decrease, and action_step <= action_deadline. After the last action exactly
    initial_pages are resident again. Certificate, per pass in steady state: page_ins_per_pass; accesses_per_pass
    (pages of each acquired set, summed) and hits_per_pass (of these, not paged in for this access);
    lower_bound_page_ins (no schedule at all can do with fewer, on average over passes); moved_pages_per_pass (read or
    written, where the plan knows what the pass does to contents; else as page_ins_per_pass) and lower_bound_moved_pages
    (no schedule moves fewer, in whole or in part; 0 where no solver was there); working_set_pages (pages the pass
    uses); largest_step_pages (in use at once, at most).
    """

    page_bytes: int
    page_count: int
    frame_count: int
    step_set: Int32Array
    initial_pages: Int32Array
    action_page_in: Int32Array
    action_evict: Int32Array
    action_step: Int32Array
    action_deadline: Int32Array
    page_ins_per_pass: int
    accesses_per_pass: int
    hits_per_pass: int
    lower_bound_page_ins: float
    moved_pages_per_pass: int
    lower_bound_moved_pages: float
    working_set_pages: int
    largest_step_pages: int

    def __post_init__(self) -> None:
        _check(self)

    def to_json(self) -> str:
        """The same schedule always gives the same text, byte for byte."""
        content: dict[str, object] = {"format": SCHEDULE_FORMAT, "version": SCHEDULE_VERSION}
        for field in fields(self):
            value = getattr(self, field.name)
            content[field.name] = value.tolist() if isinstance(value, np.ndarray) else value
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> PageSchedule:
        """Read to_json()'s text. ValueError that names the rule when the text breaks one."""
        try:
            content = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            msg = f"schedule: not JSON: {error}"
            raise ValueError(msg) from None
        _require(isinstance(content, dict), "the text is one JSON object")
        _require(content.pop("format", None) == SCHEDULE_FORMAT, f'"format" is "{SCHEDULE_FORMAT}"')
        version = content.pop("version", None)
        _require(version == SCHEDULE_VERSION and type(version) is int, f'"version" is {SCHEDULE_VERSION}')
        names = {field.name for field in fields(cls)}
        missing, unknown = sorted(names - content.keys()), sorted(content.keys() - names)
        _require(not missing and not unknown, f"exactly the known fields (missing {missing}, unknown {unknown})")
        values: dict[str, Any] = {name: _decode(name, content[name]) for name in names}
        return cls(**values)


ARRAY_FIELDS = ("step_set", "initial_pages", "action_page_in", "action_evict", "action_step", "action_deadline")
COUNT_FIELDS = (
    "page_bytes",
    "page_count",
    "frame_count",
    "page_ins_per_pass",
    "accesses_per_pass",
    "hits_per_pass",
    "moved_pages_per_pass",
    "working_set_pages",
    "largest_step_pages",
)


def _require(holds: bool, rule: str) -> None:
    if not holds:
        msg = f"schedule breaks a rule: {rule}"
        raise ValueError(msg)


def _decode(name: str, value: object) -> object:
    if name not in ARRAY_FIELDS:
        return value
    _require(isinstance(value, list), f"{name} is a list")
    assert isinstance(value, list)
    is_int32 = all(type(item) is int and -INT32_MAX <= item <= INT32_MAX for item in value)
    _require(is_int32, f"{name} holds 32-bit integers")
    return np.array(value, np.int32)


def _check(schedule: PageSchedule) -> None:
    """Every rule a schedule can be held to without knowing the sets; ValueError with the rule that is broken."""
    for name in ARRAY_FIELDS:
        array = getattr(schedule, name)
        is_vector = isinstance(array, np.ndarray) and array.dtype == np.int32 and array.ndim == 1
        _require(is_vector, f"{name} is an int32 vector")
    for name in COUNT_FIELDS:
        value = getattr(schedule, name)
        _require(type(value) is int and value >= 0, f"{name} is an integer, 0 or more")
    for name in ("lower_bound_page_ins", "lower_bound_moved_pages"):
        bound = getattr(schedule, name)
        _require(type(bound) in (int, float) and 0 <= bound < 2**63, f"{name} is a number, 0 or more")
    _check_ranges(schedule)
    _check_actions(schedule)


def _check_ranges(schedule: PageSchedule) -> None:
    step_count, action_count = len(schedule.step_set), len(schedule.action_page_in)
    _require(schedule.page_bytes > 0, "page_bytes is positive")
    _require(max(schedule.page_count, schedule.frame_count) <= INT32_MAX, "pages and frames are counted in 31 bits")
    _require(1 <= step_count < 2**30, "there is at least one step and fewer than 2**30")
    for name in ("action_evict", "action_step", "action_deadline"):
        _require(len(getattr(schedule, name)) == action_count, f"{name} has one entry per action")
    for name, low, high in (
        ("step_set", 0, INT32_MAX - 1),
        ("initial_pages", 0, schedule.page_count - 1),
        ("action_page_in", 0, schedule.page_count - 1),
        ("action_evict", -1, schedule.page_count - 1),
        ("action_step", 0, step_count),
        ("action_deadline", 0, 2 * step_count - 1),
    ):
        array = getattr(schedule, name)
        inside = len(array) == 0 or (low <= int(array.min()) and int(array.max()) <= high)
        _require(inside, f"{name} lies in {low}..{high}")
    _require(len(schedule.initial_pages) <= schedule.frame_count, "initial_pages fit in frame_count")
    distinct = len(np.unique(schedule.initial_pages)) == len(schedule.initial_pages)
    _require(distinct, "initial_pages holds each page once")
    _require(schedule.page_ins_per_pass == action_count, "page_ins_per_pass is the number of actions")
    hits = schedule.accesses_per_pass - schedule.page_ins_per_pass
    _require(schedule.hits_per_pass == hits, "hits_per_pass is accesses_per_pass less page_ins_per_pass")
    _require(schedule.lower_bound_page_ins <= action_count, "lower_bound_page_ins is at most page_ins_per_pass")
    moved_bound = schedule.lower_bound_moved_pages
    _require(moved_bound <= schedule.moved_pages_per_pass, "lower_bound_moved_pages is at most moved_pages_per_pass")
    _require(schedule.working_set_pages <= schedule.page_count, "working_set_pages is at most page_count")
    _require(schedule.largest_step_pages <= schedule.frame_count, "largest_step_pages is at most frame_count")


def _check_actions(schedule: PageSchedule) -> None:
    for name in ("action_step", "action_deadline"):
        _require(bool(np.all(np.diff(getattr(schedule, name)) >= 0)), f"{name} never decreases")
    in_time = bool(np.all(schedule.action_step <= schedule.action_deadline))
    _require(in_time, "action_step is at most action_deadline")
    initial = set(schedule.initial_pages.tolist())
    resident = set(initial)
    pairs = zip(schedule.action_page_in.tolist(), schedule.action_evict.tolist(), strict=True)
    for action, (page_in, evict) in enumerate(pairs):
        if evict >= 0:
            _require(evict in resident, f"action {action} evicts a resident page ({evict} is absent)")
            resident.remove(evict)
        _require(page_in not in resident, f"action {action} reads an absent page ({page_in} is resident)")
        resident.add(page_in)
        fits = len(resident) <= schedule.frame_count
        _require(fits, f"at most frame_count pages are resident (action {action} makes {len(resident)})")
    _require(resident == initial, "a pass leaves exactly initial_pages resident")


@dataclass(frozen=True)
class Simulation:
    """What `simulate` counted. page_ins: per pass. ahead_pages: over all acquires of the last pass, how many page-ins
    beyond what the step needed were already carried out: the depth of the read-ahead, in sum."""

    page_ins: tuple[int, ...]
    resident_pages_max: int
    ahead_pages: int


def simulate(schedule: PageSchedule, steps: Steps, *, passes: int = 3, eager: bool = True) -> Simulation:
    """Carry the schedule out on a shadow page table and hold it to its promises.

    eager: every action at the first moment its rule allows (the other extreme, False: only when an acquire has to wait
    for it). ValueError that names the pass, the step and the page when a page is absent at its acquire, a page in use
    would be evicted, a frame too many would be used, or an acquire would wait for an action that may never start.
    """
    return _Shadow(schedule, steps).run(passes, eager)


class _Shadow:
    def __init__(self, schedule: PageSchedule, steps: Steps) -> None:
        if not np.array_equal(schedule.step_set, steps.step_set):
            msg = "the schedule was made for other steps: step_set differs"
            raise ValueError(msg)
        self.schedule = schedule
        self.steps = steps
        self.resident = set(schedule.initial_pages.tolist())
        self.in_use: dict[int, int] = {}
        self.releases: list[list[int]] = [[] for _ in range(steps.count)]
        for step, end in enumerate(steps.step_end.tolist()):
            self.releases[end].append(step)
        self.actions = list(
            zip(
                schedule.action_page_in.tolist(),
                schedule.action_evict.tolist(),
                schedule.action_step.tolist(),
                schedule.action_deadline.tolist(),
                strict=True,
            )
        )
        self.next_action = 0  # counts on over passes
        self.resident_max = len(self.resident)

    def run(self, passes: int, eager: bool) -> Simulation:
        page_ins = []
        ahead = 0
        for turn in range(passes):
            before = self.next_action
            ahead = 0
            for step in range(self.steps.count):
                self._carry_out(turn, step, due_only=True)
                ahead += self.next_action - self._due_count(turn, step)
                self._acquire(turn, step)
                if eager:
                    self._carry_out(turn, step + 1, due_only=False)
                for opened in self.releases[step]:
                    self._release(opened)
                if eager:
                    self._carry_out(turn, step + 1, due_only=False)
            if not eager:
                while self.next_action < (turn + 1) * len(self.actions):
                    self._one_action(turn, self.steps.count, must=True)
            page_ins.append(self.next_action - before)
            if self.resident != set(self.schedule.initial_pages.tolist()):
                msg = f"pass {turn} does not end with initial_pages resident"
                raise ValueError(msg)
        return Simulation(tuple(page_ins), self.resident_max, ahead)

    def _due_count(self, turn: int, step: int) -> int:
        """Actions that must be over when this step is acquired."""
        deadlines = self.schedule.action_deadline
        late = int(np.searchsorted(deadlines, self.steps.count + step, side="right")) if turn > 0 else 0
        own = int(np.searchsorted(deadlines, step, side="right"))
        return max((turn - 1) * len(self.actions) + late if turn > 0 else 0, turn * len(self.actions) + own)

    def _carry_out(self, turn: int, acquired: int, *, due_only: bool) -> None:
        """acquired: steps 0..acquired-1 of this pass have been acquired. due_only: what step `acquired` waits for."""
        if due_only:
            while self.next_action < self._due_count(turn, acquired):
                self._one_action(turn, acquired, must=True)
            return
        while self.next_action < (turn + 1) * len(self.actions) and self._one_action(turn, acquired, must=False):
            pass

    def _one_action(self, turn: int, acquired: int, *, must: bool) -> bool:
        page_in, evict, step, _ = self.actions[self.next_action % len(self.actions)]
        allowed = step <= acquired and self.in_use.get(evict, 0) == 0
        if not allowed and must:
            msg = f"pass {turn}: step {acquired} waits for page {page_in}, but page {evict} can't be evicted yet"
            raise ValueError(msg)
        if not allowed:
            return False
        if evict >= 0 and evict not in self.resident:
            msg = f"pass {turn}, before step {acquired}: page {evict} is evicted but absent"
            raise ValueError(msg)
        self.resident.discard(evict)
        if page_in in self.resident:
            msg = f"pass {turn}, before step {acquired}: page {page_in} is read but resident"
            raise ValueError(msg)
        self.resident.add(page_in)
        self.resident_max = max(self.resident_max, len(self.resident))
        if len(self.resident) > self.schedule.frame_count:
            msg = f"pass {turn}, before step {acquired}: too many pages ({len(self.resident)}) are resident"
            raise ValueError(msg)
        self.next_action += 1
        return True

    def _acquire(self, turn: int, step: int) -> None:
        for page in self.steps.set_pages[int(self.steps.step_set[step])].tolist():
            if page not in self.resident:
                msg = f"pass {turn}, step {step}: page {page} is absent at its acquire"
                raise ValueError(msg)
            self.in_use[page] = self.in_use.get(page, 0) + 1

    def _release(self, step: int) -> None:
        for page in self.steps.set_pages[int(self.steps.step_set[step])].tolist():
            self.in_use[page] -= 1
