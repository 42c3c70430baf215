# SPDX-License-Identifier: Apache-2.0
"""The least that any schedule can move, and the least time it can take: two linear programs over the gaps.

[Note: bytes]
k_g: pages kept through gap g, 0..pages. q_g: pages that are written back as gap g begins, because they are dropped for
the first time since the version was made: in the version's gaps up to g, the sum of q and k_g are pages or more. s_t:
pages kept at step t between uses, at most room_t. s goes up where gaps begin and down where they end, which keeps the
program sparse. Minimise the page-ins (pages - k) and the writebacks (q). Every schedule is a point of the program, on
average over its passes, so the optimum is a bound. Of a trace with very many steps only the fullest ones are checked:
leaving rows out makes the bound lower, never wrong, and what is kept is repaired by `keeping.best_kept`.

[Note: time]
The pass is cut into slots, each from the beginning of one step to the beginning of a later one. Beside what is kept,
there are pages read ahead and pages that wait to be written. A slot takes at least its compute and at least what its
transfers take; at both ends of its compute, all pages have to have frames. Changed pages may be written before they
leave, never before they were changed. What is left out (the order inside a slot, that a page is read after it left)
only makes the bound lower.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from tensorpager.demand import Gaps, Int64Array, occupied
from tensorpager.linear_program import Columns, Float64Array, LinearProgram

__all__ = ["KeepingBound", "TimeLimits", "least_bytes", "least_time", "rounded_evenly"]

#: Slots of a pass: (with up to so many gaps, so many). A finer bound is higher and its plan better, and takes longer.
SLOTS = ((8000, 1024), (2**62, 256))
ROUGH_SLOTS = 256
#: With more steps than this, room is asked for at the fullest step of each of so many stretches, and at the one after.
CHECKED_STEPS_MAX = 4096
CHECKED_STRETCHES = 1024
#: What a page moved costs beside a unit of time.
BYTES_COST = 1e-5
#: The solver's error: what is so close to a whole page is one.
ROUNDING = 1e-6
#: Sums are rounded to the nearest page, a tie within the solver's error upwards.
HALF_A_PAGE = 0.5 + ROUNDING


@dataclass(frozen=True, eq=False)
class KeepingBound:
    """cost: no schedule does with less; pages or seconds. kept: int64 [gaps], the optimum rounded down. evenly_kept:
    rounded so that up to any deadline as much is read as in the optimum, give or take a page; that may hold a few pages
    more than there is room for. level: int64 [steps], the pages that the optimum keeps at each step, rounded down as
    well: up to it, what rounding lost can be filled up."""

    cost: float
    kept: Int64Array
    evenly_kept: Int64Array
    level: Int64Array


@dataclass(frozen=True, eq=False)
class TimeLimits:
    """What time is made of. compute_seconds: float64 [steps]. Seconds per page that the drive reads and writes; pages
    that may be written per second on average, None for any number. duplex: reading does not slow writing down."""

    compute_seconds: Float64Array
    read_seconds: float
    write_seconds: float
    written_pages_per_second: float | None = None
    duplex: bool = False


def least_bytes(gaps: Gaps, room: Int64Array, step_count: int) -> KeepingBound:
    """The fewest pages moved in a pass, page-ins and writebacks together. room: int64 [steps], each 0 or more.

    Blocks for seconds where there are tens of thousands of gaps. Errors as in LinearProgram.solve.
    """
    program = LinearProgram()
    keeping = _Keeping(program, gaps, room, step_count, cost=1.0)
    cost, solution = program.solve()
    return KeepingBound(max(0.0, cost + keeping.constant), *keeping.rounded(solution))


def least_time(
    gaps: Gaps, room: Int64Array, step_count: int, limits: TimeLimits, *, rough: bool = False
) -> KeepingBound:
    """The least seconds a pass can take, and what to keep for it. See [Note: time]; otherwise as least_bytes.

    rough: fewer slots, for comparing orders of work quickly; the bound is lower then.
    """
    # In units of the time a page takes, so that HiGHS's tolerances fit; then of plans as fast, the one of fewer bytes.
    unit = max(limits.read_seconds, limits.write_seconds)
    rate = limits.written_pages_per_second
    scaled = TimeLimits(
        limits.compute_seconds / unit,
        limits.read_seconds / unit,
        limits.write_seconds / unit,
        None if rate is None else rate * unit,
        limits.duplex,
    )
    program = LinearProgram()
    keeping = _Keeping(program, gaps, room, step_count, cost=BYTES_COST)
    slots = ROUGH_SLOTS if rough else next(slots for most, slots in SLOTS if gaps.count <= most)
    _Slots(program, keeping, scaled, slots)
    cost, solution = program.solve()
    # cost <= time + BYTES_COST * (moved - all page-ins) for every schedule, and none has to move more than `most`.
    most = float(gaps.pages.sum() + gaps.pages[keeping.dirty].sum())
    seconds = (cost + keeping.constant - BYTES_COST * most) * unit
    return KeepingBound(max(seconds, float(limits.compute_seconds.sum())), *keeping.rounded(solution))


class _Keeping:
    """The variables and rows of [Note: bytes]. Costs count page-ins less those that would be all, `constant`."""

    def __init__(self, program: LinearProgram, gaps: Gaps, room: Int64Array, step_count: int, *, cost: float) -> None:
        self.gaps, self.room, self.step_count = gaps, room, step_count
        self.constant = cost * float(gaps.read_pages.sum())
        inner = gaps.end > gaps.start + 1
        saved = -cost if gaps.needed is None else np.where(gaps.needed, -cost, 0.0)
        self.kept = program.columns(gaps.count, cost=saved, lower=np.where(inner, 0, gaps.pages), upper=gaps.pages)
        self.dirty = np.flatnonzero(gaps.version >= 0)
        self.written = program.columns(len(self.dirty), cost=cost, upper=gaps.pages[self.dirty])
        self._chains(program)
        self.checked = _checked_steps(room)
        begin, end = self.interval(gaps.start + 1, gaps.end)
        seen = np.flatnonzero(end > begin)
        self.level = Level(program, begin[seen], end[seen], self.kept[seen], room[self.checked])

    def interval(self, begin: Int64Array, end: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Steps begin .. end - 1, which may go on in the next pass, as a range of the checked ones."""
        turn, count = len(self.checked), self.step_count
        found = [np.searchsorted(self.checked, each % count) + each // count * turn for each in (begin, end)]
        return found[0], found[1]

    def _chains(self, program: LinearProgram) -> None:
        """Row of gap j of a version: -k_j - (q_0 + .. + q_j) <= -pages."""
        gaps = self.gaps
        order = np.lexsort((gaps.order[self.dirty], gaps.version[self.dirty]))
        place_of: dict[int, list[int]] = {}
        rows: list[int] = []
        columns: list[int] = []
        for place in order.tolist():
            before = place_of.setdefault(int(gaps.version[self.dirty[place]]), [])
            before.append(place)
            rows += [place] * len(before)
            columns += before
        pages = gaps.pages[self.dirty].astype(np.float64)
        sums = (np.array(rows, np.int64), self.written[np.array(columns, np.int64)], -1.0)
        program.at_most(-pages, (np.arange(len(pages)), self.kept[self.dirty], -1.0), sums)

    def rounded(self, solution: Float64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
        """What to keep: whole pages, and whole pages in sum; and how many the solution keeps at each step."""
        exact = np.clip(solution[self.kept], 0, self.gaps.pages)
        level = occupied(self.gaps, exact, self.step_count)
        return _rounded_down(exact), rounded_evenly(self.gaps, exact), _rounded_down(level)


def _rounded_down(exact: Float64Array) -> Int64Array:
    return np.floor(exact + ROUNDING).astype(np.int64)


def rounded_evenly(gaps: Gaps, exact: Float64Array) -> Int64Array:
    """Whole pages whose sum over the gaps, in the order of their ends, is never off by more than half a page.

    An optimum spreads its reads over the pass, some of every tensor. Rounded one by one, they lose a page here and
    there, which filled up again are many in one stretch of the pass and none in another: reading ahead can't level that
    out where it has few frames.
    """
    order = np.lexsort((gaps.group, gaps.start, gaps.end))
    sums = np.floor(np.cumsum(exact[order]) + HALF_A_PAGE)
    kept = np.zeros(gaps.count, np.int64)
    kept[order] = np.diff(sums, prepend=0.0).astype(np.int64)
    return kept


def _checked_steps(room: Int64Array) -> Int64Array:
    count = len(room)
    if count <= CHECKED_STEPS_MAX:
        return np.arange(count)
    edges = np.linspace(0, count, CHECKED_STRETCHES + 1).astype(np.int64)
    fullest = [first + int(np.argmin(room[first:last])) for first, last in itertools.pairwise(edges.tolist())]
    return np.unique(np.array([*fullest, *((step + 1) % count for step in fullest)], np.int64))


class Level:
    """One variable per moment: the sum of the amounts whose interval [begin, end) holds it, on a circle of steps.

    Moments are the steps at which an interval begins or ends. room: int64 [steps], what the sum may be at most.
    """

    def __init__(
        self, program: LinearProgram, begin: Int64Array, end: Int64Array, amount: Columns, room: Int64Array
    ) -> None:
        self._steps = len(room)
        start, stop = begin % self._steps, end % self._steps
        self.marks = np.unique(np.concatenate([[0], start, stop]))
        self.columns = program.columns(len(self.marks), upper=np.minimum.reduceat(room, self.marks))
        entering, leaving = np.searchsorted(self.marks, start), np.searchsorted(self.marks, stop)
        turn = np.arange(1, len(self.marks))
        rising, falling = entering > 0, leaving > 0
        program.equal(
            np.zeros(len(self.marks)),
            (turn, self.columns[1:], 1.0),
            (turn, self.columns[:-1], -1.0),
            (entering[rising], amount[rising], -1.0),
            (leaving[falling], amount[falling], 1.0),
            ([0], self.columns[:1], 1.0),
            (0, amount[end > self._steps], -1.0),
        )

    def at(self, steps: Int64Array) -> Columns:
        """The variables that hold at these of its steps."""
        return self.columns[np.searchsorted(self.marks, steps, side="right") - 1]


class _Slots:
    """The variables and rows of [Note: time]. Slot i begins at step begin[i]; last[i] is its last step."""

    def __init__(self, program: LinearProgram, keeping: _Keeping, limits: TimeLimits, slot_count: int) -> None:
        self._keeping, self._limits = keeping, limits
        # A slot begins at a checked step and ends with the one before the next slot's, which has to be checked as well.
        checked = keeping.checked
        follows = np.flatnonzero(np.isin((checked - 1) % keeping.step_count, checked))
        chosen = follows[np.unique(np.linspace(0, len(follows) - 1, min(slot_count, len(follows))).astype(np.int64))]
        self.begin = checked[chosen]
        count = len(self.begin)
        self.last = (np.roll(self.begin, -1) - 1) % keeping.step_count
        self._at = (chosen, np.searchsorted(checked, self.last))
        compute = np.add.reduceat(limits.compute_seconds, self.begin)
        compute[-1] += limits.compute_seconds[: self.begin[0]].sum()
        self.busy = program.columns(count, cost=1.0, lower=compute)  # to the end of the last step's compute
        self.stall = program.columns(count, cost=1.0)  # and from there to the beginning of the next slot
        self.read = (program.columns(count), program.columns(count))
        self.write = (program.columns(count), program.columns(count))
        rows = np.arange(count)
        for part, time in ((0, self.busy), (1, self.stall)):
            reading = (rows, self.read[part], limits.read_seconds)
            writing = (rows, self.write[part], limits.write_seconds)
            for moving in ((reading,), (writing,)) if limits.duplex else ((reading, writing),):
                program.at_most(np.zeros(count), *moving, (rows, time, -1.0))
        if limits.written_pages_per_second is not None:
            rate = limits.written_pages_per_second
            terms = [(0, columns, 1.0) for columns in self.write] + [(0, self.busy, -rate), (0, self.stall, -rate)]
            program.at_most([0.0], *terms)
        self._frames(program, rows)

    def _frames(self, program: LinearProgram, rows: Int64Array) -> None:
        """At the beginning of the slot and at the end of its compute: kept + read ahead + waiting <= room."""
        count, keeping = len(rows), self._keeping
        ahead = (program.columns(count), program.columns(count))
        waiting = (program.columns(count), program.columns(count))
        balance = (program.columns(count, lower=-np.inf), program.columns(count, lower=-np.inf))
        following = (rows + 1) % count
        early = self._cleanable(program)
        for part, steps in enumerate(self._at):
            room = keeping.room[keeping.checked[steps]].astype(np.float64)
            level = (rows, keeping.level.at(steps), 1.0)
            program.at_most(room, level, (rows, ahead[part], 1.0), (rows, waiting[part], 1.0))
            # What was read ahead has left before: no more can be there than lives between uses.
            alive = occupied(keeping.gaps, keeping.gaps.pages, keeping.step_count)
            program.at_most(alive[keeping.checked[steps]].astype(np.float64), level, (rows, ahead[part], 1.0))
            program.at_most(np.zeros(count), (rows, balance[part], 1.0), (rows, waiting[part], -1.0))
            program.at_most(np.zeros(count), (rows, balance[part], -1.0), (rows, early.at(steps), -1.0))
        # Pages needed inside a slot (after its first step), and those the next slot begins with.
        slot, at_edge = self._slot_of(keeping.gaps.end % keeping.step_count)
        for part, target, mask in ((0, (rows, ahead[1]), ~at_edge), (1, (following, ahead[0]), at_edge)):
            needed = slot[mask] if part == 0 else (slot[mask] - 1) % count
            pages = np.bincount(needed, weights=keeping.gaps.pages[mask].astype(np.float64), minlength=count)
            source = ahead[0] if part == 0 else ahead[1]
            program.equal(
                -pages,
                (rows, target[1][target[0]] if part else target[1], 1.0),
                (rows, source, -1.0),
                (rows, self.read[part], -1.0),
                (needed, keeping.kept[mask], -1.0),
            )
        # Pages that leave changed: after steps before the slot's last one, or after that.
        left = keeping.gaps.start[keeping.dirty]
        slot = (np.searchsorted(self.begin, left, side="right") - 1) % count
        is_last = left == self.last[slot]
        for part, mask in ((0, ~is_last), (1, is_last)):
            program.equal(
                np.zeros(count),
                (rows, balance[1] if part == 0 else balance[0][following], 1.0),
                (rows, balance[0] if part == 0 else balance[1], -1.0),
                (rows, self.write[part], 1.0),
                (slot[mask], keeping.written[mask], -1.0),
            )

    def _slot_of(self, steps: Int64Array) -> tuple[Int64Array, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
        slot = (np.searchsorted(self.begin, steps, side="right") - 1) % len(self.begin)
        return slot, self.begin[slot] == steps

    def _cleanable(self, program: LinearProgram) -> Level:
        """Changed pages that are there and will leave later: what may be written early."""
        gaps, dirty = self._keeping.gaps, self._keeping.dirty
        first_start = {int(gaps.version[gap]): int(gaps.start[gap]) for gap in dirty.tolist() if gaps.order[gap] == 0}
        late = np.array([gaps.order[gap] > 0 for gap in dirty.tolist()], np.bool_)
        begin = np.array([first_start[int(gaps.version[gap])] for gap in dirty[late].tolist()], np.int64) + 1
        end = gaps.start[dirty[late]] + 1
        wraps = end <= begin
        first, last = self._keeping.interval(begin, end + wraps * self._keeping.step_count)
        seen = np.flatnonzero(last > first)
        unlimited = np.full(len(self._keeping.checked), 2**50, np.int64)
        return Level(program, first[seen], last[seen], self._keeping.written[late][seen], unlimited)
