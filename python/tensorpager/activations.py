# SPDX-License-Identifier: Apache-2.0
"""Activations: what autograd saves for backward, paged when it is more than fits.

Hooks on saved tensors (torch.autograd.graph.saved_tensors_hooks) see each one as it is saved and as backward wants it.
It stays where it is while all of them together are within a share of the budget. Beyond, those saved first, which
backward wants last, are copied to places in the address space, and the plain ones are let go. Backward gets them back
as plain memory, brought in ahead of it in the reverse order. One that has not left is simply handed over.

Values are copied when a tensor leaves, so a tensor that was modified in place since it was saved must not leave: it is
handed over as it is, and the check that autograd itself makes is made here.

Threads: any; one at a time is inside. Blocking: saving and wanting may wait for the drive. On the host only.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Container
from typing import TYPE_CHECKING, Any

import torch

from tensorpager.errors import BudgetError, ClosedError, PagedTensorError
from tensorpager.paged_tensor import PagedTensor
from tensorpager.spill import copy_out
from tensorpager.windows import droppers

if TYPE_CHECKING:
    from typing_extensions import Self

    from tensorpager._core import Pager as Core
    from tensorpager._core import Ticket
    from tensorpager.places import Places

__all__ = ["Activations", "Paging"]

#: Smaller ones stay: masks, means, sums. A page holds 32 of this size, and what is saved is mostly larger.
MOVED_BYTES_MIN = 64 * 2**10

#: Of the budget: so much may stay in memory beside it before anything is paged.
KEPT_SHARE = 1 / 4

#: Storages brought in ahead of backward. Two keep the drive busy while one is used.
_AHEAD = 2

#: One of these may take so much of what can be held: a part of 8 each, beside the modules of backward.
_AHEAD_SHARE = 8


class _Copy:
    """One saved storage: plain, or in a place. Shared by all tensors that were saved of it unmodified."""

    __slots__ = ("__weakref__", "account", "name", "number", "paged", "plain", "storage", "version", "watched")

    def __init__(self, number: int, name: str, watched: torch.Tensor) -> None:
        storage = watched.untyped_storage()
        plain = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
        self.storage = weakref.ref(storage)  # one object for a storage, as long as any tensor has it
        self.number = number  # in the order of saving
        self.name = name
        self.plain: torch.Tensor | None = plain  # 1-D uint8 over the whole storage
        self.paged: PagedTensor | None = None
        self.watched: torch.Tensor | None = watched  # has the version counter of what was saved
        self.version = watched._version
        self.account: _Account | None = None

    @property
    def modified(self) -> bool:
        return self.watched is not None and self.watched._version != self.version


class _Account:
    """Bytes that a _Copy has in each of two sums, which end with it."""

    __slots__ = ("kept_bytes", "paged_bytes")

    def __init__(self) -> None:
        self.kept_bytes = 0
        self.paged_bytes = 0


class _AsItIs:
    """What autograd holds instead of a tensor that may not leave."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.version = None if tensor.is_inference() else tensor._version


class _Saved:
    """What autograd holds instead of a tensor that may leave: its form, over a copy."""

    __slots__ = ("copy", "dtype", "offset", "shape", "strides")

    def __init__(self, tensor: torch.Tensor, copy: _Copy) -> None:
        self.copy = copy
        self.dtype = tensor.dtype
        self.shape = tuple(tensor.shape)
        self.strides = tensor.stride()
        self.offset = tensor.storage_offset()


