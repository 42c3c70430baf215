# SPDX-License-Identifier: Apache-2.0
"""When everything moves: transfers on links of measured bandwidth, beside the steps' compute, within the budget.

[Note: the model]
A step runs when the one before has ended and its pages are there; it takes its compute time. A link (drive, to the
device, to the host) carries one transfer at a time at its bandwidth; the drive's reads and writes share it. A transfer
between drive and device passes both its links, pipelined: it is done when the later one is.

Reading ahead goes in the order of the deadlines. A page-in may begin at step s for step e when at every step from s to
e its frame is free, with all that the plan keeps there; so nothing read ahead can ever be in the way of a step, and no
order of events deadlocks. What leaves dirty holds its frame until it is written, so it goes to the drive before reads
that can wait for it and still arrive in time; where reads are late already, they go first. Reads that find no frame
wait for writes. So a drive is idle only when nothing can move.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from dataclasses import dataclass, replace

import numpy as np

from tensorpager.demand import Demand, Int64Array, occupied
from tensorpager.keeping import dirty_drops

__all__ = ["DRIVE", "HOST", "PASSES", "History", "Links", "Pace", "Transfer", "pace", "play"]

PASSES = 3
#: Page-ins that are looked through for one that can begin, when those before it can't yet.
LOOK_AHEAD = 64
#: How long frames are reserved for pages that leave changed, in times of what their own writing takes. Where other
#: transfers come between and it matters, `planner` tries longer times as well.
WRITE_PATIENCE = 1.0
#: Where a transfer ends or begins, beside the device.
DRIVE, HOST = 0, 1


@dataclass(frozen=True)
class Links:
    """Seconds per page. to_device and to_host are 0 where device memory is the host's."""

    drive_read: float
    drive_write: float
    to_device: float = 0.0
    to_host: float = 0.0


@dataclass(frozen=True, slots=True)
class Transfer:
    """Pages first .. first + count - 1 of a group, moved for a gap. Seconds count from the beginning of the pass.

    page_in: into the device, else out of it. tier: DRIVE or HOST, the other end. step: the page-in's deadline, or the
    step after which the pages leave; the number of steps or more lies in the next pass, below 0 in the one before.
    """

    group: int
    first: int
    count: int
    page_in: bool
    tier: int
    step: int
    begin_seconds: float
    end_seconds: float


@dataclass(frozen=True, eq=False)
class Pace:
    """One pass in steady state. stall_seconds: float64 [steps], what each step waits for pages or frames."""

    pass_seconds: float
    stall_seconds: np.ndarray[tuple[int], np.dtype[np.float64]]
    step_begin_seconds: np.ndarray[tuple[int], np.dtype[np.float64]]
    drive_busy_seconds: float
    peak_pages: int
    transfers: tuple[Transfer, ...]


@dataclass(slots=True)
class _Fetch:
    group: int
    first: int
    count: int
    after: int
    deadline: int


@dataclass(slots=True)
class _Leave:
    group: int
    first: int
    count: int
    tier: int
    step: int
    written_at: float = 0.0  # when the last part that was written early is on the drive
    written: int = 0  # and how much that was


@dataclass(slots=True)
class _Link:
    free: float = 0.0
    busy: float = 0.0

    def carry(self, seconds: float, earliest: float) -> float:
        self.free = max(self.free, earliest) + seconds
        self.busy += seconds
        return self.free


@dataclass(frozen=True, eq=False)
class History:
    """Passes one after another from a cold start, in which what is kept across the pass's end is there already.

    One entry per step of all passes; seconds and transfers' steps count from the first one.
    """

    begins: list[float]
    stalls: list[float]
    transfers: list[Transfer]
    end_seconds: float
    peak_pages: int


def pace(
    demand: Demand,
    kept: Int64Array,
    host_kept: Int64Array,
    compute_seconds: list[float],
    links: Links,
    frames: int,
    patience: float = WRITE_PATIENCE,
) -> Pace:
    """Play PASSES passes and report the last; arguments as for play."""
    player = _Player(demand, kept, host_kept, compute_seconds, links, frames, patience)
    for step in range(demand.step_count * PASSES):
        player.run_step(step)
    past = player.history()
    first = (PASSES - 1) * demand.step_count
    zero = past.begins[first] - past.stalls[first]
    return Pace(
        pass_seconds=past.end_seconds - zero,
        stall_seconds=np.array(past.stalls[first:]),
        step_begin_seconds=np.array(past.begins[first:]) - zero,
        drive_busy_seconds=player.drive_seconds(),
        peak_pages=past.peak_pages,
        transfers=tuple(
            replace(
                moved,
                step=moved.step - first,
                begin_seconds=moved.begin_seconds - zero,
                end_seconds=moved.end_seconds - zero,
            )
            for moved in sorted(past.transfers, key=lambda moved: moved.begin_seconds)
            if zero <= moved.begin_seconds < past.end_seconds
        ),
    )


