# SPDX-License-Identifier: Apache-2.0
"""Plans hold what their certificates say: on random traces, on a training step, in every process, in every budget."""

from __future__ import annotations

import hashlib
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tensorpager import planner
from tensorpager.demand import demand_of
from tensorpager.errors import BudgetError
from tensorpager.hardware import Hardware
from tensorpager.operator_trace import Trace, TraceStep
from tensorpager.pacing import DRIVE
from tensorpager.planner import Budgets, plan
from tensorpager.reorder import AS_TRACED, CHOICE_VALUES, Choices, alternatives
from tensorpager.schedule import Schedule
from trace_shapes import PAGE, TraceBuilder, clean_trace, random_trace, training_trace

FIXED = Choices(optimizer=AS_TRACED, accumulation=AS_TRACED, recompute=AS_TRACED)
RANDOM_TRACES = 1000


def hardware(*, flops: float = 1e3, read: float = 1e3, write: float = 1e3, link: float = 0.0) -> Hardware:
    """flops per second; pages per second of the drive and of the link."""
    return Hardware("test", 0, 0, flops, 1e12, link * PAGE, link * PAGE, read * PAGE, write * PAGE, 0, {})


SLOW = hardware()
#: A step of training_trace takes 2 to 4 ms, a page 0.04: drive and compute come about as soon to an end.
BALANCED = hardware(flops=1e9, read=25_000, write=25_000)


def planned(trace: Trace, pages: int, host_pages: int = 0, **more: object) -> Schedule:
    arguments = {"page_bytes": PAGE, "objective": "bytes", "choices": FIXED, **more}
    machine = arguments.pop("hardware", SLOW)
    return plan(trace, Budgets(pages * PAGE, host_pages * PAGE), machine, **arguments)


def random_case(seed: int) -> tuple[Schedule, Trace]:
    """Every budget from one step to everything occurs, both objectives, one tier and two, slow drives and fast ones."""
    trace, rng = random_trace(seed), random.Random(seed)
    demand = demand_of(trace, PAGE)
    least = max(1, int(demand.in_use.max()))
    pages = rng.randint(least, max(least, demand.working_set_pages))
    host_pages = rng.choice((0, 0, 0, 2, 8))
    machine = hardware(
        read=rng.choice((1, 100, 1e4)), write=rng.choice((1, 100)), link=rng.choice((50, 1e3)) if host_pages else 0
    )
    objective = ("bytes", "time")[seed % 2]
    return planned(trace, pages, host_pages, objective=objective, hardware=machine), trace


def most_held(schedule: Schedule, trace: Trace) -> int:
    """Pages that the plan holds at the fullest step, counted one by one."""
    held = demand_of(trace, PAGE).small_pages.tolist()
    for group in schedule.groups:
        for use in group.uses:
            held[use.step] += group.pages
        for gap in group.gaps:
            for step in range(gap.start + 1, gap.end):
                held[step % schedule.step_count] += gap.kept
    return max(held)


@pytest.mark.slow
def test_random_traces_keep_every_promise() -> None:
    with_transfers = two_tiers = 0
    for seed in range(RANDOM_TRACES):
        schedule, trace = random_case(seed)
        proof = schedule.certificate
        assert proof.drive_bound_bytes is not None, seed
        assert proof.device_bound_bytes is not None, seed
        assert proof.drive_bytes >= proof.drive_bound_bytes * (1 - 1e-6), seed
        assert proof.device_in_bytes + proof.device_out_bytes >= proof.device_bound_bytes * (1 - 1e-6), seed
        assert proof.pass_seconds >= proof.time_bound_seconds * (1 - 1e-6), seed
        assert proof.time_bound_seconds >= proof.compute_seconds * (1 - 1e-6), seed
        if seed % 2 == 0 and not schedule.host_frames:
            assert proof.drive_bytes <= proof.lru_drive_bytes, seed
        assert most_held(schedule, trace) <= schedule.device_frames, seed
        assert proof.drive_read_bytes == PAGE * sum(
            group.pages - gap.kept - gap.host_kept for group in schedule.groups for gap in group.gaps
        )
        assert proof.drive_written_bytes == PAGE * sum(gap.written for group in schedule.groups for gap in group.gaps)
        with_transfers += len(schedule.transfers) > 0
        two_tiers += schedule.host_frames > 0 and proof.device_in_bytes > proof.drive_read_bytes
    assert with_transfers > RANDOM_TRACES // 2
    assert two_tiers > RANDOM_TRACES // 20


