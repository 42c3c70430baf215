# SPDX-License-Identifier: Apache-2.0
"""What a commit says beside its pages: where each tensor of the training state lies, and all that is no tensor.

It is the metadata of a pagefile's root, JSON in UTF-8: regions (page counts, in the order in which they were mapped),
parameters, gradients, buffers, optimizers, free places, random states, and the user's own values. A tensor in the
address space is {"page", "offset_bytes", "shape", "strides", "dtype"}; a small one is {"value": ...}, see
plain_values.py. Of a tensor that is sharded over ranks it is this rank's part, and `shards` says which part that is.
What is read is checked before it is used, whoever wrote it.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from tensorpager.errors import CheckpointError
from tensorpager.plain_values import decode, dtype_named, encode

if TYPE_CHECKING:
    from tensorpager._core import Pagefile, Region

__all__ = [
    "AddressBook",
    "Entry",
    "OptimizerRecord",
    "ShardPlace",
    "Stamp",
    "StoredTensor",
    "TrainingRecord",
    "Value",
    "record_of",
]

_FORMAT = "tensorpager training state"
_VERSION = 1


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in pages. Strides are in elements."""

    page: int
    offset_bytes: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    sharded: bool = False  # over ranks, as its parameter is

    @property
    def span_bytes(self) -> int:
        """From its first byte to behind its last."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize


@dataclass(frozen=True)
class Value:
    """A tensor, or another plain value, that is in the record itself."""

    value: Any
    sharded: bool = False


Entry = StoredTensor | Value


@dataclass(frozen=True)
class ShardPlace:
    """Which part of a sharded parameter this rank has: from `start` on along `dim`. shape: of the whole."""

    shape: tuple[int, ...]
    dim: int
    start: int


@dataclass(frozen=True)
class Stamp:
    """Of a commit that several ranks made together: which run, rank of how many, and attempt it is of."""

    run: str
    rank: int
    count: int
    attempt: str


@dataclass
class OptimizerRecord:
    """One optimizer: the name of its class, its groups with the names of their parameters, its state by parameter."""

    kind: str
    groups: list[dict[str, Any]]  # options of the group; "params": names
    state: dict[str, dict[str, Entry]]


@dataclass
class TrainingRecord:
    """See the head of the file."""

    page_bytes: int
    regions: list[int] = field(default_factory=list)  # page counts
    parameters: dict[str, Entry] = field(default_factory=dict)
    gradients: dict[str, Entry] = field(default_factory=dict)
    buffers: dict[str, Entry] = field(default_factory=dict)
    optimizers: list[OptimizerRecord] = field(default_factory=list)
    free: list[tuple[str, int, int, int]] = field(default_factory=list)  # name, size in bytes, page, offset
    room: tuple[int, int, int] | None = None  # of the arena: page, offset, bytes left
    training_bytes: int = 0
    random: dict[str, Any] = field(default_factory=dict)
    state: Any = None
    shards: dict[str, ShardPlace] = field(default_factory=dict)  # of parameters that are sharded over ranks
    stamp: Stamp | None = None  # of a commit of several ranks

    def to_bytes(self) -> bytes:
        """TypeError for a value that can't be kept."""
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "torch": torch.__version__,
            "page_bytes": self.page_bytes,
            "regions": self.regions,
            "parameters": {name: _entry_out(entry) for name, entry in self.parameters.items()},
            "gradients": {name: _entry_out(entry) for name, entry in self.gradients.items()},
            "buffers": {name: _entry_out(entry) for name, entry in self.buffers.items()},
            "optimizers": [
                {
                    "kind": each.kind,
                    "groups": [encode(group, "a parameter group") for group in each.groups],
                    "state": {
                        name: {key: _entry_out(entry) for key, entry in values.items()}
                        for name, values in each.state.items()
                    },
                }
                for each in self.optimizers
            ],
            "free": self.free,
            "room": self.room,
            "training_bytes": self.training_bytes,
            "random": encode(self.random),
            "state": encode(self.state, "state"),
            "shards": {name: [list(shard.shape), shard.dim, shard.start] for name, shard in self.shards.items()},
            "stamp": None if self.stamp is None else astuple(self.stamp),
        }
        return json.dumps(document, allow_nan=False, separators=(",", ":")).encode()

    @staticmethod
    def from_bytes(data: bytes, path: str) -> TrainingRecord:
        """CheckpointError when it is not what to_bytes() makes. `path`: of the store, for the message."""
        try:
            document = json.loads(data)
            if document["format"] != _FORMAT:
                _refuse(path, f"it says {document['format']!r}, not {_FORMAT!r}")
            if document["version"] != _VERSION:
                _refuse(path, f"it is of version {document['version']!r}; this release reads {_VERSION}")
            record = _record_in(document)
            _check_places(record)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            _refuse(path, f"{type(error).__name__}: {error}")
        return record

    def stored(self) -> dict[str, StoredTensor]:
        """Every tensor in pages, by a name of its own."""
        found = {f"parameter {name}": entry for name, entry in self.parameters.items()}
        found |= {f"gradient {name}": entry for name, entry in self.gradients.items()}
        found |= {f"buffer {name}": entry for name, entry in self.buffers.items()}
        for number, optimizer in enumerate(self.optimizers):
            for name, values in optimizer.state.items():
                found |= {f"optimizer {number} {name} {key}": entry for key, entry in values.items()}
        return {name: entry for name, entry in found.items() if isinstance(entry, StoredTensor)}


