# SPDX-License-Identifier: Apache-2.0
"""The native module as framework authors use it: sets, tickets, errors, events, and what a killed process leaves
behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tensorpager import _core, errors

MIB = 1 << 20
PAGE = 2 * MIB


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A file of 20 pages and a bit, and its bytes."""
    values = np.random.default_rng(0).integers(0, 256, 20 * PAGE + 1_000_003, dtype=np.uint8)
    path = tmp_path / "data.bin"
    path.write_bytes(values.tobytes())
    return path, values


@pytest.fixture
def pager(tmp_path: Path) -> Iterator[_core.Pager]:
    pager = _core.Pager(budget_bytes=10 * PAGE, spill_directory=str(tmp_path))
    yield pager
    pager.close()


def test_bytes_appear_at_their_address(pager: _core.Pager, data: tuple[Path, np.ndarray]) -> None:
    path, values = data
    region = pager.map_file(str(path))
    assert region.address % PAGE == 0
    assert (region.size_bytes, region.page_count) == (len(values), 21)
    tensor = torch.from_dlpack(pager.tensor(region.address + 5, PAGE))
    assert tensor.data_ptr() == region.address + 5
    step = pager.add_set([(region.address + 5, PAGE)], "step")
    assert pager.set_pages(step).tolist() == [0, 1]
    pager.acquire(step)
    assert np.array_equal(tensor.numpy(), values[5 : 5 + PAGE])
    pager.release(step)
    stats = pager.stats()
    assert (stats["page_ins"], stats["faults"], stats["bytes_read"]) == (2, 2, 2 * PAGE)


def test_a_ticket_holds_its_pages(pager: _core.Pager, data: tuple[Path, np.ndarray]) -> None:
    region = pager.map_file(str(data[0]))
    step = pager.add_set([(region.address, 4 * PAGE)], "step")
    ticket = pager.prefetch(step)
    assert pager.stats()["pinned_pages"] == 4
    ticket.wait()
    assert ticket.done
    states = pager.page_states()
    assert [_core.PAGE_STATES[state] for state in states[:5]] == ["device"] * 4 + ["absent"]
    ticket.release()
    ticket.release()
    assert pager.stats()["pinned_pages"] == 0


def test_errors_are_typed_and_say_what_to_do(pager: _core.Pager, tmp_path: Path) -> None:
    with pytest.raises(errors.IoError, match="no-such-file") as caught:
        pager.map_file(str(tmp_path / "no-such-file"))
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == 2
    with pytest.raises(errors.IoError, match="not a regular file"):
        pager.map_file(str(tmp_path))
    with pytest.raises(errors.BudgetError, match="at least"):
        _core.Pager(budget_bytes=MIB)
    with pytest.raises(errors.EngineError, match="choose auto"):
        _core.Pager(budget_bytes=10 * PAGE, engine="floppy")
    with pytest.raises(errors.MemoryMapError, match="available"):
        _core.Pager(budget_bytes=1 << 50)
    with pytest.raises(ValueError, match="page_bytes"):
        _core.Pager(budget_bytes=10 * PAGE, page_bytes=3 * MIB)
    with pytest.raises(ValueError, match="no set"):
        pager.acquire(99)
    empty = np.zeros(0, np.int32)
    with pytest.raises(ValueError, match="schedule refused"):
        pager.set_schedule(
            step_set=empty,
            initial_pages=empty,
            action_step=empty,
            action_deadline=empty,
            action_page_in=empty,
            action_evict=empty,
        )
    pager.close()
    with pytest.raises(errors.ClosedError):
        pager.map_spill(8)


def test_several_schedules_are_known_and_one_is_followed(pager: _core.Pager, data: tuple[Path, np.ndarray]) -> None:
    region = pager.map_file(str(data[0]))
    first, second, third = (pager.add_set([(region.address + place * PAGE, 8)], f"step {place}") for place in range(3))
    empty = np.zeros(0, np.int32)

    def known(*steps: int, common: bool = False) -> int:
        return pager.add_schedule(
            step_set=np.array(steps, np.int32),
            initial_pages=empty,
            action_step=empty,
            action_deadline=empty,
            action_page_in=empty,
            action_evict=empty,
            common=common,
        )

    def run(*steps: int) -> None:
        pager.begin_pass()
        for step in steps:
            pager.acquire(step)
            pager.release(step)

    assert pager.followed_schedule is None
    assert pager.next_set is None
    one, other = known(first, second), known(first, third)
    assert pager.next_set == first
    shared = known(first, common=True)
    assert pager.followed_schedule == one
    run(first, third)
    assert pager.followed_schedule == other
    assert pager.stats()["schedule_switches"] == 1
    pager.follow_schedule(shared)
    pager.acquire(first)
    pager.release(first)
    assert pager.next_set == first  # its only step, once more
    run(first, third)
    assert pager.followed_schedule == shared
    pager.forget_schedule(shared)
    assert pager.followed_schedule == other
    with pytest.raises(ValueError, match="no known schedule"):
        pager.follow_schedule(shared)
    for _ in range(14):
        known(first)
    with pytest.raises(ValueError, match="at most 16 schedules"):
        known(first)
    pager.reset_stats()
    assert pager.stats()["schedule_switches"] == 0
    pager.clear_schedule()
    assert pager.followed_schedule is None


def test_events_tell_the_order_of_a_pages_life(pager: _core.Pager, data: tuple[Path, np.ndarray]) -> None:
    region = pager.map_file(str(data[0]))
    step = pager.add_set([(region.address, PAGE)], "step")
    pager.acquire(step)
    pager.release(step)
    events = pager.events()
    kinds = [_core.EVENT_KINDS[kind] for kind in events["kind"]]
    expected = [
        "acquire_begin",
        "stall_begin",
        "fault",
        "page_in_begin",
        "page_in_end",
        "stall_end",
        "acquire_end",
        "release",
    ]
    assert kinds == expected
    assert (np.diff(events["time_ns"].astype(np.int64)) >= 0).all()
    assert set(events["page"]) == {0, -1}


