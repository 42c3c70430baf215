# SPDX-License-Identifier: Apache-2.0
"""The choice between loading and computing, against all that could be chosen and against a simulation."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

import pytest

from tensorpager.prefix_plan import ComputeRate, PrefixPlan, ReadRate, plan_prefix


@dataclass(frozen=True)
class Case:
    """A prompt on a machine."""

    prompt_tokens: int
    stored_tokens: int
    block_tokens: int
    bytes_per_token: float
    read: ReadRate
    compute: ComputeRate

    def plan(self) -> PrefixPlan:
        return plan_prefix(**vars(self))


def random_case(seed: int) -> Case:
    """From a small model on a laptop to a large one on a GPU, near enough to each other that either may be faster."""
    chosen = random.Random(seed)
    block_tokens = chosen.choice([16, 64, 256])
    prompt_tokens = chosen.randrange(2, 12000)
    stored_tokens = chosen.randrange(prompt_tokens // block_tokens + 3) * block_tokens
    flops_per_token = 10 ** chosen.uniform(8, 11)
    flops_per_second = 10 ** chosen.uniform(10, 14)
    token_seconds = flops_per_token / flops_per_second
    bytes_per_token = 10 ** chosen.uniform(3, 6)
    bandwidth = bytes_per_token / token_seconds * 10 ** chosen.uniform(-1, 1)  # loading costs 0.1 to 10 times computing
    return Case(
        prompt_tokens,
        stored_tokens,
        block_tokens,
        bytes_per_token,
        ReadRate(bandwidth, chosen.choice([0.0, 0.0, 1.0]) * token_seconds * 100),
        ComputeRate(
            flops_per_second,
            flops_per_token,
            flops_per_token * chosen.choice([0.0, 1e-5, 1e-3]),
            chosen.choice([0.0, 0.0, token_seconds * prompt_tokens * chosen.uniform(0.01, 0.9)]),
            chosen.choice([0.0, token_seconds * 10]),
        ),
    )


def simulated_seconds(case: Case) -> list[float]:
    """By blocks that are loaded: block by block from the drive, then token by token, in no less than a pass takes."""
    compute = case.compute
    flops = [compute.flops_per_token + (token + 1) * compute.flops_per_pair for token in range(case.prompt_tokens)]
    computed = list(itertools.accumulate((each / compute.flops_per_second for each in flops), initial=0.0))
    seconds, loaded = [], 0.0
    for first in range(0, loadable_tokens(case) + 1, case.block_tokens):
        seconds.append(loaded + max(compute.start_seconds + computed[-1] - computed[first], compute.pass_seconds))
        loaded += case.block_tokens * case.bytes_per_token / case.read.bytes_per_second
        loaded += case.read.start_seconds if first == 0 else 0.0
    return seconds


def loadable_tokens(case: Case) -> int:
    return min(case.stored_tokens, (case.prompt_tokens - 1) // case.block_tokens * case.block_tokens)


@pytest.mark.parametrize("seed", range(200))
def test_nothing_that_could_be_chosen_is_faster(seed: int) -> None:
    case = random_case(seed)
    plan = case.plan()
    times = simulated_seconds(case)
    chosen, rest = divmod(plan.load_tokens, case.block_tokens)
    assert rest == 0
    assert plan.seconds == pytest.approx(times[chosen], rel=1e-6)
    assert times[chosen] <= min(times) * (1 + 1e-6)
    assert plan.seconds_recomputed == pytest.approx(times[0], rel=1e-6)
    assert plan.seconds_loaded == pytest.approx(times[-1], rel=1e-6)
    assert 0 <= plan.load_seconds <= plan.seconds
    assert plan.load_tokens < case.prompt_tokens


def test_measured_rates_are_good_enough_to_choose_by() -> None:
    """Each rate is off by up to a fifth. The choice counts as right when neither way alone would have been faster."""
    right, in_part, either = 0, 0, set()
    for seed in range(200):
        case, noise = random_case(seed), random.Random(seed)
        off = [noise.uniform(0.8, 1.25) for _ in range(3)]
        measured = replace(
            case,
            read=replace(case.read, bytes_per_second=case.read.bytes_per_second * off[0]),
            compute=replace(
                case.compute,
                flops_per_second=case.compute.flops_per_second * off[1],
                pass_seconds=case.compute.pass_seconds * off[2],
            ),
        )
        times = simulated_seconds(case)
        chosen = measured.plan().load_tokens // case.block_tokens
        right += times[chosen] <= min(times[0], times[-1]) * (1 + 1e-9)
        in_part += 0 < chosen < len(times) - 1
        either.add(times[0] < times[-1])
    assert right >= 0.95 * 200, right
    assert in_part > 5
    assert either == {False, True}


def test_what_a_pass_takes_anyway_is_free() -> None:
    """Weights that take a second to read hide the computing of 500 tokens: the last ones need not be loaded."""
    read, compute = ReadRate(1e6), ComputeRate(1e9, 2e6, 0.0, 1.0)
    plan = plan_prefix(
        prompt_tokens=4096, stored_tokens=4096, block_tokens=64, bytes_per_token=100.0, read=read, compute=compute
    )
    assert plan.load_tokens == 3648  # 448 are computed: 0.9 s of the second
    assert plan.seconds == pytest.approx(1.0 + 0.3648)
    unpaged = replace(compute, pass_seconds=0.0)
    plan = plan_prefix(
        prompt_tokens=4096, stored_tokens=4096, block_tokens=64, bytes_per_token=100.0, read=read, compute=unpaged
    )
    assert plan.load_tokens == 4032  # at least one token is computed


def test_what_can_not_be_is_refused() -> None:
    good = random_case(0)
    for changes in (
        {"read": ReadRate(0.0)},
        {"compute": ComputeRate(-1.0, 1.0)},
        {"block_tokens": 0},
        {"prompt_tokens": 0},
        {"stored_tokens": -good.block_tokens},
        {"stored_tokens": good.block_tokens + 1},
    ):
        with pytest.raises(ValueError, match=r"positive|not blocks"):
            replace(good, **changes).plan()
