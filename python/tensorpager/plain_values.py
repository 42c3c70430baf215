# SPDX-License-Identifier: Apache-2.0
"""Plain values as JSON and back, bit for bit: what a commit says beside its pages.

None, bools, ints, floats, strings, bytes, lists, tuples, dicts with keys of these kinds, and small dense tensors on the
CPU. What JSON has no form for is a dict with one key that begins with "$". No class is named, so nothing is run by
reading. Floats come back exactly: Python writes them so that they do, infinities and NaN included.
"""

from __future__ import annotations

import base64
import binascii
import math
from typing import Any

import torch

__all__ = ["decode", "dtype_named", "encode"]

#: Deeper is a mistake (a list that holds itself), and would end in a RecursionError.
_DEPTH_MAX = 64

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.q", "torch.bits"))
}


def dtype_named(name: object) -> torch.dtype:
    """The dtype that torch shows as torch.<name>. ValueError for any other."""
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        msg = f"{name!r} is no dtype of torch {torch.__version__}"
        raise ValueError(msg)
    return dtype


def encode(value: object, where: str = "the value") -> Any:
    """What json.dumps takes. TypeError, naming the place in it, for a value of another kind."""
    return _encode(value, where, 0)


def _encode(value: Any, where: str, depth: int) -> Any:
    if depth > _DEPTH_MAX:
        msg = f"{where} is nested more than {_DEPTH_MAX} deep"
        raise TypeError(msg)
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": value.hex() if value == value else "nan"}  # noqa: PLR0124
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if kind is list:
        return [_encode(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    if kind is tuple:
        return {"$tuple": [_encode(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]}
    if isinstance(value, dict):
        return _encode_dict(value, where, depth)
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, where)
    msg = (
        f"{where} is of type {kind.__module__}.{kind.__qualname__}; a commit keeps None, bools, ints, floats, strings, "
        "bytes, lists, tuples, dicts and dense CPU tensors. Convert it to one of these"
    )
    raise TypeError(msg)


def _encode_dict(value: dict[Any, Any], where: str, depth: int) -> dict[str, Any]:
    if all(type(key) is str and not key.startswith("$") for key in value):
        return {key: _encode(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
    pairs = [
        [_encode(key, f"a key of {where}", depth + 1), _encode(item, f"{where}[{key!r}]", depth + 1)]
        for key, item in value.items()
    ]
    return {"$dict": pairs}


def _encode_tensor(value: torch.Tensor, where: str) -> dict[str, Any]:
    if value.device.type != "cpu" or value.layout is not torch.strided or value.is_quantized:
        msg = f"{where} is a tensor that is not dense on the CPU ({value.device}, {value.layout}); convert it first"
        raise TypeError(msg)
    name = str(value.dtype).removeprefix("torch.")
    with torch._C.DisableTorchFunctionSubclass():
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
        data = base64.b64encode(flat.numpy().tobytes()).decode()
    return {"$tensor": {"dtype": name, "shape": list(value.shape), "data": data}}


def decode(value: Any) -> Any:
    """The value that encode() was given. ValueError for what it does not write."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        msg = f"a {type(value).__name__} is not a plain value"
        raise ValueError(msg)
    if len(value) == 1:
        (key, inner), *_ = value.items()
        if key.startswith("$"):
            return _decode_marked(key, inner)
    return {key: decode(item) for key, item in value.items()}


def _decode_marked(key: str, inner: Any) -> Any:
    try:
        if key == "$tuple":
            return tuple(decode(item) for item in _a(list, inner))
        if key == "$dict":
            return {decode(name): decode(item) for name, item in _a(list, inner)}
        if key == "$bytes":
            return base64.b64decode(_a(str, inner), validate=True)
        if key == "$float":
            return float("nan") if inner == "nan" else float.fromhex(_a(str, inner))
        if key == "$tensor":
            return _decode_tensor(_a(dict, inner))
    except (TypeError, KeyError, binascii.Error, RuntimeError, OverflowError) as error:
        msg = f"{key} holds something else ({error})"
        raise ValueError(msg) from error
    msg = f"no value is marked {key!r}"
    raise ValueError(msg)


def _decode_tensor(inner: dict[str, Any]) -> torch.Tensor:
    dtype = dtype_named(inner["dtype"])
    shape = [_a(int, size) for size in _a(list, inner["shape"])]
    data = bytearray(base64.b64decode(_a(str, inner["data"]), validate=True))
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        msg = f"a tensor of shape {shape} and dtype {dtype} has {len(data)} bytes"
        raise ValueError(msg)
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).clone().view(dtype).reshape(shape)


def _a(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        msg = f"expected {kind.__name__}, not {type(value).__name__}"
        raise TypeError(msg)
    return value
