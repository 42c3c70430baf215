# SPDX-License-Identifier: Apache-2.0
"""Updates that wait for the next use: nobody sees a weight that is behind, whichever way it is looked at."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tensorpager as tp
from tensorpager.paged_tensor import PagedTensor
from torch_models import Net, make_net, some_ids

Both = tuple[Net, torch.optim.Optimizer, Net, torch.optim.Optimizer, tp.Pager]


def make_adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int = 0) -> torch.Tensor:
    optimizer.zero_grad()
    loss: torch.Tensor = model(some_ids() + number).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.fixture
def both() -> Iterator[Both]:
    """A paged net and its twin, each a step further; the paged one's updates wait."""
    net, twin = make_net(depth=2)
    optimizer, twin_optimizer = make_adamw(net), make_adamw(twin)
    with tp.page(net, optimizer, budget="40MiB") as pager:
        for model, its in ((net, optimizer), (twin, twin_optimizer)):
            step(model, its)
            step(model, its, 1)
        assert waiting(pager)
        yield net, optimizer, twin, twin_optimizer, pager


def waiting(pager: tp.Pager) -> bool:
    assert pager._training is not None
    return pager._training.updates.any_wait


def assert_same(net: Net, twin: Net) -> None:
    for (name, parameter), expected in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, expected), name


