# SPDX-License-Identifier: Apache-2.0
"""Models of transformers that generate, small ones of every kind, and the ways in which they are asked to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import tensorpager as tp
from torch_models import MIB

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

BUDGET = 20 * MIB
VOCABULARY = 2048
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
COMMON = {
    **SPECIAL,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
}
TWO_STACKS = {
    "d_model": 384,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 1024,
    "decoder_ffn_dim": 1024,
    "vocab_size": VOCABULARY,
}

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(  # sliding windows
        transformers.Gemma3TextConfig(
            **COMMON, head_dim=48, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2
        )
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**{**COMMON, "intermediate_size": 512}, num_local_experts=4)
    ),
    "qwen3 moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **COMMON, head_dim=48, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=256
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=384, d_ff=1024, num_layers=3, num_heads=8, d_kv=48, vocab_size=VOCABULARY, decoder_start_token_id=0
        )
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**TWO_STACKS)),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **TWO_STACKS,
            **SPECIAL,
            max_source_positions=50,
            num_mel_bins=16,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    ),
}

#: By name: what generate() gets, and how many prompts at once.
WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "greedy": ({"do_sample": False}, 2),
    "sampling": ({"do_sample": True, "top_k": 20, "temperature": 0.8}, 2),
    "beams": ({"num_beams": 3, "do_sample": False, "num_return_sequences": 2}, 2),
    "beam sampling": ({"num_beams": 2, "do_sample": True}, 2),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3, "do_sample": False}, 1),
}


class Checkpoint:
    """A model in a directory: unpaged, and paged in a budget that is smaller."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.directory = directory
        torch.manual_seed(0)
        model = MODELS[name]()
        for parameter in model.parameters():  # spread out: tokens depend on what was read
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(directory, max_shard_size="8MB")
        self.unpaged = type(model).from_pretrained(directory).eval()
        self.paged = self.load()

    def load(self) -> Any:
        return tp.from_pretrained(self.directory, BUDGET)

    def inputs(self, count: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        if self.name == "whisper":
            return {"input_features": torch.randn(count, 16, 100, generator=generator)}
        ids = torch.randint(3, VOCABULARY, (count, 12), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tokens_of(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    torch.manual_seed(2)
    tokens: torch.Tensor = model.generate(**inputs, max_new_tokens=6, **kwargs)
    return tokens
