# SPDX-License-Identifier: Apache-2.0
"""Paged tensors without a model around them, and what an operation on them moved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tensorpager._core import Pager as Core
from tensorpager.paged_tensor import Backing, PagedTensor, make_paged, no_guard, span_of
from tensorpager.spill import SpillArena, tensor_at

PAGE_BYTES = 2 * 2**20
FRAMES = 12  # of which steps may hold 8


def make_core(directory: Path, frames: int = FRAMES) -> Core:
    return Core(budget_bytes=frames * PAGE_BYTES, page_bytes=PAGE_BYTES, spill_directory=str(directory))


def in_spill(core: Core, values: torch.Tensor, *, requires_grad: bool = False) -> PagedTensor:
    """A modified weight, as training leaves them."""
    return SpillArena(core).move_in(values, "weight", parameter=True, requires_grad=requires_grad)


def in_file(core: Core, path: Path, values: torch.Tensor, *, offset_bytes: int = 0) -> PagedTensor:
    """A weight of a checkpoint, at an offset that is no multiple of a page."""
    content = np.zeros(offset_bytes + values.nbytes, np.uint8)
    content[offset_bytes:] = values.contiguous().view(-1).view(torch.uint8).numpy()
    content.tofile(path)
    region = core.map_file(str(path))
    plain = tensor_at(core, region.address + offset_bytes, tuple(values.shape), tuple(values.stride()), values.dtype)
    return make_paged(plain, Backing(core, "weight"), parameter=True)


def plain_alias(paged: PagedTensor) -> torch.Tensor:
    """What code sees that knows nothing of us: an ordinary tensor over the same memory."""
    with no_guard():
        return paged.detach().as_subclass(torch.Tensor)


def pages_of(core: Core, tensor: torch.Tensor) -> int:
    address, size_bytes = span_of(tensor)
    return (address + size_bytes - 1) // core.page_bytes - address // core.page_bytes + 1


@contextmanager
def counted(core: Core) -> Iterator[Any]:
    """What is counted meanwhile; and nothing is held afterwards, nor was the budget ever exceeded."""
    before = core.stats()
    counts = SimpleNamespace()
    yield counts
    after = core.stats()
    for name in ("bytes_read", "bytes_written", "page_ins", "faults", "prefetches", "touches", "acquires"):
        setattr(counts, name, after[name] - before[name])
    assert after["pinned_pages"] == 0
    assert after["resident_bytes_max"] <= core.budget_bytes


def evict_all(core: Core) -> None:
    """Fill every frame with pages that hold nothing."""
    region = core.map_spill(core.budget_bytes)
    for page in range(core.frame_count):
        core.release(core.hold(region.address + page * core.page_bytes, 1))
