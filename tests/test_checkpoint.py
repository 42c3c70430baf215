# SPDX-License-Identifier: Apache-2.0
"""The checkpoint reader against every rule of the format and against the format's own reader."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import safetensors

import checkpoint_files as files
from tensorpager.checkpoint import (
    TensorEntry,
    aligned,
    open_checkpoint,
    read_header,
    torch_dtype_name,
    torch_shape,
)
from tensorpager.errors import CheckpointError
from tensorpager.header import DTYPES, STRICTER_THAN_REFERENCE, Rule

GOOD = files.good_files()
BAD = files.bad_files()
MUTATIONS = 4000

INDEX_RULES = {
    Rule.CHECKPOINT_MISSING, Rule.INDEX_TOO_LARGE, Rule.INDEX_TYPE, Rule.SHARD_NAME, Rule.SHARD_MISSING,
    Rule.TENSOR_NOT_IN_SHARD, Rule.TENSOR_NOT_IN_INDEX, Rule.TENSOR_TWICE, Rule.TOTAL_SIZE,
}  # fmt: skip
OTHER_RULES = {Rule.FILE_UNREADABLE, Rule.FILE_NOT_REGULAR, Rule.FILE_SHRANK, Rule.DTYPE_NOT_IN_TORCH}


def reference(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """What the format's own reader makes of a file: dtype, shape and bytes of each tensor; None if it refuses it."""
    try:
        tensors = safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return None
    return {name: (spec["dtype"], spec["shape"], bytes(spec["data"])) for name, spec in tensors}


def ours(path: Path, content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    path.write_bytes(content)
    file = read_header(path)
    return {
        name: (e.dtype, list(e.shape), content[e.offset_bytes : e.offset_bytes + e.size_bytes])
        for name, e in file.tensors.items()
    }


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return caught.value


@pytest.mark.parametrize("name", GOOD)
def test_good_file_reads_as_the_reference_reads_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    expected = reference(GOOD[name])
    assert expected is not None
    assert ours(path, GOOD[name]) == expected
    with safetensors.safe_open(path, framework="numpy") as opened:
        assert sorted(opened.keys()) == sorted(expected)
        assert (opened.metadata() or {}) == read_header(path).metadata


@pytest.mark.parametrize(("rule", "content"), BAD, ids=[f"{i}-{rule}" for i, (rule, _) in enumerate(BAD)])
def test_broken_rule_is_named(tmp_path: Path, rule: str, content: bytes) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    error = refusal(path)
    assert (error.rule, error.path) == (rule, str(path))
    assert str(path) in str(error)
    assert Rule(rule).promise in str(error)
    assert len(str(error)) < 1000
    assert reference(content) is None or rule in STRICTER_THAN_REFERENCE


def test_every_rule_is_broken_by_some_test() -> None:
    assert {rule for rule, _ in BAD} | INDEX_RULES | OTHER_RULES == set(Rule)


def test_stricter_rules_are_the_ones_the_reference_lets_pass() -> None:
    assert {rule for rule, content in BAD if reference(content) is not None} == STRICTER_THAN_REFERENCE


TOKENS = [
    b"0", b"1", b"4", b"-", b"9" * 20, b'"', b"[", b"]", b"{", b"}", b",", b":", b"null", b"true", b" ", b"\\", b"NaN",
    b"\\ud800", b"1e9", b"F4", b"U8", b'"a"', b'"shape"', b"\xff", b"18446744073709551615",
]  # fmt: skip


def mutated(rng: random.Random, content: bytes) -> bytes:
    header = bytearray(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    data = bytearray(content[8 + len(header) :])
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(header) + 1)
        span = rng.choice((0, 0, 1, 1, 2, 8))
        header[at : at + span] = rng.choice((b"", rng.choice(TOKENS), bytes(header[at : at + 9]), rng.randbytes(1)))
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data) + 1)] if rng.random() < 0.5 else data + b"x"
    length = len(header) + (rng.choice((-1, 1, 2**40, 2**63)) if rng.random() < 0.05 else 0)
    return struct.pack("<Q", max(length, 0)) + bytes(header) + bytes(data)


def test_mutations_are_accepted_iff_the_reference_accepts_them(tmp_path: Path) -> None:
    rng = random.Random(20240229)
    sources = [content for content in GOOD.values() if len(content) < 4000]
    path = tmp_path / "m.safetensors"
    accepted = refused = stricter = 0
    rules: set[str] = set()
    for number in range(MUTATIONS):
        content = mutated(rng, rng.choice(sources))
        expected = reference(content)
        try:
            found = ours(path, content)
        except CheckpointError as error:
            rules.add(error.rule)
            refused += 1
            stricter += expected is not None
            assert expected is None or error.rule in STRICTER_THAN_REFERENCE, (number, error, content)  # noqa: PT017
        else:
            accepted += 1
            assert found == expected, (number, content)
    assert accepted >= 200, (accepted, refused)
    assert refused >= 2000, (accepted, refused)
    assert stricter <= 40, stricter
    assert len(rules) >= 18, sorted(rules)


