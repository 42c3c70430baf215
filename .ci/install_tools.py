#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Installs into this environment what builds the package (or, with --fuzz, what fuzzes it), and nothing else.

pyproject.toml names the requirements, so they are read from there. CMake and Ninja are taken from the system when they
are new enough. Uses nothing outside the standard library of Python 3.10 and pip.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
CMAKE_VERSION_MIN = (3, 24)


def requirements(section: str, key: str) -> list[str]:
    """The list of strings `key` of `[section]`. Python 3.10 has no tomllib; these lists are Python literals as well."""
    text = PYPROJECT.read_text(encoding="utf-8")
    body = text.split(f"[{section}]\n", 1)[1].split("\n[", 1)[0]
    match = re.search(rf"^{re.escape(key)} = (\[.*?\])$", body, re.MULTILINE | re.DOTALL)
    if match is None:
        message = f"pyproject.toml: [{section}] has no list {key}"
        raise SystemExit(message)
    return [str(item) for item in ast.literal_eval(match[1])]


def cmake_is_new_enough() -> bool:
    """Whether the first cmake of PATH can read the CMakeLists.txt."""
    if shutil.which("cmake") is None:
        return False
    words = subprocess.run(["cmake", "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"(\d+)\.(\d+)", words)
    return match is not None and (int(match[1]), int(match[2])) >= CMAKE_VERSION_MIN


def main() -> None:
    """Asks pip for all at once; what is there already costs nothing."""
    if "--fuzz" in sys.argv:
        wanted = requirements("project.optional-dependencies", "fuzz")
    else:
        wanted = requirements("build-system", "requires")
        if not cmake_is_new_enough():
            wanted.append("cmake>=" + ".".join(map(str, CMAKE_VERSION_MIN)))
        if shutil.which("ninja") is None:
            wanted.append("ninja")
    print("installing", *wanted, flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    sys.exit(subprocess.run([*pip, *wanted], check=False).returncode)


if __name__ == "__main__":
    main()
