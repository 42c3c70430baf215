# SPDX-License-Identifier: Apache-2.0
"""Which device a model is paged to, on which stream, and how much of its memory is taken.

On a device a step's pages are on their way when acquire() returns, and the stream that was current then waits for them;
so every acquire and release names the stream that the operation will run on: torch's current one.

Threads: any; a stream is current for a thread. Neither torch.cuda nor the driver is touched for the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from tensorpager.budget import parse_bytes
from tensorpager.errors import EngineError, PagedTensorError

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core

__all__ = [
    "AUTO_RESERVE_SHARE",
    "HOST",
    "Device",
    "device_budget_bytes",
    "device_number",
    "move_buffers",
    "refuse_backward",
    "refuse_inference_mode",
    "stream_getter",
]

Device = int | str | torch.device | None

#: The number that stands for the host.
HOST = -1
#: Of a device's memory, what budget="auto" leaves to torch: activations, workspaces, and what others allocate later.
AUTO_RESERVE_SHARE = 0.2


def device_number(device: Device) -> int:
    """HOST for None and the CPU, else the CUDA device's number. ValueError for any other kind of device."""
    if device is None:
        return HOST
    where = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if where.type == "cpu":
        return HOST
    if where.type != "cuda":
        msg = f"can't page to {where}: a model is paged on the host (device=None) or on a CUDA device (device='cuda')"
        raise ValueError(msg)
    if where.index is not None:
        return where.index
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def device_budget_bytes(budget: int | str, number: int) -> int:
    """Bytes of a budget; "auto", for a device alone, is what it has free now less AUTO_RESERVE_SHARE of its memory.

    ValueError for "auto" on the host and for what is no size, EngineError when "auto" leaves nothing.
    """
    if budget != "auto":
        return parse_bytes(budget)
    if number == HOST:
        msg = "budget='auto' is for a device, whose free memory can be asked for; on the host give a size: '8GiB'"
        raise ValueError(msg)
    from tensorpager._core import device_memory

    free_bytes, total_bytes = device_memory(number)
    budget_bytes = free_bytes - int(AUTO_RESERVE_SHARE * total_bytes)
    if budget_bytes <= 0:
        msg = (
            f"budget='auto' leaves nothing: device {number} has {free_bytes} of {total_bytes} bytes free, and "
            f"{AUTO_RESERVE_SHARE:.0%} are left to torch. Free memory of the device, or give a budget"
        )
        raise EngineError(msg)
    return budget_bytes


def stream_getter(core: Core) -> Callable[[], int] | None:
    """What gives the raw handle of torch's current stream on the core's device; None where streams mean nothing."""
    if core.device == HOST or core.device_memory_is_host_memory:
        return None
    return functools.partial(torch._C._cuda_getCurrentRawStream, core.device)


def move_buffers(model: torch.nn.Module, core: Core) -> None:
    """Put every buffer on the core's device, where the paged parameters are; nothing on the host."""
    if core.device == HOST or core.device_memory_is_host_memory:
        return
    where = torch.device("cuda", core.device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != where:
                module._buffers[name] = buffer.to(where)


def refuse_backward(module: torch.nn.Module, inputs: tuple[object, ...] = ()) -> None:
    """PagedTensorError when a call would be kept for backward, whose kernels read weights that have left by then.

    On the host such a read traps and is served. On a device it ends the context, so it is refused before it happens.
    """
    if not torch.is_grad_enabled():
        return
    if any(parameter.requires_grad for parameter in module.parameters()) or any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in inputs
    ):
        msg = (
            f"{type(module).__name__} is paged on a device, which works for inference so far: run it under "
            "torch.no_grad() or torch.inference_mode(), or call model.requires_grad_(False) and give it inputs that "
            "require no gradient"
        )
        raise PagedTensorError(msg)


def refuse_inference_mode(number: int) -> None:
    """PagedTensorError where tensors would be made that have no version counter: writes to them could not be seen."""
    if number != HOST and torch.is_inference_mode_enabled():
        msg = (
            "a model can't be paged to a device inside torch.inference_mode(): its parameters would have no version "
            "counter, by which writes are seen. Page it before, and run it in inference mode"
        )
        raise PagedTensorError(msg)
