# SPDX-License-Identifier: Apache-2.0
"""The command: what it prints, and its exit status."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tensorpager import _core, cli, demo


def test_doctor_prints_every_finding_and_the_verdict(tmp_path: Path) -> None:
    out = io.StringIO()
    status = cli.main(["doctor", str(tmp_path)], out)
    text = out.getvalue()
    assert status == 0
    assert "Paging works here." in text
    for topic in (
        "engine uring",
        "engine pread",
        str(tmp_path),
        "RAM",
        "locked memory",
        "transparent huge pages",
        "CUDA driver",
    ):
        assert topic in text


def test_doctor_json_is_json_and_nothing_else(tmp_path: Path) -> None:
    out = io.StringIO()
    assert cli.main(["doctor", "--json", str(tmp_path)], out) == 0
    assert json.loads(out.getvalue())["can_page"] is True


def test_doctor_says_no_with_its_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_core, "probe_engines", list)
    out = io.StringIO()
    assert cli.main(["doctor", str(tmp_path)], out) == 1
    assert "can't work here" in out.getvalue()


@pytest.mark.parametrize("arguments", [[], ["fix"], ["demo", "--tokens", "many"]])
def test_wrong_arguments_end_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert "usage: tensorpager" in capsys.readouterr().err


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[demo.DemoOptions] = []
    monkeypatch.setattr(demo, "run_demo", lambda options, _out: seen.append(options) or 0)
    assert cli.main(["demo"], io.StringIO()) == 0
    assert (
        cli.main(["demo", "--budget", "1GiB", "--budget", "10%", "--tokens", "3", "--model", "m"], io.StringIO()) == 0
    )
    assert seen[0] == demo.DemoOptions()
    assert (seen[1].budgets, seen[1].tokens, seen[1].model) == (("1GiB", "10%"), 3, "m")


def test_errors_are_one_line_on_stderr(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["demo", "--directory", str(tmp_path), "--size", "big"], io.StringIO()) == 2
    assert capsys.readouterr().err.startswith("tensorpager demo: 'big' is not a size")


def test_ctrl_c_ends_with_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupted)
    assert cli.main(["demo"], io.StringIO()) == 130
