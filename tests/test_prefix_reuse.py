# SPDX-License-Identifier: Apache-2.0
"""Prefixes from one cache, or one process, to the next: the same bits, or they are computed."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

import tensorpager as tp
from generation_models import VOCABULARY, Checkpoint
from prefix_files import chain_in
from standin import standin
from tensorpager.prefix_plan import ComputeRate
from tensorpager.prefix_store import PrefixStore

__all__ = ["standin"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]

BLOCK_TOKENS = 8
LOGITS = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "max_new_tokens": 4}


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    made = Checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    yield made
    made.paged.pager.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    made = Checkpoint("llama", tmp_path_factory.mktemp("llama"))
    yield made
    made.paged.pager.close()


@pytest.fixture
def store(tmp_path: Path) -> PrefixStore:
    return PrefixStore(tmp_path / "store", "64MiB", block_tokens=BLOCK_TOKENS)


def cache_of(checkpoint: Checkpoint, store: PrefixStore | None, **kwargs: Any) -> tp.KVCache:
    pager = kwargs.pop("pager", checkpoint.paged.pager)
    return tp.KVCache(
        pager, "16MiB", max_tokens=128, prefix_store=store, fingerprint=kwargs.pop("model", "x"), **kwargs
    )


def prompt(count: int, seed: int = 1, rows: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(seed))


def run(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits of the tokens that the cache does not have yet."""
    with torch.no_grad():
        return model(ids[:, cache.get_seq_length() :], past_key_values=cache).logits


def fill(checkpoint: Checkpoint, store: PrefixStore, ids: torch.Tensor, **kwargs: Any) -> int:
    """Compute a prompt and save it."""
    with cache_of(checkpoint, store, **kwargs) as cache:
        run(checkpoint.paged, ids, cache)
        return cache.save_prefix(ids)


def load(checkpoint: Checkpoint, store: PrefixStore, ids: torch.Tensor, **kwargs: Any) -> int:
    with cache_of(checkpoint, store, **kwargs) as cache:
        return cache.load_prefix(ids, choose="longest")


def test_what_comes_back_is_what_was_computed(checkpoint: Checkpoint, store: PrefixStore) -> None:
    """The unpaged model goes on from the same keys and values; so does the next process, here another cache."""
    ids = prompt(45)
    plain = DynamicCache(config=checkpoint.unpaged.config)
    run(checkpoint.unpaged, ids[:, :40], plain)
    assert fill(checkpoint, store, ids[:, :40]) == 5
    with cache_of(checkpoint, store) as cache:
        assert cache.load_prefix(ids, choose="longest") == 40 == cache.get_seq_length()
        for layer, expected in zip(cache.layers, copy.deepcopy(plain).layers, strict=True):
            stored = layer.tokens_stored
            assert torch.equal(layer.keys, expected.keys[:, :, -stored:])
            assert torch.equal(layer.values, expected.values[:, :, -stored:])
        found = checkpoint.paged.generate(ids, past_key_values=cache, **LOGITS)
        expected = checkpoint.unpaged.generate(ids, past_key_values=plain, **LOGITS)
        assert torch.equal(found.sequences, expected.sequences)
        assert all(torch.equal(one, other) for one, other in zip(found.logits, expected.logits, strict=True))
        assert cache.save_prefix(found.sequences) == 1  # the block that the answer has finished
        assert cache.save_prefix(found.sequences) == 0
    assert load(checkpoint, store, torch.cat([found.sequences, ids[:, :1]], 1)) == 48


def test_as_far_as_two_prompts_are_the_same(llama: Checkpoint, store: PrefixStore) -> None:
    ids, other = prompt(48), prompt(48)
    other[:, 27] = 5
    assert fill(llama, store, ids) == 6
    assert load(llama, store, other) == 24
    assert fill(llama, store, other) == 3
    assert load(llama, store, ids) == load(llama, store, other) == 40  # one token at least is computed
    assert load(llama, store, ids[:, 1:]) == 0
    assert load(llama, store, ids[:, :8]) == 0
    assert load(llama, store, ids[:, :9]) == 8
    assert load(llama, store, ids[0].tolist()) == 40  # type: ignore[arg-type]


