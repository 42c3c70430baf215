# SPDX-License-Identifier: Apache-2.0
"""From a trace, budgets and hardware to a schedule with its certificate. Pure Python and numpy, scipy if installed.

Stages: `demand` turns tensors into groups of pages and gaps, `keeping` and `keeping_bound` propose how many pages stay
through each gap, `pacing` plays each proposal on the links' bandwidths, and the best one is kept. When everything fits,
nothing moves.

[Note: two tiers]
Host memory is a victim cache in front of the drive: a page is on the device, in the host tier or on the drive alone.
What stays above the drive is planned as if both budgets were one memory, what stays on the device by itself, and the
host holds the difference. The drive's bound is that of the joint memory, the device's that of the device alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tensorpager.budget import parse_bytes
from tensorpager.certificate import SECONDS_PER_DAY, Certificate
from tensorpager.demand import Demand, Int64Array, demand_of, occupied
from tensorpager.errors import BudgetError
from tensorpager.hardware import Hardware
from tensorpager.keeping import best_kept, dirty_drops, filled_up, lru_kept, repaired, traffic_of
from tensorpager.keeping_bound import TimeLimits, least_bytes, least_time
from tensorpager.linear_program import Float64Array, has_solver
from tensorpager.operator_trace import Trace
from tensorpager.pacing import WRITE_PATIENCE, Links, Pace, pace
from tensorpager.reorder import AS_TRACED, CHOICE_VALUES, Choices, alternatives
from tensorpager.schedule import Gap, PageGroup, Schedule, Use

__all__ = ["OBJECTIVES", "PAGE_BYTES", "Budgets", "plan"]

PAGE_BYTES = 2 << 20
OBJECTIVES = ("time", "bytes")
#: Shares of the frames that are left for reading ahead, where no solver finds the right one for each step.
READ_AHEAD_SHARES = (0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
#: With traces of up to so many steps, margins are tried; and where the pass then takes longer than its bound by more
#: than this share, longer patience with writes (pacing.py).
PATIENCE_GAIN = 0.01
TRIES_STEPS_MAX = 8192
MARGINS = (0, 4, 16, 32)
PATIENCES = (WRITE_PATIENCE * 2, WRITE_PATIENCE * 4)
#: Of two schedules whose times differ by less, the one that moves fewer bytes.
TIME_TOLERANCE = 0.002


@dataclass(frozen=True)
class Budgets:
    """Bytes of frames on the device, and of host memory used as a tier between it and the drive (0: none)."""

    device_bytes: int
    host_bytes: int = 0


def plan(
    trace: Trace,
    budgets: Budgets | int | str,
    hardware: Hardware,
    *,
    page_bytes: int = PAGE_BYTES,
    objective: str = "time",
    write_budget_bytes_per_day: float | None = None,
    choices: Choices | None = None,
) -> Schedule:
    """The schedule of a pass that is repeated for ever.

    budgets: an int or a text such as "24GiB" is the device's alone. objective: "time", the shortest pass; "bytes", the
    fewest moved. write_budget_bytes_per_day: what may be written to drives, on average; a pass takes longer where it
    has to. choices: which orders of the work to consider (reorder.py); None tries those that keep the trace's meaning
    and takes the best. Blocks for seconds on models of 70e9 parameters. BudgetError when a step does not fit, with the
    budget that would do; ValueError for arguments out of range.
    """
    budgets = _checked(budgets, page_bytes, objective, write_budget_bytes_per_day)
    choices = choices or Choices()
    chosen = {name: getattr(choices, name) or AS_TRACED for name in CHOICE_VALUES}
    order, impossible = _ordered(trace, chosen)
    if impossible:
        reason = f"not possible for {trace.name}: it would change a result, or nothing at all"
        msg = f"'{chosen[impossible]}' for {impossible} is {reason}"
        raise ValueError(msg)

    def planned(order: Trace, choice: dict[str, str], *, rough: bool) -> Schedule | BudgetError:
        arguments = (order, budgets, hardware, page_bytes, objective, write_budget_bytes_per_day)
        try:
            return _Planner(*arguments, rough=rough).schedule(choice)
        except BudgetError as error:
            return error

    is_open = any(getattr(choices, name) is None for name in CHOICE_VALUES)
    best = planned(order, chosen, rough=is_open)
    for name in CHOICE_VALUES:
        if getattr(choices, name) is not None or (isinstance(best, Schedule) and not best.transfers):
            continue  # where everything fits as it is, there is nothing to gain
        for value in CHOICE_VALUES[name]:
            order, impossible = _ordered(trace, {**chosen, name: value})
            made = best if impossible else planned(order, {**chosen, name: value}, rough=True)
            if _rank(made, objective) < _rank(best, objective):
                best = made
        if isinstance(best, Schedule):
            chosen = best.choices
    if isinstance(best, Schedule) and is_open and best.transfers:
        best = planned(_ordered(trace, chosen)[0], chosen, rough=False)
    if isinstance(best, BudgetError):
        raise best
    return best


def _ordered(trace: Trace, chosen: dict[str, str]) -> tuple[Trace, str]:
    """The trace with these choices made, each where the ones before have been; and the first that is not possible."""
    for name in CHOICE_VALUES:
        if chosen[name] == AS_TRACED:
            continue
        for value, changed in alternatives(trace, name):
            if value == chosen[name]:
                trace = changed
                break
        else:
            return trace, name
    return trace, ""


def _rank(schedule: Schedule | BudgetError, objective: str) -> tuple[float, float]:
    if isinstance(schedule, BudgetError):
        return (float("inf"), float("inf"))
    proof = schedule.certificate
    moved = proof.device_in_bytes + proof.device_out_bytes
    return (proof.pass_seconds, moved) if objective == "time" else (proof.drive_bytes, proof.pass_seconds)


def _checked(budgets: Budgets | int | str, page_bytes: int, objective: str, write_budget: float | None) -> Budgets:
    if not isinstance(budgets, Budgets):
        budgets = Budgets(parse_bytes(budgets))
    if page_bytes <= 0 or budgets.device_bytes < page_bytes or budgets.host_bytes < 0:
        msg = f"a budget of {budgets.device_bytes} bytes and pages of {page_bytes}: at least one page has to fit"
        raise ValueError(msg)
    if objective not in OBJECTIVES:
        msg = f"objective '{objective}' is none of {', '.join(OBJECTIVES)}"
        raise ValueError(msg)
    if write_budget is not None and not write_budget > 0:
        msg = f"write_budget_bytes_per_day {write_budget} must be positive"
        raise ValueError(msg)
    return budgets


@dataclass(frozen=True, eq=False)
class _Proposal:
    """What stays on the device and in the host tier, and how a pass goes with that."""

    kept: Int64Array
    host_kept: Int64Array
    pace: Pace
    drive_pages: int
    seconds: float


@dataclass(frozen=True, eq=False)
class _Bounds:
    device_pages: float | None
    drive_pages: float | None
    seconds: float


class _Planner:
    """One trace, one order of its work."""

    def __init__(
        self,
        trace: Trace,
        budgets: Budgets,
        hardware: Hardware,
        page_bytes: int,
        objective: str,
        write_budget: float | None,
        *,
        rough: bool,
    ) -> None:
        self._rough = rough
        self._trace, self._hardware, self._objective = trace, hardware, objective
        self._write_budget = write_budget
        self._page_bytes = page_bytes
        self._frames = budgets.device_bytes // page_bytes
        self._host_frames = budgets.host_bytes // page_bytes
        self._demand: Demand = demand_of(trace, page_bytes)
        self._room = self._frames - self._demand.in_use
        self._compute: Float64Array = np.array(
            [hardware.step_seconds(step.flops, step.moved_bytes) for step in trace.steps]
        )
        self._links = Links(
            drive_read=page_bytes / hardware.drive_read_bytes_per_second,
            drive_write=page_bytes / hardware.drive_write_bytes_per_second,
            to_device=_per_page(page_bytes, hardware.host_to_device_bytes_per_second),
            to_host=_per_page(page_bytes, hardware.device_to_host_bytes_per_second),
        )
        self._check_budget()

    def _check_budget(self) -> None:
        worst = int(np.argmin(self._room))
        if self._room[worst] >= 0:
            return
        step, needed = self._trace.steps[worst], int(self._demand.in_use[worst])
        where = f" in '{step.scope}'" if step.scope else ""
        msg = (
            f"step {worst} ({step.name}{where}) needs {needed * self._page_bytes} bytes at once ({needed} pages of "
            f"{self._page_bytes} bytes), and the budget holds {self._frames * self._page_bytes}. The smallest budget "
            f"that works is {int(self._demand.in_use.max()) * self._page_bytes} bytes; a smaller batch or shorter "
            "sequences need less."
        )
        raise BudgetError(msg)

    @cached_property
    def _lru_pages(self) -> int:
        """What LRU would move between drive and memory, both tiers as one; no schedule for time moves more."""
        gaps = self._demand.gaps
        return traffic_of(gaps, lru_kept(gaps, self._room + self._host_frames, self._demand.step_count)).total

    def schedule(self, choice: dict[str, str]) -> Schedule:
        gaps, count = self._demand.gaps, self._demand.step_count
        fits = bool(np.all(occupied(gaps, gaps.pages, count) <= self._room))
        if fits:
            best = self._played(gaps.pages, np.zeros_like(gaps.pages))
            bounds = _Bounds(0, 0, float(self._compute.sum()))
        else:
            proposals, bounds = self._proposals()
            best = self._best(proposals)
            if best.seconds > bounds.seconds * (1 + PATIENCE_GAIN) and count <= TRIES_STEPS_MAX:
                others = [self._played(best.kept, best.host_kept, patience) for patience in PATIENCES]
                best = self._best([best, *others])
        return self._schedule(choice, best, bounds)

    # -- proposals

    def _proposals(self) -> tuple[list[_Proposal], _Bounds]:
        """What may be worth it, and what is the best possible."""
        gaps, count = self._demand.gaps, self._demand.step_count
        joint_room = self._room + self._host_frames
        if not has_solver():
            rooms = [np.maximum(self._room - int(share * self._frames), 0) for share in READ_AHEAD_SHARES]
            kept = [best_kept(gaps, room, count) for room in rooms]
            above = best_kept(gaps, joint_room, count) if self._host_frames else None
            return [self._split(each, above) for each in kept], _Bounds(None, None, float(self._compute.sum()))
        fewest = least_bytes(gaps, self._room, count)
        soonest = least_time(gaps, self._room, count, self._limits(device=True), rough=self._rough)
        # Reading ahead needs the room that the optimum leaves, so what rounding lost is filled up to its level only.
        limits = [np.maximum(np.minimum(self._room, soonest.level) - margin, 0) for margin in self._margins()]
        whole = [(soonest.evenly_kept, room) for room in limits]
        if len(limits) > 1:  # in a trace of few steps a page more of a small tensor may count for more than even reads
            whole.append((soonest.kept, limits[0]))
        candidates = [filled_up(gaps, room, count, repaired(gaps, room, count, kept)) for kept, room in whole]
        candidates.append(best_kept(gaps, self._room, count, fewest.kept))
        if not self._host_frames:
            bounds = _Bounds(fewest.cost, fewest.cost, soonest.cost)
            return [self._split(kept, None) for kept in candidates], bounds
        joint = least_bytes(gaps, joint_room, count)
        joint_time = least_time(gaps, joint_room, count, self._limits(device=False), rough=self._rough)
        above = best_kept(gaps, joint_room, count, joint.kept)
        bounds = _Bounds(fewest.cost, joint.cost, max(joint_time.cost, soonest.cost))
        return [self._split(kept, over) for kept in candidates for over in (joint_time.kept, above)], bounds

    def _margins(self) -> tuple[int, ...]:
        """Pages to leave free beside the optimum's level: it may read a fraction of a page, and in any order."""
        return MARGINS if self._demand.step_count <= TRIES_STEPS_MAX and not self._rough else (0,)

    def _limits(self, *, device: bool) -> TimeLimits:
        """The links behind the device: without a host tier the drive's, held up by the slower of the two."""
        links = self._links
        if device and self._host_frames:
            return TimeLimits(
                self._compute, links.to_device or links.drive_read, links.to_host or links.drive_write, duplex=True
            )
        read, write = links.drive_read, links.drive_write
        if device:
            read, write = max(read, links.to_device), max(write, links.to_host)
        rate = None if self._write_budget is None else self._write_budget / SECONDS_PER_DAY / self._page_bytes
        return TimeLimits(self._compute, read, write, rate)

    def _split(self, kept: Int64Array, above: Int64Array | None) -> _Proposal:
        """Give the host tier what stays above the drive and not on the device."""
        if above is None:
            return self._played(kept, np.zeros_like(kept))
        gaps, count = self._demand.gaps, self._demand.step_count
        room = np.full(count, self._host_frames, np.int64)
        # A page takes its place in the host until it has arrived on the device, that is up to the step that needs it.
        until_there = replace(gaps, end=gaps.end + 1)
        return self._played(kept, repaired(until_there, room, count, np.maximum(above - kept, 0)))

    def _played(self, kept: Int64Array, host_kept: Int64Array, patience: float = WRITE_PATIENCE) -> _Proposal:
        played = pace(self._demand, kept, host_kept, self._compute.tolist(), self._links, self._frames, patience)
        written = int(dirty_drops(self._demand.gaps, kept + host_kept).sum())
        seconds = played.pass_seconds
        if self._write_budget is not None:
            seconds = max(seconds, written * self._page_bytes / self._write_budget * SECONDS_PER_DAY)
        return _Proposal(kept, host_kept, played, traffic_of(self._demand.gaps, kept + host_kept).total, seconds)

    def _best(self, proposals: list[_Proposal]) -> _Proposal:
        if self._objective == "bytes":
            return min(proposals, key=lambda each: (each.drive_pages, each.seconds))
        fair = [each for each in proposals if each.drive_pages <= self._lru_pages] or proposals
        enough = min(each.seconds for each in fair) * (1 + TIME_TOLERANCE)
        return min((each for each in fair if each.seconds <= enough), key=lambda each: each.drive_pages)

    # -- the result

    def _schedule(self, choice: dict[str, str], best: _Proposal, bounds: _Bounds) -> Schedule:
        return Schedule(
            trace_name=self._trace.name,
            hardware_name=self._hardware.name,
            page_bytes=self._page_bytes,
            device_frames=self._frames,
            host_frames=self._host_frames,
            working_set_pages=self._demand.working_set_pages,
            choices=choice,
            step_names=tuple(step.name for step in self._trace.steps),
            step_begin_seconds=tuple(best.pace.step_begin_seconds.tolist()),
            stall_seconds=tuple(best.pace.stall_seconds.tolist()),
            groups=self._groups(best),
            transfers=best.pace.transfers,
            certificate=self._certificate(best, bounds),
        )

    def _groups(self, best: _Proposal) -> tuple[PageGroup, ...]:
        demand, gaps = self._demand, self._demand.gaps
        uses: list[list[Use]] = [[] for _ in demand.group_tensors]
        between: list[list[Gap]] = [[] for _ in demand.group_tensors]
        for group, step, kind in zip(
            demand.use_group.tolist(), demand.use_step.tolist(), demand.use_kind.tolist(), strict=True
        ):
            uses[group].append(Use(step, kind))
        written = dirty_drops(gaps, best.kept + best.host_kept)
        columns = (gaps.group, gaps.start, gaps.end, best.kept, best.host_kept, written)
        for group, *values in zip(*(column.tolist() for column in columns), strict=True):
            between[group].append(Gap(*values))
        tensors = self._trace.tensors
        return tuple(
            PageGroup(
                tensors=tuple(tensors[number].name for number in members),
                pages=int(demand.group_pages[index]),
                size_bytes=sum(tensors[number].size_bytes for number in members),
                persists=bool(demand.group_persists[index]),
                uses=tuple(uses[index]),
                gaps=tuple(between[index]),
            )
            for index, members in enumerate(demand.group_tensors)
        )

    def _certificate(self, best: _Proposal, bounds: _Bounds) -> Certificate:
        gaps, size = self._demand.gaps, self._page_bytes
        above = best.kept + best.host_kept
        read, written = int((gaps.pages - above).sum()), int(dirty_drops(gaps, above).sum())
        compute = float(self._compute.sum())
        solved = bounds.drive_pages is not None
        return Certificate(
            device_in_bytes=int((gaps.pages - best.kept).sum()) * size,
            device_out_bytes=(int(best.host_kept.sum()) + written) * size,
            drive_read_bytes=read * size,
            drive_written_bytes=written * size,
            device_bound_bytes=None if bounds.device_pages is None else bounds.device_pages * size,
            drive_bound_bytes=None if bounds.drive_pages is None else bounds.drive_pages * size,
            lru_drive_bytes=self._lru_pages * size,
            pass_seconds=best.seconds,
            compute_seconds=compute,
            drive_seconds=best.pace.drive_busy_seconds,
            time_bound_seconds=bounds.seconds,
            stall_seconds=float(best.pace.stall_seconds.sum()),
            tokens=self._trace.tokens,
            break_even_tokens=self._break_even(best),
            drive_endurance_bytes=self._hardware.drive_endurance_bytes,
            proof="linear program, HiGHS" if solved else "none: install tensorpager[plan] for the linear program",
        )

    def _break_even(self, best: _Proposal) -> float | None:
        """See [Note: break-even tokens] in certificate.py."""
        tokens, gaps = self._trace.tokens, self._demand.gaps
        if not tokens:
            return None
        above = best.kept + best.host_kept
        per_gap = self._links.drive_read * (gaps.pages - above) + self._links.drive_write * dirty_drops(gaps, above)
        first_of = [self._trace.tensors[members[0]] for members in self._demand.group_tensors]
        lasting = np.array([tensor.kind != "activation" for tensor in first_of], np.bool_)
        of_lasting = lasting[gaps.group] if gaps.count else np.zeros(0, np.bool_)
        fixed = float(per_gap[of_lasting].sum())
        per_token = float(per_gap[~of_lasting].sum()) / tokens
        in_optimizer = np.array([step.phase == "optimizer" for step in self._trace.steps])
        flops = sum(step.flops for step in self._trace.steps if step.phase != "optimizer")
        compute_per_token = flops / self._hardware.flops_per_second / tokens
        if compute_per_token <= per_token:
            return float("inf")
        return max(0.0, (fixed - float(self._compute[in_optimizer].sum())) / (compute_per_token - per_token))


def _per_page(page_bytes: int, bytes_per_second: float) -> float:
    return page_bytes / bytes_per_second if bytes_per_second else 0.0
