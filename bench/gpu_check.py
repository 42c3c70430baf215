# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check`: everything that only a GPU can show, on a machine with one. Needs no network and installs nothing.

    python bench/gpu_check.py [--prefix DIR] [--minutes 8] [--skip-build]

Builds the extension and the C++ tests in build/gpu with the Python that runs this (its torch, pybind11, numpy, pytest),
runs the tests marked gpu and the kernels' tests, under compute-sanitizer too where there is one, then the benchmarks,
and writes bench/results/<date>-gpu.json with the figures and <date>-gpu-check.json with what ran, what did not, and
why. Exits non-zero when anything failed. --prefix: where liburing, xxHash and GoogleTest are when the system has none
(a folder with include and lib).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"
RESULTS = ROOT / "bench" / "results"
FILE_BYTES = 4 * 2**30


@dataclass
class Check:
    """What ran, what it said, and how long there is left."""

    deadline: float
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def remaining(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, name: str, command: list[str], seconds_max: float) -> bool:
        """Run a command, its output shown. True when it succeeded."""
        limit = min(seconds_max, self.remaining())
        if limit < 5:
            self.skip(name, "no time was left")
            return False
        print(f"=== {name}", flush=True)
        begin = time.monotonic()
        try:
            status = subprocess.run(command, cwd=ROOT, env=environment(), timeout=limit, check=False).returncode
            outcome = "ok" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:.0f} s"
        except OSError as error:
            outcome = str(error)
        self.results[name] = {"outcome": outcome, "seconds": round(time.monotonic() - begin, 1)}
        return outcome == "ok"

    def skip(self, name: str, reason: str) -> None:
        print(f"=== {name}: skipped: {reason}", flush=True)
        self.results[name] = {"outcome": "skipped", "reason": reason}

    def save(self) -> Path:
        """Write results/<date>-gpu-check.json: what ran, what did not, and why."""
        sys.path.insert(0, str(ROOT))
        from bench.rounds import machine_facts

        now = datetime.now(timezone.utc)
        path = RESULTS / f"{now:%Y-%m-%d-%H%M}-gpu-check.json"
        content = {"date": now.isoformat(timespec="seconds"), "machine": machine_facts(), "checks": self.results}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return path

    def failed(self) -> list[str]:
        return [name for name, result in self.results.items() if result["outcome"] not in ("ok", "skipped")]


def environment() -> dict[str, str]:
    paths = [str(SITE), str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    found = os.pathsep.join(path for path in paths if path)
    return {**os.environ, "PYTHONPATH": found, "TENSORPAGER_REQUIRE_GPU": "1"}  # a test that can't run is a failure


def build(check: Check, prefix: str) -> bool:
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=False
    ).stdout.strip()
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(BUILD), "-DCMAKE_BUILD_TYPE=Release"),
        *("-DTENSORPAGER_PYTHON=ON", "-DTENSORPAGER_TESTS=ON", f"-DPython_EXECUTABLE={sys.executable}"),
        *([f"-Dpybind11_DIR={pybind11}"] if pybind11 else []),
        *([f"-DCMAKE_PREFIX_PATH={prefix}"] if prefix else []),
        *(["-G", "Ninja"] if shutil.which("ninja") else []),
    ]
    compiled = check.run("configure", configure, 60) and check.run(
        "build", ["cmake", "--build", str(BUILD), "-j", str(len(os.sched_getaffinity(0)))], 240
    )
    if not compiled:
        return False
    package = SITE / "tensorpager"
    shutil.rmtree(SITE, ignore_errors=True)
    package.mkdir(parents=True)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    shutil.copy(BUILD / f"_core{suffix}", package)
    for source in (ROOT / "python" / "tensorpager").iterdir():
        if source.suffix in (".py", ".pyi", ".typed") or source.name == "py.typed":
            (package / source.name).symlink_to(source)
    return True


def run_tests(check: Check) -> None:
    tests = str(BUILD / "tensorpager_tests")
    check.run("kernels", [tests, "--gtest_filter=*KernelsTest*/gpu"], 60)
    check.run("pytest -m gpu", [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"], 150)
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in ("memcheck", "racecheck"):
        name = f"compute-sanitizer {tool}"
        if not Path(sanitizer).exists():
            check.skip(name, "there is no compute-sanitizer")
            continue
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", tests, "--gtest_filter=*KernelsTest*/gpu"]
        check.run(name, command, 60)


def measure() -> int:
    """In a process of its own, which imports what was built: the benchmarks and their file of results."""
    import tempfile

    from bench import gpu
    from bench.rounds import save

    device = gpu.Device()
    with tempfile.TemporaryDirectory(prefix=".gpu-check-", dir=ROOT / "build") as folder:
        path = gpu.make_file(FILE_BYTES, Path(folder))
        measured = gpu.pages_to_device(device, path, 3)
    summary: dict[str, Any] = {"mapping": device.mapping_costs(), **gpu.summarise_pages(measured)}
    summary["acquire_release_us"] = gpu.acquire_and_release(device)
    print(f"acquire + release, resident: {summary['acquire_release_us']:.2f} us")
    for cost in summary["mapping"]["costs"]:
        cost["us_per_gib"] = (cost["map_ns"] + cost["unmap_ns"]) / 1000 * 2**30 / cost["page_bytes"]
        print(f"mapping, pages of {cost['page_bytes'] >> 20} MiB: {cost['us_per_gib']:.0f} us/GiB")
    stepped = gpu.steps(3)
    summary.update(gpu.summarise_steps(stepped))
    captured = gpu.captured_steps(3)
    summary["captured_steps"] = gpu.summarise_captured_steps(captured)
    print(f"written to {save('gpu', {**measured, **stepped, **captured}, summary, {'file_bytes': FILE_BYTES})}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", default="", help="of liburing, xxHash and GoogleTest, where the system has none")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it (default: 8)")
    parser.add_argument("--skip-build", action="store_true", help="use what build/gpu holds")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure()
    check = Check(time.monotonic() + 60 * options.minutes)
    if not has_gpu():
        print("gpu-check needs an NVIDIA GPU and its driver: nvidia-smi finds none here", file=sys.stderr)
        return 2
    if options.skip_build or build(check, options.prefix):
        run_tests(check)
        check.run("benchmarks", [sys.executable, "bench/gpu_check.py", "--measure"], 240)
    print(f"written to {check.save()}")
    for name, result in check.results.items():
        print(f"{result['outcome']:<12} {name} {result.get('seconds', '')} {result.get('reason', '')}")
    return 1 if check.failed() else 0


def has_gpu() -> bool:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


if __name__ == "__main__":
    sys.exit(main())
