# SPDX-License-Identifier: Apache-2.0
"""Commits of all ranks together: the next commit is there for every rank, or for none.

Each rank has a store of its own, rank-0-of-2 and so on, in the directories that the user names. A commit has two
phases. Every rank prepares: all that it wrote is on its drive, the new root under another name. They tell each other
how that went. If all have prepared, each publishes, by one rename; else each abandons. Whoever dies, and whenever: when
one has published, all have prepared, and resume() publishes for the rest; when none has, resume() abandons.

A rank that prepared and then loses the others does not know which it is. It says that the commit is undecided, and
takes no other one; both commits stay whole.

A commit bears a stamp: of which run it is, of which rank of how many, and which attempt of which life of the run. So
stores that don't belong together are found out.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tensorpager.errors import RanksError
from tensorpager.ranks import Ranks, agreed, ranks_of_group, refuse_failures, text_of
from tensorpager.store import (
    Store,
    create_pagefile,
    make_directory,
    open_pagefile,
    refuse_commit,
    store_directories,
)
from tensorpager.training_record import Stamp, TrainingRecord, record_of

if TYPE_CHECKING:
    from tensorpager._core import Pagefile
    from tensorpager._core import Pager as Core

__all__ = ["JointCommits", "StorePlace", "create_store", "joint_commit_number", "open_decided", "stores_of_ranks"]

_RANK_NAME = re.compile(r"rank-(\d+)-of-(\d+)")
_ROOT_NAME = "root.tensorpager"


class StorePlace:
    """Where this rank's store is. ranks: None for a process that trains alone. Every rank has to make it.

    RanksError when the directories hold a run of other ranks than these; ValueError when none is named.
    """

    def __init__(self, store: Store, what: str) -> None:
        self.named = store_directories(store)
        self.where = self.named[0]
        self.ranks = ranks_of_group()
        self.directories = agreed(self.ranks, what, lambda: _directories_of_rank(self.named, self.ranks))


def _directories_of_rank(named: list[str], ranks: Ranks | None) -> list[str]:
    count = 1 if ranks is None else ranks.count
    _refuse_other_ranks(named[0], count)
    return named if ranks is None else [str(Path(each) / f"rank-{ranks.rank}-of-{count}") for each in named]


def _refuse_other_ranks(directory: str, count: int) -> None:
    there = {int(match[2]) for path in _rank_paths(directory) if (match := _RANK_NAME.fullmatch(path.name))}
    if (Path(directory) / _ROOT_NAME).exists():
        there.add(1)
    others = sorted(there - {count})
    if others and count not in there:
        msg = (
            f"{directory} holds a run of {others[0]} rank{'s' if others[0] > 1 else ''}, and {count} "
            f"{'are' if count > 1 else 'is'} here: go on with it by as many (torchrun --nproc-per-node), or name "
            "another directory"
        )
        raise RanksError(msg)


def _rank_paths(directory: str) -> list[Path]:
    try:
        return sorted(path for path in Path(directory).iterdir() if (path / _ROOT_NAME).exists())
    except OSError:  # not there, or to be told of by who opens it
        return []


def stores_of_ranks(store: Store) -> list[list[str]]:
    """The directories of every rank's store, by rank; of the one there is, for a run of one process. Opens nothing.

    RanksError when one is missing.
    """
    named = store_directories(store)
    found = {path.name: int(match[2]) for path in _rank_paths(named[0]) if (match := _RANK_NAME.fullmatch(path.name))}
    if not found or (Path(named[0]) / _ROOT_NAME).exists():
        return [named]
    count = max(found.values())
    names = [f"rank-{rank}-of-{count}" for rank in range(count)]
    missing = [name for name in names if name not in found]
    if missing:
        msg = (
            f"{named[0]} holds part of a run of {count} ranks: {', '.join(missing)} is not there; bring all parts here"
        )
        raise RanksError(msg)
    return [[str(Path(each) / name) for each in named] for name in names]


# -- what the stores hold ----------------------------------------------------------------------------------------------


def _holdings(pagefile: Pagefile, where: str) -> dict[str, Any]:
    """What a rank tells of its store: commits by number, with their stamps."""
    commits = {}
    if pagefile.metadata:
        commits[str(pagefile.commit_number)] = _told(record_of(pagefile, where).stamp)
    if pagefile.prepared:
        prepared = TrainingRecord.from_bytes(pagefile.prepared_metadata, where)
        commits[str(pagefile.commit_number + 1)] = _told(prepared.stamp)
    return {"last": pagefile.commit_number if pagefile.metadata else 0, "commits": commits}


def _told(stamp: Stamp | None) -> list[object] | None:
    return None if stamp is None else [stamp.run, stamp.rank, stamp.count, stamp.attempt]


def _decision(what: str, ranks: Ranks, holdings: dict[str, Any], where: str) -> int:
    """The number of the commit that all ranks have, or can have; 0: none. RanksError, on all of them, without one."""
    said = ranks.exchange(what, holdings)
    last = max(each["last"] for each in said)
    if last == 0:
        return 0
    stamps = [each["commits"].get(str(last)) for each in said]
    for rank, stamp in enumerate(stamps):
        if stamp is None:
            _mismatch(where, f"rank {rank} does not have commit {last}, which another rank has")
        run, of_rank, count, attempt = stamp
        if (of_rank, count) != (rank, ranks.count):
            _mismatch(where, f"what rank {rank} has is of rank {of_rank} of {count}")
        if (run, attempt) != (stamps[0][0], stamps[0][3]):
            _mismatch(where, f"commit {last} of rank {rank} and that of rank 0 were not made together")
    return int(last)


def _mismatch(where: str, what: str) -> NoReturn:
    msg = (
        f"the stores of the ranks in {where} don't belong together: {what}. Each rank has to find its own store, as "
        "the run left it"
    )
    raise RanksError(msg)


def open_decided(place: StorePlace, what: str) -> Pagefile:
    """This rank's store at the last commit of all ranks, open to be written. IoError, CheckpointError, RanksError."""

    def opened() -> tuple[Pagefile, dict[str, Any]]:
        pagefile = open_pagefile(place.directories, to_write=True)
        try:
            return pagefile, _holdings(pagefile, place.directories[0])
        except BaseException:
            pagefile.close()
            raise

    pagefile, holdings = agreed(place.ranks, what, opened, lambda result: result[0].close())
    try:
        if place.ranks is None:
            _refuse_stamped(pagefile, place)
        else:
            last = _decision(what, place.ranks, holdings, place.where)
            place.ranks.agree(what, lambda: _decide(pagefile, last))
    except BaseException:
        pagefile.close()
        raise
    return pagefile


