# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's file I/O interface (DeepNVMe, `async_io`) on this package's engines.

    from tensorpager import compat

    handle = compat.aio_handle(block_size=1 << 20, queue_depth=32)     # AsyncIOBuilder().load().aio_handle(...)
    buffer = handle.new_cpu_locked_tensor(1 << 28, torch.empty(0, dtype=torch.uint8))
    handle.async_pread(buffer, "swap/weights.bin", 0)
    handle.wait()

The module stands for the loaded op too, so a ZeRO-Infinity run takes it with one line before `deepspeed.initialize`:
`AsyncIOBuilder.load = lambda *_, **__: compat`.

Names, arguments and results are DeepSpeed's (0.19); four things differ. *Errors* are exceptions: what can't be read or
written in full, by a short file, a full disk, a bad path or a failing drive, raises `IoError` with file and offset,
at once where that can be known, else from `wait()`. *Any* size, file offset and memory alignment works, in huge pages
without a copy where all are multiples of 4096. *Order*: results are those of one operation after another. *Memory* of
an operation is kept alive until it has been waited for, and dropping a handle finishes what it has begun.

As there, nothing is synced: what was written is on the drive when somebody has called `os.fsync`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from tensorpager import _core
from tensorpager.errors import IoError, PagedTensorError
from tensorpager.paged_tensor import PagedTensor

__all__ = ["aio_handle", "aio_read", "aio_write"]

FilePath = str | os.PathLike[str]

_ALIGNMENT_BYTES = 512  # what DeepSpeed tells its users to keep to, for each thread
_STRAIGHT_ALIGNMENT_BYTES = 4096  # memory that no file system here asks more of
_COMPARED_BYTES = 16 << 20