LOOKS: dict[str, Callable[[Any], Any]] = {
    "operation": lambda p: p + 0,
    "view": lambda p: p[1:, ::2].clone(),
    "numpy": lambda p: torch.from_numpy(p.detach().numpy().copy()),
    "deepcopy": copy.deepcopy,
    "dlpack": lambda p: torch.from_dlpack(p.detach()),
    "text": str,
    "list": lambda p: p[0].tolist(),
    "sum": lambda p: p.sum().item(),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_at_a_weight_shows_the_new_one(both: Both, look: str) -> None:
    net, _, twin, _, _ = both
    seen, expected = (LOOKS[look](model.blocks[1].up.weight) for model in (net, twin))
    if isinstance(seen, torch.Tensor):
        assert torch.equal(seen, expected)
    else:
        assert str(seen).replace("PagedTensor", "") == str(expected)


def test_what_was_taken_before_the_step_shows_it_too() -> None:
    net, twin = make_net(depth=2)
    optimizer, twin_optimizer = make_adamw(net), make_adamw(twin)
    with tp.page(net, optimizer, budget="40MiB") as pager:
        alias, view = net.blocks[0].up.weight.detach(), net.blocks[0].down.weight.data[3:5]
        state = net.state_dict()
        step(net, optimizer)
        step(twin, twin_optimizer)
        assert waiting(pager)
        assert torch.equal(alias, twin.blocks[0].up.weight)
        assert torch.equal(view, twin.blocks[0].down.weight[3:5])
        assert all(map(torch.equal, state.values(), twin.state_dict().values()))


def test_an_address_is_of_the_new_weight(both: Both) -> None:
    net, _, twin, _, pager = both
    weight = net.blocks[0].up.weight
    address, before = weight.data_ptr(), weight._version
    assert twin.blocks[0].up.weight.data_ptr() != address
    found = torch.frombuffer(bytearray(4), dtype=torch.float32)
    with torch._C.DisableTorchFunctionSubclass():  # a raw look, past the guard
        found = weight.detach().clone()
    assert torch.equal(found, twin.blocks[0].up.weight)
    assert weight._version == before
    assert waiting(pager)  # those of other modules


def test_optimizer_state_is_that_of_the_step(both: Both) -> None:
    net, optimizer, twin, twin_optimizer, pager = both
    moments = optimizer.state[net.embed.weight]["exp_avg"]
    assert torch.equal(moments, twin_optimizer.state[twin.embed.weight]["exp_avg"])
    assert not waiting(pager)
    step(net, optimizer, 2)
    step(twin, twin_optimizer, 2)
    seen, expected = optimizer.state_dict()["state"], twin_optimizer.state_dict()["state"]
    assert seen.keys() == expected.keys()
    for number, values in expected.items():
        assert all(torch.equal(seen[number][key], value) for key, value in values.items())


def test_options_are_those_of_the_step(both: Both) -> None:
    """A scheduler changes the learning rate behind step(); a tensor is changed in place."""
    net, optimizer, twin, twin_optimizer, _ = both
    for model, its in ((net, optimizer), (twin, twin_optimizer)):
        its.param_groups[0]["lr"] = torch.tensor(0.02)
        step(model, its, 2)
        its.param_groups[0]["lr"].fill_(0.5)
        its.param_groups[0]["weight_decay"] = 0.7
        its.param_groups[0]["betas"] = (0.1, 0.2)
    assert_same(net, twin)


def test_gradients_are_those_of_the_step() -> None:
    """What becomes of them behind step() is nothing to the update: set to zero, multiplied, replaced, gone."""
    net, twin = make_net(depth=2)
    optimizer, twin_optimizer = make_adamw(net), make_adamw(twin)
    with tp.page(net, optimizer, budget="40MiB"):
        for number in range(4):
            for model, its in ((net, optimizer), (twin, twin_optimizer)):
                model(some_ids() + number).square().mean().backward()
                its.step()
                if number == 0:
                    its.zero_grad(set_to_none=False)
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    if number == 1:
                        parameter.grad.mul_(3)
                    elif number == 2:
                        parameter.grad = torch.ones_like(parameter)
                    elif number == 3:
                        parameter.grad = None
            assert_same(net, twin)


def test_steps_without_a_forward_between_them(both: Both) -> None:
    net, optimizer, twin, twin_optimizer, _ = both
    for its in (optimizer, twin_optimizer):
        for _ in range(3):
            its.step()
    assert_same(net, twin)


@pytest.mark.parametrize("mode", ["inference", "autocast", "no_grad"])
def test_a_forward_of_another_kind_comes_first(both: Both, mode: str) -> None:
    net, optimizer, twin, twin_optimizer, _ = both
    modes: dict[str, Any] = {"inference": torch.inference_mode, "no_grad": torch.no_grad}
    for model, its in ((net, optimizer), (twin, twin_optimizer)):
        with torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else modes[mode]():
            model(some_ids())
        assert not any(value.is_inference() for values in its.state.values() for value in values.values())
    assert_same(net, twin)
    assert torch.equal(step(net, optimizer, 3), step(twin, twin_optimizer, 3))


def test_an_average_of_weights_is_of_the_new_ones(both: Both) -> None:
    net, optimizer, twin, twin_optimizer, _ = both
    averages = []
    for model, its in ((net, optimizer), (twin, twin_optimizer)):
        average = torch.optim.swa_utils.AveragedModel(copy.deepcopy(model))
        for number in range(2, 4):
            step(model, its, number)
            average.update_parameters(model)
        averages.append(average)
    assert all(map(torch.equal, averages[0].parameters(), averages[1].parameters()))


def test_a_graph_that_is_older_than_the_step_is_refused_as_ever(both: Both) -> None:
    for model, its in ((both[0], both[1]), (both[2], both[3])):
        loss = model(some_ids()).square().mean()
        loss.backward(retain_graph=True)
        its.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    assert_same(both[0], both[2])


def test_an_old_graph_that_saved_no_weight_goes_on() -> None:
    """The gradient that the update waits with must not be the one that is added to."""
    torch.manual_seed(0)
    net = torch.nn.Linear(1024, 1024)
    twin = copy.deepcopy(net)
    optimizer, twin_optimizer = make_adamw(net), make_adamw(twin)
    with tp.page(net, optimizer, budget="40MiB") as pager:
        for model, its in ((net, optimizer), (twin, twin_optimizer)):
            loss = model(torch.ones(4, 1024)).square().sum()
            loss.backward(retain_graph=True)
            its.step()
            assert model is twin or waiting(pager)
            loss.backward()
            its.step()
        assert all(map(torch.equal, net.parameters(), twin.parameters()))


def test_modules_that_run_without_the_guard() -> None:
    """Attention takes its fused kernel in evaluation, and looks at its projections' weights by itself."""
    torch.manual_seed(0)
    net = torch.nn.TransformerEncoderLayer(512, 4, batch_first=True)
    twin = copy.deepcopy(net)
    x = torch.randn(2, 8, 512, generator=torch.Generator().manual_seed(1))
    optimizer, twin_optimizer = make_adamw(net), make_adamw(twin)
    with tp.page(net, optimizer, budget="24MiB"):
        for model, its in ((net, optimizer), (twin, twin_optimizer)):
            torch.manual_seed(2)
            model.train()(x).square().mean().backward()
            its.step()
        with torch.no_grad():
            assert torch.equal(net.eval()(x), twin.eval()(x))


def test_state_is_loaded_over_what_waits(both: Both) -> None:
    net, optimizer, twin, twin_optimizer, pager = both
    for model, its in ((net, optimizer), (twin, twin_optimizer)):
        saved = copy.deepcopy(its.state_dict())
        step(model, its, 2)
        its.load_state_dict(saved)
        step(model, its, 3)
        its.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert_same(net, twin)
    assert not waiting(pager)


def test_hooks_behind_a_step_see_what_it_did(both: Both) -> None:
    net, optimizer, _, _, pager = both
    seen: list[bool] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(waiting(pager)))
    step(net, optimizer, 2)
    assert seen == [False]


