# SPDX-License-Identifier: Apache-2.0
"""A file with one block of keys and values: a header in JSON, then a part for each layer.

    magic, version, length of the JSON, hash of it | JSON | parts, each at a multiple of 4096 bytes

The hash of the header and the checksum of each part have the block's name mixed in (prefix_chain.py). So a file that is
cut short, that bits have changed in, or that is another block's, is told from the one that was written, whichever part
of it is read. Sums of parts are XXH3 (`_core.tree_checksum`), which is as fast as a drive; against an enemy there are
the file's mode and owner.

Threads: different parts may be read or written at a time. Blocking: yes. Errors: DamagedBlockError for a file that is
not what was written; OSError.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import struct
from dataclasses import asdict, dataclass
from typing import Any

from tensorpager._core import tree_checksum
from tensorpager.prefix_chain import DIGEST_BYTES

__all__ = [
    "ALIGN_BYTES",
    "BlockHeader",
    "DamagedBlockError",
    "Part",
    "laid_out",
    "part_checksum",
    "read_all",
    "write_all",
]

ALIGN_BYTES = 4096
_PREAMBLE = struct.Struct("<8sII16s")
_MAGIC, _VERSION = b"tpprefix", 1
_HEADER_BYTES_MAX = 4 * 2**20
_PART_BYTES_MAX = 2**40
_CHECKSUM_HEX = 32
#: Beside the JSON as it is before checksums and seconds are known.
_SPARE_BYTES = 64


class DamagedBlockError(Exception):
    """A file is not the block that its name says, or not as it was written. The message says what is wrong."""


@dataclass(frozen=True)
class Part:
    """One layer's: tokens of keys, then of values, [tokens, heads, size] each. offset_bytes: in the file."""

    layer: int
    offset_bytes: int
    size_bytes: int
    checksum: str
    key_heads: int
    key_size: int
    key_dtype: str  # of torch: "bfloat16"
    value_heads: int
    value_size: int
    value_dtype: str


@dataclass(frozen=True)
class BlockHeader:
    """What a file says of itself. parent: the name of the block before it, in hexadecimal, or of the chain's root.
    recompute_seconds: what computing its tokens took; 0 when nobody knows."""

    parent: str
    tokens: int
    recompute_seconds: float
    parts: tuple[Part, ...]

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        last = self.parts[-1]
        return _aligned(last.offset_bytes + last.size_bytes)

    def encode(self, name: bytes) -> bytes:
        """What stands before the first part."""
        text = self._json()
        head = _PREAMBLE.pack(_MAGIC, _VERSION, len(text), _header_hash(name, text)) + text
        assert len(head) <= self.parts[0].offset_bytes
        return head.ljust(self.parts[0].offset_bytes, b"\0")

    def _json(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def read(cls, descriptor: int, name: bytes) -> BlockHeader:
        """The header of an open file. DamagedBlockError, OSError."""
        start = read_all(descriptor, _PREAMBLE.size, 0)
        magic, version, size_bytes, expected = _PREAMBLE.unpack(start)
        if magic != _MAGIC or version != _VERSION or not 0 < size_bytes <= _HEADER_BYTES_MAX:
            msg = "it does not begin as a block does"
            raise DamagedBlockError(msg)
        text = read_all(descriptor, size_bytes, _PREAMBLE.size)
        if not hmac.compare_digest(_header_hash(name, text), expected):
            msg = "its header is another block's, or damaged"
            raise DamagedBlockError(msg)
        header = _checked(json.loads(text), _PREAMBLE.size + size_bytes)
        if os.fstat(descriptor).st_size != header.file_bytes:
            msg = f"it has {os.fstat(descriptor).st_size} bytes instead of {header.file_bytes}"
            raise DamagedBlockError(msg)
        return header


def laid_out(parent: bytes, tokens: int, parts: list[Part]) -> BlockHeader:
    """A header whose parts lie one after the other; their checksums, and what it took, come when they are known."""
    blank = [Part(**{**asdict(part), "checksum": "0" * _CHECKSUM_HEX, "offset_bytes": 2**62}) for part in parts]
    text = BlockHeader(parent.hex(), tokens, 0.0, tuple(blank))._json()
    offset = _aligned(_PREAMBLE.size + len(text) + _SPARE_BYTES)
    placed = []
    for part in blank:
        placed.append(Part(**{**asdict(part), "offset_bytes": offset}))
        offset = _aligned(offset + part.size_bytes)
    return BlockHeader(parent.hex(), tokens, 0.0, tuple(placed))


def part_checksum(name: bytes, part: Part, payload: memoryview) -> str:
    """Of a part's bytes, as a part of this block: hexadecimal."""
    facts = struct.pack("<QQQ", part.layer, len(payload), tree_checksum(payload))
    return hashlib.blake2b(facts, digest_size=_CHECKSUM_HEX // 2, key=name, person=b"tp prefix part").hexdigest()


def read_all(descriptor: int, size_bytes: int, offset_bytes: int) -> bytes:
    """So many bytes of a file. DamagedBlockError when it ends before, OSError."""
    parts = []
    while size_bytes > 0:
        piece = os.pread(descriptor, size_bytes, offset_bytes)
        if not piece:
            msg = f"it ends at {offset_bytes}"
            raise DamagedBlockError(msg)
        parts.append(piece)
        size_bytes -= len(piece)
        offset_bytes += len(piece)
    return b"".join(parts)


def write_all(descriptor: int, payload: memoryview | bytes, offset_bytes: int) -> None:
    """All of it. OSError."""
    view = memoryview(payload)
    while len(view) > 0:
        done = os.pwrite(descriptor, view, offset_bytes)
        view, offset_bytes = view[done:], offset_bytes + done


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES


def _header_hash(name: bytes, text: bytes) -> bytes:
    assert len(name) == DIGEST_BYTES
    return hashlib.blake2b(text, digest_size=16, key=name, person=b"tp prefix head").digest()


def _checked(content: Any, end_bytes: int) -> BlockHeader:
    """The hash says that it was written here; what is used as a size or a place is looked at all the same."""
    try:
        parts = tuple(Part(**part) for part in content["parts"])
        header = BlockHeader(content["parent"], content["tokens"], float(content["recompute_seconds"]), parts)
        numbers = [header.tokens]
        for part in parts:
            numbers += [part.layer, part.offset_bytes, part.size_bytes]
            numbers += [part.key_heads, part.key_size, part.value_heads, part.value_size]
            sound_names = isinstance(part.key_dtype, str) and isinstance(part.value_dtype, str)
            numbers += [] if sound_names else [-1]
        sound = all(type(number) is int and 0 <= number <= _PART_BYTES_MAX for number in numbers)
    except (KeyError, TypeError, ValueError) as error:
        msg = f"its header lacks something: {error!r}"
        raise DamagedBlockError(msg) from error
    for part in parts if sound else ():
        sound = sound and part.offset_bytes >= end_bytes and part.offset_bytes % ALIGN_BYTES == 0
        end_bytes = part.offset_bytes + part.size_bytes
    if not sound or not parts or header.tokens < 1:
        msg = "its header has numbers that can't be"
        raise DamagedBlockError(msg)
    return header
