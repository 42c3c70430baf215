# SPDX-License-Identifier: Apache-2.0
"""Decoding with a context of eight times the budget of its cache: `python -m bench kv-cache`.

Bytes: what the cache's engine read and wrote from the first token of the prompt to the last of the answer, over the
least that any schedule could. The least is Belady's MIN over the very passes that were made, where what nobody has
written costs nothing, and one write of each page that is not resident at the end. Bits: logits of every token, against
the same model with transformers' own cache. Time: a token, over the longer of the unpaged one's and of its bytes at the
drive's rate just then, in interleaved rounds.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import transformers

import tensorpager as tp
from bench.rounds import interleave, print_table, save
from tensorpager.budget import format_bytes
from tensorpager.measured_hardware import drive_rates

LAYERS, HEADS, HEAD_SIZE, ROWS = 16, 16, 64, 4
PROMPT = 2036
TOKENS = 4  # a round
TIMES_THE_BUDGET = 8


def make_model() -> Any:
    """Hardly any weights, and 32 KiB of keys and values a token and layer: 64 tokens a page."""
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_SIZE,
        vocab_size=256,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def least_reads(sets: Iterable[set[int]], frames: int) -> int:
    """Pages that MIN reads; of any schedule the fewest."""
    steps = list(sets)
    uses: dict[int, list[int]] = {}
    for step, pages in enumerate(steps):
        for page in pages:
            uses.setdefault(page, []).append(step)
    following = {page: iter([*places[1:], len(steps)]) for page, places in uses.items()}
    next_use: dict[int, int] = {}
    resident: set[int] = set()
    seen: set[int] = set()
    reads = 0
    for pages in steps:
        reads += len((pages - resident) & seen)
        seen |= pages
        resident |= pages
        for page in pages:
            next_use[page] = next(following[page])
        excess = max(0, len(resident) - frames)
        for page in sorted(resident - pages, key=lambda each: -next_use[each])[:excess]:
            resident.remove(page)
    return reads


def least_pages(lengths: list[int], tokens_per_page: int, frames: int) -> int:
    """Read and written, for passes after which the context had these lengths."""
    pages_max = -(-lengths[-1] // tokens_per_page)
    sets = [
        {layer * pages_max + page for page in range(-(-length // tokens_per_page))}
        for length in lengths
        for layer in range(LAYERS)
    ]
    return least_reads(sets, frames) + LAYERS * pages_max - frames


class Decoded:
    """One model that decodes greedily, some tokens at a time."""

    def __init__(self, model: Any, ids: torch.Tensor, cache: Any) -> None:
        self._model = model
        self._cache = cache
        self.logits: list[torch.Tensor] = []
        self._next = ids
        self._pass()

    def _pass(self) -> None:
        with torch.no_grad():
            logits = self._model(self._next, past_key_values=self._cache, logits_to_keep=1).logits
        self.logits.append(logits)
        self._next = logits[:, -1].argmax(-1, keepdim=True)

    def measure(self) -> Mapping[str, float]:
        gc.collect()
        stats = getattr(self._cache, "stats", dict)
        before = stats()
        began = time.perf_counter()
        for _ in range(TOKENS):
            self._pass()
        figures = {"seconds": (time.perf_counter() - began) / TOKENS}
        after = stats()
        for name in ("bytes_read", "bytes_written", "stall_ns") if after else ():
            figures[name] = (after[name] - before[name]) / TOKENS
        return figures


def run(rounds: int) -> None:
    """Print a table, and write results/<date>-kv-cache.json."""
    transformers.logging.set_verbosity_error()
    model, twin = make_model(), make_model()
    ids = torch.randint(2, 256, (ROWS, PROMPT), generator=torch.Generator().manual_seed(1))
    context_tokens = PROMPT + rounds * TOKENS
    record_bytes = 2 * ROWS * HEADS * HEAD_SIZE * 4
    budget_bytes = LAYERS * -(-context_tokens * record_bytes // 2**21) * 2**21 // TIMES_THE_BUDGET
    with tempfile.TemporaryDirectory(dir=".") as directory, tp.page(model, budget="64MiB", store=directory) as pager:
        cache = tp.KVCache(pager, budget_bytes, page_bytes=2**21)

        def drive() -> Mapping[str, float]:
            read, write, _ = drive_rates(directory, 1.0)
            return {"read_bytes_per_second": read, "write_bytes_per_second": write}

        unpaged = Decoded(twin, ids, transformers.DynamicCache(config=twin.config))
        paged = Decoded(model, ids, cache)
        contenders: dict[str, Callable[[], Mapping[str, float]]] = {
            "drive": drive,
            "unpaged": unpaged.measure,
            "paged": paged.measure,
        }
        measured = interleave(contenders, rounds)
        stats = cache.stats()
    same = sum(torch.equal(one, other) for one, other in zip(unpaged.logits, paged.logits, strict=True))
    lengths = [PROMPT + count for count in range(rounds * TOKENS + 1)]
    moved = (stats["bytes_read"] + stats["bytes_written"]) // 2**21
    least = least_pages(lengths, 2**21 // record_bytes, budget_bytes // 2**21)
    floors = [
        max(
            plain["seconds"],
            sample["bytes_read"] / rate["read_bytes_per_second"]
            + sample["bytes_written"] / rate["write_bytes_per_second"],
        )
        for plain, sample, rate in zip(
            measured["unpaged"].samples, measured["paged"].samples, measured["drive"].samples, strict=True
        )
    ]
    over_floor = [sample["seconds"] / floor for sample, floor in zip(measured["paged"].samples, floors, strict=True)]
    summary = {
        "context_bytes": stats["context_bytes"],
        "budget_bytes": stats["budget_bytes"],
        "bytes_over_least": moved / least,
        "passes_with_equal_logits": same,
        "passes": len(paged.logits),
        "seconds_over_floor": statistics.median(over_floor),
        "resident_bytes_max": stats["resident_bytes_max"],
    }
    print_table(
        ("context", "budget", "bytes / least", "equal logits", "s/token", "unpaged", "time / floor"),
        [
            (
                format_bytes(stats["context_bytes"]),
                format_bytes(stats["budget_bytes"]),
                f"{moved / least:.3f}",
                f"{same} of {len(paged.logits)}",
                f"{measured['paged'].median('seconds'):.3f}",
                f"{measured['unpaged'].median('seconds'):.3f}",
                f"{summary['seconds_over_floor']:.2f}",
            )
        ],
    )
    arguments = {"layers": LAYERS, "heads": HEADS, "head_size": HEAD_SIZE, "rows": ROWS, "prompt": PROMPT}
    print(f"  written to {save('kv-cache', measured, summary, {**arguments, 'rounds': rounds, 'tokens': TOKENS})}")
