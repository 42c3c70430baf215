# SPDX-License-Identifier: Apache-2.0
"""Passes that are not the ones planned for: other orders, experts, other shapes."""

from __future__ import annotations

import copy
import random

import pytest
import torch

import tensorpager as tp
from tensorpager.passes import PASS_PLANS_MAX
from torch_models import BUDGET, MIB


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
    with tp.page(model, budget=BUDGET) as pager, torch.no_grad():

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

    with tp.page(model, budget=BUDGET) as pager, torch.no_grad():
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
    with tp.page(model, budget=BUDGET) as pager, torch.no_grad():
        for _ in range(2):
            model(torch.ones(2, 512), first)
            model(torch.ones(3, 512), second)
        before = pager.stats()["mispredicted_passes"]
        for _ in range(4):
            model(torch.ones(2, 512), first)
            model(torch.ones(3, 512), second)
        assert pager.stats()["mispredicted_passes"] == before


class Deciding(torch.nn.Module):
    """A trunk, then one of three branches, or none and the head at once, by what the data are."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = torch.nn.ModuleList(torch.nn.Linear(1024, 1024) for _ in range(3))
        self.branches = torch.nn.ModuleList(
            torch.nn.ModuleList(torch.nn.Linear(1024, 1024) for _ in range(4)) for _ in range(3)
        )
        self.head = torch.nn.Linear(1024, 1024)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        choice = int(x[0, 0])
        for layer in self.trunk:
            x = torch.relu(layer(x))
        for layer in self.branches[choice] if choice < len(self.branches) else ():
            x = torch.relu(layer(x))
        return self.head(x)


def choosing(choice: int) -> torch.Tensor:
    x = torch.linspace(-1, 1, 2 * 1024).reshape(2, 1024)
    x[0, 0] = choice
    return x


@pytest.mark.parametrize("budget", [16 * MIB, 40 * MIB], ids=["streamed", "kept"])
def test_a_pass_goes_on_with_the_known_one_that_began_like_it(budget: int) -> None:
    """Shapes tell nothing here. Once all are known, only the step at which a pass parts from the last is a surprise."""
    torch.manual_seed(0)
    model = Deciding()
    twin = copy.deepcopy(model)
    choices = random.Random(1)
    with tp.page(model, budget=budget) as pager, torch.no_grad():
        keys = {}
        for choice in (0, 1, 2, 3):
            assert torch.equal(model(choosing(choice)), twin(choosing(choice)))
            events = pager._director.events
            assert events is not None
            keys[choice] = events.tobytes()
        assert pager.stats()["plans"] == len(set(keys.values())) == 4
        last, changes = 3, 0
        before = pager.stats()
        for _ in range(40):
            choice = choices.randint(0, 3)
            assert torch.equal(model(choosing(choice)), twin(choosing(choice)))
            events, schedule = pager._director.events, pager._director.schedule
            assert events is not None
            assert schedule is not None
            assert events.tobytes() == keys[choice]
            assert pager.stats()["schedule"]["steps"] == len(schedule.step_set) == (4 if choice == 3 else 8)
            changes += choice != last
            last = choice
        after = pager.stats()
        step_pages_max = after["schedule"]["largest_step_pages"]
    assert changes > 20
    assert after["schedule_switches"] - before["schedule_switches"] == changes
    for count in ("mispredicted_passes", "off_schedule_acquires", "schedule_jumps", "plans", "expected_plans"):
        assert after[count] == before[count], count
    assert after["faults"] - before["faults"] <= changes * step_pages_max
    assert after["resident_bytes_max"] <= budget


def test_a_pass_that_only_began_like_a_known_one_is_mispredicted_and_changes_nothing() -> None:
    torch.manual_seed(0)
    model = Branching()
    twin = copy.deepcopy(model)
    x = torch.ones(2, 512)
    known = [(*range(4), first, *range(4, 12)) for first in range(4, 12)]
    with tp.page(model, budget=BUDGET) as pager, torch.no_grad():
        for order in known:
            model(x, order)
        assert pager.stats()["plans"] == len(known) == PASS_PLANS_MAX
        model(x, (0, 2, 1))  # the first of those without a plan: what they have in common is planned for, once
        for _ in range(2):
            model(x, known[0])
        followed = pager._director.events
        before = pager.stats()
        other = (0, 1, 2, 3, 7, 0, 0)  # parts from the first for the fourth, and then from all of them
        assert torch.equal(model(x, other), twin(x, other))
        after = pager.stats()
        assert after["schedule_switches"] - before["schedule_switches"] == 1
        assert after["mispredicted_passes"] - before["mispredicted_passes"] == 1
        assert pager._director.events is not None
        assert followed is not None
        assert pager._director.events.tobytes() == followed.tobytes()
        pager.reset_stats()
        model(x, known[0])
        for count in ("schedule_switches", "off_schedule_acquires", "schedule_jumps"):
            assert pager.stats()[count] == 0, count
