# SPDX-License-Identifier: Apache-2.0
"""How near the scheduler comes to what is possible, on traces of decoding, fine-tuning, experts and encoder-decoders.

    python bench/bench_schedule.py [--json FILE] [--large]

bytes: drive bytes over the linear program's bound, with objective "bytes". LRU: LRU's bytes over ours, LRU being given
perfect prefetch and the same knowledge of dead content. time: predicted time of a pass over its bound, with objective
"time", on three machines whose drive takes 3 times, 1 time and a third of the time of the trace's compute to move the
bytes that have to move at half of the working set. Nothing is timed but planning itself. --large adds full fine-tuning
of a Llama of 70e9 parameters: seconds to plan it, and the process's peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from tensorpager.demand import demand_of
from tensorpager.errors import BudgetError
from tensorpager.hardware import Hardware, profile
from tensorpager.operator_trace import Trace
from tensorpager.planner import plan
from tensorpager.reorder import AS_TRACED, VERTICAL, Choices
from trace_suite import SUITE

# The models have hundreds of megabytes: a page is the share of the budget that one of 2 MiB is of a GPU's.
PAGE_BYTES = 256 << 10
SHARES = (0.15, 0.25, 0.5, 0.75, 0.8)
BALANCES = (1 / 3, 1.0, 3.0)
TRACED = Choices(AS_TRACED, AS_TRACED, AS_TRACED)
HALF = 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--large", action="store_true", help="add 70e9 parameters (a minute, most of it tracing)")
    options = parser.parse_args()
    traces = {name: (make(), TRACED) for name, make in SUITE.items()}
    traces["accumulation, vertical"] = (traces["accumulation"][0], Choices(AS_TRACED, VERTICAL, AS_TRACED))
    rows: list[dict[str, Any]] = []
    print(f"{'trace':<32}{'budget':>7}{'bytes':>8}{'LRU':>7}" + "".join(f"{f'time {b:.2g}':>11}" for b in BALANCES))
    for name, (trace, choices) in traces.items():
        for share in SHARES:
            row = measured(name, trace, choices, share)
            rows.append(row)
            times = "".join(f"{value:>11.3f}" for value in row.get("time", ()))
            text = (
                f"{row['bytes']:>8.4f}{row['lru']:>7.2f}{times}"
                if "bytes" in row
                else f"  needs {row['least_share']:.2f}"
            )
            print(f"{name:<32}{share:>7.0%}{text}", flush=True)
    summary = summarised(rows)
    print("\n" + "\n".join(f"{key}: {value}" for key, value in summary.items()))
    if options.large:
        summary["large"] = large()
        print(summary["large"])
    if options.json:
        Path(options.json).write_text(json.dumps({"rows": rows, "summary": summary}, indent=1) + "\n", encoding="utf-8")
    return 0


def measured(name: str, trace: Trace, choices: Choices, share: float) -> dict[str, Any]:
    """Ratios of one trace at one budget, a share of its working set."""
    demand = demand_of(trace, PAGE_BYTES)
    budget = int(demand.working_set_pages * share) * PAGE_BYTES
    row: dict[str, Any] = {"trace": name, "share": share, "working_set_bytes": demand.working_set_pages * PAGE_BYTES}
    try:
        fewest = plan(
            trace, budget, machine(trace, choices, 1.0), page_bytes=PAGE_BYTES, objective="bytes", choices=choices
        )
    except BudgetError:
        return {**row, "least_share": float(demand.in_use.max() / demand.working_set_pages)}
    proof = fewest.certificate
    row["bytes"] = proof.bytes_gap
    row["lru"] = proof.lru_drive_bytes / proof.drive_bytes if proof.drive_bytes else 1.0
    row["time"] = [
        plan(
            trace, budget, machine(trace, choices, balance), page_bytes=PAGE_BYTES, choices=choices
        ).certificate.time_gap
        for balance in BALANCES
    ]
    return row


_machines: dict[tuple[str, Choices, float], Hardware] = {}


def machine(trace: Trace, choices: Choices, balance: float) -> Hardware:
    """Hardware whose drive moves at half of the working set what it must in (compute time / balance)."""
    key = (trace.name + str(len(trace.steps)) + str(trace.tokens), choices, balance)
    if key not in _machines:
        from dataclasses import replace

        base = profile("rtx-4090", "gen4-nvme")
        base = replace(base, host_to_device_bytes_per_second=1e15, device_to_host_bytes_per_second=1e15)
        demand = demand_of(trace, PAGE_BYTES)
        budget = max(int(demand.working_set_pages * HALF), int(demand.in_use.max())) * PAGE_BYTES
        proof = plan(trace, budget, base, page_bytes=PAGE_BYTES, objective="bytes", choices=choices).certificate
        rate = proof.drive_bytes / proof.compute_seconds * balance
        _machines[key] = replace(base, drive_read_bytes_per_second=rate, drive_write_bytes_per_second=rate)
    return _machines[key]


def summarised(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst of each kind."""
    ran = [row for row in rows if "bytes" in row]
    return {
        "worst bytes at 50 % and 75 %": max(row["bytes"] for row in ran if row["share"] in (0.5, 0.75)),
        "worst bytes at 15 % to 25 %": max(row["bytes"] for row in ran if row["share"] <= 0.25),
        "worst time at 25 % to 80 %": max(max(row["time"]) for row in ran if row["share"] >= 0.25),
        "least of LRU's bytes over ours": min(row["lru"] for row in ran),
    }


def large() -> dict[str, float]:
    """Planning full fine-tuning of 70e9 parameters in pages of 2 MiB, on one GPU and two drives."""
    from transformers import LlamaConfig

    from tensorpager.workloads import trace_workload

    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
    )
    started = time.perf_counter()
    trace = trace_workload(config, "finetune", sequence=2048, checkpointing=True)
    traced = time.perf_counter()
    made = plan(trace, "22GiB", profile("rtx-4090", "gen4-nvme", drives=2), choices=TRACED)
    return {
        "steps": len(trace.steps),
        "tracing_seconds": traced - started,
        "planning_seconds": time.perf_counter() - traced,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bytes_gap": made.certificate.bytes_gap or 0.0,
        "time_gap": made.certificate.time_gap,
    }


if __name__ == "__main__":
    sys.exit(main())