def test_dtype_table_has_the_sizes_and_names_of_torch() -> None:
    torch = pytest.importorskip("torch")
    assert {name: dtype.bits for name, dtype in DTYPES.items()} == files.DTYPE_BITS
    for name, dtype in DTYPES.items():
        found = getattr(torch, dtype.torch_name or "", None)
        if found is not None:
            assert found.itemsize == max(8, dtype.bits) // 8, name
    assert {name for name, dtype in DTYPES.items() if dtype.torch_name is None} == {"F6_E2M3", "F6_E3M2"}


def test_files_of_safetensors_torch_have_the_dtypes_and_shapes_it_saved(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    names = [dtype.torch_name for dtype in DTYPES.values() if dtype.torch_name and hasattr(torch, dtype.torch_name)]
    tensors = {name: torch.zeros(3, 8, dtype=torch.uint8).view(getattr(torch, name)) for name in names}
    save_file(tensors, tmp_path / "a.safetensors")
    file = read_header(tmp_path / "a.safetensors")
    assert len(file.tensors) == len(names) >= 17
    for name, tensor in tensors.items():
        entry = file.tensors[name]
        assert torch_dtype_name(entry) == name
        assert torch_shape(entry) == tuple(tensor.shape)
        assert entry.size_bytes == 24


def test_loading_a_dtype_that_torch_lacks_is_refused_by_name() -> None:
    entry = TensorEntry("mlp.w", "F6_E2M3", (4,), 8, 3)
    with pytest.raises(CheckpointError, match=r"m\.safetensors: tensor 'mlp.w'.*F6_E2M3") as caught:
        torch_dtype_name(entry, "m.safetensors")
    assert caught.value.rule == "dtype-not-in-torch"
    with pytest.raises(CheckpointError, match="pairs"):
        torch_shape(TensorEntry("w", "F4", (2, 3, 1), 8, 3))
    assert torch_shape(TensorEntry("w", "F4", (3, 4), 8, 6)) == (3, 2)


@pytest.mark.parametrize(
    ("dtype", "offset_bytes", "expected"),
    [
        ("F4", 1, True),
        ("U8", 3, True),
        ("BF16", 3, False),
        ("F32", 6, False),
        ("F32", 8, True),
        ("C64", 12, False),
    ],
)
def test_aligned(dtype: str, offset_bytes: int, expected: bool) -> None:
    assert aligned(TensorEntry("a", dtype, (8,), offset_bytes, 8 * DTYPES[dtype].bits // 8)) is expected


def test_truncation_names_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    whole = GOOD["twenty"]
    path.write_bytes(whole[:-100])
    message = str(refusal(path))
    assert str(len(whole)) in message
    assert str(len(whole) - 100) in message
    assert "interrupted download" in message


@pytest.mark.parametrize("kind", ["missing", "nul", "directory", "fifo", "socket", "device"])
def test_what_is_no_readable_regular_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    if kind == "nul":
        path = tmp_path / "a\0b"
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "socket":
        os.mknod(path, 0o140600)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    unreadable = {"missing", "nul", "socket"}
    assert caught.value.rule == ("file-unreadable" if kind in unreadable else "file-not-regular")


def test_a_file_that_shrinks_while_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD["twenty"])
    pread = os.pread

    def shrinking(descriptor: int, size: int, offset: int) -> bytes:
        os.truncate(path, 20)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", shrinking)
    assert refusal(path).rule == "file-shrank"


def test_short_reads_are_finished_and_errors_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD["twenty"])
    whole = read_header(path)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 7), offset))
    assert read_header(path) == whole

    def failing(*_: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", failing)
    assert refusal(path).rule == "file-unreadable"


def test_only_the_header_is_read_and_nothing_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = f'{{"a":{files.entry("U8", f"[{1 << 40}]", f"[0,{1 << 40}]")}}}'
    path.write_bytes(files.file_of(header))
    os.truncate(path, 8 + len(header) + (1 << 40))
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    tracemalloc.start()
    assert read_header(path).tensors["a"].size_bytes == 1 << 40
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1 << 20
    path.write_bytes(struct.pack("<Q", 100_000_000) + b"{")
    assert refusal(path).rule == "header-past-end"
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


# Sharded checkpoints.


def make_shards(directory: Path, **changes: object) -> Path:
    """Two shards, x and y, of two tensors each, with their index; `changes` replaces keys of the index."""
    weight_map = {}
    for shard, names in {"x.safetensors": ("a", "b"), "y.safetensors": ("c", "d")}.items():
        text = f'{{"{names[0]}":{files.entry()},"{names[1]}":{files.entry(offsets="[4,8]")}}}'
        (directory / shard).write_bytes(files.file_of(text, 8))
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": 16}, "weight_map": weight_map} | changes
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path


MAP = {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors", "d": "y.safetensors"}


def test_sharded_checkpoint_knows_each_tensors_file(tmp_path: Path) -> None:
    index = make_shards(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.path == index
    assert [file.path.name for file in checkpoint.files] == ["x.safetensors", "y.safetensors"]
    assert checkpoint.file_of == {"a": 0, "b": 0, "c": 1, "d": 1}
    assert checkpoint.size_bytes == 16
    assert checkpoint.entry("d").offset_bytes == checkpoint.files[1].data_start + 4
    assert open_checkpoint(index) == checkpoint
    with pytest.raises(KeyError):
        checkpoint.entry("e")


def test_single_file_goes_before_index_and_variants_are_found(tmp_path: Path) -> None:
    index = make_shards(tmp_path)
    index.rename(tmp_path / "model.safetensors.index.fp16.json")
    assert refusal(tmp_path).rule == "checkpoint-missing"
    assert len(open_checkpoint(tmp_path, variant="fp16").files) == 2
    make_shards(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(GOOD["scalar"])
    assert list(open_checkpoint(tmp_path).file_of) == ["a"]
    (tmp_path / "model.fp16.safetensors").write_bytes(GOOD["no tensor"])
    assert open_checkpoint(tmp_path, variant="fp16").file_of == {}
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path, variant="../x")


def test_shards_behind_links_are_read(tmp_path: Path) -> None:
    make_shards(tmp_path)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "x.safetensors").rename(tmp_path / "blobs" / "x")
    (tmp_path / "x.safetensors").symlink_to("blobs/x")
    assert len(open_checkpoint(tmp_path).file_of) == 4


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("index-type", {"weight_map": []}),
        ("index-type", {"weight_map": {}}),
        ("index-type", {"weight_map": {"a": 1}}),
        *(("shard-name", {"weight_map": {"a": n}}) for n in ("../x", "/x", "s/x", "..", ".", "", "a\0", "s\\x")),
        ("shard-missing", {"weight_map": MAP | {"e": "z.safetensors"}}),
        ("tensor-not-in-shard", {"weight_map": MAP | {"e": "x.safetensors"}}),
        ("tensor-not-in-shard", {"weight_map": MAP | {"a": "y.safetensors"}}),
        ("tensor-not-in-index", {"weight_map": {k: v for k, v in MAP.items() if k != "d"}}),
        ("total-size", {"metadata": {"total_size": 15}}),
        ("total-size", {"metadata": {"total_size": "16"}}),
    ],
)
def test_broken_index_is_named(tmp_path: Path, rule: str, changes: dict[str, object]) -> None:
    make_shards(tmp_path, **changes)
    assert refusal(tmp_path).rule == rule


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {"total_size": 16.0}, {"total_size": None}, "absent"],
    ids=["null", "empty", "float", "none", "str"],
)
def test_total_size_is_optional(tmp_path: Path, metadata: object) -> None:
    make_shards(tmp_path, metadata=metadata)
    assert len(open_checkpoint(tmp_path).files) == 2


