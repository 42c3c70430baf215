# SPDX-License-Identifier: Apache-2.0
"""Clipping without a look at the gradients: norms that are computed where a gradient is made, factors that wait.

Clipping by norm reads every gradient for its norm, and reads and writes each once more to multiply it, at a time at
which nothing computes: three transfers of all gradients that do not fit. So a norm is computed when the gradient has
just been made, if the step before asked for norms; and multiplying a whole gradient by one number is put off until
somebody looks at it, which is its update most often (`updates.py`). One is no factor at all.

The functions and their operands are those that the caller named, so the bits are the same. A norm counts as long as
nothing but norms has been asked of the gradient since, and its version, which autograd moves on, is the same.

Threads: one trains. Blocking: settling blocks on I/O.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from tensorpager.paged_tensor import Backing, PagedTensor, handle, hold_arguments, span_of

__all__ = ["Factor", "GradientNotes", "NormsWanted"]

_EUCLIDEAN = 2.0


class NormsWanted:
    """Whether norms of gradients are asked for, as far as the last step tells. One for a model."""

    def __init__(self) -> None:
        self._asked = False
        self.wanted = False

    def asked(self) -> None:
        """Somebody did."""
        self._asked = self.wanted = True

    def step_done(self) -> None:
        """A step ends; the next is expected to be like it."""
        self.wanted, self._asked = self._asked, False


class GradientNotes:
    """What is known of one paged gradient. On its Backing, which all of its views share."""

    __slots__ = ("_norm", "_version", "norms")

    def __init__(self, norms: NormsWanted) -> None:
        self.norms = norms
        self._norm: torch.Tensor | None = None
        self._version = -1

    def note_norm(self, norm: torch.Tensor, gradient: torch.Tensor) -> None:
        """The norm of all of `gradient` as it is now; 0-dim."""
        self._norm = norm
        self._version = gradient._version

    def norm_of(self, gradient: torch.Tensor) -> torch.Tensor | None:
        """A tensor of its own with the norm, if it is known."""
        if self._norm is None or gradient._version != self._version:
            return None
        return self._norm.clone()

    def forget(self) -> None:
        """Somebody may write to the gradient's bytes, unseen."""
        self._norm = None


class Factor:
    """A gradient that is still to be multiplied by a number. In the place of an update: see Backing.update."""

    __slots__ = ("_backing", "_factor", "_gradient")

    def __init__(self, gradient: PagedTensor, factor: torch.Tensor | float) -> None:
        backing = gradient._tp_backing
        assert backing is not None
        # Neither keeps the backing alive, and so this: the pages are given back with the last reference.
        self._backing = weakref.ref(backing)
        with torch._C.DisableTorchFunctionSubclass():
            self._gradient = torch.empty(0, dtype=gradient.dtype).set_(
                gradient.untyped_storage(), gradient.storage_offset(), tuple(gradient.shape), gradient.stride()
            )
        self._factor = factor.detach().clone() if isinstance(factor, torch.Tensor) else factor
        torch.autograd.graph.increment_version(gradient)

    def settle(self) -> None:
        """Multiply, unless it is done. When the pages can't be had the factor waits on, and the error comes out."""
        backing = self._backing()
        if backing is None or backing.update is not self:
            return
        paged = self._gradient.as_subclass(PagedTensor)
        paged._tp_backing = backing
        backing.update = None
        try:
            held = hold_arguments((paged,), None)
        except BaseException:
            backing.update = self
            raise
        try:
            self.apply()
        finally:
            if held is not None:
                held.release()

    def apply(self) -> None:
        """Multiply. The caller sees to it that it is resident, and that it happens once."""
        with torch.no_grad():
            self._gradient.mul_(self._factor)
        backing = self._backing()
        assert backing is not None, "whoever comes to a gradient has it"
        backing.core.note_modified(*span_of(self._gradient))


def _notes_of(tensor: Any) -> tuple[Backing, GradientNotes] | None:
    """Of a whole gradient; None for its views, and for everything else."""
    if type(tensor) is not PagedTensor or tensor._tp_backing is None:
        return None
    backing = tensor._tp_backing
    notes = backing.gradient
    if notes is None or tensor.requires_grad or torch._C._len_torch_dispatch_stack():
        return None
    with torch._C.DisableTorchFunctionSubclass():
        whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    return (backing, notes) if whole else None


def _vector_norm(args: Any, kwargs: Any) -> Any:
    """`torch.linalg.vector_norm(gradient, 2.0)`, as clip_grad_norm_ calls it; NotImplemented for other calls."""
    if kwargs or args[1:] != (_EUCLIDEAN,):
        return NotImplemented
    found = _notes_of(args[0])
    if found is None:
        return NotImplemented
    _, notes = found
    notes.norms.asked()
    norm = notes.norm_of(args[0])
    return NotImplemented if norm is None else norm


def _multiply(args: Any, kwargs: Any) -> Any:
    """`gradient.mul_(number)`; NotImplemented for other calls."""
    if kwargs or not args[1:]:
        return NotImplemented
    gradient, factor = args
    if not isinstance(factor, float) and not (type(factor) is torch.Tensor and factor.dim() == 0):
        return NotImplemented
    found = _notes_of(gradient)
    if found is None or (isinstance(factor, torch.Tensor) and (factor.requires_grad or factor.device.type != "cpu")):
        return NotImplemented
    if gradient.is_complex() or not gradient.is_floating_point():
        return NotImplemented
    backing, notes = found
    if backing.update is not None:  # one factor at a time, in the order given
        backing.update.settle()
    notes.forget()
    if float(factor) != 1.0:
        backing.update = Factor(gradient, factor)
    return gradient


handle(torch.linalg.vector_norm, _vector_norm)
handle(torch.Tensor.mul_, _multiply)
