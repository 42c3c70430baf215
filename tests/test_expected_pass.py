# SPDX-License-Identifier: Apache-2.0
"""What is expected of passes that differ."""

from __future__ import annotations

import numpy as np

from tensorpager.expected_pass import HISTORY_PASSES, PassHistory


def events(*sets: int) -> np.ndarray:
    return np.array([event for number in sets for event in (number + 1, -number - 1)], np.int32)


def test_what_most_passes_need_is_expected_in_their_order() -> None:
    history = PassHistory()
    for passed in ((0, 5, 1), (0, 6, 1), (0, 5, 1), (0, 7, 1), (0, 1)):
        history.add(events(*passed))
    assert history.frequencies() == {0: 1.0, 1: 1.0, 5: 0.4, 6: 0.2, 7: 0.2}
    assert history.expected().tolist() == events(0, 1).tolist()
    history.add(events(0, 5, 1))  # now half of them need set 5
    assert history.expected().tolist() == events(0, 5, 1).tolist()


def test_windows_that_nest_stay_well_formed() -> None:
    history = PassHistory()
    history.add(np.array([1, 2, -2, 3, -3, -1], np.int32))
    history.add(np.array([1, 2, -2, -1], np.int32))
    history.add(np.array([1, 4, -4, 2, -2, -1], np.int32))
    assert history.expected().tolist() == [1, 2, -2, -1]


def test_old_passes_are_forgotten() -> None:
    history = PassHistory()
    history.add(events(9))
    for _ in range(HISTORY_PASSES):
        history.add(events(3))
    assert history.frequencies() == {3: 1.0}


def test_nothing_is_expected_of_nothing() -> None:
    history = PassHistory()
    assert history.frequencies() == {}
    assert history.expected().tolist() == []
    for number in range(4):
        history.add(events(number))
    assert history.expected().tolist() == []


def test_the_history_keeps_no_reference_to_the_events() -> None:
    history = PassHistory()
    recorded = events(1)
    history.add(recorded)
    recorded[:] = 0
    assert history.expected().tolist() == [2, -2]
