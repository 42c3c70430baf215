# SPDX-License-Identifier: Apache-2.0
"""Style as tests: what holds for every file of the tree, and what files owe to each other.

Each rule is shown to fail on a few lines that break it, so that a rule which checks nothing is found.
"""

from __future__ import annotations

import ast
import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import tensorpager
import tidy_rules
from tidy_rules import Rule, TextFile

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("csrc", "python", "tests", "bench", "examples", "third_party", ".ci")
SUFFIXES = {".py", ".pyi", ".cpp", ".hpp", ".cmake", ".md", ".toml", ".json", ".yaml", ".txt", ".c", ".h", ".cu"}
TOP_LEVEL = {
    *FOLDERS,
    *(".clang-format", ".editorconfig", ".git", ".gitattributes", ".gitignore", ".pre-commit-config.yaml"),
    *("CMakeLists.txt", "CMakePresets.json", "Makefile", "pyproject.toml"),
    *("CHANGELOG.md", "CONTRIBUTING.md", "DESIGN.md", "LICENSE", "README.md", "SECURITY.md"),
}

# Tests whose noun is not a source file's, and what they are about.
NOUNS_OF_THEIR_OWN = {
    "conformance": "what every I/O engine owes to the contract in io_queue.hpp",
    "distributed": "training by several ranks: ranks.py, joint_commit.py, shards.py, data_parallel.py",
    "examples": "the programs in examples/",
    "failure": "every result of the kernel failing in turn, through all of csrc/pager",
    "generation": "generate() and pipelines of transformers on paged models",
    "gpu_check": "bench/gpu_check.py and what it measures with",
    "gpu": "everything about a device, on a real one (gpu-marked)",
    "readme": "the example that README.md shows",
    "tidy": "the tree itself",
    "wake": "IoQueue::wake, across engines",
}


