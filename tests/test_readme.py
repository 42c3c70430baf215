# SPDX-License-Identifier: Apache-2.0
"""The README's example runs as printed, and its promises come with figures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def code_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_first_example_runs_as_printed() -> None:
    example = code_blocks()[0]
    assert len(example.strip().splitlines()) <= 15
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    printed = re.search(r"at most (\d+) MiB resident, (\d+)% hits, (\d+) faults", done.stdout)
    assert printed is not None, done.stdout
    resident_mib, hits_percent, faults = map(int, printed.groups())
    assert resident_mib <= 128
    # 194 pages in 64 frames: nothing like LRU's none.
    assert hits_percent >= 20
    # What was moved in is dirty at first, so the first pass can't follow the schedule everywhere; every later one does.
    assert faults <= 216


def test_the_planning_example_runs_as_printed() -> None:
    example = next(block for block in code_blocks() if "tp.plan(" in block)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    times, moved, explained = done.stdout.split("\n", 2)
    found = re.fullmatch(r"(\d+\.\d+) s a step, (\d\.\d\d) times the least possible", times)
    assert found is not None, times
    assert 1.0 <= float(found[2]) <= 1.06
    found = re.match(r"(\d+) MiB moved; LRU (\d+) MiB; {'accumulation': 'as traced'", moved)
    assert found is not None, moved
    assert 0 < int(found[1]) < int(found[2])
    assert explained.startswith("3.weight: 8 pages of 2097152 bytes; outlives the pass.\n")


def test_every_figure_names_the_command_that_made_it() -> None:
    measured = README.read_text().split("## Measured")[1].split("\n## ")[0]
    assert "make bench" in measured
    assert "make demo" in measured
    assert "|" in measured
