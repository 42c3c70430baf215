# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's interface on our engines: its names and results, any tensor at any offset, and errors where it fails.

The files lie where pytest puts them; tests that need direct I/O or a file system in memory say so.
"""

from __future__ import annotations

import inspect
import mmap
import os
import resource
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import tensorpager as tp
from tensorpager import _core, compat
from tensorpager.pager import page

MIB = 1 << 20
BYTE = torch.empty(0, dtype=torch.uint8)


def handle(block_size: int = 64 << 10, queue_depth: int = 8, intra_op_parallelism: int = 1) -> compat.aio_handle:
    return compat.aio_handle(block_size, queue_depth, False, True, intra_op_parallelism)


def random_bytes(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def file_of(path: Path, size: int, seed: int = 0) -> tuple[Path, torch.Tensor]:
    data = random_bytes(size, seed)
    path.write_bytes(data.numpy().tobytes())
    return path, data


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


# ---------------------------------------------------------------- the interface


def test_arguments_have_deepspeeds_names_order_and_defaults() -> None:
    def names(function: Callable[..., object]) -> list[str]:
        return [name for name in inspect.signature(function).parameters if name != "self"]

    assert names(compat.aio_handle) == [
        *("block_size", "queue_depth", "single_submit", "overlap_events", "intra_op_parallelism")
    ]
    default = compat.aio_handle()
    assert (default.get_block_size(), default.get_queue_depth()) == (1 << 20, 128)
    assert (default.get_single_submit(), default.get_overlap_events()) == (False, False)
    assert default.get_intra_op_parallelism() == 1
    for call in (default.read, default.write):
        assert names(call) == ["buffer", "filename", "validate", "file_offset"]
    for call in (default.pread, default.pwrite):
        assert names(call) == ["buffer", "filename", "validate", "async_", "file_offset"]  # theirs: a keyword now
    for call in (default.sync_pread, default.sync_pwrite, default.async_pread):
        assert names(call) == ["buffer", "filename", "file_offset"]
    assert names(default.async_pwrite) == ["buffer", "filename", "file_offset", "fd"]
    assert names(default.new_cpu_locked_tensor)[0] == "num_elem"


def test_what_was_given_is_told() -> None:
    other = compat.aio_handle(1000, 3, True, True, 2)
    assert (other.get_block_size(), other.get_queue_depth()) == (1000, 3)
    assert (other.get_single_submit(), other.get_overlap_events()) == (True, True)
    assert (other.get_intra_op_parallelism(), other.get_alignment()) == (2, 1024)


def test_results_are_deepspeeds(tmp_path: Path) -> None:
    path, data = file_of(tmp_path / "in", 200_000)
    io = handle()
    buffer = torch.empty_like(data)
    assert io.wait() == 0
    assert io.sync_pread(buffer, path) == 1
    assert io.async_pread(buffer, str(path)) == 0
    assert io.async_pwrite(data, tmp_path / "out") == 0
    assert io.sync_pwrite(data, tmp_path / "more") == 3  # the two before it, too
    assert io.pread(buffer, path, False, True) == 0
    assert io.pwrite(data, tmp_path / "out", True, False) == 2
    assert io.read(buffer, path, True) == 0
    assert io.write(data, tmp_path / "out", True) == 0
    assert io.wait() == 0  # read() and write() have been waited for
    assert torch.equal(buffer, data)


@pytest.mark.parametrize("threads", [1, 3])
def test_many_operations_are_all_done(tmp_path: Path, threads: int) -> None:
    io = handle(intra_op_parallelism=threads)
    parts = [random_bytes(10_000 + 997 * each, each) for each in range(40)]
    for each, part in enumerate(parts):
        io.async_pwrite(part, tmp_path / str(each))
    assert io.wait() == 40
    back = [torch.empty_like(part) for part in parts]
    for each, part in enumerate(back):
        io.async_pread(part, tmp_path / str(each))
    assert io.wait() == 40
    assert all(map(torch.equal, parts, back))


def test_functions_without_a_handle(tmp_path: Path) -> None:
    data = random_bytes(100_001)
    assert compat.aio_write(data, tmp_path / "file", 1 << 16, 4, False, False, True) == 0
    buffer = torch.empty_like(data)
    assert compat.aio_read(buffer, tmp_path / "file", 1 << 16, 4, False, False, True) == 0
    assert torch.equal(buffer, data)


# ---------------------------------------------------------------- any tensor, anywhere


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn, torch.uint8],
)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    data = random_bytes(8 * 12_345).clamp(max=1).view(dtype)
    io = handle()
    io.sync_pwrite(data, tmp_path / "file")
    assert (tmp_path / "file").stat().st_size == 8 * 12_345
    for buffer in (torch.empty_like(data), io.new_cpu_locked_tensor(data.numel(), data)):
        assert buffer.dtype == dtype
        io.sync_pread(buffer, tmp_path / "file")
        assert torch.equal(bytes_of(buffer), bytes_of(data))


@pytest.mark.parametrize("where", ["disk", "memory"])
@pytest.mark.parametrize("offset", [0, 1, 4096, 70_001])
@pytest.mark.parametrize("misaligned", [0, 1, 64])
def test_a_million_and_three_bytes(tmp_path: Path, where: str, offset: int, misaligned: int) -> None:
    size = 1_000_003
    directory = tmp_path if where == "disk" else Path("/dev/shm")
    path = directory / f"tensorpager-test-{os.getpid()}"
    io = handle()
    memory = io.new_cpu_locked_tensor(size + 64, BYTE)
    try:
        _, before = file_of(path, 1_100_000)
        data = random_bytes(size, 1)
        written = memory[misaligned : misaligned + size].copy_(data)
        io.sync_pwrite(written, path, offset)
        after = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
        assert torch.equal(after[offset : offset + size], data)
        assert torch.equal(after[:offset], before[:offset])
        assert torch.equal(after[offset + size :], before[offset + size :])
        written.zero_()
        io.sync_pread(written, path, offset)
        assert torch.equal(written, data)
    finally:
        path.unlink()


def test_more_than_two_gibibytes(tmp_path: Path) -> None:
    size = (2 << 30) + 4097
    marks = random_bytes(5000)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(size + 10)
        file.seek(10)
        file.write(marks.numpy().tobytes())
        file.seek(size + 10 - 5000)
        file.write(marks.numpy().tobytes())
    buffer = torch.empty(size, dtype=torch.uint8)
    io = compat.aio_handle()
    assert io.sync_pread(buffer, tmp_path / "sparse", 10) == 1
    assert torch.equal(buffer[:5000], marks)
    assert torch.equal(buffer[-5000:], marks)
    assert io.stats()["bytes_read"] >= size


def test_no_elements(tmp_path: Path) -> None:
    io = handle()
    assert io.sync_pwrite(torch.empty(0), tmp_path / "file") == 1
    assert (tmp_path / "file").read_bytes() == b""
    assert io.sync_pread(torch.empty(0), tmp_path / "file") == 1
    assert io.new_cpu_locked_tensor(0, torch.empty(0, dtype=torch.int16)).dtype == torch.int16


def test_locked_tensors_need_no_copy_and_others_do(tmp_path: Path) -> None:
    path, data = file_of(tmp_path / "file", MIB)
    if not _core.probe_directory(str(tmp_path)).direct:
        pytest.skip("the file system takes no direct I/O")
    io = handle()
    locked = io.new_cpu_locked_tensor(MIB, BYTE)
    io.sync_pread(locked, path)
    io.sync_pwrite(locked, path)
    assert torch.equal(locked, data)
    assert io.stats()["bounced_bytes"] == 0
    io.sync_pread(io.new_cpu_locked_tensor(MIB + 1, BYTE)[1:], path)
    assert io.stats()["bounced_bytes"] == MIB


def test_one_system_call_for_each_request_or_for_all(tmp_path: Path) -> None:
    path, _ = file_of(tmp_path / "file", MIB)
    calls = []
    for single_submit in (True, False):
        io = compat.aio_handle(4096, 128, single_submit)
        if io.stats()["engine"] != "uring":
            pytest.skip("the pread engine makes one for each request")
        io.sync_pread(io.new_cpu_locked_tensor(MIB, BYTE), path)
        calls.append(io.stats()["io_system_calls"])
    assert calls[0] >= 256 > calls[1]


def test_a_write_by_descriptor(tmp_path: Path) -> None:
    data = random_bytes(50_001)
    for flags, of_deepspeeds in ((os.O_WRONLY, False), (os.O_RDWR, True)):
        descriptor = os.open(tmp_path / "file", flags | os.O_CREAT, 0o600)
        if of_deepspeeds:
            assert handle().async_pwrite(buffer=data, fd=descriptor, file_offset=3) == 0  # dropped: finished
        else:
            io = handle()
            io.async_pwrite(data, descriptor, 3)
            os.close(descriptor)
            assert io.wait() == 1
        assert (tmp_path / "file").read_bytes()[3:] == data.numpy().tobytes()
        (tmp_path / "file").unlink()


def test_autograd_is_told_that_the_buffer_changed(tmp_path: Path) -> None:
    path, _ = file_of(tmp_path / "file", 4000)
    buffer = torch.ones(1000)
    weight = torch.ones(1000, requires_grad=True)
    loss = (weight * buffer).sum()
    handle().sync_pread(buffer, path)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        assert handle().sync_pread(torch.empty(1000), path) == 1


# ---------------------------------------------------------------- locked tensors


def test_a_locked_tensor_lies_in_huge_pages_and_its_memory_is_used_again() -> None:
    io = handle()
    first = io.new_cpu_locked_tensor(7 * MIB, BYTE)
    address = first.data_ptr()
    assert address % (2 * MIB) == 0
    assert first.shape == (7 * MIB,)
    first.fill_(1)
    assert io.free_cpu_locked_tensor(first) is True
    assert first.numel() == 0
    assert io.free_cpu_locked_tensor(first) is False
    second = handle().new_cpu_locked_tensor(7 * MIB // 4, torch.empty(0))
    assert second.data_ptr() == address
    assert second.dtype == torch.float32
    del second
    assert io.new_cpu_locked_tensor(7 * MIB, BYTE).data_ptr() == address  # nobody had it any more


def test_views_of_a_freed_tensor_keep_its_memory() -> None:
    io = handle()
    tensor = io.new_cpu_locked_tensor(3 * MIB, BYTE)
    view = tensor[100:200].fill_(7)
    io.free_cpu_locked_tensor(tensor)
    io.new_cpu_locked_tensor(3 * MIB, BYTE).fill_(0)
    assert bool((view == 7).all())


def test_only_what_was_given_is_taken_back() -> None:
    io = handle()
    tensor = io.new_cpu_locked_tensor(MIB, BYTE)
    assert io.free_cpu_locked_tensor(torch.ones(5)) is False
    assert io.free_cpu_locked_tensor(tensor[5:]) is False
    assert io.free_cpu_locked_tensor(tensor) is True


def test_pinned_is_what_needs_no_copy() -> None:
    io = handle()
    locked = io.new_cpu_locked_tensor(2 * MIB, BYTE)
    assert io.is_pinned(locked)
    assert io.is_pinned(locked[5:100])
    assert not io.is_pinned(torch.empty(4096 * 3, dtype=torch.uint8)[locked.data_ptr() % 4096 + 1 :][:4095][1:])
    assert not io.is_pinned(torch.empty(5, device="meta"))


# ---------------------------------------------------------------- who keeps what alive


def test_memory_is_kept_until_it_was_waited_for(tmp_path: Path) -> None:
    path, _ = file_of(tmp_path / "file", 5 * MIB)
    io = handle()
    before = _core.locked_memory_stats()["bytes_taken"]
    buffer = io.new_cpu_locked_tensor(5 * MIB, BYTE)
    io.async_pread(buffer, path)
    io.free_cpu_locked_tensor(buffer)
    del buffer
    assert _core.locked_memory_stats()["bytes_taken"] >= before + 5 * MIB
    assert io.wait() == 1
    assert _core.locked_memory_stats()["bytes_taken"] == before


def test_a_handle_that_is_dropped_finishes_first(tmp_path: Path) -> None:
    data = random_bytes(8 * MIB)
    io = handle(block_size=4096)
    io.async_pwrite(data, tmp_path / "file")
    del io
    assert (tmp_path / "file").read_bytes() == data.numpy().tobytes()


def test_threads_share_a_handle(tmp_path: Path) -> None:
    io = handle(intra_op_parallelism=2)
    found = []

    def work(seed: int) -> None:
        data, back = random_bytes(300_000, seed), torch.empty(300_000, dtype=torch.uint8)
        for _ in range(5):
            io.write(data, tmp_path / str(seed), False)
            io.read(back, tmp_path / str(seed), False)
            found.append(torch.equal(back, data))
            back.zero_()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20
    assert io.wait() == 0


def test_a_child_of_fork_is_told_and_its_parent_unharmed(tmp_path: Path) -> None:
    path, _ = file_of(tmp_path / "file", 4096)
    script = f"""
