# SPDX-License-Identifier: Apache-2.0
"""How a run's steps are put together into pieces of a captured graph."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tensorpager.piece_plan import plan_pieces

PAGES = {0: [0, 1], 1: [2, 3], 2: [3, 4], 3: list(range(10, 20)), 4: [0]}


def sweep(*sets: int) -> list[int]:
    """Each set acquired and released in turn."""
    return [sign * (set_id + 1) for set_id in sets for sign in (1, -1)]


def test_neighbours_that_fit_are_held_together() -> None:
    pieces = plan_pieces(sweep(0, 1, 2, 3, 0), PAGES.__getitem__, 5)
    assert [(piece.first, piece.sets) for piece in pieces] == [(0, [0, 1, 2]), (3, [3]), (4, [0])]


def test_what_is_held_already_needs_no_cut_and_no_room() -> None:
    pieces = plan_pieces(sweep(0, 1, 4, 0), PAGES.__getitem__, 4)
    assert [(piece.first, piece.sets) for piece in pieces] == [(0, [0, 1, 4])]


def test_what_stays_acquired_is_held_in_every_piece() -> None:
    events = [1, *sweep(1), *sweep(3), -1, *sweep(1)]
    pieces = plan_pieces(events, PAGES.__getitem__, 4)
    assert [(piece.first, piece.sets) for piece in pieces] == [(0, [0, 1]), (2, [0, 3]), (3, [1])]


def test_no_room_for_two_is_a_piece_for_each() -> None:
    pieces = plan_pieces(sweep(0, 1, 2, 3), PAGES.__getitem__, 1)
    assert [piece.sets for piece in pieces] == [[0], [1], [2], [3]]


def test_no_steps_are_no_pieces() -> None:
    assert plan_pieces([], PAGES.__getitem__, 8) == []


def test_a_release_without_its_acquire_is_an_error() -> None:
    with pytest.raises(ValueError, match="set 1 is released"):
        plan_pieces([1, -1, -2], PAGES.__getitem__, 8)


@pytest.mark.parametrize("seed", range(50))
def test_every_open_set_is_held_by_its_piece_and_no_piece_is_too_large(seed: int) -> None:
    generator = random.Random(seed)
    pages = {number: generator.sample(range(40), generator.randint(1, 6)) for number in range(12)}
    events: list[int] = []
    stack: list[int] = []
    for _ in range(60):
        if stack and generator.random() < 0.5:
            events.append(-(stack.pop() + 1))
        elif len(stack) < 3:
            stack.append(generator.randrange(12))
            events.append(stack[-1] + 1)
    events += [-(set_id + 1) for set_id in reversed(stack)]
    pages_max = generator.randint(1, 20)
    pieces = plan_pieces(events, pages.__getitem__, pages_max)
    begins = {piece.first: piece for piece in pieces}
    current = None
    open_sets: Counter[int] = Counter()
    number = -1
    for event in events:
        open_sets[abs(event) - 1] += 1 if event > 0 else -1
        if event < 0:
            continue
        number += 1
        current = begins.get(number, current)
        assert current is not None
        needed = {page for each, count in open_sets.items() if count > 0 for page in pages[each]}
        assert needed <= current.pages
        assert current.pages == {page for each in current.sets for page in pages[each]}
    for piece in pieces:
        assert len(piece.sets) == 1 or len(piece.pages) <= max(pages_max, 3 * 6)
    assert len(pieces) <= number + 1
