# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model hold their parameters resident while they run, and which of them.

Threads: the one that pages the model. Reads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tensorpager.budget import format_bytes
from tensorpager.compute_ops import parameters_left_to_operators
from tensorpager.device import HOST
from tensorpager.errors import BudgetError
from tensorpager.windows import Window

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core

__all__ = ["ModuleWindow", "is_unguarded", "make_windows"]

# [Note: unguarded modules] in windows.py. All but the last also use the weights of their children: one window for all.
_UNGUARDED = (torch.nn.TransformerEncoderLayer, torch.nn.MultiheadAttention, torch.nn.TransformerEncoder)


@dataclass
class ModuleWindow:
    """A module, and what is held while it runs."""

    module: torch.nn.Module
    owned: list[tuple[torch.nn.Module, str]]  # what it holds: parameters of the module or its children
    window: Window


def is_unguarded(module: torch.nn.Module, kinds: tuple[type[torch.nn.Module], ...] = _UNGUARDED) -> bool:
    """Whether the module takes a fused kernel that the guard would keep it from."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def make_windows(model: torch.nn.Module, core: Core, spans: dict[int, tuple[int, int]]) -> list[ModuleWindow]:
    """A window for each module that owns some of the parameters (spans: by id) and whose children own none.

    Those that operators bring in, part by part, count as nobody's.
    """
    owning = {id(module) for module in model.modules() if _owned(module, spans, core)}
    windows: list[ModuleWindow] = []
    covered: set[int] = set()  # modules inside of one that has a window for all of its children
    for name, module in model.named_modules():
        inner_owning = [inner for inner in module.modules() if id(inner) in owning]
        if not inner_owning or id(module) in covered:
            continue
        as_one = is_unguarded(module, _UNGUARDED[:2])
        if core.device == HOST:  # there the fused kernel's stray accesses would trap, and be served
            as_one = as_one and _fits(core, _ranges(inner_owning, spans, core))
        if not as_one and inner_owning != [module]:
            continue
        covered.update(id(inner) for inner in module.modules())
        shown_name = name or type(module).__name__
        ranges = _ranges(inner_owning, spans, core)
        set_id = core.add_set(ranges, shown_name)
        _throw_if_too_large(core, set_id, shown_name, sum(size_bytes for _, size_bytes in ranges))
        owned = [(owner, own_name) for owner in inner_owning for own_name in _owned(owner, spans, core)]
        windows.append(ModuleWindow(module, owned, Window(core, set_id, shown_name)))
    return windows


def _ranges(modules: list[torch.nn.Module], spans: dict[int, tuple[int, int]], core: Core) -> list[tuple[int, int]]:
    return sorted({spans[id(parameter)] for module in modules for parameter in _owned(module, spans, core).values()})


def _fits(core: Core, ranges: list[tuple[int, int]]) -> bool:
    page_bytes = core.page_bytes  # regions start at multiples of it
    pages = {
        page
        for address, size_bytes in ranges
        for page in range(address // page_bytes, (address + size_bytes - 1) // page_bytes + 1)
    }
    return len(pages) <= core.pinnable_page_count


def _owned(module: torch.nn.Module, spans: dict[int, tuple[int, int]], core: Core) -> dict[str, torch.nn.Parameter]:
    left = parameters_left_to_operators(module, spans, core)
    return {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in spans and name not in left
    }


def _throw_if_too_large(core: Core, set_id: int, name: str, size_bytes: int) -> None:
    page_count = len(core.set_pages(set_id))
    if page_count <= core.pinnable_page_count:
        return
    reserve_pages = core.frame_count - core.pinnable_page_count
    needed = (page_count + reserve_pages) * core.page_bytes
    msg = (
        f"module '{name}' needs its {format_bytes(size_bytes)} of parameters at once ({page_count} pages of "
        f"{core.page_bytes} bytes), and {reserve_pages} pages stay free for stray accesses, but the budget is "
        f"{core.budget_bytes} bytes. The smallest budget that works is {needed} bytes ({format_bytes(needed)})"
    )
    raise BudgetError(msg)
