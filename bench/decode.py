# SPDX-License-Identifier: Apache-2.0
"""Decoding with the demo's model at 50 % and 25 %: ours beside accelerate's disk offload and the kernel's own paging.

Bars: time / max(unpaged compute time, bytes read / measured bandwidth) <= 1.15; bytes read a pass over (model -
budget + largest step) <= 1.05; at least twice as fast as either peer. The peers run in a memory cgroup as large as our
whole process got, page cache included.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import fio
from bench.memory_cgroup import limited_to
from bench.page_in import CACHE, _drop_from_cache
from bench.rounds import Measured, Sample, Skipped, interleave, print_table, ratio_of_medians, save
from tensorpager.demo import _run_worker, budget_in_bytes
from tensorpager.demo_checkpoint import make_checkpoint, shape_for
from tensorpager.demo_worker import WARM_PASSES

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 12
PEER_TOKENS = 4  # a token takes them many seconds; the first pass is left out
MAPPED_SPARE_BYTES = 64 * 2**20  # what the kernel charges a group beside the process's own pages
SECONDS_MAX = 900
# Name: loader in decode_worker.py, and whether its memory is limited. Without a limit accelerate reads "from disk" what
# the page cache holds: the whole model, in memory.
PEERS = {
    "accelerate disk offload": ("accelerate", True),
    "mmap": ("mmap", True),
    "accelerate, memory unlimited": ("accelerate", False),
}


def run(rounds: int, size_bytes: int, with_peers: bool) -> dict[str, Measured]:
    CACHE.mkdir(exist_ok=True)
    (ROOT / ".demo").mkdir(exist_ok=True)
    model = make_checkpoint(ROOT / ".demo", shape_for(size_bytes))
    paths = sorted(model.glob("*.safetensors"))
    model_bytes = sum(path.stat().st_size for path in paths)
    bench = DecodeBench(model, paths)
    contenders: dict[str, Callable[[], Sample]] = {
        "unpaged": bench.unpaged,
        "fio, huge pages": lambda: fio.read_with_huge_pages(paths[0]),
    }
    for share in ("50%", "25%"):
        budget_bytes = budget_in_bytes(share, model_bytes)
        contenders[f"tensorpager {share}"] = bench.paged(budget_bytes)
        if with_peers:
            for name, (peer, limited) in PEERS.items():
                contenders[f"{name} {share}"] = bench.peer(peer, budget_bytes, limited)
    print(f"decode of {model.name}, {rounds} interleaved rounds")
    measured = interleave({name: bench.cold(each) for name, each in contenders.items()}, rounds)
    summary = _summarise(measured)
    arguments = {"rounds": rounds, "model_bytes": model_bytes, "tokens": TOKENS, "peer_tokens": PEER_TOKENS}
    print(f"  written to {save('decode', measured, summary, arguments)}")
    return measured


class DecodeBench:
    """The contenders over one checkpoint; remembers the memory our runs took, for the peers' limits."""

    def __init__(self, model: Path, paths: list[Path]) -> None:
        self._model = model
        self._paths = paths
        self._memory_bytes: dict[int, int] = {}

    def cold(self, contender: Callable[[], Sample]) -> Callable[[], Sample]:
        def measure() -> Sample:
            for path in self._paths:
                _drop_from_cache(path)
            return contender()

        return measure

    def _job(self, budget_bytes: int) -> dict[str, Any]:
        tokens = {"tokens": TOKENS, "engine": "auto", "generate": True}
        return {"model": str(self._model), "budget_bytes": budget_bytes, **tokens}

    def unpaged(self) -> Sample:
        facts = _run_worker(self._job(0), CACHE / "decode" / "unpaged")
        return {"seconds": statistics.median(facts["pass_seconds"][WARM_PASSES:]), "memory_mib": _mib(facts)}

    def paged(self, budget_bytes: int) -> Callable[[], Sample]:
        def measure() -> Sample:
            facts = _run_worker(self._job(budget_bytes), CACHE / "decode" / str(budget_bytes))
            self._memory_bytes[budget_bytes] = facts["memory_bytes_max"]
            step_bytes = facts["schedule"]["largest_step_pages"] * facts["page_bytes"]
            least_bytes = facts["paged_bytes"] - facts["budget_bytes"] + step_bytes
            return {
                "seconds": statistics.fmean(facts["pass_seconds"][WARM_PASSES:]),
                "memory_mib": _mib(facts),
                "read_gib": facts["bytes_read_per_pass"] / 2**30,
                "read_over_least": facts["bytes_read_per_pass"] / least_bytes,
                "read_over_bound": facts["bytes_read_per_pass"] / facts["bytes_bound_per_pass"],
                "bandwidth": statistics.median(facts["bandwidths"]) / 2**30,
                "stall_seconds": facts["stall_seconds_per_pass"],
            }

        return measure

    def peer(self, name: str, budget_bytes: int, limited: bool) -> Callable[[], Sample]:
        def measure() -> Sample:
            if not limited:
                return self._run_peer(name, budget_bytes, None)
            memory_bytes = self._memory_bytes.get(budget_bytes)
            if memory_bytes is None:  # the order turns: ours may come later in this round
                self.paged(budget_bytes)()
                memory_bytes = self._memory_bytes[budget_bytes]
                self.cold(dict)()
            with limited_to(memory_bytes + MAPPED_SPARE_BYTES) as enter:
                return self._run_peer(name, budget_bytes, enter)

        return measure

    def _run_peer(self, name: str, budget_bytes: int, enter: Callable[[], None] | None) -> Sample:
        job = {**self._job(budget_bytes), "peer": name, "tokens": PEER_TOKENS, "scratch": str(CACHE)}
        command = [sys.executable, "-m", "bench.decode_worker", json.dumps(job)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT)])}
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                preexec_fn=enter,
                capture_output=True,
                text=True,
                check=False,
                timeout=SECONDS_MAX,
            )
        except subprocess.TimeoutExpired:
            msg = f"{PEER_TOKENS} tokens took more than {SECONDS_MAX} s"
            raise Skipped(msg) from None
        if done.returncode != 0:
            msg = f"status {done.returncode}: {done.stderr.strip()[-300:]}"
            raise Skipped(msg)
        facts = json.loads(done.stdout.splitlines()[-1])
        return {"seconds": statistics.fmean(facts["pass_seconds"][1:]), "memory_mib": _mib(facts)}