def tree() -> Iterator[TextFile]:
    """Every text file that belongs to the project."""
    paths = [path for path in ROOT.iterdir() if path.is_file() and path.name in TOP_LEVEL]
    for folder in FOLDERS:
        paths += [path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES or folder == ".ci"]
    for path in sorted(paths):
        if path.is_file() and not {"__pycache__", ".cache"} & set(path.parts):
            yield TextFile(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


TREE = tuple(tree())


def findings(rule: Rule, *files: TextFile) -> list[str]:
    return [f"{file.path}:{line}: {message}" for file in files for line, message in rule(file)]


@pytest.mark.parametrize("rule", tidy_rules.RULES, ids=lambda rule: rule.__name__)
def test_every_file_obeys(rule: Rule) -> None:
    found = findings(rule, *TREE)
    assert not found, "\n".join(found)


def test_the_tree_was_read() -> None:
    paths = {file.path for file in TREE}
    assert {
        "Makefile",
        "csrc/io/io_queue.hpp",
        "python/tensorpager/errors.py",
        "tests/test_tidy.py",
        ".ci/run",
    } <= paths


PLAN = "python/tensorpager/pass_plan.py"
LONG_CPP = "namespace tp {\nint f() {\n" + "  int a{1};\n" * 70 + "}\n}\n"
LONG_METHOD = 'struct A {\n  A() : a_{1} {\n    if (a) { g("}"); }\n' + "\n" * 68 + "  }\n};\n"
BROKEN: tuple[tuple[Rule, str, str], ...] = (
    (tidy_rules.spdx_head, "csrc/io/a.cpp", "int a;\n"),
    (tidy_rules.whitespace, "a.md", "a\tb\n"),
    (tidy_rules.whitespace, "a.md", "a\r\n"),
    (tidy_rules.whitespace, "a.md", "a \n"),
    (tidy_rules.whitespace, "a.md", "a"),
    (tidy_rules.whitespace, "a.md", "a\n\n"),
    (tidy_rules.line_length, "bench/a.py", "#" * 121 + "\n"),
    (tidy_rules.file_length, "csrc/io/a.hpp", "\n" * 701),
    (tidy_rules.function_length, "tests/a.py", "def f():\n" + "    g()\n" * 70),
    (tidy_rules.function_length, "csrc/io/a.cpp", LONG_CPP),
    (tidy_rules.function_length, "csrc/io/a.cpp", LONG_METHOD),
    (tidy_rules.include_direction, "csrc/base/a.hpp", '#include "io/file.hpp"\n'),
    (tidy_rules.include_direction, "csrc/io/a.hpp", '#include "mem/frame_pool.hpp"\n'),
    (tidy_rules.include_direction, "csrc/pager/a.cpp", '#include "sim/sim_queue.hpp"\n'),
    (tidy_rules.include_direction, "csrc/mem/a.cpp", "#include <cuda.h>\n"),
    (tidy_rules.include_direction, "csrc/util/a.cpp", "int a;\n"),
    (tidy_rules.import_direction, PLAN, "import torch.nn\n"),
    (tidy_rules.import_direction, PLAN, "def f():\n    from torch import Tensor\n"),
    (tidy_rules.import_direction, PLAN, "from tensorpager import _core\n"),
    (tidy_rules.import_direction, PLAN, "from tensorpager.pager import page\n"),
    (tidy_rules.import_direction, PLAN, "from . import trace\n"),
    (tidy_rules.banned_calls, PLAN, "import pickle\n"),
    (tidy_rules.banned_calls, PLAN, "def f():\n    from marshal import loads\n"),
    (tidy_rules.banned_calls, PLAN, "x = torch.load(path)\n"),
    (tidy_rules.banned_calls, PLAN, "x = eval(text)\n"),
    (tidy_rules.banned_calls, PLAN, "exec(text)\n"),
    (tidy_rules.banned_calls, PLAN, "os.system('true')\n"),
    (tidy_rules.banned_calls, "csrc/io/a.cpp", "std::cout << 1;\n"),
    (tidy_rules.banned_calls, "csrc/io/a.cpp", "std::printf(x);\n"),
    (tidy_rules.banned_calls, "csrc/io/a.cpp", "fprintf(stderr, x);\n"),
    (tidy_rules.banned_calls, "csrc/io/a.cpp", "using namespace std;\n"),
    (tidy_rules.banned_calls, "csrc/io/a.cpp", "int a = rand();\n"),
    (tidy_rules.banned_calls, "csrc/bind/a.cpp", "#include <torch/extension.h>\n"),
    (tidy_rules.banned_words, "a.md", "TODO: later\n"),
    (tidy_rules.banned_words, "a.md", "see /home/me/model\n"),
    (tidy_rules.banned_words, "a.md", "pip install --some-url x\n"),
    (tidy_rules.banned_words, "a.md", "see https://example.org/simple\n"),
    (tidy_rules.banned_words, "a.md", "copies from pinned memory\n"),
    (tidy_rules.banned_words, "a.md", "a page is swapped out\n"),
    (tidy_rules.banned_words, "a.md", "fault injection\n"),
)


@pytest.mark.parametrize(("rule", "path", "text"), BROKEN)
def test_each_rule_can_fail(rule: Rule, path: str, text: str) -> None:
    assert findings(rule, TextFile(path, text))


def test_each_rule_has_an_example_that_breaks_it() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(tidy_rules.RULES)


ALLOWED: tuple[tuple[Rule, str, str], ...] = (
    (tidy_rules.function_length, "csrc/io/a.cpp", LONG_CPP.replace("  int a{1};\n", "", 2)),
    (tidy_rules.function_length, "csrc/io/a.cpp", "namespace tp {\n" + "int f() { return 1; }\n" * 100 + "}\n"),
    (tidy_rules.function_length, "csrc/io/a.cpp", "struct A {\n" + "  int f(int a);\n" * 100 + "};\n"),
    (tidy_rules.import_direction, PLAN, "if TYPE_CHECKING:\n    import torch\n"),
    (tidy_rules.import_direction, "python/tensorpager/pager.py", "import torch\n"),
    (tidy_rules.banned_calls, "csrc/io/a.cpp", 'std::snprintf(a, 1, "x");  // not printf(\nauto s = "rand()";\n'),
    (tidy_rules.banned_calls, "tests/a.py", "import pickle\n"),
    (tidy_rules.banned_words, "a.md", "TODO(#12): later\n"),
)


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED)
def test_no_rule_forbids_what_it_should_not(rule: Rule, path: str, text: str) -> None:
    assert findings(rule, TextFile(path, text)) == []


