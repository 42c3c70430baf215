# SPDX-License-Identifier: Apache-2.0
"""The keys and values of one layer, in pages: a layer of a transformers `Cache`.

[Note: records]
A layer has one region of addresses, far more than it may ever fill, which costs nothing. Token t is record t of it: the
keys of all rows of the batch, then their values. Attention gets views over all records, [batch, heads, tokens, size]
with the strides of that order: what it reads lies where it was written, and nothing is copied. A new token changes the
last page alone, and a block of tokens is one range of bytes. The kernels give the same bits as for tensors that are
contiguous (tests/test_kv_layer.py goes through shapes, types and kinds of attention) as long as every row starts at a
multiple of 16 bytes; heads of other sizes get contiguous copies.

Sliding windows are the same records: the view begins later and later, and pages before it are discarded.

[Note: rows that move]
Beam search lets rows go on from one another after each token. Rows move when attention comes to the layer the next time
and has its pages anyway, and a page is written to only if its bits change: beams share most of their past.

Threads: one at a time. Blocking: whatever looks at keys or values may wait for the drive.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from tensorpager.device import stream_getter
from tensorpager.errors import PagedTensorError
from tensorpager.fake_pass import is_copying
from tensorpager.paged_tensor import Backing, PagedTensor, make_paged, ordinary_copy
from tensorpager.spill import tensor_at

try:
    from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
except ImportError as error:
    message = "a KV cache needs transformers 4.57 or newer, whose caches are made of layers"
    raise ImportError(message) from error

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core
    from tensorpager.kv_sweep import Sweep

__all__ = ["PagedLayer", "RecordForm", "RecordSpace"]

#: Vector kernels, and MKL's choice among them, look at addresses modulo this.
_ROW_ALIGN_BYTES = 16
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RecordSpace:
    """Regions of addresses for records. What was given back is taken first: an address space only ever grows."""

    def __init__(self, core: Core, max_tokens: int) -> None:
        self.core = core
        self.max_tokens = max_tokens
        on_host = stream_getter(core) is None
        self.device = torch.device("cpu") if on_host else torch.device("cuda", core.device)
        self._free: list[tuple[int, int]] = []  # (size in bytes, address)

    def take(self, size_bytes: int) -> tuple[int, int]:
        """(address, size in bytes) of a region of that size or more, zero where nobody has written. MemoryMapError."""
        fitting = [region for region in self._free if region[0] >= size_bytes]
        if fitting:
            best = min(fitting)
            self._free.remove(best)
            return best[1], best[0]
        region = self.core.map_spill(size_bytes)
        return region.address, region.size_bytes

    def give_back(self, address: int, size_bytes: int) -> None:
        """Nobody wants what is there, nor looks at it any more."""
        self.core.discard(address, size_bytes)
        self._free.append((size_bytes, address))


@dataclass(frozen=True)
class RecordForm:
    """What a record is made of: keys of all rows, [batch, heads, size], then values, each from a multiple of 16 bytes.

    Under autocast keys and values may be of different dtypes.
    """

    batch: int
    key_heads: int
    key_size: int
    key_dtype: torch.dtype
    value_heads: int
    value_size: int
    value_dtype: torch.dtype

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> RecordForm:
        """Of keys and values [batch, heads, tokens, size]. PagedTensorError."""
        of_four = keys.dim() == values.dim() == len(("batch", "heads", "tokens", "size"))
        if not of_four or keys.shape[0] != values.shape[0] or keys.shape[2] != values.shape[2]:
            msg = (
                "a paged layer keeps keys and values as [batch, heads, tokens, size] of the same tokens, not "
                f"{list(keys.shape)} and {list(values.shape)}"
            )
            raise PagedTensorError(msg)
        return cls(
            keys.shape[0], keys.shape[1], keys.shape[3], keys.dtype, values.shape[1], values.shape[3], values.dtype
        )

    @property
    def values_at_bytes(self) -> int:
        """Where the values begin in a record."""
        return _aligned(self.batch * self.key_heads * self.key_size * self.key_dtype.itemsize)

    @property
    def size_bytes(self) -> int:
        """Of a record."""
        values_bytes = self.batch * self.value_heads * self.value_size * self.value_dtype.itemsize
        return self.values_at_bytes + _aligned(values_bytes)

    @property
    def row_bytes(self) -> int:
        """What a row's keys and values take, without what lies between them in a record."""
        keys_bytes = self.key_heads * self.key_size * self.key_dtype.itemsize
        return keys_bytes + self.value_heads * self.value_size * self.value_dtype.itemsize

    @property
    def is_aligned(self) -> bool:
        """Whether every head's row starts at a multiple of 16 bytes."""
        sizes = (self.key_size * self.key_dtype.itemsize, self.value_size * self.value_dtype.itemsize)
        return all(size % _ROW_ALIGN_BYTES == 0 for size in sizes)

    def views(self, core: Core, address: int, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and all values of so many records, [batch, heads, capacity, size]. Reads nothing."""
        made = []
        for offset, heads, size, dtype in (
            (0, self.key_heads, self.key_size, self.key_dtype),
            (self.values_at_bytes, self.value_heads, self.value_size, self.value_dtype),
        ):
            shape = (self.batch, heads, capacity, size)
            strides = (heads * size, size, self.size_bytes // dtype.itemsize, 1)
            made.append(tensor_at(core, address + offset, shape, strides, dtype))
        return made[0], made[1]


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ROW_ALIGN_BYTES) * _ROW_ALIGN_BYTES


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """See the head of the file. number: of the layer in the order of a pass. sliding_window: tokens, or None."""

    is_compileable = False
    is_croppable = True

    def __init__(self, space: RecordSpace, sweep: Sweep, number: int, sliding_window: int | None = None) -> None:
        # Not that of the base class, which sets keys and values.
        self._space = space
        self._sweep = sweep
        self._track = sweep.track(number, f"layer {number} of a KV cache")
        self._form: RecordForm | None = None
        self._region = (0, 0)  # address, size in bytes
        self._backing = Backing(space.core, self._track.window.name)
        self._backing.windows.append(self._track.window)
        self._paged: tuple[PagedTensor, ...] = ()  # keys and values of all records that there are addresses for
        self._plain: tuple[torch.Tensor, ...] = ()  # the same, without a guard
        self._rows: torch.Tensor | None = None  # which row each row is to be: [Note: rows that move]
        self._length = 0  # tokens seen
        self._origin = 0  # the token of record 0
        self._dropped_pages = 0  # at the region's start, of tokens that a sliding window is past
        self.is_initialized = False
        self.is_sliding = sliding_window is not None
        self.sliding_window = sliding_window
        self.record_past = False
        #: Tokens from this one on are kept even where a sliding window is past them: they are still to be saved.
        self.kept_from: int | None = None

    def __repr__(self) -> str:
        kind = f", window of {self.sliding_window}" if self.is_sliding else ""
        return f"PagedLayer({self._length} tokens{kind})"

    # -- what attention calls

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take addresses for tensors of this form. PagedTensorError; MemoryMapError, ClosedError."""
        form = RecordForm.of(key_states, value_states)
        if key_states.device != self._space.device:
            msg = f"this KV cache is paged on {self._space.device}, and was given keys on {key_states.device}"
            raise PagedTensorError(msg)
        if form != self._form:
            self._place(form, self._tokens_wanted(key_states.shape[2]))
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens, [batch, heads, tokens, size], and give all keys and values that attention is to see.

        Views of the pages, which are held until the next layer is entered. PagedTensorError for tensors of another form
        and for such that require gradients; BudgetError on a device when the layer does not fit; IoError, ClosedError.
        """
        states = (key_states, value_states)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            msg = "keys and values that are paged keep no gradients: generate under torch.no_grad(), as generate() does"
            raise PagedTensorError(msg)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        form = RecordForm.of(key_states, value_states)
        if form != self._form:
            msg = f"the layer holds {self._form}, and was given {form}: use one cache for one batch, or reset() it"
            raise PagedTensorError(msg)
        count = key_states.shape[2]
        self._make_room(count)
        first = self._first
        self._enter(count)
        at = self._length - self._origin
        # On the host a first write traps, and is seen; on a device the guard has to see it.
        for tensor, new in zip(self._paged if self._track.window.on_device else self._plain, states, strict=True):
            tensor[:, :, at : at + count].copy_(new)
        self._length += count
        self._track.end = self._length - self._origin
        return self._view(first)

    @property
    def keys(self) -> torch.Tensor | None:
        """[batch, heads, tokens, size], a view of the pages, or None before the first update(). Waits for them."""
        return None if not self.is_initialized else self._seen()[0]

    @property
    def values(self) -> torch.Tensor | None:
        """As keys."""
        return None if not self.is_initialized else self._seen()[1]

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(keys that a query of this many tokens sees, the token of the first of them). Before transformers 5: a tensor
        with their places."""
        count = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        return self._length - self._first + count, self._first

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self._length

    def get_max_length(self) -> int:
        """The window's, or -1: none."""
        return -1 if self.sliding_window is None else self.sliding_window

    get_max_cache_shape = get_max_length  # before transformers 5

    # -- what generate() calls

    def activate_past_recording(self) -> None:
        """Keep what a sliding window is past until crop() is called."""
        self.record_past = self.is_sliding

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last -tokens_to_remove tokens back; a positive number, as before transformers 5, says how many are
        left. RuntimeError when a window has forgotten what would come into it again."""
        if not self.is_initialized:
            return
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self._length)
        window = self.sliding_window
        if tokens_to_remove < 0 and window is not None and self._length >= window and not self.record_past:
            msg = "the window is past tokens that would come back: call activate_past_recording() before crop()"
            raise RuntimeError(msg)
        length = max(0, self._length + tokens_to_remove)
        first = 0 if window is None else max(0, length - window + 1)
        page_bytes = self._space.core.page_bytes
        if (first - self._origin) * self.record_bytes < self._dropped_pages * page_bytes:
            msg = f"crop({tokens_to_remove}) would bring tokens back into the window that have been discarded"
            raise RuntimeError(msg)
        self._sweep.leave()
        self._length = length
        self._track.end = self._length - self._origin
        self._track.first = self._first - self._origin
        used = -(-self._track.end * self._track.record_bytes // page_bytes) * page_bytes
        address, size_bytes = self._region
        if tokens_to_remove < 0 and used < size_bytes:
            self._space.core.discard(address + used, size_bytes - used)
        self._drop_past()

    def reset(self) -> None:
        """Forget all tokens. The next ones may be of another form."""
        self._sweep.leave()
        self.is_initialized = False
        self._rows = None
        self._length = self._origin = self._dropped_pages = 0
        self.kept_from = None if self.kept_from is None else 0
        self._track.first = self._track.end = 0
        if self._region[1] > 0:
            self._space.core.discard(*self._region)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i is to be what row beam_idx[i] is."""
        if self.is_initialized:
            self._rows = beam_idx.to(self.device) if self._rows is None else self._rows[beam_idx.to(self.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times. Moves all there is."""
        if self.is_initialized:
            assert self._form is not None
            self._take_rows(torch.arange(self._form.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, by number or by a mask. Moves all there is."""
        if self.is_initialized:
            assert self._form is not None
            self._take_rows(torch.arange(self._form.batch)[indices.cpu()])

    def offload(self) -> None:
        """Nothing: pages leave by themselves."""

    def prefetch(self) -> None:
        """Nothing: pages come by themselves."""

    # -- what is stored elsewhere

    @property
    def form(self) -> RecordForm | None:
        """What a token's record is made of; None before the first update()."""
        return self._form

    def begin_restore(self, form: RecordForm, first: int, end: int) -> None:
        """Be a layer that has seen `end` tokens, of which those from `first` on are about to be written by records().

        first: 0, or what a sliding window is past. MemoryMapError, ClosedError.
        """
        self.reset()
        self._place(form, max(self._tokens_wanted(end - first), end - first))
        self.dtype, self.device = form.key_dtype, self._space.device
        self._origin, self._length = first, end
        self._track.first, self._track.end = self._first - first, end - first
        self.is_initialized = True

    def records(self, row: int, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [heads, end - begin, size] of a row's tokens begin .. end - 1: views of the pages, which come
        in as they are used. Rows that are to move have to have moved (settle())."""
        span = slice(begin - self._origin, end - self._origin)
        keys, values = (tensor[row, :, span] for tensor in self._paged)
        return keys, values

    def settle(self) -> None:
        """Move rows now that are to move."""
        if self._rows is not None:
            self._seen()
            self._sweep.leave()

    def saved_until(self, end: int) -> None:
        """Tokens before this one need not be kept for anybody but attention."""
        if self.kept_from is not None and end > self.kept_from:
            self.kept_from = end
            self._drop_past()

    # -- an ordinary copy

    def ordinary(self) -> Any:
        """transformers' own layer with the same tokens in plain memory; while a model is copied to be traced, of the
        same shapes on fake tensors, and nothing is read."""
        layer: Any = DynamicLayer() if self.sliding_window is None else DynamicSlidingWindowLayer(self.sliding_window)
        if self.is_sliding:
            layer.record_past = self.record_past
        if not self.is_initialized:
            return layer
        keys, values = self._shapes() if is_copying() else map(_copied, self._seen())
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if self.is_sliding:
            layer.cumulative_length = self._length
        return layer

    def _shapes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What _seen() gives, with any values: for a time when tensors are fake and take no memory."""
        assert self._form is not None
        form, tokens = self._form, self.tokens_stored
        return (
            torch.empty(form.batch, form.key_heads, tokens, form.key_size, dtype=form.key_dtype, device=self.device),
            torch.empty(
                form.batch, form.value_heads, tokens, form.value_size, dtype=form.value_dtype, device=self.device
            ),
        )

    # -- records

    @property
    def record_bytes(self) -> int:
        """Of one token; 0 before the first update()."""
        return 0 if self._form is None else self._form.size_bytes

    @property
    def stored_from(self) -> int:
        """The first token that is still there."""
        return self._first if self.kept_from is None else min(self._first, max(self.kept_from, self._origin))

    @property
    def tokens_stored(self) -> int:
        """Those that a next query would see."""
        return self._length - self._first

    @property
    def _first(self) -> int:
        """The first token that the next query sees."""
        return 0 if self.sliding_window is None else max(0, self._length - self.sliding_window + 1)

    def _view(self, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._form is not None
        begin, end = first - self._origin, self._length - self._origin
        keys, values = (self._guarded(tensor[:, :, begin:end]) for tensor in self._plain)
        return (keys, values) if self._form.is_aligned else (keys.contiguous(), values.contiguous())

    def _guarded(self, view: torch.Tensor) -> PagedTensor:
        paged: PagedTensor = view.as_subclass(PagedTensor)
        paged._tp_backing = self._backing
        return paged

    def _seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._rows is not None or not self._sweep.is_at(self._track):
            self._make_room(0)
            self._enter(0)
        return self._view(self._first)

    def _enter(self, added: int) -> None:
        self._track.first = self._first - self._origin
        self._sweep.enter(self._track, added)
        self._move_rows()

    def _move_rows(self) -> None:
        """[Note: rows that move]."""
        rows, self._rows = self._rows, None
        if rows is None or torch.equal(rows, torch.arange(len(rows), device=rows.device)):
            return
        for begin, end in self._pieces():
            for tensor in self._paged:
                bits = tensor.view(_BITS[tensor.element_size()])[:, :, begin:end]
                moved = bits.index_select(0, rows)
                if not torch.equal(bits, moved):
                    bits.copy_(moved)

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """The records there are, those that begin in one page at a time."""
        end, page_bytes = self._length - self._origin, self._space.core.page_bytes
        begin = self.stored_from - self._origin
        while begin < end:
            page = begin * self.record_bytes // page_bytes
            following = -(-(page + 1) * page_bytes // self.record_bytes)
            yield begin, min(following, end)
            begin = following

    def _take_rows(self, rows: torch.Tensor) -> None:
        assert self._form is not None
        self._enter(0)  # rows that are to move do it first
        form = replace(self._form, batch=len(rows))
        self._relocate(form, self._tokens_wanted(0), rows.to(self.device))

    def _tokens_wanted(self, count: int) -> int:
        if self.sliding_window is not None and self.kept_from is None:
            return 4 * self.sliding_window + count
        return max(self._space.max_tokens, 2 * (self._length + count))

    def _make_room(self, count: int) -> None:
        """For so many tokens more; and what a window is past makes room for others."""
        if self._length + count - self._origin > self._track.capacity:
            assert self._form is not None
            self._relocate(self._form, self._tokens_wanted(count), None)
        if not self.record_past:
            self._drop_past()

    def _drop_past(self) -> None:
        """Discard the pages that a sliding window is past."""
        if not self.is_sliding:
            return
        page_bytes = self._space.core.page_bytes
        past = (self.stored_from - self._origin) * self.record_bytes // page_bytes
        if past > self._dropped_pages:
            if self._sweep.is_at(self._track):
                self._sweep.leave()
            begin = self._track.address + self._dropped_pages * page_bytes
            self._space.core.discard(begin, (past - self._dropped_pages) * page_bytes)
            self._dropped_pages = past

    def _relocate(self, form: RecordForm, capacity: int, rows: torch.Tensor | None) -> None:
        """Move what is there to another region, as records of another form, or where more of them have room."""
        self._sweep.leave()
        region, paged, pieces = self._region, self._paged, list(self._pieces())
        first, origin = self.stored_from, self._origin
        self._region = (0, 0)
        self._place(form, capacity)
        self._origin = first
        for begin, end in pieces:
            at = begin + origin - first
            for old, new in zip(paged, self._paged, strict=True):
                part = old[:, :, begin:end]
                new[:, :, at : at + end - begin].copy_(part if rows is None else part.index_select(0, rows))
        self._track.first, self._track.end = self._first - self._origin, self._length - self._origin
        self._space.give_back(*region)

    def _place(self, form: RecordForm, capacity: int) -> None:
        """Records of this form from now on, in a new region. Those of before are given up."""
        if self._region[1] > 0:
            self._sweep.leave()
            self._space.give_back(*self._region)
        self._region = self._space.take(capacity * form.size_bytes)
        self._form = form
        self._origin = self._dropped_pages = 0
        track, core = self._track, self._space.core
        track.address, track.record_bytes = self._region[0], form.size_bytes
        track.capacity = self._region[1] // form.size_bytes
        with torch.inference_mode(False):  # or they could not be written to outside of it
            self._plain = form.views(core, track.address, track.capacity)
            self._paged = tuple(make_paged(tensor, self._backing) for tensor in self._plain)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return (ordinary_copy(tensor) if type(tensor) is PagedTensor else tensor).clone(
        memory_format=torch.contiguous_format
    )
