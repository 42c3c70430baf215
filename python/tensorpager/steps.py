# SPDX-License-Identifier: Apache-2.0
"""What one pass of a model needs, step by step: recorded windows turned into steps, use classes and gaps.

A *set* is the pages one module call (or one stray access) needs. A *window* lies between its acquire and its release;
windows nest and overlap. Every acquire is a *step*. A pass is repeated for ever, so steps lie on a circle.

Pages that are needed by exactly the same sets are interchangeable. They form a *use class* (most often: the pages of
one tensor), and everything after this file counts pages per class instead of following 70,000 of them.

A class is in use in *runs* of consecutive steps. Between two runs lies a *gap*: the only choice a plan has is how
many of the class's pages stay resident through each gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of one pass.

    step_set: int32 [S], the set acquired by each step. step_end: int32 [S], the last step at whose acquire that window
    is still open (its own index or more): the window is released after the acquire of step_end[j] and before the next.
    set_pages: for each set that occurs in step_set its pages, int32, ascending, each once.
    """

    step_set: Int32Array
    step_end: Int32Array
    set_pages: Mapping[int, Int32Array]

    def __post_init__(self) -> None:
        if self.step_set.ndim != 1 or self.step_set.shape != self.step_end.shape:
            msg = f"step_set {self.step_set.shape} and step_end {self.step_end.shape} must be equally long vectors"
            raise ValueError(msg)
        if len(self.step_set) == 0:
            msg = "a pass needs at least one step: nothing was acquired while it was recorded"
            raise ValueError(msg)
        index = np.arange(len(self.step_set))
        if bool(np.any(self.step_end < index)) or bool(np.any(self.step_end >= len(index))):
            msg = "step_end[j] must lie between j and the last step"
            raise ValueError(msg)

    @property
    def count(self) -> int:
        """Number of steps of one pass."""
        return len(self.step_set)


def steps_from_events(events: npt.ArrayLike, set_pages: Mapping[int, npt.ArrayLike] | Sequence[npt.ArrayLike]) -> Steps:
    """Turn the recorded events of one pass into steps.

    events: integers [E] in order: +(set_id + 1) acquires, -(set_id + 1) releases. set_pages: set id -> pages (any
    order, repeats allowed). ValueError when a release has no open window, a window stays open, a set has no entry in
    set_pages, or nothing was acquired.
    """
    event_list = _integer_vector(events, "events").tolist()
    step_set: list[int] = []
    step_end: list[int] = []
    open_steps: dict[int, list[int]] = {}
    for position, event in enumerate(event_list):
        if event == 0:
            msg = f"event {position} is 0: acquires are positive and releases negative"
            raise ValueError(msg)
        set_id = abs(event) - 1
        if event > 0:
            open_steps.setdefault(set_id, []).append(len(step_set))
            step_set.append(set_id)
            step_end.append(-1)
            continue
        if not open_steps.get(set_id):
            msg = f"event {position} releases set {set_id}, which is not acquired at that point"
            raise ValueError(msg)
        step_end[open_steps[set_id].pop()] = len(step_set) - 1
    left_open = [set_id for set_id, opened in open_steps.items() if opened]
    if left_open:
        msg = (
            f"set {left_open[0]} is acquired and never released ({len(left_open)} such sets): "
            "the recording ended inside a step, so it is not a whole pass"
        )
        raise ValueError(msg)
    pages = {set_id: _page_vector(set_pages, set_id) for set_id in sorted(open_steps)}
    return Steps(np.array(step_set, np.int32), np.array(step_end, np.int32), pages)


def _integer_vector(values: npt.ArrayLike, name: str) -> npt.NDArray[np.integer]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size > 0 and not np.issubdtype(array.dtype, np.integer)):
        msg = f"{name} must be a vector of integers, not {array.dtype} {array.shape}"
        raise ValueError(msg)
    return array.astype(np.int64)


def _page_vector(set_pages: Mapping[int, npt.ArrayLike] | Sequence[npt.ArrayLike], set_id: int) -> Int32Array:
    try:
        values = set_pages[set_id]
    except (KeyError, IndexError):
        msg = f"the events acquire set {set_id}, which set_pages does not hold"
        raise ValueError(msg) from None
    pages = np.unique(_integer_vector(values, f"set_pages[{set_id}]"))
    if len(pages) and (pages[0] < 0 or pages[-1] > INT32_MAX):
        msg = f"set_pages[{set_id}] holds page {pages[0]} to {pages[-1]}: outside 0..{INT32_MAX}"
        raise ValueError(msg)
    return pages.astype(np.int32)


