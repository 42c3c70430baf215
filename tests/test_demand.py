# SPDX-License-Identifier: Apache-2.0
"""What a trace asks of the frames: pages, gaps and versions of small cases by hand, levels against a naive count."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tensorpager.demand import MODIFY, READ, Demand, Gaps, demand_of, occupied
from tensorpager.operator_trace import Trace, TraceTensor
from trace_shapes import PAGE, TraceBuilder, random_trace, training_trace

RANDOM_TRACES = 200


def rows_of(gaps: Gaps) -> list[tuple[int, ...]]:
    """[(group, pages, start, end, version, order)]."""
    columns = (gaps.group, gaps.pages, gaps.start, gaps.end, gaps.version, gaps.order)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def uses_of(demand: Demand) -> list[tuple[int, int, int]]:
    return list(zip(demand.use_group.tolist(), demand.use_step.tolist(), demand.use_kind.tolist(), strict=True))


def demand_in_order(*steps: dict[str, tuple[int, ...]], pages: tuple[float, ...], kinds: tuple[str, ...]) -> Demand:
    built = TraceBuilder("by hand")
    for number, (size, kind) in enumerate(zip(pages, kinds, strict=True)):
        built.tensor(f"t{number}", size, kind)
    for step in steps:
        built.step("s", **step)
    return demand_of(built.trace(), PAGE)


@pytest.mark.parametrize(
    ("size_bytes", "pages"), [(1, 1), (PAGE - 1, 1), (PAGE, 1), (PAGE + 1, 2), (3 * PAGE, 3), (3 * PAGE + 1, 4)]
)
def test_a_tensor_takes_the_pages_it_begins(size_bytes: int, pages: int) -> None:
    built = TraceBuilder("one")
    built.tensors.append(TraceTensor("w", size_bytes, "weight"))
    built.step("read", reads=(0,))
    demand = demand_of(built.trace(), PAGE)
    assert demand.group_pages.tolist() == [pages]
    assert demand.group_tensors == ((0,),)
    assert demand.in_use.tolist() == [pages]
    assert demand.working_set_pages == pages


def test_pages_have_a_size() -> None:
    for page_bytes in (0, -1):
        with pytest.raises(ValueError, match=rf"^page_bytes {page_bytes} must be positive$"):
            demand_of(random_trace(0), page_bytes)


def test_tensors_without_bytes_and_without_uses_take_none() -> None:
    demand = demand_in_order({"reads": (0,)}, pages=(0, 5), kinds=("weight", "weight"))
    assert demand.group_tensors == ()
    assert demand.in_use.tolist() == [0]
    assert demand.gaps.count == 0
    assert demand.working_set_pages == 0


def test_small_tensors_that_persist_share_pages_in_order_of_first_use() -> None:
    demand = demand_in_order(
        {"reads": (3,)},
        {"reads": (0, 4)},
        {"reads": (1,)},
        {"reads": (2,)},
        {"reads": (3,)},
        pages=(0.5, 0.25, 0.5, 0.25, 2),
        kinds=("weight", "state", "buffer", "weight", "weight"),
    )
    # 3, 0, 1 fill a page exactly; 2 begins another. The larger one is a group of its own, in its place.
    assert demand.group_tensors == ((4,), (3, 0, 1), (2,))
    assert demand.group_pages.tolist() == [2, 1, 1]
    assert demand.group_persists.tolist() == [True, True, True]
    assert uses_of(demand) == [(0, 1, READ), (1, 0, READ), (1, 1, READ), (1, 2, READ), (1, 4, READ), (2, 3, READ)]
    assert demand.in_use.tolist() == [1, 3, 1, 1, 1]
    assert demand.small_pages.tolist() == [0, 0, 0, 0, 0]


def test_one_use_of_a_shared_page_per_step_and_the_rest_of_it_is_needed() -> None:
    demand = demand_in_order(
        {"reads": (0,), "overwrites": (1,)},
        {"reads": (0, 1)},
        {"overwrites": (0, 1)},
        pages=(0.5, 0.5),
        kinds=("state", "state"),
    )
    assert demand.group_tensors == ((0, 1),)
    assert uses_of(demand) == [(0, 0, MODIFY), (0, 1, READ), (0, 2, MODIFY)]
    assert demand.gaps.count == 3


def test_a_small_tensor_alone_on_its_page_is_dead_before_it_is_overwritten() -> None:
    demand = demand_in_order({"overwrites": (0,)}, {"reads": (0,)}, pages=(0.5,), kinds=("state",))
    assert rows_of(demand.gaps) == [(0, 1, 0, 1, 0, 0)]


def test_small_tensors_of_the_pass_are_counted_while_they_live() -> None:
    demand = demand_in_order(
        {"overwrites": (0,)},
        {"overwrites": (1,)},
        {"reads": (0, 1), "overwrites": (2,)},
        {"reads": (1,)},
        {"reads": (3,)},
        pages=(0.5, 0.5, 0.5, 3),
        kinds=("activation", "input", "gradient", "weight"),
    )
    assert demand.group_tensors == ((3,),)
    assert demand.small_pages.tolist() == [1, 1, 2, 1, 0]
    assert demand.in_use.tolist() == [1, 1, 2, 1, 3]
    assert demand.alive_pages().tolist() == [4, 4, 5, 4, 3]
    assert demand.working_set_pages == 5


def test_gaps_of_what_persists_go_round() -> None:
    demand = demand_in_order({"reads": (0,)}, {}, {"reads": (0, 1)}, {}, pages=(2, 3), kinds=("weight", "weight"))
    assert rows_of(demand.gaps) == [(0, 2, 0, 2, -1, 0), (0, 2, 2, 4, -1, 1), (1, 3, 2, 6, -1, 0)]
    assert demand.version_count == 0
    assert occupied(demand.gaps, demand.gaps.pages, 4).tolist() == [3, 5, 0, 5]
    assert demand.working_set_pages == 5


def test_content_of_the_pass_dies_with_its_last_use() -> None:
    demand = demand_in_order(
        {"overwrites": (0,)}, {}, {"reads": (0,)}, {"writes": (0,)}, {}, pages=(2,), kinds=("activation",)
    )
    assert rows_of(demand.gaps) == [(0, 2, 0, 2, 0, 0), (0, 2, 2, 3, 0, 1)]
    assert demand.version_count == 1  # what the last use changes is dead at once
    assert demand.group_persists.tolist() == [False]
    assert demand.alive_pages().tolist() == [2, 2, 2, 2, 0]


def test_an_overwrite_leaves_no_gap_before_it() -> None:
    demand = demand_in_order(
        {"overwrites": (0,)}, {"reads": (0,)}, {}, {"overwrites": (0,)}, {"reads": (0,)}, pages=(4,), kinds=("state",)
    )
    # Neither from 1 to 3 nor from 4 to the next pass.
    assert rows_of(demand.gaps) == [(0, 4, 0, 1, 1, 0), (0, 4, 3, 4, 0, 0)]
    assert demand.version_count == 2
    assert demand.alive_pages().tolist() == [4, 4, 0, 4, 4]


def test_a_version_lasts_from_one_change_to_the_next_across_the_end_of_the_pass() -> None:
    demand = demand_in_order(
        {"reads": (0,)},
        {"reads": (0,)},
        {"writes": (0,)},
        {"reads": (0,)},
        {"writes": (0,)},
        {"reads": (0,)},
        pages=(1,),
        kinds=("weight",),
    )
    # The last change is met first: its version goes on with the next pass's reads, up to and with the change's own use.
    assert rows_of(demand.gaps) == [
        (0, 1, 0, 1, 0, 2),
        (0, 1, 1, 2, 0, 3),
        (0, 1, 2, 3, 1, 0),
        (0, 1, 3, 4, 1, 1),
        (0, 1, 4, 5, 0, 0),
        (0, 1, 5, 6, 0, 1),
    ]
    assert demand.version_count == 2


def test_a_version_ends_where_its_content_is_dead() -> None:
    demand = demand_in_order({"reads": (0,)}, {"overwrites": (0,)}, {"reads": (0,)}, pages=(1,), kinds=("buffer",))
    assert rows_of(demand.gaps) == [(0, 1, 1, 2, 0, 0), (0, 1, 2, 3, 0, 1)]


def test_gaps_are_in_order_of_their_start_and_hold_a_version_each() -> None:
    for seed in range(RANDOM_TRACES):
        demand = demand_of(random_trace(seed), PAGE)
        rows = rows_of(demand.gaps)
        assert rows == sorted(rows, key=lambda row: (row[2], row[0])), seed
        by_version: dict[int, list[tuple[int, ...]]] = {}
        for row in rows:
            assert 0 <= row[2] < row[3] <= row[2] + demand.step_count, seed
            if row[4] >= 0:
                by_version.setdefault(row[4], []).append(row)
        assert all(0 <= version < demand.version_count for version in by_version), seed
        for versions in by_version.values():
            versions.sort(key=lambda row: row[5])
            assert [row[5] for row in versions] == list(range(len(versions))), seed
            assert len({row[0] for row in versions}) == 1, seed
            for before, after in itertools.pairwise(versions):
                assert before[3] % demand.step_count == after[2], seed


def naive_alive(trace: Trace, demand: Demand) -> list[int]:
    """Pages that are in use, or that hold content some later use needs, step by step over two passes."""
    count, result = len(trace.steps), []
    for now in range(count):
        pages = int(demand.small_pages[now])
        for group, members in enumerate(demand.group_tensors):
            persists = trace.tensors[members[0]].persistent
            later = range(now, now + count + 1) if persists else range(now, count)
            written = persists or any(set(members) & set(step.uses) for step in trace.steps[: now + 1])
            if not written:
                continue
            for step in later:
                used = set(members) & set(trace.steps[step % count].uses)
                if used:
                    whole = len(members) == 1 and members[0] in trace.steps[step % count].overwrites
                    pages += int(demand.group_pages[group]) if step == now or not whole else 0
                    break
        result.append(pages)
    return result


def test_levels_and_working_set_against_a_naive_count() -> None:
    wrapped = 0
    for seed in range(RANDOM_TRACES):
        trace = random_trace(seed)
        demand = demand_of(trace, PAGE)
        count = demand.step_count
        rng = np.random.default_rng(seed)
        kept = rng.integers(0, demand.gaps.pages + 1)
        naive = [0] * count
        for (_, _, start, end, _, _), stay in zip(rows_of(demand.gaps), kept.tolist(), strict=True):
            wrapped += end > count
            for step in range(start + 1, end):
                naive[step % count] += stay
        assert occupied(demand.gaps, kept, count).tolist() == naive, seed
        alive = naive_alive(trace, demand)
        assert demand.alive_pages().tolist() == alive, seed
        assert demand.working_set_pages == max(alive), seed
    assert wrapped > RANDOM_TRACES


def test_in_use_counts_every_group_of_a_step_once() -> None:
    for seed in range(RANDOM_TRACES):
        trace = random_trace(seed)
        demand = demand_of(trace, PAGE)
        for index, step in enumerate(trace.steps):
            groups = [group for group, members in enumerate(demand.group_tensors) if set(members) & set(step.uses)]
            pages = sum(int(demand.group_pages[group]) for group in groups)
            assert int(demand.in_use[index]) == pages + int(demand.small_pages[index]), (seed, index)


def test_pages_of_a_training_step() -> None:
    demand = demand_of(training_trace(layers=2, weight_pages=20, act_pages=6), PAGE)
    # inputs; up, down twice; grad twice; adam twice. Weights 20, states 40, gradients 20, inner 18, act and flow 6.
    assert demand.in_use.tolist() == [6, 44, 44, 44, 44, 76, 76, 80, 80]
    # At the first grad: weights, states, inner, act 0..2, flow, one gradient.
    assert demand.alive_pages().tolist()[5] == 40 + 80 + 36 + 18 + 6 + 20
    assert demand.working_set_pages == 200
