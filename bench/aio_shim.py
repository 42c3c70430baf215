# SPDX-License-Identifier: Apache-2.0
"""`tensorpager.compat.aio_handle` beside the one that it stands for, DeepSpeed's: `python -m bench aio-shim`.

The same file, read and written by both, in interleaved rounds, from and into either library's locked tensors and
ordinary ones, with two settings of blocks. Bars: 1.2 times the bandwidth or more, at less CPU time. Then what each
tells of a short file, a full disk and a bad path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typing_extensions import Self

from bench import fio, peers
from bench.aio_worker import FAILURES, PIECE_BYTES
from bench.page_in import CACHE, _drop_from_cache
from bench.rounds import Measured, Sample, Skipped, interleave, print_table, ratio_of_medians, save

ROOT = Path(__file__).resolve().parent.parent
SIZE_BYTES = 2 * PIECE_BYTES
MIB = 1 << 20
SETTINGS = ((1 * MIB, 8), (8 * MIB, 8))  # block_size, queue_depth
MEMORIES = ("locked", "ordinary")
OPERATIONS = ("read", "write", "write new")  # into a file that is there, and into one that is not
LIBRARIES = ("tensorpager", "deepspeed")
SECONDS_MAX = 120  # for all that goes wrong


def run(rounds: int) -> None:
    """Print two tables, and write results/<date>-aio-shim.json."""
    missing = peers.prepare().get("DeepSpeed", "")
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        read, written = Path(directory) / "read", Path(directory) / "written"
        for path in (read, written):
            _make_file(path)
        with Worker("tensorpager") as ours, Worker("deepspeed", missing) as theirs:
            workers = {"tensorpager": ours, "deepspeed": theirs}
            contenders: dict[str, Callable[[], Sample]] = {"fio, huge pages": _cold(read, fio.read_with_huge_pages)}
            for (block_bytes, depth), memory, operation, library in _cases():
                job = {"memory": memory, "block_bytes": block_bytes, "depth": depth, "size_bytes": SIZE_BYTES}
                name = _name(library, operation, memory, block_bytes)
                contenders[name] = _contender(workers[library], operation, read, written, job)
            measured = interleave(contenders, rounds)
        told = _failures(Path(directory), missing)
    summary = _summarise(measured)
    _print_failures(told)
    arguments = {"rounds": rounds, "size_bytes": SIZE_BYTES, "settings": SETTINGS}
    print(f"  written to {save('aio-shim', measured, {'ratios': summary, 'failures': told}, arguments)}")


def _cases() -> Iterator[tuple[tuple[int, int], str, str, str]]:
    for setting in SETTINGS:
        for memory in MEMORIES:
            for operation in OPERATIONS:
                for library in LIBRARIES:
                    yield setting, memory, operation, library


def _name(library: str, operation: str, memory: str, block_bytes: int) -> str:
    return f"{library}, {operation}, {memory}, {block_bytes // MIB} MiB"


def _make_file(path: Path) -> None:
    with path.open("wb") as file:
        for _ in range(SIZE_BYTES // (16 * MIB)):
            file.write(os.urandom(16 * MIB))
        os.fsync(file.fileno())


def _command(library: str) -> tuple[list[str], dict[str, str]]:
    script = str(ROOT / "bench/aio_worker.py")
    if library == "deepspeed":
        return [str(peers.PYTHON), script, library], peers.environment()
    return [sys.executable, script, library], {**os.environ, "PYTHONPATH": str(ROOT / "python")}


class Worker:
    """A library's process, which waits between measurements. With a reason, one that can't run: it raises Skipped."""

    def __init__(self, library: str, missing: str = "") -> None:
        self._missing = missing
        command, environment = _command(library)
        self._process = (
            None
            if missing
            else subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()

    def measure(self, job: Mapping[str, object]) -> Sample:
        if self._process is None:
            raise Skipped(self._missing)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        facts: dict[str, float] = {}
        while "seconds" not in facts:  # what the library prints of its own comes between
            line = self._process.stdout.readline()
            if not line:
                msg = f"ended with status {self._process.wait()}"
                raise Skipped(msg)
            if line.startswith(b'{"seconds"'):
                facts = json.loads(line)
        gib = SIZE_BYTES / 2**30
        return {"bandwidth": gib / facts["seconds"], "cpu": facts["cpu_seconds"] / gib}


def _cold(path: Path, contender: Callable[[Path], Sample]) -> Callable[[], Sample]:
    def measure() -> Sample:
        _drop_from_cache(path)
        return contender(path)

    return measure


def _contender(
    worker: Worker, operation: str, read: Path, written: Path, job: Mapping[str, object]
) -> Callable[[], Sample]:
    def measure() -> Sample:
        path = read if operation == "read" else written
        if operation == "write new":
            written.unlink()
            os.sync()
        else:
            _drop_from_cache(path)
        return worker.measure({**job, "operation": operation.partition(" ")[0], "path": str(path)})

    return measure


def _summarise(measured: dict[str, Measured]) -> dict[str, Any]:
    rows, summary = [], {}
    for (block_bytes, _), memory, operation, library in _cases():
        if library != LIBRARIES[0]:
            continue
        ours, theirs = (_name(each, operation, memory, block_bytes) for each in LIBRARIES)
        what = f"{operation}, {memory}, {block_bytes // MIB} MiB"
        own = f"{measured[ours].median('bandwidth'):.2f}", f"{measured[ours].median('cpu'):.3f}"
        if measured[theirs].skipped:
            rows.append((what, *own, "-", "-", measured[theirs].skipped, "-"))
            continue
        bandwidth = ratio_of_medians(measured, ours, theirs, "bandwidth")
        cpu = ratio_of_medians(measured, ours, theirs, "cpu")
        assert bandwidth is not None
        assert cpu is not None
        summary[what] = {"bandwidth": bandwidth, "cpu": cpu}
        peer = f"{measured[theirs].median('bandwidth'):.2f}", f"{measured[theirs].median('cpu'):.3f}"
        rows.append((what, *own, *peer, f"{bandwidth:.2f}x", f"{cpu:.2f}x"))
    print_table(("", "GiB/s", "CPU-s/GiB", "DeepSpeed", "CPU-s/GiB", "bandwidth", "CPU"), rows)
    yardstick = measured["fio, huge pages"]
    if yardstick.samples:
        print(f"  fio reads {yardstick.median('bandwidth'):.2f} GiB/s at {yardstick.median('cpu'):.3f} CPU-s/GiB")
    summary |= _best_settings(measured)
    return summary


def _best_settings(measured: dict[str, Measured]) -> dict[str, Any]:
    """Each library with the setting that suits it."""
    found = {}
    for memory in MEMORIES:
        for operation in OPERATIONS:
            best = {
                library: max(
                    (
                        measured[_name(library, operation, memory, block_bytes)].median("bandwidth")
                        for block_bytes, _ in SETTINGS
                        if measured[_name(library, operation, memory, block_bytes)].samples
                    ),
                    default=0.0,
                )
                for library in LIBRARIES
            }
            if best["deepspeed"]:
                found[f"{operation}, {memory}, best settings"] = {"bandwidth": best["tensorpager"] / best["deepspeed"]}
    for what, ratios in found.items():
        print(f"  {what}: {ratios['bandwidth']:.2f}x")
    return found


# ---------------------------------------------------------------- what is told of failures


@contextmanager
def _small_file_system(directory: Path) -> Iterator[Path | None]:
    """One of 2 MiB in memory, where we may mount it."""
    mounted = directory / "small"
    mounted.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mounted)], capture_output=True, check=False
    )
    try:
        yield mounted if done.returncode == 0 else None
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", str(mounted)], check=True)


def _failures(directory: Path, missing: str) -> dict[str, dict[str, str]]:
    told: dict[str, dict[str, str]] = {name: {} for name in FAILURES}
    with _small_file_system(directory) as small:
        for library in LIBRARIES:
            for name in FAILURES:
                told[name][library] = missing if library == "deepspeed" else "only root can mount one"
            if library == "deepspeed" and missing:
                continue
            command, environment = _command(library)
            places = [str(directory), *([] if small is None else [str(small)])]
            done = subprocess.run(
                [*command, *places], env=environment, capture_output=True, text=True, check=True, timeout=SECONDS_MAX
            )
            for line in done.stdout.splitlines():
                if not line.startswith("{"):
                    continue
                for name, answer in json.loads(line).items():
                    told[name][library] = answer
    return told


def _print_failures(told: Mapping[str, Mapping[str, str]]) -> None:
    for name, answers in told.items():
        print(f"  {name}")
        for library, answer in answers.items():
            print(f"    {library:12} {answer[:200]}")
