# SPDX-License-Identifier: Apache-2.0
"""A trace: what one step of a program reads, writes, creates and lets die, operator by operator. Plain data, no torch.

A *tensor* here is a storage: views, and weights tied to one another, are one tensor. Only its bytes count. Traces are
made by `tracing.trace` from a model, or by hand, and saved as JSON; every rule below is checked when one is built or
loaded, so the planner may rely on them.

A trace is one *pass* and is repeated for ever: weights and optimizer state live on into the next one, everything else
is created and dies inside.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from typing import Any

__all__ = ["KINDS", "PHASES", "Trace", "TraceStep", "TraceTensor"]

TRACE_FORMAT = "tensorpager-trace"
TRACE_VERSION = 1

#: What a tensor is. Those of PERSISTENT outlive the pass; the others are created in it, or are its inputs.
KINDS = ("weight", "buffer", "state", "gradient", "input", "activation")
PERSISTENT = frozenset({"weight", "buffer", "state"})

#: What a step belongs to. "recompute" is forward work done again inside backward.
PHASES = ("forward", "recompute", "backward", "optimizer")

BYTES_MAX = 2**60
COUNT_MAX = 2**31 - 1


@dataclass(frozen=True)
class TraceTensor:
    """A storage. kind: one of KINDS. size_bytes: 0 or more. name: of a weight its qualified name, else how it came."""

    name: str
    size_bytes: int
    kind: str

    @property
    def persistent(self) -> bool:
        """Whether its content outlives the pass."""
        return self.kind in PERSISTENT


@dataclass(frozen=True)
class TraceStep:
    """One operator. The numbers are indices into Trace.tensors.

    reads: whose content it needs. writes: what it changes in part, or changes depending on what was there (such a
    tensor is kept out of `reads`; its content is needed as well). overwrites: what it fills without looking at the old
    content; the first use of anything that is created in the pass is one. dies: what nobody needs after this step.
    flops: multiplications and additions. moved_bytes: what the operator itself moves through the device's memory.
    scope: the module it ran in, "" for none. phase: one of PHASES. microbatch: counted from 0.
    """

    name: str
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    overwrites: tuple[int, ...] = ()
    dies: tuple[int, ...] = ()
    flops: int = 0
    moved_bytes: int = 0
    scope: str = ""
    phase: str = "forward"
    microbatch: int = 0

    @property
    def uses(self) -> tuple[int, ...]:
        """All tensors the step needs in memory."""
        return (*self.reads, *self.writes, *self.overwrites)


@dataclass(frozen=True)
class Trace:
    """One pass. name: for people. tokens: how many one pass handles, 0 when that means nothing.

    ValueError that names the rule and the step when one is broken: indices in range, no tensor twice in one step's
    lists, what is created in the pass is overwritten before it is read and not used after it died, what persists does
    not die.
    """

    name: str
    tensors: tuple[TraceTensor, ...]
    steps: tuple[TraceStep, ...]
    tokens: int = 0
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        _check(self)

    def total_bytes(self, *kinds: str) -> int:
        """Bytes of all tensors of these kinds; of all tensors when none is named."""
        return sum(tensor.size_bytes for tensor in self.tensors if not kinds or tensor.kind in kinds)

    @property
    def flops(self) -> int:
        """Of all steps."""
        return sum(step.flops for step in self.steps)

    def with_steps(self, steps: tuple[TraceStep, ...], note: str) -> Trace:
        """The same tensors used by other steps; the note says what was changed."""
        return replace(self, steps=steps, notes=(*self.notes, note))

    def to_json(self) -> str:
        """The same trace always gives the same text, byte for byte."""
        content = {
            "format": TRACE_FORMAT,
            "version": TRACE_VERSION,
            "name": self.name,
            "tokens": self.tokens,
            "notes": list(self.notes),
            "tensors": [[tensor.name, tensor.size_bytes, tensor.kind] for tensor in self.tensors],
            "steps": [[getattr(step, name) for name in _STEP_FIELDS] for step in self.steps],
            "step_fields": _STEP_FIELDS,
        }
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Trace:
        """Read to_json()'s text. ValueError that names the rule when the text breaks one."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: also for integers of thousands of digits
            msg = f"trace: not JSON: {error}"
            raise ValueError(msg) from None
        _require(isinstance(content, dict), "the text is one JSON object")
        _require(content.get("format") == TRACE_FORMAT, f'"format" is "{TRACE_FORMAT}"')
        version = content.get("version")
        _require(type(version) is int and version == TRACE_VERSION, f'"version" is {TRACE_VERSION}')
        known = {"format", "version", "name", "tokens", "notes", "tensors", "steps", "step_fields"}
        _require(content.keys() == known, f"exactly the known fields ({sorted(content.keys() ^ known)} differ)")
        _require(content["step_fields"] == _STEP_FIELDS, f"step_fields are {_STEP_FIELDS}")
        for name in ("tensors", "steps", "notes"):
            _require(isinstance(content[name], list), f"{name} is a list")
        return cls(
            name=content["name"],
            tensors=tuple(_tensor(index, row) for index, row in enumerate(content["tensors"])),
            steps=tuple(_step(index, row) for index, row in enumerate(content["steps"])),
            tokens=content["tokens"],
            notes=tuple(content["notes"]),
        )


