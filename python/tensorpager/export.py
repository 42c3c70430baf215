# SPDX-License-Identifier: Apache-2.0
"""What a store's last commit holds, for other tools: `export_store()` writes safetensors, `verify_store()` reads all.

Both open the store, so a run that trains in it has to be closed; of a run of several ranks, the stores of all. Neither
needs the model, nor more memory than the largest tensor whose elements lie in another order than safetensors wants, and
else than a page.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tensorpager.errors import CheckpointError, RanksError
from tensorpager.joint_commit import stores_of_ranks
from tensorpager.private_file import open_private
from tensorpager.spill import dense_strides
from tensorpager.store import Store, open_pagefile
from tensorpager.training_record import StoredTensor, TrainingRecord, Value, record_of

if TYPE_CHECKING:
    from tensorpager._core import DamagedPage, Pagefile

__all__ = ["export_store", "verify_store"]

Progress = Callable[[int, int], None]  # bytes or pages done, and of how many

_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def verify_store(store: Store, progress: Progress | None = None) -> tuple[int, list[DamagedPage]]:
    """Read every page of the last commit. Returns how many there are, and those whose bytes are not what was written.

    What was written lately may come from the page cache. IoError, CheckpointError; RanksError when the store of a rank
    is missing.
    """
    with ExitStack() as opened:
        sources = _open_sources(store, opened)
        stored = [
            (source.pagefile, page)
            for source in sources
            for page in range(source.pagefile.page_count)
            if source.pagefile.stored(page)
        ]
        damaged = []
        for done, (pagefile, page) in enumerate(stored):
            found = pagefile.check(page)
            if found is not None:
                damaged.append(found)
            if progress is not None:
                progress(done + 1, len(stored))
        return len(stored), damaged


def export_store(store: Store, path: str | os.PathLike[str], progress: Progress | None = None) -> int:
    """Write parameters and buffers of the last commit to a safetensors file, mode 0600. Returns its size in bytes.

    Names are those of the model's state_dict(); a parameter with several has its first one only. Parameters that are
    sharded over ranks are put together; buffers are those of rank 0. Appears under its name when it is whole.
    FileExistsError when there is one; IoError, CheckpointError, OSError; RanksError when the ranks' stores are not of
    one commit, or not all there.
    """
    if Path(path).exists():
        msg = f"{os.fspath(path)} is there already; remove it, or name another file"
        raise FileExistsError(msg)
    part = f"{os.fspath(path)}.part"
    with ExitStack() as opened:
        sources = _open_sources(store, opened)
        opened.callback(Path(part).unlink, missing_ok=True)
        _refuse_parts(sources)
        size_bytes = _write(sources, part, progress)
        Path(part).replace(path)
    return size_bytes


@dataclass(frozen=True)
class _Source:
    """The store of one rank."""

    pagefile: Pagefile
    record: TrainingRecord
    where: str


@dataclass(frozen=True)
class _Whole:
    """A tensor, and the parts that ranks have of it, in order along `dim`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int
    parts: list[tuple[Pagefile, StoredTensor | Value]]


def _open_sources(store: Store, opened: ExitStack) -> list[_Source]:
    sources = []
    for directories in stores_of_ranks(store):
        pagefile = open_pagefile(directories)
        opened.callback(pagefile.close)
        sources.append(_Source(pagefile, record_of(pagefile, directories[0]), directories[0]))
    return sources


def _refuse_parts(sources: list[_Source]) -> None:
    """RanksError when the sources are not all ranks' at one commit."""
    first = sources[0]
    stamps = [source.record.stamp for source in sources]
    for source, stamp in zip(sources, stamps, strict=True):
        made = None if stamp is None else (stamp.run, stamp.attempt)
        if made != (None if stamps[0] is None else (stamps[0].run, stamps[0].attempt)):
            msg = (
                f"{source.where} is at commit {source.pagefile.commit_number}, and {first.where} at "
                f"{first.pagefile.commit_number}: resume the run once, which brings all ranks to one commit"
            )
            raise RanksError(msg)
    if stamps[0] is not None and len(sources) < stamps[0].count and first.record.shards:
        msg = (
            f"{first.where} is of rank {stamps[0].rank} of {stamps[0].count}, and has a part of each parameter; name "
            "the directory that holds the stores of all ranks"
        )
        raise RanksError(msg)


