# SPDX-License-Identifier: Apache-2.0
"""`torch.ops.tensorpager.linear(input, weight, bias=None, dtype=None)`: a linear layer whose weight may be larger than
the whole budget.

Such a weight is multiplied tile by tile, each some of the output features, while the next tiles arrive. What is smaller
than half of the budget is held and multiplied at once; ordinary weights are too.

    input: [*, in], any strides, any dtype that torch.nn.functional.linear takes, weight: [out, in], bias: [out]
    dtype: what to compute in; then the weight is converted tile by tile, as autocast would convert it at once
    returns [*, out]

The sum over the input features is not cut, so the result is that of torch.nn.functional.linear, bit for bit, where a
product's columns don't depend on how many there are: with MKL and oneDNN so in float32, bfloat16 and float16, while
float64 differs by rounding. Backward reads the weight again, from its end to its start, so that what is resident is
used; the gradient of the input is a sum over output features, which are cut, so it differs by rounding. The gradient of
a weight that is too large to be held goes to spill, tile by tile (`gradient_places.py`).

torch.nn.functional.linear of a paged weight that can't be held at all is carried out here by itself, in the dtypes in
which forward gives the same bits.

Raises ValueError and TypeError, before anything is read, for what does not fit together; what `Sweep` raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tensorpager.gradient_places import make_gradient
from tensorpager.op_library import define, instead_of, may_convert, rule_for_autocast
from tensorpager.paged_tensor import Backing, PagedTensor, hold_arguments, no_guard, span_of
from tensorpager.streaming import Sweep, backing_of, fits, is_too_large, refuse_device_backward, row_tiles, rows_of

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core

__all__ = ["linear", "linear_grad_input", "linear_grad_weight", "streams_by_itself"]

Tensor = torch.Tensor
Dtype = torch.dtype | None

#: In these, a product's columns were found not to depend on how many there are (tests/test_linear_op.py).
_SAME_BITS = frozenset({torch.float32, torch.bfloat16, torch.float16})


def streams_by_itself(core: Core, span: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether F.linear of a weight, at (address, size_bytes), is carried out here without being asked to."""
    return dtype in _SAME_BITS and not fits(core, span)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: Dtype) -> None:
    if len(weight.shape[:-1]) != 1 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        msg = (
            f"linear: input {tuple(x.shape)} and weight {tuple(weight.shape)} don't fit together; "
            "they are [*, in] and [out, in]"
        )
        raise ValueError(msg)
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        msg = f"linear: bias {tuple(bias.shape)} must have one number for each of the {weight.shape[0]} output features"
        raise ValueError(msg)
    others = [weight] if bias is None else [weight, bias]
    for name, other in zip(("weight", "bias"), others, strict=False):
        if other.device != x.device:
            msg = f"linear: input is on {x.device} and {name} on {other.device}"
            raise ValueError(msg)
        if dtype is None and other.dtype != x.dtype:
            msg = f"linear: input is {x.dtype} and {name} {other.dtype}; convert one, or give dtype="
            raise TypeError(msg)
    if dtype is not None and not may_convert(dtype, x.dtype, *(other.dtype for other in others)):
        msg = f"linear: dtype= converts floating-point numbers, not {x.dtype} and {weight.dtype} to {dtype}"
        raise TypeError(msg)


def _tiles(weight: Tensor) -> tuple[Backing, list[tuple[int, int]]] | None:
    """What pages a weight that is to be streamed, and its tiles; None for any other."""
    backing = backing_of(weight) if weight.numel() > 0 else None
    if backing is None or backing.in_window() or not is_too_large(backing.core, span_of(weight)):
        return None
    rows = rows_of(weight)
    return (backing, row_tiles(rows, backing.core)) if rows.apart else None


def _sets(weight: Tensor, backing: Backing, tiles: list[tuple[int, int]]) -> list[list[int]]:
    rows = rows_of(weight)
    return [[backing.core.add_set([rows.span(begin, end)], backing.name)] for begin, end in tiles]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: Dtype = None) -> Tensor:
    _check(x, weight, bias, dtype)
    streamed = None if x.numel() == 0 else _tiles(weight)
    held = hold_arguments((x, bias, weight if streamed is None and x.numel() > 0 else None), None)
    try:
        x, bias = x.to(dtype or x.dtype), None if bias is None else bias.to(dtype or bias.dtype)
        if streamed is None:
            return torch.nn.functional.linear(x, weight.to(x.dtype), bias)
        backing, tiles = streamed
        output = x.new_empty((*x.shape[:-1], weight.shape[0]))
        with Sweep(backing, _sets(weight, backing, tiles)) as sweep:
            for position in sweep:
                begin, end = tiles[position]
                part = torch.nn.functional.linear(
                    x, weight[begin:end].to(x.dtype), None if bias is None else bias[begin:end]
                )
                output[..., begin:end] = part
        return output
    finally:
        if held is not None:
            held.release()


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: Dtype = None) -> Tensor:
    _check(x, weight, bias, dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype or x.dtype)


def _record_linear(x: Tensor, weight: Tensor, bias: Tensor | None, _dtype: Dtype) -> None:
    with no_guard():
        streamed = None if x.numel() == 0 else _tiles(weight)
        held = hold_arguments((x, bias, weight if streamed is None and x.numel() > 0 else None), None)
        if streamed is not None:
            backing, tiles = streamed
            with Sweep(backing, _sets(weight, backing, tiles), dry=True) as sweep:
                for _ in sweep:
                    pass
        if held is not None:
            held.release()