def test_two_optimizers_share_a_module() -> None:
    net, twin = make_net(depth=2)
    both = []
    for model in (net, twin):
        weights = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() == 1]
        both.append([torch.optim.AdamW(weights, lr=1e-2), torch.optim.SGD(others, lr=0.1, momentum=0.9)])
    with tp.page(net, both[0], budget="40MiB"):
        for number in range(3):
            for model, optimizers in zip((net, twin), both, strict=True):
                model(some_ids() + number).square().mean().backward()
                for its in optimizers:
                    its.step()
                    its.zero_grad()
        assert_same(net, twin)


def test_a_commit_has_what_waited(tmp_path: Path) -> None:
    net, twin = make_net(depth=2)
    optimizer, twin_optimizer = make_adamw(net), make_adamw(twin)
    with tp.page(net, optimizer, budget="40MiB", store=tmp_path / "store") as pager:
        step(net, optimizer)
        assert waiting(pager)
        pager.commit()
        assert not waiting(pager)
        step(net, optimizer, 1)  # lost
        assert waiting(pager)
    assert not waiting(pager)
    step(twin, twin_optimizer)
    net, _ = make_net(depth=2)
    optimizer = make_adamw(net)
    with tp.resume(tmp_path / "store", net, optimizer, budget="40MiB"):
        assert_same(net, twin)


class Failing:
    """A core whose next acquires fail."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.failures = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def acquire(self, set_id: int) -> None:
        if self.failures > 0:
            self.failures -= 1
            msg = "injected"
            raise tp.IoError(5, msg)
        self._core.acquire(set_id)


def test_an_update_whose_pages_can_not_be_read_waits_on(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    net, _, twin, _, pager = both
    core = Failing(pager._core)
    monkeypatch.setattr(pager._training, "_core", core)
    core.failures = 2
    for _ in range(2):
        with pytest.raises(tp.IoError, match="injected"):
            net(some_ids())
    assert waiting(pager)
    assert torch.equal(net(some_ids()), twin(some_ids()))


def test_waiting_moves_fewer_pages() -> None:
    """The weight that an update leaves is used at once, so it need not come in once more."""
    moved = {}
    for may_wait in (True, False):
        torch.manual_seed(0)
        net = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(12)))
        optimizer = make_adamw(net)
        x = torch.ones(2, 1024)
        with tp.page(net, optimizer, budget="48MiB") as pager:
            pager.updates_wait = may_wait
            for number in range(8):
                if number == 4:
                    pager.reset_stats()
                optimizer.zero_grad()
                net(x).square().mean().backward()
                optimizer.step()
            stats = pager.stats()
            moved[may_wait] = stats["page_ins"] - stats["zero_fills"] + stats["writebacks"]
            assert type(net[0].weight.grad) is PagedTensor
    assert moved[True] <= 0.93 * moved[False]


def test_it_can_be_switched_off(both: Both) -> None:
    net, optimizer, twin, twin_optimizer, pager = both
    pager.updates_wait = False
    assert not waiting(pager)
    step(net, optimizer, 2)
    step(twin, twin_optimizer, 2)
    assert not waiting(pager)
    assert_same(net, twin)
    with tp.page(torch.nn.Linear(8, 8), budget="16MiB") as without, pytest.raises(tp.PagedTensorError, match="trained"):
        without.updates_wait = False
