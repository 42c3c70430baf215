# SPDX-License-Identifier: Apache-2.0
"""The rules of test_tidy.py: each takes a text file and yields what is wrong with it, as (line, message)."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath

LINE_COLUMNS_MAX = 120
FILE_LINES_MAX = 700
FUNCTION_LINES_MAX = 70

# Which layers of csrc a layer may include, itself always among them (DESIGN.md, "Layout and direction").
LAYERS = {
    "base": {"base"},
    "io": {"base", "device", "io"},
    "device": {"base", "device"},
    "mem": {"base", "device", "mem"},
    "pager": {"base", "io", "device", "mem", "pager"},
    "sim": {"base", "io", "device", "sim"},
    "bind": {"base", "io", "device", "mem", "pager", "bind"},
    "tests": {"base", "io", "device", "mem", "pager", "sim", "tests"},
}

# Planning and header parsing, which work beside numpy alone.
PURE_MODULES = {
    "budget",
    "certificate",
    "contents",
    "checkpoint",
    "demand",
    "departures",
    "errors",
    "expected_pass",
    "hardware",
    "hardware_profiles",
    "header",
    "keeping",
    "keeping_bound",
    "linear_program",
    "operator_trace",
    "pacing",
    "page_schedule",
    "pass_plan",
    "planner",
    "policy",
    "prefix_chain",
    "prefix_pace",
    "prefix_plan",
    "private_file",
    "readahead",
    "reorder",
    "schedule",
    "steps",
}
PURE_FORBIDDEN = {"torch", "transformers", "safetensors", "accelerate"}

PYTHON_MODULES_BANNED = {"dill", "cloudpickle", "joblib", "marshal", "pickle", "shelve"}
PYTHON_CALLS_BANNED = {
    "eval": "data must never run as code",
    "exec": "data must never run as code",
    "os.system": "the package runs no other program",
    "os.popen": "the package runs no other program",
    "torch.load": "it unpickles; checkpoints are safetensors",
    "torch.save": "it pickles; checkpoints are safetensors",
}

CPP_BANNED = {
    r"\bstd::(cout|cerr|clog)\b": "errors are thrown, nothing is printed",
    r"(?<![\w:])(?:std::)?(?:f|v|vf)?printf\s*\(": "errors are thrown, nothing is printed",
    r"\busing\s+namespace\s+std\b": "names of std are spelled out",
    r"(?<![\w:.>])(?:std::)?s?rand\s*\(": "random numbers come from a seeded generator",
    r"#include\s*<(torch|ATen|c10|cuda_runtime)[/.]": "the core links neither libtorch nor the CUDA runtime",
}
CPP_PRINTS = {"csrc/base/error.cpp"}  # check_failed: the process ends, nobody could catch an exception

URL = r"https?://"
WORDS_BANNED = {
    r"\b(TODO|FIXME|XXX|HACK)\b(?!\(#\d+\))": "say which issue: TODO(#12)",
    r"(?<![\w.$}])/(home|root|work|Users|mnt)/\w": "a path of one machine",
    r"--[a-z-]+-url\b": "where packages come from is the machine's own setting",
    URL: "a host; only the files of URL_FILES name any",
    r"(?i)\bpinned memory\b": "pages are pinned; page-locked memory is called registered",
    r"(?i)\b(swap(ped)?[ -](in|out))\b": "pages are paged in and evicted",
    r"(?i)\b(fault injection|inject(ed|s)? faults?)\b": "a fault is demand access; what is injected is a failure",
}

# Sources of figures, the licence, and the first line of a format that is no checkpoint.
URL_FILES = {
    *("LICENSE", "python/tensorpager/hardware.py", "python/tensorpager/hardware_profiles.py"),
    "tests/checkpoint_files.py",
}

Finding = tuple[int, str]


@dataclass(frozen=True)
class TextFile:
    """A file of the tree: its path from the root, and what is in it."""

    path: str
    text: str

    @property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def is_python(self) -> bool:
        return self.path.endswith(".py")

    @property
    def is_cpp(self) -> bool:
        return self.path.endswith((".cpp", ".hpp"))

    @property
    def is_generated(self) -> bool:
        return self.name == "_core.pyi"

    @property
    def is_source(self) -> bool:
        by_suffix = self.path.endswith((".py", ".pyi", ".cpp", ".hpp", ".cmake"))
        return by_suffix or self.name in {"CMakeLists.txt", "Makefile"} or self.path.startswith(".ci/")


Rule = Callable[[TextFile], Iterator[Finding]]


def spdx_head(file: TextFile) -> Iterator[Finding]:
    if file.is_source and not any("SPDX-License-Identifier: Apache-2.0" in line for line in file.lines[:2]):
        yield 1, "no SPDX-License-Identifier: Apache-2.0 in the first two lines"


def whitespace(file: TextFile) -> Iterator[Finding]:
    for number, line in enumerate(file.lines, 1):
        if "\t" in line and file.name != "Makefile":
            yield number, "a tab"
        if "\r" in line:
            yield number, "a carriage return"
        if line != line.rstrip():
            yield number, "space at the end of the line"
    if file.text and (not file.text.endswith("\n") or file.text.endswith("\n\n")):
        yield len(file.lines), "the file must end in exactly one newline"


def line_length(file: TextFile) -> Iterator[Finding]:
    if file.is_generated or file.name == "LICENSE" or file.path.startswith("bench/results/"):
        return  # what was measured is written by programs, and what peers say is as long as they make it
    for number, line in enumerate(file.lines, 1):
        is_table_or_link = file.path.endswith(".md") and ("|" in line or "](" in line)
        if len(line) > LINE_COLUMNS_MAX and not is_table_or_link:
            yield number, f"{len(line)} columns, more than {LINE_COLUMNS_MAX}"


def file_length(file: TextFile) -> Iterator[Finding]:
    count = len(file.lines) - 1
    if file.is_source and not file.is_generated and count > FILE_LINES_MAX:
        yield count, f"{count} lines, more than {FILE_LINES_MAX}: one concept, one file"


def function_length(file: TextFile) -> Iterator[Finding]:
    functions = _python_functions(file) if file.is_python else cpp_functions(file.text) if file.is_cpp else ()
    for name, first, last in functions:
        if last - first + 1 > FUNCTION_LINES_MAX:
            yield first, f"{name} has {last - first + 1} lines, more than {FUNCTION_LINES_MAX}"


def _python_functions(file: TextFile) -> Iterator[tuple[str, int, int]]:
    for node in ast.walk(ast.parse(file.text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno, node.end_lineno or node.lineno


CPP_NOT_CODE = re.compile(
    r'R"(?P<mark>\w*)\([\s\S]*?\)(?P=mark)"'
    r'|"(?:\\.|[^"\\\n])*"'
    r"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'"
    r"|//[^\n]*"
    r"|/\*[\s\S]*?\*/"
    r"|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*",
    re.MULTILINE,
)


@cache
def cpp_code(text: str) -> str:
    """The text with comments, literals and preprocessor lines blanked out; every character keeps its place."""
    return CPP_NOT_CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def cpp_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """(name, first line, last line) of the outermost braces that follow a parameter list. Lambdas count with theirs."""
    code = cpp_code(text)
    open_braces: list[tuple[str, int]] = []  # ("scope" | "function" | "value" | "other", offset of the header)
    header = 0
    for match in re.finditer(r"[{};]", code):
        sign, at = match[0], match.start()
        if sign == "{" and re.match(r"[\w>]", code[at - 1 : at]):
            open_braces.append(("value", header))  # a_{1}: the header runs on behind it
            continue
        if sign == "{":
            words = code[header:at]
            inside = any(kind != "scope" for kind, _ in open_braces)
            is_scope = re.search(r"\b(namespace|class|struct|union|enum|extern)\b[^()=]*$", words) is not None
            is_function = ")" in words and not is_scope
            open_braces.append(("scope" if is_scope and not inside else "function" if is_function else "other", header))
        elif sign == "}" and open_braces:
            kind, start = open_braces.pop()
            if kind == "value":
                header = start
                continue
            if kind == "function" and all(outer == "scope" for outer, _ in open_braces):
                start += len(code[start:]) - len(code[start:].lstrip())
                name = re.search(r"([\w~:]+)\s*\(", code[start:at])
                yield name[1] if name else "?", code.count("\n", 0, start) + 1, code.count("\n", 0, at) + 1
        header = match.end()


def include_direction(file: TextFile) -> Iterator[Finding]:
    parts = file.path.split("/")
    if not file.is_cpp or parts[0] != "csrc":
        return
    layer = parts[1]
    if layer not in LAYERS:
        yield 1, f"csrc/{layer} is not a layer of DESIGN.md"
        return
    for number, line in enumerate(file.lines, 1):
        match = re.match(r'\s*#\s*include\s+"([^"]+)"', line)
        if match is not None and "/" in match[1] and match[1].split("/")[0] not in LAYERS[layer]:
            yield number, f"{layer} must not include {match[1]}"
        if re.match(r"\s*#\s*include\s+<cuda\.h>", line) and layer != "device":
            yield number, "<cuda.h> is for csrc/device alone"


def import_direction(file: TextFile) -> Iterator[Finding]:
    path = PurePosixPath(file.path)
    if path.parent.as_posix() != "python/tensorpager" or path.suffix != ".py" or path.stem not in PURE_MODULES:
        return
    for number, module in _imports(ast.parse(file.text)):
        parts = module.split(".")
        if parts[0] in PURE_FORBIDDEN:
            yield number, f"{path.stem} works without {parts[0]}, so it must not import it"
        if parts[0] == "tensorpager" and (len(parts) == 1 or parts[1] not in PURE_MODULES):
            yield number, f"{path.stem} imports {module}, which is not of the modules that need numpy alone"


def _imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of whatever is imported when the module is used; imports for type checkers are not."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "tensorpager" if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            if module == "tensorpager":
                yield from ((node.lineno, f"tensorpager.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module
        pending.extend(ast.iter_child_nodes(node))


def banned_calls(file: TextFile) -> Iterator[Finding]:
    if file.is_cpp:
        yield from _banned_in_cpp(file)
    if not file.is_python or not file.path.startswith("python/"):
        return
    tree = ast.parse(file.text)
    for number, module in _imports(tree):
        if module.split(".")[0] in PYTHON_MODULES_BANNED:
            yield number, f"{module} runs code from data"
    for node in ast.walk(tree):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if name in PYTHON_CALLS_BANNED:
            yield node.lineno, f"{name}: {PYTHON_CALLS_BANNED[name]}"


def _banned_in_cpp(file: TextFile) -> Iterator[Finding]:
    code = cpp_code(file.text).split("\n")
    for number, (blanked, line) in enumerate(zip(code, file.lines, strict=True), 1):
        for pattern, reason in CPP_BANNED.items():
            prints = "print" in reason and (file.path in CPP_PRINTS or file.path.startswith(("csrc/tests/", "bench/")))
            if re.search(pattern, line if "include" in pattern else blanked) and not prints:
                yield number, reason


def banned_words(file: TextFile) -> Iterator[Finding]:
    if file.path in {"tests/tidy_rules.py", "tests/test_tidy.py"}:
        return  # which have to name them
    for number, line in enumerate(file.lines, 1):
        for pattern, reason in WORDS_BANNED.items():
            match = re.search(pattern, line)
            if match is not None and not (pattern == URL and file.path in URL_FILES):
                yield number, f"{match[0]!r}: {reason}"


RULES: tuple[Rule, ...] = (
    spdx_head,
    whitespace,
    line_length,
    file_length,
    function_length,
    include_direction,
    import_direction,
    banned_calls,
    banned_words,
)
