# SPDX-License-Identifier: Apache-2.0
"""The ranks that train one model together: the processes of torch.distributed's default group.

What they tell each other here is JSON, over a gloo group of its own: that works whatever the training's backend is, and
never comes between its collectives. Whoever asks a question waits for every rank to come to the same one; a rank that
died ends the wait at once, one that hangs after AGREEMENT_TIMEOUT.

Threads: the one that trains. Blocking: every call. Errors: RanksError.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from tensorpager.errors import RanksError

__all__ = ["Ranks", "agreed", "ranks_of_group"]

#: The slowest rank's writing of a commit is waited for; torch's own default.
AGREEMENT_TIMEOUT = dt.timedelta(minutes=30)
#: What is told are numbers, and the text of an error.
_MESSAGE_BYTES_MAX = 2**20
_ERROR_CHARACTERS_MAX = 2000

Result = TypeVar("Result")


class Ranks:
    """See the head of the file. `rank` of `count`."""

    def __init__(self, group: Any, rank: int, count: int) -> None:
        self._group = group
        self.rank = rank
        self.count = count

    def exchange(self, what: str, message: dict[str, Any]) -> list[dict[str, Any]]:
        """What every rank says, by rank. `what`: the call that they are in, which has to be the same one."""
        text = json.dumps({"in": what, **message}).encode()
        if len(text) > _MESSAGE_BYTES_MAX:
            msg = f"a message of {len(text)} bytes for other ranks"
            raise ValueError(msg)
        try:
            texts = self._gather(text)
        except RuntimeError as error:  # torch's: connection closed, timed out
            msg = (
                f"rank {self.rank} waited for the {self.count - 1} others in {what}, and the connection broke off: "
                f"{_first_line(error)}. Most likely another rank has died; its own output says why"
            )
            raise RanksError(msg) from error
        said: list[dict[str, Any]] = [json.loads(each) for each in texts]
        for rank, each in enumerate(said):
            if each["in"] != what:
                msg = (
                    f"rank {self.rank} is in {what}, and rank {rank} in {each['in']}: every rank has to make the same "
                    "calls, in the same order"
                )
                raise RanksError(msg)
        return said

    def _gather(self, text: bytes) -> list[bytes]:
        import torch.distributed as dist

        size = torch.tensor([len(text)])
        sizes = [torch.zeros_like(size) for _ in range(self.count)]
        dist.all_gather(sizes, size, group=self._group)
        counts = [int(each) for each in sizes]
        if max(counts) > _MESSAGE_BYTES_MAX or min(counts) < 0:
            msg = f"messages of {counts} bytes"
            raise RuntimeError(msg)
        padded = torch.frombuffer(bytearray(text.ljust(max(counts))), dtype=torch.uint8)
        texts = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(texts, padded, group=self._group)
        return [each.numpy().tobytes()[:count] for each, count in zip(texts, counts, strict=True)]

    def agree(self, what: str, act: Callable[[], Result], undo: Callable[[Result], object] | None = None) -> Result:
        """act() on every rank. When it raises on one, all raise: that one its error, the others RanksError.

        They have called `undo` by then with what they got.
        """
        failure: Exception | None = None
        results: list[Result] = []
        try:
            results.append(act())
        except Exception as error:  # told to the others, and raised below
            failure = error
        try:
            said = self.exchange(what, {"failure": text_of(failure)})
            refuse_failures(what, said)
        except RanksError:
            if failure is not None:
                raise failure from None
            if undo is not None:
                undo(results[0])
            raise
        return results[0]


def text_of(failure: Exception | None) -> str | None:
    """For the other ranks."""
    return None if failure is None else f"{type(failure).__name__}: {failure}"[:_ERROR_CHARACTERS_MAX]


def refuse_failures(what: str, said: list[dict[str, Any]]) -> None:
    """RanksError when a rank tells of one."""
    failures = [f"rank {rank}: {each['failure']}" for rank, each in enumerate(said) if each["failure"] is not None]
    if failures:
        msg = f"{what} failed on {len(failures)} of {len(said)} ranks, so it is undone on all. {'; '.join(failures)}"
        raise RanksError(msg)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


_known: list[tuple[object, Ranks]] = []


def ranks_of_group() -> Ranks | None:
    """Those of the default process group; None without one, and for a process alone. Every rank has to call it."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    import torch.distributed as dist

    world = dist.group.WORLD
    if dist.get_world_size() == 1:
        return None
    if not _known or _known[0][0] is not world:
        group = dist.new_group(backend="gloo", timeout=AGREEMENT_TIMEOUT)
        _known[:] = [(world, Ranks(group, dist.get_rank(), dist.get_world_size()))]
    return _known[0][1]


def agreed(
    ranks: Ranks | None, what: str, act: Callable[[], Result], undo: Callable[[Result], object] | None = None
) -> Result:
    """Ranks.agree(), or act() alone."""
    return act() if ranks is None else ranks.agree(what, act, undo)
