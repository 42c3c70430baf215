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
import weakref
from typing import TYPE_CHECKING, Any

import torch
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tensorpager.device import HOST
from tensorpager.errors import ClosedError, PagedTensorError
from tensorpager.fingerprint import Fingerprint
from tensorpager.kv_layer import PagedLayer, RecordSpace
from tensorpager.kv_sweep import Sweep
from tensorpager.pager import Pager, make_core
from tensorpager.prefix_pace import Pace
from tensorpager.prefix_reuse import PrefixReuse

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from tensorpager.prefix_plan import PrefixPlan
    from tensorpager.prefix_store import PrefixStore

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

    prefix_store: where load_prefix() and save_prefix() keep what prompts begin with, from one run to the next. What a
    sliding window is past is then kept, on disk, until it is saved. fingerprint: of the model, if the caller knows it
    (`fingerprint.model_fingerprint`); otherwise every weight is read once, the first time that it is needed.

    Raises PagedTensorError for a model that has layers of other kinds, ClosedError after close(); BudgetError,
    IoError, EngineError, MemoryMapError, ValueError as page() does.
    """

    def __init__(  # noqa: PLR0913 (they are the user's, each with a default)
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
        prefix_store: PrefixStore | None = None,
        fingerprint: str | None = None,
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
        self._fingerprint = fingerprint if fingerprint is not None or model is None else Fingerprint(model)
        self._model = None if model is None else weakref.ref(model)
        self._reuse = None if prefix_store is None else self._make_reuse(prefix_store)
        pager._attach_cache(self, self._sweep)

    def _layers_of(self, config: Any) -> list[Any]:
        """What takes the place of the layers that transformers itself would make."""
        layers: list[Any] = []
        for number, layer in enumerate(DynamicCache(config=config).layers):
            kind = type(layer)
            is_dummy = kind is getattr(cache_utils, "DummyLayer", None)  # of transformers 5, as linear attention is
            if kind is DynamicLayer:
                layers.append(PagedLayer(self._space, self._sweep, number))
            elif kind is DynamicSlidingWindowLayer:
                layers.append(PagedLayer(self._space, self._sweep, number, layer.sliding_window))
            elif kind is getattr(cache_utils, "LinearAttentionLayer", None) or (is_dummy and self._core.device == HOST):
                layers.append(layer)
            else:
                why = "uses keys of another layer, which are not held any more" if is_dummy else "is not paged"
                msg = f"layer {number} of this model is a {kind.__name__}, which {why}; use a DynamicCache"
                raise PagedTensorError(msg)
        return layers

    def _next_layer(self) -> PagedLayer:
        return PagedLayer(self._space, self._sweep, len(self.layers))

    # -- prefixes

    def _make_reuse(self, store: PrefixStore) -> PrefixReuse:
        kinds = [type(layer).__name__ for layer in self.layers if not isinstance(layer, PagedLayer)]
        if kinds or not self.layers or getattr(self._config, "is_encoder_decoder", False):
            why = "has keys that depend on more than tokens"
            if kinds or not self.layers:
                why = f"keeps more than keys and values ({kinds[0]})" if kinds else "has no configuration of its layers"
            self._core.close()
            msg = f"prefixes can't be stored for this model, which {why}"
            raise PagedTensorError(msg)
        reuse = PrefixReuse(store, self._paged, self._facts, self._make_pace)
        for layer in self._paged:
            layer.kept_from = 0 if layer.is_sliding else None
        self._sweep.on_pass = self._passed
        return reuse

    def _passed(self, added: int, seconds: float) -> None:
        assert self._reuse is not None
        length = self.get_seq_length()
        self._reuse.pace.passed(length - added, length, seconds)

    def _facts(self) -> dict[str, object]:
        """What keys and values depend on beside tokens."""
        fingerprint = self._fingerprint.value if isinstance(self._fingerprint, Fingerprint) else self._fingerprint
        if not fingerprint:
            msg = "the model has no fingerprint: give KVCache(fingerprint=...)"
            raise PagedTensorError(msg)
        kind = self._space.device.type
        autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
        model = self._model() if self._model is not None else None
        return {"model": fingerprint, "dtype": str(getattr(model, "dtype", None)), "autocast": autocast}

    def _make_pace(self) -> Pace:
        model = self._model() if self._model is not None else None
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        looked_up = getattr(embeddings, "weight", None)  # a table is not multiplied by, unless it is tied
        weights = sum(
            parameter.numel()
            for parameter in (model.parameters() if model is not None else ())
            if parameter.dim() > 1 and parameter is not looked_up
        )
        config = self._config.get_text_config(decoder=True)
        heads = getattr(config, "num_attention_heads", 0)
        size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // max(1, heads)
        return Pace(2.0 * weights, 4.0 * heads * size * len(self._paged))

    def load_prefix(
        self, token_ids: Any, *, attention_mask: Any = None, context: str = "", choose: str = "cheaper"
    ) -> int:
        """Fill the empty cache with what is stored of these prompts, and return how many tokens that were.

        generate() and forward then compute the others. token_ids: [rows, tokens] or [tokens], of the prompts without
        padding; attention_mask, if given, has to say so. At least one token is left to compute. With several rows, the
        blocks that all of them have.

        choose: "cheaper" loads as much as makes the first token come soonest (`prefix_plan` tells why), "longest" all
        that is stored. context: whatever else the keys depend on, such as images, soft prompts, or the adapter that is
        switched on; what is saved with one is found with that one only.

        What is loaded is what was saved, bit for bit, or it is computed: damaged blocks are deleted. (A prompt that is
        computed in one pass or in several may differ in its last bits; so may one that was saved by another.)

        PagedTensorError when the cache is not empty, without a prefix_store, for padding and for token_ids of another
        form; IoError, ClosedError.
        """
        reuse, tokens = self._prefix_arguments(token_ids, attention_mask)
        if choose not in ("cheaper", "longest"):
            msg = f"choose is {choose!r}; it must be 'cheaper' or 'longest'"
            raise ValueError(msg)
        if self.get_seq_length() > 0:
            msg = f"the cache has {self.get_seq_length()} tokens already: a prefix comes first; reset() it"
            raise PagedTensorError(msg)
        self._sweep.forget()
        return reuse.load(tokens, context, longest=choose == "longest")

    def save_prefix(self, token_ids: Any, *, attention_mask: Any = None, context: str = "") -> int:
        """Store the finished blocks of these prompts that are not stored yet, and return how many they are.

        token_ids: of all tokens that the cache has seen, or more: what generate() returned. What does not fit into the
        store's budget is not stored; less worthy blocks are evicted for it. attention_mask, context: as for
        load_prefix(). PagedTensorError, IoError (a full drive: nothing is stored, and what was stored is whole),
        ClosedError.
        """
        reuse, tokens = self._prefix_arguments(token_ids, attention_mask)
        self._sweep.leave()
        return reuse.save(tokens, context)

    @property
    def prefix_plan(self) -> PrefixPlan | None:
        """What load_prefix() chose between the last time; None when it had no choice, or did not know yet how fast
        loading and computing are."""
        return None if self._reuse is None else self._reuse.plan

    def _prefix_arguments(self, token_ids: Any, attention_mask: Any) -> tuple[PrefixReuse, torch.Tensor]:
        if self._reuse is None:
            msg = "there is no store of prefixes: give KVCache(prefix_store=PrefixStore(directory))"
            raise PagedTensorError(msg)
        if self.closed:
            msg = "the KV cache is closed"
            raise ClosedError(msg)
        tokens = torch.as_tensor(token_ids)
        tokens = tokens[None] if tokens.dim() == 1 else tokens
        if tokens.dim() != len(("rows", "tokens")) or tokens.is_floating_point() or tokens.numel() == 0:
            msg = f"token_ids are numbers [rows, tokens], not {tokens.dtype} {list(tokens.shape)}"
            raise PagedTensorError(msg)
        if attention_mask is not None and not bool(torch.as_tensor(attention_mask).all()):
            msg = "these prompts are padded: positions, and so keys, are others than those of the same tokens alone"
            raise PagedTensorError(msg)
        return self._reuse, tokens

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
