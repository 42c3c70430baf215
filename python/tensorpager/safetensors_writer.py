# SPDX-License-Identifier: Apache-2.0
"""Saving paged tensors with safetensors, which writes from raw addresses."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from tensorpager.errors import PagedTensorError

__all__ = ["copy_for_safetensors"]


def copy_for_safetensors(
    tensor: torch.Tensor, caller: FrameType, copy_of: Callable[[Any], torch.Tensor]
) -> torch.Tensor | None:
    """An ordinary copy when safetensors' `save_file` is the caller, kept alive for as long as it needs; else None.

    It writes from `data_ptr()` with write(2), which fails on absent memory, and it has no other hook for tensors whose
    bytes are elsewhere than `tensor.to("cpu")` for other devices. Its writer keeps what it writes from in a list.
    """
    if caller.f_code.co_name != "_to_ndarray" or caller.f_globals.get("__name__") != "safetensors.torch":
        return None
    copy = copy_of(tensor).detach()
    writer = caller.f_back
    keep_alive = writer.f_locals.get("keep_alive_buffer") if writer is not None else None
    if not isinstance(keep_alive, list):
        msg = (
            "this version of safetensors keeps the tensors it writes in another place than versions 0.3 to 0.8 do; "
            "save copies instead: {name: tensor.clone() for name, tensor in model.state_dict().items()}"
        )
        raise PagedTensorError(msg)
    keep_alive.append(copy)
    return copy
