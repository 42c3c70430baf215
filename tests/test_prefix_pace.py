# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random

import pytest

from tensorpager.prefix_pace import Pace, ReadPace, line_through


def test_a_line_is_found_below_noise_and_spoilt_samples() -> None:
    chosen = random.Random(0)
    samples = [(work, 0.5 + work / 100 * chosen.uniform(0.95, 1.05)) for work in range(100, 1700, 100)]
    for spoilt in (3, 8, 12):
        samples[spoilt] = (samples[spoilt][0], samples[spoilt][1] * 10)
    start, rate = line_through(samples)
    assert start == pytest.approx(0.5, abs=0.4)
    assert rate == pytest.approx(100, rel=0.1)


def test_what_says_nothing_about_a_slope() -> None:
    assert line_through([(100.0, 2.0)]) == (0.0, 50.0)
    assert line_through([(100.0, 2.0), (110.0, 1.0)]) == (0.0, pytest.approx(80.0))  # too much alike
    assert line_through([(100.0, 2.0), (1000.0, 1.0)]) == (0.0, pytest.approx(525.0))  # more work took less
    assert line_through([(100.0, 1.0), (200.0, 3.0)]) == (0.0, pytest.approx(83.33, rel=1e-3))  # nothing would take < 0


def test_loads_tell_the_drives_rate() -> None:
    pace = ReadPace()
    assert pace.rate is None
    pace.loaded(0, 1.0)
    pace.loaded(10, 0.0)
    assert pace.rate is None
    for blocks in (1, 4, 2, 8):
        pace.loaded(blocks * 10**6, 0.01 + blocks * 1e-3)
    assert pace.rate is not None
    assert pace.rate.start_seconds == pytest.approx(0.01)
    assert pace.rate.bytes_per_second == pytest.approx(1e9)
    assert pace.rate.seconds(0) == 0.0


def test_passes_tell_how_fast_they_are() -> None:
    pace = Pace(1e6, 10.0)
    assert pace.rate is None
    for _ in range(5):
        pace.passed(0, 1000, 2.0)  # 1e9 flops, and half a million pairs
        pace.passed(1000, 1001, 0.25)
    rate = pace.rate
    assert rate is not None
    assert rate.pass_seconds == 0.25
    assert rate.seconds(0, 1000) == pytest.approx(2.0)
    assert rate.seconds(1000, 1001) == 0.25
    assert rate.flops(2, 4) == 2e6 + (3 + 4) * 10


def test_the_newest_passes_count_and_an_odd_one_does_not() -> None:
    pace = Pace(1e6, 0.0)
    for seconds in [100.0] * 30 + [1.0] * 12 + [50.0] * 3:
        pace.passed(0, 1000, seconds)
    rate = pace.rate
    assert rate is not None
    assert rate.seconds(0, 1000) == pytest.approx(1.0)


def test_what_an_earlier_run_noted_serves_until_there_is_better() -> None:
    pace = Pace(1e6, 0.0)
    pace.computed(0, 100, 0.0)  # it did not know either
    assert pace.rate is None
    pace.computed(100, 200, 5.0)
    pace.computed(100, 200, 500.0)
    assert pace.rate is not None
    assert pace.rate.seconds(0, 100) == pytest.approx(5.0)
    assert Pace(0.0, 0.0).rate is None
    nothing = Pace(1e6, 0.0)
    nothing.passed(5, 5, 1.0)
    nothing.passed(0, 100, 0.0)
    assert nothing.rate is None
