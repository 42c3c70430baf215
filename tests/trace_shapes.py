# SPDX-License-Identifier: Apache-2.0
"""Traces to plan: random ones, tiny ones that can be searched through, and models in a few lines."""

from __future__ import annotations

import random

from tensorpager.operator_trace import Trace, TraceStep, TraceTensor

PAGE = 4096


class TraceBuilder:
    """Collects tensors and steps; what does not persist dies with its last use."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: list[TraceTensor] = []
        self.steps: list[dict[str, object]] = []

    def tensor(self, name: str, pages: float, kind: str) -> int:
        self.tensors.append(TraceTensor(name, int(pages * PAGE), kind))
        return len(self.tensors) - 1

    def step(self, name: str, **fields: object) -> None:
        self.steps.append({"name": name, **fields})

    def trace(self, tokens: int = 0) -> Trace:
        last: dict[int, int] = {}
        for index, step in enumerate(self.steps):
            for name in ("reads", "writes", "overwrites"):
                last.update(dict.fromkeys(step.get(name, ()), index))  # type: ignore[call-overload]
        for number, index in last.items():
            if not self.tensors[number].persistent:
                self.steps[index]["dies"] = (*self.steps[index].get("dies", ()), number)  # type: ignore[misc]
        steps = tuple(TraceStep(**step) for step in self.steps)  # type: ignore[arg-type]
        return Trace(self.name, tuple(self.tensors), steps, tokens)


def clean_trace(order: tuple[int, ...]) -> Trace:
    """One page per step, read only: order holds the pages."""
    built = TraceBuilder("clean")
    for page in range(max(order) + 1):
        built.tensor(f"page {page}", 1, "weight")
    for page in order:
        built.step("read", reads=(page,))
    return built.trace()


def random_trace(seed: int, *, steps_max: int = 24, tensors_max: int = 10, pages_max: int = 6) -> Trace:
    """Weights, state, activations, in use in all ways; some smaller than a page."""
    rng = random.Random(seed)
    built = TraceBuilder(f"random {seed}")
    lasting = [
        built.tensor(f"w{index}", rng.choice((0.3, 1, rng.randint(1, pages_max))), rng.choice(("weight", "state")))
        for index in range(rng.randint(1, tensors_max))
    ]
    changing = [number for number in lasting if rng.random() < 0.4]
    alive: list[int] = []
    for index in range(rng.randint(2, steps_max)):
        uses: dict[str, list[int]] = {"reads": [], "writes": [], "overwrites": []}
        for number in rng.sample(lasting, rng.randint(0, min(3, len(lasting)))):
            kinds = ("reads", "reads", "writes", "overwrites") if number in changing else ("reads",)
            uses[rng.choice(kinds)].append(number)
        for number in rng.sample(alive, rng.randint(0, min(2, len(alive)))):
            uses[rng.choice(("reads", "reads", "writes", "overwrites"))].append(number)
        if rng.random() < 0.5:
            alive.append(built.tensor(f"a{index}", rng.choice((0.2, rng.randint(1, pages_max))), "activation"))
            uses["overwrites"].append(alive[-1])
        if rng.random() < 0.2 and alive:
            alive.pop(rng.randrange(len(alive)))
        built.step(
            f"s{index}", flops=rng.choice((0, 1, 10, 1000)), **{name: tuple(each) for name, each in uses.items()}
        )
    return built.trace(tokens=rng.choice((0, 16)))


def training_trace(*, layers: int = 6, microbatches: int = 1, weight_pages: int = 20, act_pages: int = 6) -> Trace:
    """Forward, backward, an optimizer after it; the gradients accumulate over the microbatches."""
    built = TraceBuilder("training")
    weight = [built.tensor(f"layers.{layer}.weight", weight_pages, "weight") for layer in range(layers)]
    state = [built.tensor(f"exp_avg.layers.{layer}.weight", 2 * weight_pages, "state") for layer in range(layers)]
    gradient = [built.tensor(f"gradient {layer}", weight_pages, "gradient") for layer in range(layers)]
    for batch in range(microbatches):
        act = [built.tensor(f"act {batch} {layer}", act_pages, "activation") for layer in range(layers + 1)]
        built.step("inputs", overwrites=(act[0],), microbatch=batch, scope="embedding")
        for layer in range(layers):
            inner = built.tensor(f"inner {batch} {layer}", 3 * act_pages, "activation")
            common = {"scope": f"layers.{layer}", "microbatch": batch, "flops": 2_000_000}
            built.step("up", reads=(weight[layer], act[layer]), overwrites=(inner,), **common)
            built.step("down", reads=(weight[layer], inner), overwrites=(act[layer + 1],), **common)
        flow = act[layers]
        for layer in reversed(range(layers)):
            inner = built.tensors.index(TraceTensor(f"inner {batch} {layer}", 3 * act_pages * PAGE, "activation"))
            common = {"scope": f"layers.{layer}", "microbatch": batch, "flops": 4_000_000, "phase": "backward"}
            kind = "overwrites" if batch == 0 else "writes"
            below = built.tensor(f"flow {batch} {layer}", act_pages, "activation")
            reads = (weight[layer], inner, act[layer], flow)
            made = {"overwrites": (below,)}
            made[kind] = (*made.get(kind, ()), gradient[layer])
            built.step("grad", reads=tuple(dict.fromkeys(reads)), **made, **common)
            flow = below
    for layer in range(layers):
        built.step(
            "adam", reads=(gradient[layer],), writes=(weight[layer], state[layer]), phase="optimizer", flops=1000
        )
    return built.trace(tokens=128 * microbatches)
