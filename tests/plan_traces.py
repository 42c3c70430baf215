# SPDX-License-Identifier: Apache-2.0
"""Passes to plan: random ones with nested and overlapping windows, and the shapes of real models."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from tensorpager.pass_plan import Steps, steps_from_events


@dataclass
class PassBuilder:
    """Collects sets and events; tensors take consecutive pages."""

    page_count: int = 0
    sets: list[np.ndarray] = field(default_factory=list)
    events: list[int] = field(default_factory=list)

    def tensor(self, pages: int) -> int:
        self.sets.append(np.arange(self.page_count, self.page_count + pages))
        self.page_count += pages
        return len(self.sets) - 1

    def acquire(self, set_id: int) -> None:
        self.events.append(set_id + 1)

    def release(self, set_id: int) -> None:
        self.events.append(-(set_id + 1))

    def use(self, *set_ids: int) -> None:
        for set_id in set_ids:
            self.acquire(set_id)
            self.release(set_id)

    def steps(self) -> Steps:
        return steps_from_events(np.array(self.events, np.int32), self.sets)


def random_pass(seed: int, *, pages_max: int = 12, steps_max: int = 10, set_pages_max: int = 5) -> tuple[Steps, int]:
    """(steps, page_count): up to 8 sets, windows opened and closed at random, mostly nested."""
    rng = random.Random(seed)
    page_count = rng.randint(1, pages_max)
    sets = [
        rng.sample(range(page_count), rng.randint(0, min(page_count, set_pages_max))) for _ in range(rng.randint(1, 8))
    ]
    left, opened, events = rng.randint(1, steps_max), [], []
    open_more = rng.choice((0.1, 0.3, 0.5))
    while left or opened:
        if left and (not opened or rng.random() < open_more):
            opened.append(rng.randrange(len(sets)))
            events.append(opened[-1] + 1)
            left -= 1
        else:
            closed = opened.pop(rng.randrange(len(opened)) if rng.random() < 0.3 else -1)
            events.append(-(closed + 1))
    return steps_from_events(np.array(events, np.int32), sets), page_count


def llama(*, layers: int = 16, tied: bool = True, embedding_pages: int = 262) -> PassBuilder:
    """A Llama of about 1 billion parameters, one step per linear layer; norms stay open around their block."""
    built = PassBuilder()
    embedding = built.tensor(embedding_pages)
    blocks = [(built.tensor(1), [built.tensor(pages) for pages in (4, 1, 1, 4, 16, 16, 16)]) for _ in range(layers)]
    head = embedding if tied else built.tensor(embedding_pages)
    built.use(embedding)
    for norm, linears in blocks:
        built.acquire(norm)
        built.use(*linears)
        built.release(norm)
    built.use(head)
    return built


def encoder_decoder(*, layers: int = 6) -> PassBuilder:
    """The encoder once, then four decoder steps that each read the decoder and the shared embedding."""
    built = PassBuilder()
    shared = built.tensor(30)
    encoder = [built.tensor(12) for _ in range(layers)]
    decoder = [built.tensor(16) for _ in range(layers)]
    built.use(shared, *encoder)
    for _ in range(4):
        built.use(shared, *decoder, shared)
    return built


def shared_layer(*, repeats: int = 12) -> PassBuilder:
    """One layer used between all others, as in models that share weights across depth."""
    built = PassBuilder()
    common = built.tensor(20)
    for own in [built.tensor(7) for _ in range(repeats)]:
        built.use(common, own)
    return built


def uneven_steps(*, count: int = 60) -> PassBuilder:
    """Steps from 1 to 90 pages in no order."""
    built = PassBuilder()
    rng = random.Random(7)
    built.use(*[built.tensor(rng.choice((1, 2, 5, 30, 90))) for _ in range(count)])
    return built


def many_pages(*, pages: int = 70_000, steps: int = 500) -> PassBuilder:
    """The size the planner is measured at: one tensor a step, sizes uneven, neighbours share their border page."""
    built = PassBuilder()
    mean = pages // steps
    for step in range(steps):
        built.tensor(mean + (step * 37) % 29 - 14)
    for step in range(1, steps):
        built.sets[step] = np.concatenate([built.sets[step - 1][-1:], built.sets[step]])
    built.use(*range(steps))
    return built


MODEL_PASSES = {
    "llama": llama,
    "llama untied": lambda: llama(tied=False),
    "encoder-decoder": encoder_decoder,
    "shared layer": shared_layer,
    "uneven steps": uneven_steps,
}