class Activations:
    """The activations of one pager's model. `places`: for those that leave. `left_alone`: what must not."""

    def __init__(self, core: Core, places: Places, left_alone: Container[torch.Tensor] = ()) -> None:
        self._core = core
        self._places = places
        self._left_alone = left_alone
        self._lock = threading.RLock()
        self._kept_bytes_max = int(core.budget_bytes * KEPT_SHARE)
        self._kept_bytes = 0
        self._paged_bytes = 0
        self._next_number = 0
        self._by_storage: weakref.WeakValueDictionary[tuple[int, int], _Copy] = weakref.WeakValueDictionary()
        self._kept: dict[int, weakref.ref[_Copy]] = {}  # by number: the oldest first
        self._left: dict[int, weakref.ref[_Copy]] = {}  # those that are in places, likewise
        self._tickets: dict[int, Ticket] = {}
        self._names_in_use: set[int] = set()
        self.paged_bytes_max = 0
        self.paged_count = 0
        self.kept_count = 0
        _all_activations.add(self)

    @property
    def paged_bytes(self) -> int:
        """In places now."""
        return self._paged_bytes

    def pack(self, tensor: torch.Tensor) -> Any:
        """For saved_tensors_hooks: what autograd is to hold. Blocks when others have to leave."""
        tensor = tensor.detach()  # an output comes with its node, which would hold itself through us, for ever
        if not self._takes(tensor):
            return _AsItIs(tensor)
        with self._lock:
            storage = tensor.untyped_storage()
            key = (storage.data_ptr(), tensor._version)
            copy = self._by_storage.get(key)
            if copy is None or copy.storage() is not storage:  # one that had the address before
                copy = self._keep(tensor, storage.nbytes(), key)
            self._make_room(copy)
            return _Saved(tensor, copy)

    def unpack(self, saved: Any) -> torch.Tensor:
        """For saved_tensors_hooks: a tensor with the saved values. RuntimeError when they were overwritten."""
        if isinstance(saved, _AsItIs):
            if saved.version is not None:
                _check_version(saved.tensor, saved.version)
            return saved.tensor
        with self._lock:
            copy: _Copy = saved.copy
            if copy.watched is not None:
                _check_version(copy.watched, copy.version)
            if copy.plain is None:
                self._bring_back(copy)
                self._make_room(copy)
            assert copy.plain is not None
            return torch.empty(0, dtype=saved.dtype).set_(
                copy.plain.untyped_storage(), saved.offset, saved.shape, saved.strides
            )

    def _takes(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor may leave: plain memory of some size that is not in the address space already."""
        if type(tensor) is not torch.Tensor or tensor.is_inference():
            return False
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.numel() == 0:
            return False
        size_bytes = tensor.untyped_storage().nbytes()
        # Of a small part of a large storage, the rest may have gone already: all of it would be kept for the part.
        if size_bytes < MOVED_BYTES_MIN or 2 * tensor.numel() * tensor.element_size() < size_bytes:
            return False
        return not self._core.contains(tensor.data_ptr()) and tensor not in self._left_alone

    def _keep(self, tensor: torch.Tensor, size_bytes: int, key: tuple[int, int]) -> _Copy:
        # Names go round, the lowest that is free first: the same places in every step.
        name = next(number for number in range(len(self._names_in_use) + 1) if number not in self._names_in_use)
        copy = _Copy(self._next_number, f"activation {name}", tensor)
        self._next_number += 1
        self._names_in_use.add(name)
        account = copy.account = _Account()
        account.kept_bytes = size_bytes
        self._kept_bytes += account.kept_bytes
        self._by_storage[key] = copy
        self._kept[copy.number] = weakref.ref(copy)
        self.kept_count += 1
        weakref.finalize(copy, self._forget, copy.number, name, account).atexit = False
        return copy

    def _forget(self, number: int, name: int, account: _Account) -> None:
        with self._lock:
            self._kept_bytes -= account.kept_bytes
            self._paged_bytes -= account.paged_bytes
            self._kept.pop(number, None)
            self._left.pop(number, None)
            self._names_in_use.discard(name)
            ticket = self._tickets.pop(number, None)
        if ticket is not None:
            ticket.release()

    def _make_room(self, wanted: _Copy) -> None:
        """Those saved first leave, until the rest is within bounds. `wanted` stays: its like may be saved next."""
        for number in list(self._kept):
            if self._kept_bytes <= self._kept_bytes_max:
                return
            reference = self._kept.get(number)
            copy = None if reference is None else reference()
            if copy is None or copy is wanted or copy.modified:
                continue
            self._page_out(copy)

    def _page_out(self, copy: _Copy) -> None:
        assert copy.plain is not None
        assert copy.account is not None
        size_bytes = copy.plain.numel()
        copy.paged = self._places.copy_in(copy.plain, copy.name)
        copy.plain = copy.watched = None
        self._kept.pop(copy.number, None)
        self._left[copy.number] = weakref.ref(copy)
        self._kept_bytes -= size_bytes
        self._paged_bytes += size_bytes
        copy.account.kept_bytes, copy.account.paged_bytes = 0, size_bytes
        self.paged_bytes_max = max(self.paged_bytes_max, self._paged_bytes)
        self.paged_count += 1
        self.kept_count -= 1

    def _bring_back(self, copy: _Copy) -> None:
        """Backward is about to use it: plain again, and its place free at once."""
        assert copy.paged is not None
        assert copy.account is not None
        ticket = self._tickets.pop(copy.number, None) or self._begin(copy)
        self._begin_before(copy.number)
        self._places.trim(copy.paged.numel())
        try:
            if ticket is not None:
                ticket.wait()
            with torch._C.DisableTorchFunctionSubclass():
                copy.plain = copy_out(self._core, copy.paged.as_subclass(torch.Tensor))
        finally:
            if ticket is not None:
                ticket.release()
        copy.paged = None
        self._left.pop(copy.number, None)
        self._kept[copy.number] = weakref.ref(copy)
        size_bytes = copy.plain.numel()
        self._kept_bytes += size_bytes
        self._paged_bytes -= size_bytes
        copy.account.kept_bytes, copy.account.paged_bytes = size_bytes, 0

    def _begin_before(self, number: int) -> None:
        """Those that were saved before it come next."""
        before = [other for other in self._left if other < number and other not in self._tickets]
        for other in sorted(before, reverse=True)[: max(0, _AHEAD - len(self._tickets))]:
            copy = self._left[other]()
            ticket = None if copy is None else self._begin(copy)
            if ticket is not None:
                self._tickets[other] = ticket

    def _begin(self, copy: _Copy) -> Ticket | None:
        assert copy.paged is not None
        with torch._C.DisableTorchFunctionSubclass():
            ranges = [(copy.paged.data_ptr(), copy.paged.numel())]
        set_id = self._core.add_set(ranges, copy.name)
        if len(self._core.set_pages(set_id)) > self._core.pinnable_page_count // _AHEAD_SHARE:
            return None  # then piece by piece, as it is copied
        try:
            return self._core.prefetch(set_id)
        except BudgetError:  # beside what is held
            return None

    def drop(self) -> bool:
        """Let go of what is brought in ahead: a module needs the room."""
        with self._lock:
            tickets = list(self._tickets.values())
            self._tickets.clear()
        for ticket in tickets:
            ticket.release()
        return bool(tickets)


def _check_version(tensor: torch.Tensor, version: int) -> None:
    """What autograd does itself for tensors that no hook has seen."""
    if tensor._version == version:
        return
    msg = (
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{tensor.dtype} {list(tensor.shape)}] is at version {tensor._version}; expected version {version} instead"
    )
    raise RuntimeError(msg)


_all_activations: weakref.WeakSet[Activations] = weakref.WeakSet()


def _drop_all() -> bool:
    dropped = [activations.drop() for activations in list(_all_activations)]
    return any(dropped)


droppers.append(_drop_all)


class Paging:
    """What Pager.activations() returns: a context manager, for any number of steps. Not reentrant in one thread."""

    def __init__(self, core: Core, activations: Activations) -> None:
        self._core = core
        self._activations = activations
        self._hooks: list[torch.autograd.graph.saved_tensors_hooks] = []

    def __enter__(self) -> Self:
        if self._core.closed:
            msg = "the pager is closed: there is nowhere to page activations to"
            raise ClosedError(msg)
        if self._core.device >= 0:
            msg = "activations are paged on the host; on a device only inference works so far"
            raise PagedTensorError(msg)
        hooks = torch.autograd.graph.saved_tensors_hooks(self._activations.pack, self._activations.unpack)
        hooks.__enter__()
        self._hooks.append(hooks)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.pop().__exit__()
