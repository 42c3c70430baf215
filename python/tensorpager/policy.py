# SPDX-License-Identifier: Apache-2.0
"""Which pages stay resident between their uses: Belady's MIN on the circle of a repeated pass, its bound, and LRU.

[Note: gaps on a circle]
Every page-in ends a gap that was not kept, so minimising page-ins means keeping as many page gaps as possible. Step t
has room for frame_count minus the pages in use at t; a kept gap takes one place in each step of its interior. On a
line MIN (when over-full, drop the gap that ends last) keeps the most. On a circle two more things are needed: which
gaps cross the cut where the circle is opened (found by unrolling the pass many times and looking at what MIN does
there), and a proof of how far from the optimum the result can be (`page_in_bound`, from prices of a place at each
step).

Worked example: four layers of w pages, room for two layers. Keeping one whole layer costs 3w page-ins a pass. Keeping a
third of every layer fits as well (three thirds beside the layer in use) and costs 8w/3, which is the optimum.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tensorpager.steps import Int64Array, Steps, UseClasses, use_classes

UNROLL_GAPS_MAX = 40_000
UNROLL_PASSES_MIN = 4
UNROLL_PASSES_MAX = 32
BOUND_GAPS_MAX = 12_000
BOUND_ROUNDS_MAX = 64
CUT_COUNT = 8
PRICE_TOLERANCE = 0.125
SPARE_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class Circle:
    """The gaps with an interior, as plain lists. Gap i takes a place in steps start[i] + 1 .. end[i] - 1, mod
    step_count.

    index: position in UseClasses. start ascending, 0 <= start < step_count, start + 2 <= end <= start + step_count.
    """

    step_count: int
    index: list[int]
    start: list[int]
    end: list[int]
    pages: list[int]


def circle_of(classes: UseClasses) -> Circle:
    """The gaps of a pass in which something can be gained; neighbouring uses are always kept and cost nothing."""
    inner = np.flatnonzero(classes.gap_end > classes.gap_start + 1)
    return Circle(
        step_count=classes.step_count,
        index=inner.tolist(),
        start=classes.gap_start[inner].tolist(),
        end=classes.gap_end[inner].tolist(),
        pages=classes.gap_pages[inner].tolist(),
    )


def min_on_line(start: list[int], end: list[int], pages: list[int], room: list[int]) -> list[int]:
    """Belady's MIN: how many pages of each gap to keep so that no step t of 0..len(room)-1 holds more than room[t].

    start ascending, -1 or more; gaps may end after the line. Dropping the gap that ends last is optimal here.
    """
    kept = list(pages)
    ending = [0] * (max(len(room), max(end, default=0)) + 1)
    by_end: list[tuple[int, int]] = []
    occupied = 0
    cursor = 0
    for step, step_room in enumerate(room):
        while cursor < len(start) and start[cursor] < step:
            heapq.heappush(by_end, (-end[cursor], cursor))
            ending[end[cursor]] += pages[cursor]
            occupied += pages[cursor]
            cursor += 1
        occupied -= ending[step]
        while occupied > step_room:
            gap = by_end[0][1]
            dropped = min(kept[gap], occupied - step_room)
            kept[gap] -= dropped
            ending[end[gap]] -= dropped
            occupied -= dropped
            if kept[gap] == 0:
                heapq.heappop(by_end)
    return kept


def keep_most(circle: Circle, room: Int64Array, hints: list[list[int]], *, quick: bool = False) -> list[int]:
    """Pages to keep of each gap of the circle, every pass the same, within room[t] >= 0 at every step.

    hints: further assignments worth trying (each within room). The result keeps at least as much as the best of them.
    quick: look at fewer passes and leave it at the first result.
    """
    if not circle.index:
        return []
    cut = int(np.argmin(room))
    unrolled = _unroll(circle, room, cut, UNROLL_PASSES_MIN if quick else UNROLL_PASSES_MAX)
    tail = unrolled[len(unrolled) // 2 :]
    candidates = [*tail[-8:], [sum(column) // len(tail) for column in zip(*tail, strict=True)], *hints]
    best: list[int] = []
    seen: set[tuple[int, ...]] = set()
    for candidate in candidates:
        crossing = tuple(candidate[gap] for gap in _crossing(circle, cut))
        if crossing in seen:
            continue
        seen.add(crossing)
        solved = _solve_from(circle, room, cut, candidate)
        if sum(solved) > sum(best) or not best:
            best = solved
    return best if quick else _improve(circle, room, best)


def _improve(circle: Circle, room: Int64Array, kept: list[int]) -> list[int]:
    """Open the circle elsewhere and solve the line again: never worse, since the line is solved exactly."""
    cuts = sorted({position * circle.step_count // CUT_COUNT for position in range(CUT_COUNT)})
    improved = True
    while improved:
        improved = False
        for cut in cuts:
            solved = _solve_from(circle, room, cut, kept)
            if sum(solved) > sum(kept):
                kept, improved = solved, True
    return kept


def _crossing(circle: Circle, cut: int) -> list[int]:
    """Gaps with interior steps on both sides of the cut (that is, in step cut - 1 and in step cut)."""
    count = circle.step_count
    shifted = [(start - cut) % count for start in circle.start]
    return [
        gap
        for gap, start in enumerate(shifted)
        if start < count - 1 and start + circle.end[gap] - circle.start[gap] > count
    ]


def _from_cut(circle: Circle, cut: int) -> tuple[list[int], list[int], list[int]]:
    """(gaps in order of start, starts, ends) with steps renamed so that the line begins at the cut."""
    count = circle.step_count
    renamed = []
    for gap, (start, end) in enumerate(zip(circle.start, circle.end, strict=True)):
        first = (start - cut) % count
        if first == count - 1:
            first = -1
        renamed.append((first, gap, first + end - start))
    renamed.sort()
    return [gap for _, gap, _ in renamed], [first for first, _, _ in renamed], [last for _, _, last in renamed]


def _solve_from(circle: Circle, room: Int64Array, cut: int, assignment: list[int]) -> list[int]:
    """The best kept pages among those that agree with the assignment on all gaps that cross the cut."""
    kept = [0] * len(circle.index)
    left = np.roll(room, -cut)
    crossing = set(_crossing(circle, cut))
    for gap in crossing:
        kept[gap] = assignment[gap]
        if kept[gap]:
            first = (circle.start[gap] + 1 - cut) % circle.step_count
            left[first:] -= kept[gap]
            left[: first + circle.end[gap] - circle.start[gap] - 1 - circle.step_count] -= kept[gap]
    assert int(left.min()) >= 0, "the assignment over-fills a step"
    order, start, end = _from_cut(circle, cut)
    free = [position for position, gap in enumerate(order) if gap not in crossing]
    solved = min_on_line(
        [start[position] for position in free],
        [end[position] for position in free],
        [circle.pages[order[position]] for position in free],
        left.tolist(),
    )
    for position, amount in zip(free, solved, strict=True):
        kept[order[position]] = amount
    return kept


def _unroll(circle: Circle, room: Int64Array, cut: int, passes_max: int) -> list[list[int]]:
    """MIN over many passes in a row from an empty start: kept pages of each gap, for all passes but the last."""
    passes = min(max(UNROLL_GAPS_MAX // len(circle.index), UNROLL_PASSES_MIN), passes_max)
    order, start, end = _from_cut(circle, cut)
    count = circle.step_count
    flat = min_on_line(
        [first + turn * count for turn in range(passes) for first in start],
        [last + turn * count for turn in range(passes) for last in end],
        [circle.pages[gap] for _ in range(passes) for gap in order],
        np.tile(np.roll(room, -cut), passes).tolist(),
    )
    result = []
    for turn in range(passes - 1):  # gaps that leave the last pass were never held to the room beyond it
        row = [0] * len(order)
        for position, gap in enumerate(order):
            row[gap] = flat[turn * len(order) + position]
        result.append(row)
    return result


def occupancy(circle: Circle, kept: list[int]) -> Int64Array:
    """Places taken by kept gaps at each step, int64 [S]."""
    change = np.zeros(2 * circle.step_count + 1, np.int64)
    np.add.at(change, np.array(circle.start, np.int64) + 1, kept)
    np.subtract.at(change, np.array(circle.end, np.int64), kept)
    line = np.cumsum(change)[: 2 * circle.step_count]
    return line[: circle.step_count] + line[circle.step_count :]


def fill_up(
    circle: Circle, room: Int64Array, kept: list[int], gaps: list[int], more_max: list[int] | None = None
) -> list[int]:
    """Keep as much more of the given gaps, in that order, as room (and more_max[gap], when given) allows."""
    spare = np.concatenate([room, room]) - np.tile(occupancy(circle, kept), 2)
    count = circle.step_count
    result = list(kept)
    for gap in gaps:
        first, last = circle.start[gap] + 1, circle.end[gap]
        more = min(circle.pages[gap] - result[gap], int(spare[first:last].min()))
        if more_max is not None:
            more = min(more, more_max[gap])
        if more > 0:
            result[gap] += more
            for begin, stop in ((first, last), (first - count, last - count), (first + count, last + count)):
                spare[max(begin, 0) : max(min(stop, 2 * count), 0)] -= more
    return result


def page_in_bound(circle: Circle, room: Int64Array, prices: Prices) -> float:
    """A lower bound of page-ins per pass, for every schedule, also one that differs from pass to pass.

    See [Note: prices]. The bound is valid whatever the prices are; good prices make it tight.
    """
    scale = prices.scale
    pages = np.array(circle.pages, np.int64)
    cost = _gap_costs(circle, prices)
    kept_max = int((prices.place * room).sum()) + int((pages * np.maximum(scale - cost, 0)).sum())
    return max(0.0, float(int(pages.sum()) * scale - kept_max) / scale)


def _gap_costs(circle: Circle, prices: Prices) -> Int64Array:
    """What the places a page takes through each gap cost together, in units of 1 / scale."""
    total = np.concatenate([[0], np.cumsum(np.tile(prices.place, 2))])
    costs: Int64Array = total[np.array(circle.end, np.int64)] - total[np.array(circle.start, np.int64) + 1]
    return costs


class EvenSplit(Enum):
    """BY_SHARE keeps the same share of each; BY_PAGES drops the same number of pages of each, which keeps the most
    when every page is used once a pass.
    """

    BY_SHARE = 0
    BY_PAGES = 1


def keep_evenly(circle: Circle, room: Int64Array, prices: Prices, split: EvenSplit) -> list[int]:
    """About as much as keep_most, spread over gaps that are worth the same.

    Whole layers kept side by side free no frame while they compute, so nothing can be read meanwhile. By [Note: prices]
    a gap that costs less than it earns is kept whole, one that costs more not at all, and those about even share what
    is
    left: all grow alike until a step they cross is full.
    """
    if not circle.index:
        return []
    cost = _gap_costs(circle, prices) / prices.scale
    kept = [0] * len(circle.index)
    by_cost = np.argsort(cost, kind="stable")
    cheap = [gap for gap in by_cost.tolist() if cost[gap] < 1 - PRICE_TOLERANCE]
    kept = fill_up(circle, room, kept, cheap)
    even = np.flatnonzero((cost >= 1 - PRICE_TOLERANCE) & (cost <= 1 + PRICE_TOLERANCE))
    kept = _grow_alike(circle, room, kept, even, split)
    return fill_up(circle, room, kept, by_cost.tolist())


def _grow_alike(circle: Circle, room: Int64Array, kept: list[int], gaps: Int64Array, split: EvenSplit) -> list[int]:
    """Lower the level of what is dropped of all the given gaps together, from all their pages towards none; a gap
    stops when a step of its interior is full. The level is a share of the pages, or a number of pages.
    """
    pages = np.array(circle.pages, np.float64)[gaps]
    first, last = np.array(circle.start)[gaps] + 1, np.array(circle.end)[gaps]
    spare = (room - occupancy(circle, kept)).astype(np.float64)
    from_level = np.ones(len(gaps)) if split is EvenSplit.BY_SHARE else pages
    rate = pages / np.maximum(from_level, 1)
    amount = np.zeros(len(gaps))
    growing = np.ones(len(gaps), bool)
    level = float(from_level.max(initial=0))
    while level > 0 and growing.any():
        moving = growing & (from_level >= level)
        load = _interior_sums(circle.step_count, first[moving], last[moving], rate[moving])
        loaded = load > 0
        reach = float((spare[loaded] / load[loaded]).min()) if loaded.any() else level
        waiting = from_level[growing & (from_level < level)]
        fall = max(0.0, min(reach, level - float(waiting.max(initial=0))))
        amount[moving] += fall * rate[moving]
        spare -= fall * load
        full = np.concatenate([[0], np.cumsum(np.tile(loaded & (spare <= SPARE_TOLERANCE), 2))])
        growing &= ~(moving & (full[last] > full[first]))
        level = 0.0 if fall == level else level - fall
        if len(waiting) and reach > fall:
            level = float(waiting.max())
    result = list(kept)
    for gap, more in zip(gaps.tolist(), np.floor(amount + SPARE_TOLERANCE).astype(np.int64).tolist(), strict=True):
        result[gap] += min(more, circle.pages[gap] - result[gap])
    return result


def _interior_sums(
    step_count: int, first: Int64Array, last: Int64Array, amount: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Sum of amount[i] over all i whose interior first[i]..last[i]-1 (mod step_count) holds the step, float64 [S].

    Amounts that are whole numbers give exact sums.
    """
    change = np.zeros(2 * step_count + 1)
    np.add.at(change, first, amount)
    np.subtract.at(change, last, amount)
    line = np.cumsum(change)[: 2 * step_count]
    sums: npt.NDArray[np.float64] = line[:step_count] + line[step_count:]
    return sums


