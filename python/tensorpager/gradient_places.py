# SPDX-License-Identifier: Apache-2.0
"""Gradients of weights that are too large to be held: written part by part to a place in the address space.

A gradient as large as that would not fit into memory beside the budget, so no plain one is made. autograd takes it over
as it is when the parameter has none yet; when there is one (accumulation) it adds the new one in place, in its own
loop, whose pages come in as they are touched. Gradients of a weight that one graph uses twice, such as a table that is
the head's weight too, autograd adds before anybody sees them, in plain memory as large as they are. What autograd keeps
is a plain tensor over the same bytes, which would not be guarded; a hook puts the paged one back.

Threads: as autograd's, one at a time for a parameter. Blocking: making one waits for room in the budget. On the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from tensorpager.device import HOST
from tensorpager.paged_tensor import Backing, PagedTensor, no_guard, span_of
from tensorpager.places import Places
from tensorpager.spill import SpillArena
from tensorpager.streaming import Rows, Sweep, is_too_large, rows_of
from tensorpager.windows import Hook, Window

__all__ = ["make_gradient", "restore_paged_gradient"]

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core

# Cuts rows into parts: (begin, end) of each.
Cut = Callable[[Rows, "Core"], Sequence[tuple[int, int]]]


def make_gradient(weight: torch.Tensor, cut: Cut, fill: Callable[[torch.Tensor, int, int], None]) -> torch.Tensor:
    """A gradient of the weight's shape and dtype, whose rows begin..end-1 fill(part, begin, end) has written.

    Plain, and written at once, unless the weight is a paged one that is too large to be held; then in spill, in the
    parts that `cut` makes of its first dimension. Call it with the guard off. Raises what Sweep raises.
    """
    backing = weight._tp_backing if type(weight) is PagedTensor else None
    if backing is None or backing.core.device != HOST or not is_too_large(backing.core, span_of(weight)):
        gradient = torch.empty_like(weight)
        fill(gradient, 0, gradient.shape[0])
        return gradient
    core = backing.core
    paged = _places(backing).empty_like(weight, f"{backing.name}.grad")
    rows = rows_of(paged)
    parts = cut(rows, core)
    sets = [[core.add_set([rows.span(begin, end)], f"{backing.name}.grad")] for begin, end in parts]
    with Sweep(backing, sets) as sweep:
        for position in sweep:
            begin, end = parts[position]
            fill(paged[begin:end], begin, end)
    if weight.is_leaf and weight.requires_grad and not hasattr(weight, "_tp_gradient_hook"):
        hook = weight.register_post_accumulate_grad_hook(_RestoreHook())  # type: ignore[no-untyped-call]
        vars(weight)["_tp_gradient_hook"] = hook
    return paged


def restore_paged_gradient(parameter: torch.Tensor) -> None:
    """Make `parameter.grad`, if it is a plain tensor over the pages of make_gradient's, the paged one that it was."""
    backing = parameter._tp_backing if type(parameter) is PagedTensor else None
    if backing is None or backing.places is None:
        return
    with no_guard():
        gradient = parameter.grad
        if type(gradient) is not torch.Tensor or gradient.layout is not torch.strided:
            return
        if backing.core.contains(gradient.data_ptr()):
            parameter.grad = backing.places.alias(gradient, f"{backing.name}.grad")


def _places(backing: Backing) -> Places:
    if backing.places is None:  # the model has no optimizer that we know of
        core = backing.core
        backing.places = Places(core, SpillArena(core), Window(core, -1, "gradient"))
    return backing.places


class _RestoreHook(Hook):
    """Post-accumulate-grad hook of a parameter whose gradient is made here."""

    __slots__ = ()

    def __call__(self, parameter: torch.Tensor) -> None:
        """Its gradient is finished."""
        restore_paged_gradient(parameter)
