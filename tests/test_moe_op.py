# SPDX-License-Identifier: Apache-2.0
"""moe_linear: a loop over the experts that have rows, bit for bit, for the pages of these."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.library import opcheck

import tensorpager as tp
from paged_weights import PAGE_BYTES, counted, evict_all, in_file, in_spill, make_core, plain_alias
from tensorpager import compute_ops
from tensorpager._core import Pager as Core
from tensorpager.moe_op import moe_linear, moe_linear_grad_input, moe_linear_grad_weight
from tensorpager.paged_tensor import PagedTensor, span_of
from torch_models import MIB

EXPERTS, OUT, IN = 8, 1000, 768  # 2.9 MiB each, so they share pages with their neighbours


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    """24 MiB, of which steps may hold 16."""
    core = make_core(tmp_path)
    yield core
    core.close()


@pytest.fixture(scope="module")
def values() -> torch.Tensor:
    return torch.randn(EXPERTS, OUT, IN, generator=torch.Generator().manual_seed(0))


def loop(x: torch.Tensor, weight: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """The plain one."""
    result = x.new_zeros((x.shape[0], weight.shape[1]))
    for expert in range(weight.shape[0]):
        (rows,) = torch.where(expert_ids == expert)
        if len(rows) > 0:
            result = result.index_put((rows,), torch.nn.functional.linear(x[rows], weight[expert]))
    return result


def routes(count: int, seed: int = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(EXPERTS, (count,), generator=torch.Generator().manual_seed(seed)).to(dtype)


def pages_named(core: Core, weight: torch.Tensor, expert_ids: torch.Tensor) -> set[int]:
    address, size_bytes = span_of(weight)
    each = size_bytes // EXPERTS
    pages: set[int] = set()
    for expert in set(expert_ids.tolist()) - {EXPERTS}:
        begin = address + expert * each
        pages |= set(range(begin // core.page_bytes, (begin + each - 1) // core.page_bytes + 1))
    return pages


def test_it_is_an_operator_of_torch() -> None:
    assert torch.ops.tensorpager.moe_linear is moe_linear is compute_ops.moe_linear


@pytest.mark.parametrize(
    ("dtype", "count"),
    [(torch.float32, 1), (torch.float32, 5), (torch.float32, 40), (torch.bfloat16, 5), (torch.float64, 3)],
    ids=str,
)
def test_the_bits_are_those_of_a_loop(core: Core, values: torch.Tensor, dtype: torch.dtype, count: int) -> None:
    weight = values.to(dtype)
    paged = in_spill(core, weight)
    x = torch.randn(count, IN).to(dtype)
    for expert_ids in (routes(count), routes(count, 1, torch.int32), routes(count, 2).sort().values):
        assert torch.equal(moe_linear(x, paged, expert_ids), loop(x, weight, expert_ids))
        assert torch.equal(moe_linear(x, weight, expert_ids), loop(x, weight, expert_ids))
        strided = torch.randn(IN, count).to(dtype).t()
        assert torch.equal(moe_linear(strided, paged, expert_ids), loop(strided, weight, expert_ids))


@pytest.mark.parametrize("experts", [[3], [7, 0], [2, 3, 4], list(range(8))], ids=str)
def test_the_pages_of_the_experts_are_read_and_no_others(
    core: Core, tmp_path: Path, values: torch.Tensor, experts: list[int]
) -> None:
    whole = torch.cat([values, torch.zeros(1, OUT, IN)])
    paged = in_file(core, tmp_path / "experts", whole)[:EXPERTS]
    expert_ids = torch.tensor(experts * 3)
    x = torch.randn(len(expert_ids), IN)
    evict_all(core)
    with counted(core) as counts:
        result = torch.ops.tensorpager.moe_linear(x, paged, expert_ids)
    assert torch.equal(result, loop(x, values, expert_ids))
    expected = pages_named(core, paged, expert_ids)
    assert counts.page_ins == len(expected)
    assert counts.bytes_read == len(expected) * PAGE_BYTES
    assert counts.touches == counts.acquires == 0


def test_rows_of_no_expert_are_zero_and_read_nothing(core: Core, values: torch.Tensor) -> None:
    paged = in_spill(core, values)
    x = torch.randn(4, IN)
    evict_all(core)
    with counted(core) as counts:
        assert torch.equal(moe_linear(x, paged, torch.full((4,), EXPERTS)), torch.zeros(4, OUT))
        assert moe_linear(x[:0], paged, torch.zeros(0, dtype=torch.int64)).shape == (0, OUT)
    assert counts.page_ins == 0
    mixed = torch.tensor([EXPERTS, 2, EXPERTS, 1])
    assert torch.equal(moe_linear(x, paged, mixed), loop(x, values, mixed))


def test_weights_with_the_other_dimension_first(core: Core, values: torch.Tensor) -> None:
    stored = values.transpose(1, 2).contiguous()
    paged = in_spill(core, stored)
    x, expert_ids = torch.randn(6, IN), torch.tensor([1, 1, 5, 1, 5, 1])
    evict_all(core)
    with counted(core) as counts:
        result = moe_linear(x, paged.transpose(1, 2), expert_ids)
    assert torch.equal(result, loop(x, stored.transpose(1, 2), expert_ids))
    assert torch.equal(result[expert_ids == 1], x[expert_ids == 1] @ stored[1])
    assert counts.page_ins == len(pages_named(core, paged, expert_ids))


def test_an_expert_larger_than_the_budget(core: Core) -> None:
    weight = torch.randn(2, 8192, 1024)
    paged = in_spill(core, weight)
    x, expert_ids = torch.randn(5, 1024), torch.tensor([1, 0, 1, 1, 1])
    assert torch.equal(moe_linear(x, paged, expert_ids), loop(x, weight, expert_ids))
    evict_all(core)
    with counted(core) as counts:
        moe_linear(x[:1], paged, expert_ids[:1])
    assert counts.page_ins == 16
    assert counts.touches == 0


def test_bad_arguments_are_refused_before_anything_is_read(core: Core, values: torch.Tensor) -> None:
    paged = in_spill(core, values)
    x, expert_ids = torch.randn(2, IN), torch.tensor([0, 1])
    evict_all(core)
    with counted(core) as counts:
        with pytest.raises(IndexError, match="expert 9 is out of range; there are 8"):
            moe_linear(x, paged, torch.tensor([0, 9]))
        with pytest.raises(IndexError, match="expert -1 is out of range"):
            moe_linear(x, paged, torch.tensor([0, -1]))
        for wrong in ((x[:, 1:], paged, expert_ids), (x, paged[0], expert_ids), (x, paged, expert_ids[:1])):
            with pytest.raises(ValueError, match="don't fit together; they are"):
                moe_linear(*wrong)
        with pytest.raises(ValueError, match="don't fit together"):
            moe_linear_grad_input(x, paged, expert_ids)
        with pytest.raises(TypeError, match=r"expert_ids are torch\.float32"):
            moe_linear(x, paged, expert_ids.float())
        with pytest.raises(TypeError, match=r"input is torch\.float64 and weight torch\.float32"):
            moe_linear(x.double(), paged, expert_ids)
        with pytest.raises(TypeError, match="dtype= converts floating-point numbers"):
            moe_linear(x, paged, expert_ids, torch.int32)
        with pytest.raises(ValueError, match="are on cpu, cpu and meta"):
            moe_linear(x, paged, expert_ids.to("meta"))
    assert counts.page_ins == 0


# -- backward


@pytest.mark.parametrize("experts", [EXPERTS, 2])  # 23 MiB, and 5.9 MiB, which can be held
def test_the_gradients(core: Core, values: torch.Tensor, experts: int) -> None:
    weight = values[:experts]
    paged, twin = in_spill(core, weight, requires_grad=True), weight.clone().requires_grad_()
    x = torch.randn(10, IN, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    expert_ids = torch.tensor([1, 0, 0, 1, experts, 1, 0, 1, 1, 0])
    gradient = torch.randn(10, OUT)
    moe_linear(x, paged, expert_ids).backward(gradient)
    loop(y, twin, expert_ids).backward(gradient)
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(paged.grad, twin.grad)
    assert (type(paged.grad) is PagedTensor) == (experts == EXPERTS)
    assert core.stats()["pinned_pages"] == 0
    assert core.stats()["resident_bytes_max"] <= core.budget_bytes


def test_backward_of_frozen_experts_reads_those_that_have_rows(core: Core, values: torch.Tensor) -> None:
    paged = in_spill(core, values)
    x, expert_ids = torch.randn(3, IN, requires_grad=True), torch.tensor([5, 2, 5])
    result = moe_linear(x, paged, expert_ids)
    evict_all(core)
    with counted(core) as counts:
        result.sum().backward()
    assert counts.page_ins == len(pages_named(core, paged, expert_ids))
    assert counts.touches == 0
    assert torch.allclose(x.grad, values.sum(1)[expert_ids], atol=1e-3)


def test_the_derivatives_of_the_derivatives() -> None:
    expert_ids = torch.tensor([1, 0, 2, 1, 3])
    x, weight, gradient = (
        torch.randn(shape, dtype=torch.complex128, requires_grad=True) for shape in ((5, 3), (3, 2, 3), (5, 2))
    )
    assert torch.autograd.gradcheck(lambda a, b: moe_linear(a, b, expert_ids), (x, weight))
    assert torch.autograd.gradgradcheck(lambda a, b: moe_linear(a, b, expert_ids), (x, weight))
    assert torch.autograd.gradcheck(lambda a, b: moe_linear_grad_input(a, b, expert_ids), (gradient, weight))
    assert torch.autograd.gradcheck(
        lambda a, b: moe_linear_grad_weight(a, b, weight.detach(), expert_ids), (gradient, x)
    )


# -- what torch makes of it


def test_torch_finds_nothing_wrong(core: Core, values: torch.Tensor) -> None:
    expert_ids = torch.tensor([1, 0, 0, 2, 1])
    x, gradient = torch.randn(5, 64, requires_grad=True), torch.randn(5, OUT, requires_grad=True)
    for weight in (torch.randn(3, OUT, 64), plain_alias(in_spill(core, values[:4, :, :64]))):
        cases: list[tuple[Any, tuple[Any, ...]]] = [
            (moe_linear.default, (x.detach(), weight, expert_ids, torch.bfloat16)),
            (moe_linear_grad_input.default, (gradient, weight, expert_ids)),
            (moe_linear_grad_weight.default, (gradient, x, weight, expert_ids)),
            (moe_linear.default, (x, weight.requires_grad_(), expert_ids)),
        ]
        for operator, arguments in cases:
            assert set(opcheck(operator, arguments).values()) == {"SUCCESS"}


def test_compiled_it_is_one_opaque_call(core: Core, values: torch.Tensor) -> None:
    alias = plain_alias(in_spill(core, values))
    x, expert_ids = torch.randn(3, IN), torch.tensor([5, 2, 5])
    compiled = torch.compile(lambda a, i: moe_linear(a * 2, alias, i) + 1, backend="aot_eager", fullgraph=True)
    evict_all(core)
    with counted(core) as counts:
        assert torch.equal(compiled(x, expert_ids), loop(x * 2, values, expert_ids) + 1)
    assert counts.page_ins == len(pages_named(core, alias, expert_ids))


def test_autocast_converts_what_is_brought_in(core: Core, values: torch.Tensor) -> None:
    paged = in_spill(core, values, requires_grad=True)
    x, expert_ids = torch.randn(3, IN, requires_grad=True), torch.tensor([5, 2, 5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = moe_linear(x, paged, expert_ids)
    assert torch.equal(result, loop(x.bfloat16(), values.bfloat16(), expert_ids))
    result.float().sum().backward()
    assert (x.grad.dtype, paged.grad.dtype) == (torch.float32, torch.float32)


# -- in a model


class Mixture(torch.nn.Module):
    """47 MiB of experts in two layers, and a router that anyone can foretell."""

    left_to_operators = ("up", "down")

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(IN, IN)
        self.up = torch.nn.Parameter(torch.randn(EXPERTS, OUT, IN) / 30)
        self.down = torch.nn.Parameter(torch.randn(EXPERTS, IN, OUT) / 30)

    def forward(self, x: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return x + moe_linear(torch.relu(moe_linear(x, self.up, expert_ids)), self.down, expert_ids)


def test_in_a_model_only_the_chosen_experts_are_read_whatever_is_scheduled() -> None:
    torch.manual_seed(0)
    model = Mixture()
    twin = copy.deepcopy(model)
    x = torch.randn(3, IN)
    with tp.page(model, budget=24 * MIB) as pager, torch.no_grad():
        core = pager._core
        for turn in range(5):
            expert_ids = torch.tensor([turn, 7 - turn, turn])
            expected = len(pages_named(core, model.up, expert_ids) | pages_named(core, model.down, expert_ids))
            before = pager.stats()["page_ins"]
            assert torch.equal(model(x, expert_ids), twin(x, expert_ids))
            first_pages = 3 if turn == 0 else 1  # of the layer, and what of it had to go
            assert pager.stats()["page_ins"] - before <= expected + first_pages
        stats = pager.stats()
        assert stats["trace_failure"] is None
        assert stats["mispredicted_passes"] == 0
        assert stats["schedule"]["steps"] == 1
        assert stats["touches"] == 0
        assert stats["resident_bytes_max"] <= 24 * MIB