class Prices(NamedTuple):
    """What a place in memory is worth at each step: place[t] / scale page-ins. See [Note: prices]."""

    place: Int64Array
    scale: int


def place_prices(circle: Circle, room: Int64Array) -> Prices:
    """[Note: prices]
    Let a place at step t cost price[t] / scale >= 0, and let keeping a page through a gap earn 1. Whatever is kept, the
    earnings are at most what all places cost plus, for every gap, pages * max(0, 1 - cost of its interior). The best
    prices are the dual solution of the linear programme. On the unrolled line MIN is optimal and integral, so its
    dual is a potential per step that rises by at least 1 over every gap not wholly kept, by at most 1 over every gap
    kept in part or whole, and not at all over a step with a free place. The least such potential is found by sweeping
    to and fro; the mean over the inner passes gives prices for the circle.
    """
    count = circle.step_count
    if not circle.index:
        return Prices(np.zeros(count, np.int64), 1)
    passes = min(max(BOUND_GAPS_MAX // len(circle.index), UNROLL_PASSES_MIN), UNROLL_PASSES_MAX)
    start = [first + turn * count for turn in range(passes) for first in circle.start]
    end = [last + turn * count for turn in range(passes) for last in circle.end]
    pages = circle.pages * passes
    kept = min_on_line(start, end, pages, room.tolist() * passes)
    line = count * passes
    taken = np.zeros(line + count + 1, np.int64)
    np.add.at(taken, np.array(start) + 1, kept)
    np.subtract.at(taken, np.array(end), kept)
    has_free = (np.cumsum(taken)[:line] < np.tile(room, passes)).tolist()
    rise: list[list[int]] = [[] for _ in range(line + 1)]
    fall: list[list[int]] = [[] for _ in range(line + 1)]
    for gap, amount in enumerate(kept):
        if end[gap] <= line:
            if amount < pages[gap]:
                rise[end[gap]].append(start[gap] + 1)
            if amount > 0:
                fall[start[gap] + 1].append(end[gap])
    potential = _least_potential(rise, fall, has_free)
    price = np.diff(potential)
    inner = price[count:-count].reshape(-1, count)  # the first and the last pass see the ends of the line
    return Prices(inner.sum(axis=0), len(inner))


def _least_potential(rise: list[list[int]], fall: list[list[int]], has_free: list[bool]) -> Int64Array:
    """Sweep until no constraint is broken, or BOUND_ROUNDS_MAX times: the prices stay valid, only less sharp."""
    potential = [0] * len(rise)
    for _ in range(BOUND_ROUNDS_MAX):
        changed = False
        for node in range(1, len(potential)):
            least = potential[node - 1]
            for source in rise[node]:
                least = max(least, potential[source] + 1)
            if least > potential[node]:
                potential[node], changed = least, True
        for node in range(len(potential) - 2, -1, -1):
            least = potential[node + 1] if has_free[node] else potential[node]
            for source in fall[node]:
                least = max(least, potential[source] - 1)
            if least > potential[node]:
                potential[node], changed = least, True
        if not changed:
            break
    return np.maximum.accumulate(np.array(potential, np.int64))


def lru_kept(classes: UseClasses, frame_count: int) -> list[int]:
    """How much of each gap (in UseClasses order) LRU keeps per pass in steady state, given a perfect prefetcher.

    The pages in use are never dropped; among the others the least recently used go first. What is resident after a pass
    depends on that pass alone, so the second pass from a cold start is the steady state.
    """
    starting: list[list[int]] = [[] for _ in range(classes.step_count)]
    ending: list[list[int]] = [[] for _ in range(classes.step_count)]
    for gap, (start, end) in enumerate(zip(classes.gap_start.tolist(), classes.gap_end.tolist(), strict=True)):
        starting[start].append(gap)
        ending[end % classes.step_count].append(gap)
    gap_pages = classes.gap_pages.tolist()
    idle: OrderedDict[int, int] = OrderedDict()
    kept = [0] * len(gap_pages)
    for _ in range(2):
        for step in range(classes.step_count):
            for gap in starting[step - 1]:
                idle[gap] = gap_pages[gap]
            for gap in ending[step]:
                kept[gap] = idle.pop(gap, 0)
            excess = sum(idle.values()) + int(classes.step_pages[step]) - frame_count
            while excess > 0:
                gap, amount = next(iter(idle.items()))
                dropped = min(excess, amount)
                excess -= dropped
                idle[gap] = amount - dropped
                if idle[gap] == 0:
                    del idle[gap]
    return kept


def lru_page_ins(steps: Steps, frame_count: int) -> int:
    """Page-ins per pass of LRU with perfect prefetch, steady state. ValueError when a step does not fit."""
    classes = use_classes(steps)
    if int(classes.step_pages.max()) > frame_count:
        msg = f"a step needs {int(classes.step_pages.max())} pages and there are {frame_count} frames"
        raise ValueError(msg)
    return int(classes.gap_pages.sum()) - sum(lru_kept(classes, frame_count))


def belady_page_ins(steps: Steps, frame_count: int, passes: int) -> list[int]:
    """Belady's MIN page by page from an empty start: page-ins of each pass. Slow and simple, a reference for tests.

    After the last pass nothing is needed again. Ties go to the larger page number. ValueError when a step does not fit.
    """
    needs: list[frozenset[int]] = []
    for step in range(steps.count):
        opened = [j for j in range(step + 1) if int(steps.step_end[j]) >= step]
        needs.append(frozenset(page for j in opened for page in steps.set_pages[int(steps.step_set[j])].tolist()))
    line = needs * passes
    resident: set[int] = set()
    result = [0] * passes
    for position, need in enumerate(line):
        if len(need) > frame_count:
            msg = f"step {position % steps.count} needs {len(need)} pages and there are {frame_count} frames"
            raise ValueError(msg)
        result[position // steps.count] += len(need - resident)
        resident |= need
        while len(resident) > frame_count:
            following = {page: len(line) for page in resident - need}
            for later in range(len(line) - 1, position, -1):
                following.update(dict.fromkeys(line[later] & following.keys(), later))
            resident.remove(max(following, key=lambda page: (following[page], page)))
    return result
