# SPDX-License-Identifier: Apache-2.0
"""What of a paged tensor needs an ordinary copy, or a look at some elements: numpy, DLPack, pickle, copies, text.

The kernel reads what it is given without a trap that anybody serves, and other libraries keep what they are given. So
they get copies.

Threads: any. Blocking: on I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tensorpager.errors import BudgetError
from tensorpager.paged_tensor import (
    Arguments,
    Handler,
    Keywords,
    handle_instead,
    hold_arguments,
    no_guard,
    ordinary_copy,
    plain_alias,
    settle,
)

__all__: list[str] = []


def _to_numpy(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    tensor = args[0]
    with no_guard():
        forced = bool(kwargs.get("force", False))
        if tensor.requires_grad and not forced:
            return func(*args, **kwargs)  # raises what it raises for every tensor
    array = func(ordinary_copy(tensor).detach(), *args[1:], **kwargs)
    array.flags.writeable = False  # a copy: what is written to it would be lost
    return array


def _to_dlpack(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    with no_guard():
        if args[0].requires_grad:
            return func(*args, **kwargs)  # raises what it raises for every tensor
    return func(ordinary_copy(args[0]), *args[1:], **kwargs)


def _deepcopy(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    tensor, memo = args
    if id(tensor) in memo:
        return memo[id(tensor)]
    with no_guard():
        if not tensor.is_leaf:
            return func(*args, **kwargs)  # raises what it raises for every tensor
    copy = ordinary_copy(tensor)
    memo[id(tensor)] = copy
    return copy


def _reduce(_func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    return ordinary_copy(args[0]).__reduce_ex__(*args[1:], **kwargs)  # type: ignore[no-untyped-call]


def _format(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> str:
    tensor, specification = args
    if tensor.dim() > 0 and not specification:
        return _repr(torch.Tensor.__repr__, (tensor,), kwargs)
    text: str = func(plain_alias(tensor) if tensor.dim() > 0 else ordinary_copy(tensor), specification)
    return text


def _repr(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> str:
    """As for an ordinary tensor. On the host only the elements that are printed are touched and paged in.

    On a device, where a kernel that touches what is absent ends the context, all of it is held.
    """
    tensor = args[0]
    prefix = "Parameter containing:\n" if getattr(tensor, "_is_param", False) else ""
    backing = tensor._tp_backing
    closed = backing is not None and backing.core.closed
    if not closed:
        settle(tensor)
    try:
        held = hold_arguments((tensor,), None) if backing is not None and backing.on_device and not closed else None
    except BudgetError:
        return f"{prefix}PagedTensor(larger than its budget, shape={tuple(tensor.shape)}, dtype={tensor.dtype})"
    try:
        with no_guard():
            if closed:
                return f"{prefix}PagedTensor(closed, shape={tuple(tensor.shape)}, dtype={tensor.dtype})"
            is_leaf = tensor.is_leaf  # then without a grad_fn of the alias's own
            plain_leaf = torch.Tensor._make_subclass(torch.Tensor, tensor, tensor.requires_grad) if is_leaf else None
            text: str = func(tensor.as_subclass(torch.Tensor) if plain_leaf is None else plain_leaf, **kwargs)
            return prefix + text
    finally:
        if held is not None:
            held.release()


def _register(handler: Handler, names: str, *, reads: bool = True) -> None:
    found = [getattr(torch.Tensor, name) for name in names.split() if hasattr(torch.Tensor, name)]
    handle_instead(found, handler, reads=reads)


_register(_to_numpy, "numpy __array__")
_register(_to_dlpack, "__dlpack__")
_register(_deepcopy, "__deepcopy__")
_register(_reduce, "__reduce_ex__")
_register(_repr, "__repr__", reads=False)
_register(_format, "__format__", reads=False)
