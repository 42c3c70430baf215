# SPDX-License-Identifier: Apache-2.0
"""Weights stored as 8-bit codes: the numbers a model sees against torch's own casts, the bytes read, the refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers

import tensorpager as tp
from standin import standin
from tensorpager.quantised import STORED_AS
from torch_models import MIB

__all__ = ["standin"]

WIDTH = 1536  # a matrix of two and a quarter pages
BLOCK = 128
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def as_stored(weight: torch.Tensor, stored_as: str) -> torch.Tensor:
    """What a weight becomes, by torch alone."""
    blocks = weight.detach().float().reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True) / LARGEST[stored_as]
    codes = blocks / scale
    codes = codes.round() if stored_as == "int8" else codes.to(getattr(torch, stored_as)).float()
    return (codes * scale).to(weight.dtype).reshape(weight.shape)


def make_layers(dtype: torch.dtype = torch.bfloat16, depth: int = 6) -> tuple[torch.nn.Sequential, torch.nn.Sequential]:
    """Layers to page, and their twin."""
    torch.manual_seed(1)
    layers = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(depth))).to(dtype)
    return layers, copy.deepcopy(layers)


def store_twin(twin: torch.nn.Module, stored_as: str) -> None:
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.dim() > 1:
                parameter.copy_(as_stored(parameter, stored_as))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored_as", STORED_AS)
def test_the_model_computes_with_what_codes_and_scales_say(stored_as: str, dtype: torch.dtype) -> None:
    layers, twin = make_layers(dtype)
    store_twin(twin, stored_as)
    x = torch.randn(4, WIDTH).to(dtype)
    with tp.page(layers, budget="20MiB", stored_as=stored_as) as pager, torch.no_grad():
        for _ in range(3):
            assert torch.equal(layers(x), twin(x))
        for name, parameter in layers.named_parameters():
            assert torch.equal(parameter, twin.get_parameter(name)), name
        stats = pager.stats()
    assert stats["dequantised"] > 0
    assert stats["bytes_written"] == 0


def test_about_half_the_bytes_are_read() -> None:
    # A page's codes and a scale for 128 of them, rounded up to 4 KiB: 0.518 of the page.
    record_bytes = 1085440
    frames = 9
    for stored_as, read_bytes in ((None, 2 * MIB), ("int8", record_bytes)):
        layers, _ = make_layers()
        x = torch.randn(4, WIDTH).bfloat16()
        with tp.page(layers, budget=frames * 2 * MIB, stored_as=stored_as) as pager, torch.no_grad():
            for _ in range(2):
                layers(x)
            pager.reset_stats()
            for _ in range(3):
                layers(x)
            stats = pager.stats()
            # Every read is a whole page or a whole record. Those in flight when counting began or ended are
            # counted on one side alone: at most a budget of them at either end.
            reads, rest = divmod(stats["bytes_read"], read_bytes)
            assert rest == 0
            assert stats["page_ins"] > 2 * frames
            assert abs(reads - stats["page_ins"]) <= frames
            if stored_as is not None:
                assert stats["quantised_bytes"] == 6 * 3 * record_bytes  # 2.25 pages a matrix
                assert stats["spill_reserved_bytes"] < MIB  # the biases


def test_a_modified_weight_stays_exact() -> None:
    layers, twin = make_layers()
    store_twin(twin, "int8")
    x = torch.randn(4, WIDTH).bfloat16()
    with tp.page(layers, budget="18MiB", stored_as="int8"), torch.no_grad():
        for net in (layers, twin):
            for parameter in net[2].parameters():
                parameter.add_(0.001)
        for _ in range(3):
            assert torch.equal(layers(x), twin(x))
        assert torch.equal(layers[2].weight, twin[2].weight)


@pytest.mark.usefixtures("standin")
@pytest.mark.parametrize("stored_as", ["int8", "float8_e4m3fn"])
def test_the_same_numbers_on_a_device(stored_as: str) -> None:
    layers, twin = make_layers()
    store_twin(twin, stored_as)
    x = torch.randn(4, WIDTH).bfloat16()
    with (
        tp.page(layers, budget="16MiB", device="cuda:0", host_budget="12MiB", stored_as=stored_as) as pager,
        torch.no_grad(),
    ):
        for _ in range(3):
            assert torch.equal(layers(x), twin(x))
        stats = pager.stats()
    assert stats["dequantised"] > 0
    assert stats["reads"] > 0


def test_a_checkpoint_is_stored_anew(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=2,
        num_attention_heads=8,
        vocab_size=4000,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20MB")
    twin = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.copy_(as_stored(parameter, "int8"))
    ids = torch.arange(5, 29).reshape(2, 12)
    model = tp.from_pretrained(tmp_path, "24MiB", stored_as="int8")
    with model.pager as pager, torch.no_grad():
        assert torch.equal(model.model.embed_tokens.weight, twin.model.embed_tokens.weight)  # tied, and exact
        assert model.lm_head.weight is model.model.embed_tokens.weight
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, twin.get_parameter(name)), name
        for _ in range(2):
            assert torch.equal(model(ids).logits, twin(ids).logits)
        stats = pager.stats()
    matrices = 2 * (4 * 1 + 3 * 3)  # by layer: four of one page, three of 2.75
    assert stats["quantised_bytes"] == matrices * 1085440
    assert stats["spill_bytes"] == 0


def test_what_can_not_be_stored_so_is_refused_and_nothing_is_changed() -> None:
    layers, twin = make_layers(depth=2)
    with pytest.raises(ValueError, match="int8, float8_e4m3fn, float8_e5m2"):
        tp.page(layers, budget="32MiB", stored_as="int4")
    with pytest.raises(tp.PagedTensorError, match="no parameter can be stored so"):
        tp.page(copy.deepcopy(layers).float(), budget="64MiB", stored_as="int8")
    with torch.no_grad():
        layers[1].weight[7, 9] = float("inf")
    with pytest.raises(tp.PagedTensorError, match=r"'1.weight' can't be stored as int8: .*infinite or NaN"):
        tp.page(layers, budget="32MiB", stored_as="int8")
    assert all(type(parameter) is torch.nn.Parameter for parameter in layers.parameters())
    assert torch.equal(layers[0].weight, twin[0].weight)
    tp.page(layers, budget="32MiB").close()
