# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest

from tensorpager.prefix_chain import DIGEST_BYTES, block_names, chain_root

FACTS = {"model": "a", "dtype": "float32", "layout": [1, 2], "namespace": "", "context": None}


def test_what_two_prompts_have_in_common_has_the_same_names() -> None:
    root = chain_root(FACTS)
    first, second = np.arange(100), np.arange(100)
    second[57] = 0
    one, other = block_names(root, first, 8), block_names(root, second, 8)
    assert len(one) == len(other) == 12
    assert one[:7] == other[:7]
    assert not set(one[7:]) & set(other[7:])  # also where the tokens are the same again
    assert len(set(one)) == 12
    assert {len(name) for name in one} == {DIGEST_BYTES}


def test_whole_blocks_have_names_and_others_none() -> None:
    root = chain_root(FACTS)
    for length, count in ((0, 0), (7, 0), (8, 1), (15, 1), (16, 2)):
        assert len(block_names(root, np.arange(length), 8)) == count
    assert block_names(root, np.arange(24), 8)[:2] == block_names(root, np.arange(20), 8)


@pytest.mark.parametrize("key", FACTS)
def test_every_fact_counts(key: str) -> None:
    values = [FACTS[key], "b", "", 0, [2, 1], [1, [2]], None]
    roots = [chain_root({**FACTS, key: value}) for value in values if value != FACTS[key]]
    assert len({*roots, chain_root(FACTS)}) == len(roots) + 1


def test_facts_can_not_be_moved_between_keys() -> None:
    roots = {chain_root({"a": left, "b": right}) for left, right in itertools.product(["", "x", "xy", '"'], repeat=2)}
    assert len(roots) == 16
    assert chain_root({"a": 1, "b": 2}) == chain_root({"b": 2, "a": 1})
    with pytest.raises(TypeError):
        chain_root({"a": object()})
    with pytest.raises(ValueError, match="JSON"):
        chain_root({"a": float("nan")})


def test_the_type_of_the_numbers_does_not_count() -> None:
    root = chain_root(FACTS)
    names = block_names(root, np.arange(32, dtype=np.int64), 16)
    for dtype in (np.int32, np.uint16, np.uint8):
        assert block_names(root, np.arange(32, dtype=dtype), 16) == names
    assert block_names(root, list(range(32)), 16) == names
    assert block_names(root, -np.arange(32), 16) != names
    for wrong in (np.arange(4.0), np.arange(4).reshape(2, 2)):
        with pytest.raises(ValueError, match="vector of token numbers"):
            block_names(root, wrong, 2)
    with pytest.raises(ValueError, match="a token or more"):
        block_names(root, np.arange(4), 0)


def test_names_are_what_they_were() -> None:
    """Or every store would be empty after an update."""
    assert chain_root({"a": 1}) == hashlib.blake2b(b'{"a": 1}', digest_size=32, person=b"tp prefix root").digest()
    (name,) = block_names(b"\0" * 32, [1, 2], 2)
    content = b"\0" * 32 + (1).to_bytes(8, "little") + (2).to_bytes(8, "little")
    assert name == hashlib.blake2b(content, digest_size=32, person=b"tp prefix block").digest()
