# SPDX-License-Identifier: Apache-2.0
"""A schedule as plain data: what every group of pages does between its uses, every transfer with its times, and why.

`planner.plan` makes one. It describes one pass of a trace, repeated for ever, and refers to nothing outside itself.
`page_schedule.PageSchedule` is the other kind: page numbers alone, which the core carries out for a paged module.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from typing import Any

from tensorpager.certificate import Certificate
from tensorpager.pacing import DRIVE, HOST, Transfer

__all__ = ["Gap", "PageGroup", "Schedule", "Use"]

SCHEDULE_FORMAT = "tensorpager-tensor-schedule"
SCHEDULE_VERSION = 1
KIND_WORDS = ("reads", "changes", "overwrites")


@dataclass(frozen=True)
class Use:
    """A step's use of a group. kind: READ, MODIFY or OVERWRITE of demand.py."""

    step: int
    kind: int


@dataclass(frozen=True)
class Gap:
    """Between two uses: start, end (of the next pass where it is the number of steps or more). Of the group's pages,
    the first `kept` stay on the device, the next `host_kept` wait in the host tier, the others leave it for the drive;
    the last `written` of those that stay above the drive or not are written because they changed."""

    start: int
    end: int
    kept: int
    host_kept: int
    written: int


@dataclass(frozen=True)
class PageGroup:
    """Pages that are paged alike: a tensor, or small ones that share a page. size_bytes: of the tensors."""

    tensors: tuple[str, ...]
    pages: int
    size_bytes: int
    persists: bool
    uses: tuple[Use, ...]
    gaps: tuple[Gap, ...]


