# SPDX-License-Identifier: Apache-2.0
"""Models that the tests of the torch layer page, and how to look at what is resident."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

import tensorpager as tp
from tensorpager._core import PAGE_STATES
from tensorpager.paged_tensor import span_of

MIB = 2**20
BUDGET = 16 * MIB  # 8 frames of 2 MiB, of which steps may hold 4


class Block(torch.nn.Module):
    """Has a parameter of its own beside modules that have some: the guard's case."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up = torch.nn.Linear(width, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)
        self.gain = torch.nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gain * self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Net(torch.nn.Module):
    """34 MiB with tied embeddings: twice the budget."""

    def __init__(self, width: int = 512, depth: int = 4) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(1000, width)
        self.blocks = torch.nn.ModuleList(Block(width) for _ in range(depth))
        self.head = torch.nn.Linear(width, 1000, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make_net(depth: int = 4) -> tuple[Net, Net]:
    """A net to page, and its ordinary twin."""
    torch.manual_seed(0)
    net = Net(depth=depth)
    return net, copy.deepcopy(net)


def some_ids() -> torch.Tensor:
    return torch.arange(16).reshape(2, 8) * 37 % 1000


def core_of(pager: tp.Pager) -> Any:
    return pager._core


def resident_pages_of(pager: tp.Pager, tensor: torch.Tensor) -> int:
    """How many of the tensor's pages are resident."""
    core = core_of(pager)
    address, size_bytes = span_of(tensor)
    pages = core.set_pages(core.add_set([(address, size_bytes)], "a test's look"))
    return int(np.count_nonzero(core.page_states()[pages] == PAGE_STATES.index("device")))


def evict(pager: tp.Pager, model: torch.nn.Module, tensor: torch.Tensor) -> None:
    """Read other parameters until no page of the tensor is resident; the model must be larger than the budget."""
    start, size_bytes = span_of(tensor)
    page_bytes = core_of(pager).page_bytes
    for _ in range(4):
        for other in model.parameters():
            begin, length = span_of(other)
            if begin > start + size_bytes + page_bytes or begin + length + page_bytes < start:
                other.detach().sum()
        if resident_pages_of(pager, tensor) == 0:
            return
    message = "the tensor stays resident whatever else is read"
    raise AssertionError(message)


def brought_in(pager: tp.Pager) -> int:
    """Pages that were brought in so far, by acquire, hold or trap."""
    return int(pager.stats()["page_ins"])
