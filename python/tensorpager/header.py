# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file: its rules, and a parser that holds a header to all of them.

A safetensors file is an 8-byte little-endian length, a JSON object of that length that places every tensor, and
the tensors' bytes back to back up to the last byte of the file. Nothing here opens a file or touches tensor bytes.

What is accepted is what the format's own Rust reader (0.8) accepts, with three exceptions where that reader is
laxer than the format's text; they are listed in `STRICTER_THAN_REFERENCE`. As in that reader, unknown fields of a
tensor's entry are ignored, `"__metadata__": null` means none, and trailing white space is padding.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from math import isinf
from typing import NoReturn

from tensorpager.errors import CheckpointError

LENGTH_PREFIX_BYTES = 8
HEADER_BYTES_MAX = 100_000_000
JSON_INTEGER_CHARACTERS_MAX = 20  # of 2^64 - 1, and of -2^63
SHOWN_CHARACTERS_MAX = 120
JSON_DEPTH_MAX = 127  # the reference reader refuses the 128th level
U64_MAX = 2**64 - 1
METADATA_KEY = "__metadata__"


class Rule(str, Enum):
    """Every rule a checkpoint is held to. The value is `CheckpointError.rule`; `promise` says what must hold."""

    promise: str

    def __new__(cls, slug: str, promise: str) -> Rule:  # noqa: PYI034 (Self is newer than Python 3.10)
        """A member is a string, its slug."""
        rule = str.__new__(cls, slug)
        rule._value_ = slug
        rule.promise = promise
        return rule

    # The file.
    FILE_UNREADABLE = "file-unreadable", "the file exists and may be read"
    FILE_NOT_REGULAR = (
        "file-not-regular",
        "the file is a regular file, not a directory, FIFO, socket or device",
    )
    FILE_TOO_SMALL = "file-too-small", "the file has room for the 8-byte header length"
    FILE_SHRANK = "file-shrank", "the file keeps its size while its header is read"
    # The header as bytes.
    HEADER_TOO_LARGE = "header-too-large", "the header is at most 100,000,000 bytes long"
    HEADER_PAST_END = "header-past-end", "the header ends inside the file"
    HEADER_NOT_UTF8 = "header-not-utf8", "the JSON text is valid UTF-8"
    HEADER_START = "header-start", "the header's first byte is '{'"
    # The header as JSON.
    JSON_SYNTAX = "json-syntax", "the text is one JSON value, with nothing but white space after it"
    JSON_NUMBER = "json-number", "numbers are finite: no NaN, no Infinity, nothing beyond a double's range"
    JSON_SURROGATE = "json-surrogate", "escapes in strings are Unicode text: no lone surrogate"
    JSON_DEPTH = "json-depth", "nesting is at most 127 levels deep"
    DUPLICATE_KEY = "duplicate-key", "no object has the same key twice, at any level"
    # What the JSON says.
    METADATA_TYPE = "metadata-type", "__metadata__ is an object of strings, or null"
    ENTRY_TYPE = "entry-type", "every other key of the header names a tensor and holds an object"
    ENTRY_FIELD_MISSING = "entry-field-missing", "a tensor's entry has dtype, shape and data_offsets"
    DTYPE_TYPE = "dtype-type", "dtype is a string"
    DTYPE_UNKNOWN = "dtype-unknown", "dtype is one of the format's types"
    SHAPE_TYPE = "shape-type", "shape is an array of integers from 0 to 2^64 - 1"
    OFFSETS_TYPE = "offsets-type", "data_offsets is an array of two integers from 0 to 2^64 - 1"
    # Where the tensors are.
    OFFSETS_REVERSED = "offsets-reversed", "a tensor does not end before it begins"
    OFFSETS_HOLE = (
        "offsets-hole",
        "each tensor begins where the one before it ends, the first at 0: no unused bytes",
    )
    OFFSETS_OVERLAP = "offsets-overlap", "no byte belongs to two tensors"
    SIZE_OVERFLOW = (
        "size-overflow",
        "shape x element size, multiplied from the left, fits 64 bits at every step",
    )
    SIZE_NOT_WHOLE_BYTES = "size-not-whole-bytes", "a tensor of 4- or 6-bit elements fills whole bytes"
    SIZE_MISMATCH = "size-mismatch", "data_offsets spans exactly shape x element size"
    FILE_TRUNCATED = "file-truncated", "the file holds all bytes its header promises"
    TRAILING_BYTES = "trailing-bytes", "the file ends with its last tensor"
    # Sharded checkpoints.
    CHECKPOINT_MISSING = (
        "checkpoint-missing",
        "the directory holds a safetensors file or index by the usual name",
    )
    INDEX_TOO_LARGE = "index-too-large", "the index is at most 100,000,000 bytes long"
    INDEX_TYPE = "index-type", "the index is an object whose weight_map maps tensor names to shard names"
    SHARD_NAME = "shard-name", "a shard is named by a plain file name: a file of the index's own directory"
    SHARD_MISSING = "shard-missing", "every shard named in the index exists"
    TENSOR_NOT_IN_SHARD = "tensor-not-in-shard", "each shard holds every tensor that the index places in it"
    TENSOR_NOT_IN_INDEX = "tensor-not-in-index", "each tensor of a shard is in the index"
    TENSOR_TWICE = "tensor-twice", "no tensor is in two shards"
    TOTAL_SIZE = "total-size", "metadata.total_size, if present, is the sum of the tensors' sizes"
    # Use.
    DTYPE_NOT_IN_TORCH = "dtype-not-in-torch", "a tensor to be loaded has a dtype that torch has"


