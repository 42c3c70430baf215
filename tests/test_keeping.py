# SPDX-License-Identifier: Apache-2.0
"""What stays through each gap: every tiny trace searched through, writebacks counted page by page, rooms respected."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from tensorpager.demand import OVERWRITE, READ, Demand, demand_of, occupied
from tensorpager.keeping import best_kept, dirty_drops, furthest_next_use, lru_kept, repaired, traffic_of
from tensorpager.keeping_bound import least_bytes, rounded_evenly
from trace_shapes import PAGE, clean_trace, random_trace, training_trace

PAGES_MAX, ACCESSES_MAX, TURNED_MAX = 4, 8, 7


def canonical_orders(length: int) -> Iterator[tuple[int, ...]]:
    """Every order of that many accesses to PAGES_MAX pages at most, numbered by first use."""
    orders: list[tuple[int, ...]] = [(0,)]
    for _ in range(length - 1):
        orders = [(*order, page) for order in orders for page in range(min(max(order) + 2, PAGES_MAX))]
    yield from orders


def fewest_page_ins(demand: Demand) -> list[int]:
    """[page-ins of the best choice when `room` pages may stay at every step, for room 0, 1, ..], by trying them all."""
    gaps, count = demand.gaps, demand.step_count
    over = [
        sum(1 << step % count for step in range(start + 1, end))
        for start, end in zip(gaps.start.tolist(), gaps.end.tolist(), strict=True)
    ]
    inner = [mask for mask in over if mask]
    cover = np.array([[mask >> step & 1 for step in range(count)] for mask in inner], np.int64).reshape(-1, count)
    chosen = np.arange(1 << len(inner))[:, None] >> np.arange(len(inner)) & 1
    level, kept = (chosen @ cover).max(1), chosen.sum(1)
    return [len(inner) - int(kept[level <= room].max()) for room in range(PAGES_MAX)]


def test_the_exhaustive_search_knows_these() -> None:
    assert fewest_page_ins(demand_of(clean_trace((0, 1, 2, 3)), PAGE)) == [4, 3, 2, 0]
    assert fewest_page_ins(demand_of(clean_trace((0, 1, 0, 2)), PAGE)) == [4, 2, 0, 0]
    assert fewest_page_ins(demand_of(clean_trace((0, 0, 0)), PAGE)) == [0, 0, 0, 0]


@pytest.mark.slow
def test_every_tiny_clean_trace_is_planned_with_the_fewest_page_ins() -> None:
    """A pass has no beginning: from TURNED_MAX accesses on, one of the orders that are turns of one another will do."""
    orders = [order for length in range(1, ACCESSES_MAX + 1) for order in canonical_orders(length)]
    assert len(orders) == 1 + 2 + 5 + 15 + 51 + 187 + 715 + 2795
    solved = 0
    for order in orders:
        is_least = order == min(map(renumbered, turns(order)))
        if len(order) >= TURNED_MAX and not is_least:
            continue
        demand = demand_of(clean_trace(order), PAGE)
        gaps, fewest = demand.gaps, fewest_page_ins(demand)
        for capacity in range(1, PAGES_MAX + 1):
            room = np.full(len(order), capacity - 1, np.int64)
            optima = [None]
            if is_least:
                bound = least_bytes(gaps, room, len(order))
                assert bound.cost <= fewest[capacity - 1] + 1e-6, (order, capacity)
                optima.append(bound.kept)
                solved += 1
            for optimum in optima:
                best = best_kept(gaps, room, len(order), optimum)
                assert np.all(occupied(gaps, best, len(order)) <= room), (order, capacity)
                assert traffic_of(gaps, best).total == fewest[capacity - 1], (order, capacity, optimum is None)
    assert solved > 2000


def turns(order: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [order[first:] + order[:first] for first in range(len(order))]


def renumbered(order: tuple[int, ...]) -> tuple[int, ...]:
    place: dict[int, int] = {}
    return tuple(place.setdefault(page, len(place)) for page in order)


def naive_writebacks(demand: Demand, kept: np.ndarray) -> list[int]:
    """Pages written at the beginning of each gap in a pass: a page is dirty from a change to its next write."""
    stays = {
        (group, start): (number, stay)
        for number, (group, start, stay) in enumerate(
            zip(demand.gaps.group.tolist(), demand.gaps.start.tolist(), kept.tolist(), strict=True)
        )
    }
    uses = sorted(
        zip(demand.use_step.tolist(), demand.use_group.tolist(), demand.use_kind.tolist(), strict=True),
    )
    dirty = {group: [False] * size for group, size in enumerate(demand.group_pages.tolist())}
    written = [0] * demand.gaps.count
    for _ in range(3):
        written = [0] * demand.gaps.count
        for step, group, kind in uses:
            if kind != READ:
                dirty[group] = [True] * len(dirty[group])
            if (group, step) not in stays:
                continue  # dead
            number, stay = stays[group, step]
            for page in range(stay, len(dirty[group])):
                written[number] += dirty[group][page]
                dirty[group][page] = False
    return written


def test_writebacks_against_a_simulation_of_pages() -> None:
    total = 0
    for seed in range(300):
        demand = demand_of(random_trace(seed), PAGE)
        rng = np.random.default_rng(seed)
        for kept in (rng.integers(0, demand.gaps.pages + 1), np.zeros_like(demand.gaps.pages), demand.gaps.pages):
            naive = naive_writebacks(demand, kept)
            assert dirty_drops(demand.gaps, kept).tolist() == naive, seed
            assert traffic_of(demand.gaps, kept).writebacks == sum(naive), seed
            assert traffic_of(demand.gaps, kept).page_ins == int((demand.gaps.pages - kept).sum()), seed
            total += sum(naive)
    assert total > 1000


def random_room(demand: Demand, seed: int) -> np.ndarray:
    rng = random.Random(seed)
    frames = rng.randint(int(demand.in_use.max()), demand.working_set_pages)
    return frames - demand.in_use


def test_rooms_are_respected_and_lru_is_never_better() -> None:
    tight = better = 0
    for seed in range(300):
        demand = demand_of(random_trace(seed), PAGE)
        gaps, count, room = demand.gaps, demand.step_count, random_room(demand, seed)
        lru = lru_kept(gaps, room, count)
        best = best_kept(gaps, room, count)
        wanted = np.random.default_rng(seed).integers(0, gaps.pages + 1)
        for kept in (lru, best, repaired(gaps, room, count, wanted), repaired(gaps, room, count, gaps.pages)):
            assert np.all(occupied(gaps, kept, count) <= room), seed
            assert np.all((kept >= 0) & (kept <= gaps.pages)), seed
        assert np.all(repaired(gaps, room, count, wanted) <= wanted), seed
        for weight in (1.0, 2.0, 1e9):
            for kept in furthest_next_use(gaps, room, count, weight):
                assert np.all(occupied(gaps, kept, count) <= room), seed
        assert traffic_of(gaps, best).total <= traffic_of(gaps, lru).total, seed
        tight += bool(np.any(occupied(gaps, gaps.pages, count) > room))
        better += traffic_of(gaps, best).total < traffic_of(gaps, lru).total
    assert tight > 150
    assert better > 50


def test_the_bound_is_below_everything_and_rounding_stays_within_the_room() -> None:
    for seed in range(100):
        demand = demand_of(random_trace(seed), PAGE)
        gaps, count, room = demand.gaps, demand.step_count, random_room(demand, seed)
        bound = least_bytes(gaps, room, count)
        assert np.all(occupied(gaps, bound.kept, count) <= room), seed
        for optimum in (None, bound.kept):
            moved = traffic_of(gaps, best_kept(gaps, room, count, optimum)).total
            assert bound.cost <= moved + 1e-6, (seed, optimum is None)


def test_what_fits_stays() -> None:
    demand = demand_of(training_trace(), PAGE)
    room = demand.working_set_pages - demand.in_use
    kept = best_kept(demand.gaps, room, demand.step_count)
    assert kept.tolist() == demand.gaps.pages.tolist()
    assert traffic_of(demand.gaps, kept).total == 0


def test_what_is_within_the_room_is_not_repaired() -> None:
    demand = demand_of(training_trace(), PAGE)
    room = demand.working_set_pages - demand.in_use
    assert repaired(demand.gaps, room, demand.step_count, demand.gaps.pages).tolist() == demand.gaps.pages.tolist()
    none = np.zeros_like(room)
    inner = demand.gaps.end > demand.gaps.start + 1
    kept = repaired(demand.gaps, none, demand.step_count, demand.gaps.pages)
    assert kept.tolist() == np.where(inner, 0, demand.gaps.pages).tolist()


def test_the_longest_gap_gives_first() -> None:
    demand = demand_of(clean_trace((0, 1, 0, 2, 3, 4)), PAGE)
    gaps = demand.gaps
    # 0 is kept over step 1 alone and from there over three steps; 1 over five.
    kept = repaired(gaps, np.array([1, 1, 1, 1, 1, 1]), 6, gaps.pages)
    by_gap = {(group, start): stay for group, start, stay in zip(gaps.group, gaps.start, kept, strict=True)}
    assert by_gap == {(0, 0): 1, (1, 1): 0, (0, 2): 1, (2, 3): 0, (3, 4): 0, (4, 5): 0}


def test_a_dirty_page_is_worth_a_write_more() -> None:
    """A clean page and a dirty one of as long a gap, one frame for both."""
    built = clean_trace((0, 1, 2))
    dirty = replace(built, steps=(replace(built.steps[0], reads=(), writes=(0,)), *built.steps[1:]))
    demand = demand_of(dirty, PAGE)
    room = np.array([1, 1, 1])
    kept = best_kept(demand.gaps, room, 3)
    assert kept.tolist() == [1, 0, 0]
    assert traffic_of(demand.gaps, kept).page_ins == 2
    assert traffic_of(demand.gaps, kept).writebacks == 0


def test_the_gaps_of_an_overwritten_group_hold_no_dead_content() -> None:
    for seed in range(50):
        demand = demand_of(random_trace(seed), PAGE)
        overwritten = set(
            itertools.compress(
                zip(demand.use_group.tolist(), demand.use_step.tolist(), strict=True), demand.use_kind == OVERWRITE
            )
        )
        ends = zip(demand.gaps.group.tolist(), (demand.gaps.end % demand.step_count).tolist(), strict=True)
        assert not overwritten & set(ends), seed


def test_rounding_evenly_never_shifts_a_deadline_by_more_than_half_a_page() -> None:
    """Shares of pages to keep: whole, none above a gap's pages, and the sum up to every deadline that of the shares."""
    gap_counts = []
    for seed in range(200):
        gaps, rng = demand_of(random_trace(seed), PAGE).gaps, np.random.default_rng(seed)
        exact = gaps.pages * rng.choice((0.0, 0.25, 1 / 3, 0.5, 0.9, 1.0), gaps.count)
        kept = rounded_evenly(gaps, exact)
        assert kept.dtype == np.int64
        assert ((kept >= 0) & (kept <= gaps.pages)).all(), seed
        for deadline in np.unique(gaps.end):
            due = gaps.end <= deadline
            assert abs(float(exact[due].sum()) - int(kept[due].sum())) <= 0.5 + 1e-5, (seed, deadline)
        gap_counts.append(gaps.count)
    assert max(gap_counts) > 5
