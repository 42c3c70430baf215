# SPDX-License-Identifier: Apache-2.0
"""The machine this runs on, measured: a file in a directory of the drive, a matrix product, a copy in memory."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from tensorpager.budget import format_bytes
from tensorpager.hardware import Hardware

if TYPE_CHECKING:
    import torch

__all__ = ["drive_rates", "this_machine"]

BLOCK_BYTES = 2 * 2**20
QUEUE_DEPTH = 8
CHUNK_BYTES = 256 * 2**20  # the least that is written; the file grows by as much
CHUNKS_MAX = 4
SECONDS_MAX = 600.0


def this_machine(directory: str = ".", *, seconds: float = 2.0) -> Hardware:
    """Measure this machine: the drive below directory, and the first CUDA device, or the CPU and RAM without one.

    seconds: about how long measuring takes, setting up aside; more where the drive needs longer for CHUNK_BYTES, the
    least that is written. Writes a file without a name, CHUNKS_MAX * CHUNK_BYTES at most and no more than half of the
    free space, which is gone when this returns, raises or is killed. Without a GPU device_bytes is what the kernel
    says is available; a limit of the cgroup is not considered (`tensorpager doctor` shows it). Needs torch. ValueError
    when seconds is not in (0, 600]; OSError when the directory can't be written or has not the space.
    """
    if not 0 < seconds <= SECONDS_MAX:
        msg = f"seconds is {seconds}; it must be positive and {SECONDS_MAX} at most"
        raise ValueError(msg)
    import torch

    ram_bytes = _available_bytes()  # before anything is allocated here
    read, write, how = drive_rates(directory, seconds / 4)
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if has_gpu else torch.device("cpu")
    figures = _device_rates(device, seconds / 4)
    if has_gpu:
        torch.cuda.empty_cache()  # what was allocated for it here
    there = "measured on this machine, "
    no_gpu = "no GPU: device memory is host memory"
    copies = there + "copies from and to registered host memory" if has_gpu else no_gpu
    ram = there + "RAM available, from the kernel"
    memory = torch.cuda.get_device_properties(device).total_memory if has_gpu else ram_bytes
    return Hardware(
        name=torch.cuda.get_device_name(device) if has_gpu else "this machine without a GPU",
        device_bytes=int(memory),
        host_bytes=ram_bytes if has_gpu else 0,
        drive_read_bytes_per_second=read,
        drive_write_bytes_per_second=write,
        drive_endurance_bytes=0.0,
        sources={
            "device_bytes": there + "memory of the GPU, from CUDA" if has_gpu else ram,
            "host_bytes": ram if has_gpu else no_gpu,
            "flops_per_second": there
            + f"matmuls in {'bfloat16' if has_gpu else 'float32'} on the {device.type} device",
            "memory_bytes_per_second": there + "copies within memory, each byte counted as read and as written",
            "host_to_device_bytes_per_second": copies,
            "device_to_host_bytes_per_second": copies,
            "drive_read_bytes_per_second": there + how,
            "drive_write_bytes_per_second": f"{there}{how}; too short to fill a drive's SLC cache",
            "drive_endurance_bytes": "unknown: drives do not tell their rating",
        },
        **figures,
    )


def _available_bytes() -> int:
    """RAM that can be had without paging anything out; 0 when the kernel does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _rate(run: Callable[[], object], amount: float, seconds: float) -> float:
    """amount per second, when run() does it again and again for that long; the first time does not count."""
    run()
    count, begin = 0, time.perf_counter()
    while True:
        run()
        count += 1
        spent = time.perf_counter() - begin
        if spent >= seconds:
            return count * amount / spent