STRICTER_THAN_REFERENCE = frozenset({Rule.DUPLICATE_KEY, Rule.HEADER_START, Rule.ENTRY_TYPE, Rule.DTYPE_TYPE})
"""Rules by which a file is refused that the reference reader may accept although the format's text forbids it:
it takes the last of duplicate keys, skips white space before '{', takes an entry written as a bare array
(`["F32", [1], [0, 4]]`) and a dtype written as an object (`{"F32": null}`)."""


@dataclass(frozen=True)
class DType:
    """An element type of the format: its size in bits, and torch's name for it (None: torch has no such type)."""

    bits: int
    torch_name: str | None


DTYPES: dict[str, DType] = {
    "BOOL": DType(8, "bool"),
    "F4": DType(4, "float4_e2m1fn_x2"),  # torch packs two to an element: see torch_shape
    "F6_E2M3": DType(6, None),
    "F6_E3M2": DType(6, None),
    "U8": DType(8, "uint8"),
    "I8": DType(8, "int8"),
    "F8_E5M2": DType(8, "float8_e5m2"),
    "F8_E4M3": DType(8, "float8_e4m3fn"),
    "F8_E8M0": DType(8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": DType(8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": DType(8, "float8_e5m2fnuz"),
    "I16": DType(16, "int16"),
    "U16": DType(16, "uint16"),
    "F16": DType(16, "float16"),
    "BF16": DType(16, "bfloat16"),
    "I32": DType(32, "int32"),
    "U32": DType(32, "uint32"),
    "F32": DType(32, "float32"),
    "C64": DType(64, "complex64"),
    "F64": DType(64, "float64"),
    "I64": DType(64, "int64"),
    "U64": DType(64, "uint64"),
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: `size_bytes` bytes from `offset_bytes` of the file on, row-major and little-endian.

    `dtype` is a key of `DTYPES`; `shape` counts elements of that type.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int


def aligned(entry: TensorEntry) -> bool:
    """Whether the tensor's offset is a multiple of its element size (sub-byte elements: always)."""
    return entry.offset_bytes % max(1, DTYPES[entry.dtype].bits // 8) == 0


def refuse(rule: Rule, path: str, what: str, advice: str) -> NoReturn:
    """Raises the CheckpointError of a broken rule: the file, what is wrong with it, the rule, what to do."""
    prefix = f"{path}: " if path else ""
    message = f"{prefix}{what}. Rule {rule.value}: {rule.promise}. {advice}"
    raise CheckpointError(message, path=path, rule=rule.value)


def shown(name: str) -> str:
    """A name fit for a message: quoted, escaped, cut to 120 characters."""
    return repr(name if len(name) <= SHOWN_CHARACTERS_MAX else name[:SHOWN_CHARACTERS_MAX] + "...")


def _shown_type(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} of shape {str(list(shape[:16]))[:160]}"


DAMAGED = "The file is damaged or not a safetensors file: fetch it again, or save it again with safetensors."
WRITER = "The program that wrote the file is at fault: save it again with safetensors."
INTERRUPTED = "Likely an interrupted download or copy: fetch the file again and compare its checksum."


def header_size_bytes(prefix: bytes, file_size_bytes: int, path: str) -> int:
    """The header's length from the first 8 bytes of a file; raises CheckpointError unless it is safe to read."""
    if file_size_bytes < LENGTH_PREFIX_BYTES or len(prefix) < LENGTH_PREFIX_BYTES:
        what = f"the file is {file_size_bytes} bytes long, a header length alone takes {LENGTH_PREFIX_BYTES}"
        refuse(Rule.FILE_TOO_SMALL, path, what, INTERRUPTED)
    size_bytes = int.from_bytes(prefix[:LENGTH_PREFIX_BYTES], "little")
    if size_bytes > HEADER_BYTES_MAX:
        what = f"the first 8 bytes give a header of {size_bytes} bytes"
        advice = "This is likely no safetensors file (a pickled .bin or a Git LFS pointer under a wrong name?)."
        refuse(Rule.HEADER_TOO_LARGE, path, what, advice)
    if LENGTH_PREFIX_BYTES + size_bytes > file_size_bytes:
        what = f"the header should end at byte {LENGTH_PREFIX_BYTES + size_bytes}, the file at {file_size_bytes}"
        refuse(Rule.HEADER_PAST_END, path, what, INTERRUPTED)
    return size_bytes


def parse_header(header: bytes, file_size_bytes: int, path: str) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Parses and checks a whole header.

    `header` is the file's bytes from 8 on, exactly as many as its length prefix says; `path` is for messages.
    Returns the tensors in file order (offsets absolute in the file) and the metadata. Raises CheckpointError.
    """
    if not header.startswith(b"{"):
        what = f"the header starts with {header[:1]!r}" if header else "the header is empty"
        refuse(Rule.HEADER_START, path, what, DAMAGED)
    document = load_json(header, path)
    assert isinstance(document, dict), "JSON that starts with '{' is an object"
    metadata = _checked_metadata(document.pop(METADATA_KEY, None), path)
    placed = [(*_checked_entry(name, entry, path), name) for name, entry in document.items()]
    placed.sort(key=lambda place: place[:2])
    data_start = LENGTH_PREFIX_BYTES + len(header)
    tensors: dict[str, TensorEntry] = {}
    position = 0
    for begin, end, dtype, shape, name in placed:
        _check_place(name, begin, end, position, path)
        _check_size(name, dtype, shape, end - begin, path)
        tensors[name] = TensorEntry(name, dtype, shape, data_start + begin, end - begin)
        position = end
    _check_end(data_start + position, file_size_bytes, path)
    return tensors, metadata


def load_json(text: bytes, path: str) -> object:
    """Strict JSON: the standard's grammar, no duplicate keys, bounded depth, finite numbers. CheckpointError else."""
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte {error.start} of the JSON text is not UTF-8 ({error.reason})"
        refuse(Rule.HEADER_NOT_UTF8, path, what, DAMAGED)
    _check_depth(text, path)

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            seen: set[str] = set()
            key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            refuse(Rule.DUPLICATE_KEY, path, f"the key {shown(key)} occurs twice in one object", WRITER)
        return mapping

    def finite(literal: str) -> float:
        number = float(literal)
        if isinf(number):
            refuse(Rule.JSON_NUMBER, path, f"the number {literal[:40]} is beyond a double's range", DAMAGED)
        return number

    def integer(literal: str) -> int | float:
        # What does not fit 64 bits, and -0, is no integer to the reference reader either; and the length of what
        # int() is given stays bounded.
        return finite(literal) if len(literal) > JSON_INTEGER_CHARACTERS_MAX or literal == "-0" else int(literal)

    def constant(literal: str) -> NoReturn:
        refuse(Rule.JSON_NUMBER, path, f"{literal} is not JSON", WRITER)

    try:
        document: object = json.loads(
            decoded, object_pairs_hook=unique, parse_float=finite, parse_int=integer, parse_constant=constant
        )
    except json.JSONDecodeError as error:
        what = f"the JSON text is malformed at character {error.pos}: {error.msg}"
        refuse(Rule.JSON_SYNTAX, path, what, DAMAGED)
    _check_surrogates(text, document, path)
    return document


_JSON_STRING = re.compile(rb'"[^"]*"?')  # once escaped quotes are gone; linear on any input
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'[]{}"'))
_BRACKET_STEP = [0] * 256
for _bracket, _step in zip(b"[{]}", (1, 1, -1, -1), strict=True):
    _BRACKET_STEP[_bracket] = _step
_DEPTH_CHUNK_BYTES = 1 << 20


def _check_depth(text: bytes, path: str) -> None:
    # Before the parser runs, since it recurses on the C stack as deep as the interpreter's limit lets it. Only quotes
    # and brackets are kept; dropping two adjacent quotes leaves every bracket inside or outside a string as it was.
    structure = text.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _NOT_STRUCTURE).replace(b'""', b"")
    depth, in_string = 0, False
    for start in range(0, len(structure), _DEPTH_CHUNK_BYTES):
        chunk = (b'"' if in_string else b"") + structure[start : start + _DEPTH_CHUNK_BYTES]
        in_string = chunk.count(b'"') % 2 == 1
        brackets = _JSON_STRING.sub(b"", chunk)
        depths = list(accumulate(map(_BRACKET_STEP.__getitem__, brackets), initial=depth))
        if max(depths) > JSON_DEPTH_MAX:
            refuse(Rule.JSON_DEPTH, path, f"the JSON text is nested {max(depths)} levels deep or deeper", DAMAGED)
        depth = depths[-1]


