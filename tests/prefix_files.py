# SPDX-License-Identifier: Apache-2.0
"""Blocks for the tests of the prefix store: small ones, whose content is told by their name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tensorpager.prefix_block import BlockHeader, Part, laid_out
from tensorpager.prefix_store import PrefixStore

TOKENS = 4
HEADS, SIZE = 2, 32


def name_of(chain: str, index: int) -> bytes:
    return hashlib.blake2b(f"{chain}/{index}".encode(), digest_size=32).digest()


def header_of(chain: str, index: int, layers: int = 2, size: int = SIZE) -> BlockHeader:
    size_bytes = TOKENS * 2 * HEADS * size * 4
    parts = [Part(layer, 0, size_bytes, "", HEADS, size, "float32", HEADS, size, "float32") for layer in range(layers)]
    return laid_out(name_of(chain, index - 1) if index > 0 else b"", TOKENS, parts)


def payload_of(name: bytes, part: Part) -> bytes:
    piece = hashlib.blake2b(name, digest_size=64, salt=part.layer.to_bytes(4, "little")).digest()
    return (piece * (part.size_bytes // len(piece) + 1))[: part.size_bytes]


def save(store: PrefixStore, chain: str, count: int, first: int = 0, seconds: float = 1.0, **kwargs: Any) -> int:
    """Blocks first .. count - 1 of a chain; how many of them were stored."""
    wanted = [(name_of(chain, index), header_of(chain, index, **kwargs)) for index in range(first, count)]
    blocks = store.create(wanted)
    try:
        for block in blocks:
            for number, part in enumerate(block.header.parts):
                block.write_part(number, memoryview(payload_of(block.name, part)))
            block.finish(seconds)
    finally:
        for block in blocks:
            block.abandon()
    return len(blocks)


def load(store: PrefixStore, chain: str, index: int) -> bool:
    """Whether the block is there; its bytes are what was saved, or the store says that they are not."""
    name = name_of(chain, index)
    block = store.open(name)
    if block is None:
        return False
    try:
        for part in block.header.parts:
            memory = memoryview(bytearray(part.size_bytes + 100))
            if not block.read_part(part, memory):
                return False
            assert bytes(memory[: part.size_bytes]) == payload_of(name, part), "another content than was saved"
    finally:
        block.close()
    return True


def chain_in(directory: str | Path) -> list[Path]:
    """The files of a directory that holds one chain, from the first block on."""
    after: dict[str, Path] = {}
    for path in Path(directory).glob("*.prefix"):
        with path.open("rb") as file:
            parent = BlockHeader.read(file.fileno(), bytes.fromhex(path.stem)).parent
        assert parent not in after, "two chains"
        after[parent] = path
    chain: list[Path] = []
    while (following := after.get(chain[-1].stem if chain else "")) is not None:
        chain.append(following)
    return chain
