# SPDX-License-Identifier: Apache-2.0
"""Time to the first token with a prefix from the drive, and without: `python -m bench prefix-reuse`.

First the demo's model, paged at half of its size, with a prompt of 4,096 tokens and a few: recomputed, loaded, and as
the planner chooses. The blocks' files are dropped from the page cache before each load. Then 200 random cases on small
models of three kinds, for which loading is dear, cheap, or about the same as computing: is the planner's choice the
faster? It knows what a cache knows that has run a little: passes it has timed, and loads. Each case is measured both
ways, and as planned where that is neither.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import tensorpager as tp
from bench.rounds import interleave, print_table, save
from tensorpager.demo_checkpoint import make_checkpoint, shape_for

ROOT = Path(__file__).resolve().parent.parent
PREFIX, MORE = 4096, 16
RECOMPUTED_ROUNDS_MAX = 2  # a minute each
CASES = 200
CASE_TOKENS = 768
BLOCK_TOKENS = 64
#: Of one way over the other: nearer than this, the clock decides.
TIE = 0.05
#: Keys and values beside weights: little, some, much.
KINDS = {"dear to compute": (768, 2, 64), "about the same": (128, 8, 128), "dear to load": (32, 16, 128)}


def drop_from_cache(directory: str) -> None:
    for path in Path(directory).glob("*.prefix"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Prompted:
    """A paged model, a store, and one way to the first token after another."""

    def __init__(self, model: Any, directory: str, budget: str, block_tokens: int) -> None:
        self.model = model
        self.store = tp.PrefixStore(directory, "8GiB", block_tokens=block_tokens)
        self.cache = tp.KVCache(model.pager, budget, prefix_store=self.store, fingerprint="bench")

    def first_token(self, ids: torch.Tensor, choose: str | None) -> tuple[float, int]:
        """(seconds, tokens loaded); None: nothing is loaded."""
        self.cache.reset()
        drop_from_cache(self.store.directory)
        began = time.perf_counter()
        loaded = 0 if choose is None else self.cache.load_prefix(ids, choose=choose)
        with torch.no_grad():
            self.model(ids[:, loaded:], past_key_values=self.cache, logits_to_keep=1)
        return time.perf_counter() - began, loaded

    def fill(self, ids: torch.Tensor) -> None:
        self.first_token(ids, None)
        self.cache.save_prefix(ids)


def of_the_demo(rounds: int, size_bytes: int, directory: str) -> dict[str, Any]:
    (ROOT / ".demo").mkdir(exist_ok=True)
    checkpoint = make_checkpoint(ROOT / ".demo", shape_for(size_bytes))
    model = tp.from_pretrained(checkpoint, size_bytes // 2)
    with model.pager:
        prompted = Prompted(model, directory, "1GiB", 256)
        ids = torch.randint(3, 1000, (1, PREFIX + MORE), generator=torch.Generator().manual_seed(0))
        recomputed: list[float] = []

        def without() -> Mapping[str, float]:
            if len(recomputed) < RECOMPUTED_ROUNDS_MAX:
                recomputed.append(prompted.first_token(ids, None)[0])
            return {"seconds": recomputed[-1]}

        def loaded(choose: str) -> Callable[[], Mapping[str, float]]:
            def measure() -> Mapping[str, float]:
                seconds, tokens = prompted.first_token(ids, choose)
                return {"seconds": seconds, "loaded_tokens": tokens}

            return measure

        without()
        prompted.cache.save_prefix(ids)
        contenders = {"recomputed": without, "loaded": loaded("longest"), "planned": loaded("cheaper")}
        measured = interleave(contenders, rounds)
    rows = [
        (name, f"{each.median('seconds'):.2f}", f"{each.samples[-1].get('loaded_tokens', 0):.0f}")
        for name, each in measured.items()
    ]
    print_table((f"{PREFIX} + {MORE} tokens", "s to the first", "loaded"), rows)
    return {"measured": measured, "seconds": {name: each.median("seconds") for name, each in measured.items()}}


def small_model(hidden: int, heads: int, head_size: int) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=6,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_size,
        vocab_size=1024,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.pager = tp.page(model, budget="256MiB")
    return model


def random_cases(directory: str, cases: int) -> dict[str, Any]:
    chosen = random.Random(0)
    right = right_within_tie = 0
    outcomes: dict[str, int] = {}
    records = []
    for kind, (hidden, heads, head_size) in KINDS.items():
        model = small_model(hidden, heads, head_size)
        with model.pager:
            prompted = Prompted(model, f"{directory}/{heads}", "512MiB", BLOCK_TOKENS)
            base = torch.randint(3, 1000, (1, CASE_TOKENS), generator=torch.Generator().manual_seed(1))
            prompted.fill(base)
            for length in (CASE_TOKENS, CASE_TOKENS // 2, CASE_TOKENS // 4):  # what a cache has seen before
                for choose in (None, "longest"):
                    prompted.first_token(base[:, :length], choose)
            for _ in range(cases // len(KINDS) + 1):
                stored = chosen.randrange(1, CASE_TOKENS // BLOCK_TOKENS + 1) * BLOCK_TOKENS
                tail = torch.randint(3, 1000, (1, chosen.randrange(1, 200)))
                ids = torch.cat([base[:, :stored], tail], 1)
                record = one_case(prompted, ids)
                records.append({"kind": kind, "stored": stored, "prompt": ids.shape[1], **record})
                best = min(record["recomputed"], record["loaded"])
                right += record["planned"] <= best
                right_within_tie += record["planned"] <= best * (1 + TIE)
                outcome = "nothing" if record["tokens"] == 0 else "all" if record["tokens"] == stored else "some"
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
    count = len(records)
    print_table(
        ("random cases", "planner at least as fast", f"within {TIE:.0%}", "loads nothing / some / all"),
        [
            (
                str(count),
                f"{right / count:.1%}",
                f"{right_within_tie / count:.1%}",
                " / ".join(str(outcomes.get(name, 0)) for name in ("nothing", "some", "all")),
            )
        ],
    )
    return {"cases": records, "right": right / count, "right_within_tie": right_within_tie / count}


def one_case(prompted: Prompted, ids: torch.Tensor) -> dict[str, float]:
    """Seconds both ways, the less of two tries each, in turns; and what the planner chose."""
    times: dict[str, list[float]] = {"recomputed": [], "loaded": [], "planned": []}
    tokens = 0
    for _ in range(2):
        times["recomputed"].append(prompted.first_token(ids, None)[0])
        seconds, longest = prompted.first_token(ids, "longest")
        times["loaded"].append(seconds)
        seconds, tokens = prompted.first_token(ids, "cheaper")
        times["planned"].append(seconds)
    figures = {name: min(each) for name, each in times.items()}
    if tokens in (0, longest):  # the same thing again is as fast: the choice counts, not the clock
        figures["planned"] = figures["loaded" if tokens else "recomputed"]
    return {**figures, "tokens": tokens}


def run(rounds: int, size_bytes: int) -> None:
    """Print two tables, and write results/<date>-prefix-reuse.json."""
    transformers.logging.set_verbosity_error()
    directory = tempfile.mkdtemp(dir=ROOT, prefix=".prefixes-")
    try:
        cases = random_cases(directory, CASES)
        demo = of_the_demo(rounds, size_bytes, f"{directory}/demo")
    finally:
        shutil.rmtree(directory)
    recomputed, loaded = demo["seconds"]["recomputed"], demo["seconds"]["loaded"]
    summary = {
        "recomputed_over_loaded": recomputed / loaded,
        "planner_right": cases["right"],
        "planner_right_within_tie": cases["right_within_tie"],
        "case_seconds_median": statistics.median(record["planned"] for record in cases["cases"]),
        "cases": cases["cases"],
    }
    print(f"  loaded, the first token comes {recomputed / loaded:.1f} times as soon")
    print(f"  written to {save('prefix-reuse', demo['measured'], summary, {'rounds': rounds, 'prefix': PREFIX})}")
