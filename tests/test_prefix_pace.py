# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from tensorpager.prefix_pace import Pace


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