def test_rows_have_what_all_of_them_have(llama: Checkpoint, store: PrefixStore) -> None:
    ids = prompt(33, rows=3)
    assert fill(llama, store, ids[:2]) == 8
    assert load(llama, store, ids[:2]) == 32
    assert load(llama, store, ids) == 0
    assert fill(llama, store, ids[2:, :20]) == 2
    assert load(llama, store, ids) == 16
    twice = torch.cat([ids[:1], ids[:1]])
    assert load(llama, store, twice) == 32
    plain = DynamicCache(config=llama.unpaged.config)
    run(llama.unpaged, ids[:2, :33], plain)
    with cache_of(llama, store) as cache:
        cache.load_prefix(torch.flip(ids[:2], [0]), choose="longest")
        for layer, expected in zip(cache.layers, plain.layers, strict=True):
            assert torch.equal(layer.keys, torch.flip(expected.keys[:, :, :32], [0]))


def test_rows_that_move_are_saved_where_they_are(llama: Checkpoint, store: PrefixStore) -> None:
    ids = prompt(16, rows=2)
    with cache_of(llama, store) as cache:
        run(llama.paged, ids, cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert cache.save_prefix(torch.flip(ids, [0])) == 4
    assert load(llama, store, torch.cat([ids, ids[:, :1]], 1)) == 16


OTHERS: dict[str, dict[str, Any]] = {
    "model": {"model": "y"},
    "namespace": {"namespace": "somebody else"},
    "context": {"context": "an image"},
    "block size": {"block_tokens": 4},
    "dtype": {"dtype": torch.bfloat16},
    "autocast": {"autocast": True},
}


@pytest.mark.parametrize("other", OTHERS)
def test_nobody_gets_what_is_another_ones(llama: Checkpoint, store: PrefixStore, other: str) -> None:
    ids = prompt(25)
    assert fill(llama, store, ids) == 3
    changes = dict(OTHERS[other])
    theirs = PrefixStore(
        store.directory,
        store.budget_bytes,
        namespace=changes.pop("namespace", ""),
        block_tokens=changes.pop("block_tokens", BLOCK_TOKENS),
    )
    context = changes.pop("context", "")
    model = tp.from_pretrained(llama.directory, "20MiB", dtype=changes.pop("dtype", None))
    with torch.autocast("cpu", torch.bfloat16, enabled=changes.pop("autocast", False)), model.pager:
        with cache_of(llama, theirs, pager=model.pager, **changes) as cache:
            assert cache.load_prefix(ids, context=context, choose="longest") == 0
            run(model, ids, cache)
            assert cache.save_prefix(ids, context=context) == 25 // theirs.block_tokens
        with cache_of(llama, theirs, pager=model.pager, **changes) as cache:
            assert cache.load_prefix(ids, context=context, choose="longest") == 24
    assert load(llama, store, ids) == 24


def test_a_model_that_was_trained_meanwhile_is_another(llama: Checkpoint, store: PrefixStore) -> None:
    model, ids = llama.load(), prompt(25)
    with model.pager as pager:
        cache = tp.KVCache(pager, "16MiB", prefix_store=store)
        run(model, ids, cache)
        assert cache.save_prefix(ids) == 3
        cache.reset()
        assert cache.load_prefix(ids, choose="longest") == 24
        cache.reset()
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        assert cache.load_prefix(ids, choose="longest") == 0
        run(model, ids, cache)
        assert cache.save_prefix(ids) == 3


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["header", "first layer", "last layer", "gone"])
def test_a_damaged_block_ends_the_prefix(llama: Checkpoint, store: PrefixStore, place: str) -> None:
    ids = prompt(49)
    assert fill(llama, store, ids) == 6
    path = chain_in(store.directory)[3]
    content = bytearray(path.read_bytes())
    content[{"header": 40, "first layer": 4096 + 99, "last layer": -5000, "gone": 0}[place]] ^= 4
    path.unlink() if place == "gone" else path.write_bytes(content)
    with cache_of(llama, store) as cache:
        assert cache.load_prefix(ids, choose="longest") == 24
        assert cache.get_seq_length() == 24
        plain = DynamicCache(config=llama.unpaged.config)
        run(llama.unpaged, ids, plain)
        for layer, expected in zip(cache.layers, plain.layers, strict=True):
            assert torch.equal(layer.keys, expected.keys[:, :, :24])
        assert store.stats()["blocks_damaged"] == (place != "gone")
        run(llama.paged, ids, cache)
        assert cache.save_prefix(ids) == 1  # the others are still there
    assert load(llama, store, ids) == 48


