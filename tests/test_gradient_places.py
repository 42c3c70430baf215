# SPDX-License-Identifier: Apache-2.0
"""Gradients that don't fit into memory: in spill, part by part, and never a plain one of their size."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tensorpager as tp
from paged_weights import counted, in_spill, make_core, plain_alias
from tensorpager._core import Pager as Core
from tensorpager.gradient_places import make_gradient, restore_paged_gradient
from tensorpager.linear_op import linear
from tensorpager.paged_tensor import PagedTensor, no_guard
from tensorpager.places import anonymous_bytes
from tensorpager.streaming import row_tiles
from torch_models import MIB

ROWS, COLUMNS = 8192, 1024  # 32 MiB


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    """24 MiB."""
    core = make_core(tmp_path)
    yield core
    core.close()


def fill_with_numbers(part: torch.Tensor, begin: int, end: int) -> None:
    part.copy_(torch.arange(begin, end, dtype=part.dtype).unsqueeze(1).expand_as(part))


def test_one_that_can_be_held_is_plain_and_made_at_once(core: Core) -> None:
    weight = in_spill(core, torch.zeros(64, 32))
    with no_guard():
        gradient = make_gradient(weight, row_tiles, fill_with_numbers)
        ordinary = make_gradient(torch.zeros(64, 32), row_tiles, fill_with_numbers)
        of_an_alias = make_gradient(plain_alias(weight), row_tiles, fill_with_numbers)
    assert type(gradient) is type(ordinary) is type(of_an_alias) is torch.Tensor
    assert torch.equal(gradient, torch.arange(64.0).unsqueeze(1).expand(64, 32))
    assert torch.equal(gradient, ordinary)


def test_one_that_can_t_is_written_to_spill_and_read_from_nowhere(core: Core) -> None:
    weight = in_spill(core, torch.zeros(ROWS, COLUMNS), requires_grad=True)
    widths = []

    def fill(part: torch.Tensor, begin: int, end: int) -> None:
        widths.append(end - begin)
        fill_with_numbers(part, begin, end)

    for _ in range(2):  # the second time at the place of the first
        with counted(core) as counts, no_guard():
            gradient = make_gradient(weight, row_tiles, fill)
        assert counts.bytes_read == 0
        assert type(gradient) is PagedTensor
        assert core.contains(gradient.data_ptr())
        assert torch.equal(gradient[:, 5], torch.arange(float(ROWS)))
        assert sum(widths) == ROWS
        widths.clear()
        places = weight._tp_backing.places
        del gradient
        assert len(list(places.free())) == 1
    assert max(widths, default=0) * COLUMNS * 4 <= core.budget_bytes // 8


def test_autograd_takes_it_over_as_it_is(core: Core) -> None:
    weight = in_spill(core, torch.zeros(ROWS, COLUMNS), requires_grad=True)
    x = torch.randn(2, COLUMNS)
    place = None
    for _ in range(2):
        linear(x, weight).sum().backward()
        assert type(weight.grad) is PagedTensor
        assert core.contains(weight.grad.data_ptr())
        assert torch.allclose(weight.grad[[0, ROWS - 1]], x.sum(0).expand(2, COLUMNS), atol=1e-5)
        assert place in (None, weight.grad.data_ptr())  # the same pages, step for step
        place = weight.grad.data_ptr()
        weight.grad = None
    assert torch.autograd.grad(linear(x, weight).sum(), weight)[0].shape == weight.shape


def test_accumulation_adds_in_place(core: Core) -> None:
    weight = in_spill(core, torch.zeros(ROWS, COLUMNS), requires_grad=True)
    twin = torch.zeros(ROWS, COLUMNS, requires_grad=True)
    first = None
    for seed in range(3):
        x = torch.randn(2, COLUMNS, generator=torch.Generator().manual_seed(seed))
        linear(x, weight).sum().backward()
        torch.nn.functional.linear(x, twin).sum().backward()
        assert type(weight.grad) is PagedTensor
        assert first in (None, weight.grad.data_ptr())
        first = weight.grad.data_ptr()
    assert torch.equal(weight.grad, twin.grad)


def test_a_weight_that_is_used_twice_in_a_graph(core: Core) -> None:
    weight = in_spill(core, torch.zeros(ROWS, COLUMNS), requires_grad=True)
    twin = torch.zeros(ROWS, COLUMNS, requires_grad=True)
    x = torch.randn(2, COLUMNS)
    (linear(x, weight).sum() + linear(2 * x, weight).sum()).backward()
    (torch.nn.functional.linear(x, twin).sum() + torch.nn.functional.linear(2 * x, twin).sum()).backward()
    assert torch.equal(weight.grad, twin.grad)


def test_no_plain_gradient_is_ever_in_memory(core: Core) -> None:
    weight = in_spill(core, torch.zeros(2 * ROWS, COLUMNS), requires_grad=True)  # 64 MiB
    x = torch.randn(2, COLUMNS)
    linear(x, weight).sum().backward()
    weight.grad = None
    peaks = []
    hook = weight.register_post_accumulate_grad_hook(lambda _: peaks.append(anonymous_bytes()))
    before = anonymous_bytes()
    for _ in range(2):
        linear(x, weight).sum().backward()
    hook.remove()
    assert max(peaks) - before <= 24 * MIB


def test_only_a_plain_tensor_over_its_own_pages_is_replaced(core: Core) -> None:
    weight = in_spill(core, torch.zeros(64, 32), requires_grad=True)
    restore_paged_gradient(weight)  # no place was ever made
    restore_paged_gradient(torch.zeros(3, requires_grad=True))
    large = in_spill(core, torch.zeros(ROWS, COLUMNS), requires_grad=True)
    linear(torch.randn(2, COLUMNS), large).sum().backward()
    ordinary = torch.zeros(ROWS, 1).expand(ROWS, COLUMNS)
    with no_guard():
        large.grad = ordinary
        restore_paged_gradient(large)
        assert large.grad is ordinary
        large.grad = torch.zeros(ROWS, COLUMNS).to_sparse()
        restore_paged_gradient(large)
        assert large.grad.is_sparse


# -- trained with an optimizer


def make_model() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 10240), torch.nn.ReLU(), torch.nn.Linear(10240, 8))
    return model, copy.deepcopy(model)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(seed))
    for part in x.split(2):
        model(part).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("store", [False, True])
def test_training_a_weight_larger_than_the_budget_is_exact(tmp_path: Path, store: bool) -> None:
    """The first layer's input needs no gradient, so nothing is a sum over tiles, and all bits are the same."""
    model, twin = make_model()
    assert model[0].weight.nbytes > 8 * MIB
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (model, twin)]
    options: dict[str, Any] = {"store": tmp_path / "run"} if store else {}
    with tp.page(model, optimizers[0], budget=16 * MIB, **options) as pager:
        for seed in range(2):
            step(model, optimizers[0], seed)
            step(twin, optimizers[1], seed)
        if store:
            model(torch.ones(1, 256)).sum().backward()
            twin(torch.ones(1, 256)).sum().backward()
            pager.commit(3)
        assert all(map(torch.equal, model.parameters(), twin.parameters()))
        assert pager.stats()["resident_bytes_max"] <= 16 * MIB
    if store:
        again, _ = make_model()
        optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
        with tp.resume(tmp_path / "run", again, optimizer, budget=16 * MIB) as pager:
            assert pager.state == 3
            assert torch.equal(again[0].weight.grad, twin[0].weight.grad)
            optimizer.zero_grad()
            optimizers[1].zero_grad()
            step(again, optimizer, 3)
            step(twin, optimizers[1], 3)
            assert all(map(torch.equal, again.parameters(), twin.parameters()))
