# SPDX-License-Identifier: Apache-2.0
"""The directory of blocks: whose it is, how large it gets, who goes first, and several processes at once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import tensorpager as tp
from prefix_files import header_of, load, name_of, save
from tensorpager.prefix_store import PrefixStore

BLOCK = header_of("a", 0).file_bytes


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "store"


def stored(store: PrefixStore, chain: str, count: int) -> list[bool]:
    return [store.find([name_of(chain, index)]) == 1 for index in range(count)]


def make_old(store: PrefixStore, chain: str, index: int, seconds: float) -> None:
    path = Path(store.directory) / f"{name_of(chain, index).hex()}.prefix"
    os.utime(path, (time.time() - seconds,) * 2)


# -- the budget --------------------------------------------------------------------------------------------------------


def test_the_budget_is_a_bound(directory: Path) -> None:
    store = PrefixStore(directory, 5 * BLOCK + 1)
    for chain in "abcdefgh":
        assert save(store, chain, 2) == 2
        stats = store.stats()
        assert stats["stored_bytes"] <= 5 * BLOCK + 1
        assert stored(store, chain, 2) == [True, True]
    assert store.stats()["blocks_evicted"] == 16 - 5
    assert save(store, "long", 9) == 5  # the first ones, for which all others go
    assert stored(store, "long", 9) == [True] * 5 + [False] * 4
    assert save(store, "long", 9, first=5) == 0  # nothing goes of what they follow on
    assert PrefixStore(directory, BLOCK - 1).create([(name_of("x", 0), header_of("x", 0))]) == []


def test_the_least_recently_used_goes_first(directory: Path) -> None:
    store = PrefixStore(directory, 4 * BLOCK)
    for chain, age in (("a", 400), ("b", 300), ("c", 200), ("d", 100)):
        save(store, chain, 1)
        make_old(store, chain, 0, age)
    assert load(store, "a", 0)  # used just now
    save(store, "e", 1)
    assert [stored(store, chain, 1) for chain in "abcde"] == [[True], [False], [True], [True], [True]]


def test_what_took_long_to_compute_stays_longer(directory: Path) -> None:
    store = PrefixStore(directory, 3 * BLOCK)
    save(store, "dear", 1, seconds=10.0)
    save(store, "cheap", 1, seconds=0.1)
    save(store, "unknown", 1, seconds=0.0)
    make_old(store, "dear", 0, 1000)
    make_old(store, "cheap", 0, 100)
    make_old(store, "unknown", 0, 100)
    save(store, "x", 1)
    assert not any(stored(store, "unknown", 1))
    save(store, "y", 1)
    assert not any(stored(store, "cheap", 1))
    make_old(store, "dear", 0, 10**6)
    save(store, "z", 1)
    assert not any(stored(store, "dear", 1))


def test_a_block_that_others_follow_on_goes_after_them(directory: Path) -> None:
    """The first blocks of a chain are the oldest, and without them the others could not be found."""
    store = PrefixStore(directory, 6 * BLOCK)
    save(store, "a", 4)
    for index in range(4):
        make_old(store, "a", index, 1000 - index)
    save(store, "b", 4)
    assert stored(store, "a", 4) == [True, True, False, False]
    save(store, "c", 1)
    assert stored(store, "a", 4)[:2] == [True, False]


# -- whose it is -------------------------------------------------------------------------------------------------------


def test_only_the_owner_may_look(directory: Path) -> None:
    before = os.umask(0)
    try:
        store = PrefixStore(directory, "1MiB")
        save(store, "a", 1)
        (under_way,) = store.create([(name_of("b", 0), header_of("b", 0))])
    finally:
        os.umask(before)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
    assert len(list(directory.iterdir())) == 2
    under_way.abandon()
    assert len(list(directory.iterdir())) == 1


def test_a_directory_that_others_write_to_is_refused(directory: Path) -> None:
    PrefixStore(directory)
    for mode in (0o770, 0o707, 0o777):
        directory.chmod(mode)
        with pytest.raises(tp.IoError, match="can be written to by others"):
            PrefixStore(directory)
    directory.chmod(0o755)
    PrefixStore(directory)
    with pytest.raises(tp.IoError, match="prefix store"):
        PrefixStore(directory / "no" / "parents")
    with pytest.raises(tp.IoError, match="another user's" if os.geteuid() else "can be written to by others"):
        PrefixStore("/" if os.geteuid() else "/tmp")
    (directory / "file").write_text("")
    with pytest.raises(tp.IoError, match="Not a directory"):
        PrefixStore(directory / "file")


def replaced(path: Path, kind: str, target: Path) -> Any:
    content = path.read_bytes()
    path.unlink()
    if kind == "link":
        target.write_bytes(content)
        path.symlink_to(target)
    elif kind == "dangling link":
        path.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(path, 0o600)
    elif kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        here = Path.cwd()
        os.chdir(path.parent)  # such names are short
        try:
            server.bind(path.name[:90])
        finally:
            os.chdir(here)
        (path.parent / path.name[:90]).rename(path)
        return server
    elif kind == "readable by others":
        path.write_bytes(content)
        path.chmod(0o644)
    elif kind == "directory":
        path.mkdir()
    return None


@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo", "socket", "readable by others"])
def test_what_was_not_written_here_is_deleted(directory: Path, tmp_path: Path, kind: str) -> None:
    store = PrefixStore(directory, "1MiB")
    save(store, "a", 1)
    path = directory / f"{name_of('a', 0).hex()}.prefix"
    kept = replaced(path, kind, tmp_path / "target")
    assert not load(store, "a", 0)
    assert not path.is_symlink()
    assert not path.exists()
    assert (tmp_path / "target").exists() == (kind == "link")  # what it led to is left alone
    assert save(store, "a", 1) == 1
    assert load(store, "a", 0)
    if kept is not None:
        kept.close()


def test_other_files_are_left_alone(directory: Path) -> None:
    store = PrefixStore(directory, 2 * BLOCK)
    for name in ("notes.txt", "short.prefix", "x" * 64 + ".safetensors"):
        (directory / name).write_bytes(b"x")
    for chain in "abcd":
        save(store, chain, 1)
    assert {"notes.txt", "short.prefix", "x" * 64 + ".safetensors"} <= {path.name for path in directory.iterdir()}


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_full_drive_is_an_error_and_leaves_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PrefixStore(directory, "1MiB")
    save(store, "a", 1)
    calls = []

    def full(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(tp.IoError, match=r"No space left.*smaller budget") as raised:
        save(store, "b", 3)
    assert raised.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert len(list(directory.iterdir())) == 1
    assert load(store, "a", 0)
    assert save(store, "b", 3) == 3


def test_a_failing_read_is_an_error(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PrefixStore(directory, "1MiB")
    save(store, "a", 1)

    def failing(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(tp.IoError, match="Input/output error"):
        load(store, "a", 0)
    monkeypatch.undo()
    assert load(store, "a", 0)  # it was the drive, not the block


def test_short_reads_and_writes_are_finished(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PrefixStore(directory, "1MiB")
    preadv, pwrite, pread = os.preadv, os.pwrite, os.pread
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:100]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, content, offset: pwrite(fd, bytes(content)[:100], offset))
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 10), offset))
    save(store, "a", 2)
    assert load(store, "a", 0)
    assert load(store, "a", 1)


def test_a_lock_that_is_never_let_go(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    store = PrefixStore(directory, "1MiB")
    save(store, "a", 1)
    monkeypatch.setattr("tensorpager.prefix_store.LOCK_SECONDS_MAX", 0.05)
    held = os.open(directory, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with pytest.raises(tp.IoError, match="another process has held the lock"):
            save(store, "b", 1)
        assert load(store, "a", 0)  # readers need none
    finally:
        os.close(held)
    assert save(store, "b", 1) == 1


def test_numbers(directory: Path) -> None:
    with pytest.raises(ValueError, match="block_tokens is 0"):
        PrefixStore(directory, block_tokens=0)
    with pytest.raises(ValueError, match="much"):
        PrefixStore(directory, "much")
    assert "namespace='me'" in repr(PrefixStore(directory, namespace="me"))


# -- several at once ---------------------------------------------------------------------------------------------------


def test_a_block_that_is_evicted_can_be_read_to_its_end(directory: Path) -> None:
    store = PrefixStore(directory, BLOCK)
    save(store, "a", 1)
    block = store.open(name_of("a", 0))
    assert block is not None
    save(store, "b", 1)
    assert stored(store, "a", 1) == [False]
    for part in block.header.parts:
        assert block.read_part(part, memoryview(bytearray(part.size_bytes)))
    block.close()
    block.close()


def test_damage_is_not_blamed_on_the_next_one(directory: Path) -> None:
    """A reader of a damaged file finds, when it wants to delete it, that another process has written it anew."""
    store = PrefixStore(directory, "1MiB")
    save(store, "a", 1)
    path = directory / f"{name_of('a', 0).hex()}.prefix"
    content = path.read_bytes()
    path.write_bytes(content[:-5000] + b"\xff" * 5000)
    block = store.open(name_of("a", 0))
    assert block is not None
    path.unlink()
    save(store, "a", 1)
    part = block.header.parts[-1]
    assert not block.read_part(part, memoryview(bytearray(part.size_bytes)))
    block.close()
    assert load(store, "a", 0)
    assert store.stats()["blocks_damaged"] == 0


def test_two_that_write_the_same(directory: Path) -> None:
    store = PrefixStore(directory, "1MiB")
    wanted = [(name_of("a", 0), header_of("a", 0))]
    first, second = store.create(wanted), store.create(wanted)
    assert len(first) == len(second) == 1
    for block in (*first, *second):
        for number, part in enumerate(block.header.parts):
            from prefix_files import payload_of

            block.write_part(number, memoryview(payload_of(block.name, part)))
        block.finish(1.0)
        assert load(store, "a", 0)
    assert store.create(wanted) == []
    assert store.stats()["stored_blocks"] == 1


def test_threads(directory: Path) -> None:
    store = PrefixStore(directory, 20 * BLOCK)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(12):
                save(store, f"chain {(number + turn) % 5}", 4)
                for index in range(4):
                    load(store, f"chain {(number * 3 + turn) % 5}", index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert store.stats()["blocks_damaged"] == 0
    assert store.stats()["stored_bytes"] <= 20 * BLOCK


WORKER = """
import random, sys
sys.path[:0] = [{tests!r}]
from prefix_files import load, save
from tensorpager.prefix_store import PrefixStore
seed, turns = int(sys.argv[1]), int(sys.argv[2])
chosen = random.Random(seed)
store = PrefixStore({directory!r}, {budget})
print("begun", flush=True)
for turn in range(turns):
    chain = f"chain {{chosen.randrange(8)}}"
    save(store, chain, chosen.randrange(1, 6), seconds=chosen.random())
    for index in range(6):
        load(store, f"chain {{chosen.randrange(8)}}", index)
    assert store.stats()["stored_bytes"] <= {budget}