def test_the_top_level_holds_what_it_should() -> None:
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line]
    present = {path.name for path in ROOT.iterdir()}
    unknown = {name for name in present - TOP_LEVEL if not any(fnmatch.fnmatch(name, each) for each in ignored)}
    assert unknown == set()


def nouns_of_sources(files: tuple[TextFile, ...]) -> set[str]:
    paths = [Path(file.path) for file in files if file.path.startswith(("csrc/", "python/"))]
    return {path.stem.strip("_") for path in paths if path.parts[1] != "tests"}


def nouns_of_tests(files: tuple[TextFile, ...]) -> dict[str, str]:
    nouns = {}
    for file in files:
        match = re.fullmatch(r"tests/test_(\w+)\.py|csrc/tests/(\w+)_test\.cpp", file.path)
        if match is not None:
            nouns[file.path] = match[1] or match[2]
    return nouns


def without_source(files: tuple[TextFile, ...]) -> list[str]:
    """Tests named for nothing: test_page_table_limits.py belongs to page_table.cpp, as does test_page_table.py."""
    known = nouns_of_sources(files) | set(NOUNS_OF_THEIR_OWN)
    return [
        path
        for path, noun in nouns_of_tests(files).items()
        if not any(noun == each or noun.startswith(each + "_") for each in known)
    ]


def test_every_test_has_the_noun_of_a_source() -> None:
    assert without_source(TREE) == [], "name the test for its source, or add its noun to NOUNS_OF_THEIR_OWN"
    assert without_source((*TREE, TextFile("tests/test_misc.py", ""))) == ["tests/test_misc.py"]


def unproved(names: list[str], files: tuple[TextFile, ...]) -> list[str]:
    """Public names that no test mentions."""
    words = {
        word
        for file in files
        if file.path.startswith("tests/") and file.is_python and file.name != "test_tidy.py"
        for word in re.findall(r"\w+", file.text)
    }
    return [name for name in names if name not in words]


def undocumented(names: list[str]) -> list[str]:
    """Public functions and classes with no docstring of their own."""
    objects = {name: getattr(tensorpager, name) for name in names if not name.startswith("__")}
    return [
        name for name, value in objects.items() if callable(value) and not vars(value).get("__doc__", value.__doc__)
    ]


def test_every_public_name_is_documented() -> None:
    assert undocumented(list(tensorpager.__all__)) == []


def test_every_public_name_is_used_in_a_test() -> None:
    assert unproved([name for name in tensorpager.__all__ if not name.startswith("__")], TREE) == []
    assert unproved(["no_such" + "_name"], TREE) == ["no_such" + "_name"]


def test_every_error_is_public_and_documented() -> None:
    module = ast.parse((ROOT / "python/tensorpager/errors.py").read_text(encoding="utf-8"))
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    assert [node.name for node in classes if not ast.get_docstring(node)] == []
    assert {node.name for node in classes} <= set(tensorpager.__all__)


def unknown_targets(text: str, makefile: str) -> set[str]:
    """Targets that a text tells its reader to make and the Makefile lacks."""
    known = {name for line in re.findall(r"^([a-z][a-z -]*):", makefile, re.MULTILINE) for name in line.split()}
    return set(re.findall(r"(?:`|^ *\$? *)make ([a-z][a-z-]*)", text, re.MULTILINE)) - known


def test_every_make_target_in_a_text_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    texts = [file for file in TREE if file.path.endswith(".md")]
    missing = {file.path: names for file in texts if (names := unknown_targets(file.text, makefile))}
    assert missing == {}
    assert unknown_targets("run `make coffee`, then `make test`", makefile) == {"coffee"}
