# SPDX-License-Identifier: Apache-2.0
"""Commits of a model in training: what of it is in pages, and what goes into the record beside them.

A commit is the pages as they are and a TrainingRecord, put in place by one rename: whatever happens, the drive has this
commit or the one before. Pages that did not change since then are not written again.

Threads: the one that trains. Blocking: until the drive has the commit.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tensorpager.errors import PagedTensorError
from tensorpager.paged_tensor import PagedTensor, span_of
from tensorpager.shards import is_sharded, local_of, release_gathered, shard_place
from tensorpager.training_record import (
    AddressBook,
    Entry,
    OptimizerRecord,
    Stamp,
    StoredTensor,
    TrainingRecord,
    Value,
)

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core
    from tensorpager._core import Region
    from tensorpager.joint_commit import JointCommits
    from tensorpager.training import Training

__all__ = ["Committer", "kept_buffers", "random_states", "set_random_states"]

#: Larger buffers go into pages: the record is held in memory, and written anew by each commit.
_INLINE_BYTES_MAX = 16 * 2**10


def kept_buffers(model: torch.nn.Module) -> Iterable[tuple[str, torch.nn.Module, str]]:
    """Name, owner and name there of every buffer that a state_dict would have; one that is shared, once."""
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set or id(buffer) in seen:
                continue
            seen.add(id(buffer))
            yield (f"{module_name}.{name}" if module_name else name), module, name


def random_states() -> dict[str, Any]:
    """Of the generators that are there without anybody making them: torch's of the CPU, Python's, NumPy's."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 (users' code draws from it)
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (str(kind), np.asarray(keys, "<u4").tobytes(), int(position), int(has_gauss), float(gauss)),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """ValueError, TypeError or KeyError for what random_states() did not make."""
    kind, keys, position, has_gauss, gauss = states["numpy"]
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state((kind, np.frombuffer(keys, "<u4"), position, has_gauss, gauss))  # noqa: NPY002


class Committer:
    """Makes the commits of one model. `regions`: of its address space, in the order in which they were mapped.

    joint: set when other ranks commit with this one.
    """

    def __init__(self, core: Core, model: torch.nn.Module, training: Training, regions: list[Region]) -> None:
        self.joint: JointCommits | None = None
        self._core = core
        self._model = weakref.ref(model)
        self._training = training
        self._book = AddressBook(core.page_bytes, regions)
        self._buffers: dict[str, tuple[tuple[int, int], PagedTensor]] = {}  # (data_ptr, version) of what is in pages

    def commit(self, state: object = None) -> int:
        """Returns the commit's number. See Pager.commit."""
        if self.joint is None:
            self._core.commit(self._record(state).to_bytes())
        else:
            self.joint.commit(self._core, lambda stamp: self._record(state, stamp).to_bytes())
        return self._core.commit_number

    def _record(self, state: object, stamp: Stamp | None = None) -> TrainingRecord:
        if torch._C._current_graph_task_id() != -1:
            msg = "commit() inside of backward: gradients are half made there; call it between steps"
            raise PagedTensorError(msg)
        model = self._model()
        if model is None:
            msg = "the model is gone, and with it what a commit would keep"
            raise PagedTensorError(msg)
        self._training.updates.settle()
        release_gathered(model)
        training = self._training
        record = TrainingRecord(self._core.page_bytes, state=state, random=random_states(), stamp=stamp)
        for name, parameter in model.named_parameters():
            record.parameters[name] = self._entry(parameter)
            if is_sharded(parameter):
                record.shards[name] = shard_place(parameter)
            with torch._C.DisableTorchFunctionSubclass():
                gradient = parameter.grad
            if gradient is not None:
                record.gradients[name] = self._gradient_entry(name, gradient)
        for name, owner, own_name in kept_buffers(model):
            record.buffers[name] = self._buffer_entry(name, owner._buffers[own_name])
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for optimizer in training.optimizers:
            record.optimizers.append(self._optimizer_record(optimizer, names))
        # Last: entries may have taken places.
        record.regions = self._book.page_counts()
        for name, size_bytes, address in training.places.free():
            page, offset_bytes = self._located(address)
            record.free.append((name, size_bytes, page, offset_bytes))
        begin, end = training.arena.room
        if begin < end:
            record.room = (*self._located(begin), end - begin)
        record.training_bytes = training.arena.size_bytes
        return record

    def _located(self, address: int) -> tuple[int, int]:
        found = self._book.locate(address)
        assert found is not None, "an arena's places lie in its regions"
        return found

    def _entry(self, given: torch.Tensor) -> Entry:
        sharded, tensor = is_sharded(given), local_of(given)
        with torch._C.DisableTorchFunctionSubclass():
            if type(tensor) is not PagedTensor or tensor.numel() == 0:
                return Value(tensor.detach(), sharded)
            address, _ = span_of(tensor)
            place = self._book.locate(address)
            if place is None:  # the result of a computation
                return Value(tensor.detach(), sharded)
            return StoredTensor(*place, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, sharded)

    def _gradient_entry(self, name: str, gradient: torch.Tensor) -> Entry:
        if type(local_of(gradient)) is PagedTensor or not _is_large(gradient):
            return self._entry(gradient)
        # One that stays plain, in a bucket of DistributedDataParallel: its version says nothing of its changes.
        self._buffers.pop(f"{name}.grad", None)
        copy = self._training.places.copy_in(gradient.detach(), f"{name}.grad (kept)")
        self._buffers[f"{name}.grad"] = ((0, 0), copy)
        return self._entry(copy)

    def _buffer_entry(self, name: str, buffer: torch.Tensor | None) -> Entry:
        assert buffer is not None
        if not _is_large(buffer):
            return Value(buffer.detach())
        mark = (buffer.data_ptr(), buffer._version)
        known = self._buffers.get(name)
        if known is None or known[0] != mark:
            self._buffers.pop(name, None)  # its place may be taken at once
            del known
            known = (mark, self._training.places.copy_in(buffer.detach(), f"{name} (buffer)"))
            self._buffers[name] = known
        return self._entry(known[1])

    def _optimizer_record(self, optimizer: torch.optim.Optimizer, names: dict[int, str]) -> OptimizerRecord:
        groups = []
        state: dict[str, dict[str, Entry]] = {}
        for group in optimizer.param_groups:
            kept = {key: value for key, value in group.items() if key != "params"}
            kept["params"] = [_name_of(parameter, names) for parameter in group["params"]]
            groups.append(kept)
            for parameter, name in zip(group["params"], kept["params"], strict=True):
                values = optimizer.state.get(parameter)
                if values:
                    state[name] = {
                        key: self._entry(value) if isinstance(value, torch.Tensor) else Value(value)
                        for key, value in values.items()
                    }
        return OptimizerRecord(type(optimizer).__name__, groups, state)


def _is_large(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.numel() * tensor.element_size() > _INLINE_BYTES_MAX


def _name_of(parameter: torch.Tensor, names: dict[int, str]) -> str:
    name = names.get(id(parameter))
    if name is None:
        msg = (
            f"the optimizer updates a tensor of shape {tuple(parameter.shape)} that is no parameter of the paged "
            "model, so a commit could not bring it back; give it an optimizer of its own, and save it with state="
        )
        raise PagedTensorError(msg)
    return name