def test_reset_starts_every_counter_again(pager: _core.Pager, data: tuple[Path, np.ndarray]) -> None:
    region = pager.map_file(str(data[0]))
    step = pager.add_set([(region.address, 2 * PAGE)], "step")
    pager.acquire(step)
    pager.release(step)
    pager.reset_stats()
    stats = pager.stats()
    assert (stats["page_ins"], stats["bytes_read"], stats["io_requests"], stats["stalls"]) == (0, 0, 0, 0)
    assert len(pager.events()) == 0


def test_other_threads_run_while_one_waits(pager: _core.Pager, data: tuple[Path, np.ndarray]) -> None:
    """The GIL is free during a wait: a Python thread makes progress while another acquires over and over."""
    region = pager.map_file(str(data[0]))
    steps = [pager.add_set([(region.address + i * 4 * PAGE, 4 * PAGE)], f"step {i}") for i in range(5)]
    counted = 0
    running = True

    def count() -> None:
        nonlocal counted
        while running:
            counted += 1
            time.sleep(0)

    thread = threading.Thread(target=count)
    thread.start()
    before = counted
    for _ in range(10):
        for step in steps:
            pager.acquire(step)
            pager.release(step)
    running = False
    thread.join()
    assert pager.stats()["stalls"] >= 40
    assert counted - before > 50


INTERRUPTED = """
import os, signal, sys, threading, time
from tensorpager import _core
pager = _core.Pager(budget_bytes=40 << 20, spill_directory=sys.argv[2])
region = pager.map_file(sys.argv[1])
steps = [pager.add_set([(region.address + (i << 23), 8 << 20)], "step") for i in range(5)]
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
interrupted = False
try:
    while True:
        for step in steps:
            pager.acquire(step)
            pager.release(step)
except KeyboardInterrupt:
    interrupted = True
pinned = pager.stats()["pinned_pages"]
pager.close()
print("interrupted", interrupted, "pinned", pinned)
"""


def test_ctrl_c_ends_a_wait(data: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", INTERRUPTED, str(data[0]), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[1] == "True"
    # An interruption between acquire and release of the loop above leaves that one step pinned, by its own fault.
    assert int(words[3]) in (0, 4)


MODIFYING = """
import sys
import torch
from tensorpager import _core
pager = _core.Pager(budget_bytes=20 << 20, spill_directory=sys.argv[1])
region = pager.map_spill(100 << 20)
tensor = torch.from_dlpack(pager.tensor(region.address, 100 << 20))
print("ready", flush=True)
value = 0
while True:
    value += 1
    tensor.fill_(value % 251)
    if pager.stats()["writebacks"] > 0 and value == 1:
        print("spilling", flush=True)
"""


def test_kill_9_leaves_nothing_behind(tmp_path: Path) -> None:
    """Twenty kills at random moments of heavy spilling: no file is left, and the next start is clean."""
    moments = random.Random(0)
    for _ in range(8):
        arguments = [sys.executable, "-c", MODIFYING, str(tmp_path)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(moments.random() * 0.3)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert os.listdir(tmp_path) == []  # noqa: PTH208


def spill_of(directory: Path) -> str:
    """The one open file without a name in the directory, as a path of this process."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    spills = [link for link in links if os.readlink(link).startswith(f"{directory}/")]  # noqa: PTH115
    assert len(spills) == 1
    return str(spills[0])


def test_a_spilled_page_that_changed_on_the_drive_is_found_out(pager: _core.Pager, tmp_path: Path) -> None:
    """One byte of every extent is changed behind the pager's back: no page that comes from there is ever shown."""
    region = pager.map_spill(30 * PAGE)
    steps = [pager.add_set([(region.address + i * PAGE, PAGE)], f"page {i}") for i in range(30)]
    tensor = torch.from_dlpack(pager.tensor(region.address, 30 * PAGE))
    tensor.copy_(torch.arange(30 * PAGE, dtype=torch.uint8))
    spilled = pager.stats()["writebacks"]
    assert spilled >= 20
    descriptor = os.open(spill_of(tmp_path), os.O_RDWR)
    for extent in range(spilled):
        os.pwrite(descriptor, b"\xaa\x55", extent * PAGE + 1000)
    os.fsync(descriptor)
    os.close(descriptor)
    corrupt = []
    for step in steps:
        try:
            pager.acquire(step)
            pager.release(step)
        except errors.CorruptPageError as error:
            corrupt.append(error)
    assert len(corrupt) == spilled
    assert all(isinstance(error, errors.IoError) and isinstance(error, errors.TensorPagerError) for error in corrupt)
    assert all("checksum" in str(error) for error in corrupt)
    assert pager.stats()["pinned_pages"] == 0


def test_probe_tells_engines_with_reasons() -> None:
    candidates = _core.probe_engines()
    assert [candidate.engine for candidate in candidates] == ["uring", "pread", "null"]
    assert all(candidate.reason for candidate in candidates)
    assert next(candidate for candidate in candidates if candidate.engine == "pread").usable


def test_probe_tells_what_a_directory_offers(tmp_path: Path) -> None:
    facts = _core.probe_directory(str(tmp_path))
    assert facts.directory == str(tmp_path)
    assert facts.reason
    assert facts.align_bytes >= 1
    if facts.direct:
        assert facts.align_bytes & (facts.align_bytes - 1) == 0
    with pytest.raises(errors.IoError):
        _core.probe_directory(str(tmp_path / "missing"))
