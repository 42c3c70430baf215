# SPDX-License-Identifier: Apache-2.0
"""`tensorpager plan`: what a model would do on some hardware under some budget. No weights, no drive, no GPU needed."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from tensorpager.budget import format_bytes, parse_bytes
from tensorpager.certificate import Certificate
from tensorpager.errors import BudgetError
from tensorpager.hardware import DRIVES, GPUS, Hardware, profile
from tensorpager.measured_hardware import this_machine
from tensorpager.operator_trace import Trace
from tensorpager.planner import OBJECTIVES, PAGE_BYTES, Budgets, plan
from tensorpager.reorder import CHOICE_VALUES, Choices
from tensorpager.schedule import Schedule

__all__ = ["CurvePoint", "add_plan_arguments", "curve", "run_plan"]

#: What a GPU's budget is when none is given: the rest is for the CUDA context, the allocator and kernels' workspaces.
DEVICE_SHARE = 0.9
CURVE_POINTS = 8
#: Beside those, where the curve falls steepest: shares of what makes everything fit.
NEARLY_FITTING = (0.9, 0.97)
TASK_CHOICES = ("decode", "prompt", "finetune", "lora")
STATE_CHOICES = ("as-weights", "master", "master-8bit", "stochastic", "stochastic-8bit")
UNIT_NAMES = {"decode": "token", "prompt": "prompt", "finetune": "step", "lora": "step"}


@dataclass(frozen=True)
class CurvePoint:
    """A budget, and the certificate of the schedule for it; None where a step does not fit."""

    device_bytes: int
    certificate: Certificate | None


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tensorpager plan`."""
    parser.add_argument("config", help="a transformers config.json, or a directory with one; or a trace saved as JSON")
    work = parser.add_argument_group("the work")
    work.add_argument("--task", choices=TASK_CHOICES, default="decode", help="(default: decode)")
    work.add_argument("--batch", type=int, default=1, help="(default: 1)")
    work.add_argument("--sequence", type=int, default=1024, help="tokens of each text (default: 1024)")
    work.add_argument("--microbatches", type=int, default=1, help="gradient accumulation (default: 1)")
    work.add_argument("--checkpointing", action="store_true", help="trace with activation checkpointing")
    work.add_argument(
        "--training-state", choices=STATE_CHOICES, default="as-weights", help="of AdamW: see tensorpager.optim"
    )
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--gpu", help=f"one of {', '.join(GPUS)} (default: none, the device is a slice of RAM)")
    machine.add_argument("--drive", default="gen4-nvme", help=f"one of {', '.join(DRIVES)} (default: gen4-nvme)")
    machine.add_argument("--drives", type=int, default=1, help="of that kind, striped (default: 1)")
    machine.add_argument("--host", default="0", help="RAM for a tier between GPU and drive, such as 64GiB (default: 0)")
    machine.add_argument(
        "--this-machine", nargs="?", const=".", metavar="DIRECTORY", help="measure this machine and its drive instead"
    )
    machine.add_argument("--hardware", help="a hardware profile saved as JSON instead")
    machine.add_argument("--budget", help="of the device (default: 90%% of a GPU's memory, else 25%% of the weights)")
    limits = parser.add_argument_group("the plan")
    limits.add_argument("--objective", choices=OBJECTIVES, default="time", help="(default: time)")
    limits.add_argument("--write-budget", help="what may be written to the drives per day, such as 1TB")
    limits.add_argument("--page", default=str(PAGE_BYTES), help="page size (default: 2MiB)")
    for name, values in CHOICE_VALUES.items():
        limits.add_argument(f"--{name}", choices=("as traced", *values), help="fix this choice (default: the best)")
    output = parser.add_argument_group("output")
    output.add_argument("--no-curve", action="store_true", help="leave out the curve of time against budget")
    output.add_argument("--json", metavar="FILE", help="write everything as JSON; - for stdout instead of the table")
    output.add_argument("--png", metavar="FILE", help="draw the curve")
    output.add_argument("--explain", metavar="TENSOR", action="append", default=[], help="where this tensor lives when")
    output.add_argument("--save-trace", metavar="FILE", help="write the trace as JSON, to plan for it again")


