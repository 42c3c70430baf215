# SPDX-License-Identifier: Apache-2.0
"""Time of a step of training, paged, against what it takes at least: `python -m bench training-time`.

The floor of a step is the longer of two: the same step unpaged, and the bytes that it moved over the drive's
bandwidth, read and written one after the other. All of it in interleaved rounds: some steps unpaged, the drive
measured, some steps paged. An optimizer after backward updates in the next forward, one inside backward there.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import torch

import tensorpager as tp
from bench.rounds import interleave, print_table, save
from tensorpager.measured_hardware import drive_rates

HIDDEN, LAYERS, ROWS, COLUMNS = 512, 8, 4, 128  # of `make demo-train`
SHARES = (0.25, 0.5)
ORDERS = ("after", "inside")  # of backward
STEPS_BEFORE, STEPS = 5, 3


def example() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "examples" / "finetune.py"
    spec = importlib.util.spec_from_file_location("finetune", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Trained:
    """A model of examples/finetune.py, unpaged or with a share of its training state as budget."""

    def __init__(self, finetune: ModuleType, order: str, share: float | None) -> None:
        self._model = finetune.make_model(HIDDEN, LAYERS)
        parts = [[each] for each in self._model.parameters()] if order == "inside" else [self._model.parameters()]
        self._optimizers = [torch.optim.AdamW(part, lr=6e-4) for part in parts]
        self._inside = order == "inside"
        state_bytes = finetune.training_bytes(self._model)
        self._batch = torch.randint(256, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(0))
        self.pager: tp.Pager | None = None
        if share is not None:
            budget_bytes = int(share * state_bytes)
            self.pager = tp.page(self._model, self._optimizers, budget=budget_bytes)
        if self._inside:
            self._step_inside_backward()
        for _ in range(STEPS_BEFORE):
            self.step()

    def _step_inside_backward(self) -> None:
        for parameter, optimizer in zip(self._model.parameters(), self._optimizers, strict=True):

            def step(_parameter: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]

    def step(self) -> None:
        self._model(input_ids=self._batch, labels=self._batch).loss.backward()
        if not self._inside:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizers[0].step()
            self._optimizers[0].zero_grad()

    def measure(self) -> Mapping[str, float]:
        before = self.pager.stats() if self.pager else {}
        began = time.perf_counter()
        for _ in range(STEPS):
            self.step()
        seconds = (time.perf_counter() - began) / STEPS
        if self.pager is None:
            return {"seconds": seconds}
        after = self.pager.stats()
        counts = {name: (after[name] - before[name]) / STEPS for name in ("bytes_read", "bytes_written", "stalls")}
        return {"seconds": seconds, "stall_seconds": (after["stall_ns"] - before["stall_ns"]) / STEPS / 1e9, **counts}


def run(rounds: int) -> None:
    """Print a table, and write results/<date>-training-time.json."""
    finetune = example()
    with tempfile.TemporaryDirectory(dir=".") as directory:

        def drive() -> Mapping[str, float]:
            read, write, _ = drive_rates(directory, 2.0)
            return {"read_bytes_per_second": read, "write_bytes_per_second": write}

        trained = {
            f"{order} backward, {'unpaged' if share is None else f'{share:.0%} budget'}": Trained(
                finetune, order, share
            )
            for order in ORDERS
            for share in (None, *SHARES)
        }
        contenders: dict[str, Callable[[], Mapping[str, float]]] = {"drive": drive}
        contenders |= {name: each.measure for name, each in trained.items()}
        measured = interleave(contenders, rounds)
        for each in trained.values():
            if each.pager is not None:
                each.pager.close()
    rows, summary = [], {}
    for name, each in trained.items():
        found = measured[name]
        compute = measured[f"{name.split(',')[0]}, unpaged"].median("seconds")
        if each.pager is None:
            continue
        # Round by round: the drive is another from minute to minute.
        floors = [
            max(
                compute,
                sample["bytes_read"] / drive["read_bytes_per_second"]
                + sample["bytes_written"] / drive["write_bytes_per_second"],
            )
            for sample, drive in zip(found.samples, measured["drive"].samples, strict=True)
        ]
        ratio = statistics.median(
            sample["seconds"] / floor for sample, floor in zip(found.samples, floors, strict=True)
        )
        summary[name] = ratio
        moved = (found.median("bytes_read") + found.median("bytes_written")) / 2**20
        rows.append((name, f"{found.median('seconds'):.2f} s", f"{compute:.2f} s", f"{moved:.0f} MiB", f"{ratio:.2f}"))
    print_table(("a step", "paged", "unpaged", "moved", "of the floor"), rows)
    arguments = {"hidden": HIDDEN, "layers": LAYERS, "rows": ROWS, "columns": COLUMNS, "rounds": rounds}
    save("training-time", measured, summary, arguments)
