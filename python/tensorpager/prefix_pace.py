# SPDX-License-Identifier: Apache-2.0
"""How fast prompts are computed, and blocks loaded, on this machine: from what was seen of both.

A line is put through the newest samples, seconds over work, so that what any pass or load takes is told from what its
work takes. It is Theil and Sen's, by medians: a sample that something else on the machine has spoilt moves nothing.

Threads: one at a time.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from tensorpager.prefix_plan import ComputeRate, ReadRate

__all__ = ["Pace", "ReadPace", "line_through"]

#: Passes over fewer tokens tell what a pass takes, those over more what a token takes.
_FEW_TOKENS = 8
_SAMPLES_KEPT = 16
#: Two samples say something about a slope when their work differs by as much.
_UNLIKE = 1.25


def line_through(samples: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(seconds for any work at all, work per second) of samples (work, seconds), all positive and at least one."""
    ratio = statistics.median(work / seconds for work, seconds in samples)
    slopes = [
        (later - earlier) / (more - less)
        for index, (less, earlier) in enumerate(samples)
        for more, later in samples[index + 1 :]
        if max(more, less) > _UNLIKE * min(more, less)
    ]
    slope = statistics.median(slopes) if slopes else 0.0
    if slope <= 0:
        return 0.0, ratio
    start = statistics.median(seconds - slope * work for work, seconds in samples)
    return (start, 1 / slope) if start > 0 else (0.0, ratio)


class Pace:
    """How fast passes were. flops_per_token: of the model's weights; flops_per_pair: of attention."""

    def __init__(self, flops_per_token: float, flops_per_pair: float) -> None:
        self._work = ComputeRate(1.0, flops_per_token, flops_per_pair)
        self._samples: deque[tuple[float, float]] = deque(maxlen=_SAMPLES_KEPT)
        self._pass_seconds: deque[float] = deque(maxlen=_SAMPLES_KEPT)

    def passed(self, first: int, end: int, seconds: float) -> None:
        """A pass over the tokens first .. end - 1 took so long."""
        if seconds <= 0 or end <= first:
            return
        if end - first <= _FEW_TOKENS:
            self._pass_seconds.append(seconds)
        elif self._work.flops_per_token > 0:
            self._samples.append((self._work.flops(first, end), seconds))

    def computed(self, first: int, end: int, seconds: float) -> None:
        """An earlier run has noted what so many tokens took; that counts while nothing better is known."""
        if seconds > 0 and not self._samples:
            self.passed(first, max(end, first + _FEW_TOKENS + 1), seconds)

    @property
    def rate(self) -> ComputeRate | None:
        """None while nothing is known."""
        if not self._samples:
            return None
        start_seconds, flops_per_second = line_through(list(self._samples))
        return ComputeRate(
            flops_per_second,
            self._work.flops_per_token,
            self._work.flops_per_pair,
            min(self._pass_seconds, default=0.0),
            start_seconds,
        )


class ReadPace:
    """How fast loads were."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=_SAMPLES_KEPT)

    def loaded(self, size_bytes: int, seconds: float) -> None:
        """So many bytes took so long."""
        if size_bytes > 0 and seconds > 0:
            self._samples.append((float(size_bytes), seconds))

    @property
    def rate(self) -> ReadRate | None:
        """None while nothing is known."""
        if not self._samples:
            return None
        start_seconds, bytes_per_second = line_through(list(self._samples))
        return ReadRate(bytes_per_second, start_seconds)