def test_damage_in_the_first_block_leaves_an_empty_cache(llama: Checkpoint, store: PrefixStore) -> None:
    ids = prompt(49)
    fill(llama, store, ids)
    path = chain_in(store.directory)[0]
    path.write_bytes(path.read_bytes()[:-5000] + b"\xff" * 5000)
    with cache_of(llama, store) as cache:
        assert cache.load_prefix(ids, choose="longest") == 0
        assert cache.get_seq_length() == 0
        assert torch.equal(run(llama.paged, ids, cache), run(llama.unpaged, ids, DynamicCache()))


def test_a_small_budget_keeps_the_first_blocks(llama: Checkpoint, store: PrefixStore) -> None:
    ids = prompt(49)
    assert fill(llama, store, ids) == 6
    block_bytes = chain_in(store.directory)[0].stat().st_size
    small = PrefixStore(store.directory, 4 * block_bytes, block_tokens=BLOCK_TOKENS)
    assert fill(llama, small, prompt(49, seed=2)) == 4
    assert load(llama, small, prompt(49, seed=2)) == 32
    assert load(llama, small, ids) == 0


def test_what_is_refused(llama: Checkpoint, store: PrefixStore) -> None:
    ids = prompt(20)
    with cache_of(llama, None) as cache:
        for call in (cache.load_prefix, cache.save_prefix):
            with pytest.raises(tp.PagedTensorError, match="no store of prefixes"):
                call(ids)
        assert cache.prefix_plan is None
    with cache_of(llama, store) as cache:
        assert cache.save_prefix(ids) == 0  # there is nothing
        with pytest.raises(ValueError, match="'cheaper' or 'longest'"):
            cache.load_prefix(ids, choose="best")
        mask = torch.ones_like(ids)
        assert cache.load_prefix(ids, attention_mask=mask) == 0
        mask[0, 0] = 0
        for call in (cache.load_prefix, cache.save_prefix):
            with pytest.raises(tp.PagedTensorError, match="padded"):
                call(ids, attention_mask=mask)
            for wrong in (ids.float(), ids[None], ids[:, :0]):
                with pytest.raises(tp.PagedTensorError, match="token_ids are numbers"):
                    call(wrong)
        run(llama.paged, ids, cache)
        with pytest.raises(tp.PagedTensorError, match="20 tokens already"):
            cache.load_prefix(ids)
        with pytest.raises(tp.PagedTensorError, match="tokens of 2 rows"):
            cache.save_prefix(torch.cat([ids, ids]))
    with pytest.raises(tp.ClosedError):
        cache.load_prefix(ids)
    t5 = transformers.T5Config(d_model=32, num_layers=1, num_heads=2, d_ff=32, vocab_size=32)
    with pytest.raises(tp.PagedTensorError, match="depend on more than tokens"):
        cache_of(llama, store, config=t5)
    lfm = transformers.Lfm2Config(
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        layer_types=["conv", "full_attention"],
        vocab_size=32,
    )
    with pytest.raises(tp.PagedTensorError, match="keeps more than keys and values"):
        cache_of(llama, store, config=lfm)


# -- the choice --------------------------------------------------------------------------------------------------------


