# SPDX-License-Identifier: Apache-2.0
"""Experts of transformers, run by moe_linear: the bits of its eager implementation, for the experts that are chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tensorpager as tp
from tensorpager.experts import EXPERT_WEIGHTS, IMPLEMENTATION, experts_forward, register_experts, runs_here
from torch_models import MIB

transformers = pytest.importorskip("transformers")
moe = pytest.importorskip("transformers.integrations.moe")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SHAPE)),
    # [experts, in, out], with biases, and another gate
    "gpt-oss": lambda: transformers.GptOssForCausalLM(transformers.GptOssConfig(**SHAPE, head_dim=64)),
    # no gate
    "nemotron-h": lambda: transformers.NemotronHForCausalLM(
        transformers.NemotronHConfig(
            vocab_size=256,
            hidden_size=512,
            layers_block_type=["attention", "moe"],
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=768,
            moe_shared_expert_intermediate_size=768,
            num_attention_heads=8,
            head_dim=64,
            n_group=1,
            topk_group=1,
        )
    ),
}


def make(name: str) -> tuple[Any, Any]:
    """A model that is to be paged, and its twin, which runs its experts eagerly."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    twin = copy.deepcopy(model)
    assert register_experts()
    model.set_experts_implementation(IMPLEMENTATION)
    twin.set_experts_implementation("eager")
    return model, twin


def some_ids(count: int) -> torch.Tensor:
    return torch.randint(256, (1, count), generator=torch.Generator().manual_seed(count))


def pages_of_two(modules: list[Any]) -> int:
    """At most: an expert begins and ends anywhere in a page."""
    weights = [getattr(module, name) for module in modules for name in EXPERT_WEIGHTS if hasattr(module, name)]
    return sum(2 * (weight.nbytes // weight.shape[0] // (2 * MIB) + 2) for weight in weights)


@pytest.mark.parametrize("name", MODELS)
def test_the_bits_are_those_of_eager(name: str) -> None:
    model, twin = make(name)
    experts = [module for module in model.modules() if runs_here(module)]
    assert len(experts) == (1 if name == "nemotron-h" else 2)
    with torch.no_grad():
        for count in (1, 9):
            assert torch.equal(model(some_ids(count)).logits, twin(some_ids(count)).logits)
        with tp.page(model, budget=32 * MIB) as pager:
            for turn, count in enumerate((7, 1, 1)):
                before = pager.stats()["page_ins"]
                assert torch.equal(model(some_ids(count)).logits, twin(some_ids(count)).logits)
                stats = pager.stats()
                if count == 1 and turn > 1:  # two of eight experts, beside what is scheduled
                    assert stats["page_ins"] - before <= stats["schedule"]["page_ins_per_pass"] + pages_of_two(experts)
            assert stats["trace_failure"] is None
            assert stats["mispredicted_passes"] <= 1  # a token may take other steps than a prompt, but no more
            assert stats["touches"] == 0
            assert stats["resident_bytes_max"] <= 32 * MIB


def test_gradients_are_those_of_eager() -> None:
    model, twin = make("mixtral")
    for each in (model, twin):
        each(some_ids(9), labels=some_ids(9)).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if "gate_up" in name or "down" in name:
            assert torch.equal(parameter.grad, other.grad), name
        assert torch.allclose(parameter.grad, other.grad, rtol=1e-4, atol=1e-6), name


def test_rows_of_other_ranks_are_left_out() -> None:
    model, _ = make("mixtral")
    experts = next(module for module in model.modules() if runs_here(module))
    rows, ids, weights = torch.randn(3, 512), torch.tensor([[1, 8], [8, 8], [8, 0]]), torch.rand(3, 2)
    expected = experts_forward(experts, rows, ids.clamp(max=7), weights.masked_fill(ids == 8, 0))
    experts._is_expert_parallel = True
    with torch.no_grad():
        assert torch.equal(experts_forward(experts, rows, ids, weights), expected)


def test_from_pretrained_takes_it_by_name(tmp_path: Path) -> None:
    _, twin = make("mixtral")
    twin.save_pretrained(tmp_path)
    model = tp.from_pretrained(tmp_path, 32 * MIB, experts_implementation="tensorpager")
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(some_ids(5)).logits, twin(some_ids(5)).logits)
    assert model.pager.stats()["mispredicted_passes"] == 0
    tokens = model.generate(some_ids(3), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens, twin.generate(some_ids(3), max_new_tokens=4, do_sample=False, pad_token_id=0))
