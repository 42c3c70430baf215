#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes python/tensorpager/_core.pyi from the built extension; with --check, fails where the file differs from that.

pybind11-stubgen writes it, ruff orders and formats it, so that the same extension always gives the same bytes.
"""

from __future__ import annotations

import difflib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "python" / "tensorpager" / "_core.pyi"
HEAD = (
    '# SPDX-License-Identifier: Apache-2.0\n# Generated from the extension: change csrc/bind, then run "make stubs".\n'
)


# What the extension can't say of its containers, for mypy --strict: names in lists, facts by name in dictionaries.
CONTAINERS = (
    (re.compile(r"^([A-Z_]+): list = .*$", re.MULTILINE), r"\1: list[str]"),
    (re.compile(r"\) -> dict:$", re.MULTILINE), r") -> dict[str, typing.Any]:"),
)


def generate() -> str:
    """The stub's text, from the extension that this environment imports."""
    with tempfile.TemporaryDirectory() as folder:
        stubgen = [sys.executable, "-m", "pybind11_stubgen", "--exit-code", "--output-dir", folder]
        subprocess.run([*stubgen, "tensorpager._core"], check=True, cwd=folder)
        path = Path(folder) / "tensorpager" / "_core.pyi"
        text = HEAD + path.read_text(encoding="utf-8")
        for pattern, replacement in CONTAINERS:
            text = pattern.sub(replacement, text)
        path.write_text(text, encoding="utf-8")
        ruff = [sys.executable, "-m", "ruff"]
        options = ["--isolated", "--quiet", "--line-length", "120"]
        rules = ["--fix-only", "--exit-zero", "--select", "I,F401,UP,PYI", "--target-version", "py310"]
        subprocess.run([*ruff, "check", *options, *rules, str(path)], check=True)
        subprocess.run([*ruff, "format", *options, str(path)], check=True)
        return path.read_text(encoding="utf-8")


def main() -> int:
    """Exit status: 0 when the file is, or was made, what the extension says."""
    new = generate()
    if "--check" not in sys.argv:
        STUB.write_text(new, encoding="utf-8")
        return 0
    old = STUB.read_text(encoding="utf-8")
    if old == new:
        print(f"{STUB.relative_to(ROOT)} is what the extension says")
        return 0
    sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "kept", "generated"))
    print('_core.pyi is not what the extension says: run "make stubs" and look at the difference')
    return 1


if __name__ == "__main__":
    sys.exit(main())