def _check_surrogates(text: bytes, document: object, path: str) -> None:
    if b"\\ud" not in text and b"\\uD" not in text:
        return
    try:
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        lone = f"U+{ord(error.object[error.start]):04X}"
        refuse(Rule.JSON_SURROGATE, path, f"a string escapes the lone surrogate {lone}", WRITER)


def _checked_metadata(metadata: object, path: str) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        what = f"{METADATA_KEY} is of type {type(metadata).__name__}"
        refuse(Rule.METADATA_TYPE, path, what, WRITER)
    for key, value in metadata.items():
        if not isinstance(value, str):
            what = f"{METADATA_KEY}[{shown(key)}] is of type {type(value).__name__}, not a string"
            refuse(Rule.METADATA_TYPE, path, what, "Convert metadata to strings before saving.")
    return metadata


def _is_u64(value: object) -> bool:
    return type(value) is int and 0 <= value <= U64_MAX


def _checked_entry(name: str, entry: object, path: str) -> tuple[int, int, str, tuple[int, ...]]:
    """(begin, end, dtype, shape) of one entry, each of the right type; how they fit together is not checked yet."""
    if not isinstance(entry, dict):
        what = f"the entry of tensor {shown(name)} is of type {type(entry).__name__}, not an object"
        refuse(Rule.ENTRY_TYPE, path, what, WRITER)
    for field in ("dtype", "shape", "data_offsets"):
        if field not in entry:
            refuse(Rule.ENTRY_FIELD_MISSING, path, f"the entry of tensor {shown(name)} has no {field}", WRITER)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        refuse(Rule.DTYPE_TYPE, path, f"the dtype of tensor {shown(name)} is {str(dtype)[:80]}", WRITER)
    if dtype not in DTYPES:
        what = f"the dtype of tensor {shown(name)} is {shown(dtype)}, not one of {', '.join(DTYPES)}"
        refuse(Rule.DTYPE_UNKNOWN, path, what, "The file may need a newer release of tensorpager.")
    if not isinstance(shape, list) or not all(map(_is_u64, shape)):
        refuse(Rule.SHAPE_TYPE, path, f"the shape of tensor {shown(name)} is {str(shape)[:80]}", WRITER)
    if not isinstance(offsets, list) or len(offsets) != len(("begin", "end")) or not all(map(_is_u64, offsets)):
        refuse(
            Rule.OFFSETS_TYPE,
            path,
            f"the data_offsets of tensor {shown(name)} are {str(offsets)[:80]}",
            WRITER,
        )
    return offsets[0], offsets[1], dtype, tuple(shape)


