# SPDX-License-Identifier: Apache-2.0
"""Orders of the same work: a trace changed so that it computes the same and may move less.

Three choices, each found by looking at what the steps use, and left out where it would change a result:

* optimizer, "inside backward": each optimizer step right after the last one it depends on, so that a gradient dies as
  soon as it is complete. Clipping by the global norm makes every update depend on every gradient; then nothing moves.
* accumulation, "vertical": every block runs all microbatches before the next block does, so that its weights come in
  once. Gradients still accumulate in the order of the microbatches, bit for bit. Random numbers are drawn in another
  order.
* recompute, "every block" or "every other block": a block's activations die in the forward pass, and its forward steps
  run again before its backward ones, from the block's input.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tensorpager.operator_trace import Trace, TraceStep, TraceTensor

__all__ = ["AS_TRACED", "CHOICE_VALUES", "Choices", "alternatives"]

AS_TRACED = "as traced"
INSIDE, VERTICAL, EVERY, EVERY_OTHER = "inside backward", "vertical", "every block", "every other block"
#: What each choice can be, beside AS_TRACED; in the order in which they are made.
CHOICE_VALUES = {"accumulation": (VERTICAL,), "recompute": (EVERY, EVERY_OTHER), "optimizer": (INSIDE,)}

_BLOCK = re.compile(r"^(.*?\.\d+|\d+)(?:\.|$)")


@dataclass(frozen=True)
class Choices:
    """A value of CHOICE_VALUES or AS_TRACED fixes a choice, None leaves it to the planner. ValueError for others."""

    optimizer: str | None = None
    accumulation: str | None = None
    recompute: str | None = None

    def __post_init__(self) -> None:
        for name, known in CHOICE_VALUES.items():
            value = getattr(self, name)
            if value not in (None, AS_TRACED, *known):
                msg = f"{name} '{value}' is none of {', '.join((AS_TRACED, *known))}"
                raise ValueError(msg)


def alternatives(trace: Trace, name: str) -> Iterator[tuple[str, Trace]]:
    """(value, changed trace) for each value of a choice that is possible here and changes anything."""
    for value in CHOICE_VALUES[name]:
        if name == "optimizer":
            changed = _optimizer_inside(trace)
        elif name == "accumulation":
            changed = _vertical(trace)
        else:
            changed = _recomputed(trace, 1 if value == EVERY else 2)
        if changed is not None:
            yield value, changed


def _optimizer_inside(trace: Trace) -> Trace | None:
    """Each optimizer step goes behind the last step it depends on."""
    last_write: dict[int, int] = {}
    last_use: dict[int, int] = {}
    place: list[int] = []
    for index, step in enumerate(trace.steps):
        position = index
        if step.phase == "optimizer":
            needed = [last_write.get(number, 0) for number in step.uses]
            needed += [last_use.get(number, 0) for number in (*step.writes, *step.overwrites)]
            position = max(needed, default=0)
        place.append(position)
        for number in step.uses:
            last_use[number] = max(last_use.get(number, 0), position)
        for number in (*step.writes, *step.overwrites):
            last_write[number] = position
    is_optimizer = [step.phase == "optimizer" for step in trace.steps]
    order = sorted(range(len(place)), key=lambda index: (place[index], is_optimizer[index], index))
    return _in_order(trace, order, "optimizer inside backward")


def _vertical(trace: Trace) -> Trace | None:
    last = max(step.microbatch for step in trace.steps)
    count = last + 1
    if last == 0:
        return None
    per_batch: list[list[list[int]]] = [[] for _ in range(count)]
    labels: list[list[tuple[bool, str]]] = [[] for _ in range(count)]
    tail = [index for index, step in enumerate(trace.steps) if step.phase == "optimizer"]
    blocks = _blocks(trace)
    for index, step in enumerate(trace.steps):
        if step.phase == "optimizer":
            continue
        label = (step.phase == "forward", blocks[index])
        batch = step.microbatch
        if labels[batch] == [(True, "")]:
            labels[batch] = [label]  # what comes before the first block, such as the inputs, goes with it
        if not labels[batch] or labels[batch][-1] != label:
            labels[batch].append(label)
            per_batch[batch].append([])
        per_batch[batch][-1].append(index)
    if any(each != labels[0] for each in labels):
        return None
    order = [index for segment in zip(*per_batch, strict=True) for part in segment for index in part]
    return _in_order(trace, [*order, *tail], "vertical gradient accumulation")


def _blocks(trace: Trace) -> list[str]:
    """The repeated block each step belongs to ("model.layers.3"); a step outside of all belongs where the last one did.

    Backward steps between blocks have no scope of their own most often, and depend on what is around them.
    """
    result: list[str] = []
    key: tuple[int, str] | None = None
    block = ""
    for step in trace.steps:
        if key != (step.microbatch, step.phase):
            key, block = (step.microbatch, step.phase), "" if step.phase == "forward" else block
        match = _BLOCK.match(step.scope)
        if match is not None:
            block = match[1]
        elif step.scope:
            block = step.scope
        result.append(block)
    return result


def _in_order(trace: Trace, order: list[int], note: str) -> Trace | None:
    """The trace with its steps in another order; None when that is the same, or when a step would see other data."""
    if order == list(range(len(order))) or _flow(trace, order) != _flow(trace, range(len(order))):
        return None
    return trace.with_steps(_with_deaths(trace.tensors, [trace.steps[index] for index in order]), note)


def _flow(trace: Trace, order: list[int] | range) -> tuple[dict[int, list[int]], dict[tuple[int, int], int]]:
    """(writers of each tensor in order, the writer whose content each step finds in each tensor it needs)."""
    writers: dict[int, list[int]] = {}
    seen: dict[tuple[int, int], int] = {}
    for index in order:
        step = trace.steps[index]
        for number in (*step.reads, *step.writes):
            seen[index, number] = writers[number][-1] if number in writers else -1
        for number in (*step.writes, *step.overwrites):
            writers.setdefault(number, []).append(index)
    return writers, seen


def _with_deaths(tensors: tuple[TraceTensor, ...], steps: list[TraceStep]) -> tuple[TraceStep, ...]:
    """What does not persist dies with its last use."""
    last = {number: index for index, step in enumerate(steps) for number in step.uses}
    dying: dict[int, list[int]] = {}
    for number, index in last.items():
        if not tensors[number].persistent:
            dying.setdefault(index, []).append(number)
    return tuple(replace(step, dies=tuple(sorted(dying.get(index, ())))) for index, step in enumerate(steps))


def _recomputed(trace: Trace, every: int) -> Trace | None:
    if any(step.phase == "recompute" for step in trace.steps):
        return None
    made = _Recompute(trace)
    blocks = _blocks(trace)
    segments: dict[tuple[int, str], list[int]] = {}
    for index, step in enumerate(trace.steps):
        if step.phase == "forward" and _BLOCK.match(blocks[index] + "."):
            segments.setdefault((step.microbatch, blocks[index]), []).append(index)
    names = list(dict.fromkeys(block for _, block in segments))
    for (_, block), steps in segments.items():
        if names.index(block) % every == 0:
            made.recompute(steps)
    return made.result("recompute " + (EVERY if every == 1 else EVERY_OTHER))


class _Recompute:
    """Collects the steps to insert, and which tensors the backward steps read instead."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._tensors = list(trace.tensors)
        self._instead: dict[int, int] = {}
        self._before: dict[int, list[TraceStep]] = {}
        self._users: dict[int, list[int]] = {}
        self._changes: dict[int, list[int]] = {}
        for index, step in enumerate(trace.steps):
            for number in step.uses:
                self._users.setdefault(number, []).append(index)
            for number in (*step.writes, *step.overwrites):
                self._changes.setdefault(number, []).append(index)

    def recompute(self, segment: list[int]) -> None:
        """Let the activations of these forward steps die, and make those that backward reads anew."""
        steps, inside = self._trace.steps, set(segment)
        born = {number for index in segment for number in steps[index].overwrites}
        later = {number: [user for user in self._users[number] if user > segment[-1]] for number in born}
        wanted = {
            number
            for number, users in later.items()
            if users and all(steps[user].phase in ("backward", "optimizer") for user in users)
        }
        if not wanted or any(set(self._users[number][:1]) - inside for number in born):
            return
        needed, copied = set(wanted), []
        for index in reversed(segment):
            step = steps[index]
            if not needed & {*step.writes, *step.overwrites}:
                continue
            if any(self._trace.tensors[number].persistent for number in (*step.writes, *step.overwrites)):
                return  # it changes something that lasts: doing it twice would be another result
            copied.append(index)
            needed |= {number for number in step.uses if number in born}
        new = {number: len(self._tensors) + place for place, number in enumerate(sorted(needed))}
        outside = {number for index in copied for number in steps[index].writes} - needed
        first = min(user for number in wanted for user in later[number])
        if outside or any(self._reads_other(index, first, born) for index in copied):
            return
        self._tensors += [replace(self._tensors[number], name=f"{self._tensors[number].name} again") for number in new]
        self._instead.update({number: new[number] for number in wanted})
        again = [_renamed(steps[index], new, phase="recompute") for index in reversed(copied)]
        self._before.setdefault(first, []).extend(again)

    def _reads_other(self, index: int, place: int, born: set[int]) -> bool:
        """Whether a step would find something else in what comes from outside if it ran right before another one."""
        outside = set(self._trace.steps[index].reads) - born
        return any(index < change < place for number in outside for change in self._changes.get(number, ()))

    def result(self, note: str) -> Trace | None:
        """The changed trace, None when nothing could be recomputed."""
        if not self._instead:
            return None
        listed: list[TraceStep] = []
        for index, step in enumerate(self._trace.steps):
            listed += self._before.get(index, ())
            late = step.phase in ("backward", "optimizer")
            listed.append(_renamed(step, self._instead, phase=step.phase) if late else step)
        steps = _with_deaths(tuple(self._tensors), listed)
        return replace(self._trace, tensors=tuple(self._tensors), steps=steps, notes=(*self._trace.notes, note))


def _renamed(step: TraceStep, new: dict[int, int], *, phase: str) -> TraceStep:
    def changed(numbers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(new.get(number, number) for number in numbers)

    return replace(
        step,
        reads=changed(step.reads),
        writes=changed(step.writes),
        overwrites=changed(step.overwrites),
        dies=(),
        phase=phase,
    )