import os, torch, tensorpager as tp
from tensorpager import compat
io = compat.aio_handle(4096, 4)
locked = io.new_cpu_locked_tensor(4096, torch.empty(0, dtype=torch.uint8))
child = os.fork()
if child == 0:
    told = 0
    for use in (lambda: io.async_pread(locked, {str(path)!r}), io.wait, io.stats):
        try:
            use()
        except tp.ForkedProcessError:
            told += 1
    own = compat.aio_handle(4096, 4)
    told += own.sync_pread(own.new_cpu_locked_tensor(4096, locked), {str(path)!r})
    del io, locked, own
    os._exit(told)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), io.sync_pread(locked, {str(path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["4", "1"], done.stderr


# ---------------------------------------------------------------- errors


def test_a_short_file_is_an_error_that_says_how_short(tmp_path: Path) -> None:
    path, _ = file_of(tmp_path / "short", 1000)
    io = handle()
    for call in (
        lambda: io.async_pread(torch.empty(1001, dtype=torch.uint8), path),
        lambda: io.sync_pread(torch.empty(1000, dtype=torch.uint8), path, 1),
        lambda: io.read(torch.empty(1001, dtype=torch.uint8), path, False),
    ):
        with pytest.raises(tp.IoError, match=r"short has 1000 bytes: 100[01] bytes at offset [01]") as raised:
            call()
        assert raised.value.errno is None
    assert io.wait() == 0


def test_a_bad_path_is_an_error(tmp_path: Path) -> None:
    io = handle()
    for call in (io.async_pread, io.sync_pread):
        with pytest.raises(tp.IoError, match=r"could not open .*absent: .*ENOENT") as raised:
            call(torch.empty(4), tmp_path / "absent")
        assert isinstance(raised.value, OSError)
    for call in (io.async_pwrite, io.sync_pwrite):
        with pytest.raises(tp.IoError, match="ENOENT"):
            call(torch.empty(4), tmp_path / "no" / "file")
        with pytest.raises(tp.IoError, match="EISDIR"):
            call(torch.empty(4), tmp_path)
    reading = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(tp.IoError, match="open for reading alone"):
        io.async_pwrite(torch.empty(4), reading)
    os.close(reading)


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Python ignores the signal; writes beyond get EFBIG, which stands for a disk without room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_without_room_is_met_at_the_start(tmp_path: Path) -> None:
    io = handle()
    with files_limited_to(MIB), pytest.raises(tp.IoError, match=r"2097152 bytes at offset 5 in .*full.*EFBIG"):
        io.async_pwrite(torch.ones(2 * MIB, dtype=torch.uint8), tmp_path / "full", 5)
    assert io.wait() == 0
    assert (tmp_path / "full").stat().st_size == 0


def test_what_fails_under_way_is_raised_by_wait_once(tmp_path: Path) -> None:
    path, data = file_of(tmp_path / "file", 2 * 4096)
    io = handle()
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ)  # which the kernel can't read into
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the buffer is not writable
        buffer = torch.frombuffer(memory, dtype=torch.uint8)
    good = torch.empty(4096, dtype=torch.uint8)
    io.async_pread(buffer, path, 4096)
    io.async_pread(good, path)
    with pytest.raises(tp.IoError, match=r"could not read 4096 bytes at offset 4096 of .*file: .*EFAULT"):
        io.wait()
    assert torch.equal(good, data[:4096])
    assert io.wait() == 0
    assert io.sync_pread(good, path) == 1


def test_what_is_not_in_the_file_is_found_where_that_was_asked_for(tmp_path: Path) -> None:
    path, data = file_of(tmp_path / "file", 200_000)
    io = handle()
    assert io.pread(torch.empty_like(data), path, True, False) == 1
    io.pread(torch.empty_like(data), path, True, True)
    while io.stats()["bytes_read"] < 400_000:
        time.sleep(0.001)
    with path.open("r+b") as file:
        file.write(b"\0" * 200_000)
    with pytest.raises(tp.IoError, match="what it holds at offset 0 is not what the buffer holds"):
        io.wait()


def test_what_can_not_be_transferred_is_refused(tmp_path: Path) -> None:
    path, _ = file_of(tmp_path / "file", 4096)
    io = handle()
    refused: tuple[tuple[object, type[Exception], str], ...] = (
        (b"bytes", TypeError, "not a tensor"),
        (torch.empty(4, 4).T, ValueError, "contiguous"),
        (torch.empty(8)[::2], ValueError, "contiguous"),
        (torch.empty(4, device="meta"), ValueError, "on meta"),
        (torch.eye(4).to_sparse(), ValueError, "contiguous"),
        (torch.ones(4, dtype=torch.complex64).conj(), ValueError, "conjugates"),
    )
    for buffer, error, words in refused:
        for call in (io.async_pread, io.sync_pwrite):
            with pytest.raises(error, match=words):
                call(buffer, path)  # type: ignore[operator]
    with pytest.raises(ValueError, match="null byte"):
        io.async_pwrite(torch.empty(4), f"{path}\0")
    with pytest.raises(ValueError, match="file_offset is -1"):
        io.async_pread(torch.empty(4), path, -1)
    with pytest.raises(TypeError, match="a filename or an fd"):
        io.async_pwrite(torch.empty(4))
    with pytest.raises(TypeError, match="a filename or an fd"):
        io.async_pwrite(torch.empty(4), path, fd=0)
    for arguments in ((0,), (4096, 0), (4096, 1, False, False, 0), (4096, 1, False, False, 65)):
        with pytest.raises(ValueError, match=r"must be 1 or more|give 1 to 64"):
            compat.aio_handle(*arguments)
    with pytest.raises(ValueError, match="num_elem is -1"):
        io.new_cpu_locked_tensor(-1, BYTE)
    assert path.read_bytes() == file_of(tmp_path / "same", 4096)[0].read_bytes()


def test_a_paged_parameter_is_refused(tmp_path: Path) -> None:
    path, _ = file_of(tmp_path / "file", 4096)
    module = torch.nn.Linear(16, 16)
    with page(module, budget="16MiB"), pytest.raises(tp.PagedTensorError, match="is paged"):
        handle().sync_pread(module.weight, path)
