# SPDX-License-Identifier: Apache-2.0
"""Places for tensors that have no file of their own: packed into spill regions of the address space.

Also the choice of the directory that spill files go to. A page that nobody has written takes neither disk nor memory.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tensorpager.device import HOST, stream_getter
from tensorpager.errors import IoError
from tensorpager.paged_tensor import Backing, PagedTensor, make_paged

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core
    from tensorpager._core import Region

__all__ = [
    "SPILL_ALIGN_BYTES",
    "SpillArena",
    "aligned_size",
    "choose_directory",
    "copy_into",
    "copy_out",
    "dense_strides",
    "tensor_at",
]

#: Tensors start at multiples of this: what vector kernels and, later, device copies like best.
SPILL_ALIGN_BYTES = 256
_REGION_PAGES = 32
_COPY_BYTES = 16 * 2**20
_RAM_BACKED = frozenset({"tmpfs", "ramfs"})


def aligned_size(size_bytes: int) -> int:
    """size_bytes rounded up to a multiple of SPILL_ALIGN_BYTES."""
    return (size_bytes + SPILL_ALIGN_BYTES - 1) // SPILL_ALIGN_BYTES * SPILL_ALIGN_BYTES


def dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides a copy of the tensor gets: its own when it has neither holes nor overlaps, else row-major."""
    return tuple(torch.empty_like(tensor, device="meta").stride())


def tensor_at(
    core: Core, address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """A plain tensor over the address space, with a storage of its own that ends with its last byte. Reads nothing."""
    element_bytes = dtype.itemsize
    count = 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if count == 0:
        on_device = core.device != HOST and not core.device_memory_is_host_memory
        return torch.empty(shape, dtype=dtype, device=torch.device("cuda", core.device) if on_device else None)
    flat: torch.Tensor = torch.utils.dlpack.from_dlpack(core.tensor(address, count * element_bytes)).view(dtype)
    return flat.as_strided(shape, strides)


def copy_into(core: Core, destination: torch.Tensor, source: torch.Tensor) -> None:
    """Copy values between plain tensors of equal shape and dtype, holding a few pages of the destination at a time.

    The destination lies in the address space and is dense. Blocks on I/O when the budget is smaller than the tensor.
    On a device, the source may be on the host.
    """
    assert destination.shape == source.shape
    assert destination.dtype == source.dtype
    if source.stride() != destination.stride():
        source = torch.empty_strided(destination.shape, destination.stride(), dtype=source.dtype).copy_(source)
    count = destination.untyped_storage().nbytes() // destination.element_size()
    target = destination.as_strided((count,), (1,), 0)
    origin = source.as_strided((count,), (1,))
    piece = _piece_bytes(core) // destination.element_size()
    stream_of = stream_getter(core)
    for start in range(0, count, piece):
        part = target[start : start + piece]
        stream = 0 if stream_of is None else stream_of()
        set_id = core.hold(part.data_ptr(), part.numel() * part.element_size(), stream)
        try:
            part.copy_(origin[start : start + piece])
            if core.device != HOST:
                core.mark_written(set_id)
        finally:
            if set_id >= 0:
                core.release(set_id, stream)


def copy_out(core: Core, source: torch.Tensor) -> torch.Tensor:
    """Plain memory with the values of a plain 1-D tensor over the host's address space, held a few pages at a time."""
    result = torch.empty(source.shape, dtype=source.dtype)
    piece = _piece_bytes(core) // source.element_size()
    for start in range(0, source.numel(), piece):
        part = source[start : start + piece]
        set_id = core.hold(part.data_ptr(), part.numel() * part.element_size())
        try:
            result[start : start + piece].copy_(part)
        finally:
            if set_id >= 0:
                core.release(set_id)
    return result


def _piece_bytes(core: Core) -> int:
    return max(core.page_bytes, min(_COPY_BYTES, core.pinnable_page_count * core.page_bytes // 2))


class SpillArena:
    """Hands out places in spill regions, in order. Not for concurrent use. `regions`: told of each one it makes."""

    def __init__(self, core: Core, regions: list[Region] | None = None) -> None:
        self._core = core
        self._regions = regions
        self._next_address = 0
        self._end_address = 0
        self.size_bytes = 0  # handed out

    def reserve(self, size_bytes: int) -> None:
        """Make the next size_bytes of places lie in one region. MemoryMapError, ClosedError."""
        region = self._core.map_spill(size_bytes)
        if self._regions is not None:
            self._regions.append(region)
        self._next_address = region.address
        self._end_address = region.address + size_bytes

    @property
    def room(self) -> tuple[int, int]:
        """The addresses between which the next places lie, while they do."""
        return self._next_address, self._end_address

    def go_on(self, next_address: int, end_address: int, size_bytes: int) -> None:
        """As an arena of an earlier process, whose room and size_bytes these were."""
        self._next_address, self._end_address, self.size_bytes = next_address, end_address, size_bytes

    def place(self, size_bytes: int, align_bytes: int = SPILL_ALIGN_BYTES) -> int:
        """The address of a new place, a multiple of align_bytes (at most a page); zero until written."""
        needed = aligned_size(size_bytes)
        address = -(-self._next_address // align_bytes) * align_bytes
        if address + needed > self._end_address:
            self.reserve(max(needed, _REGION_PAGES * self._core.page_bytes))
            address = self._next_address
        self._next_address = address + needed
        self.size_bytes += needed
        return address

    def move_in(self, source: torch.Tensor, name: str, *, parameter: bool, requires_grad: bool) -> PagedTensor:
        """A paged tensor with the values of a plain one (strided, not empty). Blocks on I/O."""
        strides = dense_strides(source)
        address = self.place(source.numel() * source.element_size())
        plain = tensor_at(self._core, address, tuple(source.shape), strides, source.dtype)
        copy_into(self._core, plain, source.detach())
        return make_paged(plain, Backing(self._core, name), parameter=parameter, requires_grad=requires_grad)


def choose_directory(store: str | os.PathLike[str] | None) -> str:
    """The directory for spill: `store`, else the first of $TMPDIR, /var/tmp and the current one that is on a disk.

    IoError when it can't be written to, or when none of the three is on a disk.
    """
    from tensorpager._core import probe_directory

    if store is not None:
        return probe_directory(os.fspath(store)).directory
    # Files there have no name (O_TMPFILE) or lose it at birth, mode 0600: nothing to guess or to follow.
    candidates = [os.environ.get("TMPDIR", ""), "/var/tmp", str(Path.cwd()), tempfile.gettempdir()]  # noqa: S108
    reasons = []
    for directory in dict.fromkeys(path for path in candidates if path):
        try:
            facts = probe_directory(directory)
        except IoError as error:
            reasons.append(f"{directory}: {error}")
            continue
        if facts.file_system not in _RAM_BACKED:
            return facts.directory
        reasons.append(f"{directory} is in RAM ({facts.file_system})")
    raise IoError(0, f"found no directory on a disk for modified pages ({'; '.join(reasons)}); name one with store=")
