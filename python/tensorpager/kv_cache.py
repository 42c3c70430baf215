# SPDX-License-Identifier: Apache-2.0
"""`KVCache`: keys and values of a long context in pages, for any model of transformers.

A cache has a core of its own: an address space, a budget of frames and an executor, beside those of the model. In a
sweep that is repeated each frame saves one read a pass, whoever has it. So two budgets read what one of their sum
would, and the weights' schedule stays what it is while a context grows.

Threads: one at a time. Blocking: attention waits for its layer's pages.
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from tensorpager.device import HOST
from tensorpager.errors import ClosedError, PagedTensorError
from tensorpager.kv_layer import PagedLayer, RecordSpace
from tensorpager.kv_sweep import Sweep
from tensorpager.pager import Pager, make_core

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["KVCache"]

#: Tokens that there are addresses for from the start, when neither max_tokens nor the model's configuration says.
_TOKENS_DEFAULT = 2**17
#: Nor more than so many from the start: a page table takes about 100 bytes for each page there are addresses for.
_TOKENS_MAX = 2**20


class KVCache(DynamicCache):  # type: ignore[misc]
    """A cache for `generate(past_key_values=...)` and for a model's forward, whose keys and values are paged.

        cache = tp.KVCache(model.pager, budget="512MiB")
        tokens = model.generate(**inputs, past_key_values=cache)

    pager: of the model that attends, for its device, engine and spill directory, unless they are given; closing it
    closes the cache. budget: bytes of keys and values that may be resident; those of one layer should fit with four
    pages to spare. On the host a larger layer comes in as it is touched, which is slow; on a device it is BudgetError.
    host_budget: on a device, of the RAM beneath. max_tokens: that there are addresses for from the start; by default
    the model's max_position_embeddings. More are moved to a larger place once. config: of the model, when it is not
    `pager`'s; page_bytes, engine, store: as for `page()`.

    Everything that generate() does with a cache works: greedy, sampling, beams, assisted decoding, sliding windows,
    several turns; two of them make an EncoderDecoderCache. Layers of linear attention stay in memory, whose size does
    not grow. The tokens and logits are those of a DynamicCache, bit for bit. A copy (copy.deepcopy, pickle) is an
    ordinary DynamicCache.

    Raises PagedTensorError for a model that has layers of other kinds, ClosedError after close(); BudgetError,
    IoError, EngineError, MemoryMapError, ValueError as page() does.
    """

    def __init__(
        self,
        pager: Pager,
        budget: int | str = "256MiB",
        *,
        max_tokens: int | None = None,
        host_budget: int | str | None = None,
        page_bytes: int = 0,
        engine: str | None = None,
        store: str | os.PathLike[str] | None = None,
        config: Any = None,
    ) -> None:
        core = pager._core
        if pager.closed:
            msg = "the pager is closed: a KV cache takes its device and its directories, and ends with it"
            raise ClosedError(msg)
        model = pager._model() if pager._model is not None else None
        config = getattr(model, "config", None) if config is None else config
        if max_tokens is not None and max_tokens < 1:
            msg = f"max_tokens is {max_tokens}; there has to be room for a token"
            raise ValueError(msg)
        self._config = config
        self._core = make_core(
            budget,
            core.spill_directory or None if store is None else store,
            core.stats()["engine"] if engine is None else engine,
            page_bytes,
            None if core.device == HOST else core.device,
            host_budget,
        )
        self._sweep = Sweep(self._core)
        self._space = RecordSpace(self._core, _tokens_of(config) if max_tokens is None else max_tokens)
        try:
            layers = None if config is None else self._layers_of(config)
        except BaseException:
            self._core.close()
            raise
        if layers:
            Cache.__init__(self, layers=layers)
        else:
            Cache.__init__(self, layer_class_to_replicate=self._next_layer)
        pager._attach_cache(self, self._sweep)

    def _layers_of(self, config: Any) -> list[Any]:
        """What takes the place of the layers that transformers itself would make."""
        layers: list[Any] = []
        for number, layer in enumerate(DynamicCache(config=config).layers):
            kind = type(layer)
            if kind is DynamicLayer:
                layers.append(PagedLayer(self._space, self._sweep, number))
            elif kind is DynamicSlidingWindowLayer:
                layers.append(PagedLayer(self._space, self._sweep, number, layer.sliding_window))
            elif kind is LinearAttentionLayer or (kind is DummyLayer and self._core.device == HOST):
                layers.append(layer)
            else:
                why = (
                    "uses keys of another layer, which are not held any more" if kind is DummyLayer else "is not paged"
                )
                msg = f"layer {number} of this model is a {kind.__name__}, which {why}; use a DynamicCache"
                raise PagedTensorError(msg)
        return layers

    def _next_layer(self) -> PagedLayer:
        return PagedLayer(self._space, self._sweep, len(self.layers))

    # -- facts

    @property
    def closed(self) -> bool:
        """Whether close() was called, or the pager's."""
        return self._core.closed

    @property
    def budget_bytes(self) -> int:
        """Bytes of the frames: what may be resident at once."""
        return self._core.budget_bytes

    @property
    def _paged(self) -> list[PagedLayer]:
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    def stats(self) -> dict[str, Any]:
        """Counters of the cache's own core, as those of `Pager.stats()`, and these.

        context_tokens and context_bytes: what is stored, of all layers. plans: how often the sweep was planned for;
        plan_failure: why there is no schedule, or None; schedule: its certificate, or None: pages that a pass reads and
        writes (moved_pages_per_pass), the least that any schedule could (lower_bound_moved_pages; 0 without scipy),
        page_ins_per_pass and lower_bound_page_ins, working_set_pages, frame_count.
        """
        counters: dict[str, Any] = dict(self._core.stats())
        schedule = self._sweep.schedule
        counters["page_bytes"] = self._core.page_bytes
        counters["context_tokens"] = self.get_seq_length()
        counters["context_bytes"] = sum(layer.record_bytes * layer.tokens_stored for layer in self._paged)
        counters["plans"] = self._sweep.plan_count
        counters["plan_failure"] = self._sweep.plan_failure
        counters["schedule"] = None if schedule is None else {name: getattr(schedule, name) for name in _CERTIFICATE}
        return counters

    def reset_stats(self) -> None:
        """Set the counters to zero, the high-water marks to what is resident now."""
        self._core.reset_stats()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.get_seq_length()} tokens"
        return f"KVCache({state}, {len(self.layers)} layers, budget of {self.budget_bytes} bytes)"

    # -- life

    def reset(self) -> None:
        """Forget all tokens. The next ones may come in another batch."""
        self._sweep.forget()
        super().reset()

    def close(self) -> None:
        """Free frames and spill. The tokens are gone; any later use raises ClosedError. Idempotent."""
        self._sweep.leave()
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        ordinary = DynamicCache(config=self._config)
        copies = [
            layer.ordinary() if isinstance(layer, PagedLayer) else copy.deepcopy(layer, memo) for layer in self.layers
        ]
        if ordinary.layers:
            ordinary.layers = copies
        else:  # made as they are wanted, and so are more
            ordinary.layers.extend(copies)
        return ordinary

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return _itself, (copy.deepcopy(self),)


_CERTIFICATE = (
    "moved_pages_per_pass",
    "lower_bound_moved_pages",
    "page_ins_per_pass",
    "lower_bound_page_ins",
    "working_set_pages",
    "largest_step_pages",
    "frame_count",
)


def _itself(ordinary: Any) -> Any:
    return ordinary


def _tokens_of(config: Any) -> int:
    tokens = getattr(config, "max_position_embeddings", None) if config is not None else None
    return min(tokens, _TOKENS_MAX) if isinstance(tokens, int) and tokens > 0 else _TOKENS_DEFAULT