def play(
    demand: Demand,
    kept: Int64Array,
    host_kept: Int64Array,
    compute_seconds: list[float],
    links: Links,
    frames: int,
    patience: float = WRITE_PATIENCE,
) -> History:
    """PASSES passes, step by step.

    kept, host_kept: int64 [gaps], pages that stay on the device, and of those that don't how many wait in the host
    tier. frames: of the device; ValueError when a step needs more than that with what is kept. patience: see
    WRITE_PATIENCE.
    """
    player = _Player(demand, kept, host_kept, compute_seconds, links, frames, patience)
    for step in range(demand.step_count * PASSES):
        player.run_step(step)
    return player.history()


class _Player:
    def __init__(
        self,
        demand: Demand,
        kept: Int64Array,
        host_kept: Int64Array,
        compute_seconds: list[float],
        links: Links,
        frames: int,
        patience: float,
    ) -> None:
        self._steps = demand.step_count
        self._compute = compute_seconds
        self._computed = [0.0, *itertools.accumulate(compute_seconds)]  # before each step, and in the whole pass
        self._links = links
        self._frames = frames
        level = demand.in_use + occupied(demand.gaps, kept, self._steps)
        if int(level.max()) > frames:
            msg = f"step {int(level.argmax())} holds {int(level.max())} pages, the budget {frames}"
            raise ValueError(msg)
        self._level = np.tile(level, PASSES + 1)  # planned, and what was read ahead
        self._fetches: tuple[deque[_Fetch], deque[_Fetch]] = (deque(), deque())
        self._leaving: dict[int, list[_Leave]] = {}
        self._writes: deque[_Leave] = deque()
        self._pending = 0  # pages that have left and hold their frame until they are written
        self._made: dict[int, list[_Leave]] = {}  # what each step changes that will leave later, not at once
        self._early: list[tuple[int, int, int, _Leave]] = []  # by the step it leaves after: what may be written early
        self._unwritten: dict[int | None, int] = {}  # of these, by group
        self._written_at: dict[int, float] = {}  # when the last write of a group is done
        self._flying: deque[tuple[float, int]] = deque()  # (done at, pages) of the writes that have begun
        self._drive, self._to_device, self._to_host = _Link(), _Link(), _Link()
        self._now = 0.0
        self._arrived = [0.0] * (self._steps * (PASSES + 1))
        self._begins: list[float] = []
        self._stalls: list[float] = []
        self._transfers: list[Transfer] = []
        self._busy_before = 0.0
        self._measured_from = (PASSES - 1) * self._steps
        self._peak = int(level.max())
        self._list_transfers(demand, kept, host_kept)
        self._waiting = self._expected_waiting(demand, kept + host_kept, frames - level, patience)

    def _list_transfers(self, demand: Demand, kept: Int64Array, host_kept: Int64Array) -> None:
        gaps = demand.gaps
        dirty = dirty_drops(gaps, kept + host_kept)
        dropped = np.flatnonzero(kept < gaps.pages)
        making = dict(zip(gaps.version[gaps.order == 0].tolist(), gaps.start[gaps.order == 0].tolist(), strict=True))
        made_at = np.array([making.get(version, -1) for version in gaps.version.tolist()], np.int64)
        columns = (gaps.group, gaps.pages, gaps.start, gaps.end, kept, host_kept, dirty, made_at)
        rows = [tuple(int(column[gap]) for column in columns) for gap in dropped.tolist()]
        fetches: tuple[list[_Fetch], list[_Fetch]] = ([], [])
        for turn in range(-1, PASSES):
            shift = turn * self._steps
            for group, pages, start, end, stay, in_host, to_write, made in rows:
                for tier, first, count in ((HOST, stay, in_host), (DRIVE, stay + in_host, pages - stay - in_host)):
                    if count and end + shift >= 0:
                        fetches[tier].append(_Fetch(group, first, count, start + shift, end + shift))
                if turn < 0:
                    continue
                left = self._leaving.setdefault(start + shift, [])
                if to_write:
                    leave = _Leave(group, stay + in_host, to_write, DRIVE, start + shift)
                    left.append(leave)
                    if made != start and not host_kept.any():  # with a host tier the page may be there meanwhile
                        self._made.setdefault(made + shift - (self._steps if made > start else 0), []).append(leave)
                if in_host:
                    left.append(_Leave(group, stay, in_host, HOST, start + shift))
        for step in [step for step in self._made if step < 0]:
            self._may_be_early(step)
        for queue, listed in zip(self._fetches, fetches, strict=True):
            queue.extend(sorted(listed, key=lambda fetch: (fetch.deadline, fetch.group, fetch.first)))

    def _expected_waiting(self, demand: Demand, above: Int64Array, room: Int64Array, patience: float) -> Int64Array:
        """Pages that will wait to be written at each step: each for `patience` times what its own writing takes."""
        dirty = dirty_drops(demand.gaps, above)
        ended = np.cumsum(np.tile(self._compute, 2))
        change = np.zeros(2 * self._steps + 1, np.int64)
        for gap in np.flatnonzero(dirty).tolist():
            start, pages = int(demand.gaps.start[gap]), int(dirty[gap])
            until = ended[start] + patience * pages * self._links.drive_write
            change[start + 1] += pages
            change[min(int(np.searchsorted(ended, until)) + 1, start + self._steps)] -= pages
        waiting = np.cumsum(change[:-1])
        once = waiting[: self._steps] + waiting[self._steps :]
        return np.tile(np.minimum(once, room), PASSES + 1)

    def _may_be_early(self, step: int) -> None:
        for leave in self._made.pop(step, ()):
            heapq.heappush(self._early, (leave.step, leave.group, leave.first, leave))

    # -- a step

    def run_step(self, step: int) -> None:
        """Wait for what the step needs, compute, and use the time for reading ahead and writing."""
        ended = self._now
        if step == self._measured_from:
            self._busy_before = self._drive.busy
        for tier in (HOST, DRIVE):
            queue = self._fetches[tier]
            while queue and queue[0].deadline <= step:
                freed = self._make_frames(step, queue[0].group)
                self._fetch(queue, 0, tier, step, queue[0].count, max(ended, freed))
        begin = max(ended, self._arrived[step], self._make_frames(step, None))
        self._move_until(begin, step, ended)
        self._peak = max(self._peak, int(self._level[step]) + self._pending)
        self._begins.append(begin)
        self._stalls.append(begin - ended)
        self._now = begin + self._compute[step % self._steps]
        self._move_until(self._now, step, begin)
        self._may_be_early(step)
        for leave in self._leaving.pop(step, ()):
            if leave.written_at > self._now:
                self._flying.append((leave.written_at, leave.written))
            if not leave.count:
                continue
            self._writes.append(leave)
            self._pending += leave.count
            self._unwritten[leave.group] = self._unwritten.get(leave.group, 0) + leave.count
        while self._flying and self._flying[0][0] <= self._now:
            self._flying.popleft()

    def _make_frames(self, step: int, group: int | None) -> float:
        """Write until the step's pages have frames and nothing of the group waits to be written; when that is done."""
        freed = 0.0
        while self._writes:
            excess = int(self._level[step]) + self._pending - self._frames
            if self._unwritten.get(group, 0) > 0:
                excess = self._writes[0].count
            if excess <= 0:
                break
            freed = self._write(min(excess, self._writes[0].count), self._now)
        while self._flying and int(self._level[step]) + self._pending + self._in_flight(0.0) > self._frames:
            freed = max(freed, self._flying.popleft()[0])
        return freed

    def _in_flight(self, moment: float) -> int:
        """Pages whose write has begun and is not done at a moment; their frames are not free yet."""
        return sum(amount for done, amount in self._flying if done > moment)

    # -- transfers

    def _move_until(self, limit: float, step: int, earliest: float) -> None:
        """Keep the links busy while the step computes: page-ins by deadline, writes where none can begin."""
        moving = True
        while moving:
            moving = self._write_before_reading(limit, earliest)
            for tier, link in ((HOST, self._to_device), (DRIVE, self._drive)):
                queue = self._fetches[tier]
                if moving or not queue or link.free >= limit:
                    continue
                place = self._first_possible(queue, step)
                amount = self._room_for(queue[place], step, max(link.free, earliest)) if place >= 0 else 0
                if amount > 0:
                    self._fetch(queue, place, tier, step, amount, earliest)
                    moving = True
            if not moving and self._writes:
                link = self._to_host if self._writes[0].tier == HOST else self._drive
                if link.free < limit:
                    self._write_until(limit, earliest)
                    moving = True
            if not moving and self._drive.free < limit:
                moving = self._write_early(limit, step, earliest)
            if not moving and self._flying and earliest < self._flying[0][0] < limit:
                earliest = self._flying.popleft()[0]
                moving = True

    def _write_before_reading(self, limit: float, earliest: float) -> bool:
        """Write what has left, as long as reads can wait for it. Whether there was any.

        Pages that wait to be written and pages read long before their time compete for frames: with the reads first,
        both pile up until a step has to wait for writes although the drive was never idle.
        """
        if not self._writes or self._writes[0].tier == HOST or self._drive.free >= limit:
            return False
        slack = self._reading_slack(limit, max(self._drive.free, earliest))
        if slack < self._links.drive_write:
            return False
        self._write_until(min(limit, max(self._drive.free, earliest) + slack), earliest)
        return True

    def _reading_slack(self, limit: float, moment: float) -> float:
        """Seconds for which the drive could do something else from a moment on, and the next reads be in time.

        limit: when the step that comes begins, or the one that runs ends.
        """
        slack, needed = float("inf"), 0.0
        ahead = limit - moment - self._computed_before(len(self._begins))
        for fetch in itertools.islice(self._fetches[DRIVE], LOOK_AHEAD):
            needed += self._links.drive_read * fetch.count
            slack = min(slack, ahead + self._computed_before(fetch.deadline) - needed)
            if slack < 0:
                break
        return slack

    def _computed_before(self, step: int) -> float:
        turn, place = divmod(step, self._steps)
        return turn * self._computed[-1] + self._computed[place]

    def _first_possible(self, queue: deque[_Fetch], step: int) -> int:
        """The place of the first page-in whose pages have left, and are on the drive; -1 when it is too far away."""
        for place, fetch in enumerate(itertools.islice(queue, LOOK_AHEAD)):
            if fetch.after < step and not self._unwritten.get(fetch.group, 0):
                return place
        return -1

    def _room_for(self, fetch: _Fetch, step: int, moment: float) -> int:
        """How much of a page-in for a later step may begin now."""
        now_free = self._frames - int(self._level[step]) - self._pending - self._in_flight(moment)
        if now_free <= 0:
            return 0
        # What waits to be written counts all the way, and what will wait then: reading ahead must not take the frames
        # that a step to come would have to wait for.
        level = self._level[step : fetch.deadline]
        fullest = int((level + np.maximum(self._waiting[step : fetch.deadline], self._pending)).max())
        return min(self._frames - fullest, now_free, fetch.count)

    def _fetch(self, queue: deque[_Fetch], place: int, tier: int, step: int, amount: int, earliest: float) -> None:
        fetch = queue[place]
        earliest = max(earliest, self._written_at.get(fetch.group, 0.0))
        self._level[step : fetch.deadline] += amount
        seconds = self._links.drive_read * amount
        done = 0.0
        if tier == DRIVE:
            done = self._drive.carry(seconds, earliest)
            begin = done - seconds
            done = max(done, self._to_device.carry(self._links.to_device * amount, begin))
        else:
            done = self._to_device.carry(self._links.to_device * amount, earliest)
            begin = done - self._links.to_device * amount
        self._arrived[fetch.deadline] = max(self._arrived[fetch.deadline], done)
        self._note(Transfer(fetch.group, fetch.first, amount, True, tier, fetch.deadline, begin, done))
        fetch.first += amount
        fetch.count -= amount
        if not fetch.count:
            del queue[place]

    def _write_early(self, limit: float, step: int, earliest: float) -> bool:
        """Write some of the next pages that will leave changed, while they are still there. Whether there were any."""
        while self._early and (self._early[0][3].count == 0 or self._early[0][0] <= step):
            heapq.heappop(self._early)
        if not self._early:
            return False
        leave = self._early[0][3]
        left = limit - max(self._drive.free, earliest)
        amount = max(1, min(leave.count, int(left / self._links.drive_write)))
        leave.written_at, leave.written = self._write_pages(leave, amount, earliest), amount
        return True

    def _write_until(self, limit: float, earliest: float) -> None:
        leave = self._writes[0]
        link = self._to_host if leave.tier == HOST else self._drive
        rate = self._links.to_host if leave.tier == HOST else self._links.drive_write
        left = limit - max(link.free, earliest)
        amount = leave.count if rate == 0 else max(1, min(leave.count, int(left / rate)))
        self._write(amount, earliest)

    def _write(self, amount: int, earliest: float) -> float:
        leave = self._writes[0]
        done = self._write_pages(leave, amount, earliest)
        self._pending -= amount
        self._unwritten[leave.group] -= amount
        self._flying.append((done, amount))
        if not leave.count:
            self._writes.popleft()
        return done

    def _write_pages(self, leave: _Leave, amount: int, earliest: float) -> float:
        to_host = self._links.to_host * amount
        done = self._to_host.carry(to_host, earliest)
        begin = done - to_host
        if leave.tier == DRIVE:
            seconds = self._links.drive_write * amount
            done = max(done, self._drive.carry(seconds, begin))
            begin = min(begin, done - seconds)
        self._note(Transfer(leave.group, leave.first, amount, False, leave.tier, leave.step, begin, done))
        self._written_at[leave.group] = done
        leave.first += amount
        leave.count -= amount
        return done

    def _note(self, transfer: Transfer) -> None:
        self._transfers.append(transfer)

    def history(self) -> History:
        """All that happened so far."""
        return History(self._begins, self._stalls, self._transfers, self._now, self._peak)

    def drive_seconds(self) -> float:
        """Of the last pass."""
        return self._drive.busy - self._busy_before
