# SPDX-License-Identifier: Apache-2.0
"""Places in the address space for tensors that come and go in every step: gradients, optimizer state.

A place has a name, and goes to the next tensor of that name and size: the same pages in every step, as a schedule knows
them. It is given back when nothing refers to the tensor's storage any more; then its pages are discarded, which spares
their writes and reads.

Threads: one at a time; tensors may go on any. Blocking: copy_in() blocks on I/O.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tensorpager.errors import ClosedError
from tensorpager.paged_tensor import Backing, PagedTensor, make_paged
from tensorpager.spill import SPILL_ALIGN_BYTES, SpillArena, aligned_size, copy_into, dense_strides, tensor_at

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core
    from tensorpager.windows import Window

__all__ = ["Places"]

#: glibc keeps what is freed, and aligned blocks don't fit where such a block was: without this the plain tensors that
#: were moved stay in the process, 600 MiB of a model with 768 MiB of training state. They are given back when the
#: process has so much more than was ever in use at once, and not before: what the next forward takes again need not be
#: (it cost 0.1 s of a step of 1.2 s). Looked at once for so many bytes that were let go. What is in use is asked of
#: glibc: what a trim leaves is not the most (updates made in forward come before its activations), and trimming by it
#: faulted 300 MB in again in every step. Where more than that comes and goes, holes grow with it.
_UNUSED_BYTES_MAX = 32 * 2**20
_LOOK_BYTES = 8 * 2**20
_KERNEL_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class _Mallinfo2(ctypes.Structure):
    """Of glibc 2.33 and later, over all of its arenas."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]
    uordblks: int
    hblkhd: int


def anonymous_bytes() -> int:
    """Resident memory of this process that is no file's."""
    _, resident, shared = Path("/proc/self/statm").read_bytes().split()[:3]
    return (int(resident) - int(shared)) * _KERNEL_PAGE_BYTES


class Places:
    """See the head of the file. `window`: is told of every tensor made here."""

    def __init__(self, core: Core, arena: SpillArena, window: Window) -> None:
        self._core = core
        self._arena = arena
        self._window = window
        self._free: dict[tuple[str, int], list[int]] = {}  # addresses, by name and size in bytes
        self._let_go_bytes = 0  # since it was looked at
        self._used_bytes_max = 0  # of the heap, when it was looked at
        self._used_bytes_min: int | None = None
        self._beside_bytes: int | None = None  # what the process has beside the heap; as far as is known
        libc = ctypes.CDLL(None)
        self._trim: Callable[[int], int] | None = getattr(libc, "malloc_trim", None)  # not every libc has it
        self._heap: Callable[[], _Mallinfo2] | None = getattr(libc, "mallinfo2", None)
        if self._heap is not None:
            self._heap.restype = _Mallinfo2

    def copy_in(self, source: torch.Tensor, name: str) -> PagedTensor:
        """A paged tensor with the values of a plain one (strided, not empty), in a place of that name."""
        address, plain = self._place(source, name)
        self.trim(source.numel() * source.element_size())
        copy_into(self._core, plain, source)  # one that can't be held is made page by page, as they are touched
        return self._paged(plain, name, address)

    def empty_like(self, tensor: torch.Tensor, name: str) -> PagedTensor:
        """A paged tensor (not empty) of the other's shape, dtype and, if it is dense, strides. It holds anything."""
        address, plain = self._place(tensor, name)
        return self._paged(plain, name, address)

    def alias(self, plain: torch.Tensor, name: str) -> PagedTensor:
        """A paged tensor over the same bytes as a plain one that torch made of one of ours, and that took its place."""
        backing = Backing(self._core, name)
        backing.windows.append(self._window)
        return make_paged(plain, backing)

    def _place(self, tensor: torch.Tensor, name: str) -> tuple[int, torch.Tensor]:
        size_bytes = tensor.numel() * tensor.element_size()
        free = self._free_of(name, aligned_size(size_bytes))
        # From a page on at the start of one: as few pages as can be are resident with it, or are given back.
        align_bytes = self._core.page_bytes if size_bytes >= self._core.page_bytes else SPILL_ALIGN_BYTES
        address = free.pop() if free else self._arena.place(size_bytes, align_bytes)
        plain = tensor_at(self._core, address, tuple(tensor.shape), dense_strides(tensor), tensor.dtype)
        self._core.wanted(address, size_bytes)
        return address, plain

    def trim(self, size_bytes: int) -> None:
        """So many bytes of plain memory more are let go, or soon will be: give it back to the system now and then."""
        self._let_go_bytes += size_bytes
        if self._let_go_bytes < _LOOK_BYTES or self._trim is None:
            return
        self._let_go_bytes = 0
        if self._has_unused():
            self.note_use()
            if self._has_unused():
                self._trim(0)
                self._beside_bytes = max(self._beside_bytes or 0, anonymous_bytes() - self._used_bytes())

    def note_use(self) -> None:
        """Look at how much is in use. Takes 0.4 ms of a large heap."""
        used_bytes = self._used_bytes()
        self._used_bytes_max = max(self._used_bytes_max, used_bytes)
        self._used_bytes_min = min(self._used_bytes_min or used_bytes, used_bytes)

    def _has_unused(self) -> bool:
        if self._beside_bytes is None or self._used_bytes_min is None:
            return True
        unused_bytes_max = max(_UNUSED_BYTES_MAX, self._used_bytes_max - self._used_bytes_min)
        return anonymous_bytes() > self._beside_bytes + self._used_bytes_max + unused_bytes_max

    def _used_bytes(self) -> int:
        """Of the heap; 0 where nobody knows, and then all that is left after a trim counts as beside it."""
        if self._heap is None:
            return 0
        heap = self._heap()
        return heap.uordblks + heap.hblkhd

    def adopt(
        self, name: str, address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
    ) -> PagedTensor:
        """A paged tensor (not empty) over what is at the address already. Reads nothing."""
        return self._paged(tensor_at(self._core, address, shape, strides, dtype), name, address)

    def _paged(self, plain: torch.Tensor, name: str, address: int) -> PagedTensor:
        backing = Backing(self._core, name)
        backing.windows.append(self._window)
        paged = make_paged(plain, backing)
        # The storage's object lives as long as any tensor over it does, detached ones too.
        storage = plain.untyped_storage()
        size_bytes = aligned_size(storage.nbytes())
        free = self._free_of(name, size_bytes)
        weakref.finalize(storage, _give_back, self._core, free, address, size_bytes).atexit = False
        return paged

    def _free_of(self, name: str, size_bytes: int) -> list[int]:
        return self._free.setdefault((name, size_bytes), [])

    def free(self) -> Iterator[tuple[str, int, int]]:
        """Name, size in bytes and address of every place that no tensor has."""
        for (name, size_bytes), addresses in self._free.items():
            for address in addresses:
                yield name, size_bytes, address

    def add_free(self, name: str, size_bytes: int, address: int) -> None:
        """A place that no tensor has, made in an earlier process."""
        self._free_of(name, size_bytes).append(address)


def _give_back(core: Core, free: list[int], address: int, size_bytes: int) -> None:
    try:
        core.discard(address, size_bytes)
    except ClosedError:
        return
    free.append(address)
