# SPDX-License-Identifier: Apache-2.0
"""What a trace asks of the frames: its tensors as groups of pages, their uses, and the gaps between the uses.

A *group* is what is paged alike: the pages of one tensor, or one page shared by small tensors that persist. Small
tensors that live inside the pass stay resident while they live; they are counted, not scheduled.

Between two uses of a group lies a *gap*. When the next use needs the content, the only choice is how many of the
group's pages stay through the gap; when it overwrites everything, or there is none, the content is *dead* and its
frames are free at once. Each modification begins a new *version* of the content, which lasts to the next one: the
first time some of it leaves, it has to be written back, and no second time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from tensorpager.operator_trace import Trace

__all__ = ["MODIFY", "OVERWRITE", "READ", "Demand", "Gaps", "demand_of"]

Int64Array = npt.NDArray[np.int64]
Number = TypeVar("Number", np.int64, np.float64)

#: How a step uses a group: it needs the content; needs and changes it; replaces it.
READ, MODIFY, OVERWRITE = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Gaps:
    """Gaps that content lasts through, by (start, group). int64 [gaps] each, but for needed.

    group; pages (of the group); start: the use before it; end: the next use, of the next pass where end >= the number
    of steps. version: which version of the content the gap belongs to, -1 for content that the pass does not change.
    order: the gap's place among those of its version, 0 first. needed: bool [gaps], whether the content is needed at
    the end; where it is not, a page that leaves before is not read again. None: of all.
    """

    group: Int64Array
    pages: Int64Array
    start: Int64Array
    end: Int64Array
    version: Int64Array
    order: Int64Array
    needed: npt.NDArray[np.bool_] | None = field(default=None, kw_only=True)

    @property
    def read_pages(self) -> Int64Array:
        """int64 [gaps]: pages that are read at the end if none stays."""
        return self.pages if self.needed is None else np.where(self.needed, self.pages, 0)

    @property
    def count(self) -> int:
        """Number of gaps."""
        return len(self.group)


@dataclass(frozen=True, eq=False)
class Demand:
    """See the head of the file.

    group_tensors: the tensors of each group. group_pages: int64 [groups]. in_use: int64 [steps], pages that a step
    can't run without, those of small tensors included. use_*: all uses, by (group, step).
    """

    page_bytes: int
    step_count: int
    group_tensors: tuple[tuple[int, ...], ...]
    group_pages: Int64Array
    group_persists: npt.NDArray[np.bool_]
    in_use: Int64Array
    small_pages: Int64Array
    use_group: Int64Array
    use_step: Int64Array
    use_kind: Int64Array
    gaps: Gaps
    version_count: int

    @property
    def working_set_pages(self) -> int:
        """Frames with which nothing would ever have to move: the most that is alive at one step."""
        return int(self.alive_pages().max())

    def alive_pages(self) -> Int64Array:
        """int64 [steps]: pages in use or needed again."""
        return self.in_use + occupied(self.gaps, self.gaps.pages, self.step_count)


def occupied(gaps: Gaps, kept: npt.NDArray[Number], step_count: int) -> npt.NDArray[Number]:
    """[steps]: pages that `kept` (one number per gap) holds at each step between uses. Gaps wrap around."""
    change = np.zeros(2 * step_count + 1, kept.dtype)
    inner = gaps.end > gaps.start + 1
    np.add.at(change, gaps.start[inner] + 1, kept[inner])
    np.add.at(change, gaps.end[inner], -kept[inner])
    level = np.cumsum(change[:-1])
    return level[:step_count] + level[step_count:]


def demand_of(trace: Trace, page_bytes: int) -> Demand:
    """Group the tensors of a trace into pages of page_bytes, a positive number (ValueError)."""
    if page_bytes <= 0:
        msg = f"page_bytes {page_bytes} must be positive"
        raise ValueError(msg)
    uses = _uses_by_tensor(trace)
    groups, small = _group(trace, uses, page_bytes)
    table: list[tuple[int, int, int]] = []
    pages = np.zeros(len(groups), np.int64)
    for index, members in enumerate(groups):
        size = sum(trace.tensors[number].size_bytes for number in members)
        pages[index] = -(-size // page_bytes)
        table.extend((index, step, kind) for step, kind in _merged([uses[number] for number in members]))
    use = np.array(table, np.int64).reshape(-1, 3)
    small_pages = _small_pages(trace, uses, small, page_bytes)
    in_use = small_pages.copy()
    np.add.at(in_use, use[:, 1], pages[use[:, 0]])
    persists = np.array([trace.tensors[members[0]].persistent for members in groups], np.bool_)
    gaps, version_count = _gaps(use, pages, persists, len(trace.steps))
    return Demand(
        page_bytes=page_bytes,
        step_count=len(trace.steps),
        group_tensors=tuple(groups),
        group_pages=pages,
        group_persists=persists,
        in_use=in_use,
        small_pages=small_pages,
        use_group=use[:, 0],
        use_step=use[:, 1],
        use_kind=use[:, 2],
        gaps=gaps,
        version_count=version_count,
    )


def _uses_by_tensor(trace: Trace) -> dict[int, list[tuple[int, int]]]:
    """{tensor: [(step, kind)]} in order, of the tensors that hold bytes, in order of first use."""
    uses: dict[int, list[tuple[int, int]]] = {}
    for index, step in enumerate(trace.steps):
        for kind, numbers in ((READ, step.reads), (MODIFY, step.writes), (OVERWRITE, step.overwrites)):
            for number in numbers:
                if trace.tensors[number].size_bytes > 0:
                    uses.setdefault(number, []).append((index, kind))
    return uses


def _group(
    trace: Trace, uses: dict[int, list[tuple[int, int]]], page_bytes: int
) -> tuple[list[tuple[int, ...]], list[int]]:
    """(groups, small tensors of the pass). Small tensors that persist share pages in order of first use."""
    groups: list[tuple[int, ...]] = []
    small: list[int] = []
    shared: list[int] = []
    shared_bytes = 0
    for number in uses:
        tensor = trace.tensors[number]
        if tensor.size_bytes >= page_bytes:
            groups.append((number,))
        elif not tensor.persistent:
            small.append(number)
        else:
            if shared_bytes + tensor.size_bytes > page_bytes:
                groups.append(tuple(shared))
                shared, shared_bytes = [], 0
            shared.append(number)
            shared_bytes += tensor.size_bytes
    if shared:
        groups.append(tuple(shared))
    return groups, small


def _merged(lists: list[list[tuple[int, int]]]) -> list[tuple[int, int]]:
    """The uses of tensors that share a page. Replacing one of them changes the page and needs the rest of it."""
    if len(lists) == 1:
        return lists[0]
    kinds: dict[int, int] = {}
    for uses in lists:
        for step, kind in uses:
            kinds[step] = max(kinds.get(step, READ), READ if kind == READ else MODIFY)
    return sorted(kinds.items())


def _small_pages(trace: Trace, uses: dict[int, list[tuple[int, int]]], small: list[int], page_bytes: int) -> Int64Array:
    change = np.zeros(len(trace.steps) + 1, np.int64)
    for number in small:
        change[uses[number][0][0]] += trace.tensors[number].size_bytes
        change[uses[number][-1][0] + 1] -= trace.tensors[number].size_bytes
    return -(-np.cumsum(change[:-1]) // page_bytes)


def _gaps(use: Int64Array, pages: Int64Array, persists: npt.NDArray[np.bool_], step_count: int) -> tuple[Gaps, int]:
    rows: list[tuple[int, int, int, int, int, int]] = []
    version_count = 0
    first = np.searchsorted(use[:, 0], np.arange(len(pages) + 1))
    for group in range(len(pages)):
        steps: list[int] = use[first[group] : first[group + 1], 1].tolist()
        kinds: list[int] = use[first[group] : first[group + 1], 2].tolist()
        # Begin at a modification, so that every version is met from its first gap on, across the end of the pass too.
        changes = [place for place, kind in enumerate(kinds) if kind != READ]
        count = len(steps) if persists[group] else len(steps) - 1
        begin = changes[-1] if changes and persists[group] else 0
        version, order = -1, 0
        for offset in range(count):
            place = (begin + offset) % len(steps)
            following = (place + 1) % len(steps)
            if kinds[place] != READ:
                version, order = version_count, 0
                version_count += 1
            if kinds[following] == OVERWRITE:
                continue
            end = steps[following] + (step_count if following <= place else 0)
            rows.append((group, int(pages[group]), steps[place], end, version, order))
            order += 1
    rows.sort(key=lambda row: (row[2], row[0]))
    table = np.array(rows, np.int64).reshape(-1, 6)
    return Gaps(*(np.ascontiguousarray(table[:, column]) for column in range(6))), version_count
