# SPDX-License-Identifier: Apache-2.0
"""Cold page-in of one file: our engines beside fio with huge-page buffers, and peers that read into torch tensors.

Bars: uring >= 0.98 of fio at <= 0.02 CPU-s/GiB, pread >= 0.85 of fio, both above every peer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import fio, peers
from bench.rounds import Measured, Sample, Skipped, interleave, print_table, ratio_of_medians, save

CACHE = Path(__file__).resolve().parent / ".cache"
TENSORS = 64
YARDSTICK = "fio, huge pages"


def run(rounds: int, size_bytes: int, with_peers: bool) -> dict[str, Measured]:
    CACHE.mkdir(exist_ok=True)
    path = _make_file(size_bytes)
    contenders: dict[str, Callable[[], Sample]] = {
        YARDSTICK: lambda: fio.read_with_huge_pages(path),
        "fio, default buffers": lambda: fio.read_with_default_buffers(path),
        "tensorpager uring": lambda: _sweep(path, "uring"),
        "tensorpager pread": lambda: _sweep(path, "pread"),
    }
    if with_peers:
        contenders.update(_peers(path))
    print(f"page-in of {size_bytes / 2**30:.1f} GiB, cold, {rounds} interleaved rounds")
    measured = interleave({name: _cold(path, each) for name, each in contenders.items()}, rounds)
    summary = _summarise(measured)
    print(f"  written to {save('page-in', measured, summary, {'rounds': rounds, 'size_bytes': size_bytes})}")
    return measured


def _make_file(size_bytes: int) -> Path:
    """A safetensors file of TENSORS equal tensors, and the same as an archive of torch's and an offload folder."""
    path = CACHE / f"page-in-{size_bytes}.safetensors"
    if not path.exists():
        script = f"""
import os, sys, torch
from safetensors.torch import save_file
tensors = {{f"layer.{{i}}.weight": torch.rand({size_bytes} // {TENSORS} // 4) for i in range({TENSORS})}}
save_file(tensors, sys.argv[1] + ".unfinished")
os.rename(sys.argv[1] + ".unfinished", sys.argv[1])
"""
        subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    return path


def _make_peer_copies(path: Path) -> None:
    script = """
import sys, torch
from accelerate.utils import offload_state_dict
from safetensors.torch import load_file
tensors = load_file(sys.argv[1])
torch.save(tensors, sys.argv[2])
offload_state_dict(sys.argv[3], tensors)
"""
    archive, folder = path.with_suffix(".pt"), path.with_suffix(".offload")
    if archive.exists() and (folder / "index.json").exists():
        return
    subprocess.run([str(peers.PYTHON), "-c", script, str(path), str(archive), str(folder)], check=True)


def remove_files(size_bytes: int) -> None:
    """Remove what run() made: three times size_bytes."""
    path = CACHE / f"page-in-{size_bytes}.safetensors"
    for each in (path, path.with_suffix(".pt")):
        each.unlink(missing_ok=True)
    shutil.rmtree(path.with_suffix(".offload"), ignore_errors=True)


def _peers(path: Path) -> dict[str, Callable[[], Sample]]:
    missing = peers.prepare()
    _make_peer_copies(path)
    names = {
        "safetensors load_file": "",
        "torch.load(mmap) + touch": "",
        "accelerate, in place": "",
        "accelerate disk offload": "",
        "DeepSpeed async_io, own buffers": missing.get("DeepSpeed", ""),
        "DeepSpeed async_io, torch tensors": missing.get("DeepSpeed", ""),
        "KvikIO": missing.get("KvikIO", ""),
    }
    return {name: _peer(name, path, reason) for name, reason in names.items()}


def _peer(name: str, path: Path, reason: str) -> Callable[[], Sample]:
    def read() -> Sample:
        if reason:
            raise Skipped(reason)
        return peers.read_with(name, path)

    return read


def _cold(path: Path, contender: Callable[[], Sample]) -> Callable[[], Sample]:
    """Drop the file's pages from the page cache before each run; every contender starts from the disk."""

    def read() -> Sample:
        for each in (path, path.with_suffix(".pt"), *path.with_suffix(".offload").glob("*")):
            if each.exists():
                _drop_from_cache(each)
        return contender()

    return read


def _drop_from_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _sweep(path: Path, engine: str) -> Sample:
    """In this process: torch is not loaded, and the frames are allocated before the clock starts."""
    from tensorpager.sweep import sweep_files

    swept = sweep_files([path], engine=engine)
    if swept.engine != engine:
        msg = f"asked for {engine}, got {swept.engine}"
        raise Skipped(msg)
    gib = swept.bytes_read / 2**30
    return {"bandwidth": gib / swept.seconds, "cpu": swept.cpu_seconds / gib}


def _summarise(measured: dict[str, Measured]) -> dict[str, Any]:
    rows = []
    summary: dict[str, Any] = {}
    for name, each in measured.items():
        if not each.samples:
            rows.append((name, "-", "-", "-", each.skipped))
            continue
        ratio = ratio_of_medians(measured, name, YARDSTICK, "bandwidth")
        low, high = each.spread("bandwidth")
        summary[name] = {"of_fio": ratio, "gib_per_second": each.median("bandwidth"), "cpu_per_gib": each.median("cpu")}
        shown = "-" if ratio is None else f"{ratio:.2f}"
        rows.append(
            (name, shown, f"{each.median('bandwidth'):.2f}", f"{each.median('cpu'):.3f}", f"{low:.2f}..{high:.2f}")
        )
    print_table(("", "of fio", "GiB/s", "CPU-s/GiB", "range"), rows)
    return summary
