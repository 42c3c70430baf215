# SPDX-License-Identifier: Apache-2.0
"""A paged tensor has one address for life: who may have it, and what would replace it, which is refused.

Threads: any. Blocking: on I/O, where something is to be done before the bytes are looked at.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tensorpager import op_rules
from tensorpager.errors import PagedTensorError
from tensorpager.paged_tensor import (
    Arguments,
    Keywords,
    PagedTensor,
    guarded,
    handle_instead,
    no_guard,
    ordinary_copy,
    pass_through,
    settle,
    throw_if_closed,
)
from tensorpager.safetensors_writer import copy_for_safetensors

__all__ = ["data_set_by_value", "move_error"]


def _address(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """Raw memory: absent, it traps, which is right but for system calls. After close() it must not be had."""
    tensor = args[0]
    throw_if_closed(tensor._tp_backing)
    settle(tensor)
    if func is torch.Tensor.data_ptr:
        copy = copy_for_safetensors(tensor, sys._getframe(2), ordinary_copy)
        if copy is not None:
            return copy.data_ptr()
    return pass_through(func, args, kwargs)


class _DataByValue(threading.local):
    """Whether `p.data = value`, in this thread, gives p the values of a tensor of its form, not the memory."""

    on = False


_data_by_value = _DataByValue()


@contextmanager
def data_set_by_value() -> Iterator[None]:
    """While active, this thread's `p.data = value` copies. For loaders, which assign what nobody else refers to."""
    before, _data_by_value.on = _data_by_value.on, True
    try:
        yield
    finally:
        _data_by_value.on = before


def _set_data(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """`p.data = value`: nothing to do for itself, refused for memory outside, which no page-in would ever reach."""
    tensor, value = args
    if value is tensor:
        return None
    if type(tensor) is PagedTensor:
        if _data_by_value.on and (value.shape, value.dtype, value.device) == (
            tensor.shape,
            tensor.dtype,
            tensor.device,
        ):
            if not torch.equal(tensor, value):
                tensor.detach().copy_(value)
            return None
        _refuse_replacement(tensor, value)
        settle(tensor)
        tensor._tp_span = None
    return pass_through(func, args, kwargs)


def _may_replace(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """Module._apply asks whether a converted parameter can be put in place: the moment to refuse a conversion."""
    tensor, value = args[0], args[1]
    if type(tensor) is PagedTensor and value is not tensor:
        _refuse_replacement(tensor, value)
    return pass_through(func, args, kwargs)


def _refuse_replacement(tensor: PagedTensor, value: torch.Tensor) -> None:
    backing = tensor._tp_backing
    with no_guard():
        stays = backing is None or (value.device == tensor.device and backing.core.contains(value.data_ptr()))
        if stays or value.numel() == 0:
            return
        assert backing is not None
        msg = (
            f"'{backing.name}' is paged at a permanent address as {tensor.dtype} on {tensor.device}; it can't be "
            f"replaced by a tensor of {value.dtype} on {value.device}. To change dtype or device, give dtype= to "
            "from_pretrained(), or convert the model before page(), or close the pager and load the model again. To "
            "change values, use p.data.copy_(values)"
        )
        raise PagedTensorError(msg)


def _refuse_move(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    tensor = args[0]
    if type(tensor) is not PagedTensor or tensor._tp_backing is None:
        return guarded(func, args, kwargs)
    raise move_error(tensor, getattr(func, "__name__", "this operation"))


def move_error(tensor: PagedTensor, operation: str) -> PagedTensorError:
    """For an operation that would give a tensor other memory."""
    name = tensor._tp_backing.name if tensor._tp_backing is not None else "a tensor"
    return PagedTensorError(
        f"'{name}': {operation}() would give the tensor other memory, but a paged tensor has one address for life. "
        "Work on a copy (.clone()); worker processes can load the model on their own"
    )


def _known(owner: object, *names: str) -> list[Callable[..., Any]]:
    return [getattr(owner, name) for name in names if hasattr(owner, name)]


handle_instead(op_rules.ADDRESSES, _address, reads=False)
handle_instead(_known(torch.Tensor, "resize_", "resize_as_", "share_memory_"), _refuse_move, reads=True)
handle_instead(_known(torch, "_has_compatible_shallow_copy_type"), _may_replace, reads=False)
handle_instead([torch.Tensor.data.__set__], _set_data, reads=True)  # type: ignore[attr-defined]
