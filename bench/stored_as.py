# SPDX-License-Identifier: Apache-2.0
"""A model whose weights are stored as 8-bit codes beside the same one exact: seconds and bytes read a pass.

Floor: a pass reads (record bytes / page bytes) of what the exact model reads, so where the drive is what a pass waits
for it takes that share of the time; codes become numbers on the thread that drives the transfers, in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.rounds import Measured, Sample, interleave, print_table, ratio_of_medians, save

WIDTH = 4096
LAYERS = 32  # 1 GiB
BUDGET = "256MiB"
PASSES = 3
EXACT = "exact (bfloat16)"


def run(rounds: int) -> dict[str, Measured]:
    from tensorpager.quantised import STORED_AS

    contenders: dict[str, Callable[[], Sample]] = {EXACT: lambda: _sample(None)}
    for codes in STORED_AS:
        contenders[codes] = lambda codes=codes: _sample(codes)  # type: ignore[misc]
    print(f"{LAYERS} matrices of {WIDTH} x {WIDTH} bfloat16 (1 GiB) in a budget of {BUDGET}, {rounds} rounds")
    measured = interleave(contenders, rounds)
    summary: dict[str, Any] = {}
    rows = []
    for name in measured:
        ratios = {figure: ratio_of_medians(measured, name, EXACT, figure) for figure in ("seconds", "read_mib")}
        summary[name] = ratios
        rows.append((name, f"{ratios['seconds']:.2f}", f"{ratios['read_mib']:.2f}"))
    print_table(("a pass, of the exact model's", "time", "bytes read"), rows)
    print(f"  written to {save('stored-as', measured, summary, {'rounds': rounds})}")
    return measured


def _sample(stored_as: str | None) -> Sample:
    import torch

    import tensorpager

    torch.set_grad_enabled(False)
    weight = torch.randn(WIDTH, WIDTH) * 0.02
    layers = torch.nn.Sequential(
        *(torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16, device="meta") for _ in range(LAYERS))
    ).to_empty(device="cpu")
    for layer in layers:
        layer.weight.copy_(weight.roll(1))
    x = torch.randn(1, WIDTH).bfloat16()
    store = str(Path(__file__).parent)
    with tensorpager.page(layers, budget=BUDGET, store=store, stored_as=stored_as) as pager:
        for _ in range(3):
            layers(x)
        pager.reset_stats()
        begin = time.perf_counter()
        for _ in range(PASSES):
            layers(x)
        seconds = (time.perf_counter() - begin) / PASSES
        return {"seconds": seconds, "read_mib": pager.stats()["bytes_read"] / PASSES / 2**20}
