# SPDX-License-Identifier: Apache-2.0
"""What people run: one token of decoding, a prompt, a step of fine-tuning, of a transformers configuration. As traces.

The models are made on the meta device: no weights, no memory. Training uses AdamW in the dtype of the weights, or
another of the forms of its state in optim.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensorpager.operator_trace import Trace
from tensorpager.optim import AdamW
from tensorpager.tracing import trace

__all__ = ["TASKS", "TRAINING_STATES", "load_config", "make_model", "trace_workload"]

TASKS = ("decode", "prompt", "finetune", "lora")
#: By name: the arguments of optim.AdamW, None for torch's.
TRAINING_STATES: dict[str, dict[str, Any] | None] = {
    "as-weights": None,
    "master": {"weights": "master"},
    "master-8bit": {"weights": "master", "moment_bits": 8},
    "stochastic": {"weights": "stochastic"},
    "stochastic-8bit": {"weights": "stochastic", "moment_bits": 8},
}
LORA_RANK = 16
LORA_TARGETS = ("q_proj", "v_proj", "q", "v", "c_attn", "query_key_value")


def load_config(path: str | Path) -> Any:
    """A transformers configuration from a config.json, or from a directory that holds one.

    ValueError when there is none, or when it names a model that transformers does not know. Nothing is downloaded,
    and no code beside the configuration is run.
    """
    from transformers import AutoConfig

    file = Path(path)
    if file.is_dir():
        file /= "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        msg = f"{file}: no transformers configuration there: {error}"
        raise ValueError(msg) from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        msg = f"{file}: a transformers configuration is a JSON object with a model_type"
        raise ValueError(msg)
    try:
        return AutoConfig.for_model(content.pop("model_type"), **content)
    except (ValueError, TypeError, KeyError) as error:
        msg = f"{file}: transformers can't use it: {str(error).splitlines()[0]}"
        raise ValueError(msg) from error


def make_model(config: Any) -> nn.Module:
    """The configuration's model with a language-modelling head, on the meta device, in the configuration's dtype."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    factory = AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    with torch.device("meta"):
        model = factory.from_config(config, dtype=dtype)
    assert isinstance(model, nn.Module)
    return model


def trace_workload(
    config: Any,
    task: str,
    *,
    batch: int = 1,
    sequence: int = 1024,
    microbatches: int = 1,
    checkpointing: bool = False,
    training_state: str = "as-weights",
) -> Trace:
    """The trace of one pass.

    task: "decode", one token for each of `batch` texts of `sequence` tokens so far; "prompt", the forward pass over
    batch x sequence tokens; "finetune", forward, backward and AdamW over all weights, the gradients of `microbatches`
    passes of batch x sequence tokens accumulated; "lora", the same for adapters of rank 16 at the attention's
    projections. checkpointing: recompute each block in backward. training_state: one of TRAINING_STATES, for
    the tasks that train. ValueError for numbers below 1, unknown tasks and states, and a state that the dtype of the
    weights can't have; TraceError when the model can't be run on fake tensors.
    """
    if task not in TASKS or min(batch, sequence, microbatches) < 1:
        msg = f"task '{task}' is one of {', '.join(TASKS)}, and batch, sequence and microbatches are 1 or more"
        raise ValueError(msg)
    if training_state not in TRAINING_STATES:
        msg = f"training_state '{training_state}' is one of {', '.join(TRAINING_STATES)}"
        raise ValueError(msg)
    model = make_model(config)
    name = f"{config.model_type} {task}"
    if task in ("decode", "prompt"):
        return _trace_inference(model, config, task, name, batch, sequence)
    if task == "lora":
        _add_adapters(model)
    model.train()
    if checkpointing:
        _enable_checkpointing(model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    form = TRAINING_STATES[training_state]
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(trained, foreach=False) if form is None else AdamW(trained, **form)
    )
    ids = torch.zeros((batch, sequence), dtype=torch.int64)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
        for _ in range(microbatches):
            extra = {"use_cache": False}
            (model(input_ids=ids, labels=ids, **extra).loss / microbatches).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return trace(step, model, optimizer, ids, name=name, tokens=batch * sequence * microbatches)


def _trace_inference(model: nn.Module, config: Any, task: str, name: str, batch: int, sequence: int) -> Trace:
    model.eval()
    ids = torch.zeros((batch, sequence), dtype=torch.int64)
    seq2seq = bool(getattr(config, "is_encoder_decoder", False))
    more = {"decoder_input_ids": ids} if seq2seq else {}

    def prompt(model: nn.Module, ids: torch.Tensor, more: dict[str, torch.Tensor]) -> Any:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False, **more).logits

    if task == "prompt" or seq2seq:
        return trace(prompt, model, ids, more, name=name, tokens=batch * sequence)

    def decode(model: nn.Module, token: torch.Tensor, keys_values: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(keys_values):
            cache.update(keys, values, layer)
        with torch.no_grad():
            return model(input_ids=token, past_key_values=cache, use_cache=True).logits

    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dtype = next(model.parameters()).dtype
    shape = (batch, heads, sequence, width)
    past = [
        (torch.empty(shape, dtype=dtype, device="meta"), torch.empty(shape, dtype=dtype, device="meta"))
        for _ in range(text.num_hidden_layers)
    ]
    return trace(decode, model, ids[:, :1], past, name=name, tokens=batch)


def _enable_checkpointing(model: nn.Module) -> None:
    for word in ("activation", "gradient"):  # transformers renamed it
        enable = getattr(model, f"{word}_checkpointing_enable", None)
        if enable is not None:
            enable(**{f"{word}_checkpointing_kwargs": {"use_reentrant": False}})
            return
    msg = f"{type(model).__name__} has no activation checkpointing to enable"
    raise ValueError(msg)


class _Adapted(nn.Module):
    """A frozen linear layer beside a product of two thin ones (E. J. Hu et al., LoRA, 2021)."""

    def __init__(self, base: nn.Module, wide: int, narrow: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        with torch.device("meta"):
            self.down = nn.Linear(wide, LORA_RANK, bias=False, dtype=dtype)
            self.up = nn.Linear(LORA_RANK, narrow, bias=False, dtype=dtype)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base(states) + self.up(self.down(states))
        return result


def _add_adapters(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in LORA_TARGETS and isinstance(child, nn.Linear):
                adapted = _Adapted(child, child.in_features, child.out_features, child.weight.dtype)
                setattr(module, name, adapted)
    if not any(weight.requires_grad for weight in model.parameters()):
        msg = f"no layer to adapt: none of {', '.join(LORA_TARGETS)} is a linear layer of {type(model).__name__}"
        raise ValueError(msg)
