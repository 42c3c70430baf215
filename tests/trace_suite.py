# SPDX-License-Identifier: Apache-2.0
"""Traces of the usual work loads, from configurations alone: models on the `meta` device, nothing allocated.

Small models whose weights are 2 MiB and more each, as those of large ones are; a trace takes a few seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tensorpager.operator_trace import Trace
from tensorpager.tracing import trace

__all__ = ["SUITE", "accumulation", "decode", "encoder_decoder", "full_finetune", "lora_sweep", "moe_decode"]

HIDDEN = 1024
VOCABULARY = 8192


def llama(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def some_ids(rows: int, columns: int) -> torch.Tensor:
    return torch.zeros(rows, columns, dtype=torch.long, device="meta")


def decode(layers: int = 8) -> Trace:
    """One token of one sequence, without a cache of what came before: all weights, next to no work."""
    with torch.no_grad():
        return trace(llama(layers), input_ids=some_ids(1, 1), use_cache=False, name=f"decode-{layers}", tokens=1)


class LowRank(torch.nn.Module):
    """A frozen linear layer and a trained update of low rank."""

    def __init__(self, base: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = torch.nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype, device="meta")
        self.up = torch.nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base(x) + self.up(self.down(x))
        return result


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> None:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def lora_sweep() -> Trace:
    """A training step of low-rank updates: weights are swept forwards and backwards and never written."""
    model = llama(8).requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, LowRank(getattr(layer.self_attn, name), 8))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batch = {"input_ids": some_ids(2, 128), "labels": some_ids(2, 128), "use_cache": False}
    return trace(step, model, torch.optim.AdamW(trained), batch, name="lora", tokens=256)


def step_inside_backward(
    model: torch.nn.Module, optimizers: dict[torch.Tensor, torch.optim.Optimizer], batch: dict[str, Any]
) -> None:
    def update(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad(set_to_none=True)

    handles = [parameter.register_post_accumulate_grad_hook(update) for parameter in optimizers]
    model(**batch).loss.backward()
    for handle in handles:
        handle.remove()


def full_finetune(inside_backward: bool) -> Trace:
    """A training step of all weights by AdamW: after backward, or weight by weight inside it."""
    model = llama(8)
    batch = {"input_ids": some_ids(2, 128), "labels": some_ids(2, 128), "use_cache": False}
    if inside_backward:
        optimizers = {parameter: torch.optim.AdamW([parameter]) for parameter in model.parameters()}
        return trace(step_inside_backward, model, optimizers, batch, name="finetune-inside-backward", tokens=256)
    return trace(step, model, torch.optim.AdamW(model.parameters()), batch, name="finetune", tokens=256)


def accumulating_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[dict[str, Any]]) -> None:
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def accumulation(microbatches: int = 4) -> Trace:
    """A training step that adds up the gradients of several microbatches, each going through all layers and back."""
    model = llama(8)
    batches = [
        {"input_ids": some_ids(1, 128), "labels": some_ids(1, 128), "use_cache": False} for _ in range(microbatches)
    ]
    optimizer = torch.optim.AdamW(model.parameters())
    return trace(
        accumulating_step, model, optimizer, batches, name=f"accumulation-{microbatches}", tokens=128 * microbatches
    )


def moe_decode() -> Trace:
    """One token through a mixture of eight experts of which two are used.

    A layer's experts are two parameters, all eight in each: the trace reads both whole, while `moved_bytes` counts the
    two experts that are gathered. Which two depends on the token, and no trace can know.
    """
    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    config._experts_implementation = "batched_mm"  # the default loops over the experts that were hit
    with torch.device("meta"):
        model = MixtralForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        return trace(model, input_ids=some_ids(1, 1), use_cache=False, name="moe-decode", tokens=1)


def encoder_decoder() -> Trace:
    """A pass of an encoder and a decoder whose embeddings are one tensor, used at three places."""
    config = T5Config(
        d_model=HIDDEN,
        d_ff=4 * HIDDEN,
        d_kv=128,
        num_heads=8,
        num_layers=8,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
    )
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config).to(torch.bfloat16)
    inputs = {"input_ids": some_ids(1, 64), "decoder_input_ids": some_ids(1, 16), "use_cache": False}
    with torch.no_grad():
        return trace(model, **inputs, name="encoder-decoder", tokens=16)


SUITE: dict[str, Callable[[], Trace]] = {
    "decode": decode,
    "lora_sweep": lora_sweep,
    "full_finetune": lambda: full_finetune(inside_backward=False),
    "full_finetune_inside_backward": lambda: full_finetune(inside_backward=True),
    "accumulation": accumulation,
    "moe_decode": moe_decode,
    "encoder_decoder": encoder_decoder,
}
