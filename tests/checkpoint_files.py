# SPDX-License-Identifier: Apache-2.0
"""Safetensors files made by hand, good and bad, for the tests and the fuzzer of the checkpoint reader."""

from __future__ import annotations

import json
import struct

DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


def file_of(header: str | bytes, data_bytes: int = 0, *, length: int | None = None) -> bytes:
    """A file with this header text, then `data_bytes` bytes that tell their position."""
    text = header.encode() if isinstance(header, str) else header
    data = b"".join(struct.pack("<I", word * 2654435761 % 2**32) for word in range(data_bytes // 4 + 1))
    return struct.pack("<Q", len(text) if length is None else length) + text + data[:data_bytes]


def entry(dtype: str = "F32", shape: str = "[1]", offsets: str = "[0,4]", more: str = "") -> str:
    """The JSON text of one tensor's entry."""
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}{more}}}'


def one(data_bytes: int = 4, name: str = "a", **fields: str) -> bytes:
    """A file of one tensor."""
    return file_of(f'{{"{name}":{entry(**fields)}}}', data_bytes)


def good_files() -> dict[str, bytes]:
    """Every good variety, by name."""
    files = {
        f"dtype {dtype}": one(3 * bits, dtype=dtype, shape="[3,8]", offsets=f"[0,{3 * bits}]")
        for dtype, bits in DTYPE_BITS.items()
    }
    pair = f'"b":{entry(shape="[2]", offsets="[1,9]")},"a":{entry("U8", "[1]", "[0,1]")}'
    many = {
        f"layer.{i}": {"dtype": "BF16", "shape": [i, 3], "data_offsets": [3 * i * (i - 1), 3 * i * (i + 1)]}
        for i in range(20)
    }
    return files | {
        "no tensor": file_of("{}"),
        "metadata only": file_of('{"__metadata__":{"format":"pt"}}'),
        "null metadata": file_of('{"__metadata__":null}'),
        "metadata last": file_of(f'{{"a":{entry()},"__metadata__":{{"k":"v","":"\\u00e9"}}}}', 4),
        "scalar": one(shape="[]"),
        "empty tensor": one(0, shape="[0,7]", offsets="[0,0]"),
        "empty tensors between": file_of(
            f'{{"a":{entry()},"b":{entry(shape="[0]", offsets="[4,4]")},"c":{entry(offsets="[4,8]")}}}', 8
        ),
        "zero before huge": one(0, shape="[0,4294967296,4294967296]", offsets="[0,0]"),
        "unpadded and unaligned": file_of(f"{{{pair}}}", 9),
        "padded": file_of(f"{{{pair}}} \n\t\r  ", 9),
        "spaces inside": file_of(f'{{ "a" : {entry()} }}', 4),
        "unknown field": one(more=',"note":[1.5,-0,1e-999,null,{"x":true}]'),
        "unknown big integer": one(more=f',"note":{"9" * 300}'),
        "depth 127": one(more=f',"note":{"[" * 125 + "]" * 125}'),
        "brackets in strings": one(name="[" * 500 + '\\"{\\\\'),
        "names": file_of(
            f'{{"":{entry()},"\\u0000":{entry(offsets="[4,8]")},"\\ud83d\\ude00":{entry(offsets="[8,12]")}}}',
            12,
        ),
        "twenty": file_of(json.dumps(many), 3 * 19 * 20),
    }