@pytest.mark.parametrize("share", [0.25, 0.4, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_training_never_moves_more_than_lru(microbatches: int, share: float) -> None:
    trace = training_trace(microbatches=microbatches)
    pages = int(share * demand_of(trace, PAGE).working_set_pages)
    for objective in ("bytes", "time"):
        proof = planned(trace, pages, objective=objective, hardware=BALANCED).certificate
        assert proof.drive_bytes <= proof.lru_drive_bytes
        assert proof.bytes_gap is not None
        assert proof.time_gap >= 1 - 1e-6
        assert proof.proof == "linear program, HiGHS"
    assert planned(trace, pages, hardware=BALANCED).certificate.bytes_gap < 1.1


# -- the same everywhere


DIGEST_PROGRAM = """
import hashlib
from test_planner import BALANCED, planned, random_case
from trace_shapes import training_trace
digest = hashlib.sha256()
for seed in range(60):
    digest.update(random_case(seed)[0].to_json().encode())
digest.update(planned(training_trace(microbatches=2), 250, 40, choices=None, hardware=BALANCED).to_json().encode())
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
        "import sys; from tensorpager.hardware import Hardware; from tensorpager.planner import plan; "
        "from tensorpager.operator_trace import Trace, TraceStep, TraceTensor; "
        "t = Trace('t', (TraceTensor('w', 8, 'weight'),), (TraceStep('read', (0,)),)); "
        "s = plan(t, 8, Hardware('h', 0, 0, 1, 1, 0, 0, 1, 1, 0, {}), page_bytes=4); s.explain('w'); s.to_json(); "
        "print([m for m in ('torch', 'tensorpager._core') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, text=True)
    assert ran.stdout.strip() == "[]"


# -- budgets


def test_everything_fits_means_nothing_moves() -> None:
    trace = training_trace(microbatches=2)
    pages = demand_of(trace, PAGE).working_set_pages
    for objective in ("bytes", "time"):
        schedule = planned(trace, pages, objective=objective, choices=None, hardware=BALANCED)
        proof = schedule.certificate
        assert schedule.transfers == ()
        assert set(schedule.stall_seconds) == {0.0}
        assert set(schedule.choices.values()) == {AS_TRACED}
        assert schedule.working_set_pages == schedule.device_frames == pages
        moved = (proof.device_in_bytes, proof.device_out_bytes, proof.drive_bytes, proof.lru_drive_bytes)
        assert moved == (0, 0, 0, 0)
        assert proof.pass_seconds == pytest.approx(proof.compute_seconds, rel=1e-12)
        assert proof.time_bound_seconds == proof.compute_seconds == pytest.approx(0.096006)
        assert (proof.bytes_gap, proof.drive_bound_bytes, proof.device_bound_bytes) == (1.0, 0, 0)
        assert proof.terabytes_written_per_day == 0.0
        assert proof.passes_of_endurance is None


def test_one_frame_fewer_moves_something() -> None:
    trace = training_trace()
    pages = demand_of(trace, PAGE).working_set_pages
    assert planned(trace, pages - 1).certificate.drive_bytes > 0


def test_a_budget_error_names_the_step_and_the_smallest_budget() -> None:
    trace = training_trace()
    with pytest.raises(BudgetError) as caught:
        planned(trace, 79)
    assert str(caught.value) == (
        "step 19 (adam) needs 327680 bytes at once (80 pages of 4096 bytes), and the budget holds 323584. The smallest "
        "budget that works is 327680 bytes; a smaller batch or shorter sequences need less."
    )
    assert planned(trace, 80).device_frames == 80
    for choices in (None, FIXED):
        with pytest.raises(BudgetError, match=r"budget that works is 327680 bytes"):
            planned(trace, 79, choices=choices)
    with pytest.raises(BudgetError, match=r"^step 1 \(up in 'layers.0'\) needs 180224 "):
        planned(replace(trace, steps=trace.steps[:13]), 43)


def test_the_smallest_budget_works_on_random_traces() -> None:
    for seed in range(40):
        trace = random_trace(seed)
        least = int(demand_of(trace, PAGE).in_use.max())
        if least < 2:
            continue
        with pytest.raises(BudgetError) as caught:
            planned(trace, least - 1)
        found = re.search(r"works is (\d+) bytes", str(caught.value))
        assert found is not None
        assert int(found[1]) == least * PAGE, seed
        assert planned(trace, least).device_frames == least


def test_budgets_are_bytes_or_text() -> None:
    trace = clean_trace((0, 1, 2))
    for budget in (2 * PAGE, "8KiB", "8.5KiB", Budgets(2 * PAGE + 1)):
        assert plan(trace, budget, SLOW, page_bytes=PAGE).device_frames == 2


# -- two tiers


def test_the_drive_moves_less_the_more_the_host_holds() -> None:
    trace = training_trace()
    machine = hardware(flops=1e9, read=2.5e4, write=2.5e4, link=1e5)
    pages = demand_of(trace, PAGE).working_set_pages
    proofs = [planned(trace, 150, host, hardware=machine).certificate for host in (0, 50, 100, 200, pages - 150, pages)]
    moved = [proof.drive_bytes for proof in proofs]
    assert moved == sorted(moved, reverse=True)
    assert len(set(moved[:5])) == 5
    assert moved[-1] == 0
    assert proofs[-1].device_in_bytes >= proofs[0].drive_read_bytes


def test_a_host_tier_for_everything_leaves_the_drive_alone() -> None:
    trace = training_trace()
    machine = hardware(flops=1e9, read=2.5e4, write=2.5e4, link=1e5)
    for objective in ("bytes", "time"):
        schedule = planned(trace, 150, 1000, objective=objective, hardware=machine)
        assert (schedule.certificate.drive_read_bytes, schedule.certificate.drive_written_bytes) == (0, 0)
        assert schedule.certificate.drive_seconds == 0.0
        assert all(moved.tier != DRIVE for moved in schedule.transfers)
        assert schedule.certificate.device_in_bytes == sum(
            moved.count * PAGE for moved in schedule.transfers if moved.page_in
        )


# -- the drive's endurance


def test_a_write_budget_is_kept_in_time() -> None:
    trace = training_trace()
    free = planned(trace, 150, objective="time", hardware=BALANCED).certificate
    assert free.drive_written_bytes > 0
    for share in (0.5, 0.1):
        per_day = free.terabytes_written_per_day * share * 1e12
        held = planned(trace, 150, objective="time", hardware=BALANCED, write_budget_bytes_per_day=per_day).certificate
        assert held.terabytes_written_per_day <= per_day / 1e12 * (1 + 1e-9)
        assert held.pass_seconds > free.pass_seconds
        assert held.pass_seconds >= held.time_bound_seconds * (1 - 1e-6)
    ample = free.terabytes_written_per_day * 2e12
    held = planned(trace, 150, objective="time", hardware=BALANCED, write_budget_bytes_per_day=ample).certificate
    assert held.time_bound_seconds == pytest.approx(free.time_bound_seconds, rel=1e-4)
    assert held.pass_seconds == pytest.approx(free.pass_seconds, rel=0.03)  # another optimum of the same program


def test_endurance_by_hand() -> None:
    worn = replace(BALANCED, drive_endurance_bytes=1e9)
    proof = planned(training_trace(), 150, hardware=worn).certificate
    written = proof.drive_written_bytes
    assert written > 0
    assert proof.passes_of_endurance == 1e9 / written
    assert proof.terabytes_written_per_1000_passes == 1000 * written / 1e12
    assert proof.terabytes_written_per_day == written / proof.pass_seconds * 86_400 / 1e12


# -- without a solver


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_without_a_solver_plans_are_nearly_as_good(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    trace = training_trace()
    pages = int(share * demand_of(trace, PAGE).working_set_pages)
    bound = planned(trace, pages, hardware=BALANCED).certificate.drive_bound_bytes
    assert bound is not None
    monkeypatch.setattr(planner, "has_solver", lambda: False)
    proof = planned(trace, pages, hardware=BALANCED).certificate
    assert proof.drive_bytes <= 1.06 * bound
    assert proof.drive_bytes <= proof.lru_drive_bytes
    assert proof.proof == "none: install tensorpager[plan] for the linear program"
    assert (proof.drive_bound_bytes, proof.device_bound_bytes, proof.bytes_gap) == (None, None, None)
    assert proof.time_bound_seconds == proof.compute_seconds


def test_without_a_solver_two_tiers_work_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "has_solver", lambda: False)
    machine = hardware(flops=1e9, read=2.5e4, write=2.5e4, link=1e5)
    one, two = (planned(training_trace(), 150, host, hardware=machine).certificate for host in (0, 200))
    assert two.drive_bytes < one.drive_bytes
    assert two.drive_bytes <= two.lru_drive_bytes


# -- arguments and choices


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budgets": PAGE - 1}, "a budget of 4095 bytes and pages of 4096: at least one page has to fit"),
        ({"budgets": 0}, "the size 0 is 0 bytes; it must lie between 1 byte and 2**60 bytes"),
        ({"budgets": Budgets(PAGE, -1)}, "a budget of 4096 bytes and pages of 4096: at least one page has to fit"),
        ({"page_bytes": 0}, "a budget of 8192 bytes and pages of 0: at least one page has to fit"),
        ({"page_bytes": -4}, "a budget of 8192 bytes and pages of -4: at least one page has to fit"),
        ({"objective": "speed"}, "objective 'speed' is none of time, bytes"),
        ({"write_budget_bytes_per_day": 0}, "write_budget_bytes_per_day 0 must be positive"),
        ({"write_budget_bytes_per_day": -1.5}, "write_budget_bytes_per_day -1.5 must be positive"),
        ({"write_budget_bytes_per_day": float("nan")}, "write_budget_bytes_per_day nan must be positive"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, object], message: str) -> None:
    given = {"budgets": 2 * PAGE, "page_bytes": PAGE, **arguments}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan(clean_trace((0, 1)), given.pop("budgets"), SLOW, **given)


def test_every_choice_that_is_fixed_is_made() -> None:
    trace = training_trace(layers=3, microbatches=2)
    for accumulation in (AS_TRACED, "vertical"):
        for recompute in (AS_TRACED, "every block", "every other block"):
            for optimizer in (AS_TRACED, "inside backward"):
                choices = Choices(optimizer=optimizer, accumulation=accumulation, recompute=recompute)
                schedule = planned(trace, 120, choices=choices, hardware=BALANCED)
                assert schedule.choices == {
                    "accumulation": accumulation,
                    "recompute": recompute,
                    "optimizer": optimizer,
                }
                order = trace
                for name in CHOICE_VALUES:
                    order = dict(alternatives(order, name)).get(schedule.choices[name], order)
                assert schedule.step_names == tuple(step.name for step in order.steps)


@pytest.mark.parametrize("fixed", [Choices(optimizer="inside backward"), Choices(recompute="every block")])
@pytest.mark.parametrize("objective", ["bytes", "time"])
def test_what_is_fixed_stays_where_the_rest_is_chosen(fixed: Choices, objective: str) -> None:
    """Whatever else is chosen, the schedule is that of the order which its choices name."""
    trace = training_trace(layers=4, microbatches=4, act_pages=2)
    schedule = planned(trace, 90, choices=fixed, hardware=BALANCED, objective=objective)
    for name in CHOICE_VALUES:
        assert getattr(fixed, name) in (None, schedule.choices[name])
    assert schedule.choices["accumulation"] == "vertical"
    again = planned(trace, 90, choices=Choices(**schedule.choices), hardware=BALANCED, objective=objective)
    assert again == schedule
    inside = schedule.step_names[-4:] != ("adam",) * 4
    assert inside == (schedule.choices["optimizer"] == "inside backward")


def test_free_choices_are_no_worse_than_the_trace() -> None:
    trace = training_trace(layers=3, microbatches=2)
    for objective, cost in (("bytes", "drive_bytes"), ("time", "pass_seconds")):
        fixed = planned(trace, 120, objective=objective, hardware=BALANCED)
        free = planned(trace, 120, objective=objective, hardware=BALANCED, choices=None)
        assert getattr(free.certificate, cost) < getattr(fixed.certificate, cost)


def test_another_order_may_fit_where_the_trace_does_not_matter() -> None:
    """No order changes what a single step needs."""
    for choices in (None, Choices(recompute="every block")):
        with pytest.raises(BudgetError, match=r"^step \d+ \(adam\) needs 327680 bytes"):
            planned(training_trace(), 79, choices=choices)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (Choices(accumulation="vertical"), "'vertical' for accumulation is not possible for training"),
        (Choices(recompute="every block", accumulation="vertical"), "'vertical' for accumulation is not possible"),
    ],
)
def test_an_impossible_choice_is_refused(choices: Choices, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        planned(training_trace(), 200, choices=choices)
    with pytest.raises(ValueError, match=r"^'every block' for recompute is not possible for clean: it would change a "):
        planned(clean_trace((0, 1)), 2, choices=Choices(recompute="every block"))


def test_a_clipped_optimizer_can_not_be_moved() -> None:
    trace = training_trace()
    gradients = tuple(number for number, tensor in enumerate(trace.tensors) if tensor.kind == "gradient")
    clip = TraceStep("clip", writes=gradients, phase="optimizer")
    clipped = replace(trace, steps=(*trace.steps[:19], clip, *trace.steps[19:]))
    with pytest.raises(ValueError, match=r"^'inside backward' for optimizer is not possible for training"):
        planned(clipped, 200, choices=Choices(optimizer="inside backward"))


# -- tokens


def two_weights(*, tokens: int, flops: int, optimizer_flops: int = 0) -> Trace:
    """In five frames three pages of each come in every pass, six milliseconds."""
    built = TraceBuilder("two")
    for number in range(2):
        built.tensor(f"w{number}", 4, "weight")
        built.step("read", reads=(number,), flops=flops)
    if optimizer_flops:
        built.step("update", phase="optimizer", flops=optimizer_flops)
    return built.trace(tokens)


def test_break_even_tokens_by_hand() -> None:
    proof = planned(two_weights(tokens=10, flops=10), 5).certificate
    assert proof.drive_read_bytes == 6 * PAGE
    assert proof.break_even_tokens == pytest.approx(3.0)  # 6 ms over 2 ms per token
    proof = planned(two_weights(tokens=10, flops=10, optimizer_flops=2), 5).certificate
    assert proof.break_even_tokens == pytest.approx(2.0)  # 2 ms of them hide behind the optimizer
    proof = planned(two_weights(tokens=10, flops=10, optimizer_flops=9), 5).certificate
    assert proof.break_even_tokens == 0.0
    assert planned(two_weights(tokens=0, flops=10), 5).certificate.break_even_tokens is None
    assert planned(two_weights(tokens=10, flops=0), 5).certificate.break_even_tokens == float("inf")


def paged_activation(flops: int) -> Trace:
    """In five frames the activation goes and comes with three pages, 2 ms per token; the weight comes with three."""
    built = TraceBuilder("activation")
    weight, act = built.tensor("w", 4, "weight"), built.tensor("a", 4, "activation")
    built.step("make", overwrites=(act,), flops=flops)
    built.step("use", reads=(weight,), flops=flops)
    built.step("read", reads=(act,), flops=flops)
    return built.trace(tokens=3)


def test_break_even_with_activations_that_are_paged() -> None:
    proof = planned(paged_activation(3), 5).certificate
    assert (proof.drive_read_bytes, proof.drive_written_bytes) == (6 * PAGE, 3 * PAGE)
    assert proof.break_even_tokens == pytest.approx(3.0)  # 3 ms over 3 - 2 ms per token
    assert planned(paged_activation(2), 5).certificate.break_even_tokens == float("inf")