def run_plan(options: argparse.Namespace, out: TextIO) -> int:
    """Plan, and report. Exit status 0 when the work can run within the budget, 1 when it can't.

    Raises what loading the configuration, tracing and measuring raise, and ValueError for arguments out of range.
    """
    trace = _trace(options)
    if options.save_trace:
        _write(options.save_trace, trace.to_json())
    hardware = _hardware(options)
    budgets = Budgets(_device_bytes(options, hardware, trace), hardware.host_bytes)
    settings = {
        "page_bytes": parse_bytes(options.page),
        "objective": options.objective,
        "write_budget_bytes_per_day": None
        if options.write_budget is None
        else float(parse_bytes(options.write_budget)),
    }
    choices = Choices(**{name: getattr(options, name) for name in CHOICE_VALUES})
    try:
        schedule, refusal = plan(trace, budgets, hardware, choices=choices, **settings), None
    except BudgetError as error:
        schedule, refusal = None, str(error)
    fixed = choices if schedule is None else Choices(**schedule.choices)
    points = [] if options.no_curve else curve(trace, budgets, hardware, fixed, settings)
    if options.png:
        from tensorpager.plan_chart import draw_curve

        draw_curve(Path(options.png), points, schedule, trace, UNIT_NAMES[options.task])
    if options.json:
        text = _as_json(trace, hardware, schedule, refusal, points)
        if options.json != "-":
            _write(options.json, text)
        else:
            out.write(text + "\n")
            return 0 if schedule is not None else 1
    _report(out, options, trace, hardware, budgets, schedule, refusal, points)
    for tensor in options.explain if schedule is not None else ():
        assert schedule is not None
        out.write("\n" + schedule.explain(tensor) + "\n")
    return 0 if schedule is not None else 1


def _write(path: str, text: str) -> None:
    from tensorpager.private_file import write_private

    write_private(Path(path), text)


def _trace(options: argparse.Namespace) -> Trace:
    path = Path(options.config)
    if path.is_file() and path.name != "config.json":
        text = path.read_text(encoding="utf-8")
        if '"tensorpager-trace"' in text[:200]:
            return Trace.from_json(text)
    from tensorpager.workloads import load_config, trace_workload

    return trace_workload(
        load_config(path),
        options.task,
        batch=options.batch,
        sequence=options.sequence,
        microbatches=options.microbatches,
        checkpointing=options.checkpointing,
        training_state=options.training_state,
    )


def _hardware(options: argparse.Namespace) -> Hardware:
    host_bytes = 0 if options.host == "0" else parse_bytes(options.host)
    if options.hardware:
        return Hardware.from_json(Path(options.hardware).read_text(encoding="utf-8"))
    if options.this_machine:
        measured = this_machine(options.this_machine)
        return replace(measured, host_bytes=host_bytes) if measured.host_to_device_bytes_per_second else measured
    return profile(options.gpu, options.drive, drives=options.drives, host_bytes=host_bytes)


