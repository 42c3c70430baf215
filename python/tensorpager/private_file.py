# SPDX-License-Identifier: Apache-2.0
"""Files that only their owner may read: whatever this package writes."""

from __future__ import annotations

import os
from typing import BinaryIO

__all__ = ["open_private", "write_private"]


def open_private(path: str | os.PathLike[str]) -> BinaryIO:
    """Open for writing, made with mode 0600 or emptied. OSError as from os.open."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb")


def write_private(path: str | os.PathLike[str], text: str) -> None:
    """Write a text as UTF-8."""
    with open_private(path) as file:
        file.write(text.encode())
