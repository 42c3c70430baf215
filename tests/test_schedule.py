# SPDX-License-Identifier: Apache-2.0
"""A schedule as data: JSON gives it back, every broken rule is named, and explain() tells what happens to a tensor."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tensorpager.hardware import DRIVES, Hardware, profile
from tensorpager.operator_trace import Trace
from tensorpager.pacing import DRIVE, HOST, Transfer
from tensorpager.planner import Budgets, plan
from tensorpager.reorder import AS_TRACED, Choices
from tensorpager.schedule import Schedule
from trace_shapes import PAGE, TraceBuilder, training_trace

FIXED = Choices(optimizer=AS_TRACED, accumulation=AS_TRACED, recompute=AS_TRACED)
#: A page takes a millisecond on the drive and half of one between host and device; a flop takes a millisecond.
SLOW = Hardware("slow", 0, 0, 1e3, 1e9, 2e3 * PAGE, 2e3 * PAGE, 1e3 * PAGE, 1e3 * PAGE, 0, {})


def small_trace() -> Trace:
    """`clean` and `dirty` want the same frames, `scratch` is made anew in every pass, the small ones share a page."""
    built = TraceBuilder("small")
    always = built.tensor("always", 1, "weight")
    clean = built.tensor("clean", 4, "weight")
    dirty = built.tensor("dirty", 4, "state")
    scratch = built.tensor("scratch", 2, "buffer")
    bias, scale = built.tensor("bias", 0.25, "weight"), built.tensor("scale", 0.5, "weight")
    made = built.tensor("made", 1, "activation")
    built.tensor("never used", 1, "weight")
    built.step("first", reads=(clean, always, bias), flops=1)
    built.step("second", reads=(always, scale), writes=(dirty,), flops=1)
    built.step("third", reads=(bias,), overwrites=(scratch, made), flops=1)
    built.step("fourth", reads=(scratch, scale, made), flops=1)
    return built.trace()


def small_schedule(host_pages: int = 0) -> Schedule:
    budgets = Budgets(7 * PAGE, host_pages * PAGE)
    return plan(small_trace(), budgets, SLOW, page_bytes=PAGE, objective="bytes", choices=FIXED)


def training_schedule() -> Schedule:
    hardware = profile("h100-sxm", min(DRIVES), host_bytes=1 << 20)
    return plan(training_trace(microbatches=2), Budgets(250 * PAGE, 60 * PAGE), hardware, page_bytes=PAGE)


# -- JSON


def test_json_round_trip_is_byte_equal() -> None:
    for schedule in (small_schedule(), small_schedule(host_pages=2), training_schedule()):
        text = schedule.to_json()
        again = Schedule.from_json(text)
        assert again == schedule
        assert again.to_json() == text
        assert len(schedule.transfers) > 0


def test_json_holds_an_endless_break_even_and_a_certificate_without_bound() -> None:
    schedule = small_schedule()
    proof = replace(schedule.certificate, break_even_tokens=math.inf, drive_bound_bytes=None, device_bound_bytes=None)
    endless = replace(schedule, certificate=proof)
    text = endless.to_json()
    assert '"break_even_tokens":"inf"' in text
    assert Schedule.from_json(text) == endless


def test_the_small_schedule_is_what_the_tests_below_say() -> None:
    schedule = small_schedule()
    assert (schedule.trace_name, schedule.hardware_name, schedule.page_bytes) == ("small", "slow", PAGE)
    assert (schedule.device_frames, schedule.host_frames, schedule.step_count) == (7, 0, 4)
    assert schedule.choices == {"accumulation": AS_TRACED, "recompute": AS_TRACED, "optimizer": AS_TRACED}
    assert [(group.tensors, group.pages, group.size_bytes) for group in schedule.groups] == [
        (("clean",), 4, 4 * PAGE),
        (("always",), 1, PAGE),
        (("dirty",), 4, 4 * PAGE),
        (("scratch",), 2, 2 * PAGE),
        (("made",), 1, PAGE),
        (("bias", "scale"), 1, 3 * PAGE // 4),
    ]
    proof = schedule.certificate
    assert (proof.drive_read_bytes, proof.drive_written_bytes) == (6 * PAGE, 3 * PAGE)
    assert (proof.device_in_bytes, proof.device_out_bytes) == (6 * PAGE, 3 * PAGE)
    assert proof.drive_bound_bytes == pytest.approx(9 * PAGE)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "format": (lambda c: c.update(format="x"), '"format" is "tensorpager-tensor-schedule"'),
    "no format": (lambda c: c.pop("format"), '"format" is "tensorpager-tensor-schedule"'),
    "newer": (lambda c: c.update(version=2), '"version" is 1'),
    "version of bool": (lambda c: c.update(version=True), '"version" is 1'),
    "missing": (lambda c: c.pop("choices"), "exactly the known fields (['choices'] differ)"),
    "unknown": (lambda c: c.update(more=1), "exactly the known fields (['more'] differ)"),
    "groups": (lambda c: c.update(groups=3), "every part has its fields ("),
    "group row": (lambda c: c["groups"][0].pop(), "every part has its fields ("),
    "use row": (lambda c: c["groups"][0].__setitem__(4, [[0]]), "every part has its fields ("),
    "gap row": (lambda c: c["groups"][0].__setitem__(5, [0]), "every part has its fields ("),
    "transfer row": (lambda c: c["transfers"].append([0]), "every part has its fields ("),
    "certificate": (lambda c: c.update(certificate=[]), "every part has its fields ("),
    "certificate field": (lambda c: c["certificate"].pop("proof"), "every part has its fields ("),
    "stalls": (lambda c: c.update(stall_seconds=None), "every part has its fields ("),
    "page bytes": (lambda c: c.update(page_bytes=0), "sizes are 0 or more"),
    "frames below 0": (lambda c: c.update(host_frames=-1), "sizes are 0 or more"),
    "frames of bool": (lambda c: c.update(device_frames=True), "sizes are 0 or more"),
    "working set": (lambda c: c.update(working_set_pages="1"), "sizes are 0 or more"),
    "one stall less": (lambda c: c["stall_seconds"].pop(), "one name, beginning and stall per step"),
    "one beginning more": (lambda c: c["step_begin_seconds"].append(1.0), "one name, beginning and stall per step"),
    "no steps": (
        lambda c: c.update(step_names=[], stall_seconds=[], step_begin_seconds=[]),
        "one name, beginning and stall per step",
    ),
    "choices": (lambda c: c.update(choices=[]), "choices are a mapping"),
    "choice": (lambda c: c["choices"].update(optimizer=1), "names and choices are texts"),
    "step name": (lambda c: c["step_names"].__setitem__(0, None), "names and choices are texts"),
    "trace name": (lambda c: c.update(trace_name=1), "names and choices are texts"),
    "stall below 0": (lambda c: c["stall_seconds"].__setitem__(0, -1), "seconds are 0 or more, and finite"),
    "stall is NaN": (lambda c: c["stall_seconds"].__setitem__(0, math.nan), "seconds are 0 or more, and finite"),
    "endless": (lambda c: c["step_begin_seconds"].__setitem__(0, math.inf), "seconds are 0 or more, and finite"),
    "begin is text": (lambda c: c["step_begin_seconds"].__setitem__(0, "0"), "seconds are 0 or more, and finite"),
    "tensor": (lambda c: c["groups"][2].__setitem__(0, [1]), "the tensors of group 2 are texts"),
    "pages": (lambda c: c["groups"][2].__setitem__(1, 0), "group 2 has pages"),
    "pages of bool": (lambda c: c["groups"][1].__setitem__(1, True), "group 1 has pages"),
    "use too late": (lambda c: c["groups"][0][4].__setitem__(0, [4, 0]), "the uses of group 0 are steps and kinds"),
    "use kind": (lambda c: c["groups"][0][4].__setitem__(0, [0, 3]), "the uses of group 0 are steps and kinds"),
    "kind of bool": (lambda c: c["groups"][0][4].__setitem__(0, [0, True]), "the uses of group 0 are steps and kinds"),
    "gap below 0": (lambda c: c["groups"][0][5][0].__setitem__(4, -1), "the gaps of group 0 are numbers in range"),
    "gap of text": (lambda c: c["groups"][0][5][0].__setitem__(2, "1"), "the gaps of group 0 are numbers in range"),
    "gap too late": (lambda c: c["groups"][0][5][0].__setitem__(0, 4), "the gaps of group 0 are numbers in range"),
    "gap ends early": (lambda c: c["groups"][0][5][0].__setitem__(1, 0), "the gaps of group 0 end after their start"),
    "gap too long": (lambda c: c["groups"][0][5][0].__setitem__(1, 5), "the gaps of group 0 end after their start"),
    "kept": (lambda c: c["groups"][0][5][0].__setitem__(2, 5), "group 0 keeps no more than it has"),
    "kept in all": (lambda c: c["groups"][0][5][0].__setitem__(3, 4), "group 0 keeps no more than it has"),
    "written": (lambda c: c["groups"][2][5][0].__setitem__(4, 5), "group 2 writes no more than it has"),
    "device full": (
        lambda c: c["groups"][2][5][0].__setitem__(2, 2),
        "step 0 holds 8 pages, and device_frames is 7",
    ),
    "host full": (lambda c: c["groups"][0][5][0].__setitem__(3, 1), "step 1 holds 1 pages, and host_frames is 0"),
    "step too large": (lambda c: c.update(device_frames=6), "step 0 holds 7 pages, and device_frames is 6"),
    "transfer group": (lambda c: c["transfers"][0].__setitem__(0, 6), "transfers are of groups, from or to a tier"),
    "transfer tier": (lambda c: c["transfers"][0].__setitem__(4, 2), "transfers are of groups, from or to a tier"),
    "tier of bool": (lambda c: c["transfers"][0].__setitem__(4, True), "transfers are of groups, from or to a tier"),
    "page in of int": (lambda c: c["transfers"][0].__setitem__(3, 1), "transfers are of groups, from or to a tier"),
    "first of text": (lambda c: c["transfers"][0].__setitem__(1, "1"), "transfers are of groups, from or to a tier"),
    "transfer first": (lambda c: c["transfers"][0].__setitem__(1, 4), "transfers are of pages of their group"),
    "transfer below 0": (lambda c: c["transfers"][0].__setitem__(1, -1), "transfers are of pages of their group"),
    "transfer of none": (lambda c: c["transfers"][0].__setitem__(2, 0), "transfers are of pages of their group"),
    "transfer ends": (lambda c: c["transfers"][0].__setitem__(6, 1e9), "transfers end after they begin"),
    "transfer NaN": (lambda c: c["transfers"][0].__setitem__(6, math.nan), "transfers end after they begin"),
    "proof": (lambda c: c["certificate"].update(proof=None), "the certificate's proof is a text"),
    "no time": (lambda c: c["certificate"].update(pass_seconds=None), "pass_seconds of the certificate is 0 or more"),
    "bytes": (
        lambda c: c["certificate"].update(drive_read_bytes=-1),
        "drive_read_bytes of the certificate is 0 or more",
    ),
    "tokens": (lambda c: c["certificate"].update(tokens=True), "tokens of the certificate is 0 or more"),
    "bound": (
        lambda c: c["certificate"].update(drive_bound_bytes="9"),
        "drive_bound_bytes of the certificate is 0 or more",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_broken_rule_is_named(name: str) -> None:
    change, rule = HOSTILE[name]
    content = json.loads(small_schedule().to_json())
    change(content)
    with pytest.raises(ValueError, match=r"^schedule breaks a rule: ") as caught:
        Schedule.from_json(json.dumps(content))
    message = str(caught.value).removeprefix("schedule breaks a rule: ")
    assert message.startswith(rule) if rule.endswith("(") else message == rule


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"version":' + "9" * 5000 + "}"])
def test_what_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^schedule: not JSON: "):
        Schedule.from_json(text)


def test_what_is_no_object_is_refused() -> None:
    for text in ("null", "[]", "3", '"text"'):
        with pytest.raises(ValueError, match=r"^schedule breaks a rule: the text is one JSON object$"):
            Schedule.from_json(text)


# -- explain


def explained(schedule: Schedule, tensor: str) -> list[str]:
    return schedule.explain(tensor).splitlines()


def test_a_tensor_that_stays() -> None:
    assert explained(small_schedule(), "always") == [
        "always: 1 pages of 4096 bytes; outlives the pass.",
        "  step 0 (first) reads it; no wait for it.",
        "    Stays on the device; next use at step 1, 1 steps later.",
        "  step 1 (second) reads it; no wait for it.",
        "    Stays on the device; next use at step 0, 3 steps later.",
    ]


WHY = "others are needed sooner, or cost more to bring back"


def test_a_tensor_that_leaves_clean() -> None:
    lines = explained(small_schedule(), "clean")
    assert lines[0] == "clean: 4 pages of 4096 bytes; outlives the pass."
    assert lines[1].startswith("  step 0 (first) reads it; the step waits ")
    why = f"(no write, the drive has the same content): {WHY}"
    after = f"    1 pages stay on the device, 3 leave it for the drive {why}; next use at step 0, 4 steps later."
    assert lines[2:] == [after]


def test_a_tensor_that_leaves_dirty() -> None:
    lines = explained(small_schedule(), "dirty")
    assert lines[1].startswith("  step 1 (second) changes it; the step waits ")
    why = f"(3 of them are written): {WHY}"
    after = f"    1 pages stay on the device, 3 leave it for the drive {why}; next use at step 1, 4 steps later."
    assert lines[2:] == [after]


def test_a_tensor_that_leaves_for_the_host_tier() -> None:
    lines = explained(small_schedule(host_pages=20), "dirty")
    tiers = r"    (\d) pages stay on the device, (\d) wait in the host tier"
    found = re.fullmatch(rf"{tiers}: {WHY}; next use at step 1, 4 steps later\.", lines[2])
    assert found is not None
    assert int(found[1]) + int(found[2]) == 4


def test_content_that_is_dead_before_an_overwrite() -> None:
    dead = "    Then its content is dead: its frames are free at once, and nothing is written."
    assert explained(small_schedule(), "scratch") == [
        "scratch: 2 pages of 4096 bytes; outlives the pass.",
        "  step 2 (third) overwrites it; no wait for it.",
        "    Stays on the device; next use at step 3, 1 steps later.",
        "  step 3 (fourth) reads it; no wait for it.",
        dead,
    ]
    lines = explained(small_schedule(), "made")
    assert lines[0] == "made: 1 pages of 4096 bytes; dies in the pass."
    assert lines[-1] == dead


def test_small_tensors_on_one_page() -> None:
    for name in ("bias", "scale"):
        lines = explained(small_schedule(), name)
        assert (
            lines[0]
            == f"{name}: 1 pages of 4096 bytes, on a page shared with 1 other small tensors; outlives the pass."
        )
        assert [line.split(")")[0] for line in lines[1::2]] == [
            "  step 0 (first",
            "  step 1 (second",
            "  step 2 (third",
            "  step 3 (fourth",
        ]


def test_an_unknown_name_suggests_close_ones() -> None:
    with pytest.raises(KeyError, match="no scheduled tensor is named 'dirtier'; there are dirty "):
        small_schedule().explain("dirtier")
    with pytest.raises(KeyError, match="there are clean, always, dirty "):
        small_schedule().explain("zzzzzzzz")
    with pytest.raises(KeyError, match="smaller than a page stay resident"):
        small_schedule().explain("never used")


def test_a_stall_that_is_named_is_the_stall_of_the_step() -> None:
    named = 0
    for schedule in (small_schedule(), training_schedule()):
        for group in schedule.groups:
            lines = explained(schedule, group.tensors[0])
            assert len(lines) == 1 + 2 * len(group.uses)
            for use, line in zip(group.uses, lines[1::2], strict=True):
                assert line.startswith(f"  step {use.step} ({schedule.step_names[use.step]}) ")
                if "the step waits" in line:
                    assert f"waits {schedule.stall_seconds[use.step] * 1e3:.3f} ms, " in line
                    assert schedule.stall_seconds[use.step] > 0
                    named += 1
                else:
                    assert line.endswith("; no wait for it.")
    assert named > 2


def moved(group: int, step: int, begin: float, end: float) -> Transfer:
    return Transfer(group, 1, 3, True, DRIVE, step, begin, end)


def test_the_cause_of_a_stall_is_what_arrived_last() -> None:
    """Also where the other one arrives at the end of the pass, for the next one."""
    schedule = small_schedule()
    waiting = replace(
        schedule,
        stall_seconds=(0.002, 0.0, 0.0, 0.0),
        groups=tuple(replace(group, uses=(replace(group.uses[0], step=0),)) for group in schedule.groups),
    )
    proof = replace(schedule.certificate, pass_seconds=0.010)
    late, ahead = moved(0, 0, 0.0, 0.002), moved(2, 4, 0.006, 0.009)
    both = replace(waiting, transfers=(late, ahead), certificate=proof)
    assert "waits 2.000 ms, for this tensor." in both.explain("clean")
    assert "waits 2.000 ms, longest for another tensor." in both.explain("dirty")
    assert "waits" not in both.explain("always")
    assert "waits" not in replace(both, stall_seconds=(0.0,) * 4).explain("clean")


def test_tiers_have_two_numbers() -> None:
    tiers = {moved.tier for moved in small_schedule(host_pages=2).transfers}
    assert tiers == {DRIVE, HOST}
