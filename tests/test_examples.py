# SPDX-License-Identifier: Apache-2.0
"""The programs in examples/ run as their first lines say, small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import tensorpager as tp

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ["--hidden", "128", "--layers", "2"]


def run(name: str, *arguments: str | Path, ranks: int = 1) -> str:
    environment = {**os.environ, "TQDM_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_finetuning_is_the_unpaged_one(tmp_path: Path) -> None:
    store = tmp_path / "run"
    paged = ["--store", store, "--budget", "24MiB", "--commit-every", "2", "--facts", tmp_path / "paged.json"]
    first = run("finetune.py", *SMALL, *paged, "--steps", "2")
    assert "in 24 MiB; from step 0" in first
    run("finetune.py", *SMALL, "--unpaged", "--steps", "2", "--facts", tmp_path / "unpaged.json")
    paged_facts = json.loads((tmp_path / "paged.json").read_text())
    unpaged_facts = json.loads((tmp_path / "unpaged.json").read_text())
    for key in ("losses", "held_out", "checksums"):
        assert paged_facts[key] == unpaged_facts[key]
    assert len(paged_facts["losses"]) == 2
    assert (store / "losses.csv").read_text().splitlines()[0] == "step,loss"
    assert (store / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_finetuning_by_the_trainer_commits(tmp_path: Path) -> None:
    store = tmp_path / "run"
    output = run("finetune_trainer.py", *SMALL, "--store", store, "--budget", "24MiB", "--steps", "2")
    assert "held out" in output
    assert tp.committed(store) == 2


def test_finetuning_by_two_ranks_goes_on(tmp_path: Path) -> None:
    store = tmp_path / "run"
    paged = [*SMALL, "--store", store, "--budget", "16MiB"]
    first = run("finetune_distributed.py", *paged, "--steps", "1", ranks=2)
    second = run("finetune_distributed.py", *paged, "--steps", "2", ranks=2)
    assert [line.split(":")[0] for line in (first + second).splitlines()] == ["step 1", "step 2"]
    assert [tp.committed(store / f"rank-{rank}-of-2") for rank in range(2)] == [3, 3]
