# SPDX-License-Identifier: Apache-2.0
"""How many pages stay through each gap, so that the fewest bytes move: eviction for dirty, dead and clean pages.

[Note: what leaves first]
Dead content costs nothing and never competes: a gap whose end overwrites the content is no gap (demand.py). Of the
others, one that ends last goes first (Belady's MIN, L. A. Belady, IBM Systems Journal 5(2), 1966, optimal for clean
uniform pages), but a page that would have to be written before it leaves saves twice as much when it stays. So the
distance of a dirty page's next use counts 1/1, 1/2 or not at all, each is tried, and the fewest bytes win. LRU's choice
is tried too, which makes "never more bytes than LRU" a matter of construction. Where HiGHS is installed, the optimum of
the linear program (keeping_bound.py), rounded down, is one more.

A pass is repeated for ever, so gaps lie on a circle: the choice is found by unrolling a few passes, repaired where the
last did not close, and then filled up.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from tensorpager.demand import Gaps, Int64Array, occupied
from tensorpager.policy import Circle, keep_most

__all__ = [
    "Traffic",
    "best_kept",
    "dirty_drops",
    "filled_up",
    "furthest_next_use",
    "lru_kept",
    "repaired",
    "traffic_of",
]

UNROLLED_PASSES_MIN = 4
UNROLLED_PASSES_MAX = 24
UNROLLED_GAPS_MAX = 100_000
CIRCLE_GAPS_MAX = 2_000
ROUNDING_GAPS_MAX = 200
#: Times the reading costs again that a dirty page is written: what its distance is divided by. See the note.
DIRTY_WEIGHTS = (1.0, 2.0, 1e9)


@dataclass(frozen=True)
class Traffic:
    """Pages moved in one pass."""

    page_ins: int
    writebacks: int

    @property
    def total(self) -> int:
        """Both directions."""
        return self.page_ins + self.writebacks


def dirty_drops(gaps: Gaps, kept: Int64Array) -> Int64Array:
    """int64 [gaps]: pages that have to be written when the gap begins: dropped now, and never before since changed.

    Of a group the first pages stay, the same in every gap, so a version has been written in full but for the smallest
    number that was ever kept.
    """
    written = np.zeros(gaps.count, np.int64)
    order = np.lexsort((gaps.order, gaps.version))
    least: dict[int, int] = {}
    columns = (order, gaps.version[order], gaps.pages[order], kept[order])
    for gap, version, pages, stay in zip(*(column.tolist() for column in columns), strict=True):
        if version < 0:
            continue
        before = least.get(version, pages)
        if stay < before:
            written[gap] = before - stay
            least[version] = stay
    return written


def traffic_of(gaps: Gaps, kept: Int64Array) -> Traffic:
    """What moves in a pass when `kept` pages stay through each gap."""
    dropped = gaps.pages - kept
    read = dropped if gaps.needed is None else dropped[gaps.needed]
    return Traffic(int(read.sum()), int(dirty_drops(gaps, kept).sum()))


def best_kept(gaps: Gaps, room: Int64Array, step_count: int, optimum: Int64Array | None = None) -> Int64Array:
    """int64 [gaps]: the pages to keep through each, at most room[t] >= 0 at any step t.

    optimum: the linear program's, rounded. Among many gaps it beats the sweeps, which are left out then; among few,
    what rounding loses may count.
    """
    if bool(np.all(occupied(gaps, gaps.pages, step_count) <= room)):
        return gaps.pages.copy()
    candidates = [] if optimum is None else [repaired(gaps, room, step_count, optimum)]
    if candidates and gaps.count > ROUNDING_GAPS_MAX:
        return filled_up(gaps, room, step_count, candidates[0])
    candidates.append(lru_kept(gaps, room, step_count))
    for weight in DIRTY_WEIGHTS:
        candidates += furthest_next_use(gaps, room, step_count, weight)
    if gaps.count <= CIRCLE_GAPS_MAX:
        candidates.append(_most_on_circle(gaps, room, step_count))
    filled = [filled_up(gaps, room, step_count, candidate) for candidate in candidates]
    return min(filled, key=lambda kept: traffic_of(gaps, kept).total)


def _most_on_circle(gaps: Gaps, room: Int64Array, step_count: int) -> Int64Array:
    """What policy.py keeps, for which every page is clean; exact for small cycles."""
    inner = np.flatnonzero(gaps.end > gaps.start + 1)
    columns = (gaps.start[inner], gaps.end[inner], gaps.pages[inner])
    circle = Circle(step_count, inner.tolist(), *(column.tolist() for column in columns))
    kept = gaps.pages.copy()
    kept[inner] = keep_most(circle, room, [])
    return kept


def furthest_next_use(gaps: Gaps, room: Int64Array, step_count: int, dirty_weight: float) -> list[Int64Array]:
    """Belady's MIN with a price on dirty pages; see the note at the head of the file."""
    return _swept(gaps, room, step_count, _ByNextUse(dirty_weight))


