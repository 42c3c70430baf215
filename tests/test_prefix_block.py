# SPDX-License-Identifier: Apache-2.0
"""Files of blocks: whatever happens to one, it is what was written or it is told from that."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from prefix_files import header_of, load, name_of, payload_of, save
from tensorpager._core import tree_checksum
from tensorpager.prefix_block import ALIGN_BYTES, BlockHeader, DamagedBlockError, laid_out, part_checksum, write_all
from tensorpager.prefix_store import PrefixStore


@pytest.fixture
def store(tmp_path: Path) -> PrefixStore:
    made = PrefixStore(tmp_path / "store", "1MiB")
    assert save(made, "a", 3) == 3
    return made


def path_of(store: PrefixStore, index: int, chain: str = "a") -> Path:
    return Path(store.directory) / f"{name_of(chain, index).hex()}.prefix"


def test_what_is_written_is_read(store: PrefixStore) -> None:
    assert [load(store, "a", index) for index in range(4)] == [True, True, True, False]
    header = header_of("a", 1)
    assert path_of(store, 1).stat().st_size == header.file_bytes
    assert all(part.offset_bytes % ALIGN_BYTES == 0 for part in header.parts)
    assert header.parent == name_of("a", 0).hex()
    assert path_of(store, 1).stat().st_mode & 0o7777 == 0o600


def test_a_header_may_be_long(tmp_path: Path) -> None:
    """128 layers: more than one block of the file."""
    store = PrefixStore(tmp_path / "store", "4MiB")
    assert save(store, "long", 1, layers=128, size=1) == 1
    assert header_of("long", 0, layers=128, size=1).parts[0].offset_bytes > ALIGN_BYTES
    assert load(store, "long", 0)


def used_bytes(header: BlockHeader) -> list[tuple[int, int]]:
    """The ranges that mean something: the preamble and the JSON, and each part. Between them is padding."""
    text = 32 + len(header._json()) + 4  # seconds are "1.0"; four digits of spare
    return [(0, text), *((part.offset_bytes, part.offset_bytes + part.size_bytes) for part in header.parts)]


def test_every_bit_that_means_something(store: PrefixStore, tmp_path: Path) -> None:
    """Each bit of the header, and some of each part, one by one."""
    path, kept = path_of(store, 1), tmp_path / "kept"
    shutil.copy2(path, kept)
    content = kept.read_bytes()
    header = header_of("a", 1)
    text_end = content.index(b"\0", 32)
    places = list(range(text_end)) + [place for begin, end in used_bytes(header)[1:] for place in range(begin, end, 13)]
    damaged = 0
    for count, place in enumerate(places):
        changed = bytearray(content)
        changed[place] ^= 1 << count % 8
        path.write_bytes(changed)
        assert not load(store, "a", 1), place
        assert not path.exists(), place
        damaged += 1
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    assert damaged == len(places) > 400
    path.write_bytes(content)
    assert load(store, "a", 1)
    assert store.stats()["blocks_damaged"] == damaged


def rewritten(change: Callable[[bytearray], object]) -> Callable[[PrefixStore, Path], object]:
    def damage(_: PrefixStore, path: Path) -> None:
        content = bytearray(path.read_bytes())
        change(content)
        path.write_bytes(content)

    return damage


FIRST, SECOND = (slice(part.offset_bytes, part.offset_bytes + part.size_bytes) for part in header_of("a", 1).parts)


def exchange(content: bytearray) -> None:
    content[FIRST], content[SECOND] = content[SECOND], content[FIRST]


def take_part(store: PrefixStore, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[SECOND] = path_of(store, 0).read_bytes()[SECOND]
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[PrefixStore, Path], object]] = {
    "empty": lambda _, path: path.write_bytes(b""),
    "cut in the header": lambda _, path: os.truncate(path, 100),
    "cut in a part": lambda _, path: os.truncate(path, path.stat().st_size - ALIGN_BYTES - 1),
    "longer": lambda _, path: os.truncate(path, path.stat().st_size + 1),
    "a sector torn off": rewritten(
        lambda content: content.__setitem__(slice(SECOND.stop - 512, SECOND.stop), bytes(512))
    ),
    "another block": lambda store, path: path.write_bytes(path_of(store, 0).read_bytes()),
    "the part of another block": take_part,
    "parts in another order": rewritten(exchange),
    "another format": rewritten(lambda content: content.__setitem__(slice(8), b"safetens")),
    "a header of 4 GiB": rewritten(lambda content: content.__setitem__(slice(12, 16), b"\xff" * 4)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_deleted(store: PrefixStore, damage: str) -> None:
    path = path_of(store, 1)
    DAMAGES[damage](store, path)
    assert not load(store, "a", 1)
    assert not path.exists()
    assert store.stats()["blocks_damaged"] == 1
    assert load(store, "a", 0)
    assert save(store, "a", 3) == 1  # the one that is missing
    assert load(store, "a", 1)


def write_header(path: Path, name: bytes, header: BlockHeader) -> None:
    """A file whose header is sealed, whatever it says."""
    size_bytes = max(header.file_bytes, 0) if header.parts else ALIGN_BYTES
    path.write_bytes(b"")
    path.chmod(0o600)
    descriptor = os.open(path, os.O_RDWR)
    text = json.dumps(vars(header) | {"parts": [vars(part) for part in header.parts]}, separators=(",", ":")).encode()
    from tensorpager.prefix_block import _PREAMBLE, _header_hash

    write_all(descriptor, _PREAMBLE.pack(b"tpprefix", 1, len(text), _header_hash(name, text)) + text, 0)
    os.truncate(descriptor, min(size_bytes, 2**20))
    os.close(descriptor)


def test_sealed_nonsense(tmp_path: Path) -> None:
    """The hash says who wrote it, not that it makes sense: numbers are looked at before they are used."""
    name, good = name_of("x", 0), header_of("x", 0)
    first, second = good.parts
    wrong = [
        replace(good, parts=()),
        replace(good, tokens=0),
        replace(good, tokens="4"),
        replace(good, tokens=True),
        replace(good, parts=(first, replace(second, offset_bytes=first.offset_bytes))),
        replace(good, parts=(replace(first, offset_bytes=0), second)),
        replace(good, parts=(replace(first, offset_bytes=first.offset_bytes + 1), second)),
        replace(good, parts=(replace(first, size_bytes=-1), second)),
        replace(good, parts=(replace(first, size_bytes=2**63), second)),
        replace(good, parts=(replace(first, key_heads=None), second)),
        replace(good, parts=(replace(first, value_dtype=7), second)),
    ]
    path = tmp_path / "block"
    write_header(path, name, good)
    with path.open("rb") as file:
        assert BlockHeader.read(file.fileno(), name) == good
        with pytest.raises(DamagedBlockError, match="another block's"):
            BlockHeader.read(file.fileno(), name_of("x", 1))
    for header in wrong:
        write_header(path, name, header)
        with path.open("rb") as file, pytest.raises(DamagedBlockError):
            BlockHeader.read(file.fileno(), name)


def test_checksums_tell_name_place_and_length() -> None:
    header = header_of("a", 0)
    name, part = name_of("a", 0), header.parts[0]
    payload = payload_of(name, part)
    sums = [
        part_checksum(name, part, memoryview(payload)),
        part_checksum(name_of("a", 1), part, memoryview(payload)),
        part_checksum(name, header.parts[1], memoryview(payload)),
        part_checksum(name, part, memoryview(payload + b"\0")),
        part_checksum(name, part, memoryview(payload[:-1] + b"\1")),
    ]
    assert len(set(sums)) == len(sums)
    assert tree_checksum(b"") == tree_checksum(b"\0" * 4096)  # which is why lengths are in the checksum
    with pytest.raises(ValueError, match="one after the other"):
        tree_checksum(memoryview(bytes(8))[::2])
    with pytest.raises(ValueError, match="one after the other"):
        tree_checksum(memoryview(bytes(8)).cast("I"))


def test_the_header_has_room_for_what_comes_later() -> None:
    header = laid_out(b"x" * 32, 4, list(header_of("a", 0).parts))
    later = replace(header, recompute_seconds=1.2345678901234567e-300)
    assert len(later.encode(name_of("a", 0))) == header.parts[0].offset_bytes
