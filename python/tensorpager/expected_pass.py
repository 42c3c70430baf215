# SPDX-License-Identifier: Apache-2.0
"""What to expect of a model whose passes differ: experts chosen by the data, early exits, orders that change.

No pass repeats, so none is worth a schedule of its own. What repeats is how often each set of pages is needed: of the
last passes, the one that is most like all of them is taken, without the sets that fewer than half of the passes need. A
read of a set with probability p is wasted with probability 1 - p and saves a fault with p, so p = 1/2 is where reading
ahead begins to pay. Everything else is read when it is needed. Results never depend on any of it.
"""

from __future__ import annotations

from collections import Counter, deque

import numpy as np
import numpy.typing as npt

__all__ = ["PassHistory"]

HISTORY_PASSES = 32
LIKELY = 0.5

Events = npt.NDArray[np.int32]


class PassHistory:
    """The events (+(set_id + 1) acquires, -(set_id + 1) releases) of the last HISTORY_PASSES passes."""

    def __init__(self) -> None:
        self._passes: deque[Events] = deque(maxlen=HISTORY_PASSES)

    def add(self, events: Events) -> None:
        """Remember a pass."""
        self._passes.append(events.copy())

    def frequencies(self) -> dict[int, float]:
        """The share of the passes that acquire each set at least once; sets in order of number."""
        counts = Counter(number for events in self._passes for number in _sets(events).tolist())
        return {number: counts[number] / len(self._passes) for number in sorted(counts)}

    def expected(self) -> Events:
        """The events to plan for; empty when no set is likely, or nothing was remembered."""
        likely = {number: share for number, share in self.frequencies().items() if share >= LIKELY}
        best = np.zeros(0, np.int32)
        best_score = 0.0
        for events in self._passes:
            score = sum(likely.get(number, 0.0) for number in _sets(events).tolist())
            if score > best_score:
                wanted = np.isin(np.abs(events) - 1, list(likely))
                best, best_score = events[wanted], score
        return best


def _sets(events: Events) -> Events:
    """The sets a pass acquires, each once."""
    return np.unique(events[events > 0] - 1)
