# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import random
from fractions import Fraction

import numpy as np
import pytest

from plan_traces import MODEL_PASSES, llama, random_pass
from tensorpager.pass_plan import Steps, belady_page_ins, lru_page_ins, plan_pass, steps_from_events
from tensorpager.policy import (
    EvenSplit,
    Prices,
    circle_of,
    keep_evenly,
    keep_most,
    min_on_line,
    occupancy,
    page_in_bound,
    place_prices,
)
from tensorpager.steps import use_classes


def canonical_traces(length: int, pages_max: int) -> list[tuple[int, ...]]:
    """All traces up to renaming of pages: pages are numbered in order of first occurrence."""
    traces: list[tuple[int, ...]] = [()]
    for _ in range(length):
        traces = [(*trace, page) for trace in traces for page in range(min(max(trace, default=-1) + 2, pages_max))]
    return traces


def one_page_steps(trace: tuple[int, ...]) -> Steps:
    events = [event for page in trace for event in (page + 1, -(page + 1))]
    return steps_from_events(np.array(events, np.int32), [[page] for page in range(max(trace) + 1)])


def needs_of(steps: Steps) -> list[frozenset[int]]:
    return [
        frozenset(
            page
            for opened in range(step + 1)
            if steps.step_end[opened] >= step
            for page in steps.set_pages[int(steps.step_set[opened])].tolist()
        )
        for step in range(steps.count)
    ]


def fewest_page_ins(needs: list[frozenset[int]], frame_count: int, start: frozenset[int]) -> dict[frozenset[int], int]:
    """Exhaustive: residency after the last step -> fewest page-ins to get there from `start`."""
    costs = {start: 0}
    for need in needs:
        following: dict[frozenset[int], int] = {}
        for resident, cost in costs.items():
            others = sorted(resident - need)
            stay_max = min(len(others), frame_count - len(need))
            for stay in itertools.combinations(others, stay_max):
                after = need | frozenset(stay)
                total = cost + len(need - resident)
                following[after] = min(total, following.get(after, total))
        costs = following
    return costs


def page_ins_by_min_on_line(trace: tuple[int, ...], frame_count: int) -> int:
    gaps = []
    for position, page in enumerate(trace):
        later = [after for after in range(position + 1, len(trace)) if trace[after] == page]
        if later and later[0] > position + 1:
            gaps.append((position, later[0]))
    kept = min_on_line(
        [start for start, _ in gaps], [end for _, end in gaps], [1] * len(gaps), [frame_count - 1] * len(trace)
    )
    return len(set(trace)) + len(gaps) - sum(kept)


@pytest.mark.parametrize("frame_count", [1, 2, 3, 4])
def test_min_on_a_line_is_optimal_on_every_trace_of_4_pages_and_7_accesses(frame_count: int) -> None:
    traces = canonical_traces(7, 4)
    assert len(traces) == 715
    for trace in traces:
        needs = [frozenset([page]) for page in trace]
        optimum = min(fewest_page_ins(needs, frame_count, frozenset()).values())
        assert page_ins_by_min_on_line(trace, frame_count) == optimum, trace
        assert belady_page_ins(one_page_steps(trace), frame_count, 1) == [optimum], trace


def pass_costs(steps: Steps, frame_count: int) -> dict[frozenset[int], dict[frozenset[int], int]]:
    """Fewest page-ins of one pass between every two residencies that any optimal run can have at its boundary."""
    needs = needs_of(steps)
    table: dict[frozenset[int], dict[frozenset[int], int]] = {}
    waiting = [frozenset[int]()]
    while waiting:
        start = waiting.pop()
        if start not in table:
            table[start] = fewest_page_ins(needs, frame_count, start)
            waiting.extend(table[start])
    return table


def least_mean(table: dict[frozenset[int], dict[frozenset[int], int]]) -> Fraction:
    """Karp: the least mean cost of a cycle, that is the optimum over schedules of any period."""
    states = sorted(table, key=sorted)
    count = len(states)
    infinite = 10**9
    walk = [dict.fromkeys(states, infinite) for _ in range(count + 1)]
    walk[0][frozenset()] = 0
    for length in range(count):
        for state in states:
            for after, cost in table[state].items():
                walk[length + 1][after] = min(walk[length + 1][after], walk[length][state] + cost)
    return min(
        max(Fraction(walk[count][s] - walk[k][s], count - k) for k in range(count) if walk[k][s] < infinite)
        for s in states
        if walk[count][s] < infinite
    )


def small_cycle(seed: int) -> tuple[Steps, int]:
    """4 to 8 steps of one or two pages out of 3 to 6; in every third pass one window stays open over some steps."""
    rng = random.Random(seed)
    page_count = rng.randint(3, 6)
    step_count = rng.randint(4, 8)
    sets = [rng.sample(range(page_count), rng.choice((1, 1, 2))) for _ in range(step_count + 1)]
    outer = sorted(rng.sample(range(step_count + 1), 2)) if seed % 3 == 0 else []
    events = []
    for step in range(step_count + 1):
        if step in outer:
            events.append((step_count + 1) * (1 if step == outer[0] else -1))
        if step < step_count:
            events += [step + 1, -(step + 1)]
    return steps_from_events(np.array(events, np.int32), sets), page_count


