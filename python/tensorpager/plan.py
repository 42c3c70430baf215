# SPDX-License-Identifier: Apache-2.0
"""From the steps of a pass to a schedule: which pages stay, which are read when, and over what.

Needs neither torch nor the native module. Three stages: `use_classes` counts interchangeable pages together, `policy`
decides how many of each stay resident through each gap between uses, and this file turns the counts into pages and
pairs every page-in with the eviction that makes room for it.

[Note: pairing]
Put the evictions of a pass in order of the evicted page's last use, and the page-ins in order of the step that needs them.
Beside the pages kept across the start of the pass there are `ahead` free frames, so page-in number k can start as soon as
eviction number k - ahead is possible: first in, first out. No other pairing lets any page-in start earlier, and none
reads fewer bytes. An action belongs to the pass of its eviction; the last `ahead` page-ins of a pass are for the next one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tensorpager.errors import BudgetError
from tensorpager.policy import Circle, belady_page_ins, circle_of, fill_up, keep_most, lru_kept, lru_page_ins, page_in_bound
from tensorpager.schedule import Schedule, Simulation, simulate
from tensorpager.steps import Int32Array, Int64Array, Steps, UseClasses, steps_from_events, use_classes

__all__ = [
    "Schedule",
    "Simulation",
    "Steps",
    "belady_page_ins",
    "lru_page_ins",
    "plan",
    "simulate",
    "steps_from_events",
]


def plan(
    steps: Steps,
    *,
    frame_count: int,
    page_bytes: int,
    page_count: int,
    step_name: Callable[[int], str] | None = None,
) -> Schedule:
    """The schedule for a pass that is repeated for ever, in frame_count frames of page_bytes each.

    page_count: pages of the address space; every page of the steps lies below it (ValueError otherwise). step_name:
    names a step for messages. BudgetError when the pages in use at one step do not fit, with the budget that would do.
    """
    if min(frame_count, page_bytes) <= 0:
        raise ValueError(f"frame_count {frame_count} and page_bytes {page_bytes} must be positive")
    classes = use_classes(steps)
    _check_pages(classes, page_count)
    _check_budget(steps, classes, frame_count, page_bytes, step_name)
    gap_pages = classes.gap_pages.tolist()
    kept = list(gap_pages)
    bound = 0.0
    if classes.page_total > frame_count:
        circle = circle_of(classes)
        room = frame_count - classes.step_pages
        bound = page_in_bound(circle, room)
        inner = _choose_kept(classes, circle, room, frame_count)
        for gap, amount in zip(circle.index, inner, strict=True):
            kept[gap] = amount
    page_ins = int(classes.gap_pages.sum()) - sum(kept)
    accesses = int(classes.own_pages.sum())
    initial, actions = _pair(classes, kept, frame_count)
    return Schedule(
        page_bytes=page_bytes,
        page_count=page_count,
        frame_count=frame_count,
        step_set=steps.step_set.astype(np.int32),
        initial_pages=initial,
        action_page_in=actions[0],
        action_evict=actions[1],
        action_step=actions[2],
        action_deadline=actions[3],
        page_ins_per_pass=page_ins,
        accesses_per_pass=accesses,
        hits_per_pass=accesses - page_ins,
        lower_bound_page_ins=bound,
        working_set_pages=classes.page_total,
        largest_step_pages=int(classes.step_pages.max()),
    )


def _check_pages(classes: UseClasses, page_count: int) -> None:
    largest = max((int(pages[-1]) for pages in classes.pages), default=-1)
    if largest >= page_count:
        raise ValueError(f"the steps use page {largest}, and the address space has {page_count} pages")


def _check_budget(
    steps: Steps, classes: UseClasses, frame_count: int, page_bytes: int, step_name: Callable[[int], str] | None
) -> None:
    worst = int(np.argmax(classes.step_pages))
    needed = int(classes.step_pages[worst])
    if needed <= frame_count:
        return
    name = step_name(worst) if step_name is not None else f"set {int(steps.step_set[worst])}"
    own = int(classes.own_pages[worst])
    beside = f", {needed - own} of them held by steps still open around it" if needed > own else ""
    raise BudgetError(
        f"step {worst} ({name}) needs {needed * page_bytes} bytes at once ({needed} pages of {page_bytes} bytes{beside}), "
        f"and the budget holds {frame_count * page_bytes} ({frame_count} frames). "
        f"The smallest budget that works is {needed * page_bytes} bytes."
    )


def _choose_kept(classes: UseClasses, circle: Circle, room: Int64Array, frame_count: int) -> list[int]:
    lru = lru_kept(classes, frame_count)
    kept = keep_most(circle, room, [[lru[gap] for gap in circle.index]])
    # [Note: pairing] relies on there being no gap left that could be kept in a larger part.
    return fill_up(circle, room, kept, list(range(len(circle.index))))


def _pair(
    classes: UseClasses, kept: list[int], frame_count: int
) -> tuple[Int32Array, tuple[Int32Array, Int32Array, Int32Array, Int32Array]]:
    """(initial_pages, (page_in, evict, step, deadline)); see [Note: pairing]."""
    step_count = classes.step_count
    page_list, start_list, end_list = [], [], []
    absent_pages = 0
    resident = []
    for gap, amount in enumerate(kept):
        index, end = int(classes.gap_class[gap]), int(classes.gap_end[gap])
        dropped = classes.pages[index][amount:]
        page_list.append(dropped)
        start_list.append(np.full(len(dropped), classes.gap_start[gap]))
        end_list.append(np.full(len(dropped), end))
        if end >= step_count:
            absent_pages += len(dropped)
            resident.append((int(classes.first_use[index]), classes.pages[index][:amount]))
    page = np.concatenate([*page_list, np.zeros(0, np.int32)]).astype(np.int64)
    start = np.concatenate([*start_list, np.zeros(0, np.int64)]).astype(np.int64)
    end = np.concatenate([*end_list, np.zeros(0, np.int64)]).astype(np.int64)
    evictions = np.lexsort((page, -end, start))
    page_ins = np.lexsort((page, end % step_count))
    ahead = min(frame_count - (classes.page_total - absent_pages), len(page))
    source = np.roll(page_ins, -ahead)
    next_pass = np.arange(len(page)) >= len(page) - ahead
    for place in page_ins[:ahead]:
        resident.append((int(end[place] % step_count), page[place : place + 1].astype(np.int32)))
    first = np.concatenate([*(np.full(len(pages), use) for use, pages in resident), np.zeros(0, np.int64)])
    initial = np.concatenate([*(pages for _, pages in resident), np.zeros(0, np.int32)]).astype(np.int32)
    initial = initial[np.lexsort((initial, first))]
    deadline = end[source] % step_count + next_pass * step_count
    actions = (page[source], page[evictions], start[evictions] + 1, deadline)
    return initial, tuple(array.astype(np.int32) for array in actions)  # type: ignore[return-value]
