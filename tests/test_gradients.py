# SPDX-License-Identifier: Apache-2.0
"""Clipping without a look at the gradients: the same bits, and no transfer of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch

import tensorpager as tp
from tensorpager.gradients import Factor
from tensorpager.paged_tensor import PagedTensor

Both = tuple[torch.nn.Sequential, torch.nn.Sequential, tp.Pager]
WIDTH, LAYERS = 1024, 8


@pytest.fixture
def both() -> Iterator[Both]:
    """A model of 32 MiB with half of its gradients' and weights' 64 MiB as budget, and its twin."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    twin = copy.deepcopy(net)
    with tp.page(net, torch.optim.SGD(net.parameters(), lr=0.1), budget="32MiB") as pager:
        for _ in range(2):  # the second knows that norms are asked for
            backward(net)
            clip(net)
            assert pager._training is not None
            pager._training._norms.step_done()
        backward(net)
        backward(twin)
        yield net, twin, pager


def backward(model: torch.nn.Module, scale: float = 1e4) -> None:
    model.zero_grad()
    (scale * model(torch.ones(2, WIDTH)).square().sum()).backward()


def clip(model: torch.nn.Module, norm_max: float = 1.0) -> torch.Tensor:
    return torch.nn.utils.clip_grad_norm_(model.parameters(), norm_max)


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def factors(model: torch.nn.Module) -> int:
    found = 0
    for gradient in gradients(model):
        assert type(gradient) is PagedTensor
        assert gradient._tp_backing is not None
        found += isinstance(gradient._tp_backing.update, Factor)
    return found


def test_clipping_moves_no_page_and_gives_the_same_bits(both: Both) -> None:
    net, twin, pager = both
    before = pager.stats()
    assert torch.equal(clip(net), clip(twin))
    after = pager.stats()
    assert (after["page_ins"], after["page_accesses"]) == (before["page_ins"], before["page_accesses"])
    assert factors(net) == LAYERS
    assert all(map(torch.equal, gradients(net), gradients(twin)))
    assert factors(net) == 0


def test_what_is_short_enough_is_not_multiplied(both: Both) -> None:
    net, twin, _ = both
    assert torch.equal(clip(net, 1e30), clip(twin, 1e30))
    assert factors(net) == 0
    assert all(map(torch.equal, gradients(net), gradients(twin)))


CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "added to": lambda gradient: gradient.add_(1),
    "multiplied": lambda gradient: gradient.mul_(2.5),
    "by a tensor": lambda gradient: gradient.mul_(torch.full((WIDTH, WIDTH), 0.3)),
    "by an integer": lambda gradient: gradient.mul_(3),
    "in part": lambda gradient: gradient[3:5].zero_(),
    "in part, by a number": lambda gradient: gradient[3:5].mul_(0.25),
    "by way of an alias": lambda gradient: gradient.detach().clamp_(max=0.1),
    "of data": lambda gradient: gradient.data.mul_(torch.tensor(0.7)),
    "divided": lambda gradient: torch.div(gradient, 7, out=gradient),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("first", ["norm", "change"])
def test_norms_are_of_what_gradients_are_now(both: Both, change: str, first: str) -> None:
    for model in both[:2]:
        if first == "norm":
            clip(model)
        with torch.no_grad():
            for gradient in gradients(model):
                CHANGES[change](gradient)
    net, twin, _ = both
    assert torch.equal(clip(net), clip(twin))
    assert torch.equal(clip(net), clip(twin))
    assert all(map(torch.equal, gradients(net), gradients(twin)))


def test_norms_of_accumulated_gradients(both: Both) -> None:
    net, twin, _ = both
    for model in (net, twin):
        model(torch.full((2, WIDTH), 0.5)).square().sum().backward()
    assert torch.equal(clip(net), clip(twin))
    for model in (net, twin):
        model(torch.full((2, WIDTH), 0.1)).square().sum().backward()  # onto what is still to be multiplied
    assert torch.equal(clip(net), clip(twin))
    assert all(map(torch.equal, gradients(net), gradients(twin)))


def test_other_norms_are_computed(both: Both) -> None:
    net, twin, _ = both
    for order in (1.0, float("inf"), 3.0):
        assert torch.equal(
            torch.nn.utils.get_total_norm(gradients(net), order), torch.nn.utils.get_total_norm(gradients(twin), order)
        )
    for model in (net, twin):
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
    assert torch.equal(clip(net), clip(twin))


def test_a_norm_that_is_given_is_the_callers_own(both: Both) -> None:
    gradient, expected = gradients(both[0])[2], gradients(both[1])[2]
    torch.linalg.vector_norm(gradient, 2.0).zero_()
    assert torch.equal(torch.linalg.vector_norm(gradient, 2.0), torch.linalg.vector_norm(expected, 2.0))


def test_a_factor_that_is_changed_afterwards(both: Both) -> None:
    for model in both[:2]:
        factor = torch.tensor(0.5)
        for gradient in gradients(model):
            gradient.mul_(factor)
        factor.fill_(100)
    assert all(map(torch.equal, gradients(both[0]), gradients(both[1])))


def test_no_norm_is_computed_that_nobody_asks_for(both: Both) -> None:
    net, _, pager = both
    training = pager._training
    assert training is not None
    assert training._norms.wanted
    training._norms.step_done()
    training._norms.step_done()
    backward(net)
    assert not training._norms.wanted
    backing = gradients(net)[0]._tp_backing  # type: ignore[attr-defined]
    assert backing.gradient.norm_of(gradients(net)[0]) is None


def test_a_gradient_with_a_factor_is_given_back(both: Both) -> None:
    """Nothing that waits keeps the pages: they are discarded when the last reference is gone."""
    net, _, pager = both
    clip(net)
    assert factors(net) == LAYERS
    training = pager._training
    assert training is not None
    before = len(list(training.places.free()))
    net.zero_grad()
    assert len(list(training.places.free())) == before + LAYERS
