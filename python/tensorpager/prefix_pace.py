# SPDX-License-Identifier: Apache-2.0
"""How fast a model computes prompts here, from the passes that were seen: for the choice between loading and computing.

Threads: one at a time.
"""

from __future__ import annotations

import statistics
from collections import deque

from tensorpager.prefix_plan import ComputeRate

__all__ = ["Pace"]

#: Passes over fewer tokens tell what a pass takes, those over more what a token takes.
_FEW_TOKENS = 8
_PASSES_KEPT = 16


class Pace:
    """How fast passes were. flops_per_token: of the model's weights; flops_per_pair: of attention."""

    def __init__(self, flops_per_token: float, flops_per_pair: float) -> None:
        self._work = ComputeRate(1.0, flops_per_token, flops_per_pair)
        self._flops_per_second: deque[float] = deque(maxlen=_PASSES_KEPT)
        self._pass_seconds: deque[float] = deque(maxlen=_PASSES_KEPT)

    def passed(self, first: int, end: int, seconds: float) -> None:
        """A pass over the tokens first .. end - 1 took so long."""
        if seconds <= 0 or end <= first:
            return
        if end - first <= _FEW_TOKENS:
            self._pass_seconds.append(seconds)
        else:
            self._flops_per_second.append(self._work.flops(first, end) / seconds)

    def computed(self, first: int, end: int, seconds: float) -> None:
        """An earlier run has noted what so many tokens took; only asked while nothing better is known."""
        if seconds > 0 and not self._flops_per_second:
            self._flops_per_second.append(self._work.flops(first, end) / seconds)

    @property
    def rate(self) -> ComputeRate | None:
        """None while nothing is known."""
        if not self._flops_per_second or self._work.flops_per_token <= 0:
            return None
        return ComputeRate(
            statistics.median(self._flops_per_second),
            self._work.flops_per_token,
            self._work.flops_per_pair,
            min(self._pass_seconds, default=0.0),
        )
