# SPDX-License-Identifier: Apache-2.0
"""The JSON form holds every rule of a schedule, and the shadow executor catches schedules that break a promise."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from plan_traces import llama, random_pass
from tensorpager.pass_plan import PageSchedule, Steps, plan_pass, simulate, steps_from_events

# Three pages one after the other through two frames: page 0 stays, 1 and 2 take turns.
STEPS = steps_from_events([1, -1, 2, -2, 3, -3], [[0], [1], [2]])


def small_schedule() -> PageSchedule:
    return plan_pass(STEPS, frame_count=2, page_bytes=4096, page_count=4, read_ahead=0)


def changed(schedule: PageSchedule, **arrays: list[int]) -> PageSchedule:
    return dataclasses.replace(schedule, **{name: np.array(a, np.int32) for name, a in arrays.items()})


def test_json_round_trip_is_byte_equal() -> None:
    built = llama()
    schedule = plan_pass(built.steps(), frame_count=400, page_bytes=2 << 20, page_count=built.page_count)
    text = schedule.to_json()
    again = PageSchedule.from_json(text)
    assert again.to_json() == text
    for field in dataclasses.fields(schedule):
        before, after = getattr(schedule, field.name), getattr(again, field.name)
        assert type(before) is type(after)
        assert np.array_equal(before, after)
    assert simulate(again, built.steps()).page_ins == (schedule.page_ins_per_pass,) * 3


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"format": "other"}, '"format" is "tensorpager-schedule"'),
        ({"version": 2}, '"version" is 1'),
        ({"version": True}, '"version" is 1'),
        ({"extra": 1}, r"exactly the known fields \(missing \[\], unknown \['extra'\]\)"),
        ({"step_set": None}, "step_set is a list"),
        ({"step_set": []}, "at least one step"),
        ({"step_set": [0, 1, -1]}, "step_set lies in 0.."),
        ({"step_set": [0, 1, 2**31]}, "step_set holds 32-bit integers"),
        ({"step_set": [0, 1, 2.0]}, "step_set holds 32-bit integers"),
        ({"step_set": [0, 1, True]}, "step_set holds 32-bit integers"),
        ({"step_set": [0, [1], 2]}, "step_set holds 32-bit integers"),
        ({"page_bytes": 0}, "page_bytes is positive"),
        ({"page_bytes": -1}, "page_bytes is an integer, 0 or more"),
        ({"page_bytes": 1.5}, "page_bytes is an integer, 0 or more"),
        ({"page_count": 2**31}, "counted in 31 bits"),
        ({"frame_count": 1}, "initial_pages fit in frame_count"),
        ({"initial_pages": [0, 0]}, "initial_pages holds each page once"),
        ({"initial_pages": [0, 4]}, r"initial_pages lies in 0\.\.3"),
        ({"initial_pages": [0]}, "a resident page"),
        ({"action_page_in": [2, 9]}, r"action_page_in lies in 0\.\.3"),
        ({"action_page_in": [0, 1]}, r"reads an absent page \(0 is resident\)"),
        ({"action_page_in": [2, 3]}, "a pass leaves exactly initial_pages resident"),
        ({"action_evict": [-2, 2]}, r"action_evict lies in -1\.\.3"),
        ({"action_evict": [-1, 2]}, "at most frame_count pages are resident"),
        ({"action_evict": [3, 2]}, r"evicts a resident page \(3 is absent\)"),
        ({"action_evict": [1]}, "action_evict has one entry per action"),
        ({"action_step": [4, 4]}, r"action_step lies in 0\.\.3"),
        ({"action_step": [2, 1]}, "action_step never decreases"),
        ({"action_step": [3, 3]}, "action_step is at most action_deadline"),
        ({"action_deadline": [2, 6]}, r"action_deadline lies in 0\.\.5"),
        ({"action_deadline": [4, 3]}, "action_deadline never decreases"),
        ({"page_ins_per_pass": 1}, "page_ins_per_pass is the number of actions"),
        ({"hits_per_pass": 3}, "hits_per_pass is accesses_per_pass less"),
        ({"lower_bound_page_ins": 2.5}, "lower_bound_page_ins is at most page_ins_per_pass"),
        ({"lower_bound_page_ins": float("nan")}, "lower_bound_page_ins is a number"),
        ({"lower_bound_page_ins": "1"}, "lower_bound_page_ins is a number"),
        ({"working_set_pages": 5}, "working_set_pages is at most page_count"),
        ({"largest_step_pages": 3}, "largest_step_pages is at most frame_count"),
    ],
)
def test_every_rule_is_checked_on_load(change: dict[str, Any], rule: str) -> None:
    content = json.loads(small_schedule().to_json())
    assert content["initial_pages"] == [0, 1]
    assert (content["action_page_in"], content["action_evict"]) == ([2, 1], [1, 2])
    assert (content["action_step"], content["action_deadline"]) == ([2, 3], [2, 4])
    with pytest.raises(ValueError, match=f"schedule.*{rule}"):
        PageSchedule.from_json(json.dumps({**content, **change}))


@pytest.mark.parametrize("field", ["step_set", "page_bytes", "lower_bound_page_ins", "version", "format"])
def test_a_missing_field_is_named(field: str) -> None:
    content = json.loads(small_schedule().to_json())
    del content[field]
    with pytest.raises(ValueError, match=field):
        PageSchedule.from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", '"x"', "[" * 100_000])
def test_text_that_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="schedule"):
        PageSchedule.from_json(text)


def test_an_array_of_another_type_is_refused() -> None:
    schedule = small_schedule()
    with pytest.raises(ValueError, match="initial_pages is an int32 vector"):
        dataclasses.replace(schedule, initial_pages=schedule.initial_pages.astype(np.int64))


def test_the_shadow_executor_finds_an_absent_page() -> None:
    late = changed(small_schedule(), action_deadline=[3, 4])
    with pytest.raises(ValueError, match="pass 0, step 2: page 2 is absent"):
        simulate(late, STEPS, eager=False)


def test_the_shadow_executor_finds_a_page_in_use_that_would_go() -> None:
    nested = steps_from_events([2, 1, -1, -2, 3, -3], [[0], [1], [2]])
    schedule = changed(small_schedule(), step_set=[1, 0, 2], action_step=[1, 3], action_deadline=[1, 3])
    with pytest.raises(ValueError, match=r"step 1 waits for page 2, but page 1 can't be evicted"):
        simulate(schedule, nested)


def test_the_shadow_executor_refuses_other_steps() -> None:
    other = steps_from_events([1, -1, 3, -3, 2, -2], [[0], [1], [2]])
    with pytest.raises(ValueError, match="made for other steps"):
        simulate(small_schedule(), other)


def test_eager_and_lazy_runs_read_the_same_pages_and_never_exceed_the_frames() -> None:
    for seed in range(50):
        steps, page_count = random_pass(seed, pages_max=30, steps_max=20)
        frame_count = frames_for(steps)
        schedule = plan_pass(steps, frame_count=frame_count, page_bytes=1, page_count=page_count)
        eager, lazy = simulate(schedule, steps), simulate(schedule, steps, eager=False)
        assert eager.page_ins == lazy.page_ins == (schedule.page_ins_per_pass,) * 3
        assert max(eager.resident_pages_max, lazy.resident_pages_max) <= frame_count
        assert eager.ahead_pages >= lazy.ahead_pages


def frames_for(steps: Steps) -> int:
    need = [
        {
            page
            for opened in range(step + 1)
            if steps.step_end[opened] >= step
            for page in steps.set_pages[int(steps.step_set[opened])].tolist()
        }
        for step in range(steps.count)
    ]
    return max(1, *map(len, need), len(set().union(*need)) * 2 // 3)
