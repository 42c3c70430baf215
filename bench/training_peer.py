# SPDX-License-Identifier: Apache-2.0
"""Training beside DeepSpeed's ZeRO-3 with NVMe offload, in the same memory: `python -m bench training-peer`.

The same model from the same seed, the same batch, float32, AdamW after backward with clipping, on the CPU, in
interleaved rounds of some steps. Losses are printed, so that one sees the same thing trained, and the peak of each
process's memory beyond what it imported.

DeepSpeed comes as it is configured by default, with its overlap of the optimizer's reads and writes ("pipelined"), with
as little memory as it runs with ("lean": nothing kept in memory by choice, small groups, and a heap that gives back
what is free), and on our aio_handle, which is one line for its user. Each is held against ours with the memory that it
takes: the budget is what fits. Bar: 1.5 times our time or more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import peers
from bench.page_in import CACHE
from bench.rounds import Measured, Sample, Skipped, interleave, print_table, ratio_of_medians, save

ROOT = Path(__file__).resolve().parent.parent
MODEL = {"hidden": 512, "layers": 8, "rows": 4, "columns": 128}  # of `make demo-train`
STATE_BYTES = 16 * 25_960_960  # its weights, gradients and two moments
SHARE = 0.25  # of that
STEPS_BEFORE, STEPS = 5, 2
# A core's time is what all of them compute with: threads that spin would take it from the others.
THREADS = os.environ.get("OMP_NUM_THREADS", "1")
HEAP = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "1000000", "MALLOC_MMAP_THRESHOLD_": "1000000"}
DEEPSPEED = {"library": "deepspeed", "lean": False, "pipelined": False, "own_aio": False}
OURS = f"tensorpager, {SHARE:.0%} budget"


@dataclass(frozen=True)
class Way:
    """One way of training. With the name of another: ours, with as much memory as that takes."""

    job: dict[str, Any]
    as_much_as: str = ""


# In the order in which they are started: those that others are measured by come first.
WAYS = {
    "unpaged": Way({"library": "torch"}),
    OURS: Way({"library": "tensorpager", "share": SHARE}),
    "DeepSpeed": Way(DEEPSPEED),
    "DeepSpeed, pipelined": Way({**DEEPSPEED, "pipelined": True}),
    "DeepSpeed, lean": Way({**DEEPSPEED, "lean": True}),
    "DeepSpeed on our aio_handle": Way({**DEEPSPEED, "own_aio": True}),
    "tensorpager, memory of DeepSpeed": Way({"library": "tensorpager"}, "DeepSpeed"),
    "tensorpager, memory of lean": Way({"library": "tensorpager"}, "DeepSpeed, lean"),
}


def run(rounds: int) -> None:
    """Print a table, and write results/<date>-training-peer.json."""
    missing = peers.prepare().get("DeepSpeed", "")
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        trained: dict[str, Training] = {}
        try:
            for name, way in WAYS.items():
                job = {**way.job, "share": way.job.get("share", _share_for(way.as_much_as, trained))}
                reason = missing if "DeepSpeed" in name else ""
                trained[name] = Training(job, Path(directory) / str(len(trained)), reason)
            contenders: dict[str, Callable[[], Sample]] = {name: each.measure for name, each in trained.items()}
            measured = interleave(contenders, rounds)
        finally:
            for each in trained.values():
                each.end()
    summary = _summarise(measured, trained)
    losses = {name: each.losses for name, each in trained.items()}
    arguments = {**MODEL, "rounds": rounds, "steps_before": STEPS_BEFORE, "steps": STEPS, "threads": THREADS}
    print(f"  written to {save('training-peer', measured, {'ways': summary, 'losses': losses}, arguments)}")


def _share_for(name: str, trained: dict[str, Training]) -> float:
    """The budget with which ours takes the memory of another way: what that takes more than ours with SHARE goes to it.
    All of the state at most, with which nothing is moved."""
    if not name or not trained[name].memory_bytes:
        return SHARE
    more_bytes = trained[name].memory_bytes - trained[OURS].memory_bytes
    return min(max(SHARE + more_bytes / STATE_BYTES, 0.1), 1.0)


class Training:
    """One way of training, in a process of its own that waits between rounds."""

    def __init__(self, job: dict[str, Any], directory: Path, missing: str) -> None:
        self.losses: list[float] = []
        self.share: float = job["share"]
        self.memory_bytes = 0.0
        self._missing = missing
        self._process: subprocess.Popen[str] | None = None
        if missing:
            return
        directory.mkdir()
        theirs = job["library"] == "deepspeed"
        python, environment = (str(peers.PYTHON), peers.environment()) if theirs else (sys.executable, dict(os.environ))
        environment |= {"PYTHONPATH": str(ROOT / "python"), "TMPDIR": str(directory), "OMP_NUM_THREADS": THREADS}
        environment |= HEAP if job.get("lean") else {}
        self._errors = (directory / "errors").open("w+")
        self._process = subprocess.Popen(
            [
                *(python, str(ROOT / "bench/training_worker.py")),
                json.dumps({**MODEL, **job, "directory": str(directory)}),
            ],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self._steps(STEPS_BEFORE)
            self.memory_bytes = self._steps(STEPS)["memory_mib"] * 2**20
        except Skipped as reason:
            self._missing = str(reason)

    def measure(self) -> Sample:
        if self._missing:
            raise Skipped(self._missing)
        return self._steps(STEPS)

    def end(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._errors.close()

    def _steps(self, count: int) -> Sample:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        if self._process.poll() is None:
            self._process.stdin.write(f"{count}\n")
            self._process.stdin.flush()
        while not line.startswith('{"seconds"'):  # what the library prints of its own comes before
            line = self._process.stdout.readline()
            if not line:
                self._errors.seek(0)
                raise Skipped(peers.last_line(self._errors.read()))
        facts = json.loads(line)
        self.losses += facts["losses"]
        return {
            "seconds": facts["seconds"],
            "moved_mib": (facts["read_bytes"] + facts["written_bytes"]) / 2**20,
            "memory_mib": facts["memory_bytes"] / 2**20,
        }


def _summarise(measured: dict[str, Measured], trained: dict[str, Training]) -> dict[str, Any]:
    rows, summary = [], {}
    equals = {way.as_much_as: name for name, way in WAYS.items() if way.as_much_as}
    for name, each in measured.items():
        if not each.samples:
            rows.append((name, "-", "-", "-", "-", "-", each.skipped))
            continue
        ratio = ratio_of_medians(measured, name, OURS, "seconds")
        equal = equals.get("DeepSpeed, lean" if "lean" in name else "DeepSpeed", "")
        same_memory = ratio_of_medians(measured, name, equal, "seconds") if name.startswith("DeepSpeed") else None
        losses = trained[name].losses
        summary[name] = {"times_ours": ratio, "times_ours_in_its_memory": same_memory, "loss": losses[-1]}
        if WAYS[name].job["library"] == "tensorpager":
            summary[name]["budget_share"] = trained[name].share
        rows.append(
            (
                name,
                f"{each.median('seconds'):.2f} s",
                f"{each.median('moved_mib'):.0f} MiB",
                f"{each.median('memory_mib'):.0f} MiB",
                "-" if ratio is None else f"{ratio:.2f}x",
                "-" if same_memory is None else f"{same_memory:.2f}x",
                f"{losses[0]:.4f} .. {losses[-1]:.4f}",
            )
        )
    print_table(("a step", "takes", "moves", "memory", "of ours", "in its memory", "losses"), rows)
    return summary
