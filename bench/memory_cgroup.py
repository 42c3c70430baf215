# SPDX-License-Identifier: Apache-2.0
"""A memory cgroup of a given size for one child process; version 1 or 2 of cgroups, whichever holds the controller
here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.rounds import Skipped

VERSION_1 = Path("/sys/fs/cgroup/memory")
VERSION_2 = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))


@contextmanager
def limited_to(limit_bytes: int) -> Iterator[Callable[[], None]]:
    """Yields what the child calls before exec (preexec_fn) to be inside. Skipped where a group can't be made."""
    parent, limit_file = _find()
    group = parent / f"tensorpager-bench-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit_file).write_text(str(limit_bytes))
        swap = group / ("memory.swap.max" if limit_file == "memory.max" else "memory.memsw.limit_in_bytes")
        if swap.exists():
            swap.write_text("0" if limit_file == "memory.max" else str(limit_bytes))
    except OSError as error:
        if group.exists():
            group.rmdir()
        msg = f"a memory cgroup can't be made here: {error}"
        raise Skipped(msg) from None
    members = group / "cgroup.procs"
    try:
        yield lambda: _enter(members)
    finally:
        group.rmdir()


def _enter(members: Path) -> None:
    members.write_text(str(os.getpid()))


def _find() -> tuple[Path, str]:
    if (VERSION_1 / "memory.limit_in_bytes").exists() or (VERSION_1 / "cgroup.procs").exists():
        return VERSION_1, "memory.limit_in_bytes"
    for root in VERSION_2:
        controllers = root / "cgroup.controllers"
        if controllers.exists() and "memory" in controllers.read_text().split():
            return root, "memory.max"
    msg = "neither version of cgroups has a memory controller here"
    raise Skipped(msg)
