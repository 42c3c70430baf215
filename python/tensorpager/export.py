# SPDX-License-Identifier: Apache-2.0
"""What a store's last commit holds, for other tools: `export_store()` writes safetensors, `verify_store()` reads all.

Both open the store, so a run that trains in it has to be closed. Neither needs the model, nor more memory than the
largest tensor whose elements lie in another order than safetensors wants, and else than a page.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tensorpager.errors import CheckpointError
from tensorpager.private_file import open_private
from tensorpager.spill import dense_strides
from tensorpager.store import Store, open_pagefile, store_directories
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

    What was written lately may come from the page cache. IoError, CheckpointError.
    """
    directories = store_directories(store)
    pagefile = open_pagefile(directories)
    try:
        record_of(pagefile, directories[0])
        stored = [page for page in range(pagefile.page_count) if pagefile.stored(page)]
        damaged = []
        for done, page in enumerate(stored):
            found = pagefile.check(page)
            if found is not None:
                damaged.append(found)
            if progress is not None:
                progress(done + 1, len(stored))
        return len(stored), damaged
    finally:
        pagefile.close()


def export_store(store: Store, path: str | os.PathLike[str], progress: Progress | None = None) -> int:
    """Write parameters and buffers of the last commit to a safetensors file, mode 0600. Returns its size in bytes.

    Names are those of the model's state_dict(); a parameter with several has its first one only. Appears under its name
    when it is whole. FileExistsError when there is one; IoError, CheckpointError, OSError.
    """
    directories = store_directories(store)
    if Path(path).exists():
        msg = f"{os.fspath(path)} is there already; remove it, or name another file"
        raise FileExistsError(msg)
    pagefile = open_pagefile(directories)
    part = f"{os.fspath(path)}.part"
    try:
        record = record_of(pagefile, directories[0])
        size_bytes = _write(pagefile, record, part, directories[0], progress)
        Path(part).replace(path)
    finally:
        Path(part).unlink(missing_ok=True)
        pagefile.close()
    return size_bytes


def _write(pagefile: Pagefile, record: TrainingRecord, part: str, where: str, progress: Progress | None) -> int:
    entries = {**record.parameters, **record.buffers}
    header: dict[str, object] = {"__metadata__": {"format": "pt", "commit": str(pagefile.commit_number)}}
    end = 0
    for name, entry in entries.items():
        shape, dtype = _form(entry, name, where)
        begin, end = end, end + _numel(shape) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    done = 0
    with open_private(part) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in entries.values():
            for piece in _bytes_of(pagefile, entry):
                file.write(piece)
                done += len(piece)
                if progress is not None:
                    progress(done, end)
        file.flush()
        os.fsync(file.fileno())
    assert done == end
    return 8 + len(text) + end


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