def _check_place(name: str, begin: int, end: int, position: int, path: str) -> None:
    where = f"tensor {shown(name)} has data_offsets [{begin}, {end}]"
    if end < begin:
        refuse(Rule.OFFSETS_REVERSED, path, where, WRITER)
    if begin > position:
        what = f"{where}, the tensors before it end at {position}: {begin - position} bytes belong to no tensor"
        refuse(Rule.OFFSETS_HOLE, path, what, WRITER)
    if begin < position:
        what = f"{where}, the tensor before it ends at {position}"
        refuse(Rule.OFFSETS_OVERLAP, path, what, WRITER)


def _check_size(name: str, dtype: str, shape: tuple[int, ...], size_bytes: int, path: str) -> None:
    bits = 1
    # From the left and by 64 bits, as the reference reader does: [2^40, 2^40, 0] is refused, [0, 2^40, 2^40] is not.
    for factor in (*shape, DTYPES[dtype].bits):
        bits *= factor
        if bits > U64_MAX:
            what = f"the size of tensor {shown(name)}, {_shown_type(dtype, shape)}, overflows"
            refuse(Rule.SIZE_OVERFLOW, path, what, DAMAGED)
    if bits % 8 != 0:
        what = f"tensor {shown(name)}, {_shown_type(dtype, shape)}, takes {bits} bits, not a whole number of bytes"
        refuse(Rule.SIZE_NOT_WHOLE_BYTES, path, what, "Pad its last dimension before saving.")
    if bits // 8 != size_bytes:
        what = f"tensor {shown(name)}, {_shown_type(dtype, shape)}, takes {bits // 8} bytes, its data_offsets span"
        refuse(Rule.SIZE_MISMATCH, path, f"{what} {size_bytes}", WRITER)


def _check_end(end: int, file_size_bytes: int, path: str) -> None:
    if end > file_size_bytes:
        what = f"the header places tensors up to byte {end}, the file is {file_size_bytes} bytes long"
        refuse(Rule.FILE_TRUNCATED, path, f"{what}: {end - file_size_bytes} bytes are missing", INTERRUPTED)
    if end < file_size_bytes:
        what = f"the last tensor ends at byte {end}, the file is {file_size_bytes} bytes long"
        advice = "Bytes were added, or it is the wrong header for this data: fetch or save the file again."
        refuse(Rule.TRAILING_BYTES, path, f"{what}: {file_size_bytes - end} bytes belong to no tensor", advice)
