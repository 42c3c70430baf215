# SPDX-License-Identifier: Apache-2.0
"""`linear` with a weight four times the budget, and `embedding` of 512 tokens in a table of 4 GiB.

The floor of `linear` is the longer of two: the same product unpaged, and the bytes that were read over the drive's
bandwidth, which is measured in the same rounds. Two ways: the operator called by itself, which reads ahead on its own
and finds nothing of the last call, and a paged nn.Linear, whose tiles are in the schedule, which keeps what it can.

Bars: linear <= 1.10 of its floor; embedding reads the pages of the rows that are named, and no more.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import tensorpager as tp
from bench.page_in import CACHE
from bench.rounds import Measured, interleave, print_table, save
from tensorpager._core import Pager as Core
from tensorpager.compute_ops import embedding, linear
from tensorpager.measured_hardware import drive_rates
from tensorpager.paged_tensor import Backing, PagedTensor, make_paged, span_of
from tensorpager.spill import tensor_at

BUDGET_BYTES = 256 * 2**20
IN, OUT = 4096, 65536  # 1 GiB in float32
BATCHES = (1, 64, 128, 512)  # from what waits for the drive to what waits for the CPU
BAR = 1.10
TABLE_ROWS, TABLE_COLUMNS, TOKENS = 2**20, 1024, 512  # 4 GiB in float32


def run(rounds: int, scale: int = 1) -> dict[str, Measured]:
    """Print tables, and write results/<date>-streamed-linear.json. `scale`: all sizes are divided by it."""
    CACHE.mkdir(exist_ok=True)
    torch.set_grad_enabled(False)
    pages = embedding_pages(TABLE_ROWS // scale)
    measured, ratios = linear_times(rounds, BUDGET_BYTES // scale, OUT // scale)
    summary = {"linear": ratios, "embedding": pages, "bar": BAR}
    arguments = {"rounds": rounds, "budget_bytes": BUDGET_BYTES // scale, "in": IN, "out": OUT // scale}
    print(f"  written to {save('streamed-linear', measured, summary, arguments)}")
    return measured


# -- linear ------------------------------------------------------------------------------------------------------------


def linear_times(rounds: int, budget_bytes: int, out: int) -> tuple[dict[str, Measured], dict[str, float]]:
    weight = torch.randn(out, IN) / IN**0.5
    path = CACHE / "streamed-linear.weight"
    weight.view(-1).numpy().tofile(path)
    inputs = {rows: torch.randn(rows, IN) for rows in BATCHES}
    core = Core(budget_bytes=budget_bytes, spill_directory=str(CACHE))
    model = torch.nn.Sequential(torch.nn.Linear(IN, out, bias=False, device="meta").to_empty(device="cpu"))
    model[0].weight.copy_(weight)
    pager = tp.page(model, budget=budget_bytes, store=str(CACHE))
    try:
        paged = _over_file(core, path, weight)
        contenders: dict[str, Callable[[], Mapping[str, float]]] = {"drive": _drive}
        for rows, x in inputs.items():
            contenders[f"{rows} rows, unpaged"] = lambda x=x: _timed(lambda: torch.nn.functional.linear(x, weight))
            contenders[f"{rows} rows, operator"] = lambda x=x: _counted(core, lambda: linear(x, paged))
            contenders[f"{rows} rows, module"] = lambda x=x: _counted(pager._core, lambda: model(x))
        print(f"linear with a weight of {weight.nbytes >> 20} MiB in a budget of {budget_bytes >> 20} MiB")
        for call in contenders.values():  # plans are made, the heap has grown
            call()
        measured = interleave(contenders, rounds)
    finally:
        pager.close()
        core.close()
        path.unlink()
    return measured, _ratios(measured)


def _over_file(core: Core, path: Path, like: torch.Tensor) -> PagedTensor:
    region = core.map_file(str(path))
    plain = tensor_at(core, region.address, tuple(like.shape), tuple(like.stride()), like.dtype)
    return make_paged(plain, Backing(core, path.name))


def _drive() -> Mapping[str, float]:
    read, _, _ = drive_rates(str(CACHE), 2.0)
    return {"read_bytes_per_second": read}


def _timed(call: Callable[[], object]) -> Mapping[str, float]:
    begin = time.perf_counter()
    call()
    return {"seconds": time.perf_counter() - begin}


def _counted(core: Any, call: Callable[[], object]) -> Mapping[str, float]:
    before = core.stats()
    sample = _timed(call)
    after = core.stats()
    if after["resident_bytes_max"] > core.budget_bytes:
        msg = "the budget was exceeded"
        raise AssertionError(msg)
    return {**sample, **{name: after[name] - before[name] for name in ("bytes_read", "faults", "stall_ns")}}


def _ratios(measured: Mapping[str, Measured]) -> dict[str, float]:
    rows, ratios = [], {}
    for name, found in measured.items():
        if name == "drive" or "unpaged" in name:
            continue
        compute = measured[f"{name.split(',')[0]}, unpaged"].median("seconds")
        # Round by round: the drive is another from minute to minute.
        floors = [
            max(compute, sample["bytes_read"] / drive["read_bytes_per_second"])
            for sample, drive in zip(found.samples, measured["drive"].samples, strict=True)
        ]
        pairs = zip(found.samples, floors, strict=True)
        ratios[name] = statistics.median(sample["seconds"] / floor for sample, floor in pairs)
        read = f"{found.median('bytes_read') / 2**20:.0f} MiB"
        rows.append((name, f"{found.median('seconds'):.2f} s", f"{compute:.2f} s", read, f"{ratios[name]:.2f}"))
    print_table(("linear", "paged", "unpaged", "read", "of the floor"), rows)
    return ratios


# -- embedding ---------------------------------------------------------------------------------------------------------


def embedding_pages(table_rows: int) -> dict[str, float]:
    """Look up rows that were written to an otherwise empty file, and count pages read against pages that hold them."""
    path = CACHE / "streamed-linear.table"
    tokens = torch.randperm(table_rows, generator=torch.Generator().manual_seed(0))[:TOKENS]
    rows = torch.randn(TOKENS, TABLE_COLUMNS)
    row_bytes = rows[0].nbytes
    core = Core(budget_bytes=BUDGET_BYTES, spill_directory=str(CACHE))
    try:
        with path.open("wb") as file:
            file.truncate(table_rows * row_bytes)
            for token, row in zip(tokens.tolist(), rows, strict=True):
                os.pwrite(file.fileno(), row.numpy().tobytes(), token * row_bytes)
            os.fsync(file.fileno())
        table = _over_file(core, path, torch.empty(table_rows, TABLE_COLUMNS, device="meta"))
        address = span_of(table)[0]
        touched = {(address + token * row_bytes) // core.page_bytes for token in tokens.tolist()}
        sample = _counted(core, lambda: _check(embedding(tokens, table), rows))
    finally:
        core.close()
        path.unlink(missing_ok=True)
    touched_bytes = len(touched) * core.page_bytes
    print(
        f"embedding of {TOKENS} tokens in {table_rows * row_bytes >> 20} MiB: {len(touched)} pages of "
        f"{core.page_bytes >> 20} MiB hold them, {sample['bytes_read'] / touched_bytes:.4f} times that was read, "
        f"{sample['seconds']:.2f} s"
    )
    return {"bytes_read": sample["bytes_read"], "touched_bytes": touched_bytes, "seconds": sample["seconds"]}


def _check(found: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(found, expected):
        msg = "other rows came back than were written"
        raise AssertionError(msg)
