# SPDX-License-Identifier: Apache-2.0
"""Played schedules: carried out page by page by a shadow that knows only the transfers, and small ones by hand."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from schedule_shadow import Shadow
from tensorpager.demand import Demand, demand_of
from tensorpager.keeping import best_kept, repaired
from tensorpager.keeping_bound import TimeLimits, least_time
from tensorpager.pacing import DRIVE, HOST, PASSES, Links, Pace, pace, play
from trace_shapes import PAGE, TraceBuilder, random_trace

RANDOM_PLAYS = 1000


@pytest.mark.slow
def test_random_plays_hold_before_the_shadow() -> None:
    plays = seed = with_transfers = 0
    while plays < RANDOM_PLAYS:
        trace = random_trace(seed)
        demand, rng = demand_of(trace, PAGE), random.Random(seed)
        least, most = int(demand.in_use.max()), demand.working_set_pages
        seed += 1
        if most == 0:
            continue
        frames = rng.randint(max(least, 1), max(most, 1))
        host_frames = rng.choice((0, 0, 3))
        gaps, count, room = demand.gaps, demand.step_count, frames - demand.in_use
        compute = np.array([step.flops + 1 for step in trace.steps]) * 1e-3
        links = Links(1.0, rng.choice((1.0, 2.0)), *((0.3, 0.3) if host_frames else (0.0, 0.0)))
        soonest = least_time(gaps, room, count, TimeLimits(compute, 1.0, links.drive_write)).kept
        for kept in (best_kept(gaps, room, count), soonest):
            host_kept = np.zeros_like(kept)
            if host_frames:
                above = best_kept(gaps, room + host_frames, count)
                until_there = replace(gaps, end=gaps.end + 1)
                host_room = np.full(count, host_frames)
                host_kept = repaired(until_there, host_room, count, np.maximum(above - kept, 0))
            history = play(demand, kept, host_kept, compute.tolist(), links, frames)
            assert history.peak_pages <= frames, seed
            shadow = Shadow(demand, kept, host_kept, frames, host_frames)
            shadow.check(history, compute.tolist())
            assert shadow.taken_most <= frames, seed
            plays += 1
            with_transfers += len(history.transfers) > 0
    assert with_transfers > RANDOM_PLAYS // 2


def cycle(count: int, pages: int, *, changed: bool = False) -> Demand:
    """As many tensors, used in turn."""
    built = TraceBuilder("cycle")
    for number in range(count):
        built.tensor(f"t{number}", pages, "weight")
        built.step("use", **{"writes" if changed else "reads": (number,)})
    return demand_of(built.trace(), PAGE)


def paced(
    demand: Demand, kept: list[int], compute: float, links: Links, frames: int, host_kept: list[int] | None = None
) -> Pace:
    in_host = np.array(host_kept or [0] * demand.gaps.count, np.int64)
    return pace(demand, np.array(kept, np.int64), in_host, [compute] * demand.step_count, links, frames)


def test_a_drive_bound_cycle_takes_as_long_as_its_reads() -> None:
    """Ten tensors, three stay; one frame is in use, one is read into."""
    played = paced(cycle(10, 1), [1] * 3 + [0] * 7, 0.125, Links(1.0, 1.0), 5)
    assert played.pass_seconds == 7.0
    assert played.drive_busy_seconds == 7.0
    assert float(played.stall_seconds.sum()) == 7.0 - 10 * 0.125
    assert played.peak_pages <= 5
    assert [(moved.page_in, moved.tier, moved.count) for moved in played.transfers] == [(True, DRIVE, 1)] * 7
    begins = [moved.begin_seconds for moved in played.transfers]
    assert np.diff(begins).tolist() == [1.0] * 6
    assert all(moved.end_seconds == moved.begin_seconds + 1.0 for moved in played.transfers)


def test_a_compute_bound_cycle_takes_as_long_as_its_steps() -> None:
    played = paced(cycle(10, 1), [1] * 3 + [0] * 7, 2.0, Links(1.0, 1.0), 5)
    assert played.pass_seconds == 20.0
    assert played.stall_seconds.tolist() == [0.0] * 10
    assert played.step_begin_seconds.tolist() == [2.0 * step for step in range(10)]
    assert played.drive_busy_seconds == 7.0


def test_without_a_frame_to_read_into_nothing_overlaps() -> None:
    """Two tensors of two pages in two frames: a step's pages come when the other's are gone."""
    played = paced(cycle(2, 2), [0, 0], 0.5, Links(1.0, 1.0), 2)
    assert played.pass_seconds == 2 * (2.0 + 0.5)
    assert played.stall_seconds.tolist() == [2.0, 2.0]
    assert played.step_begin_seconds.tolist() == [2.0, 4.5]


def test_steps_wait_for_writes() -> None:
    """The same, changed: before two pages come, two are written."""
    played = paced(cycle(2, 2, changed=True), [0, 0], 0.5, Links(1.0, 2.0), 2)
    assert played.pass_seconds == 2 * (2 * 2.0 + 2 * 1.0 + 0.5)
    assert played.stall_seconds.tolist() == [6.0, 6.0]
    assert played.drive_busy_seconds == 12.0


def test_writes_and_reads_share_the_drive() -> None:
    played = paced(cycle(4, 1, changed=True), [0] * 4, 0.0, Links(1.0, 2.0), 3)
    assert played.pass_seconds == 4 * 1.0 + 4 * 2.0
    assert played.drive_busy_seconds == 12.0
    assert sum(moved.count for moved in played.transfers if moved.page_in) == 4
    assert sum(moved.count for moved in played.transfers if not moved.page_in) == 4
    spans = sorted((moved.begin_seconds, moved.end_seconds) for moved in played.transfers)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def test_writes_hide_behind_compute_too() -> None:
    played = paced(cycle(4, 1, changed=True), [0] * 4, 4.0, Links(1.0, 2.0), 4)
    assert played.pass_seconds == 16.0
    assert played.stall_seconds.tolist() == [0.0] * 4


def test_what_left_is_written_before_reads_that_can_wait() -> None:
    """While a step of 4 s computes: first the page that left, in 2 s, then the one that comes, in 1 s."""
    played = paced(cycle(8, 1, changed=True), [0] * 8, 4.0, Links(1.0, 2.0), 6)
    moves = [(moved.begin_seconds, moved.page_in) for moved in played.transfers]
    assert moves == [(4.0 * step + late, late > 0) for step in range(8) for late in (0.0, 2.0)]
    assert played.pass_seconds == 32.0


def test_the_host_link_carries_both_directions_at_once() -> None:
    """Pages go to the host in one direction while others come in the other, and the drive has nothing to do."""
    played = paced(cycle(4, 1), [0] * 4, 0.0, Links(8.0, 8.0, 1.0, 1.0), 3, [1] * 4)
    assert played.pass_seconds == 4.0
    assert played.drive_busy_seconds == 0.0
    assert {moved.tier for moved in played.transfers} == {HOST}


def test_a_page_from_the_drive_passes_both_links() -> None:
    slow_link = paced(cycle(4, 1), [0] * 4, 0.0, Links(1.0, 1.0, 3.0, 3.0), 3)
    assert slow_link.pass_seconds == 12.0
    slow_drive = paced(cycle(4, 1), [0] * 4, 0.0, Links(3.0, 3.0, 1.0, 1.0), 3)
    assert slow_drive.pass_seconds == 12.0


def test_nothing_moves_when_everything_stays() -> None:
    played = paced(cycle(4, 3, changed=True), [3] * 4, 0.25, Links(1.0, 1.0), 12)
    assert played.pass_seconds == 1.0
    assert played.transfers == ()
    assert played.peak_pages == 12


def test_all_passes_are_played() -> None:
    demand = cycle(3, 1)
    kept = np.zeros(3, np.int64)
    history = play(demand, kept, kept, [1.0, 2.0, 3.0], Links(0.5, 0.5), 2)
    assert len(history.begins) == len(history.stalls) == 3 * PASSES
    assert history.end_seconds == 0.5 + PASSES * 6.0
    assert history.begins[:4] == [0.5, 1.5, 3.5, 6.5]


def test_a_budget_below_what_is_kept_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^step 0 holds 4 pages, the budget 3$"):
        paced(cycle(4, 1), [1] * 4, 0.0, Links(1.0, 1.0), 3)