def _save_for_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (torch's interface)
    x, weight, bias, _ = inputs
    refuse_device_backward(weight)
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None)
    ctx.weight = weight  # of which its gradient needs to know what pages it, but not the values
    ctx.input_dtype = x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    needs = (*ctx.needs_input_grad, False, False)[:3]
    of_input = linear_grad_input(gradient, weight).to(ctx.input_dtype) if needs[0] else None
    of_weight = linear_grad_weight(gradient, x, ctx.weight) if needs[1] else None
    of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype) if needs[2] else None
    return of_input, of_weight, of_bias, None


# -- the gradient of the input -----------------------------------------------------------------------------------------


def _grad_input(gradient: Tensor, weight: Tensor) -> Tensor:
    streamed = None if gradient.numel() == 0 else _tiles(weight)
    if streamed is None:
        held = hold_arguments((gradient, weight if gradient.numel() > 0 else None), None)
        try:
            return gradient @ weight.to(gradient.dtype).conj()
        finally:
            if held is not None:
                held.release()
    backing, tiles = streamed
    tiles = tiles[::-1]
    flat = gradient.reshape(-1, gradient.shape[-1])
    # In 16 bits each partial sum would be rounded: they are added in float32.
    adds_in = torch.float32 if gradient.dtype in (torch.bfloat16, torch.float16) else gradient.dtype
    total = torch.zeros((flat.shape[0], weight.shape[1]), dtype=adds_in, device=gradient.device)
    with Sweep(backing, _sets(weight, backing, tiles)) as sweep:
        for position in sweep:
            begin, end = tiles[position]
            tile = weight[begin:end].to(gradient.dtype).conj()
            if adds_in == gradient.dtype:
                total.addmm_(flat[:, begin:end], tile)
            else:
                total += flat[:, begin:end] @ tile
    return total.to(gradient.dtype).reshape(*gradient.shape[:-1], weight.shape[1])


def _fake_grad_input(gradient: Tensor, weight: Tensor) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], weight.shape[1]))


def _record_grad_input(gradient: Tensor, weight: Tensor) -> None:
    _record_linear(gradient, weight, None, None)


def _save_for_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _grad_input_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    gradient, weight = ctx.saved_tensors
    of_gradient = linear(upstream, weight, None, gradient.dtype) if ctx.needs_input_grad[0] else None
    of_weight = linear_grad_weight(gradient, upstream, weight) if ctx.needs_input_grad[1] else None
    return of_gradient, of_weight


# -- the gradient of the weight ----------------------------------------------------------------------------------------


def _grad_weight(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    flat = gradient.reshape(-1, gradient.shape[-1])
    flat_x = x.reshape(-1, x.shape[-1]).to(gradient.dtype).conj()

    def fill(part: Tensor, begin: int, end: int) -> None:
        part.copy_(flat[:, begin:end].t() @ flat_x)

    held = hold_arguments((gradient, x), None)
    try:
        return make_gradient(weight, row_tiles, fill)
    finally:
        if held is not None:
            held.release()


def _fake_grad_weight(gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(weight)


def _record_grad_weight(gradient: Tensor, x: Tensor, weight: Tensor) -> None:
    """A run on fake tensors has no backward."""


def _save_for_grad_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:2])


def _grad_weight_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    gradient, x = ctx.saved_tensors
    of_gradient = linear(x, upstream, None, gradient.dtype) if ctx.needs_input_grad[0] else None
    of_input = linear_grad_input(gradient, upstream).to(x.dtype) if ctx.needs_input_grad[1] else None
    return of_gradient, of_input, None


# -- registration ------------------------------------------------------------------------------------------------------

linear = define(
    "linear(Tensor input, Tensor weight, Tensor? bias=None, ScalarType? dtype=None) -> Tensor",
    _linear,
    _fake_linear,
    setup_context=_save_for_linear,
    backward=_linear_backward,
    record=_record_linear,
)
rule_for_autocast(linear, 3)
linear_grad_input = define(
    "linear_grad_input(Tensor gradient, Tensor weight) -> Tensor",
    _grad_input,
    _fake_grad_input,
    setup_context=_save_for_grad_input,
    backward=_grad_input_backward,
    record=_record_grad_input,
)
linear_grad_weight = define(
    "linear_grad_weight(Tensor gradient, Tensor input, Tensor weight) -> Tensor",
    _grad_weight,
    _fake_grad_weight,
    setup_context=_save_for_grad_weight,
    backward=_grad_weight_backward,
    record=_record_grad_weight,
)


def _translate(input: Any, weight: Any, bias: Any = None) -> tuple[Any, ...] | None:  # noqa: A002
    """F.linear's arguments, where the weight can't be held at all and forward gives the same bits."""
    backing = weight._tp_backing if type(weight) is PagedTensor else None
    if backing is None or not streams_by_itself(backing.core, span_of(weight), weight.dtype):
        return None
    autocast = torch.is_autocast_enabled(weight.device.type)
    try:
        _check(input, weight, bias, weight.dtype if autocast else None)
    except (TypeError, ValueError):
        return None  # torch's own message
    return input, weight, bias


instead_of(torch.nn.functional.linear, linear, _translate, _record_linear)