class aio_handle:  # noqa: N801 - the name is DeepSpeed's
    """Reads files into CPU tensors and writes them back; one thread for each of `intra_op_parallelism`.

    `block_size`: bytes of one request, rounded up to 4 KiB, at most 64 MiB. `queue_depth`: requests in flight, of each
    thread. `single_submit`: a system call for each of them. `overlap_events` is taken and told, and makes no
    difference: requests always follow as soon as others complete.

    Buffers are contiguous CPU tensors of any dtype. TypeError for what is no tensor, ValueError for one elsewhere or
    with gaps, PagedTensorError for a paged one; IoError, MemoryMapError, EngineError. ForkedProcessError in a child of
    `fork()`. Any thread; waiting releases the GIL.
    """

    def __init__(
        self,
        block_size: int = 1024 * 1024,
        queue_depth: int = 128,
        single_submit: bool = False,
        overlap_events: bool = False,
        intra_op_parallelism: int = 1,
    ) -> None:
        for name, value in (
            ("block_size", block_size),
            ("queue_depth", queue_depth),
            ("intra_op_parallelism", intra_op_parallelism),
        ):
            if value < 1:
                msg = f"{name} is {value}; it must be 1 or more"
                raise ValueError(msg)
        self._block_size = block_size
        self._queue_depth = queue_depth
        self._single_submit = single_submit
        self._overlap_events = overlap_events
        self._intra_op_parallelism = intra_op_parallelism
        self._comparisons: list[Callable[[], None]] = []
        self._transfers = _core.FileTransfers(
            block_bytes=block_size,
            depth=queue_depth,
            threads=intra_op_parallelism,
            one_at_a_time=single_submit,
        )

    def get_block_size(self) -> int:
        """As it was given."""
        return self._block_size

    def get_queue_depth(self) -> int:
        """As it was given."""
        return self._queue_depth

    def get_single_submit(self) -> bool:
        """As it was given."""
        return self._single_submit

    def get_overlap_events(self) -> bool:
        """As it was given."""
        return self._overlap_events

    def get_intra_op_parallelism(self) -> int:
        """As it was given."""
        return self._intra_op_parallelism

    def get_alignment(self) -> int:
        """Bytes: what DeepSpeed wants sizes and offsets to be multiples of. Here they may be any."""
        return _ALIGNMENT_BYTES * self._intra_op_parallelism

    def stats(self) -> dict[str, object]:
        """Counts since the handle was made, and the engine. Not DeepSpeed's."""
        return self._transfers.stats()

    def read(self, buffer: torch.Tensor, filename: FilePath, validate: bool, file_offset: int = 0) -> int:
        """Fill the buffer from the file, and wait for that alone. Returns 0. validate: and compare."""
        address, size_bytes, owner = _memory(buffer, written=True)
        self._transfers.read(_path(filename), _offset(file_offset), address, size_bytes, owner)
        if validate:
            _compare(buffer, filename, file_offset)
        return 0

    def write(self, buffer: torch.Tensor, filename: FilePath, validate: bool, file_offset: int = 0) -> int:
        """Write all of the buffer, and wait for that alone. Returns 0. validate: as in `read`."""
        address, size_bytes, owner = _memory(buffer, written=False)
        self._transfers.write(_path(filename), _offset(file_offset), address, size_bytes, owner)
        if validate:
            _compare(buffer, filename, file_offset)
        return 0

    def pread(
        self, buffer: torch.Tensor, filename: FilePath, validate: bool, async_: bool, file_offset: int = 0
    ) -> int:
        """`async_pread`, or `sync_pread` unless async_. validate: as in `read`, once it has been waited for."""
        self.async_pread(buffer, filename, file_offset)
        return self._carry_on(buffer, filename, validate, async_, file_offset)

    def pwrite(
        self, buffer: torch.Tensor, filename: FilePath, validate: bool, async_: bool, file_offset: int = 0
    ) -> int:
        """`async_pwrite`, or `sync_pwrite` unless async_. validate: as in `pread`."""
        self.async_pwrite(buffer, filename, file_offset)
        return self._carry_on(buffer, filename, validate, async_, file_offset)

    def _carry_on(
        self, buffer: torch.Tensor, filename: FilePath, validate: bool, asynchronous: bool, file_offset: int
    ) -> int:
        if validate:
            self._comparisons.append(lambda: _compare(buffer, filename, file_offset))
        return 0 if asynchronous else self.wait()

    def sync_pread(self, buffer: torch.Tensor, filename: FilePath, file_offset: int = 0) -> int:
        """Fill the buffer from the file, and `wait()`, for earlier operations too; returns what that returns."""
        self.async_pread(buffer, filename, file_offset)
        return self.wait()

    def sync_pwrite(self, buffer: torch.Tensor, filename: FilePath, file_offset: int = 0) -> int:
        """Write all of the buffer, and `wait()`, for earlier operations too; returns what that returns."""
        self.async_pwrite(buffer, filename, file_offset)
        return self.wait()

    def async_pread(self, buffer: torch.Tensor, filename: FilePath, file_offset: int = 0) -> int:
        """Begin to fill the buffer from the file; nobody may touch it until `wait()`. Returns 0.

        IoError when the file can't be opened, or ends before the buffer is full.
        """
        address, size_bytes, owner = _memory(buffer, written=True)
        self._transfers.start_read(_path(filename), _offset(file_offset), address, size_bytes, owner)
        return 0

    def async_pwrite(
        self,
        buffer: torch.Tensor,
        filename: FilePath | int | None = None,
        file_offset: int = 0,
        *,
        fd: int | None = None,
    ) -> int:
        """Begin to write the buffer; nobody may change it until `wait()`. Returns 0.

        A file that is not there is made, mode 0600; what one has outside of the range stays. fd, or a number in place
        of the name: a descriptor that is open for writing; it may be closed at once. IoError when the file can't be
        opened, or the disk has no room for the buffer.
        """
        target = filename if fd is None else fd
        if target is None or (fd is not None and filename is not None):
            msg = "async_pwrite takes a filename or an fd"
            raise TypeError(msg)
        address, size_bytes, owner = _memory(buffer, written=False)
        offset_bytes = _offset(file_offset)
        if isinstance(target, int):
            self._transfers.start_write_to(target, offset_bytes, address, size_bytes, owner)
        else:
            self._transfers.start_write(_path(target), offset_bytes, address, size_bytes, owner)
        return 0

    def wait(self) -> int:
        """Wait for the operations begun; how many there were, 0 for none.

        Raises what the first of them that failed failed with, when none is under way any more.
        """
        comparisons, self._comparisons = self._comparisons, []
        count = self._transfers.wait()
        for compare in comparisons:
            compare()
        return count

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: torch.Tensor) -> torch.Tensor:
        """A CPU tensor of num_elem elements of the example's dtype, in huge pages that are used again and again.

        Its content is undefined. Locked in RAM where the limit on that allows it (`ulimit -l`). Its memory is free for
        the next when `free_cpu_locked_tensor` was called, or nobody has it any more. A child of `fork()` has it not.
        MemoryMapError, ValueError.
        """
        if num_elem < 0:
            msg = f"num_elem is {num_elem}; it must be 0 or more"
            raise ValueError(msg)
        dtype = example_tensor.dtype
        if num_elem == 0:
            return torch.empty(0, dtype=dtype)
        size_bytes = num_elem * dtype.itemsize
        return torch.from_dlpack(_core.locked_tensor(size_bytes)).view(dtype)  # type: ignore[attr-defined]

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        """Give back what `new_cpu_locked_tensor` of any handle gave; the tensor is empty afterwards.

        False, and nothing happens, for any other tensor. Views of it stay as they are, and keep the memory.
        """
        if tensor.numel() == 0 or tensor.device.type != "cpu" or not _core.is_locked_base(tensor.data_ptr()):
            return False
        with torch.no_grad():
            tensor.set_()  # type: ignore[call-overload]
        return True

    def is_pinned(self, buffer: torch.Tensor) -> bool:
        """Whether transfers can go straight to and from the buffer: it is locked, or starts at a multiple of 4096."""
        if buffer.device.type != "cpu" or buffer.is_pinned():
            return buffer.is_pinned()
        address = buffer.data_ptr()
        return address % _STRAIGHT_ALIGNMENT_BYTES == 0 or _core.is_locked(address, buffer.nbytes)