def _device_bytes(options: argparse.Namespace, hardware: Hardware, trace: Trace) -> int:
    if options.budget is not None:
        return parse_bytes(options.budget)
    if hardware.host_to_device_bytes_per_second:
        return int(hardware.device_bytes * DEVICE_SHARE)
    return max(trace.total_bytes("weight") // 4, parse_bytes(options.page))


def curve(
    trace: Trace, budgets: Budgets, hardware: Hardware, choices: Choices, settings: dict[str, Any]
) -> list[CurvePoint]:
    """Certificates from the smallest budget that works to one at which nothing moves, evenly in the logarithm."""
    from tensorpager.demand import demand_of

    demand = demand_of(trace, settings["page_bytes"])
    least, most = int(demand.in_use.max()), demand.working_set_pages
    ratio = (most / least) ** (1 / (CURVE_POINTS - 1)) if least else 1.0
    sizes = {min(most, math.ceil(least * ratio**power)) for power in range(CURVE_POINTS)} | {most}
    sizes |= {max(least, int(most * share)) for share in NEARLY_FITTING}
    points = []
    for pages in sorted(sizes):
        size = pages * settings["page_bytes"]
        try:
            made = plan(trace, replace(budgets, device_bytes=size), hardware, choices=choices, **settings)
        except BudgetError:
            points.append(CurvePoint(size, None))
        else:
            points.append(CurvePoint(size, made.certificate))
    return points


# -- reports


def _report(
    out: TextIO,
    options: argparse.Namespace,
    trace: Trace,
    hardware: Hardware,
    budgets: Budgets,
    schedule: Schedule | None,
    refusal: str | None,
    points: list[CurvePoint],
) -> None:
    out.write(f"{trace.name}: weights {_bytes(trace.total_bytes('weight'))}, {len(trace.steps)} operators")
    out.write(f", {trace.tokens} tokens per pass\n" if trace.tokens else "\n")
    tier = f", {format_bytes(budgets.host_bytes)} of host memory" if budgets.host_bytes else ""
    out.write(f"{hardware.name}: budget {format_bytes(budgets.device_bytes)} on the device{tier}\n\n")
    if schedule is None:
        out.write(f"Does not run: {refusal}\n")
    else:
        _report_schedule(out, schedule, trace, UNIT_NAMES[options.task])
    if points:
        out.write("\n")
        _report_curve(out, points, UNIT_NAMES[options.task])


def _report_schedule(out: TextIO, schedule: Schedule, trace: Trace, unit: str) -> None:
    proof = schedule.certificate
    needed = format_bytes(schedule.working_set_pages * schedule.page_bytes)
    fits = not schedule.transfers
    paged = f"Runs paged. With {needed} on the device nothing would have to move."
    verdict = "Fits: nothing has to move." if fits else paged
    rows = [("time", f"{_seconds(proof.pass_seconds)} per {unit}" + _rate(trace, proof))]
    rows.append(("compute alone", _seconds(proof.compute_seconds)))
    rows.append(("least possible", f"{_seconds(proof.time_bound_seconds)}; this plan takes {proof.time_gap:.3f} of it"))
    if not fits:
        moved = f"{_bytes(proof.drive_read_bytes)} read, {_bytes(proof.drive_written_bytes)} written"
        gap = f"; {proof.bytes_gap:.3f} of the least possible" if proof.bytes_gap is not None else ""
        rows.append(("drive", moved + gap))
        rows.append(("LRU would move", f"{_bytes(proof.lru_drive_bytes)}"))
        rows.append(("device", f"{_bytes(proof.device_in_bytes)} in, {_bytes(proof.device_out_bytes)} out"))
    if proof.drive_written_bytes:
        worn = proof.passes_of_endurance
        life = f"; the drive's rating lasts {worn:,.0f} of them" if worn is not None else ""
        rows.append(("writes", f"{proof.terabytes_written_per_1000_passes:.2f} TB per 1,000 passes{life}"))
    if proof.break_even_tokens is not None and not fits:
        tokens = proof.break_even_tokens
        hides = "never" if math.isinf(tokens) else f"from {tokens:,.0f} tokens per pass on (this has {trace.tokens:,})"
        rows.append(("transfers hide", f"behind compute {hides}"))
    rows.append(("order of work", ", ".join(f"{name} {value}" for name, value in schedule.choices.items())))
    rows.append(("proof", proof.proof))
    out.write(verdict + "\n")
    out.writelines(f"  {name:<16} {text}\n" for name, text in rows)


def _report_curve(out: TextIO, points: list[CurvePoint], unit: str) -> None:
    out.write(f"  {'budget':>10}  {'time per ' + unit:>15}  {'read':>10}  {'written':>10}  {'of least time':>13}\n")
    for point in points:
        proof = point.certificate
        if proof is None:
            out.write(f"  {format_bytes(point.device_bytes):>10}  {'does not run':>15}\n")
            continue
        moved = f"{_bytes(proof.drive_read_bytes):>10}  {_bytes(proof.drive_written_bytes):>10}"
        time = _seconds(proof.pass_seconds)
        out.write(f"  {format_bytes(point.device_bytes):>10}  {time:>15}  {moved}  {proof.time_gap:>13.3f}\n")


def _rate(trace: Trace, proof: Certificate) -> str:
    return f", {trace.tokens / proof.pass_seconds:,.1f} tokens/s" if trace.tokens and proof.pass_seconds else ""


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"


def _bytes(value: int) -> str:
    return format_bytes(value) if value else "0 B"


def _as_json(
    trace: Trace, hardware: Hardware, schedule: Schedule | None, refusal: str | None, points: list[CurvePoint]
) -> str:
    content = {
        "trace": {"name": trace.name, "steps": len(trace.steps), "tokens": trace.tokens, "notes": list(trace.notes)},
        "hardware": json.loads(hardware.to_json()),
        "refusal": refusal,
        "schedule": None if schedule is None else json.loads(schedule.to_json()),
        "curve": [
            {"device_bytes": point.device_bytes}
            | ({} if point.certificate is None else _finite(vars(point.certificate)))
            for point in points
        ],
    }
    return json.dumps(content, allow_nan=False)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {name: "inf" if value == math.inf else value for name, value in values.items()}
