# SPDX-License-Identifier: Apache-2.0
"""AdamW with fewer bytes: equal to torch's where it is exact, unbiased and close where it rounds, paged or not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import tensorpager as tp
from tensorpager.optim import (
    BLOCK_VALUES,
    AdamW,
    _signed_codes,
    _unsigned_codes,
    dequantised,
    quantise,
    round_randomly_,
)

FORMS: list[dict[str, Any]] = [
    {"weights": "master"},
    {"weights": "stochastic"},
    {"weights": "master", "moment_bits": 8},
    {"weights": "stochastic", "moment_bits": 8, "seed": 3},
]


def make(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(768, 768) for _ in range(6))).to(dtype)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 768, generator=generator).to(next(model.parameters()).dtype)
        loss = (model(x).float() - x.float()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_float32_is_the_update_of_torch() -> None:
    ours, theirs = make(torch.float32), make(torch.float32)
    arguments: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
    losses = train(ours, AdamW(ours.parameters(), **arguments), range(5))
    assert losses == train(theirs, torch.optim.AdamW(theirs.parameters(), foreach=False, **arguments), range(5))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_master_copies_are_updated_as_float32_weights() -> None:
    model = make(torch.bfloat16)
    masters = [each.detach().float().requires_grad_() for each in model.parameters()]
    by_hand = torch.optim.AdamW(masters, lr=1e-3, foreach=False)
    optimizer = AdamW(model.parameters(), lr=1e-3, weights="master")
    for step in range(4):
        x = torch.randn(4, 768, generator=torch.Generator().manual_seed(step)).bfloat16()
        model(x).float().square().mean().backward()
        for parameter, master in zip(model.parameters(), masters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        by_hand.step()
        optimizer.step()
        optimizer.zero_grad()
        for parameter, master in zip(model.parameters(), masters, strict=True):
            assert torch.equal(optimizer.state[parameter]["master"], master)
            assert torch.equal(parameter, master.bfloat16())


def test_random_rounding_is_right_on_average() -> None:
    exact = torch.tensor([1.0 + 1 / 512, -3.0 - 1 / 300, 1e-3, 7e-39, 0.0, -0.0])
    count = 20_000
    values = exact.repeat(count, 1)
    round_randomly_(values, torch.Generator().manual_seed(0))
    assert torch.equal(values, values.bfloat16().float())  # numbers that bfloat16 has
    below, above = values.amin(0).double(), values.amax(0).double()
    # Five standard deviations of a mean of numbers that take two values.
    error = (values.double().mean(0) - exact.double()).abs()
    assert bool((error <= 5 * (above - below) / 2 / count**0.5).all())
    assert [below[index] == above[index] for index in range(6)] == [False, False, False, False, True, True]
    special = torch.tensor([float("inf"), float("-inf"), float("nan")])
    round_randomly_(special, torch.Generator())
    assert torch.equal(special[:2], torch.tensor([float("inf"), float("-inf")]))
    assert bool(special[2].isnan())


def test_codes_round_to_nearest_or_at_random() -> None:
    assert len(_signed_codes()) == len(_unsigned_codes()) == 256
    assert torch.equal(_signed_codes(), _signed_codes().unique())
    values = torch.randn(3 * BLOCK_VALUES + 7, generator=torch.Generator().manual_seed(0)) ** 3
    codes, scales = quantise(values, _signed_codes())
    back = dequantised(codes, scales, _signed_codes())
    assert codes.dtype == torch.uint8
    assert len(scales) == 4
    steps = torch.diff(_signed_codes()).max() * scales.repeat_interleave(BLOCK_VALUES)[: len(values)]
    assert bool(((back - values).abs() <= steps / 2 + 1e-7).all())
    squares = values.square()
    count, generator = 4000, torch.Generator().manual_seed(0)
    some = squares[:BLOCK_VALUES]
    codes, scales = quantise(some.repeat(count), _unsigned_codes(), generator)
    back = dequantised(codes, scales, _unsigned_codes()).view(count, -1)
    assert bool((back[:, some > 0] > 0).all())
    spread = (back.amax(0) - back.amin(0)).double()
    normal = some > some.max() * _unsigned_codes()[1]  # below, there is no code but zero
    error = (back.double().mean(0) - some.double()).abs()
    assert bool((error <= 5 * spread / 2 / count**0.5 + 1e-6)[normal].all())
    zeros, scales = quantise(torch.zeros(5), _unsigned_codes(), generator)
    assert torch.equal(dequantised(zeros, scales, _unsigned_codes()), torch.zeros(5))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_paged_and_unpaged_have_the_same_bits(form: dict[str, Any]) -> None:
    model, twin = make(torch.bfloat16), make(torch.bfloat16)
    optimizer, other = AdamW(model.parameters(), **form), AdamW(twin.parameters(), **form)
    state_bytes = sum(optimizer.state_bytes(each) + 4 * each.numel() for each in model.parameters())
    with tp.page(model, optimizer, budget=max(16 * 2**20, state_bytes // 3)) as pager:
        assert train(model, optimizer, range(3)) == train(twin, other, range(3))
        for parameter, plain in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(parameter, plain)
            for name, value in other.state[plain].items():
                ours = optimizer.state[parameter][name]
                assert torch.equal(ours, value) if isinstance(value, torch.Tensor) else ours == value
        made = sum(optimizer.state_bytes(each) for each in model.parameters())
        assert pager.stats()["training_bytes"] >= 0.95 * made


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_resumed_run_goes_on_bit_for_bit(form: dict[str, Any], tmp_path: Path) -> None:
    twin = make(torch.bfloat16)
    expected = train(twin, AdamW(twin.parameters(), **form), range(3))
    model = make(torch.bfloat16)
    optimizer = AdamW(model.parameters(), **form)
    with tp.page(model, optimizer, budget="24MiB", store=tmp_path / "store") as pager:
        losses = train(model, optimizer, range(1))
        pager.commit()
        train(model, optimizer, range(1, 2))  # lost
    model = make(torch.bfloat16)
    optimizer = AdamW(model.parameters(), **form)
    with tp.resume(tmp_path / "store", model, optimizer, budget="24MiB"):
        losses += train(model, optimizer, range(1, 3))
        assert losses == expected
        for parameter, plain in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(parameter, plain)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_it_learns_as_float32_does(form: dict[str, Any]) -> None:
    """A linear map of 64 numbers, learned from the same 256 examples in 100 steps."""
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(256, 64, generator=generator), torch.randn(64, 64, generator=generator)

    def losses(dtype: torch.dtype, optimizer_of: Any) -> list[float]:
        torch.manual_seed(1)
        model = torch.nn.Linear(64, 64).to(dtype)
        optimizer = optimizer_of(model.parameters())
        found = []
        for _ in range(100):
            loss = (model(x.to(dtype)).float() - x @ target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    exact = losses(torch.float32, lambda parameters: torch.optim.AdamW(parameters, lr=2e-2))
    rounded = losses(torch.bfloat16, lambda parameters: AdamW(parameters, lr=2e-2, **form))
    assert exact[-1] < 0.2 * exact[0]
    assert rounded[-1] == pytest.approx(exact[-1], rel=0.1), (exact[-1], rounded[-1])


def test_state_dicts_keep_their_dtypes() -> None:
    model = make(torch.bfloat16)
    optimizer = AdamW(model.parameters(), weights="master", moment_bits=8)
    train(model, optimizer, range(2))
    other_model = copy.deepcopy(model)
    other = AdamW(other_model.parameters(), weights="master", moment_bits=8)
    other.load_state_dict(optimizer.state_dict())
    for parameter, plain in zip(model.parameters(), other_model.parameters(), strict=True):
        for name, value in optimizer.state[parameter].items():
            loaded = other.state[plain][name]
            if isinstance(value, torch.Tensor):
                assert loaded.dtype == value.dtype
                assert torch.equal(loaded, value)
                assert loaded.data_ptr() != value.data_ptr()
    assert train(model, optimizer, range(2, 4)) == train(other_model, other, range(2, 4))


def test_what_it_can_not_do_is_refused() -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="weights is one of"):
        AdamW([weight], weights="float8")
    with pytest.raises(ValueError, match="moment_bits 32 or 8"):
        AdamW([weight], moment_bits=4)
    with pytest.raises(ValueError, match="are 0 or more"):
        AdamW([weight], lr=-1.0)
    with pytest.raises(ValueError, match="is for bfloat16"):
        AdamW([weight], weights="stochastic")
    with pytest.raises(ValueError, match="floating parameters"):
        AdamW([torch.zeros(4, dtype=torch.complex64)])
    weight.grad = torch.eye(4).to_sparse()[0].coalesce()
    with pytest.raises(RuntimeError, match="dense gradients"):
        AdamW([weight]).step()
