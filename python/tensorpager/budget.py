# SPDX-License-Identifier: Apache-2.0
"""Budgets as people write them: "1GiB", "512 MiB", "1.5GB", or a number of bytes."""

from __future__ import annotations

import re
from fractions import Fraction

__all__ = ["format_bytes", "parse_bytes"]

_UNITS = {
    "": 1,
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")
_BYTES_MAX = 2**60


def parse_bytes(size: int | str) -> int:
    """Bytes of a size such as "1GiB", "512 MiB", "1.5GB" (decimal) or 1073741824.

    Fractions are rounded down to whole bytes. ValueError when the text is not a size, or the size is not positive or
    beyond 2**60; TypeError for anything else than an int or a str.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        msg = f"a size is a number of bytes or a text such as '1GiB', not {type(size).__name__}"
        raise TypeError(msg)
    size_bytes = size if isinstance(size, int) else _parse_text(size)
    if not 0 < size_bytes <= _BYTES_MAX:
        msg = f"the size {size!r} is {size_bytes} bytes; it must lie between 1 byte and 2**60 bytes"
        raise ValueError(msg)
    return size_bytes


def _parse_text(text: str) -> int:
    match = _PATTERN.fullmatch(text)
    unit = match[2].lower() if match is not None else None
    if match is None or unit not in _UNITS:
        msg = f"{text!r} is not a size; write for example '1GiB', '512MiB', '1.5GB' or a number of bytes"
        raise ValueError(msg)
    return int(Fraction(match[1]) * _UNITS[unit])


def format_bytes(size_bytes: int) -> str:
    """A size for messages: whole bytes below 1 KiB, else one decimal of the largest fitting binary unit."""
    if size_bytes < 2**10:
        return f"{size_bytes} B"
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes / 2**10:.1f} KiB"
