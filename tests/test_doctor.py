# SPDX-License-Identifier: Apache-2.0
"""The doctor on this machine, and on files that look like other machines."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest

from tensorpager import _core, doctor
from tensorpager.doctor import Finding, examine


def by_name(findings: tuple[Finding, ...]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_says_what_the_core_says_about_engines(tmp_path: Path) -> None:
    report = examine([tmp_path])
    engines = {finding.name: finding for finding in report.findings if finding.topic == "engine"}
    candidates = {each.engine: each for each in _core.probe_engines() if each.engine != "null"}
    assert engines.keys() == candidates.keys()
    for name, candidate in candidates.items():
        assert (engines[name].verdict == "ok") == candidate.usable
        assert engines[name].detail == candidate.reason
    assert report.can_page == any(candidate.usable for candidate in candidates.values())


def test_looks_at_every_directory_and_leaves_nothing_behind(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    found = by_name(examine([first, second]).findings)
    for directory in (first, second):
        facts = _core.probe_directory(str(directory))
        assert facts.file_system in found[str(directory)].value
        assert ("aligned to" in found[str(directory)].value) == facts.direct
        assert list(directory.iterdir()) == []


def test_directory_that_is_not_there_is_a_finding(tmp_path: Path) -> None:
    found = by_name(examine([tmp_path / "absent"]).findings)[str(tmp_path / "absent")]
    assert found.verdict == "absent"
    assert "absent" in found.detail


def test_report_is_json(tmp_path: Path) -> None:
    report = json.loads(json.dumps(examine([tmp_path]).as_dict()))
    assert isinstance(report["can_page"], bool)
    assert {"topic", "name", "verdict", "value", "detail", "needed"} == set(report["findings"][0])


def test_memlock_limit_is_the_process_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64 * 1024, 64 * 1024))
    found = doctor._memlock()
    assert (found.verdict, found.value) == ("limited", "64.0 KiB")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert doctor._memlock().value == "unlimited"


@pytest.mark.parametrize(
    ("text", "verdict", "value"),
    [
        ("always [madvise] never", "ok", "madvise"),
        ("[always] madvise never", "ok", "always"),
        ("always madvise [never]", "limited", "never"),
        ("", "limited", "not in this kernel"),
    ],
)
def test_huge_pages(monkeypatch: pytest.MonkeyPatch, text: str, verdict: str, value: str) -> None:
    monkeypatch.setattr(doctor, "_text", lambda _path, _default: text)
    assert (doctor._huge_pages().verdict, doctor._huge_pages().value) == (verdict, value)


def test_cgroup_limit_is_the_tightest_on_the_way_up(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/self/cgroup": "3:cpu,memory:/job/step\n0::/\n",
        "/sys/fs/cgroup/memory/job/step/memory.limit_in_bytes": str(2**63 - 4096),
        "/sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(3 * 2**30),
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
    }
    monkeypatch.setattr(doctor, "_text", lambda path, default: files.get(str(path), default))
    assert doctor._cgroup().value == "3.0 GiB"


def test_cgroup_version_2_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/self/cgroup": "0::/user\n", "/sys/fs/cgroup/user/memory.max": str(2**30)}
    monkeypatch.setattr(doctor, "_text", lambda path, default: files.get(str(path), default))
    assert doctor._cgroup().value == "1.0 GiB"
    files["/sys/fs/cgroup/user/memory.max"] = "max"
    assert doctor._cgroup().value == "none"


def test_no_engine_no_paging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_core, "probe_engines", list)
    assert not examine([tmp_path]).can_page