def test_plans_of_small_cycles_against_exhaustive_search() -> None:
    cases = above_same_every_pass = bound_below = 0
    worst = Fraction(0)
    for seed in range(330):
        steps, page_count = small_cycle(seed)
        classes = use_classes(steps)
        for frame_count in range(max(1, int(classes.step_pages.max())), classes.page_total):
            table = pass_costs(steps, frame_count)
            optimum = least_mean(table)
            same_every_pass = min(costs[state] for state, costs in table.items() if state in costs)
            planned = plan_pass(steps, frame_count=frame_count, page_bytes=1, page_count=page_count, read_ahead=0)
            assert planned.lower_bound_page_ins <= optimum <= same_every_pass <= planned.page_ins_per_pass
            cases += 1
            above_same_every_pass += planned.page_ins_per_pass > same_every_pass
            bound_below += planned.lower_bound_page_ins < optimum
            worst = max(worst, planned.page_ins_per_pass - optimum)
    assert cases > 550
    # Measured: one plan in 2,640 reads one page more than the best plan that repeats every pass (seed 320 is that one);
    # the bound is the optimum itself in 93 of 100 cases.
    assert above_same_every_pass <= 1
    assert worst <= 1
    assert bound_below <= cases // 10


def test_lru_page_ins_equal_those_of_a_page_by_page_lru() -> None:
    compared = 0
    for seed in range(300):
        steps, _ = random_pass(seed)
        classes = use_classes(steps)
        # Pages of one class leave in any order, so the count is unique only where no tie is broken: one page a set.
        if any(len(pages) > 1 for pages in steps.set_pages.values()):
            continue
        frame_count = max(1, int(classes.step_pages.max()))
        assert lru_page_ins(steps, frame_count) == page_by_page_lru(steps, frame_count), seed
        compared += 1
    assert compared >= 10


def page_by_page_lru(steps: Steps, frame_count: int) -> int:
    last_use: dict[int, int] = {}
    resident: set[int] = set()
    page_ins = [0, 0, 0, 0]
    for turn, step in itertools.product(range(4), range(steps.count)):
        need = needs_of(steps)[step]
        page_ins[turn] += len(need - resident)
        resident |= need
        last_use.update(dict.fromkeys(need, turn * steps.count + step))
        while len(resident) > frame_count:
            resident.remove(min(resident - need, key=lambda page: last_use[page]))
    assert page_ins[2] == page_ins[3]
    return page_ins[3]


def test_lru_hits_nothing_on_a_cyclic_pass_that_does_not_fit() -> None:
    steps = one_page_steps(tuple(range(8)))
    assert lru_page_ins(steps, 7) == 8
    assert lru_page_ins(steps, 8) == 0


def test_a_step_that_does_not_fit_is_refused() -> None:
    steps = steps_from_events([1, -1], [[0, 1, 2]])
    with pytest.raises(ValueError, match="needs 3 pages and there are 2 frames"):
        lru_page_ins(steps, 2)
    with pytest.raises(ValueError, match="needs 3 pages and there are 2 frames"):
        belady_page_ins(steps, 2, 1)


@pytest.mark.parametrize("name", MODEL_PASSES)
@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_both_policies_stay_within_room_and_above_the_bound(name: str, share: float) -> None:
    classes = use_classes(MODEL_PASSES[name]().steps())
    frame_count = max(int(classes.step_pages.max()), int(classes.page_total * share))
    room = frame_count - classes.step_pages
    circle = circle_of(classes)
    prices = place_prices(circle, room)
    bound = page_in_bound(circle, room, prices)
    even = [keep_evenly(circle, room, prices, split) for split in EvenSplit]
    for kept in (keep_most(circle, room, []), *even):
        assert np.all(occupancy(circle, kept) <= room)
        assert all(0 <= amount <= pages for amount, pages in zip(kept, circle.pages, strict=True))
        assert bound <= sum(circle.pages) - sum(kept)


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_holds_for_any_prices(seed: int) -> None:
    classes = use_classes(random_pass(seed, pages_max=20, steps_max=12)[0])
    room = int(classes.step_pages.max()) + 1 - classes.step_pages
    circle = circle_of(classes)
    kept = keep_most(circle, room, [])
    rng = np.random.default_rng(seed)
    for _ in range(50):
        prices = Prices(rng.integers(0, 4, classes.step_count), int(rng.integers(1, 5)))
        assert page_in_bound(circle, room, prices) <= sum(circle.pages) - sum(kept)


def test_four_equal_layers_in_half_the_memory_keep_a_third_of_each() -> None:
    steps = steps_from_events([1, -1, 2, -2, 3, -3, 4, -4], np.arange(12).reshape(4, 3))
    classes = use_classes(steps)
    circle = circle_of(classes)
    room = 6 - classes.step_pages
    prices = place_prices(circle, room)
    for split in EvenSplit:
        assert keep_evenly(circle, room, prices, split) == [1, 1, 1, 1]
    assert page_in_bound(circle, room, prices) == 8.0


def test_dropping_as_many_pages_of_each_step_keeps_the_most_of_uneven_steps() -> None:
    """While a step that lacks d of its pages is in use, d places are lost to all others, so one step that lacks many
    (a share of the embedding) costs more than many steps that lack few."""
    built = llama(tied=False)
    classes = use_classes(built.steps())
    circle = circle_of(classes)
    room = built.page_count * 3 // 4 - classes.step_pages
    prices = place_prices(circle, room)
    page_ins = {split: sum(circle.pages) - sum(keep_evenly(circle, room, prices, split)) for split in EvenSplit}
    assert page_in_bound(circle, room, prices) <= page_ins[EvenSplit.BY_PAGES]
    assert page_ins[EvenSplit.BY_PAGES] <= 0.9 * page_ins[EvenSplit.BY_SHARE]