@dataclass(frozen=True, eq=False)
class UseClasses:
    """Pages grouped by identical use, and the gaps between their uses.

    pages: one int32 array per class, ascending; classes in order of first use, then of first page.
    first_use: int64 [classes], the first step of the pass that needs the class.
    step_pages: int64 [S], pages in use at each step (all open windows together).
    own_pages: int64 [S], pages of the set each step acquires.
    gap_class, gap_start, gap_end, gap_pages: int64 [G]. The class is used at step gap_start (last step of a run) and
    next at gap_end, start < end < start + S + 1; gap_end >= S lies in the next pass. gap_pages is the size of the
    class. Every class has exactly one gap that leaves the pass.
    """

    step_count: int
    pages: list[Int32Array]
    first_use: Int64Array
    step_pages: Int64Array
    own_pages: Int64Array
    gap_class: Int64Array
    gap_start: Int64Array
    gap_end: Int64Array
    gap_pages: Int64Array

    @property
    def page_total(self) -> int:
        """Pages the pass uses at all."""
        return sum(len(pages) for pages in self.pages)


def use_classes(steps: Steps, other_facts: Mapping[int, object] | None = None) -> UseClasses:
    """Group the pages of a pass into classes and list their gaps. Costs about one sort of all (set, page) pairs.

    other_facts: by page, hashable; pages of which they differ are not interchangeable.
    """
    set_runs = _set_runs(steps)
    groups = []
    for members, pages in _group_pages(steps):
        runs = _merge_runs([run for set_id in members for run in set_runs[set_id]])
        groups += [(runs, part) for part in _by_fact(pages, other_facts)]
    groups.sort(key=lambda group: (group[0][0][0], int(group[1][0])))
    gaps: list[tuple[int, int, int, int]] = []
    change = np.zeros(steps.count + 1, np.int64)
    for index, (runs, pages) in enumerate(groups):
        for position, (first, last) in enumerate(runs):
            change[first] += len(pages)
            change[last + 1] -= len(pages)
            following = runs[position + 1][0] if position + 1 < len(runs) else runs[0][0] + steps.count
            gaps.append((index, last, following, len(pages)))
    gaps.sort(key=lambda gap: (gap[1], gap[0]))
    table = np.array(gaps, np.int64).reshape(-1, 4)
    return UseClasses(
        step_count=steps.count,
        pages=[pages for _, pages in groups],
        first_use=np.array([runs[0][0] for runs, _ in groups], np.int64),
        step_pages=np.cumsum(change[:-1]),
        own_pages=np.array([len(steps.set_pages[int(set_id)]) for set_id in steps.step_set], np.int64),
        gap_class=table[:, 0],
        gap_start=table[:, 1],
        gap_end=table[:, 2],
        gap_pages=table[:, 3],
    )


def _by_fact(pages: Int32Array, facts: Mapping[int, object] | None) -> list[Int32Array]:
    if not facts:
        return [pages]
    parts: dict[object, list[int]] = {}
    for page in pages.tolist():
        parts.setdefault(facts.get(page), []).append(page)
    return [np.array(part, np.int32) for part in parts.values()]


def _set_runs(steps: Steps) -> dict[int, list[tuple[int, int]]]:
    runs: dict[int, list[tuple[int, int]]] = {}
    for index, (set_id, end) in enumerate(zip(steps.step_set.tolist(), steps.step_end.tolist(), strict=True)):
        runs.setdefault(set_id, []).append((index, end))
    return runs


def _merge_runs(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join windows that overlap or touch: nothing can be dropped between two uses at neighbouring steps."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(runs):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


def _group_pages(steps: Steps) -> list[tuple[list[int], Int32Array]]:
    """Partition the used pages by which sets hold them: [(set ids, pages)].

    Partition refinement: all pages start in one group; every set splits each group it touches in two.
    """
    set_ids = sorted(set(steps.step_set.tolist()))
    arrays = [steps.set_pages[set_id] for set_id in set_ids]
    used = np.unique(np.concatenate(arrays)) if arrays else np.zeros(0, np.int32)
    label = np.zeros(len(used), np.int64)
    label_count = 1
    places = [np.searchsorted(used, pages) for pages in arrays]
    for place in places:
        touched, inverse = np.unique(label[place], return_inverse=True)
        label[place] = label_count + inverse
        label_count += len(touched)
    _, first, label = np.unique(label, return_index=True, return_inverse=True)
    members: list[list[int]] = [[] for _ in first]
    is_representative = np.zeros(len(used), bool)
    is_representative[first] = True
    for set_id, place in zip(set_ids, places, strict=True):
        for group in label[place[is_representative[place]]].tolist():
            members[group].append(set_id)
    order = np.argsort(label, kind="stable")
    bounds = np.cumsum(np.bincount(label, minlength=len(first)))[:-1]
    pages_of_group = np.split(used[order].astype(np.int32), bounds) if len(used) else []
    return list(zip(members, pages_of_group, strict=True))
