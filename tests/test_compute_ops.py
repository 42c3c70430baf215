# SPDX-License-Identifier: Apache-2.0
"""Which parameters a module need not hold whole, and the operators on a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tensorpager as tp
from paged_weights import make_core
from standin import standin
from tensorpager.compute_ops import embedding, linear, moe_linear, parameters_left_to_operators
from tensorpager.paged_tensor import PagedTensor
from torch_models import MIB

__all__ = ["standin"]


def test_which_parameters_are_left_to_operators(tmp_path: Path) -> None:
    core = make_core(tmp_path)  # 24 MiB, of which steps may hold 16

    def left(module: torch.nn.Module) -> set[str]:
        spans = {id(each): (1 << 40, each.numel() * each.element_size()) for each in module.parameters()}
        return set(parameters_left_to_operators(module, spans, core))

    class Own(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.t()

    with torch.device("meta"):
        assert left(torch.nn.Linear(1024, 4096)) == set()  # 16 MiB
        assert left(torch.nn.Linear(1024, 4097)) == {"weight"}
        assert left(torch.nn.Linear(1024, 4097, dtype=torch.float64)) == set()
        assert left(Own(1024, 4097)) == set()
        assert left(torch.nn.Embedding(2048, 1024)) == set()  # 8 MiB
        assert left(torch.nn.Embedding(2049, 1024)) == {"weight"}
        assert left(torch.nn.Embedding(2049, 1024, max_norm=1.0)) == set()
        assert left(torch.nn.Bilinear(64, 64, 4096)) == set()
        own = torch.nn.Bilinear(4, 4, 4)
        own.left_to_operators = ("weight",)
        assert left(own) == {"weight"}
    assert parameters_left_to_operators(torch.nn.Linear(2, 2), {}, core) == frozenset()
    core.close()


class Everything(torch.nn.Module):
    """More than 48 MiB in three tensors."""

    left_to_operators = ("table", "experts", "weight")

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(8192, 512))
        self.experts = torch.nn.Parameter(torch.randn(8, 1024, 512))
        self.weight = torch.nn.Parameter(torch.randn(10240, 1024))
        self.first = torch.nn.Linear(512, 512)

    def forward(self, ids: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
        rows = self.first(embedding(ids, self.table))
        return linear(moe_linear(rows, self.experts, expert_ids), self.weight)

    def plain(self, ids: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
        rows = self.first(torch.nn.functional.embedding(ids, self.table))
        rows = torch.stack([self.experts[e] @ row for row, e in zip(rows, expert_ids.tolist(), strict=True)])
        return torch.nn.functional.linear(rows, self.weight)


@pytest.mark.usefixtures("standin")
def test_on_a_device_the_operators_hold_what_they_read() -> None:
    torch.manual_seed(0)
    model = Everything()
    ids, expert_ids = torch.tensor([5, 8191, 17]), torch.tensor([7, 2, 7])
    with torch.no_grad():
        expected = model.plain(ids, expert_ids)
    with tp.page(model, budget="24MiB", device="cuda:0", host_budget="80MiB") as pager:
        with torch.no_grad():
            for _ in range(3):
                assert torch.allclose(model(ids, expert_ids), expected, rtol=1e-4, atol=1e-2)
        stats = pager.stats()
        assert stats["resident_bytes_max"] <= 24 * MIB
        assert stats["pinned_pages"] == 0
        assert stats["trace_failure"] is None
        assert stats["mispredicted_passes"] == 0
        x = torch.randn(2, 1024, requires_grad=True)
        with pytest.raises(tp.PagedTensorError, match="works for inference so far"):
            linear(x, model.weight)
        assert type(model.weight) is PagedTensor
        others = pager._core.add_set([(model.weight.data_ptr(), model.weight.nbytes // 2)], "other steps")
        pager._core.acquire(others)
        with pytest.raises(tp.BudgetError), torch.no_grad():
            linear(torch.randn(2, 1024), model.weight)
        pager._core.release(others)
