# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from paged_weights import counted, evict_all, in_spill, make_core
from tensorpager._core import Pager as Core
from tensorpager.embedding_op import embedding
from tensorpager.linear_op import linear
from tensorpager.op_library import record_steps


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    """24 MiB, of which steps may hold 16."""
    core = make_core(tmp_path)
    yield core
    core.close()


def recorded(core: Core, *args: object, too_large: bool = False, **kwargs: object) -> list[int]:
    core.record_begin(True)
    try:
        func, *rest = args
        carried_out = record_steps(func, tuple(rest), kwargs, too_large=too_large)
    finally:
        events = core.record_end().tolist()
    assert carried_out or events == []
    return events


def of_a_run(core: Core, *args: torch.Tensor) -> list[int]:
    core.record_begin(False)
    try:
        linear(*args)
    finally:
        events = core.record_end().tolist()
    return events


def test_what_is_recorded_of_a_fake_run_is_what_a_run_does(core: Core) -> None:
    x, bias = torch.randn(2, 1024), in_spill(core, torch.randn(8192))
    for rows in (1000, 8192):
        weight = in_spill(core, torch.randn(rows, 1024))
        evict_all(core)
        arguments = (x, weight, bias[:rows])
        expected = of_a_run(core, *arguments)
        with counted(core) as counts:
            assert recorded(core, linear, *arguments) == expected
            assert recorded(core, linear.default, x, weight=weight, bias=bias[:rows]) == expected
            assert recorded(core, linear, x[:0], weight) == []
        assert counts.page_ins == 0


def test_a_function_is_replaced_only_where_its_tensor_can_t_be_held(core: Core) -> None:
    plain = torch.nn.functional.linear
    x = torch.randn(2, 1024)
    weight, smaller = in_spill(core, torch.randn(8192, 1024)), in_spill(core, torch.randn(2048, 1024))
    assert recorded(core, plain, x, weight, too_large=True) == of_a_run(core, x, weight)
    assert recorded(core, plain, input=x, weight=weight, too_large=True) == of_a_run(core, x, weight)
    assert not record_steps(plain, (x, weight), {}, too_large=False)
    assert not record_steps(plain, (x, smaller), {}, too_large=True)
    assert not record_steps(plain, (x[:, 1:], weight), {}, too_large=True)
    assert not record_steps(torch.mm, (x, weight.t()), {}, too_large=True)
    assert record_steps(torch.nn.functional.embedding, (torch.tensor([1]), weight), {}, too_large=True)
    with counted(core) as counts:
        result = torch.nn.functional.embedding(torch.tensor([8191]), weight)
    assert counts.page_ins <= 1
    assert torch.equal(result[0], weight[8191])


def test_rules_of_torch_are_registered() -> None:
    for operator in (linear, embedding):
        name = operator.default._schema.name
        for key in ("CompositeExplicitAutograd", "Autograd", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)
        assert not operator.default._schema.is_mutable
        assert all(value.alias_info is None for value in operator.default._schema.returns)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("tensorpager::linear", "AutocastCPU")
