# SPDX-License-Identifier: Apache-2.0
"""What this machine offers for paging, and why: gathered as plain data, for `tensorpager doctor` and for bug reports.

Needs no torch. Everything is read from the system at the time of the call; nothing is changed. What can't be found
out is a finding with the reason, never an exception.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tensorpager.budget import format_bytes

__all__ = ["Finding", "Report", "examine"]

Verdict = Literal["ok", "limited", "absent"]

UNLIMITED_BYTES = 2**60  # version 1 of cgroups says "no limit" with a number close to 2**63
PAGING_ENGINES = ("uring", "pread")  # the others transfer nothing; they are for tests
PAGE_BYTES_MIN = 2 * 2**20


@dataclass(frozen=True)
class Finding:
    """One thing looked at. needed: paging can't work when it is absent. detail: why, and what would change it."""

    topic: str
    name: str
    verdict: Verdict
    value: str
    detail: str = ""
    needed: bool = False


@dataclass(frozen=True)
class Report:
    """All findings. can_page: at least one engine runs here, and nothing that is needed is absent."""

    findings: tuple[Finding, ...]
    can_page: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON: {"can_page": bool, "findings": [{"topic", "name", "verdict", "value", "detail", "needed"}]}."""
        return asdict(self)


def examine(directories: Sequence[str | os.PathLike[str]] = (".",)) -> Report:
    """Look at this machine, and at the directories that checkpoints and spill would live in. Takes well under a
    second."""
    findings = [
        Finding("system", "kernel", "ok", platform.release()),
        Finding("system", "cores", "ok", str(len(os.sched_getaffinity(0)))),
        *_engines(),
        *(finding for directory in directories for finding in _directory(Path(directory))),
        _memory(),
        _cgroup(),
        _memlock(),
        _huge_pages(),
        _map_count(),
        _gpu(),
        *_transport(),
    ]
    has_engine = any(finding.topic == "engine" and finding.verdict != "absent" for finding in findings)
    lacks = any(finding.needed and finding.verdict == "absent" for finding in findings)
    return Report(tuple(findings), has_engine and not lacks)


def _engines() -> list[Finding]:
    try:
        from tensorpager import _core
    except ImportError as error:
        advice = f"{error}; build it with `pip install .` or `make setup`"
        return [Finding("engine", "native module", "absent", "can't be imported", advice, needed=True)]
    found: list[Finding] = []
    candidates = [candidate for candidate in _core.probe_engines() if candidate.engine in PAGING_ENGINES]
    for rank, candidate in enumerate(candidates):
        value = "usable" if candidate.usable else "not usable here"
        if candidate.usable and not any(finding.verdict == "ok" for finding in found):
            value = "usable, chosen" if rank == 0 else "usable, chosen in place of the better one"
        found.append(
            Finding("engine", candidate.engine, "ok" if candidate.usable else "absent", value, candidate.reason)
        )
    return found


def _directory(directory: Path) -> list[Finding]:
    name = str(directory)
    try:
        from tensorpager import _core

        facts = _core.probe_directory(name)
    except ImportError:
        return []
    except Exception as error:
        return [Finding("directory", name, "absent", "can't be used", str(error))]
    free_bytes = _free_bytes(directory)
    if facts.direct:
        value = f"{facts.file_system}, O_DIRECT, aligned to {facts.align_bytes} bytes, {format_bytes(free_bytes)} free"
        found = [Finding("directory", name, "ok", value, facts.reason)]
    else:
        value = f"{facts.file_system}, no O_DIRECT, {format_bytes(free_bytes)} free"
        detail = f"{facts.reason}; reads go through the page cache and cost a copy and memory beside the budget"
        found = [Finding("directory", name, "limited", value, detail)]
    return [*found, _drive(directory)]


def _free_bytes(directory: Path) -> int:
    facts = os.statvfs(directory)
    return facts.f_bavail * facts.f_frsize


def _drive(directory: Path) -> Finding:
    """The block device below a directory, from sysfs."""
    device = directory.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    node = Path("/sys/dev/block") / name
    if not node.exists():
        return Finding(
            "drive", name, "limited", "not a block device", "a network or memory file system, or a stack of them"
        )
    node = node.resolve()
    disk = node if (node / "queue").is_dir() else node.parent
    size_bytes = int(_text(disk / "size", "0")) * 512
    spins = _text(disk / "queue/rotational", "0") == "1"
    model = _text(disk / "device/model", "")
    kind = "says it spins (virtual drives often say so)" if spins else "solid state"
    value = f"{disk.name}, {kind}, {format_bytes(size_bytes)}{', ' + model if model else ''}"
    largest_kib = int(_text(disk / "queue/max_sectors_kb", "0"))
    queue = _text(disk / "queue/nr_requests", "?")
    detail = f"requests up to {largest_kib} KiB, {queue} at a time"
    return Finding("drive", disk.name, "ok", value, detail)


def _text(path: Path, default: str) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return default


def _memory() -> Finding:
    fields = dict(line.split(":", 1) for line in _text(Path("/proc/meminfo"), "").splitlines() if ":" in line)
    total, available = (int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return Finding("memory", "RAM", "ok", f"{format_bytes(total)}, {format_bytes(available)} available")


def _cgroup() -> Finding:
    """The tightest memory limit on the way from this process's group to the root, in version 2 or 1."""
    roots: tuple[str, ...]
    limits = []
    for line in _text(Path("/proc/self/cgroup"), "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            roots, name = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"), "memory.max"
        elif "memory" in controllers.split(","):
            roots, name = ("/sys/fs/cgroup/memory",), "memory.limit_in_bytes"
        else:
            continue
        for root in roots:
            place = Path(root) / group.lstrip("/")
            for folder in (place, *place.parents):
                text = _text(folder / name, "max")
                if text.isdigit() and int(text) < UNLIMITED_BYTES:
                    limits.append(int(text))
                if folder == Path(root):
                    break
    if not limits:
        return Finding("memory", "cgroup limit", "ok", "none")
    detail = "budget and the process's own memory must fit in it together"
    return Finding("memory", "cgroup limit", "ok", format_bytes(min(limits)), detail)


