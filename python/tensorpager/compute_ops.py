# SPDX-License-Identifier: Apache-2.0
"""The operators that compute with paged tensors of any size; to import this registers them as torch.ops.tensorpager.*.

    linear(input, weight, bias=None, dtype=None)                 a weight larger than the budget, tile by tile
    embedding(indices, weight, padding_idx=None, ...)            the pages of the rows that are named
    moe_linear(input, weight, expert_ids, dtype=None)            the experts that rows are routed to

`tensorpager.page` and `tensorpager.from_pretrained` import it. Three kinds of modules go to them by themselves, on the
host: an nn.Linear in float32, bfloat16 or float16 whose weight can't be held; an nn.Embedding whose table takes more
than half of the budget; experts of transformers, where that is chosen (experts.py). Any other module whose forward
gives a parameter to an operator says so, and is not asked to hold it whole:

    class Head(torch.nn.Module):
        left_to_operators = ("weight",)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from tensorpager.device import HOST
from tensorpager.embedding_op import embedding
from tensorpager.experts import EXPERT_WEIGHTS, runs_here
from tensorpager.linear_op import linear, streams_by_itself
from tensorpager.moe_op import moe_linear
from tensorpager.streaming import is_too_large

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core

__all__ = ["embedding", "linear", "moe_linear", "parameters_left_to_operators"]


def parameters_left_to_operators(
    module: torch.nn.Module, spans: Mapping[int, tuple[int, int]], core: Core
) -> frozenset[str]:
    """Names of the module's own parameters that need not be resident as a whole while it runs.

    spans: (address, size_bytes) of parameters by id. Those that left_to_operators names; what nn.Linear can't hold; the
    table of an nn.Embedding that takes more than half of the budget; experts that are run as experts.py says.
    """
    names = set(getattr(module, "left_to_operators", ()))
    if runs_here(module):
        names.update(EXPERT_WEIGHTS)
    weight = module._parameters.get("weight")
    span = spans.get(id(weight))
    if weight is not None and span is not None and core.device == HOST:
        kind = type(module)
        if isinstance(module, torch.nn.Linear) and kind.forward is torch.nn.Linear.forward:
            names.update({"weight"} if streams_by_itself(core, span, weight.dtype) else ())
        elif isinstance(module, torch.nn.Embedding) and kind.forward is torch.nn.Embedding.forward:
            names.update({"weight"} if module.max_norm is None and is_too_large(core, span) else ())
    return frozenset(names)