def _mib(facts: dict[str, Any]) -> float:
    return float(facts["memory_bytes_max"]) / 2**20


def _summarise(measured: dict[str, Measured]) -> dict[str, Any]:
    rows = []
    summary: dict[str, Any] = {}
    compute_seconds = measured["unpaged"].median("seconds")
    for name, each in measured.items():
        if each.skipped or "seconds" not in each.samples[0]:
            if each.skipped:
                rows.append((name, "-", "-", "-", "-", each.skipped))
            continue
        own = f"tensorpager {name.rsplit(' ', 1)[1]}" if " " in name else name
        facts: dict[str, Any] = {"seconds_per_token": each.median("seconds"), "memory_mib": each.median("memory_mib")}
        floor = slower = read = "-"
        if name.startswith("tensorpager"):
            facts.update(_over_floor(each, measured["fio, huge pages"], compute_seconds))
            facts["read_over_least"] = each.median("read_over_least")
            facts["read_over_bound"] = each.median("read_over_bound")
            floor, read = f"{facts['time_over_floor']:.2f}", f"{facts['read_over_least']:.3f}"
        elif own in measured and own != name:
            facts["times_ours"] = ratio_of_medians(measured, name, own, "seconds")
            slower = f"{facts['times_ours']:.1f}x"
        summary[name] = facts
        rows.append((name, f"{each.median('seconds'):.3f}", f"{each.median('memory_mib'):,.0f}", floor, read, slower))
    print_table(("", "s/token", "peak MiB", "time/floor", "read/least", "time of ours"), rows)
    return summary


def _over_floor(each: Measured, yardstick: Measured, compute_seconds: float) -> dict[str, float]:
    """Over the floor round by round: bandwidth swings between rounds, and each run is held against its own."""
    ratios = [
        sample["seconds"] / max(compute_seconds, sample["read_gib"] / sample["bandwidth"]) for sample in each.samples
    ]
    facts = {"time_over_floor": statistics.median(ratios)}
    if yardstick.samples:
        fio_bandwidth = yardstick.median("bandwidth")
        facts["time_over_fio_floor"] = each.median("seconds") / max(
            compute_seconds, each.median("read_gib") / fio_bandwidth
        )
    return facts
