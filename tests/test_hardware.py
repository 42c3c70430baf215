# SPDX-License-Identifier: Apache-2.0
"""Hardware put together from data sheets, read from JSON, and measured on this machine."""

from __future__ import annotations

import fcntl
import json
import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tensorpager import hardware, measured_hardware
from tensorpager.hardware import DRIVES, GPUS, Hardware, profile
from tensorpager.hardware_profiles import CPU, PCIE_LINE_BYTES_PER_SECOND
from tensorpager.measured_hardware import this_machine

GIB = 2**30
FIGURES = [*hardware.SIZE_FIELDS, *hardware.POSITIVE_FIELDS, *hardware.OPTIONAL_FIELDS]


def one(**changes: Any) -> Hardware:
    values: dict[str, Any] = {
        "name": "a machine",
        "device_bytes": 24 * GIB,
        "host_bytes": 64 * GIB,
        "flops_per_second": 1e14,
        "memory_bytes_per_second": 1e12,
        "host_to_device_bytes_per_second": 2.5e10,
        "device_to_host_bytes_per_second": 2.4e10,
        "drive_read_bytes_per_second": 7e9,
        "drive_write_bytes_per_second": 5e9,
        "drive_endurance_bytes": 1.2e15,
        "sources": {"device_bytes": "a data sheet"},
    }
    return Hardware(**{**values, **changes})


def test_fields_are_figures_but_for_name_and_sources() -> None:
    assert {each.name for each in fields(Hardware)} == {"name", "sources", *FIGURES}


# The parts


def test_every_part_has_positive_figures_and_a_source() -> None:
    for processor in [*GPUS.values(), CPU]:
        assert processor.source
        assert processor.dense_flops_per_second > 0
        assert processor.memory_bytes_per_second > 0
    for processor in GPUS.values():
        assert processor.memory_bytes > 0
        assert processor.pcie_generation in PCIE_LINE_BYTES_PER_SECOND
    for drive in DRIVES.values():
        assert drive.source
        assert drive.read_bytes_per_second > 0
        assert drive.write_bytes_per_second > 0
        assert drive.endurance_bytes > 0


def test_parts_are_within_what_is_built() -> None:
    for processor in GPUS.values():
        assert 16 * GIB <= processor.memory_bytes <= 192 * GIB
        assert processor.memory_bytes % GIB == 0
        assert 5e13 <= processor.dense_flops_per_second <= 1.5e15
        assert 5e11 <= processor.memory_bytes_per_second <= 8e12
    for drive in DRIVES.values():
        assert 3e9 <= drive.read_bytes_per_second <= 15e9
        assert 2e9 <= drive.write_bytes_per_second <= drive.read_bytes_per_second
        assert 5e14 <= drive.endurance_bytes <= 1e16


@pytest.mark.parametrize(
    ("name", "multiprocessors", "flops_a_clock", "clock"),
    [
        # The same figure by another way: multiprocessors, operations of each a clock, boost clock.
        ("rtx-3090", 82, 512, 1.695e9),
        ("rtx-a6000", 84, 1024, 1.8e9),
        ("rtx-4090", 128, 512, 2.52e9),
        ("rtx-5090", 170, 512, 2.407e9),
        ("a100-80gb", 108, 2048, 1.41e9),
        ("h100-sxm", 132, 4096, 1.83e9),
    ],
)
def test_peaks_are_dense_and_accumulate_in_float32(
    name: str, multiprocessors: int, flops_a_clock: int, clock: float
) -> None:
    assert GPUS[name].dense_flops_per_second == pytest.approx(multiprocessors * flops_a_clock * clock, rel=0.01)


def test_pcie_line_rates() -> None:
    rates = {generation: round(rate / 1e9, 1) for generation, rate in PCIE_LINE_BYTES_PER_SECOND.items()}
    assert rates == {3: 15.8, 4: 31.5, 5: 63.0}


# Put together


def test_profile_combines_the_parts() -> None:
    made = profile("rtx-4090", "samsung-990-pro-2tb", host_bytes=64 * GIB)
    assert made.device_bytes == 24 * GIB
    assert made.host_bytes == 64 * GIB
    assert made.flops_per_second == pytest.approx(165.2e12 * hardware.MATMUL_EFFICIENCY)
    assert made.memory_bytes_per_second == pytest.approx(1008e9 * hardware.MEMORY_EFFICIENCY)
    assert made.host_to_device_bytes_per_second == made.device_to_host_bytes_per_second
    assert made.host_to_device_bytes_per_second == pytest.approx(25.2e9, rel=0.01)
    assert made.drive_read_bytes_per_second == 7450e6
    assert made.drive_write_bytes_per_second == 6900e6
    assert made.drive_endurance_bytes == 1200e12
    assert "rtx-4090" in made.name
    assert "64.0 GiB" in made.name


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("gpu", [*GPUS, None])
def test_every_combination_is_valid_and_every_figure_has_a_source(gpu: str | None, drive: str) -> None:
    made = profile(gpu, drive, host_bytes=32 * GIB)
    assert set(made.sources) == set(FIGURES)
    assert Hardware.from_json(made.to_json()) == made


