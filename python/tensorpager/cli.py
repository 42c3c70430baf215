# SPDX-License-Identifier: Apache-2.0
"""The `tensorpager` command: `doctor` says what this machine offers, `demo` pages a model, `plan` predicts.

`verify` and `export` read what training has left in a store.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from tensorpager import __version__
from tensorpager.errors import TensorPagerError
from tensorpager.plan_command import add_plan_arguments, run_plan

__all__ = ["main"]

MARKS = {"ok": "+", "limited": "~", "absent": "-"}
DETAIL_COLUMN = 28


def main(arguments: Sequence[str] | None = None, out: TextIO | None = None) -> int:
    """Run one command; returns the exit status. 2: wrong arguments, or an error with its message on stderr."""
    out = sys.stdout if out is None else out
    options = _parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options, out)
    except (TensorPagerError, OSError, ValueError, RuntimeError, ImportError, LookupError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error  # whose text is a repr
        print(f"tensorpager {options.command}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tensorpager", description="Virtual memory for tensors.")
    parser.add_argument("--version", action="version", version=f"tensorpager {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="what this machine offers for paging, and why",
        description="What this machine offers for paging, and why. Exit status 0 when paging can work here, else 1.",
    )
    doctor.add_argument("directory", nargs="*", help="where checkpoints and spill would live (default: here)")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    demo = commands.add_parser(
        "demo",
        help="run a model several times larger than its budget, and check every bit of the output",
        description="Makes a Llama-architecture checkpoint once, runs prompt and generation under each budget in a "
        "process "
        "of its own, and checks tokens and logits against the unpaged model bit for bit. Exit status 0 when all agree.",
    )
    demo.add_argument("--directory", default=".demo", help="for the checkpoint and the results (default: .demo)")
    demo.add_argument("--size", default="3.4GB", help="of the checkpoint that is made (default: 3.4GB)")
    demo.add_argument("--model", help="a local transformers checkpoint, instead of making one")
    demo.add_argument(
        "--budget",
        action="append",
        help="a size, or a share of the model: 1GiB, 25%% (repeatable; default: 50%% and 25%%)",
    )
    demo.add_argument("--tokens", type=int, default=24, help="to generate (default: 24)")
    demo.add_argument("--engine", default="auto", help="auto, uring or pread (default: auto)")
    planned = commands.add_parser(
        "plan",
        help="what a model would do on some hardware under some budget: a dry run",
        description="Traces the model of a transformers configuration without its weights, schedules it for the "
        "hardware, and says how long a pass takes, what moves, and how far from the best possible that is. Needs no "
        "drive and no GPU. Exit status 0 when the work can run within the budget, else 1.",
    )
    add_plan_arguments(planned)
    verify = commands.add_parser(
        "verify",
        help="check every page of a store's last commit",
        description="Reads every page of a store's last commit and checks that its bytes are those that were written. "
        "Exit status 0 when all are, else 1, with the pages that are not.",
    )
    verify.add_argument("store", nargs="+", help="the store's directories, in the order in which training named them")
    export = commands.add_parser(
        "export",
        help="write the weights of a store's last commit to a safetensors file",
        description="Writes parameters and buffers of a store's last commit to a safetensors file, mode 0600.",
    )
    export.add_argument("store", nargs="+", help="the store's directories, in the order in which training named them")
    export.add_argument("--output", "-o", required=True, help="the file to make; it must not be there")
    return parser


def _doctor(options: argparse.Namespace, out: TextIO) -> int:
    from tensorpager.doctor import examine

    report = examine(options.directory or ["."])
    if options.json:
        json.dump(report.as_dict(), out, indent=2)
        out.write("\n")
        return 0 if report.can_page else 1
    for finding in report.findings:
        label = finding.name if finding.topic in ("memory", "system", "gpu") else f"{finding.topic} {finding.name}"
        out.write(f"{MARKS[finding.verdict]} {label:<{DETAIL_COLUMN - 3}} {finding.value}\n")
        if finding.detail:
            out.write(f"{'':{DETAIL_COLUMN}}{finding.detail}\n")
    out.write("\nPaging works here.\n" if report.can_page else "\nPaging can't work here; see the lines marked '-'.\n")
    return 0 if report.can_page else 1


def _demo(options: argparse.Namespace, out: TextIO) -> int:
    from tensorpager.demo import DemoOptions, run_demo

    return run_demo(
        DemoOptions(
            directory=options.directory,
            size=options.size,
            model=options.model,
            budgets=tuple(options.budget or ("50%", "25%")),
            tokens=options.tokens,
            engine=options.engine,
        ),
        out,
    )


def _progress(what: str) -> Callable[[int, int], None] | None:
    """On stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        sys.stderr.write(f"\r{what} {done * 100 // max(total, 1)} %" + ("\n" if done == total else ""))

    return show


def _verify(options: argparse.Namespace, out: TextIO) -> int:
    from tensorpager.export import verify_store

    pages, damaged = verify_store(options.store, _progress("verified"))
    out.writelines(f"page {each.page} at offset {each.offset_bytes} of {each.file}: {each.why}\n" for each in damaged)
    out.write(f"{pages} pages read, {len(damaged)} damaged\n")
    return 1 if damaged else 0


def _export(options: argparse.Namespace, out: TextIO) -> int:
    from tensorpager.export import export_store

    size_bytes = export_store(options.store, options.output, _progress("written"))
    out.write(f"{options.output}: {size_bytes} bytes\n")
    return 0


_COMMANDS = {"doctor": _doctor, "demo": _demo, "plan": run_plan, "verify": _verify, "export": _export}
