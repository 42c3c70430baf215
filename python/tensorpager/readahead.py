# SPDX-License-Identifier: Apache-2.0
"""How much of the budget to leave for reading ahead: fewest page-ins is not least time.

[Note: read-ahead]
MIN fills every frame with pages worth keeping. Then nothing can be read while a step computes: its frames come free
only when it is over, and the drive idles through all computing. Leaving q pages beside a step of p pages free costs a
few page-ins and lets the drive work through the step if computing on p pages takes no longer than reading q. So the
reserve at each step is a share of the pages of that step, and the share is chosen by a small model of a pass: one
drive that reads one page in one unit of time, computing that takes a fixed part of a unit per page, page-ins started
as early as the pairing allows. The share that comes closest to max(time to read the fewest page-ins, time to
compute), over computing that is faster than, and as fast as reading, wins. The order of plans hardly depends on the
exact ratios.
"""

from __future__ import annotations

import math

import numpy as np

from tensorpager.departures import departures_of_kept, frames_ahead, returning
from tensorpager.policy import Circle, EvenSplit, Prices, fill_up, keep_evenly, keep_most, lru_kept, place_prices
from tensorpager.steps import Int64Array, UseClasses

READ_AHEAD_SHARES = (0.125, 0.25, 0.5, 1.0)
COMPUTE_PER_PAGE = (0.125, 0.25, 0.5, 1.0)
MODEL_PASSES = 4
OVER_STATIONARY_MAX = 1.03
OVER_FEWEST_MAX = 1.25


def choose_kept(
    classes: UseClasses, circle: Circle, prices: Prices, frame_count: int, read_ahead: float | None
) -> list[int]:
    """Pages to keep of each gap, in UseClasses order; the pages of the pass do not all fit in frame_count.

    read_ahead: frames left free at each step, per page of that step; None picks the best by [Note: read-ahead]. Never
    more page-ins than LRU (then a given read_ahead is left out), nor, when it is picked here, than _page_ins_max.
    """
    room = frame_count - classes.step_pages
    lru = lru_kept(classes, frame_count)
    fewest = _keep_fewest_page_ins(classes, circle, room, prices, lru)
    if read_ahead == 0:
        return fewest
    shares = READ_AHEAD_SHARES if read_ahead is None else (read_ahead,)
    gap_total = int(classes.gap_pages.sum())
    kept_least = sum(lru)
    if read_ahead is None:
        kept_least = max(kept_least, gap_total - _page_ins_max(classes, gap_total - sum(fewest), frame_count))
    floors = [max(part * float(classes.own_pages.sum()), float(gap_total - sum(fewest))) for part in COMPUTE_PER_PAGE]
    best, best_cost = fewest, math.inf if read_ahead is not None else _cost(classes, fewest, frame_count, floors)
    for share in shares:
        reserve = np.ceil(classes.own_pages * share).astype(np.int64)
        left = np.maximum(room - reserve, 0)
        prices = place_prices(circle, left)
        even = [keep_evenly(circle, left, prices, split) for split in EvenSplit]
        for inner in (keep_most(circle, left, [], quick=True), *even):
            kept = keep_what_returns_at_once(classes, circle, _all_gaps(classes, circle, inner), frame_count)
            if sum(kept) < kept_least:
                continue
            cost = _cost(classes, kept, frame_count, floors)
            if cost < best_cost:
                best, best_cost = kept, cost
    return best


def _keep_fewest_page_ins(
    classes: UseClasses, circle: Circle, room: Int64Array, prices: Prices, lru: list[int]
) -> list[int]:
    even = [keep_evenly(circle, room, prices, split) for split in EvenSplit]
    most = keep_most(circle, room, [[lru[gap] for gap in circle.index], *even])
    most = fill_up(circle, room, most, list(range(len(most))))
    return _all_gaps(classes, circle, max([*even, most], key=sum))


def _page_ins_max(classes: UseClasses, fewest: int, frame_count: int) -> int:
    """What reading ahead may raise the page-ins of a pass to. `stationary` reads what keeping the same pages for good
    would; a pass that uses pages several times may be unable to do with that, and is held to its own optimum.
    """
    stationary = classes.page_total - frame_count + int(classes.step_pages.max())
    if fewest <= stationary:
        return max(fewest, int(stationary * OVER_STATIONARY_MAX))
    return int(fewest * OVER_FEWEST_MAX)


def _all_gaps(classes: UseClasses, circle: Circle, inner: list[int]) -> list[int]:
    kept: list[int] = classes.gap_pages.tolist()
    for gap, amount in zip(circle.index, inner, strict=True):
        kept[gap] = amount
    return kept


def keep_what_returns_at_once(classes: UseClasses, circle: Circle, kept: list[int], frame_count: int) -> list[int]:
    """Keep every page that [Note: returns at once] in departures.py speaks of."""
    kept = list(kept)
    room = frame_count - classes.step_pages
    while True:
        departures = departures_of_kept(classes, kept)
        of_gap = np.zeros(len(kept), np.int64)
        of_gap[departures.gap] = returning(classes, departures, frame_count)
        too_soon = of_gap[circle.index]
        if not too_soon.any():
            return kept
        inner = [kept[gap] for gap in circle.index]
        gaps = np.flatnonzero(too_soon).tolist()
        filled = fill_up(circle, room, inner, gaps, too_soon.tolist())
        assert sum(filled) > sum(inner), "a page that returns at once has room through its gap"
        kept = _all_gaps(classes, circle, filled)


def _per_step(step: Int64Array, pages: Int64Array, step_count: int) -> Int64Array:
    total = np.zeros(step_count, np.int64)
    np.add.at(total, step, pages)
    return total


def pass_time(classes: UseClasses, kept: list[int], frame_count: int, compute_per_page: float) -> float:
    """Time of one steady pass when reading a page takes 1 and computing takes compute_per_page per page of the step."""
    count = classes.step_count
    dropped = classes.gap_pages - np.array(kept, np.int64)
    evictable = _per_step(classes.gap_start, dropped, count).tolist()
    needed = _per_step(classes.gap_end % count, dropped, count).tolist()
    ahead = frames_ahead(classes, departures_of_kept(classes, kept), frame_count)
    compute = (classes.own_pages * compute_per_page).tolist()
    now = start = 0.0
    read = due = 0.0
    allowed = float(ahead)
    for _ in range(MODEL_PASSES):
        start = now
        for step in range(count):
            due += needed[step]
            wait = max(0.0, due - read)
            now += wait + compute[step]
            read = min(allowed, read + wait + compute[step])
            allowed += evictable[step]
    return now - start


def _cost(classes: UseClasses, kept: list[int], frame_count: int, floors: list[float]) -> float:
    times = [pass_time(classes, kept, frame_count, part) for part in COMPUTE_PER_PAGE]
    return sum(time / floor for time, floor in zip(times, floors, strict=True) if floor > 0)
