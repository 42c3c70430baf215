# SPDX-License-Identifier: Apache-2.0
"""`resume()`: go on training from the last commit of a store, and `committed()`: whether there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from tensorpager.commit import kept_buffers, set_random_states
from tensorpager.data_parallel import unwrapped
from tensorpager.errors import PagedTensorError
from tensorpager.joint_commit import JointCommits, StorePlace, joint_commit_number, open_decided
from tensorpager.module_windows import make_windows
from tensorpager.moving import Slot, collect, swap
from tensorpager.pager import Pager, attach_training, checked_optimizers, make_core
from tensorpager.ranks import agreed
from tensorpager.shards import Shard, dtensor_like, local_of, refuse_for_shards, shard_place, shards_of
from tensorpager.spill import tensor_at
from tensorpager.store import Store, open_pagefile
from tensorpager.training import Training
from tensorpager.training_record import AddressBook, Entry, StoredTensor, TrainingRecord, Value, record_of

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core

__all__ = ["committed", "last_record", "resume"]


def committed(store: Store) -> int:
    """The number of a store's last commit; 0 when it has none, or is no store. IoError when it can't be read.

    In a process group every rank has to call it, and gets the number of the last commit that all of them have.
    RanksError when the store is of other ranks.
    """
    return joint_commit_number(StorePlace(store, "committed()"), "committed()")


def last_record(store: Store) -> TrainingRecord:
    """What that commit says beside its pages, on this rank. IoError, CheckpointError, RanksError as for resume()."""
    place = StorePlace(store, "last_record()")
    number = joint_commit_number(place, "last_record()")
    pagefile = open_pagefile(place.directories)
    try:
        if pagefile.prepared and number > pagefile.commit_number:
            return TrainingRecord.from_bytes(pagefile.prepared_metadata, place.directories[0])
        return record_of(pagefile, place.directories[0])
    finally:
        pagefile.close()


def resume(
    store: Store,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    budget: int | str = "1GiB",
    engine: str = "auto",
) -> Pager:
    """Go on training from the last commit of `store`. Nothing is copied: its pages come in as they are needed.

    model and optimizer: made as for page(), with the same parameters, groups and class of optimizer; their values don't
    matter, and the model may be on the meta device. Parameters, gradients, buffers, optimizer state and options, and
    the random states of torch (CPU), Python and NumPy become those of the commit; pager.state is what commit() was
    given, for the scheduler and the data's position. Make a learning rate scheduler before this, and load its state
    after. The budget may be another one; the pages keep their size.

    In a process group every rank has to call it, of as many ranks as trained in the store, and a model that was sharded
    by fully_shard() or wrapped in DistributedDataParallel is given so again. All get the same commit.

    Then training goes on as if it had not stopped, bit for bit. Raises IoError when there is no store, or it is open
    elsewhere; CheckpointError when it has no commit that this release can read; PagedTensorError when model or
    optimizer are not those of the commit; RanksError when the ranks are not those of the run, or one of them fails; and
    what page() raises. Model and optimizer are then not to be used.
    """
    optimizers = checked_optimizers(optimizer, None)
    place = StorePlace(store, "resume()")
    pagefile = open_decided(place, "resume()")
    where = place.directories[0]

    def resumed() -> tuple[Pager, TrainingRecord]:
        try:
            record = record_of(pagefile, where)
            shards = shards_of(inner)
            refuse_for_shards(optimizers if shards else ())
            slots = _matched_slots(inner, shards, record, where)
            _check_groups(inner, optimizers, record, where)
            core = make_core(budget, None, engine, record.page_bytes, pagefile=pagefile)
        except BaseException:
            pagefile.close()
            raise
        try:
            return _resume(inner, core, slots, shards, optimizers, record), record
        except BaseException:
            core.close()
            raise

    with unwrapped(model) as inner:
        pager, record = agreed(place.ranks, "resume()", resumed, lambda result: result[0].close())
    if place.ranks is not None:
        assert record.stamp is not None
        pager._commit_with(JointCommits(place.ranks, record.stamp.run))
    pager.state = record.state
    set_random_states(record.random)
    return pager


def _resume(
    model: torch.nn.Module,
    core: Core,
    slots: list[tuple[Slot, StoredTensor]],
    shards: list[Shard],
    optimizers: list[torch.optim.Optimizer],
    record: TrainingRecord,
) -> Pager:
    regions = [core.map_spill(pages * core.page_bytes) for pages in record.regions]
    book = AddressBook(core.page_bytes, regions)
    spans = {id(slot.parameter): (book.address(at.page, at.offset_bytes), at.span_bytes) for slot, at in slots}
    windows = make_windows(model, core, spans)
    for optimizer in optimizers:
        optimizer.state.clear()
    training = Training(core, optimizers, regions)
    paged_bytes = sum(size_bytes for _, size_bytes in set(spans.values())) + sum(each.size_bytes for each in shards)
    tensor_count = len(slots) + len(shards)
    del spans
    while slots:
        slot, at = slots.pop()
        plain = tensor_at(core, book.address(at.page, at.offset_bytes), at.shape, at.strides, at.dtype)
        slot.parameter.grad = None
        swap(core, slot, plain, training.moved)
    for shard in shards:
        entry = record.parameters[shard.name]
        shard.parameter.grad = None
        if isinstance(entry, StoredTensor):
            shard.put(core, book.address(entry.page, entry.offset_bytes))
        training.placed(shard.parameter)
    restorer = _Restorer(core, training, book)
    restorer.restore(model, optimizers, record)
    return attach_training(model, core, windows, paged_bytes, tensor_count, training, regions)


class _Restorer:
    """Puts what a record says into model and optimizers."""

    def __init__(self, core: Core, training: Training, book: AddressBook) -> None:
        self._core = core
        self._training = training
        self._book = book

    def restore(self, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], record: TrainingRecord) -> None:
        places, arena = self._training.places, self._training.arena
        for name, size_bytes, page, offset_bytes in record.free:
            places.add_free(name, size_bytes, self._book.address(page, offset_bytes))
        if record.room is not None:
            page, offset_bytes, size_bytes = record.room
            begin = self._book.address(page, offset_bytes)
            arena.go_on(begin, begin + size_bytes, record.training_bytes)
        else:
            arena.go_on(0, 0, record.training_bytes)
        parameters = dict(model.named_parameters())
        for name, entry in record.gradients.items():
            with torch._C.DisableTorchFunctionSubclass():
                parameters[name].grad = self._like(parameters[name], f"{name}.grad", entry)
        for name, owner, own_name in kept_buffers(model):
            buffer = owner._buffers[own_name]
            assert buffer is not None
            entry = record.buffers[name]
            value = self._tensor(f"{name} (buffer)", entry)
            if buffer.device.type == "meta":
                owner._buffers[own_name] = value.clone()
            else:
                buffer.detach().copy_(value)
        for optimizer, kept in zip(optimizers, record.optimizers, strict=True):
            for group, options in zip(optimizer.param_groups, kept.groups, strict=True):
                group.update({key: value for key, value in options.items() if key != "params"})
            for name, values in kept.state.items():
                optimizer.state[parameters[name]] = {
                    key: self._like(parameters[name], f"{name}.{key}", entry) for key, entry in values.items()
                }

    def _like(self, parameter: torch.Tensor, name: str, entry: Entry) -> Any:
        value = self._tensor(name, entry)
        return dtensor_like(parameter, value) if entry.sharded else value

    def _tensor(self, name: str, entry: Entry) -> Any:
        if isinstance(entry, Value):
            return entry.value
        address = self._book.address(entry.page, entry.offset_bytes)
        return self._training.places.adopt(name, address, entry.shape, entry.strides, entry.dtype)


# -- is it the same model? ---------------------------------------------------------------------------------------------


def _matched_slots(
    model: torch.nn.Module, shards: list[Shard], record: TrainingRecord, where: str
) -> list[tuple[Slot, StoredTensor]]:
    groups = collect(model, shards, meta=True)
    slots = {slot.name: slot for group in groups for slot in group.slots}
    named = {name: local_of(parameter) for name, parameter in model.named_parameters()}
    _compare_names("parameters", set(named), set(record.parameters), where)
    _compare_shards(shards, record, where)
    _compare_names("buffers", {name for name, _, _ in kept_buffers(model)}, set(record.buffers), where)
    matched = []
    for name, entry in record.parameters.items():
        given = named[name]
        shape, dtype = (
            (entry.shape, entry.dtype)
            if isinstance(entry, StoredTensor)
            else (tuple(entry.value.shape), entry.value.dtype)
        )
        if tuple(given.shape) != tuple(shape) or given.dtype != dtype:
            _differs(
                where,
                f"parameter '{name}' is of shape {tuple(given.shape)} and {given.dtype}; there it is {tuple(shape)} "
                f"and {dtype}",
            )
        if isinstance(entry, StoredTensor) and not entry.sharded:
            if name not in slots:
                _differs(where, f"parameter '{name}' is shared with another one; there it is not")
            matched.append((slots[name], entry))
    for name, given_buffer in model.named_buffers():
        if given_buffer.device.type == "meta" and name not in record.buffers:
            _differs(where, f"buffer '{name}' is on the meta device, and not persistent, so no commit has it")
    for name, owner, own_name in kept_buffers(model):
        buffer, kept = owner._buffers[own_name], record.buffers[name]
        assert buffer is not None
        shape = kept.shape if isinstance(kept, StoredTensor) else tuple(kept.value.shape)
        if tuple(buffer.shape) != tuple(shape):
            _differs(where, f"buffer '{name}' is of shape {tuple(buffer.shape)}; there it is {tuple(shape)}")
    return matched


def _check_groups(
    model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], record: TrainingRecord, where: str
) -> None:
    if len(optimizers) != len(record.optimizers):
        _differs(where, f"{len(optimizers)} optimizers are given; there are {len(record.optimizers)}")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer, kept in zip(optimizers, record.optimizers, strict=True):
        if type(optimizer).__name__ != kept.kind:
            _differs(where, f"the optimizer is {type(optimizer).__name__}; there it is {kept.kind}")
        given = [[names.get(id(each), "?") for each in group["params"]] for group in optimizer.param_groups]
        if given != [group["params"] for group in kept.groups]:
            _differs(where, f"the groups of {kept.kind} hold other parameters, or in another order, than there")


def _compare_shards(shards: list[Shard], record: TrainingRecord, where: str) -> None:
    given = {shard.name: shard_place(shard.parameter) for shard in shards}
    _compare_names("sharded parameters", set(given), set(record.shards), where)
    for name, place in given.items():
        if place != record.shards[name]:
            _differs(where, f"this rank's part of '{name}' is {place}; there it is {record.shards[name]}")


def _compare_names(what: str, given: set[str], kept: set[str], where: str) -> None:
    if given == kept:
        return
    only_given, only_kept = sorted(given - kept)[:3], sorted(kept - given)[:3]
    _differs(
        where,
        f"the {what} are others: only in the model {', '.join(only_given) or 'none'}; only there "
        f"{', '.join(only_kept) or 'none'}",
    )


def _differs(where: str, what: str) -> NoReturn:
    msg = f"model and optimizer are not those of the commit in {where}: {what}. Make them as the run there did"
    raise PagedTensorError(msg)