def test_the_cheaper_is_done(llama: Checkpoint, store: PrefixStore) -> None:
    ids = prompt(41)
    fill(llama, store, ids)
    size_bytes = chain_in(store.directory)[0].stat().st_size
    for read_bytes_per_second, flops_per_second, pass_seconds, tokens in (
        (1.0, 1e20, 0.0, 0),
        (1e12, 1.0, 0.0, 40),
        (size_bytes / 0.1, 8e9 / 0.3, 1.0, 16),  # 24 tokens are computed in the 0.9 s that a pass takes anyway
    ):
        with cache_of(llama, store) as cache:
            reuse = cache._reuse
            assert reuse is not None
            rate = ComputeRate(flops_per_second, 1e9, 0.0, pass_seconds)
            reuse._read_pace.loaded(10**9, 10**9 / read_bytes_per_second)
            reuse._pace = type("Known", (), {"rate": rate, "computed": lambda *_: None, "passed": lambda *_: None})()
            before = store.stats()["bytes_read"]
            assert cache.load_prefix(ids) == tokens == cache.get_seq_length()
            plan = cache.prefix_plan
            assert plan is not None
            assert plan.load_tokens == tokens
            assert plan.seconds <= min(plan.seconds_recomputed, plan.seconds_loaded)
            assert (store.stats()["bytes_read"] > before) == (tokens > 0)
            assert torch.equal(
                run(llama.paged, ids, cache)[:, -1:].argmax(-1),
                run(llama.unpaged, ids, DynamicCache())[:, -1:].argmax(-1),
            )


def test_a_new_process_knows_from_a_block_what_it_took(llama: Checkpoint, store: PrefixStore) -> None:
    """Passes over many tokens are timed, and blocks say what theirs took; a load tells the drive's part."""
    ids = prompt(41)
    with cache_of(llama, store) as cache:
        assert cache.load_prefix(ids) == 0
        assert cache.prefix_plan is None
        llama.paged.generate(ids, past_key_values=cache, **LOGITS)
        assert cache._reuse is not None
        assert cache._reuse.pace.rate is not None
        assert cache._reuse.pace.rate.pass_seconds > 0
        assert cache.save_prefix(ids) == 5
    with cache_of(llama, store) as cache:
        loaded = cache.load_prefix(ids)
        plan = cache.prefix_plan
        assert plan is not None
        assert plan.load_tokens == loaded
        assert plan.seconds_recomputed > 0
        assert plan.load_seconds > 0 or loaded == 0


PROGRAM = """
import warnings
warnings.simplefilter("ignore")
import torch, transformers
import tensorpager as tp
model = tp.from_pretrained({checkpoint!r}, "20MiB")
store = tp.PrefixStore({directory!r}, "64MiB", block_tokens=8)
cache = tp.KVCache(model.pager, "16MiB", prefix_store=store)
ids = torch.tensor({ids})
loaded = cache.load_prefix(ids, choose="longest")
with torch.no_grad():
    logits = model(ids[:, loaded:], past_key_values=cache).logits[:, -5:]
print(loaded, logits.argmax(-1).tolist())
"""


def test_another_process(llama: Checkpoint, store: PrefixStore) -> None:
    """It loads the model by itself, and knows it by its weights."""
    ids = prompt(45)
    with tp.KVCache(llama.paged.pager, "16MiB", prefix_store=store) as cache:
        expected = run(llama.paged, ids, cache)[:, -5:].argmax(-1).tolist()
        assert cache.save_prefix(ids) == 5
    program = PROGRAM.format(checkpoint=str(llama.directory), directory=store.directory, ids=ids.tolist())
    environment = {**os.environ, "PYTHONPATH": str(Path(tp.__file__).parents[1])}
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == f"40 {expected}"


@pytest.mark.usefixtures("standin")
def test_on_a_device(store: PrefixStore, llama: Checkpoint) -> None:
    ids = prompt(41, rows=2)
    model = tp.from_pretrained(llama.directory, "20MiB", device="cuda:0", host_budget="32MiB")
    with model.pager as pager, torch.no_grad():
        kwargs = {"host_budget": "16MiB", "page_bytes": 2**21}
        cache = cache_of(llama, store, pager=pager, **kwargs)
        expected = run(model, ids, cache)
        assert cache.save_prefix(ids) == 10
        again = cache_of(llama, store, pager=pager, **kwargs)
        assert again.load_prefix(ids, choose="longest") == 40
        for one, other in zip(again.layers, cache.layers, strict=True):
            assert torch.equal(one.keys, other.keys[:, :, :40])
            assert torch.equal(one.values, other.values[:, :, :40])
        assert torch.equal(run(model, ids, again).argmax(-1), expected[:, -1:].argmax(-1))
