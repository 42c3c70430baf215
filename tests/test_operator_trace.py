# SPDX-License-Identifier: Apache-2.0
"""Traces: every rule holds or is named, and JSON gives back what it was made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tensorpager.operator_trace import KINDS, PHASES, Trace, TraceStep, TraceTensor
from trace_shapes import random_trace, training_trace

TENSORS = (
    TraceTensor("weight", 100, "weight"),
    TraceTensor("state", 200, "state"),
    TraceTensor("activation", 30, "activation"),
)
STEPS = (
    TraceStep("forward", reads=(0,), overwrites=(2,), flops=7, moved_bytes=130, scope="layers.0"),
    TraceStep("backward", reads=(2,), dies=(2,), flops=5, phase="backward", microbatch=1),
    TraceStep("adam", reads=(0,), writes=(1,), phase="optimizer"),
)


def small_trace() -> Trace:
    return Trace("small", TENSORS, STEPS, tokens=16, notes=("by hand",))


def json_of(**changed: object) -> str:
    return json.dumps({**json.loads(small_trace().to_json()), **changed})


def with_step(index: int, **changed: Any) -> tuple[TraceStep, ...]:
    return tuple(replace(step, **changed) if place == index else step for place, step in enumerate(STEPS))


def with_tensor(**changed: Any) -> tuple[TraceTensor, ...]:
    return (replace(TENSORS[0], **changed), *TENSORS[1:])


def test_json_text_is_exactly_this() -> None:
    assert small_trace().to_json() == (
        '{"format":"tensorpager-trace","version":1,"name":"small","tokens":16,"notes":["by hand"],'
        '"tensors":[["weight",100,"weight"],["state",200,"state"],["activation",30,"activation"]],'
        '"steps":[["forward",[0],[],[2],[],7,130,"layers.0","forward",0],'
        '["backward",[2],[],[],[2],5,0,"","backward",1],["adam",[0],[1],[],[],0,0,"","optimizer",0]],'
        '"step_fields":["name","reads","writes","overwrites","dies","flops","moved_bytes","scope","phase",'
        '"microbatch"]}'
    )


@pytest.mark.parametrize(
    "trace",
    [small_trace(), training_trace(microbatches=2), Trace('"\n\u00e9\U0001f600\ud800', (), (TraceStep("\x00"),))],
    ids=["small", "training", "odd names"],
)
def test_json_round_trip_is_byte_equal(trace: Trace) -> None:
    text = trace.to_json()
    again = Trace.from_json(text)
    assert again == trace
    assert again.to_json() == text


def test_random_traces_go_through_json() -> None:
    for seed in range(100):
        trace = random_trace(seed)
        assert Trace.from_json(trace.to_json()) == trace, seed


def test_totals_and_uses() -> None:
    trace = small_trace()
    assert trace.total_bytes() == 330
    assert trace.total_bytes("weight") == 100
    assert trace.total_bytes("weight", "activation") == 130
    assert trace.total_bytes("gradient") == 0
    assert trace.flops == 12
    assert STEPS[0].uses == (0, 2)
    assert STEPS[2].uses == (0, 1)
    assert [TraceTensor("", 0, kind).persistent for kind in KINDS] == [True, True, True, False, False, False]


def test_with_steps_adds_its_note() -> None:
    trace = small_trace()
    changed = trace.with_steps(STEPS[:2], "without optimizer")
    assert changed.notes == ("by hand", "without optimizer")
    assert changed.steps == STEPS[:2]
    assert (changed.name, changed.tensors, changed.tokens) == ("small", TENSORS, 16)
    assert trace.notes == ("by hand",)
    with pytest.raises(ValueError, match="at least one step"):
        trace.with_steps((), "nothing left")


RULES: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"name": 3}, "name is a text"),
    "tokens below 0": ({"tokens": -1}, "tokens is 0 or more"),
    "tokens too many": ({"tokens": 2**60 + 1}, "tokens is 0 or more"),
    "tokens of bool": ({"tokens": True}, "tokens is 0 or more"),
    "notes": ({"notes": (1,)}, "notes are texts"),
    "no steps": ({"steps": ()}, "a trace has at least one step"),
    "tensor name": ({"tensors": with_tensor(name=None)}, "the name of tensor 0 is a text"),
    "size below 0": ({"tensors": with_tensor(size_bytes=-1)}, f"size_bytes of tensor 0 is 0..{2**60}"),
    "size too large": ({"tensors": with_tensor(size_bytes=2**60 + 1)}, f"size_bytes of tensor 0 is 0..{2**60}"),
    "size of bool": ({"tensors": with_tensor(size_bytes=True)}, f"size_bytes of tensor 0 is 0..{2**60}"),
    "size of float": ({"tensors": with_tensor(size_bytes=1.0)}, f"size_bytes of tensor 0 is 0..{2**60}"),
    "kind": ({"tensors": with_tensor(kind="weights")}, f"the kind of tensor 0 is one of {', '.join(KINDS)}"),
    "kind of list": ({"tensors": with_tensor(kind=[])}, f"the kind of tensor 0 is one of {', '.join(KINDS)}"),
    "step name": ({"steps": with_step(1, name=1)}, "name and scope of step 1 are texts"),
    "scope": ({"steps": with_step(1, scope=None)}, "name and scope of step 1 are texts"),
    "phase": ({"steps": with_step(1, phase="later")}, f"the phase of step 1 is one of {', '.join(PHASES)}"),
    "flops": ({"steps": with_step(0, flops=-1)}, "the numbers of step 0 are 0 or more"),
    "moved_bytes": ({"steps": with_step(0, moved_bytes=0.5)}, "the numbers of step 0 are 0 or more"),
    "microbatch": ({"steps": with_step(0, microbatch=2**62 + 1)}, "the numbers of step 0 are 0 or more"),
    "index too large": ({"steps": with_step(0, reads=(3,))}, "reads of step 0 (forward) are indices of the 3 tensors"),
    "index below 0": ({"steps": with_step(2, writes=(-1,))}, "writes of step 2 (adam) are indices of the 3 tensors"),
    "index of bool": ({"steps": with_step(2, reads=(True,))}, "reads of step 2 (adam) are indices of the 3 tensors"),
    "index of list": ({"steps": with_step(1, dies=([],))}, "dies of step 1 (backward) are indices of the 3 tensors"),
    "read twice": ({"steps": with_step(0, reads=(0, 0))}, "reads of step 0 (forward) hold no tensor twice"),
    "dies twice": ({"steps": with_step(1, dies=(2, 2))}, "dies of step 1 (backward) hold no tensor twice"),
    "two ways": ({"steps": with_step(2, reads=(1,))}, "step 2 (adam) uses a tensor in one way only"),
    "read unwritten": (
        {"steps": with_step(0, overwrites=(), reads=(2,))},
        "step 0 (forward) needs tensor 2, which was not written yet",
    ),
    "changed unwritten": (
        {"steps": with_step(0, overwrites=(), writes=(2,))},
        "step 0 (forward) needs tensor 2, which was not written yet",
    ),
    "dies unwritten": (
        {"steps": with_step(0, overwrites=(), dies=(2,))},
        "step 0 (forward) needs tensor 2, which was not written yet",
    ),
    "read dead": ({"steps": with_step(2, reads=(2,))}, "step 2 (adam) needs tensor 2, which died"),
    "dies again": ({"steps": with_step(2, dies=(2,))}, "step 2 (adam) needs tensor 2, which died"),
    "overwritten dead": ({"steps": with_step(2, overwrites=(2,))}, "step 2 (adam) overwrites tensor 2, which died"),
    "weight dies": ({"steps": with_step(0, dies=(0,))}, "step 0 lets tensor 0 die, which persists"),
}


@pytest.mark.parametrize("name", RULES)
def test_a_broken_rule_is_named(name: str) -> None:
    changed, rule = RULES[name]
    with pytest.raises(ValueError, match=r"^trace breaks a rule: ") as caught:
        replace(small_trace(), **changed)
    assert str(caught.value) == f"trace breaks a rule: {rule}"


def test_a_tensor_may_die_where_it_is_made() -> None:
    steps = (TraceStep("made in vain", overwrites=(2,), dies=(2,)),)
    assert Trace("t", TENSORS, steps).steps == steps


def without(name: str) -> str:
    content = json.loads(small_trace().to_json())
    del content[name]
    return json.dumps(content)


FIELDS = json.loads(small_trace().to_json())["step_fields"]
ROW = json.loads(small_trace().to_json())["steps"][2]
HOSTILE: dict[str, tuple[Callable[[], str], str]] = {
    "empty": (lambda: "", "trace: not JSON: Expecting value"),
    "half": (lambda: small_trace().to_json()[:-1], "trace: not JSON: Expecting"),
    "nested": (lambda: "[" * 100_000, "trace: not JSON: "),
    "digits": (lambda: json_of().replace('"tokens": 16', '"tokens": ' + "9" * 5000), "trace: not JSON: "),
    "null": (lambda: "null", "trace breaks a rule: the text is one JSON object"),
    "list": (lambda: "[]", "trace breaks a rule: the text is one JSON object"),
    "no format": (lambda: "{}", 'trace breaks a rule: "format" is "tensorpager-trace"'),
    "format": (lambda: json_of(format=["x"]), 'trace breaks a rule: "format" is "tensorpager-trace"'),
    "no version": (lambda: without("version"), 'trace breaks a rule: "version" is 1'),
    "newer": (lambda: json_of(version=2), 'trace breaks a rule: "version" is 1'),
    "version of bool": (lambda: json_of(version=True), 'trace breaks a rule: "version" is 1'),
    "version of float": (lambda: json_of(version=1.0), 'trace breaks a rule: "version" is 1'),
    "missing": (lambda: without("tokens"), "trace breaks a rule: exactly the known fields (['tokens'] differ)"),
    "unknown": (lambda: json_of(more=1), "trace breaks a rule: exactly the known fields (['more'] differ)"),
    "step fields": (
        lambda: json_of(step_fields=FIELDS[::-1]),
        f"trace breaks a rule: step_fields are {FIELDS}",
    ),
    "tensors": (lambda: json_of(tensors={}), "trace breaks a rule: tensors is a list"),
    "steps": (lambda: json_of(steps="text"), "trace breaks a rule: steps is a list"),
    "notes": (lambda: json_of(notes="text"), "trace breaks a rule: notes is a list"),
    "note": (lambda: json_of(notes=[["x"]]), "trace breaks a rule: notes are texts"),
    "tensor row": (
        lambda: json_of(tensors=[["w", 1]]),
        "trace breaks a rule: tensor 0 is [name, size_bytes, kind]",
    ),
    "tensor object": (lambda: json_of(tensors=[{}]), "trace breaks a rule: tensor 0 is [name, size_bytes, kind]"),
    "size": (
        lambda: json_of(tensors=[["w", 10**30, "weight"]]),
        f"trace breaks a rule: size_bytes of tensor 0 is 0..{2**60}",
    ),
    "step row": (lambda: json_of(steps=[["read"]]), "trace breaks a rule: step 0 has 10 entries"),
    "step text": (lambda: json_of(steps=["0123456789"]), "trace breaks a rule: step 0 has 10 entries"),
    "reads": (
        lambda: json_of(steps=[["adam", "0", *ROW[2:]]]),
        "trace breaks a rule: reads of step 0 is a list",
    ),
    "index": (
        lambda: json_of(steps=[["adam", [{}], *ROW[2:]]]),
        "trace breaks a rule: reads of step 0 (adam) are indices of the 3 tensors",
    ),
    "name": (lambda: json_of(name=None), "trace breaks a rule: name is a text"),
    "tokens": (lambda: json_of(tokens="16"), "trace breaks a rule: tokens is 0 or more"),
    "not a number": (lambda: json_of(tokens=float("nan")), "trace breaks a rule: tokens is 0 or more"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_is_refused(name: str) -> None:
    made, message = HOSTILE[name]
    with pytest.raises(ValueError, match=r"^trace") as caught:
        Trace.from_json(made())
    if message.endswith((": ", "value", "Expecting")):
        assert str(caught.value).startswith(message)
    else:
        assert str(caught.value) == message
