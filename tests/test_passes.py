# SPDX-License-Identifier: Apache-2.0
"""Passes that are not the ones planned for: other orders, experts, other shapes."""

from __future__ import annotations

import copy
import random

import pytest
import torch

import tensorpager as tp
from tensorpager.passes import PASS_PLANS_MAX
from torch_models import BUDGET


class Branching(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(512, 512) for _ in range(12))

    def forward(self, x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
        for index in order:
            x = self.layers[index](x)
        return x


def test_other_steps_are_served_and_planned_for_a_few_times() -> None:
    torch.manual_seed(0)
    model = Branching()
    twin = copy.deepcopy(model)
    x = torch.ones(2, 512)
    orders = [(*range(start, 12), *range(start)) for start in range(12)]
    with tp.page(model, BUDGET) as pager, torch.no_grad():

        def run_all() -> None:
            for turn in range(3):
                for order in orders:
                    assert torch.equal(model(x, order[turn:]), twin(x, order[turn:]))

        with pytest.warns(UserWarning, match="16 of the first 17 passes .* took other steps") as told:
            run_all()
        assert len(told) == 1
        stats = pager.stats()
        assert stats["plans"] == PASS_PLANS_MAX
        assert (stats["passes"], stats["mispredicted_passes"], stats["expected_plans"]) == (36, 35, 1)
        for _ in range(2):  # a known one, twice in a row, is followed again
            model(x, orders[1])
        before = pager.stats()["off_schedule_acquires"]
        model(x, orders[1])
        assert pager.stats()["off_schedule_acquires"] == before
        assert pager.stats()["plans"] == PASS_PLANS_MAX
        assert stats["resident_bytes_max"] <= BUDGET


class Experts(torch.nn.Module):
    """Every layer runs one dense block, and 2 of 8 experts that `chosen` names."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = torch.nn.ModuleList(torch.nn.Linear(512, 512) for _ in range(4))
        self.experts = torch.nn.ModuleList(
            torch.nn.ModuleList(torch.nn.Linear(512, 512) for _ in range(8)) for _ in range(4)
        )

    def forward(self, x: torch.Tensor, chosen: list[list[int]]) -> torch.Tensor:
        for dense, experts, numbers in zip(self.dense, self.experts, chosen, strict=True):
            x = dense(x)
            for number in numbers:
                x = x + experts[number](x)
        return x


def test_experts_learn_a_frequency() -> None:
    """Expert 0 of every layer is chosen nine times in ten, another one at random: what is likely is read ahead."""
    torch.manual_seed(0)
    choices = random.Random(0)
    model = Experts()
    twin = copy.deepcopy(model)
    x = torch.ones(2, 512)

    def run(times: int = 1) -> None:
        for _ in range(times):
            run_once()

    def run_once() -> None:
        chosen = [[0 if choices.random() < 0.9 else 7, choices.randint(1, 6)] for _ in range(4)]
        assert torch.equal(model(x, chosen), twin(x, chosen))

    with tp.page(model, BUDGET) as pager, torch.no_grad():
        with pytest.warns(UserWarning, match="took other steps"):
            run(64)
        schedule = pager._director.schedule
        assert schedule is not None
        planned = {pager._core.set_name(int(number)) for number in schedule.step_set}
        assert planned == {f"dense.{layer}" for layer in range(4)} | {f"experts.{layer}.0" for layer in range(4)}
        before = pager.stats()
        run()
        after = pager.stats()
        assert after["expected_plans"] >= 1
        # What was planned and is used comes from the schedule; only the other experts, one a layer or two, do not.
        assert after["off_schedule_acquires"] - before["off_schedule_acquires"] <= 8
        assert after["resident_bytes_max"] <= BUDGET


def test_the_shapes_of_the_arguments_tell_which_pass_comes() -> None:
    torch.manual_seed(0)
    model = Branching()
    first, second = tuple(range(6)), tuple(range(6, 12))
    with tp.page(model, BUDGET) as pager, torch.no_grad():
        for _ in range(2):
            model(torch.ones(2, 512), first)
            model(torch.ones(3, 512), second)
        before = pager.stats()["mispredicted_passes"]
        for _ in range(4):
            model(torch.ones(2, 512), first)
            model(torch.ones(3, 512), second)
        assert pager.stats()["mispredicted_passes"] == before
