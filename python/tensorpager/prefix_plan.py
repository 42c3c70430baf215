# SPDX-License-Identifier: Apache-2.0
"""Load a stored prefix, recompute it, or load some of it: whichever makes the first token come soonest.

[Note: in part]
Loading takes its bytes; computing takes at least as long as one pass over the weights, however few the tokens are. So
where weights are paged, tokens up to a point cost nothing beside a pass that has to be made in any case, and the best
plan may load most blocks and recompute the last. Later tokens attend to more, so those that are recomputed are the
dearest ones: a prefix is all that can be loaded.

Seconds, bytes and tokens go in, a plan comes out; nothing is measured here. Threads: any.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ComputeRate", "PrefixPlan", "ReadRate", "plan_prefix"]


@dataclass(frozen=True)
class ReadRate:
    """How fast blocks come from the drive: start_seconds for any at all, and bytes_per_second."""

    bytes_per_second: float
    start_seconds: float = 0.0

    def seconds(self, size_bytes: float) -> float:
        """For so many bytes; 0 for none."""
        return self.start_seconds + size_bytes / self.bytes_per_second if size_bytes > 0 else 0.0


@dataclass(frozen=True)
class ComputeRate:
    """How fast a prompt is computed.

    flops_per_token: of the weights. flops_per_pair: of attention, for one token and one that it sees. start_seconds:
    of a pass, whatever it computes. pass_seconds: the least that a pass takes: reading the weights, where they are
    paged, goes on beside the computing.
    """

    flops_per_second: float
    flops_per_token: float
    flops_per_pair: float = 0.0
    pass_seconds: float = 0.0
    start_seconds: float = 0.0

    def flops(self, first: int, end: int) -> float:
        """Of the tokens first .. end - 1, each of which sees those before it and itself."""
        return (end - first) * self.flops_per_token + (end - first) * (first + end + 1) / 2 * self.flops_per_pair

    def seconds(self, first: int, end: int) -> float:
        """For a pass over the tokens first .. end - 1."""
        return max(self.pass_seconds, self.start_seconds + self.flops(first, end) / self.flops_per_second)


@dataclass(frozen=True)
class PrefixPlan:
    """load_tokens: 0 to recompute all. seconds: to the first token; of these load_seconds for loading. The other two:
    when nothing, or all that is stored, is loaded."""

    load_tokens: int
    seconds: float
    load_seconds: float
    seconds_recomputed: float
    seconds_loaded: float


def plan_prefix(
    *,
    prompt_tokens: int,
    stored_tokens: int,
    block_tokens: int,
    bytes_per_token: float,
    read: ReadRate,
    compute: ComputeRate,
) -> PrefixPlan:
    """How much to load of a prompt whose first stored_tokens are stored, in blocks; at least one token is computed.

    ValueError for numbers that can't be: a rate or block_tokens that is not positive, fewer tokens than one, or
    stored_tokens that are no blocks.
    """
    if min(read.bytes_per_second, compute.flops_per_second, block_tokens, prompt_tokens) <= 0:
        msg = f"{read}, {compute}, block_tokens {block_tokens} and prompt_tokens {prompt_tokens} must be positive"
        raise ValueError(msg)
    if stored_tokens < 0 or stored_tokens % block_tokens != 0:
        msg = f"stored_tokens is {stored_tokens}: not blocks of {block_tokens} tokens"
        raise ValueError(msg)
    blocks = min(stored_tokens, prompt_tokens - 1) // block_tokens
    options: list[tuple[float, int, float]] = []
    for count in range(blocks + 1):
        tokens = count * block_tokens
        load = read.seconds(tokens * bytes_per_token)
        options.append((load + compute.seconds(tokens, prompt_tokens), -tokens, load))
    seconds, tokens, load = min(options)
    return PrefixPlan(-tokens, seconds, load, options[0][0], options[-1][0])
