# SPDX-License-Identifier: Apache-2.0
"""AdamW that moves fewer bytes: 16-bit weights with or without a float32 copy, and 8-bit moments.

Explicit options, since they change numbers: `weights` is how an update is rounded to weights of 16 bits, `moment_bits`
how many bits the two moments take. Bytes of a parameter's training state, gradient included, for bfloat16 weights:

    torch.optim.AdamW over float32 weights    16
    weights="master"                          16    forward and backward read 2 instead of 4
    weights="stochastic"                      12
    weights="stochastic", moment_bits=8        6

The update is torch.optim.AdamW's (I. Loshchilov and F. Hutter, Decoupled Weight Decay Regularization, 2019), in
float32, in its order of operations. It depends on nothing but the parameter, its gradient and its state, so paged and
unpaged training have the same bits, and so has one that goes on from a commit.

[Note: stochastic rounding]
A float32 lies between two of 16 bits, and becomes the upper one with the probability of its place between them: right
on average, where rounding to nearest loses every update smaller than half a unit in the last place. Random bits are
added below the last place, and cut off. They are those of a generator seeded by `seed`, the step and the parameter's
number, so there is no state of it to keep.

[Note: 8-bit moments]
Blocks of 256 values have a float32 scale, their largest magnitude, and a code each, an index into 256 values that are
denser near zero (T. Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022). The first moment is rounded
to nearest. The second changes by a thousandth in a step, less than half of what lies between two codes, and would stand
still: it is rounded at random like weights, and never to zero, which would make a step huge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch

__all__ = ["AdamW"]

WEIGHTS = ("nearest", "master", "stochastic")
EXACT_BITS = 32
MOMENT_BITS = (EXACT_BITS, 8)
BLOCK_VALUES = 256
#: float32 bits that 16-bit formats cut off, where they are the upper half of a float32. float16 is not.
_CUT_BITS = 16
_HASH = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio: neighbouring numbers get seeds far apart


class AdamW(torch.optim.Optimizer):
    """See the head of the file.

    params: dense, floating; with weights="stochastic" bfloat16. lr, betas, eps, weight_decay: as torch.optim.AdamW's.
    weights: "master" updates a float32 copy, which is state, and rounds it to nearest; "stochastic" has no copy;
    "nearest" neither, and is for float32. ValueError for other arguments; RuntimeError from step() for sparse
    gradients. Not for one object and several threads.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        weights: str = "nearest",
        moment_bits: int = 32,
        seed: int = 0,
    ) -> None:
        if weights not in WEIGHTS or moment_bits not in MOMENT_BITS:
            msg = f"weights is one of {', '.join(WEIGHTS)} and moment_bits 32 or 8, not {weights!r} and {moment_bits!r}"
            raise ValueError(msg)
        if min(lr, eps, weight_decay) < 0 or not all(0 <= beta < 1 for beta in betas):
            msg = f"lr {lr}, eps {eps} and weight_decay {weight_decay} are 0 or more, betas {betas} in [0, 1)"
            raise ValueError(msg)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "weights": weights, "moment_bits": moment_bits, "seed": seed})
        for group in self.param_groups:
            for parameter in group["params"]:
                _check(parameter, group["weights"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.layout is not torch.strided:
            msg = "AdamW takes dense gradients; torch.optim.SparseAdam takes sparse ones"
            raise RuntimeError(msg)
        state = self.state[parameter]
        if not state:
            self._make_state(parameter, group, state)
        state["step"] += 1
        first, second = group["betas"]
        gradient = gradient.float()
        average = _read(state, "exp_avg", _signed_codes, parameter)
        average.lerp_(gradient, 1 - first)
        square = _read(state, "exp_avg_sq", _unsigned_codes, parameter)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        weight = state.get("master")
        if weight is None:
            weight = parameter.float() if parameter.dtype is not torch.float32 else parameter
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        step_size = group["lr"] / (1 - first ** state["step"])
        denominator = (square.sqrt() / (1 - second ** state["step"]) ** 0.5).add_(group["eps"])
        weight.addcdiv_(average, denominator, value=-step_size)
        if group["moment_bits"] != EXACT_BITS or group["weights"] == "stochastic":
            mixed = (group["seed"] + (state["number"] << 32) + state["step"]) * _HASH % 2**63
            generator = torch.Generator(weight.device).manual_seed(mixed)
        if group["moment_bits"] != EXACT_BITS:
            _write(state, "exp_avg", quantise(average.reshape(-1), _signed_codes().to(weight.device)))
            _write(state, "exp_avg_sq", quantise(square.reshape(-1), _unsigned_codes().to(weight.device), generator))
        if group["weights"] == "stochastic":
            round_randomly_(weight, generator)
        if weight is not parameter:
            parameter.copy_(weight)

    def state_bytes(self, parameter: torch.Tensor) -> int:
        """What the first update of the parameter will make."""
        group = next(group for group in self.param_groups if any(each is parameter for each in group["params"]))
        count = parameter.numel()
        moments = 8 * count if group["moment_bits"] == EXACT_BITS else 2 * count + 8 * -(-count // BLOCK_VALUES)
        return moments + (4 * count if group["weights"] == "master" else 0)

    def _make_state(self, parameter: torch.Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        state["step"] = 0
        state["number"] = len(self.state) - 1  # in the order of first updates, which paging does not change
        if group["weights"] == "master":
            state["master"] = parameter.detach().float().clone()
        for name in ("exp_avg", "exp_avg_sq"):
            if group["moment_bits"] == EXACT_BITS:
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
                continue
            blocks = -(-parameter.numel() // BLOCK_VALUES)
            state[f"{name}_codes"] = torch.zeros(parameter.numel(), dtype=torch.uint8, device=parameter.device)
            state[f"{name}_scales"] = torch.zeros(blocks, device=parameter.device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its dtype, where torch's takes the parameter's."""
        super().load_state_dict(state_dict)
        parameters = [each for group in self.param_groups for each in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for parameter, number in zip(parameters, numbers, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor):
                    value = value.to(parameter.device, copy=True)  # noqa: PLW2901
                self.state[parameter][name] = value


def _check(parameter: torch.Tensor, weights: str) -> None:
    if not parameter.is_floating_point():
        msg = f"AdamW takes floating parameters, not {parameter.dtype}"
        raise ValueError(msg)
    if weights == "stochastic" and parameter.dtype is not torch.bfloat16:
        msg = f'weights="stochastic" is for bfloat16, whose bits are the upper half of a float32, not {parameter.dtype}'
        raise ValueError(msg)


def round_randomly_(values: torch.Tensor, generator: torch.Generator) -> None:
    """float32 to numbers that bfloat16 has, in place: [Note: stochastic rounding]. Infinities and NaNs stay."""
    bits = values.view(torch.int32)
    below = torch.randint(0, 1 << _CUT_BITS, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    rounded = (bits + below) & ~((1 << _CUT_BITS) - 1)
    values.copy_(torch.where(values.isfinite(), rounded.view(torch.float32), values))


def _read(state: dict[str, Any], name: str, codes: Callable[[], torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    if name in state:
        found: torch.Tensor = state[name]
        return found
    return dequantised(state[f"{name}_codes"], state[f"{name}_scales"], codes().to(like.device)).view(like.shape)


def _write(state: dict[str, Any], name: str, quantised: tuple[torch.Tensor, torch.Tensor]) -> None:
    for suffix, values in zip(("codes", "scales"), quantised, strict=True):
        state[f"{name}_{suffix}"].copy_(values)


def quantise(
    values: torch.Tensor, codes: torch.Tensor, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 [n], float32 [blocks]) for float32 [n]: [Note: 8-bit moments]. To nearest; with a generator at random, and
    what is not zero to none (values are 0 or more then, and codes begin with 0)."""
    padding = -len(values) % BLOCK_VALUES
    blocks = torch.nn.functional.pad(values, (0, padding)).view(-1, BLOCK_VALUES)
    scales = blocks.abs().amax(1)
    shares = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    if generator is None:
        found = torch.bucketize(shares, (codes[1:] + codes[:-1]) / 2)
    else:
        found = torch.bucketize(shares, codes[1:-1], right=True)  # the code below; of the largest, the one before it
        below, above = codes[found], codes[found + 1]
        chance = torch.rand(shares.shape, generator=generator, device=shares.device)
        found += chance < (shares - below) / (above - below)
        found.clamp_min_((shares > 0).long())
    return found.to(torch.uint8).view(-1)[: len(values)], scales


def dequantised(quantised: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """float32 [n] of what quantise() gave."""
    scale = scales.repeat_interleave(BLOCK_VALUES)[: len(quantised)]
    return codes[quantised.long()].mul_(scale)


# Tensors are made anew: one that was made while a step is traced is a fake, and must not stay.


def _signed_codes() -> torch.Tensor:
    """float32 [256], ascending from about -1 to 1: for each of seven decades twice as many as for the one below."""
    return torch.tensor(_signed_values())


def _unsigned_codes() -> torch.Tensor:
    """float32 [256], ascending from 0 to 1."""
    return torch.tensor(_unsigned_values())


@cache
def _signed_values() -> list[float]:
    positive = [value for decade in range(7) for value in _in_decade(decade, 2**decade)]
    return sorted([*(-value for value in positive), 0.0, *positive, 1.0])


@cache
def _unsigned_values() -> list[float]:
    positive = [value for decade in range(7) for value in _in_decade(decade, 2 ** (decade + 1))]
    return sorted([0.0, *positive, 1.0])


def _in_decade(decade: int, count: int) -> list[float]:
    """The middles of `count` equal parts of 0.1 .. 1, times 10^(decade - 6)."""
    return [(0.1 + 0.9 * (part + 0.5) / count) * 10.0 ** (decade - 6) for part in range(count)]