@dataclass(frozen=True)
class Schedule:
    """See the head of the file.

    device_frames, host_frames: what the budgets hold. step_names, step_begin_seconds, stall_seconds: one each per step.
    transfers: in order of their beginning; seconds from the beginning of the pass. choices: what was chosen, by name.
    working_set_pages: frames with which nothing would move.
    """

    trace_name: str
    hardware_name: str
    page_bytes: int
    device_frames: int
    host_frames: int
    working_set_pages: int
    choices: dict[str, str]
    step_names: tuple[str, ...]
    step_begin_seconds: tuple[float, ...]
    stall_seconds: tuple[float, ...]
    groups: tuple[PageGroup, ...]
    transfers: tuple[Transfer, ...]
    certificate: Certificate

    @property
    def step_count(self) -> int:
        """Number of steps of a pass."""
        return len(self.step_names)

    def explain(self, tensor: str) -> str:
        """Where a tensor lives when, why it left, its next use and the stall it caused. KeyError names close ones."""
        group = self._group_of(tensor)
        return "\n".join(self._explanation(tensor, group))

    def _group_of(self, tensor: str) -> int:
        for index, group in enumerate(self.groups):
            if tensor in group.tensors:
                return index
        from difflib import get_close_matches

        names = [name for group in self.groups for name in group.tensors]
        close = get_close_matches(tensor, names, 3) or names[:3]
        msg = (
            f"no scheduled tensor is named '{tensor}'; there are {', '.join(close)} (tensors of a pass that are "
            "smaller than a page stay resident and are not scheduled)"
        )
        raise KeyError(msg)

    def _explanation(self, tensor: str, index: int) -> Iterator[str]:
        group = self.groups[index]
        others = len(group.tensors) - 1
        shared = f", on a page shared with {others} other small tensors" if others else ""
        lasting = "outlives the pass" if group.persists else "dies in the pass"
        yield f"{tensor}: {group.pages} pages of {self.page_bytes} bytes{shared}; {lasting}."
        by_start = {gap.start: gap for gap in group.gaps}
        for use in group.uses:
            yield f"  step {use.step} ({self.step_names[use.step]}) {KIND_WORDS[use.kind]} it" + self._wait(index, use)
            yield "    " + self._after(group, by_start.get(use.step))

    def _wait(self, index: int, use: Use) -> str:
        ends: dict[int, float] = {}
        for moved in self.transfers:
            if moved.page_in and moved.step % self.step_count == use.step:
                # What was read ahead for the next pass was read by this one's beginning in the pass before.
                end = moved.end_seconds - moved.step // self.step_count * self.certificate.pass_seconds
                ends[moved.group] = max(ends.get(moved.group, -math.inf), end)
        stall = self.stall_seconds[use.step]
        if stall <= 0 or index not in ends:
            return "; no wait for it."
        is_last = ends[index] >= max(ends.values())
        cause = "for this tensor" if is_last else "longest for another tensor"
        return f"; the step waits {stall * 1e3:.3f} ms, {cause}."

    def _after(self, group: PageGroup, gap: Gap | None) -> str:
        if gap is None:
            return "Then its content is dead: its frames are free at once, and nothing is written."
        ahead = (gap.end - gap.start) % self.step_count or self.step_count
        following = f"next use at step {gap.end % self.step_count}, {ahead} steps later"
        if gap.kept == group.pages:
            return f"Stays on the device; {following}."
        parts = [f"{gap.kept} pages stay on the device"]
        if gap.host_kept:
            parts.append(f"{gap.host_kept} wait in the host tier")
        leaving = group.pages - gap.kept - gap.host_kept
        if leaving:
            state = f"{gap.written} of them are written" if gap.written else "no write, the drive has the same content"
            parts.append(f"{leaving} leave it for the drive ({state})")
        why = "others are needed sooner, or cost more to bring back"
        return f"{', '.join(parts)}: {why}; {following}."

    # -- JSON

    def to_json(self) -> str:
        """The same schedule always gives the same text, byte for byte."""
        content: dict[str, Any] = {"format": SCHEDULE_FORMAT, "version": SCHEDULE_VERSION}
        for item in fields(self):
            content[item.name] = getattr(self, item.name)
        content["groups"] = [
            [
                list(group.tensors),
                group.pages,
                group.size_bytes,
                group.persists,
                [[use.step, use.kind] for use in group.uses],
                [[gap.start, gap.end, gap.kept, gap.host_kept, gap.written] for gap in group.gaps],
            ]
            for group in self.groups
        ]
        content["transfers"] = [[getattr(moved, name) for name in _TRANSFER_FIELDS] for moved in self.transfers]
        content["certificate"] = {
            name: "inf" if value == math.inf else value for name, value in asdict(self.certificate).items()
        }
        return json.dumps(content, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Read to_json()'s text. ValueError that names the rule when the text breaks one."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: also for integers of thousands of digits
            msg = f"schedule: not JSON: {error}"
            raise ValueError(msg) from None
        _require(isinstance(content, dict), "the text is one JSON object")
        _require(content.pop("format", None) == SCHEDULE_FORMAT, f'"format" is "{SCHEDULE_FORMAT}"')
        version = content.pop("version", None)
        _require(type(version) is int and version == SCHEDULE_VERSION, f'"version" is {SCHEDULE_VERSION}')
        names = {item.name for item in fields(cls)}
        _require(content.keys() == names, f"exactly the known fields ({sorted(content.keys() ^ names)} differ)")
        try:
            content["groups"] = tuple(_group(row) for row in content["groups"])
            content["transfers"] = tuple(Transfer(*row) for row in content["transfers"])
            numbers: dict[str, Any] = content["certificate"]
            numbers = {name: math.inf if value == "inf" else value for name, value in numbers.items()}
            content["certificate"] = Certificate(**numbers)
            for name in ("step_names", "step_begin_seconds", "stall_seconds"):
                content[name] = tuple(content[name])
            schedule = cls(**content)
        except (TypeError, ValueError, AttributeError) as error:
            msg = f"schedule breaks a rule: every part has its fields ({error})"
            raise ValueError(msg) from None
        _check(schedule)
        return schedule


_TRANSFER_FIELDS = [item.name for item in fields(Transfer)]


def _group(row: Any) -> PageGroup:
    tensors, pages, size_bytes, persists, uses, gaps = row
    return PageGroup(
        tuple(tensors), pages, size_bytes, persists, tuple(Use(*use) for use in uses), tuple(Gap(*gap) for gap in gaps)
    )


def _require(holds: bool, rule: str) -> None:
    if not holds:
        msg = f"schedule breaks a rule: {rule}"
        raise ValueError(msg)


def _check(schedule: Schedule) -> None:
    """Texts are texts, numbers are numbers in range, and what is kept fits the budgets at every step."""
    count = schedule.step_count
    sizes = (schedule.page_bytes, schedule.device_frames, schedule.host_frames, schedule.working_set_pages)
    _require(all(type(size) is int and size >= 0 for size in sizes) and sizes[0] > 0, "sizes are 0 or more")
    lengths = {count, len(schedule.step_begin_seconds), len(schedule.stall_seconds)}
    _require(lengths == {count} and count > 0, "one name, beginning and stall per step")
    _require(isinstance(schedule.choices, dict), "choices are a mapping")
    names = (schedule.trace_name, schedule.hardware_name, *schedule.step_names, *schedule.choices.values())
    _require(all(isinstance(name, str) for name in names), "names and choices are texts")
    seconds = (*schedule.step_begin_seconds, *schedule.stall_seconds)
    _require(all(_is_amount(value) for value in seconds), "seconds are 0 or more, and finite")
    for index, group in enumerate(schedule.groups):
        _require(all(isinstance(name, str) for name in group.tensors), f"the tensors of group {index} are texts")
        _require(type(group.pages) is int and group.pages > 0, f"group {index} has pages")
        for use in group.uses:
            good = type(use.step) is int and 0 <= use.step < count
            good = good and type(use.kind) is int and 0 <= use.kind < len(KIND_WORDS)
            _require(good, f"the uses of group {index} are steps and kinds")
        for gap in group.gaps:
            good = all(type(value) is int and value >= 0 for value in vars(gap).values())
            _require(good and gap.start < count, f"the gaps of group {index} are numbers in range")
            _require(gap.start < gap.end <= gap.start + count, f"the gaps of group {index} end after their start")
            _require(gap.kept + gap.host_kept <= group.pages, f"group {index} keeps no more than it has")
            _require(gap.written <= group.pages, f"group {index} writes no more than it has")
    _check_frames(schedule)
    _check_transfers(schedule)
    for name, value in asdict(schedule.certificate).items():
        if name == "proof":
            _require(isinstance(value, str), "the certificate's proof is a text")
        elif not (name in _OPTIONAL_NUMBERS and value in (None, math.inf)):
            _require(_is_amount(value), f"{name} of the certificate is 0 or more")


_OPTIONAL_NUMBERS = ("device_bound_bytes", "drive_bound_bytes", "break_even_tokens")


def _is_amount(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]


def _check_frames(schedule: Schedule) -> None:
    count = schedule.step_count
    changes = {"device": [0] * (2 * count + 1), "host": [0] * (2 * count + 1)}
    for group in schedule.groups:
        spans = [("device", use.step, use.step + 1, group.pages) for use in group.uses]
        for gap in group.gaps:
            spans += [("device", gap.start + 1, gap.end, gap.kept), ("host", gap.start + 1, gap.end, gap.host_kept)]
        for tier, begin, end, pages in spans:
            changes[tier][begin] += pages
            changes[tier][end] -= pages
    for tier, frames in (("device", schedule.device_frames), ("host", schedule.host_frames)):
        level = list(accumulate(changes[tier]))
        for step in range(count):
            held = level[step] + level[step + count]
            _require(held <= frames, f"step {step} holds {held} pages, and {tier}_frames is {frames}")


def _check_transfers(schedule: Schedule) -> None:
    for moved in schedule.transfers:
        numbers = (moved.group, moved.first, moved.count, moved.tier, moved.step)
        good = all(type(number) is int for number in numbers) and type(moved.page_in) is bool
        good = good and 0 <= moved.group < len(schedule.groups) and moved.tier in (DRIVE, HOST)
        _require(good, "transfers are of groups, from or to a tier")
        size = schedule.groups[moved.group].pages
        _require(0 <= moved.first < moved.first + moved.count <= size, "transfers are of pages of their group")
        good = _is_amount(moved.begin_seconds) and _is_amount(moved.end_seconds)
        _require(good and moved.begin_seconds <= moved.end_seconds, "transfers end after they begin")
