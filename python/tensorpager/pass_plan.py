# SPDX-License-Identifier: Apache-2.0
"""From the steps of a pass to a schedule: which pages stay, which are read when, and over what.

Needs neither torch nor the native module. Three stages: `use_classes` counts interchangeable pages together, `policy`
and `readahead` decide how many of each stay resident through each gap between uses, and this file turns the counts into
pages and pairs every page-in with the eviction that makes room for it.

[Note: pairing]
Put the evictions of a pass in order of the evicted page's last use, and the page-ins in order of the step that needs
them. Beside the pages kept across the start of the pass there are `ahead` free frames, so page-in number k can start
as soon as eviction number k - ahead is possible: first in, first out. No other pairing lets any page-in start
earlier, and none reads fewer bytes. An action belongs to the pass of its eviction; the last `ahead` page-ins of a
pass are for the next one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tensorpager.contents import Contents, content_classes, content_gaps, keep_for_bytes
from tensorpager.departures import Departures, departures_of_contents, departures_of_kept, frames_ahead
from tensorpager.errors import BudgetError
from tensorpager.keeping import traffic_of
from tensorpager.page_schedule import PageSchedule, Simulation, simulate
from tensorpager.policy import belady_page_ins, circle_of, lru_page_ins, page_in_bound, place_prices
from tensorpager.readahead import choose_kept
from tensorpager.steps import INT32_MAX, Int32Array, Steps, UseClasses, steps_from_events, use_classes

__all__ = [
    "PageSchedule",
    "Simulation",
    "Steps",
    "belady_page_ins",
    "lru_page_ins",
    "plan_pass",
    "simulate",
    "steps_from_events",
]


def plan_pass(
    steps: Steps,
    *,
    frame_count: int,
    page_bytes: int,
    page_count: int,
    step_name: Callable[[int], str] | None = None,
    read_ahead: float | None = None,
    contents: Contents | None = None,
) -> PageSchedule:
    """The schedule for a pass that is repeated for ever, in frame_count frames of page_bytes each.

    page_count: pages of the address space; every page of the steps lies below it (ValueError otherwise). step_name:
    names a step for messages. read_ahead: frames to leave for reading ahead at each step, per page the step acquires; 0
    gives the fewest page-ins, None the least time in a model of the pass (readahead.py). contents: what the pass does
    to them; then the fewest bytes are moved, written ones included, nearly (contents.py). BudgetError when the pages in
    use at one step do not fit, with the budget that would do.
    """
    if min(frame_count, page_bytes) <= 0:
        msg = f"frame_count {frame_count} and page_bytes {page_bytes} must be positive"
        raise ValueError(msg)
    if read_ahead is not None and not 0 <= read_ahead < INT32_MAX:
        msg = f"read_ahead {read_ahead} must be 0 or more frames per page"
        raise ValueError(msg)
    classes, notes = (use_classes(steps), []) if contents is None else content_classes(steps, contents)
    _check_pages(classes, page_count)
    _check_budget(steps, classes, frame_count, page_bytes, step_name)
    departures = departures_of_kept(classes, classes.gap_pages.tolist())
    bound = moved_bound = 0.0
    moved: int | None = None
    if classes.page_total > frame_count:
        circle, room = circle_of(classes), frame_count - classes.step_pages
        prices = place_prices(circle, room)
        bound = page_in_bound(circle, room, prices)
        if contents is None:
            departures = departures_of_kept(classes, choose_kept(classes, circle, prices, frame_count, read_ahead))
        else:
            gaps = content_gaps(classes, notes)
            kept, moved_bound = keep_for_bytes(classes, gaps, room, read_ahead)
            moved = traffic_of(gaps.gaps, kept).total
            departures = departures_of_contents(classes, gaps, kept, room, frame_count)
        moved_bound = moved_bound if contents is not None else bound
    page_ins = departures.page_count
    accesses = int(classes.own_pages.sum())
    initial, actions = _pair(classes, departures, frame_count)
    return PageSchedule(
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
        moved_pages_per_pass=page_ins if moved is None else moved,
        lower_bound_moved_pages=moved_bound,
        working_set_pages=classes.page_total,
        largest_step_pages=int(classes.step_pages.max()),
    )


def _check_pages(classes: UseClasses, page_count: int) -> None:
    largest = max((int(pages[-1]) for pages in classes.pages), default=-1)
    if largest >= page_count:
        msg = f"the steps use page {largest}, and the address space has {page_count} pages"
        raise ValueError(msg)


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
    msg = (
        f"step {worst} ({name}) needs {needed * page_bytes} bytes at once "
        f"({needed} pages of {page_bytes} bytes{beside}), "
        f"and the budget holds {frame_count * page_bytes} ({frame_count} frames). "
        f"The smallest budget that works is {needed * page_bytes} bytes."
    )
    raise BudgetError(msg)


def _pair(classes: UseClasses, departures: Departures, frame_count: int) -> tuple[Int32Array, Int32Array]:
    """(initial_pages [I], actions [4, A]: page_in, evict, step, deadline); see [Note: pairing]."""
    count = classes.step_count
    after, due = np.repeat(departures.after, departures.count), np.repeat(departures.due, departures.count)
    page = departures.pages(classes)
    ahead = frames_ahead(classes, departures, frame_count)
    evictions = np.lexsort((page, -due, after))
    page_ins = np.lexsort((page, due % count))
    source = np.roll(page_ins, -ahead)
    in_next_pass = np.arange(len(page)) >= len(page) - ahead
    deadline = due[source] % count + in_next_pass * count
    actions = np.stack([page[source], page[evictions], after[evictions] + 1, deadline]).astype(np.int32)

    absent = page[due >= count]
    used = _joined(classes.pages)
    first_use = np.repeat(classes.first_use, [len(pages) for pages in classes.pages])
    stays = ~np.isin(used, absent)
    initial = _joined([used[stays], page[page_ins[:ahead]]])
    needed_at = np.concatenate([first_use[stays], due[page_ins[:ahead]] % count])
    return initial[np.lexsort((initial, needed_at))], actions


def _joined(parts: list[Int32Array]) -> Int32Array:
    return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)