def lru_kept(gaps: Gaps, room: Int64Array, step_count: int) -> Int64Array:
    """What LRU keeps, given the same knowledge of dead content: the victim is what was used longest ago."""
    return _swept(gaps, room, step_count, _ByLastUse())[0]


class _ByNextUse:
    """Victims by distance; clean and dirty ones in a heap each, since only the dirty ones' distance is divided."""

    def __init__(self, dirty_weight: float) -> None:
        self._heaps: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        self._weight = dirty_weight

    def push(self, part: int, _start: int, end: int, *, dirty: bool) -> None:
        heapq.heappush(self._heaps[dirty], (-end, part))

    def top(self, step: int) -> tuple[int, bool]:
        """(part, dirty) of the next victim."""
        clean, dirty = self._heaps
        if clean and (not dirty or -clean[0][0] - step >= (-dirty[0][0] - step) / self._weight):
            return clean[0][1], False
        return dirty[0][1], True

    def pop(self, *, dirty: bool) -> None:
        heapq.heappop(self._heaps[dirty])


class _ByLastUse:
    def __init__(self) -> None:
        self._heap: list[tuple[int, int]] = []

    def push(self, part: int, start: int, _end: int, *, dirty: bool) -> None:
        del dirty
        heapq.heappush(self._heap, (start, part))

    def top(self, _step: int) -> tuple[int, bool]:
        return self._heap[0][1], False

    def pop(self, *, dirty: bool) -> None:
        del dirty
        heapq.heappop(self._heap)


