# SPDX-License-Identifier: Apache-2.0
"""linear: the same bits as the plain one, the pages of the weight and no more, in any place it may be called."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

import tensorpager as tp
from paged_weights import PAGE_BYTES, counted, evict_all, in_file, in_spill, make_core, pages_of, plain_alias
from tensorpager import compute_ops
from tensorpager._core import Pager as Core
from tensorpager.linear_op import linear, linear_grad_input, linear_grad_weight
from tensorpager.paged_tensor import PagedTensor, no_guard
from torch_models import MIB, core_of

plain_linear = torch.nn.functional.linear


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    """24 MiB, of which steps may hold 16."""
    core = make_core(tmp_path)
    yield core
    core.close()


def test_it_is_an_operator_of_torch() -> None:
    assert torch.ops.tensorpager.linear is linear is compute_ops.linear


# -- forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(16384, 1024), (5003, 3001), (32768 + 65, 512)])
def test_the_bits_are_those_of_the_plain_one(
    core: Core, tmp_path: Path, rows: int, columns: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(rows, columns).to(dtype), torch.randn(rows).to(dtype)
    # At a multiple of 16, as torch allocates: a product of one row has other bits where the weight lies otherwise.
    paged = in_file(core, tmp_path / "weight", weight, offset_bytes=528)
    assert paged.nbytes > core.pinnable_page_count * PAGE_BYTES
    for shape in ((1, columns), (3, columns), (2, 9, columns), (columns,), (64, columns)):
        x = torch.randn(shape).to(dtype)
        with counted(core) as counts, torch.no_grad():
            result = torch.ops.tensorpager.linear(x, paged, bias)
        assert torch.equal(result, plain_linear(x, weight, bias))
        assert result.is_contiguous()
        assert counts.touches == 0
    with torch.no_grad():
        assert torch.equal(linear(x, paged), plain_linear(x, weight))


def test_strides_don_t_matter(core: Core) -> None:
    weight = torch.randn(8192, 1024)
    paged = in_spill(core, weight)
    bias = torch.randn(2, 8192)[:, ::1][1]
    for x in (torch.randn(1024, 6).t(), torch.randn(3, 4, 2048)[..., ::2], torch.randn(4, 3, 1024).transpose(0, 1)):
        assert torch.equal(linear(x, paged, bias), plain_linear(x, weight, bias))
    rows = torch.randn(16384, 1024)
    assert torch.equal(linear(x, in_spill(core, rows)[::2]), plain_linear(x, rows[::2]))


def test_float64_and_complex_are_equal_within_rounding(core: Core) -> None:
    for dtype in (torch.float64, torch.complex64):
        weight, x = torch.randn(4096, 1024, dtype=dtype), torch.randn(8, 1024, dtype=dtype)
        result, expected = linear(x, in_spill(core, weight)), plain_linear(x, weight)
        # a sum of 1024 products of numbers about 1, in another order
        tolerance = 1024**0.5 * torch.finfo(dtype).eps * 8
        assert float((result - expected).abs().max()) <= tolerance * float(expected.abs().max())


def test_each_page_of_the_weight_is_read_once(core: Core, tmp_path: Path) -> None:
    paged = in_file(core, tmp_path / "weight", torch.randn(16384, 1024), offset_bytes=PAGE_BYTES // 2)
    x = torch.randn(2, 1024)
    evict_all(core)
    with counted(core) as counts:
        linear(x, paged)
    assert counts.page_ins == pages_of(core, paged) == 33
    # The file ends in the middle of the last page, and its first half is of the header.
    assert counts.bytes_read == 33 * PAGE_BYTES - PAGE_BYTES // 2
    assert counts.bytes_written == 0
    assert counts.faults < counts.prefetches


def test_a_trained_weight_is_read_from_where_it_is(core: Core) -> None:
    weight = torch.randn(16384, 1024)
    paged = in_spill(core, weight, requires_grad=True)
    x = torch.randn(4, 1024)
    for turn in range(3):
        with torch.no_grad():
            for row in (0, 8000, 16383):
                paged[row] += turn
                weight[row] += turn
            assert torch.equal(linear(x, paged), plain_linear(x, weight))


def test_what_is_not_large_is_held_at_once(core: Core) -> None:
    weight = torch.randn(1024, 1024, dtype=torch.float64)  # 8 MiB, half of what may be held
    paged = in_spill(core, weight)
    x = torch.randn(3, 1024, dtype=torch.float64)
    with counted(core) as counts:
        assert torch.equal(linear(x, paged), plain_linear(x, weight))
    assert counts.acquires == 1
    ordinary = torch.randn(7, 5, dtype=torch.float64)
    assert torch.equal(linear(x[:, :5], ordinary), plain_linear(x[:, :5], ordinary))


def test_a_weight_whose_rows_interleave_is_right_too(core: Core) -> None:
    weight = torch.randn(1024, 8192)
    x = torch.randn(3, 1024)
    assert torch.equal(linear(x, in_spill(core, weight).t()), plain_linear(x, weight.t()))


def test_code_that_knows_nothing_of_paging_may_pass_the_weight_on(core: Core) -> None:
    weight = torch.randn(16384, 1024)
    alias = plain_alias(in_spill(core, weight))
    evict_all(core)
    x = torch.randn(3, 1024)
    with counted(core) as counts:
        assert torch.equal(linear(x, alias), plain_linear(x, weight))
    assert counts.touches == 0
    assert counts.page_ins == 32


@pytest.mark.parametrize("shape", [(0, 1024), (2, 0, 1024)])
def test_an_input_without_rows_reads_nothing(core: Core, shape: tuple[int, ...]) -> None:
    paged = in_spill(core, torch.randn(16384, 1024))
    bias = torch.randn(16384)
    evict_all(core)
    with counted(core) as counts:
        assert linear(torch.randn(shape), paged, bias).shape == (*shape[:-1], 16384)
    assert counts.page_ins == 0


def test_no_features_give_the_bias() -> None:
    bias = torch.randn(4)
    assert torch.equal(linear(torch.ones(2, 0), torch.ones(4, 0), bias), bias.expand(2, 4))
    assert linear(torch.ones(2, 3), torch.ones(0, 3)).shape == (2, 0)


def test_what_does_not_fit_together_is_refused_before_anything_is_read(core: Core) -> None:
    paged = in_spill(core, torch.randn(16384, 1024))
    evict_all(core)
    x = torch.randn(2, 1024)
    with counted(core) as counts:
        with pytest.raises(ValueError, match=r"input \(2, 1023\) and weight \(16384, 1024\) don't fit"):
            linear(x[:, 1:], paged)
        with pytest.raises(ValueError, match="don't fit together"):
            linear(torch.tensor(1.0), paged)
        with pytest.raises(ValueError, match="don't fit together"):
            linear(x, paged[0])
        with pytest.raises(ValueError, match=r"bias \(5,\) must have one number for each of the 16384"):
            linear(x, paged, torch.ones(5))
        with pytest.raises(TypeError, match=r"input is torch\.float64 and weight torch\.float32; convert one"):
            linear(x.double(), paged)
        with pytest.raises(TypeError, match=r"input is torch\.float32 and bias torch\.float16"):
            linear(x, paged, torch.ones(16384).half())
        with pytest.raises(ValueError, match="input is on cpu and weight on meta"):
            linear(x, torch.ones(3, 1024, device="meta"))
        with pytest.raises(TypeError, match="dtype= converts floating-point numbers"):
            linear(x.int(), torch.ones(3, 1024).int(), None, torch.float32)
        with pytest.raises(RuntimeError):  # whatever torch's own says
            plain_linear(x[:, 1:], paged)
    assert counts.page_ins == 0


# -- backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradients(core: Core, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(12288, 1024).to(dtype)
    paged, twin = in_spill(core, weight, requires_grad=True), weight.clone().requires_grad_()
    x = torch.randn(3, 5, 1024).to(dtype).requires_grad_()
    y, bias = x.detach().clone().requires_grad_(), torch.randn(12288).to(dtype).requires_grad_()
    twin_bias = bias.detach().clone().requires_grad_()
    gradient = torch.randn(3, 5, 12288).to(dtype)
    plain_linear(y, twin, twin_bias).backward(gradient)
    linear(x, paged, bias).backward(gradient)
    assert x.grad is not None
    assert y.grad is not None
    exact = gradient.double() @ weight.double()
    # Sums over tiles: about as far from the exact one as torch's own, which is a sum over blocks.
    assert (x.grad - exact).norm() <= 1.5 * (y.grad - exact).norm()
    assert torch.equal(bias.grad, twin_bias.grad)
    # The sum over rows is not cut.
    assert type(paged.grad) is PagedTensor
    assert torch.equal(paged.grad, twin.grad)
    assert core.stats()["pinned_pages"] == 0
    assert core.stats()["resident_bytes_max"] <= core.budget_bytes


def test_a_frozen_weight_is_streamed_in_backward_and_what_is_resident_is_used(core: Core, tmp_path: Path) -> None:
    weight = torch.randn(16384, 1024)
    paged = in_file(core, tmp_path / "weight", weight)
    x = torch.randn(2, 1024, requires_grad=True)
    evict_all(core)
    result = linear(x, paged)
    with counted(core) as counts:
        result.sum().backward()
    assert paged.grad is None
    assert counts.touches == 0
    assert counts.bytes_written == 0
    assert pages_of(core, paged) - core.frame_count <= counts.page_ins < pages_of(core, paged) - 4
    assert torch.allclose(x.grad, weight.sum(0).expand(2, 1024), atol=1e-3)


def test_only_what_is_needed_is_computed(core: Core) -> None:
    paged = in_spill(core, torch.randn(16384, 1024), requires_grad=True)
    result = linear(torch.randn(2, 1024), paged)
    with torch.no_grad():
        paged[0] = 7  # its values are not needed for its gradient, as in torch
    result.sum().backward()
    assert type(paged.grad) is PagedTensor
    x = torch.randn(2, 1024, requires_grad=True)
    result = linear(x, paged)
    with torch.no_grad():
        paged[0] = 8
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_the_derivatives_of_the_derivatives(core: Core) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.complex128):
        x, weight, bias, gradient = (
            torch.randn(shape, dtype=dtype, generator=generator, requires_grad=True)
            for shape in ((2, 2, 3), (4, 3), (4,), (2, 2, 4))
        )
        assert torch.autograd.gradcheck(linear, (x, weight, bias))
        assert torch.autograd.gradgradcheck(linear, (x, weight, bias))
        assert torch.autograd.gradcheck(linear_grad_input, (gradient, weight))
        like = weight.detach()
        assert torch.autograd.gradcheck(lambda g, y, like=like: linear_grad_weight(g, y, like), (gradient, x))
    # and with tiles
    paged = in_spill(core, torch.randn(4096, 512), requires_grad=True)
    twin, y = plain_alias(paged).clone().requires_grad_(), torch.randn(2, 512, requires_grad=True)
    found, expected = [
        torch.autograd.grad(torch.autograd.grad(call(y, w).square().sum(), y, create_graph=True)[0].square().sum(), w)[
            0
        ]
        for call, w in ((linear, paged), (plain_linear, twin))
    ]
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-2 * float(expected.abs().max()))


# -- what torch makes of it


def opcheck_cases(core: Core) -> Iterator[tuple[torch._ops.OpOverload, tuple[object, ...]]]:
    streamed = plain_alias(in_spill(core, torch.randn(4608, 512)))  # 9 MiB: more than half of the budget
    for weight in (torch.randn(5, 512), streamed):
        out = weight.shape[0]
        x = torch.randn(2, 3, 512, requires_grad=True)
        gradient = torch.randn(2, 3, out, requires_grad=True)
        yield linear.default, (x, weight, torch.randn(out, requires_grad=True))
        yield linear.default, (x[0, 0].detach(), weight.detach())
        yield linear.default, (x, weight, None, torch.bfloat16)
        yield linear_grad_input.default, (gradient, weight)
        yield linear_grad_weight.default, (gradient, x, weight)
        weight.requires_grad_()
        yield linear.default, (x, weight, torch.randn(out, requires_grad=True))


def test_torch_finds_nothing_wrong(core: Core) -> None:
    for operator, arguments in opcheck_cases(core):
        passed = opcheck(operator, arguments)
        assert set(passed.values()) == {"SUCCESS"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of what it imports
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_it_is_one_opaque_call(core: Core, backend: str) -> None:
    weight, bias = torch.randn(8192, 1024), torch.randn(8192)
    alias = plain_alias(in_spill(core, weight)).requires_grad_(False)

    def compute(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(torch.ops.tensorpager.linear(x * 2, alias, bias)).sum()

    compiled = torch.compile(compute, backend=backend, fullgraph=True)
    x = torch.randn(3, 1024, requires_grad=True)
    evict_all(core)
    with counted(core) as counts:
        result = compiled(x)
    assert counts.touches == 0
    assert counts.page_ins == 16
    assert torch.allclose(result, torch.relu(plain_linear(x * 2, weight, bias)).sum())
    result.backward()
    found, x.grad = x.grad, None
    torch.relu(plain_linear(x * 2, weight, bias)).sum().backward()
    assert torch.allclose(found, x.grad, atol=1e-3)


def test_autocast_converts_tile_by_tile(core: Core) -> None:
    weight, bias = torch.randn(8192, 1024), torch.randn(8192)
    paged, twin = in_spill(core, weight, requires_grad=True), weight.clone().requires_grad_()
    x, y = (torch.randn(3, 1024, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, expected = linear(x, paged, bias), plain_linear(y, twin, bias)
        assert linear(x.double().detach(), weight.double()).dtype == torch.float64
        assert linear(torch.ones(2, 3, dtype=torch.int32), torch.ones(4, 3, dtype=torch.int32)).dtype == torch.int32
    assert result.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(result, expected)
    result.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert torch.equal(paged.grad, twin.grad)
    assert torch.allclose(x.grad, y.grad, rtol=0.02, atol=0.02 * float(y.grad.abs().max()))
    assert (x.grad.dtype, paged.grad.dtype) == (torch.float32, torch.float32)


def test_modes_and_transforms_of_torch(core: Core) -> None:
    weight = torch.randn(8192, 1024)
    paged, x = in_spill(core, weight, requires_grad=True), torch.randn(3, 1024)
    expected = plain_linear(x, weight)
    with torch.inference_mode():
        assert torch.equal(linear(x, paged), expected)
        assert torch.equal(plain_linear(x, paged), expected)
    assert torch.equal(
        torch.vmap(lambda row: plain_linear(row, paged.detach()))(x),
        torch.vmap(lambda row: plain_linear(row, weight))(x),
    )
    gradient = torch.func.grad(lambda y: plain_linear(y, paged).sum())(x)
    assert torch.allclose(gradient, weight.sum(0).expand(3, 1024), atol=1e-3)


def test_threads_share_the_budget(core: Core) -> None:
    weight, other = torch.randn(8192, 1024), torch.randn(8192, 1024)
    paged, paged_other = in_spill(core, weight), in_spill(core, other)
    x = torch.randn(3, 1024)
    expected = [plain_linear(x, weight), plain_linear(x, other)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda turn: linear(x, (paged, paged_other)[turn % 2]), range(8)))
    assert all(torch.equal(result, expected[turn % 2]) for turn, result in enumerate(found))
    assert core.stats()["pinned_pages"] == 0
    assert core.stats()["resident_bytes_max"] <= core.budget_bytes


# -- in a model


class Head(torch.nn.Module):
    """26 MiB, most of it in one layer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.body = torch.nn.Linear(512, 512, dtype=dtype)
        self.head = torch.nn.Linear(512, 12800 * 4 // dtype.itemsize, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_larger_than_the_budget_works_by_itself(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Head(dtype)
    twin = copy.deepcopy(model)
    budget = 22 * MIB
    x = torch.randn(2, 7, 512, dtype=dtype)
    with tp.page(model, budget=budget) as pager, torch.no_grad():
        for turn in range(4):
            if turn == 2:
                pager.reset_stats()
            assert torch.equal(model(x), twin(x))
        stats = pager.stats()
        assert stats["resident_bytes_max"] <= budget
        assert stats["trace_failure"] is None
        assert stats["mispredicted_passes"] == 0
        # Its tiles are steps of the schedule, which keeps what it can and reads the rest ahead.
        assert stats["touches"] == stats["off_schedule_acquires"] == 0
        assert stats["faults"] <= 2  # where a tile comes before the one that gives up its frame is released
        schedule = stats["schedule"]
        # What was begun before the counters were set to zero, or is ahead now, is less than a pass.
        assert abs(stats["page_ins"] - 2 * schedule["page_ins_per_pass"]) <= schedule["page_ins_per_pass"]
        assert schedule["page_ins_per_pass"] < schedule["working_set_pages"]


def test_a_layer_of_float64_keeps_its_bits_and_comes_in_as_it_is_touched() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(512, 8, dtype=torch.float64))
    model[0].weight = torch.nn.Parameter(torch.randn(8192, 512, dtype=torch.float64))
    model[0].bias = None
    with pytest.raises(tp.BudgetError, match="module '0'"):
        tp.page(model, budget=24 * MIB)


