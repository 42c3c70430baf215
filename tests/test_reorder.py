# SPDX-License-Identifier: Apache-2.0
"""Other orders of the work compute the same: an interpreter of traces, which knows nothing of reorder.py, tells."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tensorpager.operator_trace import Trace, TraceStep
from tensorpager.reorder import AS_TRACED, CHOICE_VALUES, Choices, alternatives
from trace_shapes import TraceBuilder, random_trace, training_trace

Content = tuple[object, ...]


def contents_after(trace: Trace, passes: int = 2) -> dict[int, int]:
    """{tensor that persists: hash of how its content came about}. KeyError when a step reads what is not there."""
    contents = {number: hash(tensor.name) for number, tensor in enumerate(trace.tensors) if tensor.persistent}
    for _ in range(passes):
        for step in trace.steps:
            before = tuple(contents[number] for number in (*step.reads, *step.writes))
            for place, number in enumerate((*step.writes, *step.overwrites)):
                contents[number] = hash((step.name, step.scope, step.microbatch, before, place))
            for number in step.dies:
                del contents[number]
        assert all(trace.tensors[number].persistent for number in contents)
    return contents


def same_results(trace: Trace, changed: Trace) -> bool:
    first, second = contents_after(trace), contents_after(changed)
    return first == {number: content for number, content in second.items() if number in first}


def only(trace: Trace, name: str, value: str) -> Trace:
    return dict(alternatives(trace, name))[value]


def test_the_interpreter_sees_what_matters() -> None:
    """Two changes that do not commute, a stale read and a lost write."""
    built = TraceBuilder("t")
    weight = built.tensor("w", 1, "weight")
    act = built.tensor("a", 1, "activation")
    built.step("one", writes=(weight,))
    built.step("two", reads=(weight,), overwrites=(act,))
    built.step("three", reads=(act,), writes=(weight,))
    trace = built.trace()
    one, two, three = (replace(step, dies=()) for step in trace.steps)
    for steps in ((two, one, three), (one, two, replace(three, reads=())), (two, three, one)):
        assert not same_results(trace, replace(trace, steps=(*steps, TraceStep("end", dies=(act,)))))
    assert same_results(trace, replace(trace, steps=(one, two, three, TraceStep("end", dies=(act,)))))


def test_choices_are_those_there_are() -> None:
    assert CHOICE_VALUES == {
        "accumulation": ("vertical",),
        "recompute": ("every block", "every other block"),
        "optimizer": ("inside backward",),
    }
    for name, known in CHOICE_VALUES.items():
        for value in (None, AS_TRACED, *known):
            assert getattr(Choices(**{name: value}), name) == value
        with pytest.raises(ValueError, match=rf"^{name} 'no' is none of as traced, {', '.join(known)}$"):
            Choices(**{name: "no"})
    with pytest.raises(ValueError, match=r"^optimizer 'vertical' is none of as traced, inside backward$"):
        Choices(optimizer="vertical")


# -- optimizer


@pytest.mark.parametrize("microbatches", [1, 3])
def test_each_optimizer_step_follows_the_gradient_it_reads(microbatches: int) -> None:
    trace = training_trace(microbatches=microbatches)
    changed = only(trace, "optimizer", "inside backward")
    assert changed.notes == ("optimizer inside backward",)
    assert sorted(step.name for step in changed.steps) == sorted(step.name for step in trace.steps)
    tail = changed.steps[-12:]
    assert [step.name for step in tail] == ["grad", "adam"] * 6
    for before, step in zip(tail[::2], tail[1::2], strict=True):
        assert step.reads[0] in (*before.writes, *before.overwrites)
        assert step.dies == step.reads
    others = [step.uses for step in trace.steps if step.phase != "optimizer"]
    assert [step.uses for step in changed.steps if step.phase != "optimizer"] == others
    assert same_results(trace, changed)
    assert list(alternatives(changed, "optimizer")) == []


def test_clipping_keeps_the_optimizer_where_it_is() -> None:
    trace = training_trace()
    gradients = tuple(number for number, tensor in enumerate(trace.tensors) if tensor.kind == "gradient")
    first = next(index for index, step in enumerate(trace.steps) if step.phase == "optimizer")
    clip = TraceStep("clip", writes=gradients, phase="optimizer")
    clipped = replace(trace, steps=(*trace.steps[:first], clip, *trace.steps[first:]))
    assert list(alternatives(clipped, "optimizer")) == []


def test_an_update_waits_for_the_last_reader_of_the_weight() -> None:
    """Its gradient is complete one step before the weight is read for the last time."""
    built = TraceBuilder("tied")
    weight = built.tensor("w", 1, "weight")
    gradient = built.tensor("g", 1, "gradient")
    flow = built.tensor("f", 1, "activation")
    built.step("forward", reads=(weight,), overwrites=(flow,))
    built.step("grad", reads=(flow,), overwrites=(gradient,), phase="backward")
    built.step("flow", reads=(weight,), writes=(flow,), phase="backward")
    built.step("other", phase="backward")
    built.step("sgd", reads=(gradient,), writes=(weight,), phase="optimizer")
    trace = built.trace()
    changed = only(trace, "optimizer", "inside backward")
    assert [step.name for step in changed.steps] == ["forward", "grad", "flow", "sgd", "other"]
    assert same_results(trace, changed)


def test_random_orders_compute_the_same() -> None:
    changed_count = 0
    for seed in range(400):
        trace = random_trace(seed)
        phases = tuple(
            replace(step, phase="optimizer" if (seed + 7 * index) % 5 < 2 else "backward")
            for index, step in enumerate(trace.steps)
        )
        trace = replace(trace, steps=phases)
        for _, changed in alternatives(trace, "optimizer"):
            assert same_results(trace, changed), seed
            changed_count += 1
    assert changed_count > 200


# -- accumulation


def test_vertical_accumulation_brings_weights_in_once_per_direction() -> None:
    trace = training_trace(microbatches=4)
    changed = only(trace, "accumulation", "vertical")
    assert changed.notes == ("vertical gradient accumulation",)
    assert same_results(trace, changed)
    for number in range(6):
        uses = [index for index, step in enumerate(changed.steps) if number in step.uses and step.phase == "forward"]
        assert len(uses) == 8
        assert uses == list(range(uses[0], uses[0] + 8))
        uses = [index for index, step in enumerate(changed.steps) if number in step.uses and step.phase == "backward"]
        assert uses == list(range(uses[0], uses[0] + 4))
        assert [changed.steps[index].microbatch for index in uses] == [0, 1, 2, 3]
    for gradient in (number for number, tensor in enumerate(trace.tensors) if tensor.kind == "gradient"):
        writers = [step for step in changed.steps if gradient in (*step.writes, *step.overwrites)]
        assert [step.microbatch for step in writers] == [0, 1, 2, 3]
        assert [gradient in step.overwrites for step in writers] == [True, False, False, False]
    assert [step.name for step in changed.steps[-6:]] == ["adam"] * 6
    assert list(alternatives(changed, "accumulation")) == []


def test_one_microbatch_is_all_there_is() -> None:
    assert list(alternatives(training_trace(), "accumulation")) == []


def test_microbatches_of_other_blocks_stay_as_traced() -> None:
    trace = training_trace(microbatches=2)
    last = max(index for index, step in enumerate(trace.steps) if step.microbatch == 1)
    extra = TraceStep("extra", reads=(0,), scope="layers.9", phase="backward", microbatch=1)
    unequal = replace(trace, steps=(*trace.steps[: last + 1], extra, *trace.steps[last + 1 :]))
    assert list(alternatives(unequal, "accumulation")) == []


def test_microbatches_that_see_one_another_stay_as_traced() -> None:
    """A statistic of the first block that the second block of the same microbatch reads."""
    built = TraceBuilder("statistics")
    seen = built.tensor("running mean", 1, "buffer")
    out = built.tensor("result", 1, "state")
    for batch in range(2):
        built.step("update", writes=(seen,), scope="layers.0", microbatch=batch)
        built.step("use", reads=(seen,), writes=(out,), scope="layers.1", microbatch=batch)
    assert list(alternatives(built.trace(), "accumulation")) == []


# -- recompute


@pytest.mark.parametrize(("value", "blocks"), [("every block", [0, 1, 2, 3, 4, 5]), ("every other block", [0, 2, 4])])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_recomputing_lets_activations_die_in_forward(value: str, blocks: list[int], microbatches: int) -> None:
    trace = training_trace(microbatches=microbatches)
    changed = only(trace, "recompute", value)
    assert changed.notes == (f"recompute {value}",)
    assert same_results(trace, changed)
    names = {number: tensor.name for number, tensor in enumerate(changed.tensors)}
    died = {names[number]: step.phase for step in changed.steps for number in step.dies}
    for batch in range(microbatches):
        for layer in range(6):
            assert died[f"inner {batch} {layer}"] == ("forward" if layer in blocks else "backward")
            assert (f"inner {batch} {layer} again" in died) == (layer in blocks)
            # The inputs of the blocks stay.
            assert died[f"act {batch} {layer}"] == "backward"
    again = [step for step in changed.steps if step.phase == "recompute"]
    # Only the last block's output is read in its own backward step: the others need no "down" again.
    expected = [("up", f"layers.{layer}") for layer in reversed(blocks)]
    if 5 in blocks:
        expected.insert(1, ("down", "layers.5"))
    assert [(step.name, step.scope) for step in again] == expected * microbatches
    assert sum(step.flops for step in again) == 2_000_000 * len(expected) * microbatches
    assert changed.flops == trace.flops + 2_000_000 * len(expected) * microbatches
    assert [step.name for step in changed.steps if step.phase != "recompute"] == [step.name for step in trace.steps]
    assert list(alternatives(changed, "recompute")) == []


def block_trace(*, statistics: bool = False, in_place: bool = False, also_made: bool = False) -> Trace:
    """Two blocks; each makes x from x, and an inner activation for backward."""
    built = TraceBuilder("blocks")
    weight = built.tensor("w", 4, "weight")
    mean = built.tensor("running mean", 1, "buffer")
    result = built.tensor("result", 1, "state")
    flow = [built.tensor("x", 2, "activation")]
    built.step("embed", reads=(weight,), overwrites=(flow[0],))
    inner = []
    for block in range(2):
        scope = f"h.{block}"
        inner.append(built.tensor(f"inner {block}", 3, "activation"))
        if not in_place:
            flow.append(built.tensor(f"x {block}", 2, "activation"))
        side = (flow[-1],) if also_made else ()
        changes = (mean,) if statistics else ()
        built.step(
            "up",
            reads=(weight, flow[-2 if not in_place else 0]),
            overwrites=(inner[-1], *side),
            writes=changes,
            scope=scope,
        )
        if in_place:
            built.step("add", reads=(inner[-1],), writes=(flow[0],), scope=scope)
        elif also_made:
            built.step("add", reads=(inner[-1],), writes=(flow[-1],), scope=f"{scope}.act")
        else:
            built.step("add", reads=(inner[-1], flow[-2]), overwrites=(flow[-1],), scope=scope)
    for block in (1, 0):
        reads = (inner[block], flow[min(block + 1, len(flow) - 1)])
        built.step("grad", reads=reads, writes=(result,), scope=f"h.{block}", phase="backward")
    return built.trace()


def test_a_block_recomputes_from_its_input() -> None:
    trace = block_trace()
    for value, count in (("every block", 3), ("every other block", 1)):
        changed = only(trace, "recompute", value)
        assert same_results(trace, changed)
        assert sum(step.phase == "recompute" for step in changed.steps) == count


def test_a_block_with_running_statistics_runs_once() -> None:
    assert list(alternatives(block_trace(statistics=True), "recompute")) == []


def test_a_block_whose_input_is_changed_in_place_runs_once() -> None:
    """The residual stream is added to in place: when backward comes, what the block read is gone."""
    trace = block_trace(in_place=True)
    assert list(alternatives(trace, "recompute")) == []


def test_what_a_recomputed_step_makes_beside_does_not_disturb_the_first() -> None:
    """A step that makes the activation that backward needs and the output that was added to since."""
    trace = block_trace(also_made=True)
    for value in CHOICE_VALUES["recompute"]:
        changed = only(trace, "recompute", value)
        assert same_results(trace, changed), value


def test_recomputing_after_reordering_and_before() -> None:
    trace = training_trace(microbatches=2)
    vertical = only(trace, "accumulation", "vertical")
    both = only(vertical, "recompute", "every block")
    inside = only(both, "optimizer", "inside backward")
    assert inside.notes == ("vertical gradient accumulation", "recompute every block", "optimizer inside backward")
    assert same_results(trace, both)
    assert same_results(trace, inside)


def test_traces_without_blocks_are_not_recomputed() -> None:
    for seed in range(50):
        assert list(alternatives(random_trace(seed), "recompute")) == []
        assert list(alternatives(random_trace(seed), "accumulation")) == []