def _swept(gaps: Gaps, room: Int64Array, step_count: int, victims: _ByNextUse | _ByLastUse) -> list[Int64Array]:
    """Unroll passes, and evict whenever a step is over-full.

    Two results: what stayed through the gaps of the last pass but one, and the mean of the passes before it. Where
    many gaps are alike, as in a cycle, a line serves one in this pass and another in the next; the mean holds some of
    each, and is within the room because every pass was.
    """
    sweep = _Sweep(gaps, step_count)
    passes = int(np.clip(UNROLLED_GAPS_MAX // max(gaps.count, 1), UNROLLED_PASSES_MIN, UNROLLED_PASSES_MAX))
    for step, free in enumerate(room.tolist() * passes):
        sweep.enter(step, victims)
        while sweep.occupied > free:
            sweep.evict(sweep.occupied - free, step, victims)
    kept = np.array(sweep.kept[: (passes - 1) * gaps.count], np.int64).reshape(passes - 1, gaps.count)
    return [repaired(gaps, room, step_count, each) for each in (kept[-1], kept[passes // 3 :].mean(0).astype(np.int64))]


class _Sweep:
    """The gaps of several passes in order of start. Gap g of pass p is instance p * count + g.

    An instance has two parts, clean pages (2 * instance) and dirty ones (2 * instance + 1), each dropped by itself.
    """

    def __init__(self, gaps: Gaps, step_count: int) -> None:
        self._columns = [column.tolist() for column in (gaps.start, gaps.end, gaps.pages, gaps.version, gaps.order)]
        self._count = gaps.count
        self._step_count = step_count
        self._ending: dict[int, list[int]] = {}
        self._parts: dict[int, int] = {}
        self._dirty_of: dict[int, int] = {}  # by version: pages that were never written since the change
        self._next = 0
        self.kept: list[int] = []
        self.occupied = 0

    def enter(self, step: int, victims: _ByNextUse | _ByLastUse) -> None:
        """Let the gaps go that end at this step, and take those in whose first step between uses this is."""
        for part in self._ending.pop(step, ()):
            self.occupied -= self._parts.pop(part)
        start_of, end_of, pages_of, version_of, order_of = self._columns
        while self._count:
            pass_index, gap = divmod(self._next, self._count)
            start = start_of[gap] + pass_index * self._step_count
            if start >= step:
                return
            end, pages, version = end_of[gap] + pass_index * self._step_count, pages_of[gap], version_of[gap]
            self._next += 1
            self.kept.append(pages)
            dirty = 0
            if version >= 0:
                dirty = pages if order_of[gap] == 0 else self._dirty_of.get(version, pages)
                self._dirty_of[version] = dirty
            if end == start + 1:
                continue
            instance = len(self.kept) - 1
            for part, amount in ((2 * instance, pages - dirty), (2 * instance + 1, dirty)):
                if amount:
                    self._parts[part] = amount
                    self._ending.setdefault(end, []).append(part)
                    victims.push(part, start, end, dirty=part % 2 == 1)
            self.occupied += pages

    def evict(self, amount: int, step: int, victims: _ByNextUse | _ByLastUse) -> None:
        """Drop up to `amount` pages of the next victim."""
        part, dirty = victims.top(step)
        held = self._parts.get(part, 0)
        dropped = min(held, amount)
        if held == dropped:
            victims.pop(dirty=dirty)
        if not dropped:
            return  # it ended, and was left in the heap
        self._parts[part] = held - dropped
        self.occupied -= dropped
        self.kept[part // 2] -= dropped
        if part % 2:
            self._dirty_of[self._columns[3][part // 2 % self._count]] -= dropped


def repaired(gaps: Gaps, room: Int64Array, step_count: int, kept: Int64Array) -> Int64Array:
    """Drop from the longest gaps wherever more is kept than there is room for."""
    kept = kept.copy()
    over = occupied(gaps, kept, step_count) - room
    for step in np.flatnonzero(over > 0).tolist():
        excess = int(over[step])
        if excess <= 0:
            continue
        around = _covering(gaps, step, step_count) & (kept > 0)
        for gap in sorted(np.flatnonzero(around).tolist(), key=lambda gap: (gaps.start[gap] - gaps.end[gap], gap)):
            dropped = min(excess, int(kept[gap]))
            kept[gap] -= dropped
            excess -= dropped
            if excess == 0:
                break
        over = occupied(gaps, kept, step_count) - room
    return kept


def _covering(gaps: Gaps, step: int, step_count: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    here = (gaps.start < step) & (step < gaps.end)
    return here | ((gaps.start < step + step_count) & (step + step_count < gaps.end))


def filled_up(gaps: Gaps, room: Int64Array, step_count: int, kept: Int64Array) -> Int64Array:
    """Keep more wherever there is room from a gap's beginning to its end, the shortest gaps first."""
    kept = kept.copy()
    free = np.tile(room - occupied(gaps, kept, step_count), 2)
    lacking = np.flatnonzero(kept < gaps.pages)
    length = (gaps.end - gaps.start)[lacking]
    for gap in lacking[np.lexsort((lacking, length))].tolist():
        first, last = int(gaps.start[gap]) + 1, int(gaps.end[gap])
        more = min(int(free[first:last].min()), int(gaps.pages[gap] - kept[gap])) if last > first else 0
        if more <= 0:
            continue
        kept[gap] += more
        for low, high in ((first + shift, last + shift) for shift in (-step_count, 0, step_count)):
            free[max(low, 0) : max(min(high, len(free)), 0)] -= more
    return kept
