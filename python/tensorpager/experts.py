# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts of transformers, with their experts in fused tensors, of which only those chosen are brought in.

    model = tp.from_pretrained(directory, budget="8GiB", experts_implementation="tensorpager")

transformers (5 and later) lets a model's experts be run by a function that is registered by name; this is one, on
`torch.ops.tensorpager.moe_linear`. `from_pretrained` registers it. For a model that is loaded otherwise, before
`page()`:

    tensorpager.experts.register_experts()
    model.set_experts_implementation("tensorpager")

It takes the steps of the "eager" implementation in the same order, so it gives the same bits; transformers' default for
bfloat16 is another one, whose bits differ from both. With any other implementation all experts of a layer are held
while the layer runs.
"""

from __future__ import annotations

from typing import Any

import torch

from tensorpager.moe_op import moe_linear

__all__ = ["EXPERT_WEIGHTS", "IMPLEMENTATION", "experts_forward", "register_experts", "runs_here"]

IMPLEMENTATION = "tensorpager"
#: What transformers calls the fused tensors: [experts, out, in], or [experts, in, out] where is_transposed.
EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The forward of an experts module: hidden_states [tokens, hidden], the others [tokens, k]. As "eager" does it."""
    token_count = hidden_states.shape[0]
    # In the order in which eager meets them: by expert, then by rank among the token's k, then by token.
    expert_ids, order = torch.sort(top_k_index.t().reshape(-1), stable=True)
    tokens = order % token_count
    rows = _project(self, "gate_up_proj" if self.has_gate else "up_proj", hidden_states[tokens], expert_ids)
    rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    rows = _project(self, "down_proj", rows, expert_ids)
    if self.has_post_expert_norm:
        rows = self.post_expert_norm(rows)
    rows = rows * top_k_weights.t().reshape(-1)[order].unsqueeze(-1)
    if self._is_expert_parallel:
        rows = rows.masked_fill((expert_ids >= self.num_experts).unsqueeze(-1), 0.0)
    return torch.zeros_like(hidden_states).index_add_(0, tokens, rows.to(hidden_states.dtype))


def _project(module: Any, name: str, inputs: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)
    rows: torch.Tensor = moe_linear(inputs, weight.transpose(1, 2) if module.is_transposed else weight, expert_ids)
    if not module.has_bias:
        return rows
    bias = getattr(module, f"{name}_bias")
    result: torch.Tensor = rows + bias[expert_ids.clamp(max=bias.shape[0] - 1)]
    return result


def runs_here(module: torch.nn.Module) -> bool:
    """Whether the module is one whose experts are run by experts_forward, as its configuration says now."""
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return chosen == IMPLEMENTATION and hasattr(module, "is_transposed") and "down_proj" in module._parameters


def register_experts() -> bool:
    """Make IMPLEMENTATION known to transformers; False when its version knows no implementations, or there is none."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        return False
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    return True
