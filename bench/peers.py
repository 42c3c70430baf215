# SPDX-License-Identifier: Apache-2.0
"""The peers' virtual environment: made once, apart from ours, so that nothing they pull in reaches what is measured
of ours.

KvikIO and DeepSpeed are installed one by one: where one can't be, the reason is on record and the others are
measured all the same.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from bench.rounds import Sample, Skipped

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-peers"
PYTHON = ENVIRONMENT / "bin" / "python"
BUILD_SECONDS_MAX = 900

# Package, what must import, and how it is installed. DeepSpeed compiles its op at first use, against the torch that
# is there, and needs the header of libaio.
OPTIONAL = {
    "KvikIO": ("kvikio-cu12==26.10.0", "import kvikio", ()),
    "DeepSpeed": (
        "deepspeed==0.19.8",
        "from deepspeed.ops.op_builder import AsyncIOBuilder as B; B().load()",
        ("--no-build-isolation",),
    ),
}


def prepare() -> dict[str, str]:
    """Make the environment unless it is there. Returns, for each optional peer that can't run here, the reason."""
    if not PYTHON.exists():
        print("making .venv-peers", flush=True)
        _run([sys.executable, "-m", "venv", str(ENVIRONMENT)])
        lines = (ROOT / "bench/peers_requirements.txt").read_text().splitlines()
        packages = [line for line in lines if line and not line.startswith("#")]
        _run(_pip(packages[0]))
        _run(_pip(*packages, "ninja", "setuptools", "wheel"))
    return {name: reason for name in OPTIONAL if (reason := _missing(name))}


def _missing(name: str) -> str:
    package, check, options = OPTIONAL[name]
    if reason := _missing_header(name):
        return reason
    torch_before = _torch_version()
    if not _imports(package):
        done = _try(_pip(package, *options))
        if done.returncode != 0:
            return f"{package} can't be installed: {last_line(done.stderr)}"
        if _torch_version() != torch_before:
            msg = f"{package} replaced torch {torch_before}: remove .venv-peers and take {name} out"
            raise SystemExit(msg)
    done = _try([str(PYTHON), "-c", check])
    return "" if done.returncode == 0 else f"{package} is installed and can't be used: {last_line(done.stderr)}"


def _missing_header(name: str) -> str:
    if name != "DeepSpeed":
        return ""
    compiler = os.environ.get("CXX", "c++")
    done = subprocess.run(
        [compiler, "-fsyntax-only", "-x", "c++", "-"],
        input="#include <libaio.h>",
        text=True,
        capture_output=True,
        check=False,
    )
    return "" if done.returncode == 0 else "it needs the header of libaio (apt-get install libaio-dev)"


def _imports(package: str) -> bool:
    return _try([str(PYTHON), "-m", "pip", "show", "--quiet", package.partition("==")[0]]).returncode == 0


def _torch_version() -> str:
    return _try([str(PYTHON), "-c", "import torch; print(torch.__version__)"]).stdout.strip()


def _pip(*arguments: str) -> list[str]:
    return [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]


def environment() -> dict[str, str]:
    """What programs of the peers' environment find: its own commands, and that there is no GPU."""
    path = os.pathsep.join([str(PYTHON.parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}


def _try(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment(), timeout=BUILD_SECONDS_MAX
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"still not done after {BUILD_SECONDS_MAX} s")


def _run(command: list[str]) -> None:
    done = _try(command)
    if done.returncode != 0:
        msg = f"{' '.join(command)} failed:\n{done.stderr}"
        raise SystemExit(msg)


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Paths of the machine that built the peer say nothing, and would end up in the results.
    return re.sub(r"[^ ]*/[^ ]+:\d+: ", "", lines[-1])[-90:] if lines else "no message"


def read_with(peer: str, path: Path) -> Sample:
    """One cold read by a peer in a process of its own: bandwidth (GiB/s) and cpu (CPU seconds a GiB)."""
    done = _try([str(PYTHON), str(ROOT / "bench/peer_read.py"), peer, str(path)])
    if done.returncode != 0:
        raise Skipped(last_line(done.stderr))
    facts = json.loads(done.stdout.splitlines()[-1])
    gib = facts["bytes"] / 2**30
    return {"bandwidth": gib / facts["seconds"], "cpu": facts["cpu_seconds"] / gib}