def test_sources_tell_assumptions_from_data_sheets() -> None:
    sources = profile("h100-sxm", "crucial-t705-2tb", drives=2).sources
    for name in ("flops_per_second", "memory_bytes_per_second", "host_to_device_bytes_per_second"):
        assert "assumption" in sources[name]
        assert "H100" in sources[name]
    assert "assumption" not in sources["device_bytes"]
    assert "2 drives" in sources["drive_read_bytes_per_second"]
    assert "assumption" in profile(None, "gen4-nvme").sources["drive_endurance_bytes"]


def test_striping_multiplies_rates_and_endurance_alone() -> None:
    single, striped = (profile("l40s", "gen4-nvme", drives=count, host_bytes=GIB) for count in (1, 4))
    assert striped.drive_read_bytes_per_second == 4 * single.drive_read_bytes_per_second
    assert striped.drive_write_bytes_per_second == 4 * single.drive_write_bytes_per_second
    assert striped.drive_endurance_bytes == 4 * single.drive_endurance_bytes
    for name in ("device_bytes", "host_bytes", "flops_per_second", "host_to_device_bytes_per_second"):
        assert getattr(striped, name) == getattr(single, name)


def test_without_a_gpu_the_device_is_ram() -> None:
    made = profile(None, "wd-sn850x-2tb", host_bytes=16 * GIB)
    assert (made.device_bytes, made.host_bytes) == (16 * GIB, 0)
    assert made.host_to_device_bytes_per_second == made.device_to_host_bytes_per_second == 0


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no GPU 'rtx-4091' is known; known are a100-80gb, .*rtx-4090"):
        profile("rtx-4091", "gen4-nvme")
    with pytest.raises(ValueError, match=r"no drive 'floppy' is known; known are crucial-t705-2tb, .*gen4-nvme"):
        profile("rtx-4090", "floppy")


@pytest.mark.parametrize("wrong", [{"drives": 0}, {"drives": 1.5}, {"host_bytes": -1}, {"host_bytes": "1GiB"}])
def test_profile_refuses_what_is_no_count(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        profile("rtx-4090", "gen4-nvme", **wrong)


# Steps


def test_a_step_takes_as_long_as_the_slower_of_its_two_parts() -> None:
    machine = one(flops_per_second=1e12, memory_bytes_per_second=1e9)
    assert machine.step_seconds(2 * 10**12, 10**9) == 2.0
    assert machine.step_seconds(10**12, 3 * 10**9) == 3.0
    assert machine.step_seconds(0, 0) == 0.0


@pytest.mark.parametrize("step", [(-1, 0), (0, -1)])
def test_a_step_is_not_negative(step: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="negative"):
        one().step_seconds(*step)


# Rules and JSON


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("name", "", "name is a text"),
        ("name", 7, "name is a text"),
        *(
            (name, value, f"{name} is an integer, 0 or more")
            for name in hardware.SIZE_FIELDS
            for value in (-1, 1.0, True)
        ),
        *(
            (name, value, f"{name} is a positive number")
            for name in hardware.POSITIVE_FIELDS
            for value in (0.0, -1.0, math.inf, math.nan, "1", None, True, 10**400)
        ),
        *(
            (name, value, f"{name} is a number, 0 or more")
            for name in hardware.OPTIONAL_FIELDS
            for value in (-1.0, math.inf, math.nan, "1", 10**400)
        ),
        ("host_to_device_bytes_per_second", 0.0, "both positive or both 0"),
        ("device_to_host_bytes_per_second", 0, "both positive or both 0"),
        ("sources", None, "sources is a mapping"),
        ("sources", {"speed": "a data sheet"}, "figures of the hardware alone"),
        ("sources", {"name": "a data sheet"}, "figures of the hardware alone"),
        ("sources", {"host_bytes": ""}, "a source is a text, not empty"),
        ("sources", {"host_bytes": 1}, "a source is a text, not empty"),
    ],
)
def test_each_rule_is_named_when_broken(field: str, value: object, rule: str) -> None:
    with pytest.raises(ValueError, match=f"hardware breaks a rule: .*{rule}"):
        one(**{field: value})


def test_there_is_no_host_tier_where_device_memory_is_host_memory() -> None:
    no_link = {"host_to_device_bytes_per_second": 0, "device_to_host_bytes_per_second": 0}
    with pytest.raises(ValueError, match="host_bytes is 0 where device memory is host memory"):
        one(**no_link)
    assert one(**no_link, host_bytes=0).host_bytes == 0


def test_nothing_can_be_changed_behind_it() -> None:
    sources = {"host_bytes": "a data sheet"}
    made = one(sources=sources)
    sources["host_bytes"] = ""
    assert made.sources == {"host_bytes": "a data sheet"}
    assert hash(made) == hash(replace(made))
    with pytest.raises(ValueError, match="flops_per_second is a positive number"):
        replace(made, flops_per_second=0)