def test_wrong_total_size_can_be_allowed(tmp_path: Path) -> None:
    make_shards(tmp_path, metadata={"total_size": 15})
    assert open_checkpoint(tmp_path, check_total_size=False).size_bytes == 16


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    make_shards(tmp_path)
    (tmp_path / "y.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes())
    assert refusal(tmp_path).rule == "tensor-twice"


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("index-type", "[]"),
        ("json-syntax", "{"),
        ("duplicate-key", '{"weight_map":{"a":"x","a":"y"}}'),
        ("json-syntax", ""),
    ],
)
def test_index_is_strict_json(tmp_path: Path, rule: str, text: str) -> None:
    make_shards(tmp_path).write_text(text)
    assert refusal(tmp_path).rule == rule


def test_huge_index_and_broken_shard_are_refused(tmp_path: Path) -> None:
    index = make_shards(tmp_path)
    (tmp_path / "y.safetensors").write_bytes(b"")
    error = refusal(tmp_path)
    assert (error.rule, error.path) == ("file-too-small", str(tmp_path / "y.safetensors"))
    os.truncate(index, 100_000_001)
    assert refusal(tmp_path).rule == "index-too-large"


def test_directory_without_weights_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    error = refusal(tmp_path)
    assert error.rule == "checkpoint-missing"
    assert "pytorch_model.bin" in str(error)


def test_reader_imports_neither_torch_nor_the_extension_nor_safetensors() -> None:
    package = Path(sys.modules["tensorpager.checkpoint"].__file__ or "").parent
    code = (
        "import sys, types\n"
        "package = sys.modules['tensorpager'] = types.ModuleType('tensorpager')\n"
        f"package.__path__ = [{str(package)!r}]\n"
        "import tensorpager.checkpoint\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'safetensors', 'numpy'}))\n"
        "print(*sorted(name for name in sys.modules if name.startswith('tensorpager.')))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    ours_only = "tensorpager.checkpoint tensorpager.errors tensorpager.header"
    assert result.stdout.splitlines() == ["", ours_only]
