# SPDX-License-Identifier: Apache-2.0
"""What a block of keys and values is found by: a hash of all that its bits depend on.

Keys and values of a token depend on the model and on every token before. So a block's name is a hash of the block
before it and of its own tokens, and the first one's of what is the same for all: whose blocks they are, the model, and
how they are kept. Two prompts that begin alike have the same names as far as they do; two models, or two namespaces,
have none in common. The hash is cryptographic (BLAKE2b, 256 bits): nobody can write a prompt that is taken for another.

Threads: any. Nothing here reads a model or a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

__all__ = ["DIGEST_BYTES", "block_names", "chain_root"]

DIGEST_BYTES = 32

Facts = Mapping[str, object]


def chain_root(facts: Facts) -> bytes:
    """What the first blocks follow on. facts: JSON of strings, numbers, lists and the like; TypeError for others."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES, person=b"tp prefix root").digest()


def block_names(root: bytes, tokens: npt.ArrayLike, block_tokens: int) -> list[bytes]:
    """The names of all whole blocks of a prompt, in order. tokens: integers [n]; the rest of n % block_tokens has none.

    ValueError when tokens is no vector of integers, or block_tokens is not positive.
    """
    ids = np.asarray(tokens)
    if ids.ndim != 1 or (ids.size > 0 and not np.issubdtype(ids.dtype, np.integer)) or block_tokens < 1:
        msg = f"a prompt is a vector of token numbers, not {ids.dtype} {ids.shape}, and a block has a token or more"
        raise ValueError(msg)
    names: list[bytes] = []
    before = root
    for start in range(0, len(ids) - block_tokens + 1, block_tokens):
        state = hashlib.blake2b(before, digest_size=DIGEST_BYTES, person=b"tp prefix block")
        state.update(ids[start : start + block_tokens].astype("<i8").tobytes())
        before = state.digest()
        names.append(before)
    return names
