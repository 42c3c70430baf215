# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check` where there is no GPU: it says so, and what its benchmarks do with cores works on the stand-in."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from bench import gpu, gpu_check

from standin import LIBRARY

MIB = 2**20


@pytest.fixture
def device() -> gpu.Device:
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY} is built by `make test-cpp`")
    return gpu.Device(driver_library=str(LIBRARY))


@pytest.mark.skipif(gpu_check.has_gpu(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_built(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_check.py"])
    monkeypatch.setattr(gpu_check, "build", lambda *_: pytest.fail("it was built"))
    assert gpu_check.main() == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_a_command_that_fails_or_takes_too_long_is_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = gpu_check.Check(time.monotonic() + 60)
    assert check.run("right", ["true"], 10)
    assert not check.run("wrong", ["false"], 10)
    assert not check.run("no such", ["/no/such/program"], 10)
    assert not check.run("endless", ["sleep", "60"], 5)
    check.skip("left out", "no reason")
    assert check.failed() == ["wrong", "no such", "endless"]
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    saved = json.loads(check.save().read_text(encoding="utf-8"))["checks"]
    assert saved["wrong"]["outcome"] == "exit status 1"
    assert saved["left out"]["reason"] == "no reason"
    late = gpu_check.Check(time.monotonic() + 1)
    assert not late.run("late", ["true"], 10)
    assert late.results["late"]["outcome"] == "skipped"


def test_sweeps_move_a_quarter_of_the_file_or_more_and_read_what_the_host_tier_lacks(
    device: gpu.Device, tmp_path: Path
) -> None:
    path = gpu.make_file(64 * MIB, tmp_path)
    in_host = gpu.Sweeps(device, path, 96 * MIB, 2 * MIB)
    try:
        assert in_host.run(2)["read_a_byte"] == 0
        assert in_host.core.stats()["bytes_to_device"] >= 5 * 64 * MIB * 3 // 4
    finally:
        in_host.core.close()
    from_drive = gpu.Sweeps(device, path, 16 * MIB, 2 * MIB)
    try:
        assert from_drive.run()["read_a_byte"] > 0.5
    finally:
        from_drive.core.close()


def test_the_cost_of_a_resident_pair_and_of_mappings_is_measured(device: gpu.Device) -> None:
    assert gpu.acquire_and_release(device) > 0
    costs = device.mapping_costs()
    assert costs["link_bytes_per_second"] > 0
    assert [cost["page_bytes"] for cost in costs["costs"]] == [size * MIB for size in (2, 4, 8, 16, 32)]
