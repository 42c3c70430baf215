# SPDX-License-Identifier: Apache-2.0
"""Paged models in torch's DistributedDataParallel (DDP): every rank pages the whole model, DDP reduces the gradients.

[Note: order] DDP ties its reducer to the parameters that the model has when it is wrapped. Wrapped before page(), the
wrapper is given to page(), which makes the reducer anew by the wrapper's own __getstate__ and __setstate__. Wrapped
after page(), the reducer has the paged parameters. A module that was wrapped and is paged without its wrapper would be
trained by gradients that nobody reduces: that is refused at its first forward.

[Note: gradients] DDP copies each gradient into a bucket as soon as autograd has made it, reduces the bucket, and copies
it back at the end of backward, into the paged gradient. With gradient_as_bucket_view=True the gradients *are* the
buckets, from the first reduction on; they are left there. Either way the buckets are DDP's own, in memory, as large as
all gradients.

[Note: first broadcast] When it wraps, DDP sends the parameters of rank 0 to the others, some straight from their
memory: a system call, which ends the process where the pages are absent. So that one function of torch is replaced by
one that sends paged parameters piece by piece, through the guard, and does not touch pieces that are equal already;
all else it leaves to torch's.

Threads: the one that trains.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel import distributed as torch_ddp

from tensorpager.errors import PagedTensorError
from tensorpager.paged_tensor import PagedTensor
from tensorpager.shards import has_shards
from tensorpager.windows import Hook

if TYPE_CHECKING:
    from tensorpager.training import Training

__all__ = ["WrapperHook", "send_paged_states_in_pieces", "unwrapped"]

_PIECE_BYTES = 8 * 2**20
_PAGE_FIRST = "page the model first, and wrap it then"


def _refuse_unsupported(ddp: DistributedDataParallel) -> None:
    """PagedTensorError for what changes parameters or gradients behind the pager's back."""
    why = None
    if getattr(ddp, "mixed_precision", None) is not None:
        why = "mixed_precision= puts other memory in the parameters' place; use torch.autocast"
    elif getattr(ddp, "_delay_all_reduce_params", None):
        why = "delay_all_reduce_named_params= reduces gradients in a buffer that they must not leave, and paged ones do"
    elif getattr(ddp, "_use_python_reducer", False):
        why = "the Python reducer reduces gradients in hooks of its own order; it is for torch.compile"
    elif any(hasattr(parameter, "_in_backward_optimizers") for parameter in ddp.module.parameters()):
        why = "optimizers inside of backward are stepped by its reducer then, on buckets, past the pager"
    if why is not None:
        msg = f"this DistributedDataParallel can't hold a paged model: {why}"
        raise PagedTensorError(msg)