def _memlock() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("memory", "locked memory", "ok", "unlimited")
    if os.geteuid() == 0:
        return Finding("memory", "locked memory", "ok", f"{format_bytes(soft)}, which does not bind root")
    detail = (
        "frames beyond it are not registered with io_uring: more CPU per byte, same bandwidth; raise it with ulimit -l"
    )
    return Finding("memory", "locked memory", "limited", format_bytes(soft), detail)


def _huge_pages() -> Finding:
    text = _text(Path("/sys/kernel/mm/transparent_hugepage/enabled"), "")
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen in ("always", "madvise"):
        return Finding("memory", "transparent huge pages", "ok", chosen)
    detail = (
        "frames are made of 4 KiB pages, which read at half the speed or less; "
        "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
    )
    return Finding("memory", "transparent huge pages", "limited", chosen or "not in this kernel", detail)


def _map_count() -> Finding:
    text = _text(Path("/proc/sys/vm/max_map_count"), "")
    if not text.isdigit():
        return Finding("memory", "vm.max_map_count", "limited", "unknown", "can't be read here")
    limit = int(text)
    # Each resident page can be a mapping of its own, with a gap on one side: two to a page at worst.
    budget_bytes = limit // 2 * PAGE_BYTES_MIN
    detail = f"enough for {format_bytes(budget_bytes)} in 2 MiB pages; larger budgets take larger pages"
    return Finding("memory", "vm.max_map_count", "ok", str(limit), detail)


def _gpu() -> Finding:
    """The CUDA driver, if there is one: loaded and asked for its devices, no context is made."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        detail = "no libcuda.so.1; the budget is a slice of RAM"
        return Finding("gpu", "CUDA driver", "limited", "none", detail)
    status = int(driver.cuInit(0))
    if status != 0:
        return Finding("gpu", "CUDA driver", "limited", "loads, but can't start", f"cuInit returned {status}")
    count, version = ctypes.c_int(0), ctypes.c_int(0)
    driver.cuDeviceGetCount(ctypes.byref(count))
    driver.cuDriverGetVersion(ctypes.byref(version))
    value = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}, {count.value} device(s)"
    detail = (
        "page(model, device='cuda') pages through registered host frames" if count.value else "no device to page to"
    )
    return Finding("gpu", "CUDA driver", "ok" if count.value else "limited", value, detail)


def _transport() -> list[Finding]:
    """How pages get from the drive to a device, and whether there is a shorter way."""
    try:
        from tensorpager import _core
    except ImportError:
        return []
    facts = _core.probe_cufile()
    if facts.direct:
        value = "drive -> device by cuFile; through registered host frames what the host tier keeps"
        return [Finding("gpu", "transport", "ok", value, facts.reason)]
    value = "drive -> registered host frame -> device frame"
    why = "cuFile works, but copies through host memory itself" if facts.usable else "cuFile is not usable here"
    return [Finding("gpu", "transport", "ok", value, f"{why}: {facts.reason}")]
