# SPDX-License-Identifier: Apache-2.0
"""Moving a model's parameters into the address space: which there are, which share memory, and the swap itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tensorpager.errors import PagedTensorError
from tensorpager.paged_tensor import Backing, PagedTensor, make_paged, span_of
from tensorpager.spill import copy_into, dense_strides, tensor_at

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core
    from tensorpager.shards import Shard

__all__ = ["Group", "Slot", "collect", "move_group", "swap"]

Moved = Callable[[torch.nn.Parameter, PagedTensor], None]
Owners = list[tuple[torch.nn.Module, str]]


@dataclass
class Slot:
    """One parameter and every place in the model that has it."""

    name: str
    parameter: torch.nn.Parameter
    owners: Owners
    offset_bytes: int = 0  # in its group
    size_bytes: int = 0


@dataclass
class Group:
    """Parameters that share memory: they move together and overlap as before."""

    slots: list[Slot]
    size_bytes: int = 0
    address: int | None = None
    written: bool = False  # its values are at the address already


def collect(model: torch.nn.Module, shards: Collection[Shard] = (), *, meta: bool = False) -> list[Group]:
    """Every parameter of the model that holds bytes, once, in the order of its modules. Changes nothing.

    meta: they may be on the meta device; then the groups say nothing. shards: what else there is to page, and is left
    out. PagedTensorError for one that can't be paged, and when there is none.
    """
    slots: dict[int, Slot] = {}
    left_out = {id(shard.parameter) for shard in shards}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in left_out:
                continue
            slot = slots.get(id(parameter))
            if slot is None:
                full_name = f"{module_name}.{name}" if module_name else name
                _refuse_unpageable(full_name, parameter, meta)
                slot = slots[id(parameter)] = Slot(full_name, parameter, [])
            slot.owners.append((module, name))
    by_storage: dict[int, list[Slot]] = {}
    for slot in slots.values():
        if slot.parameter.numel() > 0:
            by_storage.setdefault(slot.parameter.untyped_storage()._cdata, []).append(slot)
    if not by_storage and not shards:
        msg = f"{type(model).__name__} has no parameters to page"
        raise PagedTensorError(msg)
    return [group for sharing in by_storage.values() for group in _overlapping(sharing)]


def _refuse_unpageable(name: str, parameter: torch.nn.Parameter, meta: bool) -> None:
    kind: type[torch.Tensor] = type(parameter)
    why = None
    if kind is PagedTensor:
        why = "is paged already"
    elif kind is not torch.nn.Parameter:
        why = f"is of the subclass {kind.__name__}, whose memory is its own business; page its inner tensors instead"
    elif parameter.device.type == "meta" and not meta:
        why = "is on the meta device and has no values; use from_pretrained(), or load the model first"
    elif parameter.device.type not in ("cpu", "meta"):
        why = f"is on {parameter.device}; move the model to the CPU before page()"
    elif parameter.layout is not torch.strided or parameter.is_quantized:
        why = f"is sparse or quantized ({parameter.layout}, {parameter.dtype}); only dense tensors can be paged"
    elif parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        why = "has gradient hooks, which can't be moved to another tensor; register them after page()"
    if why is not None:
        msg = f"parameter '{name}' {why}"
        raise PagedTensorError(msg)


def _overlapping(slots: list[Slot]) -> Iterator[Group]:
    """Split parameters of one storage into groups whose byte ranges overlap."""
    spans = sorted(((span_of(slot.parameter), slot) for slot in slots), key=lambda item: item[0])
    group: Group | None = None
    end = start = 0
    for (address, size_bytes), slot in spans:
        if group is not None and address >= end:
            yield group
            group = None
        if group is None:
            group, start, end = Group([]), address, address
        slot.offset_bytes = address - start
        slot.size_bytes = size_bytes
        group.slots.append(slot)
        end = max(end, address + size_bytes)
        group.size_bytes = end - start
    if group is not None:
        if len(group.slots) == 1:  # a copy has no holes and no repetitions
            parameter = group.slots[0].parameter
            group.size_bytes = group.slots[0].size_bytes = parameter.numel() * parameter.element_size()
        yield group


def move_group(core: Core, group: Group, moved: Moved) -> int:
    """Copy one group to its address and put paged parameters in place. Returns their number. Blocks on I/O.

    moved(original, paged) is called for each. The originals are freed with the group.
    """
    assert group.address is not None
    if len(group.slots) == 1:
        slot = group.slots[0]
        source = slot.parameter.detach()
        shape, strides = tuple(source.shape), dense_strides(source)
        plain = tensor_at(core, group.address, shape, strides, source.dtype)
        if not group.written:
            copy_into(core, plain, source)
        swap(core, slot, plain, moved)
        return 1
    first = group.slots[0].parameter.detach()
    start_bytes = first.storage_offset() * first.element_size() - group.slots[0].offset_bytes
    whole = torch.empty(0, dtype=torch.uint8, device=first.device).set_(
        first.untyped_storage(), start_bytes, (group.size_bytes,), (1,)
    )
    shared = tensor_at(core, group.address, (group.size_bytes,), (1,), torch.uint8)
    copy_into(core, shared, whole)
    for slot in group.slots:
        parameter = slot.parameter
        typed = torch.empty(0, dtype=parameter.dtype, device=shared.device).set_(
            shared.untyped_storage(),
            slot.offset_bytes // parameter.element_size(),
            tuple(parameter.shape),
            tuple(parameter.stride()),
        )
        swap(core, slot, typed, moved)
    return len(group.slots)


def swap(core: Core, slot: Slot, plain: torch.Tensor, moved: Moved) -> None:
    """Put a paged parameter over `plain` wherever the model has the slot's. PagedTensorError when a module refuses."""
    original = slot.parameter
    paged = make_paged(plain, Backing(core, slot.name), parameter=True, requires_grad=original.requires_grad)
    paged.__dict__.update({name: value for name, value in vars(original).items() if name not in vars(paged)})
    paged.grad = original.grad
    for module, name in slot.owners:
        setattr(module, name, paged)  # not _parameters[name]: modules such as LSTM keep lists of their own
        taken: torch.Tensor | None = module._parameters.get(name)
        if taken is not paged:
            msg = (
                f"'{slot.name}': {type(module).__name__} did not take the paged parameter; its __setattr__ puts "
                "something else in place. Page the model without that module"
            )
            raise PagedTensorError(msg)
    moved(original, paged)
