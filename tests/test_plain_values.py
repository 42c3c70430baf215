# SPDX-License-Identifier: Apache-2.0
"""Plain values as JSON: every kind comes back bit for bit, and what is no plain value is refused by its place."""

from __future__ import annotations

import collections
import json
import math
from typing import Any

import pytest
import torch

from tensorpager.plain_values import decode, dtype_named, encode


def there_and_back(value: object) -> Any:
    return decode(json.loads(json.dumps(encode(value), allow_nan=False)))


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        -(2**80),
        0.1,
        -0.0,
        5e-324,
        1.7976931348623157e308,
        math.inf,
        -math.inf,
        "",
        "\u20ac \x00 $",
        b"",
        bytes(range(256)),
        [],
        [1, [2, (3, "4")]],
        (),
        (0.9, 0.999),
        {},
        {"a": {"b": [None]}},
        {"$tuple": [1]},
        {"$": 1, "b": 2},
        {3: "x", (1, 2): {b"k": 4.5}, None: 0},
    ],
)
def test_values_come_back(value: object) -> None:
    got = there_and_back(value)
    assert got == value
    assert type(got) is type(value)
    assert repr(got) == repr(value)


def test_nan_comes_back() -> None:
    assert math.isnan(there_and_back([math.nan])[0])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.arange(6, dtype=torch.int64).reshape(2, 3).t(),
        torch.randn(3, 5).bfloat16(),
        torch.randn(4).to(torch.float8_e4m3fn),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]),
        torch.tensor([math.nan, -0.0, math.inf]),
        torch.nn.Parameter(torch.randn(2)),
    ],
)
def test_tensors_come_back(tensor: torch.Tensor) -> None:
    got = there_and_back({"t": tensor})["t"]
    assert type(got) is torch.Tensor
    assert got.dtype == tensor.dtype
    assert got.shape == tensor.shape
    assert not got.requires_grad
    same_bits = got.reshape(-1).view(torch.uint8), tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    assert torch.equal(*same_bits)
    got.zero_()  # memory of its own, that can be written


def test_a_counter_becomes_a_dict() -> None:
    assert there_and_back(collections.Counter({5: 2})) == {5: 2}


def test_what_is_no_plain_value_is_refused_by_its_place() -> None:
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is of type builtins\.object"):
        encode({"a": [0, object()]}, "state")
    with pytest.raises(TypeError, match="not dense on the CPU"):
        encode(torch.empty(2, device="meta"))
    circle: list[object] = []
    circle.append(circle)
    with pytest.raises(TypeError, match="nested more than"):
        encode(circle)


@pytest.mark.parametrize(
    "document",
    [
        {"$tuple": 3},
        {"$bytes": "!"},
        {"$bytes": 1},
        {"$float": "x"},
        {"$dict": [[1]]},
        {"$dict": [[[], 1]]},
        {"$other": 1},
        {"$tensor": {"dtype": "float32", "shape": [2], "data": ""}},
        {"$tensor": {"dtype": "float32", "shape": [-1], "data": ""}},
        {"$tensor": {"dtype": "load", "shape": [0], "data": ""}},
        {"$tensor": {"shape": [0], "data": ""}},
        {"$tensor": {"dtype": "float32", "shape": [True], "data": "AAAAAA=="}},
    ],
)
def test_what_encode_does_not_write_is_refused(document: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(document)


def test_dtypes_are_found_by_name_and_nothing_else_is() -> None:
    assert dtype_named("bfloat16") is torch.bfloat16
    for name in ("load", "torch.float32", 3, None):
        with pytest.raises(ValueError, match="no dtype"):
            dtype_named(name)
