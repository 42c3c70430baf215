# SPDX-License-Identifier: Apache-2.0
"""What a pass does to the contents of pages, and which pages to keep for it: the fewest bytes, written ones included.

A pass of training modifies parameters and state, and makes gradients that nobody wants any more at some point. A
modified page has to be written when it leaves, once for each modification; one whose content has ended leaves, and
comes back, without I/O. Between two uses lies either a gap whose content is needed at its end, or one within which the
content ends: there a page may go before that (it is written, if it was not since it was modified) or after it, for
nothing.

The model of [Note: bytes] in keeping_bound.py covers both, and its optimum, rounded, is what is kept. Where that leaves
the drive idle while a step computes, some frames are left free for reading ahead (readahead.py), as many as cost no
more than OVER_FEWEST_MAX of the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tensorpager.demand import Gaps
from tensorpager.keeping import best_kept, traffic_of
from tensorpager.keeping_bound import least_bytes
from tensorpager.linear_program import has_solver
from tensorpager.steps import Int32Array, Int64Array, Steps, UseClasses, use_classes

__all__ = ["ENDED", "MODIFIED", "ContentGaps", "Contents", "content_classes", "content_gaps", "keep_for_bytes"]

MODIFIED, ENDED = 0, 1
#: Frames left free at each step, per page of that step: the largest share is taken that is cheap enough.
READ_AHEAD_SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)
OVER_FEWEST_MAX = 1.02
#: With more gaps than this the linear program takes too long to be solved for every share: once then.
SHARED_GAPS_MAX = 3000


@dataclass(frozen=True, eq=False)
class Contents:
    """What became of pages in one pass, int64 [notes] each, in order.

    first_page, last_page: pages first_page .. last_page - 1. change: MODIFIED, in the use of the page that goes on at
    `step` or, where none does, in the next one; or ENDED, before `step`: nobody will want what the page held.
    """

    step: Int64Array
    first_page: Int64Array
    last_page: Int64Array
    change: Int64Array

    @classmethod
    def from_notes(cls, notes: Int32Array, events: Int32Array) -> Contents:
        """notes: int32 [notes, 4], `_core.Pager.recorded_contents()` of the recording that `events` are from."""
        position, first, last, change = (notes[:, column].astype(np.int64) for column in range(4))
        step = np.concatenate([[0], np.cumsum(events > 0)])[np.minimum(position, len(events))]
        acquires = np.flatnonzero(events > 0)
        for note in np.flatnonzero((change == MODIFIED) & (step > 0)).tolist():
            last_acquire = acquires[step[note] - 1]
            if -events[last_acquire] not in events[last_acquire : position[note]]:
                step[note] -= 1  # that step is still open
        return cls(step, first, last, change)

    def of_pages(self) -> dict[int, tuple[tuple[int, int], ...]]:
        """{page: its (step, change) in order}, of the pages that have any."""
        found: dict[int, list[tuple[int, int]]] = {}
        columns = (self.step, self.first_page, self.last_page, self.change)
        for step, first, last, change in zip(*(column.tolist() for column in columns), strict=True):
            for page in range(first, last):
                notes = found.setdefault(page, [])
                if not notes or notes[-1] != (step, change):
                    notes.append((step, change))
        return {page: tuple(notes) for page, notes in found.items()}


@dataclass(frozen=True, eq=False)
class ContentGaps:
    """The gaps of UseClasses, by the same index, as keeping.py wants them: up to where the content ends, if it does.
    free_after: int64 [gaps], the step after which pages leave for nothing, since their content ended in the gap; -1
    where they don't."""

    gaps: Gaps
    free_after: Int64Array


def content_classes(steps: Steps, contents: Contents) -> tuple[UseClasses, list[tuple[tuple[int, int], ...]]]:
    """Pages of the same uses and the same contents, and the (step, change) of each class."""
    of_pages = contents.of_pages()
    classes = use_classes(steps, of_pages)
    return classes, [of_pages.get(int(pages[0]), ()) for pages in classes.pages]


