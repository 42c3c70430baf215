# SPDX-License-Identifier: Apache-2.0
"""Carries out a played schedule page by page and moment by moment, and checks all that must hold.

It knows the trace and the transfers with their times, and nothing of how they were chosen: where each page's newest
content is, which frames are taken, and what every step may rely on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from tensorpager.demand import MODIFY, OVERWRITE, READ, Demand
from tensorpager.pacing import HOST, PASSES, History, Transfer

DEVICE_TIER, HOST_TIER, DRIVE_TIER = "device", "host", "drive"
EARLIER = 1e-9


@dataclass
class Page:
    """version: of its newest content. holds: tier -> the version there. until: when the last move in or out ended."""

    version: int = 0
    holds: dict[str, int] = field(default_factory=lambda: {DRIVE_TIER: 0})
    until: float = 0.0
    leaving: bool = False
    moving_out: bool = False


class Shadow:
    """Run check(); AssertionError says what does not hold."""

    def __init__(self, demand: Demand, kept: np.ndarray, host_kept: np.ndarray, frames: int, host_frames: int) -> None:
        self.demand, self.frames, self.host_frames = demand, frames, host_frames
        self.pages = {
            (group, page): Page() for group, size in enumerate(demand.group_pages.tolist()) for page in range(size)
        }
        self.taken = self.host_taken = 0
        self.taken_most = 0
        gaps = demand.gaps
        self.next: dict[tuple[int, int], tuple[int, int, int]] = {}
        never_written = self._never_written(kept + host_kept)
        for row in zip(*(part.tolist() for part in (gaps.group, gaps.start, gaps.end, kept, host_kept)), strict=True):
            group, start, end, stay, in_host = row
            self.next[group, start] = (end, stay, in_host)
            if end >= demand.step_count and demand.group_persists[group]:
                for page in range(stay + in_host):
                    if page < stay:
                        self._put(group, page)
                    else:
                        self.pages[group, page].holds[HOST_TIER] = 0
                        self.host_taken += 1
                    if page < never_written.get((group, start), 0):
                        del self.pages[group, page].holds[DRIVE_TIER]
        self.uses: dict[int, list[tuple[int, int]]] = {}
        for group, step, kind in zip(
            demand.use_group.tolist(), demand.use_step.tolist(), demand.use_kind.tolist(), strict=True
        ):
            self.uses.setdefault(step, []).append((group, kind))

    def _never_written(self, above: np.ndarray) -> dict[tuple[int, int], int]:
        """(group, start of the gap): pages that were changed, and since then always stayed above the drive."""
        gaps, result = self.demand.gaps, {}
        for version in set(gaps.version[gaps.version >= 0].tolist()):
            least = 1 << 60
            for gap in sorted(np.flatnonzero(gaps.version == version).tolist(), key=lambda gap: gaps.order[gap]):
                least = min(least, int(above[gap]))
                result[int(gaps.group[gap]), int(gaps.start[gap])] = least
        return result

    def _put(self, group: int, page: int) -> None:
        self.pages[group, page].holds[DEVICE_TIER] = self.pages[group, page].version
        self.taken += 1

    def check(self, history: History, compute: list[float]) -> None:
        """Play all events in order of time. At one moment: ends of transfers, of steps, beginnings of both."""
        count = self.demand.step_count
        events: list[tuple[float, int, int, object]] = []
        for index, moved in enumerate(history.transfers):
            events.append((moved.begin_seconds, 2, index, moved))
            events.append((moved.end_seconds, 0, index, moved))
        for step, begin in enumerate(history.begins):
            events.append((begin, 3, step, None))
            events.append((begin + compute[step % count], 1, step, None))
        # Steps without compute end and begin at one moment: they stay in their order, transfers go where they can.
        for _, kind, index, moved in _ordered(events):
            if kind == 3:
                self._step_begins(index)
            elif kind == 1:
                self._step_ends(index)
            else:
                assert isinstance(moved, Transfer)
                (self._transfer_ends if kind == 0 else self._transfer_begins)(moved)
            small = self.demand.small_pages
            self.taken_most = max(self.taken_most, self.taken)
            assert self.host_taken <= self.host_frames
            del small
        assert len(history.begins) == count * PASSES

    def _step_begins(self, step: int) -> None:
        count = self.demand.step_count
        for group, kind in self.uses.get(step % count, ()):
            for number in range(int(self.demand.group_pages[group])):
                page = self.pages[group, number]
                if kind != OVERWRITE:
                    held = page.holds.get(DEVICE_TIER)
                    assert held == page.version, f"step {step} finds page {number} of group {group} at {held}"
                elif DEVICE_TIER not in page.holds:
                    self._put(group, number)
                if kind in (MODIFY, OVERWRITE):
                    assert not page.moving_out, (
                        f"step {step} changes page {number} of group {group} while it is written"
                    )
                    page.version += 1
                    page.holds = {DEVICE_TIER: page.version}
                    page.leaving = False
        in_use = self.taken + int(self.demand.small_pages[step % count])
        assert in_use <= self.frames, f"step {step} begins with {in_use} frames of {self.frames}"

    def _step_ends(self, step: int) -> None:
        count = self.demand.step_count
        for group, _ in self.uses.get(step % count, ()):
            size = int(self.demand.group_pages[group])
            after = self.next.get((group, step % count))
            _, stay, in_host = after if after is not None else (0, 0, 0)
            for number in range(stay, size):
                page = self.pages[group, number]
                if after is None:
                    self._free(page)  # dead
                elif number < stay + in_host or page.holds.get(DRIVE_TIER) != page.version or page.moving_out:
                    page.leaving = True
                else:
                    self._free(page)

    def _free(self, page: Page) -> None:
        if page.holds.pop(DEVICE_TIER, None) is not None:
            self.taken -= 1

    def _transfer_begins(self, moved: Transfer) -> None:
        for number in range(moved.first, moved.first + moved.count):
            page = self.pages[moved.group, number]
            assert page.until <= moved.begin_seconds + 1e-9, "a page moves twice at one time"
            if moved.page_in:
                source = HOST_TIER if moved.tier == HOST else DRIVE_TIER
                assert page.holds.get(source) == page.version, f"{moved} reads stale content"
                assert DEVICE_TIER not in page.holds, f"{moved} brings what is there"
                page.holds[DEVICE_TIER] = -1
                self.taken += 1
            else:
                assert page.holds.get(DEVICE_TIER) == page.version, f"{moved} writes what is not there"
                assert page.leaving or moved.tier != HOST, f"{moved} leaves before its last use"
                page.moving_out = True
                self.host_taken += moved.tier == HOST
            page.until = moved.end_seconds

    def _transfer_ends(self, moved: Transfer) -> None:
        for number in range(moved.first, moved.first + moved.count):
            page = self.pages[moved.group, number]
            if moved.page_in:
                page.holds[DEVICE_TIER] = page.version
                if moved.tier == HOST:
                    page.holds.pop(HOST_TIER)
                    self.host_taken -= 1
            else:
                page.holds[HOST_TIER if moved.tier == HOST else DRIVE_TIER] = page.version
                page.moving_out = False
                if page.leaving:
                    page.leaving = False
                    self._free(page)


def _ordered(events: list[tuple[float, int, int, object]]) -> Iterator[tuple[float, int, int, object]]:
    """By time; where times are equal up to rounding, in the order in which things cause one another."""
    steps = sorted((event for event in events if event[1] in (1, 3)), key=lambda event: (event[2], -event[1]))
    transfers = sorted(
        (event for event in events if event[1] in (0, 2)), key=lambda event: (round(event[0], 9), event[1])
    )
    place = 0
    for event in steps:
        # A step's beginning comes after all that ends by then; its end comes before what begins then.
        while place < len(transfers):
            moment, kind = transfers[place][:2]
            early = moment < event[0] - EARLIER or (moment <= event[0] + EARLIER and (kind == 0 or event[1] == 3))
            if not early:
                break
            yield transfers[place]
            place += 1
        yield event
    yield from transfers[place:]


assert READ == 0