def _decide(pagefile: Pagefile, last: int) -> None:
    if not pagefile.prepared:
        return
    if pagefile.commit_number < last:
        pagefile.publish()
    else:
        pagefile.abandon()


def _refuse_stamped(pagefile: Pagefile, place: StorePlace) -> None:
    stamp = record_of(pagefile, place.where).stamp
    if stamp is not None:
        msg = (
            f"{place.where} is the store of rank {stamp.rank} of {stamp.count}: go on with all of them, by torchrun, "
            "and name the directory that holds their stores"
        )
        raise RanksError(msg)


def _looked_at(directories: list[str]) -> dict[str, Any]:
    if not (Path(directories[0]) / _ROOT_NAME).exists():
        return {"last": 0, "commits": {}}
    pagefile = open_pagefile(directories)
    try:
        return _holdings(pagefile, directories[0])
    finally:
        pagefile.close()


def joint_commit_number(place: StorePlace, what: str) -> int:
    """Of the commit that open_decided() would show; 0: there is none. IoError, CheckpointError, RanksError."""
    holdings = agreed(place.ranks, what, lambda: _looked_at(place.directories))
    return int(holdings["last"]) if place.ranks is None else _decision(what, place.ranks, holdings, place.where)


def create_store(place: StorePlace, page_bytes: int, what: str) -> Pagefile:
    """A new store, on every rank or on none. IoError when one has a commit already, on any rank; RanksError."""
    if place.ranks is None:
        if _looked_at(place.directories)["commits"]:  # one that is prepared only, too
            refuse_commit(place.where, max(1, _looked_at(place.directories)["last"]))
        return create_pagefile(place.directories, page_bytes)
    holdings = place.ranks.agree(what, lambda: _looked_at(place.directories))
    last = max(each["last"] for each in place.ranks.exchange(what, holdings))
    if last > 0:  # the same on all of them
        refuse_commit(place.where, last)

    def created() -> Pagefile:
        for directory in place.named:
            make_directory(directory)
        return create_pagefile(place.directories, page_bytes)

    return place.ranks.agree(what, created, lambda pagefile: pagefile.close())


# -- making them -------------------------------------------------------------------------------------------------------


class JointCommits:
    """The commits of one life of a run. Every rank has to make it. `run`: of the run that goes on, or None."""

    def __init__(self, ranks: Ranks, run: str | None) -> None:
        self._ranks = ranks
        own = secrets.token_hex(8)
        said = ranks.exchange("page() or resume()", {"life": own})
        self._life = str(said[0]["life"])
        self._run = run or self._life
        self._attempts = 0

    def commit(self, core: Core, record: Callable[[Stamp], bytes]) -> None:
        """Make core's next commit, with all ranks. See Pager.commit() for the errors."""
        number = core.commit_number + 1
        self._attempts += 1
        stamp = Stamp(self._run, self._ranks.rank, self._ranks.count, f"{self._life}-{self._attempts}")
        failure: Exception | None = None
        try:
            core.prepare_commit(record(stamp))
        except Exception as error:  # told to the others, and raised below
            failure = error
        try:
            said = self._ranks.exchange("commit()", {"failure": text_of(failure), "attempt": stamp.attempt})
        except RanksError as error:
            if failure is not None:
                raise failure from None
            msg = (
                f"commit {number} is undecided: {error}. It is prepared here, and whether the other ranks have it only "
                f"resume() with all of them can tell; the commit before, {number - 1}, is whole"
            )
            raise RanksError(msg) from error
        try:
            refuse_failures(f"commit {number}", said)
            self._refuse_other_attempts(said)
        except RanksError:
            if failure is not None:
                raise failure from None
            core.abandon_commit()
            raise
        core.publish_commit()

    def _refuse_other_attempts(self, said: list[dict[str, Any]]) -> None:
        attempts = [each["attempt"] for each in said]
        if len(set(attempts)) > 1:
            msg = f"the ranks commit for different times, or different runs: {', '.join(map(str, attempts))}"
            raise RanksError(msg)
