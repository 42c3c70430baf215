# SPDX-License-Identifier: Apache-2.0
"""What the planner says a demo run takes, from the model's configuration and two measured figures: so that the demo
checks the planner."""

from __future__ import annotations

from pathlib import Path

from tensorpager.errors import BudgetError
from tensorpager.hardware import Hardware
from tensorpager.operator_trace import Trace
from tensorpager.planner import Budgets, plan
from tensorpager.reorder import AS_TRACED, Choices
from tensorpager.workloads import load_config, trace_workload

__all__ = ["decode_trace", "predicted_pass_seconds"]


def decode_trace(model: Path, sequence: int) -> Trace:
    """One token of the model in this directory, after `sequence` others."""
    return trace_workload(load_config(model), "decode", sequence=sequence)


def predicted_pass_seconds(
    trace: Trace, *, budget_bytes: int, page_bytes: int, compute_seconds: float, read_bytes_per_second: float
) -> float | None:
    """Seconds of a pass in steady state on a machine that is given by two measurements: the seconds of the pass without
    paging, shared out among the operators by the bytes each moves, and the drive's bandwidth. None when a single
    operator needs more than the budget."""
    moved = sum(step.moved_bytes for step in trace.steps)
    machine = Hardware(
        name="this machine, as the demo measured it",
        device_bytes=budget_bytes,
        host_bytes=0,
        flops_per_second=1e23,  # all of the time is in the bytes moved
        memory_bytes_per_second=moved / compute_seconds,
        host_to_device_bytes_per_second=0.0,
        device_to_host_bytes_per_second=0.0,
        drive_read_bytes_per_second=read_bytes_per_second,
        drive_write_bytes_per_second=read_bytes_per_second,
        drive_endurance_bytes=0.0,
        sources={},
    )
    try:
        made = plan(trace, Budgets(budget_bytes), machine, page_bytes=page_bytes, choices=Choices(*[AS_TRACED] * 3))
    except BudgetError:
        return None
    return made.certificate.pass_seconds
