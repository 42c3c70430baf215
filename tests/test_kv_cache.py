# SPDX-License-Identifier: Apache-2.0
"""A paged KV cache in place of transformers' own: the same tokens and logits, whatever generate() does with it."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache

import tensorpager as tp
from generation_models import MODELS, WAYS, Checkpoint, tokens_of
from standin import standin
from tensorpager.kv_layer import PagedLayer
from tensorpager.windows import Hook
from test_kv_sweep import bound_of_a_pass, least_reads
from torch_models import MIB

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]

__all__ = ["standin"]

LOGITS = {"return_dict_in_generate": True, "output_logits": True}
PAGE = 2 * MIB


class Evict(Hook):
    """Forward pre-hook of a model: takes all frames of a cache for other pages, so that none of its own is resident."""

    def __init__(self, cache: tp.KVCache) -> None:
        core = cache._core
        self._core = core
        region = core.map_spill(2 * core.budget_bytes)
        self._addresses = range(region.address, region.address + region.size_bytes, core.page_bytes)

    def __call__(self, *_: object) -> None:
        for address in self._addresses:
            set_id = self._core.hold(address, 8)
            self._core.release(set_id)


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    made = Checkpoint(request.param, tmp_path_factory.mktemp(request.param.replace(" ", "_")))
    yield made
    made.paged.pager.close()


def make_cache(pager: tp.Pager, **kwargs: Any) -> tp.KVCache:
    return tp.KVCache(pager, "16MiB", max_tokens=64, **kwargs)


def assert_same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.logits) == len(expected.logits) > 1
    for step, wanted in zip(found.logits, expected.logits, strict=True):
        assert torch.equal(step, wanted)


@pytest.mark.parametrize("way", [*WAYS, "assisted"])
def test_the_same_tokens_and_logits(checkpoint: Checkpoint, way: str) -> None:
    """Every key and value comes from the drive in every pass."""
    kwargs, count = WAYS.get(way, ({"do_sample": False, "assistant_model": checkpoint.unpaged}, 1))
    inputs = checkpoint.inputs(count)
    expected = tokens_of(checkpoint.unpaged, inputs, **kwargs, **LOGITS)
    caches = [make_cache(checkpoint.paged.pager) for _ in range(1 + checkpoint.paged.config.is_encoder_decoder)]
    hooks = [checkpoint.paged.register_forward_pre_hook(Evict(cache)) for cache in caches]
    cache = caches[0] if len(caches) == 1 else EncoderDecoderCache(*caches)
    assert_same(tokens_of(checkpoint.paged, inputs, past_key_values=cache, **kwargs, **LOGITS), expected)
    for hook in hooks:
        hook.remove()
    for each in caches:
        stats = each.stats()
        assert stats["resident_bytes_max"] <= 16 * MIB
        if stats["passes"] > 0:  # after the first, which may have been all, with an assistant that is right
            assert stats["bytes_read"] >= len(each.layers) * PAGE
        assert stats["context_tokens"] > 0
        each.close()


# -- one small model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    made = Checkpoint("llama", tmp_path_factory.mktemp("llama"))
    yield made
    made.paged.pager.close()


def wide_llama() -> Any:
    """Keys and values are 128 KiB a token for eight rows, and there is little else: 16 tokens a page."""
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=64,
        vocab_size=256,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_a_context_of_eight_times_the_budget() -> None:
    """Bit by bit, at 1.05 of the least that any schedule moves; across a page's end, which is planned for anew."""
    pytest.importorskip("scipy")
    model = wide_llama()
    ids = torch.randint(2, 256, (8, 236), generator=torch.Generator().manual_seed(1))
    kwargs = {"max_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(ids), **LOGITS}
    with torch.no_grad():
        expected = model.generate(ids, **kwargs)
    with tp.page(model, budget="64MiB") as pager, torch.no_grad():
        cache = tp.KVCache(pager, "64MiB")
        assert_same(model.generate(ids, past_key_values=cache, **kwargs), expected)
        stats = cache.stats()
    sets = []
    for tokens in (236, *range(237, 245)):
        sets += [{layer * 16 + page for page in range(-(-tokens // 16))} for layer in range(16)]
    least = least_reads(sets, 32) + 16 * 16 - 32  # and each page is written once, but for those that are resident
    moved = (stats["bytes_read"] + stats["bytes_written"]) // PAGE
    assert stats["context_bytes"] == 16 * 244 * 128 * 1024 > 7.6 * stats["budget_bytes"]
    assert least <= moved <= 1.05 * least, (moved, least)
    assert stats["plans"] == 2
    assert stats["schedule"]["working_set_pages"] == 256 == 8 * stats["schedule"]["frame_count"]
    assert stats["schedule"]["lower_bound_moved_pages"] == pytest.approx(bound_of_a_pass(16, 16, 32))
    assert stats["resident_bytes_max"] <= stats["budget_bytes"]
    assert stats["off_schedule_acquires"] == 0


def test_a_conversation(llama: Checkpoint) -> None:
    """Turn after turn in one cache: what was said before is not computed again."""
    cache = tp.KVCache(llama.paged.pager, "16MiB", max_tokens=8)
    plain = DynamicCache(config=llama.unpaged.config)
    ids = llama.inputs(2)["input_ids"]
    said = ids
    for _ in range(3):
        answers = []
        for model, used in ((llama.paged, cache), (llama.unpaged, plain)):
            mask = torch.ones_like(said)
            kwargs = {"max_new_tokens": 3, "do_sample": False, **LOGITS}
            answers.append(model.generate(said, attention_mask=mask, past_key_values=used, **kwargs))
        assert_same(*answers)
        said = torch.cat([answers[0].sequences, ids[:, :5]], 1)
    assert cache.get_seq_length() == plain.get_seq_length() >= 30  # also beyond what there were addresses for
    cache.close()


def test_reset_for_another_batch(llama: Checkpoint) -> None:
    cache = make_cache(llama.paged.pager)
    for count in (2, 1, 3):
        inputs = llama.inputs(count)
        found = tokens_of(llama.paged, inputs, past_key_values=cache, do_sample=False, **LOGITS)
        assert_same(found, tokens_of(llama.unpaged, inputs, do_sample=False, **LOGITS))
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.stats()["context_bytes"] == 0
    cache.close()


def test_nothing_is_held_after_a_forward(llama: Checkpoint) -> None:
    cache = make_cache(llama.paged.pager)
    with torch.no_grad():
        llama.paged(llama.inputs(2)["input_ids"], past_key_values=cache)
        assert cache.stats()["pinned_pages"] == 0
        assert torch.equal(cache.layers[0].keys, cache.layers[0].keys.clone())
        with pytest.raises(IndexError):
            llama.paged(torch.tensor([[10**6]]), past_key_values=cache)
    assert cache.stats()["pinned_pages"] == 0
    cache.close()


def test_it_is_traced_without_being_read(llama: Checkpoint) -> None:
    """The first pass runs on fake tensors before, with a cache that has tokens already."""
    cache = make_cache(llama.paged.pager)
    ids = llama.inputs(2)["input_ids"]
    model = llama.load()
    with torch.no_grad():
        llama.paged(ids, past_key_values=cache)
        before = cache.stats()["acquires"]
        expected = copy.deepcopy(cache)
        cache.reset_stats()
        found = model(ids[:, :1], past_key_values=cache).logits
        assert torch.equal(found, llama.unpaged(ids[:, :1], past_key_values=expected).logits)
    assert before > 0
    assert cache.stats()["acquires"] == len(cache.layers)  # of the real pass
    assert model.pager.stats()["trace_failure"] is None
    assert model.pager.stats()["plans"] == 1
    model.pager.close()
    cache.close()


def test_copies_are_ordinary(llama: Checkpoint) -> None:
    cache = make_cache(llama.paged.pager)
    ids = llama.inputs(2)["input_ids"]
    with torch.no_grad():
        llama.paged(ids, past_key_values=cache)
        for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            assert type(copied) is DynamicCache
            assert not any(isinstance(layer, PagedLayer) for layer in copied.layers)
            for layer, paged in zip(copied.layers, cache.layers, strict=True):
                assert type(layer.keys) is torch.Tensor
                assert torch.equal(layer.keys, paged.keys)
                assert torch.equal(layer.values, paged.values)
            assert torch.equal(
                llama.unpaged(ids[:, :1], past_key_values=copied).logits,
                llama.unpaged(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits,
            )
    cache.close()


def test_threads_with_a_cache_each(llama: Checkpoint) -> None:
    inputs = [llama.inputs(count) for count in (1, 2, 3)]
    kwargs = {"max_new_tokens": 6, "do_sample": False, **LOGITS}
    expected = [llama.unpaged.generate(**each, **kwargs) for each in inputs]
    answers: dict[int, Any] = {}

    def generate(number: int) -> None:
        with make_cache(llama.paged.pager) as cache:
            answers[number] = llama.paged.generate(**inputs[number], past_key_values=cache, **kwargs)

    threads = [threading.Thread(target=generate, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, wanted in enumerate(expected):
        assert_same(answers[number], wanted)


def test_it_ends_with_its_pager(llama: Checkpoint) -> None:
    model = llama.load()
    cache = make_cache(model.pager)
    ids = llama.inputs(1)["input_ids"]
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert "12 tokens" in repr(cache)
    model.pager.close()
    assert cache.closed
    assert "closed" in repr(cache)
    with pytest.raises(tp.ClosedError), torch.no_grad():
        llama.unpaged(ids, past_key_values=cache)
    with pytest.raises(tp.ClosedError, match="ends with it"):
        make_cache(model.pager)
    cache.close()


def test_what_is_refused(llama: Checkpoint) -> None:
    pager = llama.paged.pager
    with pytest.raises(tp.BudgetError, match="too small"):
        tp.KVCache(pager, "4MiB")
    with pytest.raises(ValueError, match="max_tokens is 0"):
        tp.KVCache(pager, "16MiB", max_tokens=0)
    cache = make_cache(pager)
    with pytest.raises(tp.PagedTensorError, match="no_grad"):
        llama.unpaged(llama.inputs(1)["input_ids"], past_key_values=cache)
    cache.close()


@pytest.mark.parametrize("kind", ["linear", "shared", "hybrid"])
def test_layers_of_other_kinds(llama: Checkpoint, kind: str) -> None:
    """States of linear attention don't grow: they stay as they are. Keys of other layers are found where they were."""
    common = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    if kind == "hybrid":
        config = transformers.FalconH1Config(**common, num_hidden_layers=2, mamba_d_ssm=64, mamba_n_heads=4)
        with pytest.raises(tp.PagedTensorError, match=r"is a \w+, which is not paged"):
            make_cache(llama.paged.pager, config=config)
        return
    if kind == "linear":
        config = transformers.Lfm2Config(
            **common, num_key_value_heads=2, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"]
        )
        model = transformers.Lfm2ForCausalLM(config).eval()
    else:
        config = transformers.Gemma3nTextConfig(
            **common,
            num_key_value_heads=2,
            num_hidden_layers=6,
            head_dim=16,
            num_kv_shared_layers=2,
            sliding_window=8,
            vocab_size_per_layer_input=64,
            hidden_size_per_layer_input=16,
            laurel_rank=8,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
            activation_sparsity_pattern=None,
        )
        model = transformers.Gemma3nForCausalLM(config).eval()
    ids = torch.arange(3, 27).reshape(2, 12)
    kwargs = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids), **LOGITS}
    expected = model.generate(ids, **kwargs)
    with make_cache(llama.paged.pager, config=config) as cache:
        hook = model.register_forward_pre_hook(Evict(cache))
        assert_same(model.generate(ids, past_key_values=cache, **kwargs), expected)
        hook.remove()
        assert 0 < sum(isinstance(layer, PagedLayer) for layer in cache.layers) < config.num_hidden_layers


# -- on a device -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("standin")
@pytest.mark.parametrize("host_budget", ["12MiB", "80MiB"])
def test_on_a_device(host_budget: str) -> None:
    """24 pages of keys and values in 10 frames and a host tier that holds some of them, or all."""
    model = wide_llama()
    twin = copy.deepcopy(model)
    del model.model.layers[4:], twin.model.layers[4:]
    for each in (model, twin):
        each.config.num_hidden_layers = 4
    ids = torch.randint(2, 256, (8, 84), generator=torch.Generator().manual_seed(1))
    kwargs = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids), **LOGITS}
    with torch.no_grad(), tp.page(model, budget="16MiB", device="cuda:0", host_budget="16MiB") as pager:
        cache = tp.KVCache(pager, "20MiB", host_budget=host_budget, max_tokens=128, page_bytes=PAGE)
        assert_same(model.generate(ids, past_key_values=cache, **kwargs), twin.generate(ids, **kwargs))
        stats = cache.stats()
        assert stats["pinned_pages"] == 0
        assert stats["resident_bytes_max"] <= 20 * MIB < stats["context_bytes"]
        assert stats["copies_out"] > 0
        assert (stats["bytes_read"] == 0) == (host_budget == "80MiB")
        beams = {**kwargs, "num_beams": 2, "max_new_tokens": 4}
        cache.reset()
        assert torch.equal(
            model.generate(ids[:4], past_key_values=cache, **{**beams, "attention_mask": torch.ones_like(ids[:4])})[0],
            twin.generate(ids[:4], **{**beams, "attention_mask": torch.ones_like(ids[:4])})[0],
        )
        small = tp.KVCache(pager, "8MiB", host_budget=host_budget, page_bytes=PAGE)
        with pytest.raises(tp.BudgetError, match="layer 0 of a KV cache"):
            model.generate(ids, past_key_values=small, **kwargs)
