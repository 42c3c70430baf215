# SPDX-License-Identifier: Apache-2.0
"""fio as the yardstick: io_uring, direct, 1 MiB blocks, depth 8, into huge-page buffers that are seen to be huge.

`iomem=mmaphuge` takes pages from the kernel's reserve. As root the reserve is filled for the run and put back
afterwards; without
it the contender is skipped: with 4 KiB-page buffers fio reads at half the speed or less, which would be no yardstick.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.rounds import Sample, Skipped

RESERVE = Path("/proc/sys/vm/nr_hugepages")
PAGES_NEEDED = 16
OPTIONS = ("--rw=read", "--ioengine=io_uring", "--direct=1", "--bs=1M", "--iodepth=8", "--output-format=json")


@contextmanager
def huge_page_reserve() -> Iterator[None]:
    """At least PAGES_NEEDED free huge pages while it lasts; Skipped when that can't be had."""
    before = int(RESERVE.read_text())
    if _free_pages() < PAGES_NEEDED:
        try:
            RESERVE.write_text(str(before + PAGES_NEEDED))
        except OSError as error:
            msg = f"vm.nr_hugepages is {before} and can't be raised: {error.strerror}"
            raise Skipped(msg) from None
    try:
        if _free_pages() < PAGES_NEEDED:
            msg = f"only {_free_pages()} huge pages could be reserved, {PAGES_NEEDED} are needed"
            raise Skipped(msg)
        yield
    finally:
        if int(RESERVE.read_text()) != before:
            RESERVE.write_text(str(before))


def _free_pages() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("HugePages_Free:"):
            return int(line.split()[1])
    return 0


def read_with_huge_pages(path: Path) -> Sample:
    """bandwidth (GiB/s) and cpu (CPU seconds a GiB); Skipped without fio or huge pages."""
    with huge_page_reserve():
        return _read(path, "mmaphuge")


def read_with_default_buffers(path: Path) -> Sample:
    return _read(path, "malloc")


def _read(path: Path, memory: str) -> Sample:
    if shutil.which("fio") is None:
        msg = "fio is not installed (apt-get install fio)"
        raise Skipped(msg)
    free_before = _free_pages()
    lowest = [free_before]
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            lowest[0] = min(lowest[0], _free_pages())
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        command = ["fio", "--name=page-in", f"--filename={path}", f"--iomem={memory}", *OPTIONS]
        done_run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=os.sep)
    finally:
        done.set()
        watcher.join()
    if done_run.returncode != 0:
        msg = f"fio failed: {done_run.stderr.strip()[-300:]}"
        raise Skipped(msg)
    job = json.loads(done_run.stdout)["jobs"][0]
    huge_pages_used = free_before - lowest[0]
    if memory == "mmaphuge" and huge_pages_used < 4:  # eight buffers of 1 MiB
        msg = f"fio took {huge_pages_used} huge pages: its buffers are not huge"
        raise Skipped(msg)
    seconds = job["job_runtime"] / 1000
    gib = job["read"]["io_bytes"] / 2**30
    cpu_seconds = (job["usr_cpu"] + job["sys_cpu"]) / 100 * seconds
    return {
        "bandwidth": job["read"]["bw_bytes"] / 2**30,
        "cpu": cpu_seconds / gib,
        "huge_pages": float(huge_pages_used),
    }