def content_gaps(classes: UseClasses, notes: list[tuple[tuple[int, int], ...]]) -> ContentGaps:
    """Which gaps need their content at the end, and which version of it each belongs to."""
    count = len(classes.gap_class)
    version, order = np.full(count, -1, np.int64), np.zeros(count, np.int64)
    ended = np.full(count, -1, np.int64)
    versions = 0
    by_class = np.argsort(classes.gap_class, kind="stable")
    bounds = np.searchsorted(classes.gap_class[by_class], np.arange(len(classes.pages) + 1))
    for index, class_notes in enumerate(notes):
        gaps = by_class[bounds[index] : bounds[index + 1]]  # in order: gap i follows run i
        last, following = classes.gap_start[gaps].tolist(), classes.gap_end[gaps].tolist()
        modified = {_run_at(last, step) for step, change in class_notes if change == MODIFIED}
        for run, gap in enumerate(gaps.tolist()):
            for step in (
                step + turn for step, change in class_notes if change == ENDED for turn in (0, classes.step_count)
            ):
                if last[run] < step <= following[run]:
                    ended[gap] = step
                    modified.add((run + 1) % len(last))
        # Begin at a modification, so that every version is met from its first gap on, across the end of the pass too.
        age = 0
        for run in (np.arange(len(last)) + max(modified)).tolist() if modified else ():
            gap = gaps[run % len(last)]
            if run % len(last) in modified:
                versions, age = versions + 1, 0
            version[gap], order[gap] = versions - 1, age
            age += 1
    free_after = np.where(ended < classes.gap_end, ended, -1)
    end = np.where(free_after >= 0, free_after + 1, classes.gap_end)
    columns = (classes.gap_class, classes.gap_pages, classes.gap_start, end, version, order)
    return ContentGaps(Gaps(*columns, needed=ended < 0), free_after)


def _run_at(last: list[int], step: int) -> int:
    """The run, of those that end with the steps `last`, that goes on at `step`, or else the next one."""
    return next((run for run, end in enumerate(last) if end >= step), 0)


def _end_between(last: int, following: int, notes: tuple[tuple[int, int], ...], step_count: int) -> int | None:
    """The first step after a gap's content ended in it."""
    steps = (step + turn for step, change in notes if change == ENDED for turn in (0, step_count))
    return min((step for step in steps if last < step <= following), default=None)


def keep_for_bytes(
    classes: UseClasses, content: ContentGaps, room: Int64Array, read_ahead: float | None = None
) -> tuple[Int64Array, float]:
    """int64 [gaps], pages to keep through each, up to its end or to where its content ends; and the fewest pages that
    any schedule moves, 0 without a solver. room: int64 [steps].

    read_ahead: frames to leave free at each step, per page of that step; None as in the head of the file.
    """
    gaps, count = content.gaps, classes.step_count
    kept, bound = _least(gaps, room, count)
    if gaps.count > SHARED_GAPS_MAX and read_ahead is None:
        return kept, bound
    limit = traffic_of(gaps, kept).total * OVER_FEWEST_MAX
    for share in READ_AHEAD_SHARES if read_ahead is None else (read_ahead,):
        left = np.maximum(room - np.ceil(classes.own_pages * share).astype(np.int64), 0)
        less, _ = _least(gaps, left, count)
        if read_ahead is not None or traffic_of(gaps, less).total <= limit:
            return less, bound
    return kept, bound


def _least(gaps: Gaps, room: Int64Array, step_count: int) -> tuple[Int64Array, float]:
    if not has_solver():
        return best_kept(gaps, room, step_count), 0.0
    optimum = least_bytes(gaps, room, step_count)
    kept = best_kept(gaps, room, step_count, optimum.kept)
    return kept, min(optimum.cost, float(traffic_of(gaps, kept).total))
