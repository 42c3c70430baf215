# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in place: where each tensor of a safetensors checkpoint lies on disk.

Only headers are read, never tensor bytes, and at most 100 MB of them for each file: the pager reads the rest, page by
page, straight from the files. Files are opened read-only and closed again. `tensorpager.header` has the rules.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from tensorpager.errors import CheckpointError
from tensorpager.header import (
    DTYPES,
    HEADER_BYTES_MAX,
    INTERRUPTED,
    LENGTH_PREFIX_BYTES,
    Rule,
    TensorEntry,
    aligned,
    header_size_bytes,
    load_json,
    parse_header,
    refuse,
    shown,
)

__all__ = [
    "Checkpoint",
    "CheckpointFile",
    "Rule",
    "TensorEntry",
    "aligned",
    "open_checkpoint",
    "read_header",
    "torch_dtype_name",
    "torch_shape",
]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class CheckpointFile:
    """One safetensors file. `tensors` is in file order; tensor bytes run from `data_start` to `size_bytes`."""

    path: Path
    size_bytes: int
    data_start: int
    tensors: dict[str, TensorEntry] = field(repr=False)
    metadata: dict[str, str] = field(repr=False)


@dataclass(frozen=True)
class Checkpoint:
    """One file, or all shards of an index in the order of their names. `file_of` gives each tensor's file by index."""

    path: Path
    files: tuple[CheckpointFile, ...]
    file_of: dict[str, int] = field(repr=False)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(file.size_bytes - file.data_start for file in self.files)

    def entry(self, name: str) -> TensorEntry:
        """The tensor of this name; its offset is in `files[file_of[name]]`. KeyError if there is none."""
        return self.files[self.file_of[name]].tensors[name]


def torch_dtype_name(entry: TensorEntry, path: str = "") -> str:
    """The name of the tensor's dtype in torch, for `getattr(torch, name)`; an older torch may lack some.

    `path` is for the message. Raises CheckpointError for the 6-bit types, which no torch has; other tensors of the
    file are not affected.
    """
    name = DTYPES[entry.dtype].torch_name
    if name is None:
        what = f"tensor {shown(entry.name)} is of type {entry.dtype}, which no torch can load"
        refuse(Rule.DTYPE_NOT_IN_TORCH, path, what, "Leave it out of the model, or convert it to F8 or F4.")
    return name