def aio_read(
    buffer: torch.Tensor,
    filename: FilePath,
    block_size: int,
    queue_depth: int,
    single_submit: bool,
    overlap_events: bool,
    validate: bool,
) -> int:
    """`aio_handle(...).read(buffer, filename, validate)`."""
    return aio_handle(block_size, queue_depth, single_submit, overlap_events).read(buffer, filename, validate)


def aio_write(
    buffer: torch.Tensor,
    filename: FilePath,
    block_size: int,
    queue_depth: int,
    single_submit: bool,
    overlap_events: bool,
    validate: bool,
) -> int:
    """`aio_handle(...).write(buffer, filename, validate)`."""
    return aio_handle(block_size, queue_depth, single_submit, overlap_events).write(buffer, filename, validate)


def _memory(buffer: torch.Tensor, *, written: bool) -> tuple[int, int, object]:
    """Address and size of the tensor's bytes, and what keeps them. written: by the transfer, so autograd is told."""
    if not isinstance(buffer, torch.Tensor):
        msg = f"the buffer is a {type(buffer).__name__}, not a tensor"
        raise TypeError(msg)
    if isinstance(buffer, PagedTensor):
        msg = "the buffer is paged: its memory comes and goes. Copy it first (.detach().clone())"
        raise PagedTensorError(msg)
    if buffer.device.type != "cpu":
        msg = f"the buffer is on {buffer.device}; transfers are between files and CPU tensors: copy it there"
        raise ValueError(msg)
    if buffer.layout != torch.strided or not buffer.is_contiguous():
        msg = "the buffer's bytes are not in one piece, in order: take a contiguous tensor (.contiguous())"
        raise ValueError(msg)
    if buffer.is_conj() or buffer.is_neg():
        msg = "the buffer is a view that conjugates or negates: resolve it (.resolve_conj(), .resolve_neg())"
        raise ValueError(msg)
    if written and not buffer.is_inference():
        torch.autograd.graph.increment_version(buffer)
    return buffer.data_ptr(), buffer.nbytes, buffer.untyped_storage()


def _path(filename: FilePath) -> bytes:
    path = os.fsencode(filename)
    if b"\0" in path:
        msg = f"the file name {path!r} has a null byte in it"
        raise ValueError(msg)
    return path


def _offset(file_offset: int) -> int:
    if file_offset < 0:
        msg = f"file_offset is {file_offset}; it must be 0 or more"
        raise ValueError(msg)
    return file_offset


def _compare(buffer: torch.Tensor, filename: FilePath, file_offset: int) -> None:
    """IoError where the file, read through the page cache, and the buffer differ."""
    own = buffer.detach().reshape(-1).view(torch.uint8)
    with Path(filename).open("rb") as file:
        file.seek(file_offset)
        for begin in range(0, own.numel(), _COMPARED_BYTES):
            piece = own[begin : begin + _COMPARED_BYTES]
            found = file.read(piece.numel())
            if len(found) == piece.numel() and torch.equal(
                torch.frombuffer(bytearray(found), dtype=torch.uint8), piece
            ):
                continue
            msg = f"{os.fspath(filename)}: what it holds at offset {file_offset + begin} is not what the buffer holds"
            raise IoError(0, msg)
