# SPDX-License-Identifier: Apache-2.0
"""Models sharded by torch's fully_shard (FSDP2): every rank pages its own shards, never what is gathered from them.

A sharded parameter stays the DTensor that it is, for FSDP, for optimizers, for the user; the tensor inside of it, this
rank's part, moves into the address space, and with it the padded copy of it that FSDP gathers from, which is the same
memory. FSDP reads that through the guard, so what one module gathers is resident while it is copied, and planned for
like anything else. Gathered parameters live as ever: in memory, from the gathering to the end of their module.

Gradients and optimizer state are DTensors too, and their inner tensors are paged like others. An optimizer whose update
asks other ranks for something is refused: how many parameters it updates at a time depends on the budget, so ranks
would ask in different orders.

Of FSDP this needs a few attributes that are not documented; _parts_of() looks for all of them. Threads: the one that
trains.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from tensorpager.errors import PagedTensorError
from tensorpager.optim import AdamW
from tensorpager.paged_tensor import Backing, PagedTensor, make_paged
from tensorpager.spill import copy_into, tensor_at
from tensorpager.training_record import ShardPlace

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core

__all__ = [
    "GatheredParameters",
    "Shard",
    "dtensor_like",
    "has_shards",
    "is_sharded",
    "local_of",
    "put_local",
    "refuse_for_shards",
    "release_gathered",
    "shard_place",
    "shards_of",
]

_PARAMETER_ATTRIBUTES = (
    *("sharded_param", "_sharded_param_data", "_sharding_spec", "_module_info", "reset_sharded_param"),
    *("unsharded_accumulated_grad", "all_gather_outputs"),
)


def _module_named(name: str) -> Any:
    """A module of torch.distributed that somebody has imported, or None: then nothing of it can be here."""
    return sys.modules.get(f"torch.distributed.{name}")


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor."""
    module = _module_named("tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a DTensor; any other tensor itself."""
    if not is_sharded(tensor):
        return tensor
    local: torch.Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return local


def put_local(tensor: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """`local` in place of what `tensor` has, when that is a DTensor, which is returned then; else `local` itself."""
    if not is_sharded(tensor):
        return local
    tensor._local_tensor = local  # type: ignore[attr-defined]
    return tensor


def dtensor_like(parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A DTensor of this rank's part, sharded as the parameter is."""
    with torch.no_grad():
        made: torch.Tensor = _module_named("tensor").DTensor.from_local(
            local, parameter.device_mesh, parameter.placements, run_check=False,  # type: ignore[attr-defined]
            shape=parameter.shape, stride=parameter.stride(),
        )  # fmt: skip
    return put_local(made, local)  # which it has a view of


class Shard:
    """One sharded parameter: its name in the model, and what FSDP has of it."""

    def __init__(self, name: str, fsdp_param: Any) -> None:
        self.name = name
        self._fsdp_param = fsdp_param

    @property
    def parameter(self) -> torch.nn.Parameter:
        """The DTensor, which stays."""
        parameter: torch.nn.Parameter = self._fsdp_param.sharded_param
        return parameter

    @property
    def is_empty(self) -> bool:
        """Whether this rank has nothing of it but padding."""
        return local_of(self.parameter).numel() == 0

    @property
    def size_bytes(self) -> int:
        """With the padding that makes all ranks' parts of one size."""
        whole: torch.Tensor = self._fsdp_param._sharded_param_data
        return whole.numel() * whole.element_size()

    def move(self, core: Core, address: int) -> None:
        """Copy it to the address, and put paged tensors in place. Blocks on I/O."""
        whole: torch.Tensor = self._fsdp_param._sharded_param_data
        copy_into(core, tensor_at(core, address, (whole.numel(),), (1,), whole.dtype), whole)
        del whole
        self.put(core, address)

    def put(self, core: Core, address: int) -> None:
        """Paged tensors over what is at the address already. Reads nothing."""
        backing = Backing(core, self.name)
        given, local = self._fsdp_param._sharded_param_data, local_of(self.parameter)
        shape, strides, dtype = tuple(local.shape), tuple(local.stride()), local.dtype
        whole = make_paged(tensor_at(core, address, (given.numel(),), (1,), dtype), backing)
        paged = make_paged(tensor_at(core, address, shape, strides, dtype), backing)
        del given, local
        self._fsdp_param._sharded_param_data = whole
        put_local(self.parameter, paged)
        self._fsdp_param.reset_sharded_param = _KeepPaged(self.name, self._fsdp_param, paged)

    def refuse_unpageable(self) -> None:
        """PagedTensorError when it can't be paged."""
        local = local_of(self.parameter)
        why = None
        if type(local) is PagedTensor:
            why = "is paged already"
        elif local.device.type == "meta":
            why = "is on the meta device; give it room by model.to_empty(device='cpu') before that"
        elif local.device.type != "cpu":
            why = f"is on {local.device}; shards are paged on the host so far, over a mesh of the CPU"
        elif type(local) is not torch.Tensor:
            why = f"has parts of the subclass {type(local).__name__}, whose memory is its own business"
        elif getattr(self.parameter, "_post_accumulate_grad_hooks", None) or self.parameter._backward_hooks:
            why = "has gradient hooks already; register them after page(), so that they run after paging"
        elif not _is_plainly_sharded(self.parameter):
            placements = self.parameter.placements  # type: ignore[attr-defined]
            why = (
                f"is placed as {placements}; what fully_shard shards can be paged, replicated or not, and nothing else"
            )
        if why is not None:
            msg = f"sharded parameter '{self.name}' {why}"
            raise PagedTensorError(msg)


def _is_plainly_sharded(parameter: Any) -> bool:
    *replicas, shard = parameter.placements
    return type(shard).__name__ == "Shard" and [each.is_replicate() for each in replicas] in ([], [True])


class _KeepPaged:
    """In place of FSDPParam.reset_sharded_param(), which takes up memory that the user has put in place, and may copy
    it for its padding. A paged shard has one address for life."""

    def __init__(self, name: str, fsdp_param: Any, local: PagedTensor) -> None:
        self._name = name
        self._parameter: torch.Tensor = fsdp_param.sharded_param
        self._info = fsdp_param._module_info
        self._local = local

    def __call__(self) -> None:
        now = getattr(self._info.module, self._info.param_name)
        if now is self._parameter and local_of(now) is self._local:
            return
        msg = (
            f"'{self._name}' is a paged shard with a permanent address, and other memory was put in its place, by "
            "model.to(), by load_state_dict(assign=True) or the like. To change dtype or device, do it before page(); "
            "to change values, load_state_dict() and copy_() work"
        )
        raise PagedTensorError(msg)


def _parts_of(module: torch.nn.Module) -> list[Any]:
    """FSDP's own record of each parameter that it shards for this module."""
    fsdp = _module_named("fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is None or not isinstance(module, kind):
        return []
    try:
        state: Any = module._get_fsdp_state()
        groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        found = [part for group in groups if group is not None for part in group.fsdp_params]
    except AttributeError as error:
        missing: str | None = str(error)
    else:
        missing = next((name for name in _PARAMETER_ATTRIBUTES for part in found if not hasattr(part, name)), None)
    if missing is not None:
        msg = (
            f"torch {torch.__version__} has another fully_shard than the one that can be paged ({missing}); use "
            "another version of torch"
        )
        raise PagedTensorError(msg)
    return found


def shards_of(model: torch.nn.Module) -> list[Shard]:
    """Every parameter that fully_shard shards, in the order of the model's modules. None of it is gathered after this.

    PagedTensorError for what can't be paged, and for the older FullyShardedDataParallel.
    """
    _refuse_fsdp1(model)
    parts = {
        (id(part._module_info.module), part._module_info.param_name): part
        for module in model.modules()
        for part in _parts_of(module)
    }
    if not parts:
        return []
    _reshard(model)
    shards = []
    for module_name, module in model.named_modules():
        for name in module._parameters:
            part = parts.pop((id(module), name), None)
            if part is not None:
                shards.append(Shard(f"{module_name}.{name}" if module_name else name, part))
                shards[-1].refuse_unpageable()
    return shards


def _refuse_fsdp1(model: torch.nn.Module) -> None:
    kind = getattr(_module_named("fsdp"), "FullyShardedDataParallel", None)
    if kind is not None and any(isinstance(module, kind) for module in model.modules()):
        msg = (
            "FullyShardedDataParallel packs parameters into flat ones of its own, which can't be paged; shard the "
            "model with torch.distributed.fsdp.fully_shard"
        )
        raise PagedTensorError(msg)


def _reshard(model: torch.nn.Module) -> None:
    for module in model.modules():
        if _parts_of(module):
            module.reshard()  # type: ignore[operator]


def has_shards(model: torch.nn.Module) -> bool:
    """Whether fully_shard shards parameters of the model."""
    return any(_parts_of(module) for module in model.modules())


class GatheredParameters:
    """Contains the tensors over memory that FSDP gathers a model's parameters into, and takes away between uses."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parts = [part for module in model.modules() for part in _parts_of(module)]
        self._storages: set[int] = set()  # once gathered, a parameter keeps its storage, empty or not

    def __contains__(self, tensor: object) -> bool:
        if len(self._storages) < len(self._parts):
            outputs = [output for part in self._parts for output in part.all_gather_outputs]
            self._storages = {output.untyped_storage()._cdata for output in outputs}
        return isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata in self._storages


def release_gathered(model: torch.nn.Module) -> None:
    """So that the model's parameters are the shards. PagedTensorError when gradients wait to be reduced over ranks."""
    for module in model.modules():
        for part in _parts_of(module):
            gathered = getattr(part, "_unsharded_param", None)
            waits = gathered is not None and gathered.grad is not None
            if waits or part.unsharded_accumulated_grad is not None:
                msg = (
                    f"gradients of '{part._module_info.param_name}' have not been reduced over the ranks "
                    "(set_requires_gradient_sync(False)), so no rank's shard has them; commit after a backward that "
                    "reduces them"
                )
                raise PagedTensorError(msg)
    _reshard(model)


def shard_place(parameter: torch.Tensor) -> ShardPlace:
    """Which part of the whole this rank has."""
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    dim = placements[-1].dim
    part = -(-parameter.shape[dim] // mesh.size(mesh.ndim - 1))  # of all ranks but the last ones
    start = min(mesh.get_coordinate()[-1] * part, parameter.shape[dim])
    return ShardPlace(tuple(parameter.shape), dim, start)


#: Their update of a parameter asks for a norm or a mean of all of it, or takes sparse gradients, or packs its state.
_NOT_BY_SHARDS = (torch.optim.Adafactor, torch.optim.SparseAdam, AdamW)


def refuse_for_shards(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """PagedTensorError for an optimizer whose update of a shard needs more than the shard."""
    for optimizer in optimizers:
        if isinstance(optimizer, _NOT_BY_SHARDS):
            name = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
            msg = (
                f"{name} needs more than a rank's own shard of a parameter for its update, and ranks would ask each "
                "other in different orders. Use an optimizer that updates element by element, such as "
                "torch.optim.AdamW or SGD"
            )
            raise PagedTensorError(msg)