def _wholes(sources: list[_Source]) -> dict[str, _Whole]:
    found = {}
    first = sources[0]
    for name, entry in {**first.record.parameters, **first.record.buffers}.items():
        shape, dtype = _form(entry, name, first.where)
        if not entry.sharded:
            found[name] = _Whole(shape, dtype, 0, [(first.pagefile, entry)])
            continue
        place = first.record.shards[name]
        by_start = {
            source.record.shards[name].start: (source.pagefile, source.record.parameters[name])
            for source in reversed(sources)
        }
        end = 0
        for start, (_, part) in sorted(by_start.items()):
            size = _form(part, name, first.where)[0][place.dim]
            if start != end and size > 0:
                msg = f"{first.where}: the ranks' parts of '{name}' leave a gap at {end} along {place.dim}"
                raise CheckpointError(msg, path=first.where, rule="training-record")
            end += size
        if end != place.shape[place.dim]:
            msg = f"{first.where}: the ranks' parts of '{name}' are {end} of {place.shape[place.dim]} long"
            raise CheckpointError(msg, path=first.where, rule="training-record")
        found[name] = _Whole(place.shape, dtype, place.dim, [by_start[start] for start in sorted(by_start)])
    return found


def _write(sources: list[_Source], part: str, progress: Progress | None) -> int:
    wholes = _wholes(sources)
    commit = str(sources[0].pagefile.commit_number)
    header: dict[str, object] = {"__metadata__": {"format": "pt", "commit": commit}}
    end = 0
    for name, whole in wholes.items():
        begin, end = end, end + _numel(whole.shape) * whole.dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[whole.dtype],
            "shape": list(whole.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    done = 0
    with open_private(part) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for whole in wholes.values():
            for piece in _bytes_of_whole(whole):
                file.write(piece)
                done += len(piece)
                if progress is not None:
                    progress(done, end)
        file.flush()
        os.fsync(file.fileno())
    assert done == end
    return 8 + len(text) + end


def _bytes_of_whole(whole: _Whole) -> Iterator[memoryview]:
    if whole.dim == 0 or len(whole.parts) == 1:
        for pagefile, entry in whole.parts:
            yield from _bytes_of(pagefile, entry)
        return
    parts = []
    for pagefile, entry in whole.parts:
        shape = entry.shape if isinstance(entry, StoredTensor) else tuple(entry.value.shape)
        flat = torch.frombuffer(bytearray().join(_bytes_of(pagefile, entry)), dtype=torch.uint8)
        parts.append(flat.view(whole.dtype).reshape(shape))
    yield torch.cat(parts, whole.dim).reshape(-1).view(torch.uint8).numpy().data


def _form(entry: StoredTensor | Value, name: str, where: str) -> tuple[tuple[int, ...], torch.dtype]:
    shape, dtype = (
        (entry.shape, entry.dtype) if isinstance(entry, StoredTensor) else (tuple(entry.value.shape), entry.value.dtype)
    )
    if dtype not in _SAFETENSORS_NAMES:
        msg = f"{where}: '{name}' is of {dtype}, which safetensors has no name for"
        raise CheckpointError(msg, path=where, rule="dtype")
    return shape, dtype


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _bytes_of(pagefile: Pagefile, entry: StoredTensor | Value) -> Iterator[memoryview]:
    if isinstance(entry, Value):
        flat = entry.value.contiguous().reshape(-1).view(torch.uint8)
        yield flat.numpy().data
        return
    meta = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
    if entry.strides == dense_strides(meta):
        yield from _pieces(pagefile, entry)
        return
    whole = bytearray().join(_pieces(pagefile, entry))
    tensor = torch.frombuffer(whole, dtype=torch.uint8).view(entry.dtype).as_strided(entry.shape, entry.strides)
    yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _pieces(pagefile: Pagefile, entry: StoredTensor) -> Iterator[memoryview]:
    page, offset, left = entry.page, entry.offset_bytes, entry.span_bytes
    while left > 0:
        piece = memoryview(pagefile.read(page))[offset : offset + left]
        yield piece
        left -= len(piece)
        page, offset = page + 1, 0
