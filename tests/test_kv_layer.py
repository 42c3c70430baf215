# SPDX-License-Identifier: Apache-2.0
"""One layer's records: what transformers' own layers give, after any history of calls; and bits of attention."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import tensorpager as tp
from tensorpager._core import PAGE_STATES
from tensorpager.kv_layer import PagedLayer, RecordSpace
from tensorpager.kv_sweep import Sweep
from tensorpager.paged_tensor import PagedTensor
from tensorpager.pager import make_core
from torch_models import MIB

BUDGET = 16 * MIB


class Layers:
    """Some layers of one cache, each beside transformers' own."""

    def __init__(self, windows: list[int | None], max_tokens: int = 64, budget: int = BUDGET) -> None:
        self.core = make_core(budget, None, "auto")
        self.sweep = Sweep(self.core)
        self.space = RecordSpace(self.core, max_tokens)
        self.paged = [PagedLayer(self.space, self.sweep, number, window) for number, window in enumerate(windows)]
        self.plain: list[Any] = [
            DynamicLayer() if window is None else DynamicSlidingWindowLayer(window) for window in windows
        ]

    def update(
        self, batch: int, tokens: int, heads: int = 4, size: int = 64, dtype: torch.dtype = torch.float32
    ) -> None:
        """A pass: the same new tokens to both, and the same keys and values back."""
        for paged, plain in zip(self.paged, self.plain, strict=True):
            new = [torch.randn(batch, tokens, heads, size).to(dtype).transpose(1, 2) for _ in range(2)]
            assert paged.get_mask_sizes(tokens) == tuple(plain.get_mask_sizes(tokens))
            for found, expected in zip(paged.update(*new), plain.update(*new), strict=True):
                assert_same_bits(found, expected)

    def call(self, name: str, *args: Any) -> None:
        for layer in (*self.paged, *self.plain):
            getattr(layer, name)(*args)

    def check(self) -> None:
        for paged, plain in zip(self.paged, self.plain, strict=True):
            assert paged.get_seq_length() == plain.get_seq_length()
            if plain.is_initialized and plain.get_seq_length() > 0:
                assert_same_bits(paged.keys, last(plain.keys, paged))
                assert_same_bits(paged.values, last(plain.values, paged))


def last(tensor: torch.Tensor, paged: PagedLayer) -> torch.Tensor:
    """Without what a window is past, which transformers keeps while the past is recorded."""
    return tensor[:, :, tensor.shape[2] - paged.tokens_stored :]


