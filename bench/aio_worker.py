# SPDX-License-Identifier: Apache-2.0
"""One library's aio_handle at work, for aio_shim.py; run inside the environment that has the library.

    python bench/aio_worker.py LIBRARY                      measures what is asked for on stdin, a JSON object a line
    python bench/aio_worker.py LIBRARY DIRECTORY [SMALL]    lets things go wrong, and prints {failure: what was told}

LIBRARY: deepspeed or tensorpager. A measurement is {"path", "operation": "read" or "write", "memory": "locked" or
"ordinary", "block_bytes", "depth", "size_bytes"}; the answer {"seconds", "cpu_seconds"}. Memory is allocated and
touched before the clock starts, and is the same for all measurements of a kind. SMALL: a directory on a file system
with less than 4 MiB.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PIECE_BYTES = 256 << 20  # of one operation
OLD, NEW = 7, 120  # what buffers and files are filled with
MIB = 1 << 20


def load(library: str) -> Callable[..., Any]:
    if library == "deepspeed":
        from deepspeed.ops.op_builder import AsyncIOBuilder

        return AsyncIOBuilder().load(verbose=False).aio_handle  # type: ignore[no-any-return]
    from tensorpager.compat import aio_handle

    return aio_handle


def locked(handle: Any, size: int) -> torch.Tensor:
    tensor = handle.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.uint8))
    return tensor.fill_(OLD)  # type: ignore[no-any-return]


class Measurements:
    def __init__(self, make_handle: Callable[..., Any]) -> None:
        self._make_handle = make_handle
        self._handles: dict[tuple[int, int], Any] = {}
        self._buffers: dict[str, torch.Tensor] = {}

    def _handle(self, block_bytes: int, depth: int) -> Any:
        key = block_bytes, depth
        if key not in self._handles:
            self._handles[key] = self._make_handle(block_bytes, depth, False, True, 1)
        return self._handles[key]

    def _buffer(self, memory: str, handle: Any) -> torch.Tensor:
        if memory not in self._buffers:
            ordinary = memory == "ordinary"
            self._buffers[memory] = (
                torch.full((PIECE_BYTES,), OLD, dtype=torch.uint8) if ordinary else locked(handle, PIECE_BYTES)
            )
        return self._buffers[memory]

    def measure(self, job: dict[str, Any]) -> dict[str, float]:
        handle = self._handle(job["block_bytes"], job["depth"])
        buffer = self._buffer(job["memory"], handle)
        call = handle.sync_pread if job["operation"] == "read" else handle.sync_pwrite
        begin, begin_cpu = time.perf_counter(), time.process_time()
        for offset in range(0, job["size_bytes"], PIECE_BYTES):
            done = call(buffer, job["path"], offset)
            if done != 1:
                msg = f"{done} operations done, not 1"
                raise RuntimeError(msg)
        return {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - begin_cpu}


# ---------------------------------------------------------------- what can go wrong


def short_file(handle: Any, path: Path) -> str:
    path.write_bytes(bytes([NEW]) * (MIB // 2))
    return f"returns {handle.sync_pread(locked(handle, MIB), str(path))}"


def shortened_while_read(handle: Any, path: Path) -> str:
    size = 256 * MIB
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(bytes([NEW]) * MIB)
        file.flush()
        os.fsync(file.fileno())
    buffer = locked(handle, size)
    handle.async_pread(buffer, str(path))
    os.truncate(path, size // 2)
    return f"returns {handle.wait()}, {_wrong(buffer)}"


def size_limit(handle: Any, path: Path) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))
    done = handle.sync_pwrite(locked(handle, 4 * MIB), str(path))
    return f"returns {done}, the file has {path.stat().st_size / MIB:g} of 4 MiB"


def full_disk(handle: Any, path: Path) -> str:
    """The directory is a file system with less room than this."""
    done = handle.sync_pwrite(locked(handle, 4 * MIB), str(path))
    return f"returns {done}, the file has {path.stat().st_size / MIB:g} of 4 MiB"


def no_such_file(handle: Any, path: Path) -> str:
    return f"returns {handle.async_pread(locked(handle, MIB), str(path))}"


def no_such_directory(handle: Any, path: Path) -> str:
    return f"returns {handle.async_pwrite(locked(handle, MIB), str(path / 'file'))}"


def odd_size_written(handle: Any, path: Path) -> str:
    done = handle.sync_pwrite(locked(handle, 1_000_003), str(path))
    right = path.read_bytes() == bytes([OLD]) * 1_000_003
    return f"returns {done}, the file is {'right' if right else f'wrong: {path.stat().st_size} bytes'}"


def odd_size_read(handle: Any, path: Path) -> str:
    path.write_bytes(bytes([NEW]) * 1_000_003)
    buffer = locked(handle, 1_000_003)
    return f"returns {handle.sync_pread(buffer, str(path))}, {_wrong(buffer)}"


def odd_offset_read(handle: Any, path: Path) -> str:
    path.write_bytes(bytes([NEW]) * 2 * MIB)
    buffer = locked(handle, MIB)
    return f"returns {handle.sync_pread(buffer, str(path), 100)}, {_wrong(buffer)}"


def _wrong(buffer: torch.Tensor) -> str:
    wrong = int((buffer != NEW).sum())
    return f"{wrong / buffer.numel():.0%} of the bytes stale" if wrong else "every byte right"


NO_ROOM = "a file system without room"
FAILURES = {
    "a file half as long as the buffer": short_file,
    "a file that is halved while it is read": shortened_while_read,
    "a limit on the size of files": size_limit,
    NO_ROOM: full_disk,
    "a file that is not there": no_such_file,
    "a directory that is not there": no_such_directory,
    "1,000,003 bytes written": odd_size_written,
    "1,000,003 bytes read": odd_size_read,
    "1 MiB read at offset 100": odd_offset_read,
}


def fail(make_handle: Callable[..., Any], name: str, directory: Path) -> str:
    """Each in a process of its own, since it may end it."""
    path = directory / "file"
    path.unlink(missing_ok=True)
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            try:
                answer = FAILURES[name](make_handle(1 << 20, 8, False, True, 1), path)
            except Exception as error:
                answer = f"{type(error).__name__}: {error}".replace(str(directory), "DIR")
            told.write(answer.encode())
            told.flush()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        path.unlink(missing_ok=True)
        told.seek(0)
        errors.seek(0)
        if status == 0:
            return told.read().decode()
        return f"the process ends: {errors.read().decode().strip().splitlines()[-1].rpartition(': ')[2]}"


def main() -> None:
    make_handle = load(sys.argv[1])
    if len(sys.argv) > 2:
        small = [Path(each) for each in sys.argv[3:]]
        print(json.dumps({name: fail(make_handle, name, Path(sys.argv[2])) for name in FAILURES if name != NO_ROOM}))
        for each in small:
            print(json.dumps({NO_ROOM: fail(make_handle, NO_ROOM, each)}))
        return
    measurements = Measurements(make_handle)
    for line in sys.stdin:
        print(json.dumps(measurements.measure(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