def torch_shape(entry: TensorEntry, path: str = "") -> tuple[int, ...]:
    """The tensor's shape in torch. For F4, of which torch packs two to an element, the last dimension halves.

    Raises CheckpointError if an F4 tensor's last dimension is odd or it has none.
    """
    if entry.dtype != "F4":
        return entry.shape
    if not entry.shape or entry.shape[-1] % 2 != 0:
        shape = list(entry.shape)
        what = f"tensor {shown(entry.name)} is F4 of shape {shape}, torch packs pairs of the last dimension"
        refuse(Rule.DTYPE_NOT_IN_TORCH, path, what, "Pad its last dimension to an even size before saving.")
    return (*entry.shape[:-1], entry.shape[-1] // 2)


def read_header(path: str | os.PathLike[str]) -> CheckpointFile:
    """Reads and checks the header of one safetensors file. Blocks on the disk. Raises CheckpointError only."""
    path = Path(path)
    descriptor = _open_regular(path)
    try:
        size_bytes = os.fstat(descriptor).st_size
        prefix = _read_exactly(descriptor, min(LENGTH_PREFIX_BYTES, size_bytes), 0, path)
        header_bytes = header_size_bytes(prefix, size_bytes, str(path))
        header = _read_exactly(descriptor, header_bytes, LENGTH_PREFIX_BYTES, path)
    finally:
        os.close(descriptor)
    tensors, metadata = parse_header(header, size_bytes, str(path))
    return CheckpointFile(path, size_bytes, LENGTH_PREFIX_BYTES + header_bytes, tensors, metadata)


def open_checkpoint(
    path: str | os.PathLike[str], *, variant: str | None = None, check_total_size: bool = True
) -> Checkpoint:
    """Finds and checks every tensor of a checkpoint. Blocks on the disk. Raises CheckpointError only.

    `path` is a safetensors file, an index (`*.json`), or a directory. In a directory `model.safetensors` goes before
    `model.safetensors.index.json`, and `variant="fp16"` asks for `model.fp16.safetensors` before
    `model.safetensors.index.fp16.json`, as in transformers. `check_total_size=False` accepts an index whose
    `metadata.total_size` is wrong: nothing is read by it, it only tells mixed-up shards.
    """
    path = Path(path)
    # os.path, here and below, where Path would let an OSError out.
    if os.path.isdir(path):  # noqa: PTH112
        path = _find_in_directory(path, variant)
    if path.suffix == ".json":
        return _open_sharded(path, check_total_size)
    file = read_header(path)
    return Checkpoint(path, (file,), dict.fromkeys(file.tensors, 0))


def _unreadable(path: Path, what: str, error: OSError | ValueError) -> NoReturn:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    advice = "Check the path, that this user may read it, and the drive or network file system it is on."
    try:
        refuse(Rule.FILE_UNREADABLE, str(path), f"{what}: {reason}", advice)
    except CheckpointError as refusal:
        raise refusal from error


def _open_regular(path: Path) -> int:
    # O_NONBLOCK: opening a FIFO must not wait for a writer; it means nothing for a regular file. Links are followed,
    # since download caches keep the files behind them.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        _unreadable(path, "the file cannot be opened", error)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            what = f"this is not a regular file but a {_kind(mode)}"
            refuse(
                Rule.FILE_NOT_REGULAR,
                str(path),
                what,
                "Give the path of a safetensors file or of its directory.",
            )
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def _read_exactly(descriptor: int, size_bytes: int, offset_bytes: int, path: Path) -> bytes:
    assert 0 <= size_bytes <= HEADER_BYTES_MAX, size_bytes
    parts: list[bytes] = []
    missing = size_bytes
    while missing > 0:
        try:
            part = os.pread(descriptor, missing, offset_bytes + size_bytes - missing)
        except OSError as error:
            _unreadable(path, f"reading {missing} bytes at {offset_bytes + size_bytes - missing} failed", error)
        if not part:
            what = f"the file ended at byte {offset_bytes + size_bytes - missing} while it was being read"
            refuse(
                Rule.FILE_SHRANK,
                str(path),
                what,
                "Something is still writing or replacing it: wait for it to finish.",
            )
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _find_in_directory(directory: Path, variant: str | None) -> Path:
    single, index = SINGLE_NAME, INDEX_NAME
    if variant is not None:
        single, index = (f"{stem}.{variant}.{suffix}" for stem, suffix in (n.rsplit(".", 1) for n in (single, index)))
    for name in (single, index):
        if _is_plain_name(name) and os.path.isfile(directory / name):  # noqa: PTH113
            return directory / name
    present = ", ".join(_names_of_weights(directory)[:8]) or "no such files at all"
    what = f"the directory has neither {single} nor {index} (it has {present})"
    advice = "Give the path of the .safetensors file itself; convert pickled .bin weights to safetensors first."
    return refuse(Rule.CHECKPOINT_MISSING, str(directory), what, advice)


def _names_of_weights(directory: Path) -> list[str]:
    try:
        names = os.listdir(directory)  # noqa: PTH208 (names are all we need)
    except OSError as error:
        _unreadable(directory, "the directory cannot be listed", error)
    return sorted(name for name in names if name.endswith((".safetensors", ".bin", ".index.json")))


def _is_plain_name(name: str) -> bool:
    return name not in {"", ".", ".."} and not {"/", "\\", "\0"} & set(name)


def _open_sharded(index: Path, check_total_size: bool) -> Checkpoint:
    shard_of, total_size = _read_index(index)
    names = sorted(set(shard_of.values()))
    for name in names:
        if not os.path.exists(index.parent / name):  # noqa: PTH110
            what = f"the index names the shard {shown(name)}, the directory does not have it"
            refuse(
                Rule.SHARD_MISSING,
                str(index),
                what,
                "Likely an incomplete download: fetch the checkpoint again.",
            )
    files = tuple(read_header(index.parent / name) for name in names)
    file_of: dict[str, int] = {}
    for number, file in enumerate(files):
        for tensor in file.tensors:
            if tensor in file_of:
                what = f"tensor {shown(tensor)} is both in {names[file_of[tensor]]} and in {names[number]}"
                refuse(
                    Rule.TENSOR_TWICE,
                    str(index),
                    what,
                    "Shards of two checkpoints are mixed: fetch it again.",
                )
            file_of[tensor] = number
    _check_map(index, shard_of, file_of, names)
    checkpoint = Checkpoint(index, files, file_of)
    if check_total_size and total_size is not None and total_size != checkpoint.size_bytes:
        what = f"metadata.total_size is {total_size}, the shards hold {checkpoint.size_bytes} bytes of tensors"
        advice = "Shards of two checkpoints may be mixed. If the index is known to be wrong: check_total_size=False."
        refuse(Rule.TOTAL_SIZE, str(index), what, advice)
    return checkpoint


def _check_map(index: Path, shard_of: dict[str, str], file_of: dict[str, int], names: list[str]) -> None:
    mixed = "Index and shards are of different checkpoints or versions: fetch both again."
    for tensor, shard in shard_of.items():
        if tensor not in file_of or names[file_of[tensor]] != shard:
            what = f"the index places tensor {shown(tensor)} in {shard}, which does not hold it"
            refuse(Rule.TENSOR_NOT_IN_SHARD, str(index), what, mixed)
    for tensor, number in file_of.items():
        if tensor not in shard_of:
            what = f"tensor {shown(tensor)} of {names[number]} is not in the index"
            refuse(Rule.TENSOR_NOT_IN_INDEX, str(index), what, mixed)


def _read_index(index: Path) -> tuple[dict[str, str], int | float | None]:
    """(tensor name -> shard name, metadata.total_size) of an index, the names checked, the shards not yet."""
    descriptor = _open_regular(index)
    try:
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes > HEADER_BYTES_MAX:
            refuse(Rule.INDEX_TOO_LARGE, str(index), f"the index is {size_bytes} bytes long", "This is no index.")
        document = load_json(_read_exactly(descriptor, size_bytes, 0, index), str(index))
    finally:
        os.close(descriptor)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(weight_map, dict) or not weight_map:
        refuse(Rule.INDEX_TYPE, str(index), "the index has no weight_map, or an empty one", INTERRUPTED)
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            what = f"weight_map[{shown(tensor)}] is of type {type(shard).__name__}"
            refuse(Rule.INDEX_TYPE, str(index), what, "Save the checkpoint again.")
        if not _is_plain_name(shard):
            what = f"weight_map[{shown(tensor)}] names the shard {shown(shard)}"
            refuse(
                Rule.SHARD_NAME,
                str(index),
                what,
                "The index may be hostile: do not use it unless you trust its source.",
            )
    metadata = document.get("metadata")
    total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total_size is not None and type(total_size) not in (int, float):
        refuse(
            Rule.TOTAL_SIZE,
            str(index),
            f"metadata.total_size is {str(total_size)[:80]}",
            "Save the checkpoint again.",
        )
    return weight_map, total_size
