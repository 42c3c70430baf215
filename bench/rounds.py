# SPDX-License-Identifier: Apache-2.0
"""Interleaved rounds: every contender runs once a round, in an order that turns, so that a noisy machine is noisy to
all alike."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "numpy", "transformers", "safetensors", "accelerate", "tensorpager")

Sample = Mapping[str, float]


@dataclass
class Measured:
    """Samples of one contender, a dictionary of figures for each round; or why there are none."""

    name: str
    samples: list[dict[str, float]] = field(default_factory=list)
    skipped: str = ""

    def median(self, figure: str) -> float:
        return statistics.median(sample[figure] for sample in self.samples)

    def spread(self, figure: str) -> tuple[float, float]:
        values = [sample[figure] for sample in self.samples]
        return min(values), max(values)


class Skipped(Exception):
    """A contender can't run here; the message says why."""


def interleave(contenders: Mapping[str, Callable[[], Sample]], rounds: int) -> dict[str, Measured]:
    """Run each contender once a round. One that raises Skipped is left out from then on, with the reason on record."""
    measured = {name: Measured(name) for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if measured[name].skipped:
                continue
            try:
                sample = dict(contenders[name]())
            except Skipped as reason:
                measured[name].skipped = str(reason)
                print(f"  round {turn + 1}/{rounds}  {name}: skipped: {reason}", flush=True)
                continue
            measured[name].samples.append(sample)
            figures = ", ".join(f"{figure} {value:.4g}" for figure, value in sample.items())
            print(f"  round {turn + 1}/{rounds}  {name}: {figures}", flush=True)
    return measured


def ratio_of_medians(measured: Mapping[str, Measured], name: str, reference: str, figure: str) -> float | None:
    if not measured[name].samples or not measured[reference].samples:
        return None
    return measured[name].median(figure) / measured[reference].median(figure)


def machine_facts() -> dict[str, Any]:
    """What the figures depend on: no names of people, hosts or directories."""
    processor = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    memory_kib = int(Path("/proc/meminfo").read_text().split(maxsplit=2)[1])
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kib / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "versions": versions,
    }


def save(item: str, measured: Mapping[str, Measured], summary: Mapping[str, Any], arguments: Mapping[str, Any]) -> Path:
    """Write results/<date>-<item>.json."""
    RESULTS.mkdir(exist_ok=True)
    now = datetime.now(timezone.utc)
    path = RESULTS / f"{now:%Y-%m-%d-%H%M}-{item}.json"
    content = {
        "item": item,
        "date": now.isoformat(timespec="seconds"),
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "arguments": dict(arguments),
        "machine": machine_facts(),
        "summary": dict(summary),
        "contenders": {name: asdict(each) for name, each in measured.items()},
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def print_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  " + "  ".join(cells))