def _device_rates(device: torch.device, seconds: float) -> dict[str, float]:
    """Rates of the device and of its link to the host, by field name. seconds: for each of matmuls and copies."""
    import torch

    on_gpu = device.type == "cuda"
    side, size = (8192, 2**30) if on_gpu else (1536, 2**27)
    kind = torch.bfloat16 if on_gpu else torch.float32
    generator = torch.Generator(device).manual_seed(0)  # its own: the caller's random numbers stay what they were
    left, right = (torch.rand(side, side, dtype=kind, device=device, generator=generator) for _ in range(2))
    product = torch.empty_like(left)
    from_bytes = torch.ones(size, dtype=torch.uint8, device=device)
    to_bytes = torch.zeros_like(from_bytes)

    def ended(_: object) -> None:
        if on_gpu:
            torch.cuda.synchronize(device)

    rates = {
        "flops_per_second": _rate(lambda: ended(torch.mm(left, right, out=product)), 2.0 * side**3, seconds),
        "memory_bytes_per_second": _rate(lambda: ended(to_bytes.copy_(from_bytes)), 2.0 * size, seconds),
        "host_to_device_bytes_per_second": 0.0,
        "device_to_host_bytes_per_second": 0.0,
    }
    if on_gpu:
        part = from_bytes[: size // 4]
        host = torch.ones(len(part), dtype=torch.uint8, pin_memory=True)
        to_device = _rate(lambda: ended(part.copy_(host, non_blocking=True)), len(part), seconds / 2)
        to_host = _rate(lambda: ended(host.copy_(part, non_blocking=True)), len(part), seconds / 2)
        rates.update(host_to_device_bytes_per_second=to_device, device_to_host_bytes_per_second=to_host)
    return rates


def drive_rates(directory: str, seconds: float) -> tuple[float, float, str]:
    """(bytes read per second, bytes written per second, how it was measured). seconds: for each of the two."""
    free_bytes = _free_bytes(directory)
    chunks_max = min(CHUNKS_MAX, free_bytes // 2 // CHUNK_BYTES)
    if chunks_max < 1:
        needed, free = format_bytes(2 * CHUNK_BYTES), format_bytes(free_bytes)
        msg = f"measuring the drive writes {format_bytes(CHUNK_BYTES)} and wants {needed} free; {free} are"
        raise OSError(errno.ENOSPC, msg, directory)
    # Without a name from the start, or unlinked at once where the file system can't do that: nothing that ends this
    # process leaves it behind. Its mode is 0600.
    with (
        tempfile.TemporaryFile(dir=directory, buffering=0) as file,
        mmap.mmap(-1, QUEUE_DEPTH * BLOCK_BYTES) as memory,
        ThreadPoolExecutor(QUEUE_DEPTH) as pool,
    ):
        descriptor = file.fileno()
        # Before O_DIRECT: where the file system can't do it, libc writes single bytes instead.
        os.posix_fallocate(descriptor, 0, chunks_max * CHUNK_BYTES)
        is_direct = _set_direct(descriptor)
        memory[:] = os.urandom(len(memory))  # zeros could be stored as nothing at all
        chunks, begin = 0, time.perf_counter()
        while chunks < chunks_max and (chunks == 0 or time.perf_counter() - begin < seconds):
            _move_chunk(pool, os.pwritev, descriptor, memory, chunks * CHUNK_BYTES)
            chunks += 1
        os.fsync(descriptor)
        write = chunks * CHUNK_BYTES / (time.perf_counter() - begin)
        read_chunks, spent = 0, 0.0
        while spent < seconds:
            offset = read_chunks % chunks * CHUNK_BYTES
            os.posix_fadvise(descriptor, offset, CHUNK_BYTES, os.POSIX_FADV_DONTNEED)
            begin = time.perf_counter()
            _move_chunk(pool, os.preadv, descriptor, memory, offset)
            spent += time.perf_counter() - begin
            read_chunks += 1
    way = "O_DIRECT" if is_direct else "through the page cache, dropped before reading: no O_DIRECT here"
    how = f"blocks of {format_bytes(BLOCK_BYTES)}, {QUEUE_DEPTH} at a time, {way}"
    return read_chunks * CHUNK_BYTES / spent, write, how


def _free_bytes(directory: str) -> int:
    facts = os.statvfs(directory)
    return facts.f_bavail * facts.f_frsize


def _set_direct(descriptor: int) -> bool:
    """Switch to O_DIRECT; False, and nothing changed, where the file system has not got it or refuses such writes."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        with mmap.mmap(-1, BLOCK_BYTES) as block:
            os.pwrite(descriptor, block, 0)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
        return False
    return True


def _move_chunk(
    pool: ThreadPoolExecutor,
    move: Callable[[int, list[memoryview], int], int],
    descriptor: int,
    memory: mmap.mmap,
    offset: int,
) -> None:
    """Write or read CHUNK_BYTES of the file, QUEUE_DEPTH blocks at a time. OSError when a block comes short."""

    def work(slot: int) -> None:
        with memoryview(memory) as whole, whole[slot * BLOCK_BYTES : (slot + 1) * BLOCK_BYTES] as block:
            for place in range(slot * BLOCK_BYTES, CHUNK_BYTES, QUEUE_DEPTH * BLOCK_BYTES):
                moved = move(descriptor, [block], offset + place)
                if moved != BLOCK_BYTES:
                    msg = f"{moved} of {BLOCK_BYTES} bytes were transferred at {offset + place} while measuring"
                    raise OSError(errno.EIO, msg)

    # When one fails, leaving the pool waits for the others before the memory and the file go.
    for future in [pool.submit(work, slot) for slot in range(QUEUE_DEPTH)]:
        future.result()
