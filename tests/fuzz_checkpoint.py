# SPDX-License-Identifier: Apache-2.0
"""Coverage-guided, differential fuzzing of the safetensors header reader (atheris, that is libFuzzer).

    python tests/fuzz_checkpoint.py --seconds 60           # exit 0: nothing found in that time
    python tests/fuzz_checkpoint.py --seconds 60 --canary  # exit 0: a planted bug was found, so this fuzzer can fail

A finding is anything but CheckpointError leaving the reader, or a file that it and the format's own reader do not
see alike (the rules of STRICTER_THAN_REFERENCE apart). The input that shows it is saved in --artifacts; pass it with
--replay to run it alone. Prints executions and coverage.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "python")]

INPUT_BYTES_MAX = 4096
TOKENS = [
    "dtype", "shape", "data_offsets", "__metadata__", "null", "true", "NaN", "[0,4]", "[1]", "\\\\ud800", "-0", "1e400",
    "18446744073709551615", "18446744073709551616", "4294967296", "F4", "F6_E2M3", "U8", "BF16", "C64", "{}",
]  # fmt: skip


def file_from(data: bytes) -> bytes:
    """The file an input stands for: as it is after an odd first byte, else a header and so many bytes of data."""
    if len(data) < 3 or data[0] % 2 == 1:
        return data[1:]
    size_bytes = int.from_bytes(data[1:3], "little")
    return struct.pack("<Q", len(data) - 3) + data[3:] + (bytes(range(256)) * 256)[:size_bytes]


def input_for(content: bytes) -> bytes:
    """An input that stands for a well-framed file, for the seed corpus."""
    header_bytes = int.from_bytes(content[:8], "little")
    return b"\0" + struct.pack("<H", len(content) - 8 - header_bytes) + content[8 : 8 + header_bytes]


def make_target() -> Callable[[bytes], None]:
    """The function to fuzz; what it raises is a finding. Imports the reader, so call it where that is wanted."""
    import safetensors

    from tensorpager.checkpoint import read_header
    from tensorpager.errors import CheckpointError
    from tensorpager.header import STRICTER_THAN_REFERENCE

    descriptor = os.memfd_create("fuzzed", os.MFD_CLOEXEC)
    path = f"/proc/self/fd/{descriptor}"

    def target(data: bytes) -> None:
        content = file_from(data)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)
        try:
            expected = dict(safetensors.deserialize(content))
        except safetensors.SafetensorError:
            expected = None
        try:
            tensors = read_header(path).tensors
        except CheckpointError as error:
            if expected is not None and error.rule not in STRICTER_THAN_REFERENCE:
                message = f"refused, the reference accepts: {content!r}"
                raise AssertionError(message) from error
            return
        if expected is None:
            message = f"accepted, the reference refuses: {content!r}"
            raise AssertionError(message)
        found = {
            name: (e.dtype, list(e.shape), content[e.offset_bytes : e.offset_bytes + e.size_bytes])
            for name, e in tensors.items()
        }
        if found != {name: (s["dtype"], s["shape"], bytes(s["data"])) for name, s in expected.items()}:
            message = f"read otherwise than by the reference: {content!r}"
            raise AssertionError(message)

    return target


def plant_bug() -> None:
    """The canary: overlaps and holes go unnoticed."""
    from tensorpager import header

    header._check_place = lambda *_: None


def work(arguments: list[str], canary: bool) -> None:
    """The fuzzing process itself; libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["tensorpager.header", "tensorpager.checkpoint"]):
        target = make_target()
    if canary:
        plant_bug()
    atheris.Setup([sys.argv[0], *arguments], target)
    atheris.Fuzz()


def supervise(seconds: int, canary: bool, artifacts: Path) -> int:
    """Runs the fuzzing process on the seed corpus and says what came of it; returns the exit status."""
    import checkpoint_files

    artifacts.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch, "corpus")
        corpus.mkdir()
        seeds = [
            *checkpoint_files.good_files().values(),
            *(content for _, content in checkpoint_files.bad_files()),
        ]
        for number, content in enumerate(seed for seed in seeds if len(seed) < INPUT_BYTES_MAX):
            (corpus / f"raw-{number}").write_bytes(b"\1" + content)
            if int.from_bytes(content[:8], "little") <= len(content) - 8:
                (corpus / f"framed-{number}").write_bytes(input_for(content))
        tokens = Path(scratch, "tokens")
        tokens.write_text("".join(f'"{token}"\n' for token in TOKENS))
        options = [
            f"-max_total_time={seconds}",
            f"-max_len={INPUT_BYTES_MAX}",
            f"-dict={tokens}",
            f"-artifact_prefix={artifacts}/",
            "-timeout=5",
            "-rss_limit_mb=2048",
            "-print_final_stats=1",
        ]
        command = [
            sys.executable,
            __file__,
            "--worker",
            *(["--canary"] if canary else []),
            *options,
            str(corpus),
        ]
        result = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    return report(result, canary, artifacts)


def report(result: subprocess.CompletedProcess[str], canary: bool, artifacts: Path) -> int:
    output = result.stdout + result.stderr
    executions = re.findall(r"stat::number_of_executed_units:\s*(\d+)", output)
    coverage = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", output)
    finding = re.search(r"AssertionError: (accepted|refused|read otherwise)", output)
    if executions and coverage:
        edges, features, inputs = coverage[-1]
        print(f"executions {executions[-1]}, coverage {edges} edges, {features} features, {inputs} inputs kept")
    if canary:
        print("the planted bug was found" if finding else f"THE PLANTED BUG WAS NOT FOUND\n{output[-4000:]}")
        return 0 if finding and result.returncode != 0 else 1
    if result.returncode != 0 or not executions or int(executions[-1]) == 0:
        print(f"FINDING (exit {result.returncode}); the input is saved in {artifacts}\n{output[-6000:]}")
        return 1
    print("nothing found")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--canary", action="store_true")
    parser.add_argument("--artifacts", type=Path, help="where findings are saved (default: build/fuzz)")
    parser.add_argument("--replay", type=Path, help="run one saved input and stop")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if options.worker:
        work(rest, options.canary)
    elif rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if options.replay:
        make_target()(options.replay.read_bytes())
        print("nothing found")
        return 0
    with contextlib.suppress(ImportError):
        import atheris  # noqa: F401

        if options.canary and options.artifacts is None:
            with tempfile.TemporaryDirectory() as scratch:
                return supervise(options.seconds, True, Path(scratch))
        return supervise(options.seconds, options.canary, options.artifacts or HERE.parent / "build" / "fuzz")
    print("atheris is not installed: pip install atheris", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