def assert_same_bits(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    assert found is not None
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    bits = {2: torch.int16, 4: torch.int32}[found.element_size()]
    assert torch.equal(found.view(bits), expected.contiguous().view(bits))


@pytest.fixture
def made() -> Iterator[list[Layers]]:
    every: list[Layers] = []
    yield every
    for layers in every:
        layers.sweep.leave()
        layers.core.close()


def test_tokens_come_back_from_the_drive(made: list[Layers]) -> None:
    layers = Layers([None] * 4)
    made.append(layers)
    for tokens in (40, 1, 1, 7, 1):
        layers.update(16, tokens, heads=16)  # 128 KiB a token: 6.25 MiB a layer
    layers.check()
    stats = layers.core.stats()
    assert stats["bytes_read"] > 0
    assert stats["bytes_written"] > 0
    assert stats["resident_bytes_max"] <= BUDGET
    assert stats["off_schedule_acquires"] == 0
    layers.sweep.leave()
    assert layers.core.stats()["pinned_pages"] == 0


def test_what_attention_gets_is_where_it_was_written(made: list[Layers]) -> None:
    layers = Layers([None])
    made.append(layers)
    layers.update(2, 5)
    keys, values = layers.paged[0].update(*(torch.randn(2, 4, 1, 64) for _ in range(2)))
    assert type(keys) is type(values) is PagedTensor
    assert values.data_ptr() - keys.data_ptr() == 2 * 4 * 64 * 4  # behind the keys of the same token
    assert keys.stride() == values.stride() == (4 * 64, 64, 2 * 2 * 4 * 64, 1)
    assert layers.core.stats()["pinned_pages"] == 1
    assert torch.equal(keys, layers.paged[0].keys)


OPERATIONS = ("update", "update", "update", "crop", "reorder", "repeat", "select", "read", "reset")


@pytest.mark.parametrize("seed", range(10))
def test_any_history(made: list[Layers], seed: int) -> None:
    """Of calls that generate() makes; half of them with windows."""
    chosen = random.Random(seed)
    torch.manual_seed(seed)
    layers = Layers([None, 9, None] if seed % 2 else [None, None], max_tokens=chosen.choice([8, 64]))
    made.append(layers)
    dtype = chosen.choice([torch.float32, torch.bfloat16])
    form = {"heads": chosen.choice([2, 4]), "size": chosen.choice([64, 512, 20]), "dtype": dtype}
    batch = chosen.choice([1, 3, 8])
    layers.call("update", *(torch.randn(batch, form["heads"], 3, form["size"]).to(dtype) for _ in range(2)))
    if seed % 2:
        for layer in (layers.paged[1], layers.plain[1]):
            layer.activate_past_recording()
        layers.call("crop", 0)
    for _ in range(30):
        operation = chosen.choice(OPERATIONS)
        length = layers.plain[0].get_seq_length()
        if operation == "update" or length == 0:
            tokens = chosen.choice([1, 1, 2, 5])
            layers.update(batch, tokens, **form)
            if seed % 2:  # as assisted decoding does after each forward
                layers.call("crop", -chosen.randrange(tokens))
        elif operation == "crop" and not seed % 2:
            layers.call("crop", -chosen.randrange(min(length, 3)))
        elif operation == "reorder":
            layers.call("reorder_cache", torch.tensor(chosen.choices(range(batch), k=batch)))
        elif operation == "repeat" and batch <= 4:
            layers.call("batch_repeat_interleave", 2)
            batch *= 2
        elif operation == "select" and batch > 1:
            batch = max(1, batch // 2)
            layers.call("batch_select_indices", torch.tensor(chosen.sample(range(batch * 2), batch)))
        elif operation == "read":
            layers.check()
        elif operation == "reset" and chosen.random() < 0.2:
            layers.call("reset")
            batch = chosen.choice([1, 2, 5])
    layers.check()
    layers.sweep.leave()
    assert layers.core.stats()["pinned_pages"] == 0


def test_a_window_gives_its_past_back(made: list[Layers]) -> None:
    """Ten times the budget goes through; neither frames nor disk keep what no query will see."""
    layers = Layers([8, 8])
    made.append(layers)
    for _ in range(60):
        layers.update(16, 4, heads=16)  # 512 KiB: a window of 2 MiB with its newest tokens
    layers.check()
    stats = layers.core.stats()
    assert 3 * BUDGET < 60 * 4 * 2 * 128 * 1024
    assert stats["bytes_written"] == 0
    assert stats["bytes_read"] == 0
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        layers.paged[0].crop(-1)


def test_beams_write_only_what_differs(made: list[Layers]) -> None:
    """Two prompts, four beams each, which hold the same in pages 0, 1 and most of 2."""
    layers = Layers([None, None])
    made.append(layers)
    beams, others = layers.paged
    prompt = [torch.randn(2, 16, 46, 128).repeat_interleave(4, 0) for _ in range(2)]
    own = [torch.randn(8, 16, 4, 128) for _ in range(2)]  # 16 tokens a page
    for new in (prompt, own):
        beams.update(*new)
        layers.plain[0].update(*new)
    others.update(*(torch.randn(8, 16, 130, 128) for _ in range(2)))

    def written_when_all_left() -> int:
        layers.core.clear_schedule()  # which would bring the beams back at once
        others.keys.sum()  # twice as large as the budget
        others.values.sum()
        written = int(layers.core.stats()["bytes_written"]) // layers.core.page_bytes
        assert resident(layers, beams) == 0
        return written

    written_when_all_left()
    before = written_when_all_left()  # now the others are clean too
    for order, pages in (([0, 0, 1, 3, 5, 4, 5, 7], 2), ([0, 1, 2, 3, 4, 5, 6, 7], 0), ([3, 3, 3, 0, 4, 4, 4, 4], 2)):
        for layer in (beams, layers.plain[0]):
            layer.reorder_cache(torch.tensor(order))
        assert_same_bits(beams.keys, layers.plain[0].keys)
        assert_same_bits(beams.values, layers.plain[0].values)
        written = written_when_all_left()
        assert written - before == pages
        before = written


def resident(layers: Layers, layer: PagedLayer) -> int:
    track = layer._track
    pages = layers.core.set_pages(layers.core.add_set([(track.address, track.end * track.record_bytes)], "a look"))
    return int((layers.core.page_states()[pages] == PAGE_STATES.index("device")).sum())


def test_a_larger_layer_than_the_budget_is_slow_and_right(made: list[Layers]) -> None:
    layers = Layers([None, None], max_tokens=256)
    made.append(layers)
    layers.update(16, 130, heads=16)  # 16 MiB a layer, of which the budget is 16 with 8 to spare
    layers.update(16, 1, heads=16)
    layers.check()
    assert layers.core.stats()["touches"] > 0
    assert layers.core.stats()["resident_bytes_max"] <= BUDGET


def test_a_crop_never_brings_back_what_is_gone(made: list[Layers]) -> None:
    layers = Layers([8])
    made.append(layers)
    (layer,) = layers.paged
    layer.activate_past_recording()
    for _ in range(40):
        layer.update(*(torch.randn(16, 16, 4, 64) for _ in range(2)))  # 16 tokens a page
        layer.crop(0)
    with pytest.raises(RuntimeError, match="have been discarded"):
        layer.crop(-40)
    assert layer.get_seq_length() == 160


def test_as_before_transformers_5(made: list[Layers]) -> None:
    """A positive crop() is what is left; masks are asked for with the places of the queries."""
    layers = Layers([None, 4])
    made.append(layers)
    layers.update(1, 3)
    paged, window = layers.paged
    paged.crop(7)
    assert paged.get_seq_length() == 3
    paged.crop(2)
    assert paged.get_seq_length() == 2
    assert_same_bits(paged.keys, layers.plain[0].keys[:, :, :2])
    for layer in (paged, window):
        assert layer.get_mask_sizes(torch.arange(5)) == layer.get_mask_sizes(5)


def test_in_and_out_of_inference_mode(made: list[Layers]) -> None:
    layers = Layers([None])
    made.append(layers)
    with torch.inference_mode():
        layers.update(2, 3)
    layers.update(2, 1)
    with torch.inference_mode():
        layers.update(2, 1)
    layers.check()


def test_what_is_refused(made: list[Layers]) -> None:
    layers = Layers([None])
    made.append(layers)
    (layer,) = layers.paged
    keys = torch.randn(2, 4, 3, 64)
    with pytest.raises(tp.PagedTensorError, match="no gradients"):
        layer.update(keys.clone().requires_grad_(), keys)
    for wrong in ((keys[0], keys[0]), (keys, keys[:1]), (keys, keys[:, :, :2])):
        with pytest.raises(tp.PagedTensorError, match=r"\[batch, heads, tokens, size\]"):
            layer.update(*wrong)
    with pytest.raises(tp.PagedTensorError, match="paged on cpu"):
        layer.update(keys.to("meta"), keys.to("meta"))
    layer.update(keys, keys)
    with pytest.raises(tp.PagedTensorError, match="one cache for one batch"):
        layer.update(keys[:1], keys[:1])
    with pytest.raises(tp.PagedTensorError, match="one cache for one batch"):
        layer.update(keys.half(), keys.half())
    layer.reset()
    assert layer.keys is None
    layer.update(keys[:1].half(), keys[:1].half())
    layers.sweep.leave()
    layers.core.close()
    with pytest.raises(tp.ClosedError):
        layer.update(keys[:1].half(), keys[:1].half())


def test_an_ordinary_copy(made: list[Layers]) -> None:
    layers = Layers([None, 5])
    made.append(layers)
    for tokens in (9, 1):
        layers.update(2, tokens)
    layers.paged[0].reorder_cache(torch.tensor([1, 0]))
    layers.plain[0].reorder_cache(torch.tensor([1, 0]))
    for paged, plain in zip(layers.paged, layers.plain, strict=True):
        ordinary = paged.ordinary()
        assert type(ordinary) is type(plain)
        assert type(ordinary.keys) is torch.Tensor
        assert_same_bits(ordinary.keys, plain.keys)
        new = [torch.randn(2, 4, 1, 64) for _ in range(2)]
        for found, expected in zip(ordinary.update(*new), copy.deepcopy(plain).update(*new), strict=True):
            assert_same_bits(found, expected)
    layers.check()  # the copies were copies


# -- bits of attention over strided records: [Note: records] -----------------------------------------------------------


def over_records(keys: torch.Tensor, values: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same values as views of records, at a multiple of 2 MiB."""
    batch, heads, tokens, size = keys.shape
    half = batch * heads * size
    raw = torch.empty(capacity * 2 * half * keys.element_size() + 2 * MIB, dtype=torch.uint8)
    start = -raw.data_ptr() % (2 * MIB)
    flat = raw[start : start + capacity * 2 * half * keys.element_size()].view(keys.dtype)
    views = []
    for offset, tensor in ((0, keys), (half, values)):
        view = flat.as_strided((batch, heads, capacity, size), (heads * size, size, 2 * half, 1), offset)
        view[:, :, :tokens] = tensor
        views.append(view[:, :, :tokens])
    return views[0], views[1]


def repeated(tensor: torch.Tensor, times: int) -> torch.Tensor:
    batch, heads, tokens, size = tensor.shape
    return tensor[:, :, None].expand(batch, heads, times, tokens, size).reshape(batch, heads * times, tokens, size)


def eager(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(queries, keys.transpose(2, 3)) * queries.shape[-1] ** -0.5 + mask
    return torch.matmul(F.softmax(scores, -1, dtype=torch.float32).to(queries.dtype), values)


@pytest.mark.parametrize("seed", range(60))
def test_attention_gives_the_same_bits(seed: int) -> None:
    chosen = random.Random(seed)
    torch.manual_seed(seed)
    dtype = chosen.choice([torch.float32, torch.bfloat16, torch.float16])
    batch, heads, groups = chosen.choice([1, 2, 3, 8]), chosen.choice([1, 2, 4, 8]), chosen.choice([1, 2, 4])
    size = chosen.choice([8, 16, 48, 64, 80, 96, 128])
    tokens = chosen.choice([1, 2, 7, 31, 64, 100, 257, 513])
    count = min(chosen.choice([1, 1, 2, 5, 17, 64]), tokens)
    keys, values = (torch.randn(batch, heads, tokens, size).to(dtype) for _ in range(2))
    queries = torch.randn(batch, count, heads * groups, size).to(dtype).transpose(1, 2)
    strided = over_records(keys, values, chosen.choice([tokens, 1024]))
    seen = torch.ones(count, tokens, dtype=torch.bool).tril(tokens - count)
    mask = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
    for masked in (None, seen, mask):
        plain = F.scaled_dot_product_attention(queries, repeated(keys, groups), repeated(values, groups), masked)
        assert torch.equal(
            F.scaled_dot_product_attention(queries, *(repeated(each, groups) for each in strided), masked), plain
        )
        grouped = F.scaled_dot_product_attention(queries, keys, values, masked, enable_gqa=groups > 1)
        assert torch.equal(F.scaled_dot_product_attention(queries, *strided, masked, enable_gqa=groups > 1), grouped)
    expected = eager(queries, repeated(keys, groups), repeated(values, groups), mask)
    assert torch.equal(eager(queries, *(repeated(each, groups) for each in strided), mask), expected)
