# SPDX-License-Identifier: Apache-2.0
"""What a model is, for whatever was computed with it and is kept: its class, its configuration, and every weight.

Two models whose fingerprints are equal give the same keys and values for the same tokens; so nothing that has a part in
them may be left out, and the hash is cryptographic (BLAKE2b). All weights are read once for it, a page at a time.

Threads: any. Blocking: for as long as reading the weights takes, or hashing them, 1 GB/s a core.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from tensorpager.errors import ClosedError
from tensorpager.paged_tensor import PagedTensor, span_of

__all__ = ["Fingerprint", "model_fingerprint"]

_PIECE_BYTES = 16 * 2**20
#: Of a configuration: where it was found, and what asks for output that is not kept.
_NOT_THE_MODEL = frozenset({"_name_or_path", "name_or_path", "output_attentions", "output_hidden_states", "use_cache"})


def model_fingerprint(model: torch.nn.Module) -> str:
    """64 hexadecimal digits that another model, other weights or another version of torch or transformers don't have.

    Reads every parameter and buffer, paged or not. IoError, ClosedError.
    """
    state = hashlib.blake2b(digest_size=32, person=b"tp model")
    state.update(json.dumps(_facts(model), sort_keys=True, default=str).encode())
    for name, tensor in _tensors(model):
        facts = [name, str(tensor.dtype), list(tensor.shape)]
        state.update(b"\0" + json.dumps(facts).encode() + b"\0")
        for piece in _pieces(tensor):
            state.update(piece)
    return state.hexdigest()


class Fingerprint:
    """The fingerprint of a model that may be trained meanwhile: computed anew when weights were written to."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self._versions: list[int] = []
        self._value = ""

    @property
    def value(self) -> str:
        """See model_fingerprint(). ClosedError when the model is gone."""
        model = self._model()
        if model is None:
            msg = "the model whose keys and values these are is gone"
            raise ClosedError(msg)
        versions = [tensor._version for _, tensor in _tensors(model)]
        if not self._value or versions != self._versions:
            self._value, self._versions = model_fingerprint(model), versions
        return self._value


def _facts(model: torch.nn.Module) -> dict[str, object]:
    config: Any = getattr(model, "config", None)
    described = config.to_dict() if hasattr(config, "to_dict") else {}
    facts: dict[str, object] = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "config": {key: value for key, value in described.items() if key not in _NOT_THE_MODEL},
        "attention": str(getattr(config, "_attn_implementation", None)),
        "torch": torch.__version__,
    }
    if config is not None:
        import transformers

        facts["transformers"] = transformers.__version__
    return facts


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _pieces(tensor: torch.Tensor) -> Iterator[Any]:
    """The tensor's bytes in row-major order, some at a time."""
    with torch.no_grad():
        if tensor.numel() == 0:
            return
        if type(tensor) is PagedTensor and tensor.is_contiguous() and tensor.device.type == "cpu":
            yield from _paged_pieces(tensor)
            return
        flat = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
        for start in range(0, len(flat), _PIECE_BYTES):
            yield flat[start : start + _PIECE_BYTES].numpy()


def _paged_pieces(tensor: PagedTensor) -> Iterator[Any]:
    """Without a copy: held while they are hashed, or where that is more than fits, brought in as they are touched."""
    backing = tensor._tp_backing
    assert backing is not None
    address, size_bytes = span_of(tensor)
    piece_bytes = max(backing.core.page_bytes, min(_PIECE_BYTES, backing.hold_bytes_max))
    for start in range(0, size_bytes, piece_bytes):
        length = min(piece_bytes, size_bytes - start)
        set_id = backing.core.hold(address + start, length)
        try:
            yield (ctypes.c_char * length).from_address(address + start)
        finally:
            if set_id >= 0:
                backing.core.release(set_id)
