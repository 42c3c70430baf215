# SPDX-License-Identifier: Apache-2.0
"""`torch.ops.tensorpager.embedding(indices, weight, padding_idx=None, scale_grad_by_freq=False, sparse=False)`: rows
of a paged table, of which only the pages that hold those rows are brought in.

    indices: any shape, int32 or int64, weight: [rows, columns]
    returns [*indices.shape, columns], what torch.nn.functional.embedding returns, bit for bit

Each page is read once, all of them at the same time, as far as half of the budget allows; more pages than that are
gone through in parts. No schedule knows these reads, since only the indices tell which there will be.

Backward needs no row of the table. Its gradient is torch's: dense, as large as the table, or with sparse=True of the
rows that were used. A dense one of a table too large to be held goes to spill, tile by tile (`gradient_places.py`).

torch.nn.functional.embedding of a paged table that is too large to be held is carried out here by itself, without
max_norm, which writes to the table.

Raises ValueError and TypeError for what does not fit together and IndexError for an index out of range, before anything
is read; what `Sweep` raises.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tensorpager.gradient_places import make_gradient
from tensorpager.op_library import define, instead_of
from tensorpager.paged_tensor import Backing, PagedTensor, hold_arguments
from tensorpager.streaming import Rows, Sweep, backing_of, page_sets, refuse_device_backward, row_tiles, rows_of

__all__ = ["embedding", "embedding_grad_weight"]

Tensor = torch.Tensor
Pages = npt.NDArray[np.int64]


def _check(indices: Tensor, weight: Tensor, padding_idx: int | None) -> None:
    if len(weight.shape[:-1]) != 1:
        msg = f"embedding: weight {tuple(weight.shape)} must be [rows, columns]"
        raise ValueError(msg)
    if indices.dtype not in (torch.int32, torch.int64):
        msg = f"embedding: indices are {indices.dtype}; they must be int32 or int64"
        raise TypeError(msg)
    if indices.device != weight.device:
        msg = f"embedding: indices are on {indices.device} and weight on {weight.device}"
        raise ValueError(msg)
    if padding_idx is not None and not -weight.shape[0] <= padding_idx < weight.shape[0]:
        msg = f"embedding: padding_idx {padding_idx} is none of the {weight.shape[0]} rows"
        raise ValueError(msg)


def _check_range(indices: Tensor, weight: Tensor) -> None:
    least, most = (int(value) for value in torch.aminmax(indices))
    if least < 0 or most >= weight.shape[0]:
        msg = f"embedding: index {least if least < 0 else most} is out of range; the table has {weight.shape[0]} rows"
        raise IndexError(msg)


def _embedding(
    indices: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,  # noqa: ARG001 (for backward)
    sparse: bool = False,  # noqa: ARG001
) -> Tensor:
    _check(indices, weight, padding_idx)
    held = hold_arguments((indices,), None)
    try:
        if indices.numel() > 0 and weight.numel() > 0:
            _check_range(indices, weight)
            backing = backing_of(weight)
            if backing is not None and not backing.in_window():
                return _look_up(indices, weight, backing)
        return torch.embedding(weight, indices)
    finally:
        if held is not None:
            held.release()


def _look_up(indices: Tensor, weight: Tensor, backing: Backing) -> Tensor:
    named, place = torch.unique(indices.cpu().long(), return_inverse=True)
    rows, core = rows_of(weight), backing.core
    parts = _parts(rows, named.numpy(), core.page_bytes, max(1, core.pinnable_page_count // 4))
    sets = [
        [page_sets(core, page * core.page_bytes, 1, backing.name)[0] for page in pages.tolist()] for _, pages in parts
    ]
    found = weight.new_empty((len(named), weight.shape[1]))
    with Sweep(backing, sets, steps=False) as sweep:
        for position in sweep:
            begin, end = parts[position][0]
            if len(parts) == 1:
                return torch.embedding(weight, indices)
            found[begin:end] = torch.embedding(weight, named[begin:end].to(weight.device))
    return found[place.to(weight.device)]


def _parts(rows: Rows, named: Pages, page_bytes: int, page_count_max: int) -> list[tuple[tuple[int, int], Pages]]:
    """Ascending row numbers, cut so that each part lies in few enough pages: (begin, end) in `named`, and its pages.

    A row that lies in more pages than that is a part of its own.
    """
    start = rows.first + named * rows.stride_bytes
    first, last = start // page_bytes, (start + rows.row_bytes - 1) // page_bytes
    counts = last - first + 1
    pages = np.repeat(first, counts) + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    unique = np.unique(pages)
    if len(unique) <= page_count_max:
        return [((0, len(named)), unique)]
    parts = []
    begin = 0
    while begin < len(named):
        if rows.apart:  # then pages ascend with the rows, and those up to the limit are found at once
            limit = unique[min(np.searchsorted(unique, first[begin]) + page_count_max, len(unique)) - 1]
            end = max(begin + 1, int(np.searchsorted(last, limit, side="right")))
        else:
            end = begin + 1
        offset, stop = int(counts[:begin].sum()), int(counts[:end].sum())
        parts.append(((begin, end), np.unique(pages[offset:stop])))
        begin = end
    return parts


def _fake_embedding(
    indices: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,  # noqa: ARG001
    sparse: bool = False,  # noqa: ARG001
) -> Tensor:
    _check(indices, weight, padding_idx)
    return weight.new_empty((*indices.shape, weight.shape[1]))


def _record_nothing(*_: Any, **__: Any) -> None:
    """Which pages there will be only the indices tell."""


def _save_for_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    indices, weight, padding_idx, scale_grad_by_freq, sparse = inputs
    refuse_device_backward(weight)
    ctx.save_for_backward(indices)
    ctx.weight = weight  # for its shape, and what pages it; its values may change meanwhile
    count = weight.shape[0]
    ctx.options = (-1 if padding_idx is None else padding_idx % count, scale_grad_by_freq, sparse)


def _embedding_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    weight = ctx.weight
    padding_idx, scale_grad_by_freq, sparse = ctx.options
    if sparse:
        made = torch.ops.aten.embedding_backward(
            gradient, indices, weight.shape[0], padding_idx, scale_grad_by_freq, sparse
        )
    else:
        made = embedding_grad_weight(gradient, indices, weight, padding_idx, scale_grad_by_freq)
    return None, made, None, None, None


# -- the gradient of the table -----------------------------------------------------------------------------------------


def _grad_weight(
    gradient: Tensor,
    indices: Tensor,
    weight: Tensor,
    padding_idx: int,
    scale_grad_by_freq: bool,
) -> Tensor:
    flat, named = gradient.reshape(-1, gradient.shape[-1]), indices.reshape(-1)

    def fill(part: Tensor, begin: int, end: int) -> None:
        here = slice(None) if end - begin == weight.shape[0] else (named >= begin) & (named < end)
        padding = padding_idx - begin if begin <= padding_idx < end else -1
        part.copy_(
            torch.ops.aten.embedding_dense_backward(
                flat[here], named[here] - begin, end - begin, padding, scale_grad_by_freq
            )
        )

    held = hold_arguments((gradient, indices), None)
    try:
        return make_gradient(weight, row_tiles, fill)
    finally:
        if held is not None:
            held.release()


def _fake_grad_weight(gradient: Tensor, indices: Tensor, weight: Tensor, *_options: Any) -> Tensor:  # noqa: ARG001
    return torch.empty_like(weight)


def _save_for_grad_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, indices, _, padding_idx, scale_grad_by_freq = inputs
    if scale_grad_by_freq:
        msg = "embedding: there is no second derivative with scale_grad_by_freq, as in torch"
        raise NotImplementedError(msg)
    ctx.save_for_backward(indices)
    ctx.padding_idx = padding_idx


def _grad_weight_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    looked_up = embedding(indices, upstream)
    if ctx.padding_idx >= 0:
        looked_up = looked_up.masked_fill((indices == ctx.padding_idx).unsqueeze(-1), 0)
    return looked_up, None, None, None, None


# -- registration ------------------------------------------------------------------------------------------------------

embedding = define(
    "embedding(Tensor indices, Tensor weight, int? padding_idx=None, bool scale_grad_by_freq=False, "
    "bool sparse=False) -> Tensor",
    _embedding,
    _fake_embedding,
    setup_context=_save_for_embedding,
    backward=_embedding_backward,
    record=_record_nothing,
)
embedding_grad_weight = define(
    "embedding_grad_weight(Tensor gradient, Tensor indices, Tensor weight, int padding_idx, bool scale_grad_by_freq) "
    "-> Tensor",
    _grad_weight,
    _fake_grad_weight,
    setup_context=_save_for_grad_weight,
    backward=_grad_weight_backward,
    record=_record_nothing,
)


def _translate(
    input: Any,  # noqa: A002
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: float = 2.0,  # noqa: ARG001
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[Any, ...] | None:
    """F.embedding's arguments, unless the table is written to, or torch would refuse them."""
    if type(weight) is not PagedTensor or weight._tp_backing is None or max_norm is not None:
        return None
    try:
        _check(input, weight, padding_idx)
    except (TypeError, ValueError):
        return None
    return input, weight, padding_idx, scale_grad_by_freq, sparse


instead_of(torch.nn.functional.embedding, embedding, _translate, _record_nothing)