def test_a_module_of_one_s_own_leaves_parameters_to_the_operator() -> None:
    class Own(torch.nn.Module):
        left_to_operators = ("weight",)

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(16384, 512))
            self.scale = torch.nn.Parameter(torch.randn(512))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.tensorpager.linear(x * self.scale, weight=self.weight)

    model = Own()
    twin = copy.deepcopy(model)
    x = torch.randn(3, 512)
    with tp.page(model, budget=24 * MIB) as pager, torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), twin(x))
        stats = pager.stats()
        assert stats["trace_failure"] is None
        assert stats["mispredicted_passes"] == 0
        assert stats["touches"] == 0
        assert stats["schedule"]["steps"] > 4
        assert not core_of(pager).closed


def test_in_the_window_of_its_module_it_is_the_plain_one() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(5120, 512, dtype=torch.float64))  # 20 of 24 MiB

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.tensorpager.linear(x, self.weight)

    model = Own()
    twin = copy.deepcopy(model)
    x = torch.randn(3, 512, dtype=torch.float64)
    with tp.page(model, budget=32 * MIB) as pager, torch.no_grad():
        assert torch.equal(model(x), twin(x))
        assert pager.stats()["acquires"] == 1


def test_training_through_a_layer_larger_than_the_budget() -> None:
    torch.manual_seed(0)
    model = Head()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    x = torch.randn(6, 512)
    with tp.page(model, optimizer, budget=24 * MIB) as pager:
        for _ in range(2):
            for its_model, its_optimizer in ((model, optimizer), (twin, twin_optimizer)):
                for part in x.split(3):  # accumulated
                    its_model(part).square().mean().backward()
                its_optimizer.step()
                its_optimizer.zero_grad()
        assert pager.stats()["resident_bytes_max"] <= 24 * MIB
        pager.updates_wait = False  # those of the last step are made now: what follows looks past the guard
        with no_guard():
            for paged, plain in zip(model.parameters(), twin.parameters(), strict=True):
                # The gradient of the head's input is a sum over tiles.
                assert torch.allclose(paged, plain, rtol=1e-4, atol=1e-6)