def test_json_round_trip() -> None:
    made = one()
    text = made.to_json()
    assert Hardware.from_json(text) == made
    assert Hardware.from_json(text).to_json() == text
    order = one(sources={"host_bytes": "b", "device_bytes": "a"}), one(sources={"device_bytes": "a", "host_bytes": "b"})
    assert order[0].to_json() == order[1].to_json()


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"format": "tensorpager-schedule"}, '"format" is "tensorpager-hardware"'),
        ({"version": 2}, '"version" is 1'),
        ({"version": True}, '"version" is 1'),
        ({"version": 1.0}, '"version" is 1'),
        ({"watts": 450}, r"unknown \['watts'\]"),
        ({"host_bytes": "64GiB"}, "host_bytes is an integer"),
        ({"flops_per_second": math.nan}, "flops_per_second is a positive number"),
        ({"sources": ["a data sheet"]}, "sources is a mapping"),
    ],
)
def test_json_is_held_to_the_rules(change: dict[str, object], rule: str) -> None:
    content = {**json.loads(one().to_json()), **change}
    with pytest.raises(ValueError, match=rule):
        Hardware.from_json(json.dumps(content))


@pytest.mark.parametrize("name", ["format", "version", "name", "sources", "host_bytes"])
def test_json_lacks_nothing(name: str) -> None:
    content = json.loads(one().to_json())
    del content[name]
    with pytest.raises(ValueError, match=name):
        Hardware.from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"name": ' + "1" * 5000 + "}"])
def test_what_is_no_json_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ValueError, match="hardware: not JSON"):
        Hardware.from_json(text)


@pytest.mark.parametrize("text", ["null", "[]", "1", '"name"'])
def test_json_is_one_object(text: str) -> None:
    with pytest.raises(ValueError, match="the text is one JSON object"):
        Hardware.from_json(text)


# Measured


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 64 MiB at most."""
    monkeypatch.setattr(measured_hardware, "CHUNK_BYTES", 32 * 2**20)
    monkeypatch.setattr(measured_hardware, "CHUNKS_MAX", 2)


def assert_measured(measured: Hardware, directory: Path) -> None:
    for name in FIGURES:
        assert math.isfinite(getattr(measured, name))
    for name in ("device_bytes", *hardware.POSITIVE_FIELDS):
        assert getattr(measured, name) > 0
        assert measured.sources[name].startswith("measured on this machine, ")
    assert set(measured.sources) == set(FIGURES)
    assert Hardware.from_json(measured.to_json()) == measured
    assert list(directory.iterdir()) == []


@pytest.mark.usefixtures("small")
def test_this_machine(tmp_path: Path) -> None:
    measured = this_machine(str(tmp_path), seconds=0.1)
    assert_measured(measured, tmp_path)
    if measured.host_to_device_bytes_per_second == 0:
        assert measured.host_bytes == 0


@pytest.mark.usefixtures("small")
def test_without_o_direct_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return fcntl.fcntl(descriptor, command, argument)

    monkeypatch.setattr(
        measured_hardware, "fcntl", SimpleNamespace(fcntl=refuse, F_GETFL=fcntl.F_GETFL, F_SETFL=fcntl.F_SETFL)
    )
    read, write, how = measured_hardware.drive_rates(str(tmp_path), 0.01)
    assert 0 < read < math.inf
    assert 0 < write < math.inf
    assert "no O_DIRECT" in how
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("call", ["pwritev", "preadv", "fsync", "posix_fallocate"])
@pytest.mark.parametrize("failure", [OSError(5, "the drive is gone"), KeyboardInterrupt()])
def test_the_file_is_gone_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, failure: BaseException
) -> None:
    sizes = []

    def fail(descriptor: int, *_: object) -> int:
        sizes.append(os.fstat(descriptor).st_size)
        raise failure

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(failure)):
        this_machine(str(tmp_path), seconds=0.01)
    assert sizes  # there was a file
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small")
def test_only_its_owner_may_read_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (modes.append(os.fstat(file).st_mode & 0o777), fsync(file)))
    measured_hardware.drive_rates(str(tmp_path), 0.01)
    assert modes == [0o600]


@pytest.mark.usefixtures("small")
def test_a_short_transfer_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", lambda *_: 512)
    with pytest.raises(OSError, match="512 of 2097152 bytes"):
        measured_hardware.drive_rates(str(tmp_path), 0.01)


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_hardware, "_free_bytes", lambda _: 300 * 2**20)
    monkeypatch.setattr(measured_hardware, "_set_direct", lambda _: pytest.fail("a file was made"))
    with pytest.raises(OSError, match=r"writes 256\.0 MiB and wants 512\.0 MiB free; 300\.0 MiB are"):
        this_machine(str(tmp_path))


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        this_machine(str(tmp_path / "absent"))


@pytest.mark.parametrize("seconds", [0, -1.0, math.nan, math.inf, 601])
def test_seconds_are_bounded(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds is"):
        this_machine(seconds=seconds)


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys, tensorpager.hardware as hardware; "
        "hardware.profile('rtx-4090', 'gen4-nvme').to_json(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
