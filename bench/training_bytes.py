# SPDX-License-Identifier: Apache-2.0
"""Bytes that a step of training moves, against the least that any schedule could: `python -m bench training-bytes`.

Three numbers for each budget and each order of the optimizer: the engine's own counters, the kernel's (/proc/self/io),
and the bound, the optimum of the linear program of keeping_bound.py over the recorded steps and contents. It counts in
whole pages, and no schedule with these frames moves fewer. All of steady steps, once the pager follows its plan.
"""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch

import tensorpager as tp
from bench.rounds import save

WIDTH, LAYERS, ROWS = 1536, 12, 256
STEPS_BEFORE, STEPS = 5, 5
ORDERS = ("after backward", "inside backward")
SHARES = (0.25, 0.5)


def make(order: str) -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    if order == "after backward":
        return model, [torch.optim.AdamW(model.parameters(), lr=1e-3)]
    return model, [torch.optim.AdamW([parameter], lr=1e-3) for parameter in model.parameters()]


def step_in_backward(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """As torch's tutorial does it: each parameter's optimizer steps as soon as its gradient is there."""
    for parameter, optimizer in zip(model.parameters(), optimizers, strict=True):

        def step(_parameter: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]


def moved_bytes() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"]) + int(fields["write_bytes"])


def measure(order: str, share: float) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, optimizers = make(order)
    state_bytes = (3 if order == "inside backward" else 4) * sum(each.nbytes for each in model.parameters())
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))

    def train() -> None:
        model(x).square().mean().backward()
        if order == "after backward":
            optimizers[0].step()
            optimizers[0].zero_grad()

    with tp.page(model, optimizers, budget=int(share * state_bytes)) as pager:
        if order == "inside backward":
            step_in_backward(model, optimizers)
        for _ in range(STEPS_BEFORE):
            train()
        before, io_before, began = pager.stats(), moved_bytes(), time.perf_counter()
        for _ in range(STEPS):
            train()
        after, io_after, ended = pager.stats(), moved_bytes(), time.perf_counter()
    read = after["page_ins"] - before["page_ins"] - (after["zero_fills"] - before["zero_fills"])
    bound_bytes = after["schedule"]["lower_bound_moved_pages"] * after["page_bytes"]
    written = after["writebacks"] - before["writebacks"]
    counted_bytes = (read + written) * after["page_bytes"] / STEPS
    return {
        "order": order,
        "budget_share": share,
        "state_bytes": state_bytes,
        "bound_bytes": bound_bytes,
        "moved_bytes": counted_bytes,
        "over_bound": counted_bytes / bound_bytes,
        "kernel_bytes": (io_after - io_before) / STEPS,
        "faults": (after["faults"] - before["faults"]) / STEPS,
        "seconds": (ended - began) / STEPS,
    }


def run() -> None:
    """Print a line for each, and write results/training-bytes.json."""
    found = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for order in ORDERS:
            for share in SHARES:
                found.append(pool.apply(measure, (order, share)))
                row = found[-1]
                print(
                    f"optimizer {order}, budget {share:.0%}: bound {row['bound_bytes'] / 2**20:.0f} MiB a step, moved "
                    f"{row['moved_bytes'] / 2**20:.0f} ({row['over_bound']:.3f} x), by the kernel's count "
                    f"{row['kernel_bytes'] / 2**20:.0f}; {row['faults']:.0f} faults, {row['seconds']:.2f} s",
                    flush=True,
                )
    save("training-bytes", {}, {"steps": found}, {"width": WIDTH, "layers": LAYERS, "rows": ROWS})
