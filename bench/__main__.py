# SPDX-License-Identifier: Apache-2.0
"""`make bench`, or `python -m bench [ITEM ...] [--rounds 5] [--no-peers]`: measure, print ratios of medians, write
results/*.json."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from tensorpager.budget import parse_bytes

ITEMS = ("page-in", "decode", "overhead", "stored-as", "streamed-linear", "plan", "schedule")
ONLY_BY_NAME = (
    "aio-shim",
    "training-bytes",
    "training-time",
    "training-peer",
    "kill-resume",
    "kv-cache",
    "prefix-reuse",
)  # minutes each
# Whose module has run(rounds), and needs no more.
BY_ROUNDS = frozenset({"aio-shim", "overhead", "stored-as", "streamed-linear", "training-peer", "training-time"})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Interleaved rounds; ratios of medians.")
    parser.add_argument("items", nargs="*", help=f"of {', '.join(ITEMS)} (default: all), {', '.join(ONLY_BY_NAME)}")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--file-size", default="4GiB", help="of the file that is paged in (default: 4GiB)")
    parser.add_argument("--model-size", default="3.4GB", help="of the model that decodes (default: 3.4GB)")
    parser.add_argument("--no-peers", action="store_true", help="measure ours, fio and the unpaged model only")
    parser.add_argument("--keep-files", action="store_true", help="keep the files of page-in for the next run")
    options = parser.parse_args()
    unknown = set(options.items) - {*ITEMS, *ONLY_BY_NAME}
    if unknown or options.rounds < 1:
        parser.error(f"unknown items: {', '.join(sorted(unknown))}" if unknown else "--rounds must be 1 or more")
    for item in options.items or ITEMS:
        _measure(item, options)
        print()
    return 0


def _measure(item: str, options: argparse.Namespace) -> None:
    with_peers = not options.no_peers
    if item == "page-in":
        from bench import page_in

        size_bytes = parse_bytes(options.file_size)
        try:
            page_in.run(options.rounds, size_bytes, with_peers)
        finally:
            if not options.keep_files:
                page_in.remove_files(size_bytes)
    elif item == "decode":
        from bench import decode

        decode.run(options.rounds, parse_bytes(options.model_size), with_peers)
    elif item in BY_ROUNDS:
        import_module(f"bench.{item.replace('-', '_')}").run(options.rounds)
    elif item == "training-bytes":
        from bench import training_bytes

        training_bytes.run()
    elif item in ("kv-cache", "prefix-reuse"):
        _measure_contexts(item, options)
    elif item == "kill-resume":
        from bench import kill_resume

        if kill_resume.main([]) != 0:
            sys.exit(1)
    else:
        script = Path(__file__).with_name(f"bench_{item}.py")
        results = script.parent / "results"
        results.mkdir(exist_ok=True)
        more = ["--large"] if item == "schedule" else ["--rounds", str(options.rounds)]
        subprocess.run([sys.executable, str(script), *more, "--json", str(results / f"{item}.json")], check=True)


def _measure_contexts(item: str, options: argparse.Namespace) -> None:
    if item == "kv-cache":
        from bench import kv_cache

        kv_cache.run(options.rounds)
    else:
        from bench import prefix_reuse

        prefix_reuse.run(options.rounds, parse_bytes(options.model_size))


if __name__ == "__main__":
    sys.exit(main())