@contextmanager
def unwrapped(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The module to page while its parameters are replaced: the model, or what its wrapper holds, see [Note: order].

    PagedTensorError for wrappers inside of the model, and for one that can't be made anew.
    """
    inside = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    if not inside:
        yield model
        return
    wrapper = inside[0]
    if len(inside) > 1 or wrapper is not model:
        msg = f"DistributedDataParallel inside of the model that is paged has its parameters from before; {_PAGE_FIRST}"
        raise PagedTensorError(msg)
    _refuse_unsupported(wrapper)
    if getattr(wrapper, "_comm_hooks", None):
        msg = (
            f"a communication hook is registered already, and would be lost; register it after page(), or {_PAGE_FIRST}"
        )
        raise PagedTensorError(msg)
    try:
        state = wrapper.__getstate__()  # type: ignore[no-untyped-call]
        del state["_module_parameters"]  # these hold the originals
        del wrapper.reducer, wrapper.logger
        wrapper._module_parameters = []
    except (RuntimeError, KeyError, AttributeError) as error:  # another group than the default one; another torch
        msg = f"this DistributedDataParallel can't be made anew for paged parameters ({error}); {_PAGE_FIRST}"
        raise PagedTensorError(msg) from error
    try:
        yield wrapper.module
    finally:
        wrapper._module_parameters = [
            parameter
            for name, parameter in wrapper.module.named_parameters()
            if name not in wrapper.parameters_to_ignore
        ]
        wrapper.__setstate__(state)  # type: ignore[no-untyped-call]


class WrapperHook(Hook):
    """Forward pre-hook of the root of a model in training: looks at what has wrapped it, see [Note: order]."""

    __slots__ = ("_seen", "_training", "_with_shards")

    def __init__(self, training: Training, *, with_shards: bool) -> None:
        self._training = training
        self._with_shards = with_shards
        self._seen: object = self  # no wrapper, and not None

    def __call__(self, module: torch.nn.Module, _args: tuple[Any, ...]) -> None:
        """PagedTensorError when gradients would not come to the paged parameters."""
        wrapper = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
        if wrapper is self._seen:
            return
        if self._seen is self and not self._with_shards and has_shards(module):
            msg = "fully_shard() after page() took the paged parameters away; shard the model first, and page it then"
            raise PagedTensorError(msg)
        if wrapper is not None:
            _check_wrapper(wrapper, module)
            if wrapper.gradient_as_bucket_view:
                self._training.leaves_gradients = True
        self._seen = wrapper


def _check_wrapper(wrapper: DistributedDataParallel, module: torch.nn.Module) -> None:
    _refuse_unsupported(wrapper)
    reduced = {id(parameter) for parameter in wrapper._module_parameters}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in reduced and not getattr(parameter, "_ddp_ignored", False):
            msg = (
                f"DistributedDataParallel was made before page(), and knows '{name}' as it was: its gradients would "
                f"not be reduced. Give the wrapper itself to page(), or {_PAGE_FIRST}"
            )
            raise PagedTensorError(msg)


# -- [Note: first broadcast] -------------------------------------------------------------------------------------------


def send_paged_states_in_pieces() -> None:
    """Replace torch's function, once. PagedTensorError, in a process group, when this torch has another one."""
    if not torch.distributed.is_available():
        return
    original: Any = getattr(torch_ddp, "_sync_module_states", None)
    if isinstance(original, _SyncStates):
        return
    names = [] if original is None else list(inspect.signature(original).parameters)
    known = ["module", "process_group", "broadcast_bucket_size", "src", "params_and_buffers_to_ignore"]
    if names[: len(known)] != known:
        if not torch.distributed.is_initialized():
            return
        msg = (
            f"torch {torch.__version__} has another DistributedDataParallel than the one that can hold a paged model; "
            "use another version of torch"
        )
        raise PagedTensorError(msg)
    torch_ddp._sync_module_states = _SyncStates(original)  # type: ignore[assignment,attr-defined]


class _SyncStates:
    """_sync_module_states() of torch.distributed.utils, with paged parameters sent in pieces."""

    def __init__(self, original: Callable[..., None]) -> None:
        self._original = original

    def __call__(
        self,
        module: torch.nn.Module,
        process_group: Any,
        broadcast_bucket_size: int,
        src: int,
        params_and_buffers_to_ignore: Any,
        **options: Any,
    ) -> None:
        """src: a rank of the group."""
        sent: set[str] = set()
        for name, parameter in module.named_parameters():
            if isinstance(parameter, PagedTensor) and name not in params_and_buffers_to_ignore:
                _send(parameter.detach(), process_group, src)
                sent.add(name)
        ignored = {*params_and_buffers_to_ignore, *sent}
        self._original(
            module=module,
            process_group=process_group,
            broadcast_bucket_size=broadcast_bucket_size,
            src=src,
            params_and_buffers_to_ignore=ignored,
            **options,
        )


def _send(tensor: torch.Tensor, group: Any, src: int) -> None:
    import torch.distributed as dist

    rank = dist.get_global_rank(group, src)
    # In the order of its elements, whatever the strides are on each rank.
    count = max(1, _PIECE_BYTES // tensor.element_size())
    pieces = torch.split(tensor.view(-1), count) if tensor.is_contiguous() else [tensor]
    for piece in pieces:
        plain = piece.clone(memory_format=torch.contiguous_format)
        dist.broadcast(plain, rank, group=group)
        if dist.get_rank() != rank and not torch.equal(plain.view(torch.uint8), piece.contiguous().view(torch.uint8)):
            piece.copy_(plain)
