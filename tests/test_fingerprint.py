# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import tensorpager as tp
from tensorpager.fingerprint import Fingerprint, model_fingerprint
from torch_models import BUDGET, make_net


def small_llama(**changes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, "num_hidden_layers": 2, **changes}))


def test_paged_or_not_and_in_any_budget_it_is_the_same() -> None:
    net, twin = make_net()
    expected = model_fingerprint(twin)
    assert len(expected) == 64
    assert model_fingerprint(copy.deepcopy(twin)) == expected
    for budget in (BUDGET, 4 * BUDGET):
        paged = copy.deepcopy(net)
        with tp.page(paged, budget=budget) as pager:
            assert model_fingerprint(paged) == expected
            stats = pager.stats()
            assert stats["resident_bytes_max"] <= budget
            assert stats["touches"] == 0
            assert stats["pinned_pages"] == 0


def flip_a_bit(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.view(torch.int32)[7, 5] ^= 1


CHANGES: dict[str, Callable[[Any], object]] = {
    "a bit of a weight": flip_a_bit,
    "two weights exchanged": lambda model: exchange(model.model.layers),
    "dtype": lambda model: model.half(),
    "configuration": lambda model: setattr(model.config, "rms_norm_eps", 1e-3),
    "attention": lambda model: model.set_attn_implementation("eager"),
    "class": lambda model: setattr(model, "__class__", type("Other", (type(model),), {})),
    "a buffer": lambda model: model.model.rotary_emb.inv_freq.mul_(2),
    "an adapter": lambda model: model.add_module("adapter", torch.nn.Linear(2, 2)),
}


def exchange(layers: Any) -> None:
    layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight = (
        layers[1].mlp.up_proj.weight,
        layers[0].mlp.up_proj.weight,
    )


@pytest.mark.parametrize("change", CHANGES)
def test_every_part_of_a_model_counts(change: str) -> None:
    model = small_llama()
    before = model_fingerprint(model)
    CHANGES[change](model)
    assert model_fingerprint(model) != before


def test_where_it_was_loaded_from_does_not_count() -> None:
    model = small_llama()
    before = model_fingerprint(model)
    model.config._name_or_path = model.name_or_path = "elsewhere"
    model.config.use_cache = False
    assert model_fingerprint(model) == before


def test_strides_and_empty_tensors() -> None:
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4).t())
    model.register_buffer("nothing", torch.empty(0, 3))
    before = model_fingerprint(model)
    model.weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4).t().contiguous())
    assert model_fingerprint(model) == before  # by value
    model.register_buffer("nothing", torch.empty(3, 0))
    assert model_fingerprint(model) != before


def test_weights_that_are_trained_are_looked_at_again() -> None:
    net, _ = make_net()
    with tp.page(net, budget=BUDGET) as pager:
        fingerprint = Fingerprint(net)
        first = fingerprint.value
        read = pager.stats()["page_accesses"]
        assert fingerprint.value == first
        assert pager.stats()["page_accesses"] == read  # not a page is read for it
        with torch.no_grad():
            net.blocks[2].gain.add_(1)
        second = fingerprint.value
        assert second != first
        with torch.no_grad():
            net.blocks[2].gain.sub_(1)
        assert fingerprint.value != second
    del net, pager
    with pytest.raises(tp.ClosedError, match="is gone"):
        _ = fingerprint.value
