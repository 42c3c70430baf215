# SPDX-License-Identifier: Apache-2.0
"""Plans hold what they promise: on random passes, on model shapes, and the same in every process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from plan_traces import MODEL_PASSES, PassBuilder, llama, many_pages, random_pass
from tensorpager.errors import BudgetError
from tensorpager.pass_plan import (
    PageSchedule,
    Steps,
    belady_page_ins,
    lru_page_ins,
    plan_pass,
    simulate,
    steps_from_events,
)
from tensorpager.steps import use_classes

RANDOM_PASSES = 1000


def plan_of(steps: Steps, frame_count: int, page_count: int, read_ahead: float | None = None) -> PageSchedule:
    return plan_pass(steps, frame_count=frame_count, page_bytes=2 << 20, page_count=page_count, read_ahead=read_ahead)


def random_case(seed: int) -> tuple[Steps, int, int, float | None]:
    """(steps, page_count, frame_count, read_ahead); every budget from one step to everything occurs."""
    rng = np.random.default_rng(seed)
    steps, page_count = random_pass(seed, pages_max=24, steps_max=24)
    classes = use_classes(steps)
    least = max(1, int(classes.step_pages.max()))
    frame_count = int(rng.integers(least, max(least + 1, classes.page_total)))
    return steps, page_count, frame_count, (None, 0.0, 0.5, 2.0)[seed % 4]


@pytest.mark.slow
def test_random_passes_keep_every_promise() -> None:
    with_actions = 0
    for seed in range(RANDOM_PASSES):
        steps, page_count, frame_count, read_ahead = random_case(seed)
        schedule = plan_of(steps, frame_count, page_count, read_ahead)
        for eager in (True, False):
            ran = simulate(schedule, steps, passes=3, eager=eager)
            assert ran.page_ins == (schedule.page_ins_per_pass,) * 3, seed
            assert ran.resident_pages_max <= frame_count, seed
        assert schedule.page_ins_per_pass <= lru_page_ins(steps, frame_count), seed
        assert schedule.lower_bound_page_ins <= schedule.page_ins_per_pass, seed
        with_actions += schedule.page_ins_per_pass > 0
    assert with_actions > RANDOM_PASSES // 3


def test_many_passes_of_min_never_beat_the_bound() -> None:
    """MIN over n passes from an empty start is optimal there, and n passes of any schedule do no better from any start
    than with a full memory thrown in."""
    for seed in range(0, RANDOM_PASSES, 8):
        steps, page_count, frame_count, _ = random_case(seed)
        schedule = plan_of(steps, frame_count, page_count, 0)
        total = sum(belady_page_ins(steps, frame_count, 6))
        assert 6 * schedule.lower_bound_page_ins <= total, seed
        assert total <= 6 * schedule.page_ins_per_pass + len(schedule.initial_pages), seed


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75, 0.95])
@pytest.mark.parametrize("name", MODEL_PASSES)
def test_model_passes(name: str, share: float) -> None:
    built = MODEL_PASSES[name]()
    steps = built.steps()
    largest = int(use_classes(steps).step_pages.max())
    frame_count = max(largest, int(built.page_count * share))
    for read_ahead in (None, 0.0, 0.25):
        schedule = plan_of(steps, frame_count, built.page_count, read_ahead)
        ran = simulate(schedule, steps)
        assert ran.page_ins == (schedule.page_ins_per_pass,) * 3
        assert ran.resident_pages_max <= frame_count
        lru = lru_page_ins(steps, frame_count)
        assert schedule.lower_bound_page_ins <= schedule.page_ins_per_pass <= lru
        assert schedule.working_set_pages == built.page_count
        assert schedule.largest_step_pages == largest


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("name", ["llama", "llama untied", "uneven steps"])
def test_a_cyclic_pass_reads_little_more_than_what_does_not_fit(name: str, share: float) -> None:
    built = MODEL_PASSES[name]()
    frame_count = int(built.page_count * share)
    schedule = plan_of(built.steps(), frame_count, built.page_count)
    beside_largest = built.page_count - frame_count + schedule.largest_step_pages
    assert schedule.page_ins_per_pass <= 1.03 * beside_largest
    fewest = plan_of(built.steps(), frame_count, built.page_count, 0)
    assert fewest.page_ins_per_pass <= 1.03 * fewest.lower_bound_page_ins + 4


def test_reading_ahead_leaves_room_for_it() -> None:
    built = llama(tied=False)
    steps = built.steps()
    frame_count = built.page_count // 2
    fewest = plan_of(steps, frame_count, built.page_count, 0)
    ahead = plan_of(steps, frame_count, built.page_count, 1.0)
    assert simulate(ahead, steps).ahead_pages > 3 * simulate(fewest, steps).ahead_pages
    assert fewest.page_ins_per_pass < ahead.page_ins_per_pass


def test_everything_fits_means_no_actions() -> None:
    built = llama()
    schedule = plan_of(built.steps(), built.page_count, built.page_count)
    assert schedule.page_ins_per_pass == 0
    assert len(schedule.action_page_in) == 0
    assert schedule.lower_bound_page_ins == 0
    assert schedule.hits_per_pass == schedule.accesses_per_pass
    # In order of first use: the embedding, then block by block the norm and the linear layers.
    assert schedule.initial_pages.tolist() == list(range(built.page_count))


def test_one_frame_fewer_pages_only_what_must_be() -> None:
    built = PassBuilder()
    built.use(*[built.tensor(1) for _ in range(10)])
    schedule = plan_of(built.steps(), 9, 10, 0)
    assert schedule.page_ins_per_pass == 2
    # A place is needed through 9 of 10 steps to save one of 10 page-ins, and each step has 8: the optimum is 10 / 9.
    assert 1.1 <= schedule.lower_bound_page_ins <= 10 / 9
    assert schedule.accesses_per_pass == 10
    assert schedule.hits_per_pass == 8


def test_the_pass_boundary_is_read_ahead_over() -> None:
    """The last actions of a pass fetch what the next one starts with, as soon as frames come free."""
    built = PassBuilder()
    built.use(*[built.tensor(4) for _ in range(8)])
    schedule = plan_of(built.steps(), 16, built.page_count)
    next_pass = schedule.action_deadline >= len(schedule.step_set)
    assert next_pass.any()
    fetched = set(schedule.action_page_in[next_pass].tolist())
    assert fetched <= set(schedule.initial_pages.tolist())
    assert schedule.action_step.min() >= 1


def test_pages_that_stay_are_the_same_pages_every_pass() -> None:
    built = PassBuilder()
    built.use(*[built.tensor(9) for _ in range(4)])
    schedule = plan_of(built.steps(), 18, built.page_count, 0)
    assert schedule.page_ins_per_pass == 24
    assert len(set(schedule.action_page_in.tolist())) == 24
    assert set(schedule.action_page_in.tolist()) == set(schedule.action_evict.tolist())


def test_windows_that_stay_open_hold_their_pages() -> None:
    """Steps 0..2 run inside a window over page 0; the steps inside need it though they do not name it."""
    events = [1, 2, -2, 3, -3, -1, 4, -4]
    steps = steps_from_events(events, [[0], [1], [2], [3]])
    assert steps.step_set.tolist() == [0, 1, 2, 3]
    assert steps.step_end.tolist() == [2, 1, 2, 3]
    assert use_classes(steps).step_pages.tolist() == [1, 2, 2, 1]
    schedule = plan_of(steps, 2, 4, 0)
    evicted_at = dict(zip(schedule.action_evict.tolist(), schedule.action_step.tolist(), strict=True))
    assert evicted_at.get(0, 3) == 3


def test_windows_may_overlap_and_repeat() -> None:
    steps = steps_from_events([1, 2, -1, 1, -2, -1, 1, -1], {0: [5, 5, 3], 1: [4]})
    assert steps.step_set.tolist() == [0, 1, 0, 0]
    assert steps.step_end.tolist() == [1, 2, 2, 3]
    assert steps.set_pages[0].tolist() == [3, 5]
    classes = use_classes(steps)
    assert [pages.tolist() for pages in classes.pages] == [[3, 5], [4]]
    assert classes.step_pages.tolist() == [2, 3, 3, 2]


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([], "nothing was acquired"),
        ([0], "event 0 is 0"),
        ([-1], "event 0 releases set 0, which is not acquired"),
        ([1, -1, -1], "event 2 releases set 0"),
        ([1, 2, -2], "set 0 is acquired and never released"),
        ([1, -1, 3, -3], "the events acquire set 2, which set_pages does not hold"),
        ([1.5, -1.5], "events must be a vector of integers"),
        ([[1, -1]], "events must be a vector of integers"),
    ],
)
def test_events_that_are_no_pass_are_refused(events: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steps_from_events(np.array(events), [[0], [1]])


def test_pages_outside_the_address_space_are_refused() -> None:
    with pytest.raises(ValueError, match=r"set_pages\[0\] holds page -1"):
        steps_from_events([1, -1], [[-1]])
    steps = steps_from_events([1, -1], [[7]])
    with pytest.raises(ValueError, match="the steps use page 7, and the address space has 7 pages"):
        plan_of(steps, 4, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frame_count": 0}, "must be positive"),
        ({"page_bytes": 0}, "must be positive"),
        ({"read_ahead": -0.5}, "read_ahead"),
        ({"read_ahead": float("nan")}, "read_ahead"),
    ],
)
def test_senseless_arguments_are_refused(arguments: dict[str, float], message: str) -> None:
    steps = steps_from_events([1, -1], [[0]])
    with pytest.raises(ValueError, match=message):
        plan_pass(steps, **{"frame_count": 1, "page_bytes": 1, "page_count": 1, **arguments})  # type: ignore[arg-type]


def test_a_budget_too_small_names_the_step_and_the_budget_that_works() -> None:
    steps = steps_from_events([1, 2, -2, -1, 3, -3], [[0, 1], [2, 3, 4], [5]])
    names = ("block", "block.linear", "head")
    with pytest.raises(BudgetError) as caught:
        plan_pass(steps, frame_count=4, page_bytes=4096, page_count=6, step_name=lambda step: names[step])
    assert str(caught.value) == (
        "step 1 (block.linear) needs 20480 bytes at once (5 pages of 4096 bytes, 2 of them held by steps still open "
        "around it), and the budget holds 16384 (4 frames). The smallest budget that works is 20480 bytes."
    )
    assert simulate(plan_pass(steps, frame_count=5, page_bytes=4096, page_count=6), steps).resident_pages_max == 5


def test_a_pass_that_needs_no_pages_has_an_empty_plan() -> None:
    steps = steps_from_events([1, -1, 2, -2], [[], []])
    schedule = plan_of(steps, 1, 0)
    assert (len(schedule.initial_pages), schedule.page_ins_per_pass) == (0, 0)
    assert simulate(schedule, steps).resident_pages_max == 0


def test_no_budget_is_too_tight_when_each_step_fits() -> None:
    for seed in range(200):
        steps, page_count = random_pass(seed, pages_max=40, steps_max=30, set_pages_max=8)
        least = max(1, int(use_classes(steps).step_pages.max()))
        schedule = plan_of(steps, least, page_count)
        assert simulate(schedule, steps).resident_pages_max <= least


def test_the_largest_pass_we_promise_is_planned_whole() -> None:
    built = many_pages()
    steps = built.steps()
    assert built.page_count > 69_000
    frame_count = built.page_count // 4
    schedule = plan_of(steps, frame_count, built.page_count)
    ran = simulate(schedule, steps, passes=2)
    assert ran.page_ins == (schedule.page_ins_per_pass,) * 2
    assert ran.resident_pages_max == frame_count
    largest = schedule.largest_step_pages
    assert schedule.page_ins_per_pass <= 1.03 * (built.page_count - frame_count + largest)
    assert schedule.lower_bound_page_ins >= built.page_count - frame_count


DIGEST_PROGRAM = """
import hashlib
from plan_traces import MODEL_PASSES
from test_pass_plan import plan_of, random_case
digest = hashlib.sha256()
for seed in range(400):
    steps, page_count, frame_count, read_ahead = random_case(seed)
    digest.update(plan_of(steps, frame_count, page_count, read_ahead).to_json().encode())
for build in MODEL_PASSES.values():
    built = build()
    digest.update(plan_of(built.steps(), built.page_count * 2 // 3, built.page_count).to_json().encode())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_plans_are_byte_equal_across_processes_and_hash_seeds() -> None:
    import tensorpager

    places = [str(Path(__file__).parent), *(str(Path(entry).parent) for entry in tensorpager.__path__)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", DIGEST_PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(places)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("0", "4711")
    ]
    digests = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(digests) == 1
    assert len(digests.pop()) == hashlib.sha256().digest_size * 2


def test_planning_needs_neither_torch_nor_the_native_module() -> None:
    program = (
        "import sys; import tensorpager.pass_plan as p; "
        "s = p.steps_from_events([1, -1, 2, -2], [[0], [1]]); "
        "p.plan_pass(s, frame_count=1, page_bytes=1, page_count=2); "
        "print([m for m in ('torch', 'tensorpager._core') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, text=True)
    assert ran.stdout.strip() == "[]"
