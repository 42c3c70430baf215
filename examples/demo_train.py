# SPDX-License-Identifier: Apache-2.0
"""Show that paged training is training: finetune.py unpaged, and paged with a kill -9 in the middle, side by side.

    make demo-train          # or: python examples/demo_train.py --directory .demo-train

Each run is a process of its own. What is printed is measured in this run; the losses of both are drawn in loss.png.
Exit status 0 when every loss and every weight agrees.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import tensorpager as tp

MIB = 2**20
WARM_STEPS = 5  # the first ones are planned while they run


def peak_memory(process: subprocess.Popen[str], into: list[int]) -> None:
    """The kernel's high-water mark of a process's resident memory, until it ends. Appends bytes."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        except OSError:
            return
        into.extend(int(line.split()[1]) * 1024 for line in lines)
        time.sleep(0.2)


def train(arguments: list[str], kill_when: Path | None = None, steps: int = 0) -> tuple[int, int]:
    """One run of finetune.py: exit status and peak memory in bytes. kill_when: a store; killed after its commit."""
    command = [sys.executable, str(Path(__file__).with_name("finetune.py")), *arguments]
    process = subprocess.Popen(command, text=True)  # noqa: S603 - our own script in our own interpreter
    memory: list[int] = [0]
    watcher = threading.Thread(target=peak_memory, args=(process, memory))
    watcher.start()
    while kill_when is not None and process.poll() is None:
        time.sleep(0.1)
        if commits_in(kill_when) >= steps:
            time.sleep(1)  # into the next steps, or the next commit
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    watcher.join()
    return process.returncode, max(memory)


def commits_in(store: Path) -> int:
    """The number of the last commit, read from the root's header: the store itself is open in the other process."""
    try:
        header = (store / "root.tensorpager").read_bytes()[:40]
    except OSError:
        return 0
    return int.from_bytes(header[32:40], "little")


def plot(unpaged: list[float], paged: list[float], killed_at: int, path: Path) -> None:
    """Both curves. They coincide, so the unpaged one is drawn broad."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats a byte", title="Paged training, and the same in memory")
    steps = range(1, len(unpaged) + 1)
    axes.plot(steps, unpaged, linewidth=6, alpha=0.35, label="in memory")
    axes.plot(steps, paged, linewidth=1.2, label="paged, a quarter of the memory")
    axes.axvline(killed_at, linestyle=":", color="black", label="resumed here after kill -9")
    axes.legend()
    figure.savefig(path)


def main() -> int:
    """See the head of the file."""
    parser = argparse.ArgumentParser(description="Paged training beside the same in memory, bit for bit.")
    parser.add_argument("--directory", type=Path, default=Path(".demo-train"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--budget", default="25%", help="a size, or a share of the training state (default: 25%%)")
    options = parser.parse_args()
    directory: Path = options.directory
    store = directory / "store"
    if store.exists():
        shutil.rmtree(store)  # of the last demonstration
    directory.mkdir(exist_ok=True)
    common = ["--steps", str(options.steps)]
    print("Unpaged, for reference:", flush=True)
    status, unpaged_memory = train([*common, "--unpaged", "--facts", str(directory / "unpaged.json")])
    if status != 0:
        return status
    paged = [*common, "--budget", options.budget, "--store", str(store), "--facts", str(directory / "paged.json")]
    print("\nPaged, until it is killed:", flush=True)
    train(paged, kill_when=store, steps=1 + options.steps // 2 // 5)
    print(f"\nkill -9. The store has commit {tp.committed(store)}. Paged, from there on:", flush=True)
    status, paged_memory = train(paged)
    if status != 0:
        return status
    reference = json.loads((directory / "unpaged.json").read_text())
    result = json.loads((directory / "paged.json").read_text())
    same = all(reference[key] == result[key] for key in ("losses", "held_out", "checksums"))
    killed_at = options.steps - len(result["seconds"])
    plot(reference["losses"], result["losses"], killed_at, directory / "loss.png")
    tell(reference, result, unpaged_memory, paged_memory)
    print(f"  losses of both, which {'coincide' if same else 'DIFFER'}: {directory / 'loss.png'}")
    print("\nEvery loss and every weight agrees." if same else "\nLOSSES OR WEIGHTS DIFFER from the unpaged run.")
    return 0 if same else 1


def tell(reference: dict[str, Any], result: dict[str, Any], unpaged_memory: int, paged_memory: int) -> None:
    """Print what was measured."""
    stats = result["stats"]
    state = stats["paged_bytes"] + stats["training_bytes"]
    unpaged_seconds = statistics.median(reference["seconds"][WARM_STEPS:])
    paged_seconds = statistics.median(result["seconds"][WARM_STEPS:])
    moved = statistics.median(result["moved_bytes"][WARM_STEPS:])
    bound = result["schedule"]["lower_bound_moved_pages"] * stats["page_bytes"]
    print(f"""
  training state    {state / MIB:8,.0f} MiB, in a budget of {stats["budget_bytes"] / MIB:,.0f} MiB
  peak memory       {paged_memory / MIB:8,.0f} MiB of the process; unpaged {unpaged_memory / MIB:,.0f} MiB
  moved             {moved / MIB:8,.0f} MiB a step; without commits no schedule moves fewer than {bound / MIB:,.0f}
  a step            {paged_seconds:8.2f} s; unpaged {unpaged_seconds:.2f} s (medians)""")


if __name__ == "__main__":
    sys.exit(main())
