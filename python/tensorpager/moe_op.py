# SPDX-License-Identifier: Apache-2.0
"""`torch.ops.tensorpager.moe_linear(input, weight, expert_ids, dtype=None)`: each row through the linear layer of its
own expert, where only the experts that have rows are brought in.

    input: [rows, in], weight: [experts, out, in], any strides, expert_ids: [rows], int32 or int64, in any order
    dtype: what to compute in, as for `linear`
    returns [rows, out]

An expert is computed while the next one arrives, in ascending order of their numbers. The result is, bit for bit, that
of a loop that runs torch.nn.functional.linear(input[expert_ids == e], weight[e]) over them; an expert larger than half
of the budget is multiplied tile by tile, as `linear` does. A row whose id is the number of experts belongs to none, as
expert parallelism marks those of other ranks; its result is zero. For weights as [experts, in, out] give
weight.transpose(1, 2).

Which experts there will be only the ids tell, so they are in no schedule: read when they are named, and kept, those
used last, where the schedule leaves frames. As steps of recorded passes, so that a schedule would expect those of the
pass before, 1.5 times the bytes were read (eight experts, two of them a token, a budget of 41 % of the model).

The gradient of the weight is dense, zero for experts without rows; one too large to be held goes to spill, expert by
expert. Raises ValueError, TypeError and IndexError before anything is read; what `Sweep` raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tensorpager.gradient_places import make_gradient
from tensorpager.op_library import define, may_convert, rule_for_autocast
from tensorpager.paged_tensor import Backing, hold_arguments, span_of
from tensorpager.streaming import Rows, Sweep, backing_of, is_too_large, refuse_device_backward, row_tiles, rows_of

__all__ = ["moe_linear", "moe_linear_grad_input", "moe_linear_grad_weight"]

Tensor = torch.Tensor
Dtype = torch.dtype | None


def _check(name: str, x: Tensor, weight: Tensor, expert_ids: Tensor, dtype: Dtype, input_dim: int) -> None:
    fits = (weight.dim(), x.dim()) == (3, 2) and x.shape[1] == weight.shape[input_dim]
    if not fits or tuple(expert_ids.shape) != (x.shape[0],):
        msg = (
            f"{name}: input {tuple(x.shape)}, weight {tuple(weight.shape)} and expert_ids "
            f"{tuple(expert_ids.shape)} don't fit together; they are [rows, in], [experts, out, in] and [rows]"
        )
        raise ValueError(msg)
    if expert_ids.dtype not in (torch.int32, torch.int64):
        msg = f"{name}: expert_ids are {expert_ids.dtype}; they must be int32 or int64"
        raise TypeError(msg)
    if not x.device == weight.device == expert_ids.device:
        msg = f"{name}: x, weight and expert_ids are on {x.device}, {weight.device} and {expert_ids.device}"
        raise ValueError(msg)
    if dtype is None and x.dtype != weight.dtype:
        msg = f"{name}: input is {x.dtype} and weight {weight.dtype}; convert one, or give dtype="
        raise TypeError(msg)
    if dtype is not None and not may_convert(dtype, x.dtype, weight.dtype):
        msg = f"{name}: dtype= converts floating-point numbers, not {x.dtype} and {weight.dtype} to {dtype}"
        raise TypeError(msg)


class _Routes(NamedTuple):
    """Which rows go where: those of experts[i] are order[begin..end-1] with (begin, end) = bounds[i]."""

    order: Tensor | None  # None: the rows are in the order of their experts already
    experts: list[int]
    bounds: list[tuple[int, int]]

    def sorted(self, rows: Tensor) -> Tensor:
        return rows.contiguous() if self.order is None else rows[self.order]

    def unsorted(self, rows: Tensor) -> Tensor:
        return rows if self.order is None else torch.empty_like(rows).index_copy_(0, self.order, rows)


def _routes(name: str, expert_ids: Tensor, expert_count: int) -> _Routes:
    """IndexError for an id that is negative or beyond the number of experts."""
    if expert_ids.numel() == 0:
        return _Routes(None, [], [])
    ids, order = torch.sort(expert_ids.cpu().long(), stable=True)
    if int(ids[0]) < 0 or int(ids[-1]) > expert_count:
        wrong = int(ids[0]) if int(ids[0]) < 0 else int(ids[-1])
        msg = (
            f"{name}: expert {wrong} is out of range; there are {expert_count} ({expert_count} itself marks no expert)"
        )
        raise IndexError(msg)
    experts, counts = (each.tolist() for each in torch.unique_consecutive(ids, return_counts=True))
    ends = torch.tensor(counts).cumsum(0).tolist()
    if experts[-1] == expert_count:
        experts, counts, ends = experts[:-1], counts[:-1], ends[:-1]
    in_order = bool((order[1:] > order[:-1]).all())
    bounds = [(end - count, end) for count, end in zip(counts, ends, strict=True)]
    return _Routes(None if in_order else order.to(expert_ids.device), experts, bounds)


class _Tile(NamedTuple):
    expert: int
    begin: int
    end: int
    rows: tuple[int, int]  # of the input, sorted


def _tiles(weight: Tensor, routes: _Routes, backing: Backing | None) -> list[_Tile]:
    tiles = []
    for expert, bounds in zip(routes.experts, routes.bounds, strict=True):
        cuts = [(0, weight.shape[1])]
        if backing is not None and is_too_large(backing.core, span_of(weight[expert])):
            rows = rows_of(weight[expert])
            cuts = row_tiles(rows, backing.core) if rows.apart else cuts
        tiles += [_Tile(expert, begin, end, bounds) for begin, end in cuts]
    return tiles


def _for_each_tile(weight: Tensor, routes: _Routes, work: Callable[[_Tile], None]) -> None:
    """`work` while the tile is held, in the order of the experts; of ordinary weights, and those that the open module
    holds, a whole expert at a time.
    """
    backing = backing_of(weight) if weight.numel() > 0 else None
    if backing is None or backing.in_window():
        for tile in _tiles(weight, routes, None):
            work(tile)
        return
    tiles, sets = _tiles(weight, routes, backing), []
    for tile in tiles:
        span = rows_of(weight[tile.expert]).span(tile.begin, tile.end)
        sets.append([backing.core.add_set([span], f"{backing.name}[{tile.expert}]")])
    with Sweep(backing, sets, steps=False) as sweep:
        for position in sweep:
            work(tiles[position])


def _moe_linear(x: Tensor, weight: Tensor, expert_ids: Tensor, dtype: Dtype = None) -> Tensor:
    _check("moe_linear", x, weight, expert_ids, dtype, 2)
    held = hold_arguments((x, expert_ids), None)
    try:
        routes = _routes("moe_linear", expert_ids, weight.shape[0])
        x = routes.sorted(x).to(dtype or x.dtype)
        output = x.new_zeros((x.shape[0], weight.shape[1]))

        def multiply(tile: _Tile) -> None:
            begin, end = tile.rows
            part = weight[tile.expert, tile.begin : tile.end].to(x.dtype)
            output[begin:end, tile.begin : tile.end] = torch.nn.functional.linear(x[begin:end], part)

        _for_each_tile(weight, routes, multiply)
        return routes.unsorted(output)
    finally:
        if held is not None:
            held.release()


def _fake_moe_linear(x: Tensor, weight: Tensor, expert_ids: Tensor, dtype: Dtype = None) -> Tensor:
    _check("moe_linear", x, weight, expert_ids, dtype, 2)
    return x.new_empty((x.shape[0], weight.shape[1]), dtype=dtype or x.dtype)


def _record_nothing(*_: Any, **__: Any) -> None:
    """Which experts there will be only the ids tell."""


def _save_for_moe_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, weight, expert_ids, _ = inputs
    refuse_device_backward(weight)
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None, expert_ids)
    ctx.weight = weight  # of which its gradient needs to know what pages it, but not the values
    ctx.input_dtype = x.dtype


def _moe_linear_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    x, weight, expert_ids = ctx.saved_tensors
    of_input = of_weight = None
    if ctx.needs_input_grad[0]:
        of_input = moe_linear_grad_input(gradient, weight, expert_ids).to(ctx.input_dtype)
    if ctx.needs_input_grad[1]:
        of_weight = moe_linear_grad_weight(gradient, x, ctx.weight, expert_ids)
    return of_input, of_weight, None, None


# -- the gradient of the input -----------------------------------------------------------------------------------------


def _grad_input(gradient: Tensor, weight: Tensor, expert_ids: Tensor) -> Tensor:
    _check("moe_linear_grad_input", gradient, weight, expert_ids, gradient.dtype, 1)
    held = hold_arguments((gradient, expert_ids), None)
    try:
        routes = _routes("moe_linear_grad_input", expert_ids, weight.shape[0])
        g = routes.sorted(gradient)
        total = g.new_zeros((g.shape[0], weight.shape[2]))

        def multiply(tile: _Tile) -> None:
            begin, end = tile.rows
            part = weight[tile.expert, tile.begin : tile.end].to(g.dtype).conj()
            total[begin:end] += g[begin:end, tile.begin : tile.end] @ part

        _for_each_tile(weight, routes, multiply)
        return routes.unsorted(total)
    finally:
        if held is not None:
            held.release()


def _fake_grad_input(gradient: Tensor, weight: Tensor, expert_ids: Tensor) -> Tensor:  # noqa: ARG001
    return gradient.new_empty((gradient.shape[0], weight.shape[2]))


def _save_for_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _grad_input_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    gradient, weight, expert_ids = ctx.saved_tensors
    of_gradient = of_weight = None
    if ctx.needs_input_grad[0]:
        of_gradient = moe_linear(upstream, weight, expert_ids, gradient.dtype)
    if ctx.needs_input_grad[1]:
        of_weight = moe_linear_grad_weight(gradient, upstream, weight, expert_ids)
    return of_gradient, of_weight, None


# -- the gradient of the weight ----------------------------------------------------------------------------------------


def _each_expert(rows: Rows, _core: object) -> list[tuple[int, int]]:
    return [(expert, expert + 1) for expert in range(rows.row_count)]


def _grad_weight(gradient: Tensor, x: Tensor, weight: Tensor, expert_ids: Tensor) -> Tensor:
    held = hold_arguments((gradient, x, expert_ids), None)
    try:
        routes = _routes("moe_linear_grad_weight", expert_ids, weight.shape[0])
        g, x = routes.sorted(gradient), routes.sorted(x).to(gradient.dtype).conj()
        rows_of_expert = dict(zip(routes.experts, routes.bounds, strict=True))

        def fill(part: Tensor, first: int, last: int) -> None:
            for expert in range(first, last):
                begin, end = rows_of_expert.get(expert, (0, 0))
                if begin == end:
                    part[expert - first].zero_()
                else:
                    part[expert - first].copy_(g[begin:end].t() @ x[begin:end])

        return make_gradient(weight, _each_expert, fill)
    finally:
        if held is not None:
            held.release()


def _fake_grad_weight(gradient: Tensor, x: Tensor, weight: Tensor, expert_ids: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(weight)


def _save_for_grad_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    gradient, x, _, expert_ids = inputs
    ctx.save_for_backward(gradient, x, expert_ids)


def _grad_weight_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    gradient, x, expert_ids = ctx.saved_tensors
    of_gradient = of_input = None
    if ctx.needs_input_grad[0]:
        of_gradient = moe_linear(x, upstream, expert_ids, gradient.dtype)
    if ctx.needs_input_grad[1]:
        of_input = moe_linear_grad_input(gradient, upstream, expert_ids).to(x.dtype)
    return of_gradient, of_input, None, None


# -- registration ------------------------------------------------------------------------------------------------------

moe_linear = define(
    "moe_linear(Tensor input, Tensor weight, Tensor expert_ids, ScalarType? dtype=None) -> Tensor",
    _moe_linear,
    _fake_moe_linear,
    setup_context=_save_for_moe_linear,
    backward=_moe_linear_backward,
    record=_record_nothing,
)
rule_for_autocast(moe_linear, 3)
moe_linear_grad_input = define(
    "moe_linear_grad_input(Tensor gradient, Tensor weight, Tensor expert_ids) -> Tensor",
    _grad_input,
    _fake_grad_input,
    setup_context=_save_for_grad_input,
    backward=_grad_input_backward,
    record=_record_nothing,
)
moe_linear_grad_weight = define(
    "moe_linear_grad_weight(Tensor gradient, Tensor input, Tensor weight, Tensor expert_ids) -> Tensor",
    _grad_weight,
    _fake_grad_weight,
    setup_context=_save_for_grad_weight,
    backward=_grad_weight_backward,
    record=_record_nothing,
)
