# SPDX-License-Identifier: Apache-2.0
"""embedding: the rows that are named, for the pages that hold them and no others."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.library import opcheck

import tensorpager as tp
from paged_weights import PAGE_BYTES, counted, evict_all, in_file, in_spill, make_core, pages_of, plain_alias
from tensorpager import compute_ops
from tensorpager._core import Pager as Core
from tensorpager.embedding_op import _parts, embedding, embedding_grad_weight
from tensorpager.paged_tensor import PagedTensor, no_guard, span_of
from tensorpager.streaming import Rows
from torch_models import MIB

plain_embedding = torch.nn.functional.embedding
ROWS, COLUMNS = 20480, 768  # 30 pages, and rows of 3 KiB that lie across their borders


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    """24 MiB, of which steps may hold 16."""
    core = make_core(tmp_path)
    yield core
    core.close()


@pytest.fixture(scope="module")
def values() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def pages_named(core: Core, table: torch.Tensor, indices: torch.Tensor) -> set[int]:
    """The pages that hold the rows, one by one."""
    address, size_bytes = span_of(table)
    row_bytes = size_bytes // table.shape[0]
    pages = set()
    for row in indices.flatten().tolist():
        begin = address + row * row_bytes
        pages |= set(range(begin // core.page_bytes, (begin + row_bytes - 1) // core.page_bytes + 1))
    return pages


def test_it_is_an_operator_of_torch() -> None:
    assert torch.ops.tensorpager.embedding is embedding is compute_ops.embedding


@pytest.mark.parametrize("count", [1, 3, 40, 2000])
def test_the_pages_of_the_rows_are_read_and_no_others(
    core: Core, tmp_path: Path, values: torch.Tensor, count: int
) -> None:
    table = in_file(core, tmp_path / "table", values)
    generator = torch.Generator().manual_seed(count)
    for shape in ((count,), (count, 2), ()):
        indices = torch.randint(ROWS, shape, generator=generator)
        expected = pages_named(core, table, indices)
        evict_all(core)
        with counted(core) as counts:
            result = torch.ops.tensorpager.embedding(indices, table)
        assert torch.equal(result, values[indices])
        assert counts.page_ins == len(expected)
        assert counts.bytes_read == len(expected) * PAGE_BYTES
        assert counts.touches == counts.acquires == 0


def test_rows_that_are_resident_are_not_read_again(core: Core, values: torch.Tensor) -> None:
    table = in_spill(core, values)
    indices = torch.tensor([[5, 6], [7, 10000]], dtype=torch.int32)
    evict_all(core)
    embedding(indices, table)
    with counted(core) as counts:
        assert torch.equal(embedding(indices, table), values[indices])
    assert counts.page_ins == 0


def test_more_than_the_budget_is_gone_through_in_parts(core: Core, values: torch.Tensor) -> None:
    table = in_spill(core, values)
    indices = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    evict_all(core)
    with counted(core) as counts:
        result = embedding(indices, table)
    assert torch.equal(result, values[indices])
    assert counts.page_ins == pages_of(core, table)  # each of them once, however the rows are mixed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int8, torch.complex64, torch.bool], ids=str)
def test_any_dtype(core: Core, dtype: torch.dtype) -> None:
    values = torch.randn(4000, 100).mul(50).to(dtype)
    indices = torch.randint(4000, (3, 5))
    assert torch.equal(embedding(indices, in_spill(core, values)), values[indices])


def test_any_strides(core: Core) -> None:
    values = torch.randn(512, 4096)
    indices = torch.tensor([4095, 0, 17])
    table = in_spill(core, values)
    assert torch.equal(embedding(indices, table.t()), values.t()[indices])
    assert torch.equal(embedding(indices[1:], table[::3]), values[::3][indices[1:]])
    one_row = table[17, 5:9].expand(4096, 4)
    assert torch.equal(embedding(indices.expand(2, 3).t(), one_row), values[17, 5:9].expand(3, 2, 4))


def test_a_row_may_be_larger_than_what_can_be_held(core: Core) -> None:
    values = torch.arange(3 * 6 * 2**20, dtype=torch.float32).view(3, 6 * 2**20)  # 24 MiB each
    indices = torch.tensor([2, 0, 2])
    assert torch.equal(embedding(indices, in_spill(core, values)), values[indices])
    assert core.stats()["pinned_pages"] == 0


def test_parts_have_few_pages_and_every_row_is_in_one() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        row_bytes, page_bytes = int(generator.integers(1, 300)), 100
        rows = Rows(int(generator.integers(0, 1000)), 10**6, row_bytes + int(generator.integers(0, 200)), row_bytes)
        named = np.unique(generator.integers(0, 5000, int(generator.integers(1, 60))))
        limit = int(generator.integers(1, 12))
        parts = _parts(rows, named, page_bytes, limit)
        assert parts[0][0][0] == 0
        assert parts[-1][0][1] == len(named)
        assert all(one[0][1] == other[0][0] for one, other in pairwise(parts))
        for (begin, end), pages in parts:
            needed = set()
            for row in named[begin:end].tolist():
                first = rows.first + row * rows.stride_bytes
                needed |= set(range(first // page_bytes, (first + row_bytes - 1) // page_bytes + 1))
            assert set(pages.tolist()) == needed
            assert len(pages) <= limit or end - begin == 1


def test_bad_arguments_are_refused_before_anything_is_read(core: Core, values: torch.Tensor) -> None:
    table = in_spill(core, values)
    evict_all(core)
    with counted(core) as counts:
        with pytest.raises(IndexError, match=r"index 20480 is out of range; the table has 20480 rows"):
            embedding(torch.tensor([3, ROWS]), table)
        with pytest.raises(IndexError, match="index -1 is out of range"):
            embedding(torch.tensor([3, -1]), table)
        with pytest.raises(IndexError):
            plain_embedding(torch.tensor([ROWS]), table)
        with pytest.raises(TypeError, match=r"indices are torch\.float32; they must be int32 or int64"):
            embedding(torch.tensor([1.0]), table)
        with pytest.raises(ValueError, match=r"weight \(768,\) must be \[rows, columns\]"):
            embedding(torch.tensor([1]), table[0])
        with pytest.raises(ValueError, match="padding_idx 20480 is none of the 20480 rows"):
            embedding(torch.tensor([1]), table, ROWS)
        with pytest.raises(ValueError, match="indices are on meta and weight on cpu"):
            embedding(torch.tensor([1], device="meta"), table)
    assert counts.page_ins == 0


def test_no_indices_read_nothing(core: Core, values: torch.Tensor) -> None:
    table = in_spill(core, values)
    evict_all(core)
    with counted(core) as counts:
        assert embedding(torch.zeros((2, 0), dtype=torch.int64), table).shape == (2, 0, COLUMNS)
    assert counts.page_ins == 0
    assert embedding(torch.tensor([1, 0]), torch.ones(2, 0)).shape == (2, 0)


# -- backward

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"padding_idx": 3},
    {"padding_idx": -1},
    {"scale_grad_by_freq": True},
    {"sparse": True},
    {"sparse": True, "padding_idx": 3},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("large", [False, True])
def test_the_gradient_is_torch_s(core: Core, options: dict[str, Any], large: bool) -> None:
    values = torch.randn(10000 if large else 50, 768)
    table, twin = in_spill(core, values, requires_grad=True), values.clone().requires_grad_()
    indices = torch.tensor([[3, 9, 3], [len(values) - 1, 0, 9]])
    gradient = torch.randn(2, 3, 768)
    embedding(indices, table, **options).backward(gradient)
    plain_embedding(indices, twin, **options).backward(gradient)
    with no_guard():
        made = table.grad
    if options.get("sparse"):
        assert made.is_sparse
        assert torch.equal(made.coalesce().values(), twin.grad.coalesce().values())
        assert torch.equal(made.coalesce().indices(), twin.grad.coalesce().indices())
    else:
        assert type(made) is (PagedTensor if large else torch.Tensor)
        assert torch.equal(made, twin.grad)
    assert core.stats()["pinned_pages"] == 0


def test_a_frozen_table_has_no_gradient_and_backward_reads_nothing(core: Core, values: torch.Tensor) -> None:
    table = in_spill(core, values)
    scale = torch.ones(COLUMNS, requires_grad=True)
    result = embedding(torch.tensor([3, 20479]), table) * scale
    with counted(core) as counts:
        result.sum().backward()
    assert table.grad is None
    assert counts.page_ins == 0


def test_the_table_may_change_before_backward(core: Core) -> None:
    table = in_spill(core, torch.randn(50, 8), requires_grad=True)
    result = embedding(torch.tensor([3]), table)
    with torch.no_grad():
        table.mul_(2)
    result.sum().backward()
    assert torch.equal(table.grad[3], torch.ones(8))


def test_the_derivatives_of_the_derivatives() -> None:
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[1, 2, 1], [4, 0, 2]])
    assert torch.autograd.gradcheck(lambda w: embedding(indices, w), (table,))
    assert torch.autograd.gradgradcheck(lambda w: embedding(indices, w.square()), (table,))
    found, expected = [
        torch.autograd.grad(
            torch.autograd.grad(call(indices, table, 2).pow(3).sum(), table, create_graph=True)[0].sum(), table
        )[0]
        for call in (embedding, plain_embedding)
    ]
    assert torch.equal(found, expected)
    gradient = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="scale_grad_by_freq"):
        embedding_grad_weight(gradient, indices, table.detach(), -1, True)


# -- what torch makes of it


def test_torch_finds_nothing_wrong(core: Core, values: torch.Tensor) -> None:
    for table in (torch.randn(10, 768), plain_alias(in_spill(core, values[:6000]))):
        for indices in (torch.tensor([[1, 5], [9, 1]]), torch.tensor([3], dtype=torch.int32)):
            cases: list[tuple[Any, ...]] = [(indices, table), (indices, table, 5), (indices, table, None, True)]
            for arguments in cases:
                assert set(opcheck(embedding.default, arguments).values()) == {"SUCCESS"}
        gradient = torch.randn(2, 2, 768, requires_grad=True)
        arguments = (gradient, torch.tensor([[1, 5], [9, 1]]), table, 1, False)
        assert set(opcheck(embedding_grad_weight.default, arguments).values()) == {"SUCCESS"}
        table.requires_grad_()
        assert set(opcheck(embedding.default, (torch.tensor([2, 2]), table)).values()) == {"SUCCESS"}


def test_compiled_it_is_one_opaque_call(core: Core, values: torch.Tensor) -> None:
    alias = plain_alias(in_spill(core, values))
    evict_all(core)
    compiled = torch.compile(lambda i: embedding(i + 1, alias) * 2, backend="aot_eager", fullgraph=True)
    with counted(core) as counts:
        assert torch.equal(compiled(torch.tensor([1, 15000])), values[[2, 15001]] * 2)
    assert counts.touches == 0
    assert counts.page_ins <= 4


# -- in a model


class Net(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(10000, 512, **options)  # 19.5 MiB
        self.layer = torch.nn.Linear(512, 512)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.layer(self.table(indices))


@pytest.mark.parametrize("budget_mib", [24, 44])
def test_a_table_of_more_than_half_of_the_budget_is_read_by_rows(budget_mib: int) -> None:
    torch.manual_seed(0)
    model = Net(padding_idx=7)
    twin = copy.deepcopy(model)
    with tp.page(model, budget=budget_mib * MIB) as pager, torch.no_grad():
        assert pager.stats()["pinned_pages"] == 0
        for turn in range(4):
            indices = torch.tensor([[7, 100 * turn], [5, 9999 - turn]])
            before = pager.stats()["page_ins"]
            assert torch.equal(model(indices), twin(indices))
            assert pager.stats()["page_ins"] - before <= (4 if turn else 8)
        stats = pager.stats()
        assert stats["mispredicted_passes"] == 0  # rows are no steps
        assert stats["touches"] == 0
        assert stats["resident_bytes_max"] <= budget_mib * MIB


def test_a_smaller_table_is_a_step_as_ever() -> None:
    model = Net()
    with tp.page(model, budget=64 * MIB) as pager, torch.no_grad():
        model(torch.tensor([3]))
        assert pager.stats()["schedule"]["steps"] == 2


def test_max_norm_writes_to_the_table_and_is_left_to_torch() -> None:
    model = Net(max_norm=0.5)
    with pytest.raises(tp.BudgetError):
        tp.page(model, budget=16 * MIB)
    twin = copy.deepcopy(model)
    indices = torch.tensor([5, 9999])
    with tp.page(model, budget=40 * MIB), torch.no_grad():
        assert torch.equal(model(indices), twin(indices))


def test_training_a_table_larger_than_the_budget() -> None:
    torch.manual_seed(0)
    for sparse in (False, True):
        model = torch.nn.Sequential(torch.nn.Embedding(10000, 512, sparse=sparse))
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
        with tp.page(model, optimizer, budget=16 * MIB) as pager:
            for turn in range(3):
                indices = torch.tensor([turn, 5000, 9999, 5000])
                for its_model, its_optimizer in ((model, optimizer), (twin, twin_optimizer)):
                    its_model(indices).square().sum().backward()
                    its_optimizer.step()
                    its_optimizer.zero_grad()
            assert torch.equal(model[0].weight, twin[0].weight)
            stats = pager.stats()
            assert stats["resident_bytes_max"] <= 16 * MIB
            assert (stats["training_bytes"] > 0) == (not sparse)