print("damaged", store.stats()["blocks_damaged"])
"""


def start(directory: Path, seed: int, turns: int) -> subprocess.Popen[str]:
    program = WORKER.format(tests=str(Path(__file__).parent), directory=str(directory), budget=12 * BLOCK)
    return subprocess.Popen(
        [sys.executable, "-c", program, str(seed), str(turns)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(tp.__file__).parents[1])},
    )


def test_processes_share_a_directory(directory: Path) -> None:
    """Four that read, write and evict what the others do; the budget is watched from outside all the time."""
    directory.mkdir(mode=0o700)
    workers = [start(directory, seed, 60) for seed in range(4)]
    largest = 0
    while any(worker.poll() is None for worker in workers):
        largest = max(largest, total_bytes(directory))
    outputs = [worker.communicate(timeout=60) for worker in workers]
    assert [output[0].split() for output in outputs] == [["begun", "damaged", "0"]] * 4, outputs
    assert 8 * BLOCK < largest <= 12 * BLOCK
    assert not list(directory.glob("*.new"))


def total_bytes(directory: Path) -> int:
    """Under the lock, or what is deleted and what is made behind it would both be counted."""
    sizes = {}
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for entry in os.scandir(directory):
            with contextlib.suppress(FileNotFoundError):
                facts = entry.stat()
                sizes[facts.st_ino] = facts.st_size
    finally:
        os.close(descriptor)
    return sum(sizes.values())


def test_processes_that_are_killed(directory: Path) -> None:
    """Whenever: what they leave under way is deleted by the next writer, and no block is half a block."""
    directory.mkdir(mode=0o700)
    for seed in range(6):
        worker = start(directory, seed, 10**6)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "begun\n"
        time.sleep(0.01 * seed)
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
    (directory / f"{'0' * 64}.abandoned.new").write_bytes(b"x" * 100)
    store = PrefixStore(directory, 12 * BLOCK)
    held = store.create([(name_of("held", 0), header_of("held", 0))])
    assert [path.name for path in directory.glob("*.new")] == [held[0]._file_name]
    for chain in range(8):
        found = [load(store, f"chain {chain}", index) for index in range(6)]
        assert sorted(found, reverse=True) == found  # no block without the one before
    assert store.stats()["blocks_damaged"] == 0
    held[0].abandon()
