# SPDX-License-Identifier: Apache-2.0
"""Which steps run in one piece of a captured graph, and what is held while the piece runs.

Page operations happen on the host, so a graph is cut wherever one has to. A piece for each of them would be a launch
for each module. Neighbouring steps that fit a small part of the budget together are held together instead: then only
the first of them needs a cut.

Page operations are events as the core records them: +(set_id + 1) acquires, -(set_id + 1) releases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

__all__ = ["Piece", "plan_pieces"]


@dataclass
class Piece:
    """What begins with an acquire and lasts until the next piece.

    first: the number, among all acquires, of the one that begins it. sets: what is held while it runs: the sets that
    are still acquired from before, and those that are acquired in it, each once, in the order of their first use.
    """

    first: int
    sets: list[int] = field(default_factory=list)
    pages: set[int] = field(default_factory=set)

    def add(self, set_id: int, pages: Iterable[int]) -> None:
        """Hold this set too."""
        if set_id not in self.sets:
            self.sets.append(set_id)
            self.pages.update(pages)


def plan_pieces(events: Iterable[int], pages_of: Callable[[int], Iterable[int]], pages_max: int) -> list[Piece]:
    """Cut a run into as few pieces as hold at most pages_max pages each; a larger set is a piece of its own.

    pages_of: the pages of a set id. The pages of sets that stay acquired count in every piece that they last through.
    ValueError when a set is released that is not acquired.
    """
    pieces: list[Piece] = []
    open_sets: Counter[int] = Counter()
    known: dict[int, frozenset[int]] = {}
    number = -1
    for event in events:
        set_id = abs(event) - 1
        if event < 0:
            if open_sets[set_id] == 0:
                msg = f"set {set_id} is released and was not acquired"
                raise ValueError(msg)
            open_sets[set_id] -= 1
            continue
        number += 1
        open_sets[set_id] += 1
        if set_id not in known:
            known[set_id] = frozenset(pages_of(set_id))
        current = pieces[-1] if pieces else None
        if current is None or len(current.pages | known[set_id]) > max(pages_max, len(current.pages)):
            current = Piece(number)
            pieces.append(current)
            for open_id in [each for each, count in open_sets.items() if count > 0]:
                current.add(open_id, known[open_id])
        current.add(set_id, known[set_id])
    return pieces
