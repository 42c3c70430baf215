# SPDX-License-Identifier: Apache-2.0
"""Which pages leave in the gaps between their uses: after which step, and by when they are needed again.

Of a class the first pages stay, the same in every gap. Those behind them leave after the use, or, where the content
ends in the gap, some of them only after that, when it costs nothing.

[Note: returns at once]
A page that reading ahead would bring back before it left (or in the same action) had better stay. Its gap has a free
frame throughout: were a step in it full, all page-ins due by then would be paired with evictions possible by then, and
the page's own page-in comes later than both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tensorpager.contents import ContentGaps
from tensorpager.demand import occupied
from tensorpager.steps import Int32Array, Int64Array, UseClasses

__all__ = ["Departures", "departures_of_contents", "departures_of_kept", "frames_ahead", "returning"]


@dataclass(frozen=True, eq=False)
class Departures:
    """Rows, int64 [D] each: pages first .. first + count - 1 of the class of the gap leave once step `after` has been
    acquired and is over, 0 <= after < steps, and are needed at step `due`, after < due <= after + steps."""

    gap: Int64Array
    first: Int64Array
    count: Int64Array
    after: Int64Array
    due: Int64Array

    @property
    def page_count(self) -> int:
        """Pages that leave in a pass, and come back."""
        return int(self.count.sum())

    def pages(self, classes: UseClasses) -> Int32Array:
        """int32 [page_count], row by row."""
        columns = (classes.gap_class[self.gap], self.first, self.first + self.count)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return np.concatenate([np.zeros(0, np.int32), *(classes.pages[own][first:last] for own, first, last in rows)])


def departures_of_kept(classes: UseClasses, kept: list[int]) -> Departures:
    """All but `kept` pages of each gap leave at its beginning."""
    first = np.array(kept, np.int64)
    gap = np.flatnonzero(first < classes.gap_pages)
    return Departures(gap, first[gap], (classes.gap_pages - first)[gap], classes.gap_start[gap], classes.gap_end[gap])


def frames_ahead(classes: UseClasses, departures: Departures, frame_count: int) -> int:
    """Frames beside the pages that stay across the start of the pass: what page-ins for the next pass may fill."""
    absent = int(departures.count[departures.due >= classes.step_count].sum())
    return min(frame_count - (classes.page_total - absent), departures.page_count)


def returning(classes: UseClasses, departures: Departures, frame_count: int) -> Int64Array:
    """int64 [D]: at most how many pages of each row are read back by an action not after their own eviction.

    Whatever the order among evictions after one step and among page-ins for one step.
    """
    steps, count = classes.step_count, departures.count
    ahead = frames_ahead(classes, departures, frame_count)
    evicted_by = np.cumsum(_per_step(departures.after, count, steps))
    due = _per_step(departures.due % steps, count, steps)
    due_before = np.cumsum(due) - due
    read_first = due_before[departures.due % steps] + departures.page_count * (departures.due >= steps)
    soonest: Int64Array = np.clip(evicted_by[departures.after] - (read_first - ahead), 0, count)
    return soonest


def _per_step(step: Int64Array, pages: Int64Array, step_count: int) -> Int64Array:
    total = np.zeros(step_count, np.int64)
    np.add.at(total, step, pages)
    return total


def departures_of_contents(
    classes: UseClasses, content: ContentGaps, kept: Int64Array, room: Int64Array, frame_count: int
) -> Departures:
    """All but `kept` pages of each gap leave at its beginning, and those when the content ends, if it does.

    More stay by [Note: returns at once]. room: int64 [steps], frames beside those in use.
    """
    ends = content.free_after >= 0
    kept = kept.copy()
    stays = np.where(ends, 0, kept)  # through the whole gap
    while True:
        departures = _departures(classes, content, kept, stays)
        too_soon = returning(classes, departures, frame_count)
        if not too_soon.any():
            return departures
        held = occupied(content.gaps, kept, classes.step_count)
        after_end = np.where(ends, content.free_after, classes.gap_end - 1)
        held += _occupied_between(after_end, classes.gap_end, stays, classes.step_count)
        free = np.tile(room - held, 2)
        grown = False
        for row in np.lexsort((departures.gap, departures.due - departures.after)).tolist():
            first, last = int(departures.after[row]) + 1, int(departures.due[row])
            more = int(min(too_soon[row], free[first:last].min())) if last > first else int(too_soon[row])
            if more <= 0:
                continue
            grown = True
            gap = departures.gap[row]
            late = bool(ends[gap]) and departures.first[row] < kept[gap]
            kept[gap] += 0 if late else more
            stays[gap] += more
            for shift in (-classes.step_count, 0, classes.step_count):
                free[max(first + shift, 0) : max(last + shift, 0)] -= more
        assert grown, "a page that returns at once has room through its gap"


def _departures(classes: UseClasses, content: ContentGaps, kept: Int64Array, stays: Int64Array) -> Departures:
    """stays: of the kept pages of a gap, those that stay when the content has ended."""
    steps = classes.step_count
    early = np.flatnonzero(kept < classes.gap_pages)
    late = np.flatnonzero((content.free_after >= 0) & (stays < kept))
    gap = np.concatenate([early, late])
    first = np.concatenate([kept[early], stays[late]])
    count = np.concatenate([(classes.gap_pages - kept)[early], (kept - stays)[late]])
    after = np.concatenate([classes.gap_start[early], content.free_after[late]])
    due = classes.gap_end[gap]
    in_next_pass = steps * (after >= steps)
    return Departures(gap, first, count, after - in_next_pass, due - in_next_pass)


def _occupied_between(start: Int64Array, end: Int64Array, pages: Int64Array, step_count: int) -> Int64Array:
    """int64 [steps]: pages held at the steps start + 1 .. end - 1, on a circle."""
    change = np.zeros(2 * step_count + 2, np.int64)
    inner = end > start + 1
    np.add.at(change, start[inner] + 1, pages[inner])
    np.add.at(change, end[inner], -pages[inner])
    level = np.cumsum(change)
    return level[:step_count] + level[step_count : 2 * step_count]
