# SPDX-License-Identifier: Apache-2.0
"""What paging costs when everything is resident: acquire + release from Python, hooks of a module, the guard of a
parameter.

Bar: acquire + release of a resident step <= 5 us.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.rounds import Measured, Sample, interleave, print_table, save

CALLS = 20_000
BATCHES = 5


def microseconds_a_call(call: Callable[[], object], calls: int = CALLS) -> float:
    """The fastest of BATCHES batches: what disturbs only ever adds."""
    batches = []
    for _ in range(BATCHES):
        begin = time.perf_counter_ns()
        for _ in range(calls // BATCHES):
            call()
        batches.append((time.perf_counter_ns() - begin) / (calls // BATCHES) / 1000)
    return min(batches)


def run(rounds: int) -> dict[str, Measured]:
    import torch

    import tensorpager

    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    x = torch.randn(1, 64)
    plain = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8)))
    paged = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8)))
    pager = tensorpager.page(paged, budget="64MiB", store=str(Path(__file__).parent))
    for _ in range(4):
        paged(x)
    core = pager._core
    parameter = paged[0].weight
    set_id = core.add_set([(parameter.data_ptr(), parameter.nbytes)], "bench")

    def acquire_release() -> None:
        core.acquire(set_id)
        core.release(set_id)

    contenders: dict[str, Callable[[], Sample]] = {
        "an empty Python call": lambda: _sample(lambda: None),
        "acquire + release, resident": lambda: _sample(acquire_release),
        "a plain parameter's shape": lambda: _sample(lambda: plain[0].weight.shape),
        "a paged parameter's shape": lambda: _sample(lambda: parameter.shape),
        "p.norm(), plain": lambda: _sample(lambda: plain[0].weight.norm()),
        "p.norm(), paged": lambda: _sample(lambda: parameter.norm()),
        "8 Linear modules, plain": lambda: _sample(lambda: plain(x)),
        "8 Linear modules, paged": lambda: _sample(lambda: paged(x)),
    }
    print(f"overhead when everything is resident, {rounds} interleaved rounds")
    measured = interleave(contenders, rounds)
    pager.close()
    summary = _summarise(measured)
    print(f"  written to {save('overhead', measured, summary, {'rounds': rounds, 'calls': CALLS})}")
    return measured


def _sample(call: Callable[[], object]) -> Sample:
    return {"microseconds": microseconds_a_call(call)}


def _summarise(measured: dict[str, Measured]) -> dict[str, Any]:
    figures = {name: each.median("microseconds") for name, each in measured.items()}
    modules = (figures["8 Linear modules, paged"] - figures["8 Linear modules, plain"]) / 8
    guard = figures["p.norm(), paged"] - figures["p.norm(), plain"]
    figures.update({"added by hooks, a module": modules, "added by the guard, an operation": guard})
    print_table(("", "us"), [(name, f"{value:.2f}") for name, value in figures.items()])
    return {"microseconds": figures}