def record_of(pagefile: Pagefile, where: str) -> TrainingRecord:
    """Of the last commit of an open pagefile. CheckpointError when there is none that can be read."""
    if not pagefile.metadata:
        msg = f"{where} has no commit yet: page() was interrupted before its first; call page() again"
        raise CheckpointError(msg, path=where, rule="no-commit")
    record = TrainingRecord.from_bytes(pagefile.metadata, where)
    if record.page_bytes != pagefile.page_bytes or sum(record.regions) != pagefile.page_count:
        msg = f"{where}: the record of its last commit is of another pagefile"
        raise CheckpointError(msg, path=where, rule="training-record")
    return record


def _refuse(path: str, why: str) -> None:
    msg = f"{path}: the commit there is not one that resume() can read: {why}. Open it with the release that wrote it"
    raise CheckpointError(msg, path=path, rule="training-record")


def _entry_out(entry: Entry) -> dict[str, Any]:
    sharded = {"sharded": True} if entry.sharded else {}
    if isinstance(entry, Value):
        return {"value": encode(entry.value), **sharded}
    return {
        **sharded,
        "page": entry.page,
        "offset_bytes": entry.offset_bytes,
        "shape": list(entry.shape),
        "strides": list(entry.strides),
        "dtype": str(entry.dtype).removeprefix("torch."),
    }


def _entry_in(item: dict[str, Any]) -> Entry:
    sharded = item.get("sharded", False) is True
    if "value" in item:
        return Value(decode(item["value"]), sharded)
    shape = tuple(_count(size) for size in item["shape"])
    strides = tuple(_count(stride) for stride in item["strides"])
    if len(shape) != len(strides):
        msg = f"a tensor of shape {shape} has strides {strides}"
        raise ValueError(msg)
    dtype = dtype_named(item["dtype"])
    return StoredTensor(_count(item["page"]), _count(item["offset_bytes"]), shape, strides, dtype, sharded)


def _entries_in(items: dict[str, Any]) -> dict[str, Entry]:
    return {name: _entry_in(item) for name, item in items.items()}


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        msg = f"{value!r} is not a count"
        raise ValueError(msg)
    return value


def _shard_in(shape: list[object], dim: object, start: object) -> ShardPlace:
    place = ShardPlace(tuple(_count(size) for size in shape), _count(dim), _count(start))
    if place.dim >= len(place.shape) or place.start > place.shape[place.dim]:
        msg = f"no part of a tensor of shape {place.shape} begins at {start} along {dim}"
        raise ValueError(msg)
    return place


def _stamp_in(item: list[object] | None) -> Stamp | None:
    if item is None:
        return None
    run, rank, count, attempt = item
    return Stamp(str(run), _count(rank), _count(count), str(attempt))


def _record_in(document: dict[str, Any]) -> TrainingRecord:
    room = document["room"]
    return TrainingRecord(
        page_bytes=_count(document["page_bytes"]),
        regions=[_count(pages) for pages in document["regions"]],
        parameters=_entries_in(document["parameters"]),
        gradients=_entries_in(document["gradients"]),
        buffers=_entries_in(document["buffers"]),
        optimizers=[
            OptimizerRecord(
                kind=str(each["kind"]),
                groups=[decode(group) for group in each["groups"]],
                state={name: _entries_in(values) for name, values in each["state"].items()},
            )
            for each in document["optimizers"]
        ],
        free=[(str(name), _count(size), _count(page), _count(offset)) for name, size, page, offset in document["free"]],
        room=None if room is None else (_count(room[0]), _count(room[1]), _count(room[2])),
        training_bytes=_count(document["training_bytes"]),
        random=decode(document["random"]),
        state=decode(document["state"]),
        shards={name: _shard_in(*item) for name, item in document["shards"].items()},
        stamp=_stamp_in(document["stamp"]),
    )


def _check_places(record: TrainingRecord) -> None:
    """Every tensor and place lies within one region."""
    ends = []
    end = 0
    for pages in record.regions:
        end += pages
        ends.append(end * record.page_bytes)

    def check(what: str, page: int, offset_bytes: int, size_bytes: int) -> None:
        begin = page * record.page_bytes + offset_bytes
        region_end = next((each for each in ends if begin < each), 0)
        if offset_bytes >= record.page_bytes or begin + size_bytes > region_end:
            msg = f"{what} lies outside the regions: page {page}, offset {offset_bytes}, {size_bytes} bytes"
            raise ValueError(msg)

    for name, entry in record.stored().items():
        if entry.span_bytes > 0:
            check(name, entry.page, entry.offset_bytes, entry.span_bytes)
    for name, size_bytes, page, offset_bytes in record.free:
        check(f"a free place for {name}", page, offset_bytes, size_bytes)
    if record.room is not None and record.room[2] > 0:
        check("the arena's room", *record.room)


class AddressBook:
    """Pages to addresses and back, for the regions of one pager, in the order in which they were mapped."""

    def __init__(self, page_bytes: int, regions: list[Region]) -> None:
        self._page_bytes = page_bytes
        self._regions = regions

    def page_counts(self) -> list[int]:
        """Of the regions."""
        return [region.page_count for region in self._regions]

    def locate(self, address: int) -> tuple[int, int] | None:
        """Page and offset in it, or None for an address in no region (the end of one included)."""
        for region in self._regions:
            distance = address - region.address
            if 0 <= distance < region.page_count * self._page_bytes:
                return region.first_page + distance // self._page_bytes, distance % self._page_bytes
        return None

    def address(self, page: int, offset_bytes: int) -> int:
        """LookupError for a page in no region."""
        for region in self._regions:
            if region.first_page <= page < region.first_page + region.page_count:
                return region.address + (page - region.first_page) * self._page_bytes + offset_bytes
        msg = f"page {page} is in no region"
        raise LookupError(msg)