def bad_files() -> list[tuple[str, bytes]]:
    """(rule, file): every rule of one file broken at least once."""
    big = 2**64
    return [
        ("file-too-small", b""),
        ("file-too-small", b"\2\0\0\0\0\0\0"),
        ("header-too-large", file_of("{}", length=100_000_001)),
        ("header-too-large", b"version https://git-lfs.github.com/spec/v1\n"),
        ("header-past-end", file_of("{}", length=3)),
        ("header-not-utf8", file_of(b'{"\xff":1}')),
        ("header-not-utf8", file_of(b'{"\xed\xa0\x80":1}')),
        ("header-start", file_of("")),
        ("header-start", file_of(" {}")),
        ("header-start", file_of("[]")),
        ("json-syntax", file_of("{")),
        ("json-syntax", file_of("{}\0")),
        ("json-syntax", file_of('{"a":{"b\n":1}}')),
        ("json-syntax", file_of('{"a":01}')),
        ("json-syntax", file_of('{"a":{},}')),
        ("json-number", one(more=',"note":NaN')),
        ("json-number", one(more=',"note":-Infinity')),
        ("json-number", one(more=',"note":1e400')),
        ("json-number", one(more=f',"note":{"9" * 5000}')),
        ("json-surrogate", one(name="\\ud800")),
        ("json-surrogate", one(more=',"note":"\\uDC00"')),
        ("json-depth", one(more=f',"note":{"[" * 126 + "]" * 126}')),
        ("json-depth", file_of('{"a":' + "[" * 1_000_000)),
        ("duplicate-key", file_of(f'{{"a":{entry()},"a":{entry()}}}', 4)),
        ("duplicate-key", one(more=',"shape":[1]')),
        ("duplicate-key", file_of('{"__metadata__":{"k":"v","k":"v"}}')),
        ("duplicate-key", file_of('{"__metadata__":null,"__metadata__":null}')),
        ("duplicate-key", one(more=',"note":{"x":1,"\\u0078":2}')),
        ("metadata-type", file_of('{"__metadata__":[]}')),
        ("metadata-type", file_of('{"__metadata__":{"k":1}}')),
        ("metadata-type", file_of('{"__metadata__":{"k":null}}')),
        ("entry-type", file_of('{"a":null}')),
        ("entry-type", file_of('{"a":["F32",[1],[0,4]]}', 4)),
        ("entry-field-missing", file_of('{"a":{"shape":[1],"data_offsets":[0,4]}}', 4)),
        ("entry-field-missing", file_of('{"a":{"dtype":"F32","data_offsets":[0,4]}}', 4)),
        ("entry-field-missing", file_of('{"a":{"dtype":"F32","shape":[1]}}', 4)),
        ("dtype-type", file_of('{"a":{"dtype":{"F32":null},"shape":[1],"data_offsets":[0,4]}}', 4)),
        ("dtype-unknown", one(dtype="f32")),
        ("dtype-unknown", one(dtype="F128")),
        *(("shape-type", one(shape=s)) for s in ("1", "null", "[1.0]", "[true]", "[-1]", '["1"]', "[-0]", "[1e0]")),
        ("shape-type", one(shape=f"[{big}]")),
        *(("offsets-type", one(offsets=o)) for o in ("[0]", "[0,4,4]", "[0,4.0]", "[false,4]", "[-0,4]", "{}")),
        ("offsets-type", one(offsets=f"[0,{big}]")),
        ("offsets-reversed", one(0, shape="[0]", offsets="[4,0]")),
        ("offsets-hole", one(8, offsets="[4,8]")),
        ("offsets-hole", file_of(f'{{"a":{entry()},"b":{entry(offsets="[5,9]")}}}', 9)),
        ("offsets-overlap", file_of(f'{{"a":{entry()},"b":{entry(offsets="[3,7]")}}}', 7)),
        ("offsets-overlap", file_of(f'{{"a":{entry()},"b":{entry()}}}', 4)),
        ("size-overflow", one(0, shape="[4294967296,4294967296,0]", offsets="[0,0]")),
        ("size-overflow", one(0, shape=f"[{2**59}]", offsets=f"[0,{2**61}]")),
        ("size-not-whole-bytes", one(1, dtype="F4", shape="[3]", offsets="[0,1]")),
        ("size-not-whole-bytes", one(1, dtype="F6_E2M3", shape="[]", offsets="[0,1]")),
        ("size-mismatch", one(shape="[2]")),
        ("size-mismatch", one(dtype="U64")),
        ("file-truncated", one(3)),
        ("trailing-bytes", one(5)),
        ("trailing-bytes", file_of("{}", 1)),
    ]  # fmt: skip