_STEP_FIELDS = [item.name for item in fields(TraceStep)]
_INDEX_FIELDS = ("reads", "writes", "overwrites", "dies")


def _require(holds: bool, rule: str) -> None:
    if not holds:
        msg = f"trace breaks a rule: {rule}"
        raise ValueError(msg)


def _tensor(index: int, row: Any) -> TraceTensor:
    _require(
        isinstance(row, list) and len(row) == len(fields(TraceTensor)), f"tensor {index} is [name, size_bytes, kind]"
    )
    return TraceTensor(*row)


def _step(index: int, row: Any) -> TraceStep:
    _require(isinstance(row, list) and len(row) == len(_STEP_FIELDS), f"step {index} has {len(_STEP_FIELDS)} entries")
    values = dict(zip(_STEP_FIELDS, row, strict=True))
    for name in _INDEX_FIELDS:
        _require(isinstance(values[name], list), f"{name} of step {index} is a list")
        values[name] = tuple(values[name])
    return TraceStep(**values)


def _is_count(value: object, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _check(trace: Trace) -> None:
    _require(isinstance(trace.name, str), "name is a text")
    _require(_is_count(trace.tokens, BYTES_MAX), "tokens is 0 or more")
    _require(all(isinstance(note, str) for note in trace.notes), "notes are texts")
    _require(len(trace.steps) > 0, "a trace has at least one step")
    _require(max(len(trace.steps), len(trace.tensors)) <= COUNT_MAX, f"at most {COUNT_MAX} steps and tensors")
    for index, tensor in enumerate(trace.tensors):
        _require(isinstance(tensor.name, str), f"the name of tensor {index} is a text")
        _require(_is_count(tensor.size_bytes, BYTES_MAX), f"size_bytes of tensor {index} is 0..{BYTES_MAX}")
        _require(tensor.kind in KINDS, f"the kind of tensor {index} is one of {', '.join(KINDS)}")
    alive: set[int] = {index for index, tensor in enumerate(trace.tensors) if tensor.persistent}
    dead: set[int] = set()
    for index, step in enumerate(trace.steps):
        _check_step(trace, index, step)
        for number in step.overwrites:
            _require(number not in dead, f"step {index} ({step.name}) overwrites tensor {number}, which died")
            alive.add(number)
        for number in (*step.reads, *step.writes, *step.dies):
            state = "died" if number in dead else "was not written yet"
            _require(number in alive, f"step {index} ({step.name}) needs tensor {number}, which {state}")
        for number in step.dies:
            _require(not trace.tensors[number].persistent, f"step {index} lets tensor {number} die, which persists")
            alive.remove(number)
            dead.add(number)


def _check_step(trace: Trace, index: int, step: TraceStep) -> None:
    _require(isinstance(step.name, str) and isinstance(step.scope, str), f"name and scope of step {index} are texts")
    _require(step.phase in PHASES, f"the phase of step {index} is one of {', '.join(PHASES)}")
    numbers = (step.flops, step.moved_bytes, step.microbatch)
    _require(all(_is_count(number, 2**62) for number in numbers), f"the numbers of step {index} are 0 or more")
    count = len(trace.tensors)
    for name in _INDEX_FIELDS:
        values = getattr(step, name)
        in_range = all(type(value) is int and 0 <= value < count for value in values)
        _require(in_range, f"{name} of step {index} ({step.name}) are indices of the {count} tensors")
        _require(len(set(values)) == len(values), f"{name} of step {index} ({step.name}) hold no tensor twice")
    uses = step.uses
    _require(len(set(uses)) == len(uses), f"step {index} ({step.name}) uses a tensor in one way only")
