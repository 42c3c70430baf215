# SPDX-License-Identifier: Apache-2.0
"""A store: the directory, or directories, in which a pagefile keeps what must survive."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tensorpager.errors import IoError

if TYPE_CHECKING:
    from tensorpager._core import Pagefile

__all__ = [
    "Store",
    "bandwidth_weights",
    "create_pagefile",
    "make_directory",
    "open_pagefile",
    "refuse_commit",
    "store_directories",
]

Store = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

#: Each of reading and writing: long enough for a drive to show its rate, short beside moving a model.
_MEASURED_SECONDS = 0.25

_FILES = (
    *("root.tensorpager", "root.tensorpager.new", "root.tensorpager.prepared"),
    *("pages.tensorpager", "lock.tensorpager"),
)


def store_directories(store: Store) -> list[str]:
    """The directories of a store, the first of which has its root. ValueError when there is none."""
    directories = [os.fspath(store)] if isinstance(store, (str, os.PathLike)) else [os.fspath(each) for each in store]
    if not directories or not all(directories):
        msg = "a store is a directory, or a sequence of directories; none was named"
        raise ValueError(msg)
    return directories


def create_pagefile(directories: list[str], page_bytes: int) -> Pagefile:
    """A new pagefile; directories that are not there are made, mode 0700, but not their parents.

    IoError when one is there that has a commit, or is open; one whose creation was interrupted is replaced.
    """
    from tensorpager._core import Pagefile

    for directory in directories:
        make_directory(directory)
    if (Path(directories[0]) / _FILES[0]).exists():
        _remove_uncommitted(directories)
    return Pagefile.create(directories, page_bytes=page_bytes, weights=bandwidth_weights(directories))


def make_directory(directory: str) -> None:
    """Unless it is there; mode 0700. IoError."""
    try:
        Path(directory).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        msg = f"could not make the directory {directory} for a store: {error.strerror}"
        raise IoError(error.errno or 0, msg) from error


def refuse_commit(directory: str, number: int) -> NoReturn:
    """IoError: a run is there, which must not be written over."""
    msg = (
        f"{directory} holds a training run already, at commit {number}: go on with it by resume(), name another "
        "directory, or remove that one"
    )
    raise IoError(17, msg)


def _remove_uncommitted(directories: list[str]) -> None:
    pagefile = open_pagefile(directories)
    try:
        if pagefile.metadata:
            refuse_commit(directories[0], pagefile.commit_number)
        for directory in directories:  # while its lock is held: nobody else is there
            for name in _FILES:
                (Path(directory) / name).unlink(missing_ok=True)
    finally:
        pagefile.close()


def open_pagefile(directories: list[str], *, to_write: bool = False) -> Pagefile:
    """The last commit. to_write: measures how directories share what is written. IoError."""
    from tensorpager._core import Pagefile

    return Pagefile.open(directories, weights=bandwidth_weights(directories) if to_write else [])


def bandwidth_weights(directories: list[str]) -> list[float]:
    """How directories share pages, by what their drives move just now, each read once for each time it is written.

    Measured for half a second each, if there are several; empty, which means equal shares, for one, and when one of
    them has no room to measure in (a store on a full drive can be read).
    """
    if len(directories) == 1:
        return []
    from tensorpager.measured_hardware import drive_rates

    try:
        rates = [drive_rates(directory, _MEASURED_SECONDS)[:2] for directory in directories]
    except OSError:
        return []
    return [1 / (1 / read + 1 / write) for read, write in rates]
