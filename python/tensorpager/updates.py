# SPDX-License-Identifier: Apache-2.0
"""Updates that an optimizer's step() leaves for later: each is made when its module is entered the next time.

A step after backward has nothing to hide its transfers behind: every weight comes in with its gradient and its state,
and nothing computes but the update itself. Put off until the next forward comes to the module, the update's transfers
run beside what forward computes before, and the weight that it leaves is the one that is used at once. The numbers are
the same: the gradient and the options (learning rate and all) are those of the time of step().

Nobody sees a weight that is behind. Whatever reads or writes a parameter, its gradient or the optimizer's state by way
of torch makes the update first: a module call, the guard of paged_tensor.py, `optimizer.state`, a commit, the next
step(). What can't be seen is a raw pointer that was taken before step() and is read after it, outside of the module's
own call.

Only what can wait does: a step inside of backward, under autocast, with hooks behind it, with a gradient that is
neither paged nor small, is made at once.

Threads: any may come to a module; one makes updates at a time. Blocking: settling blocks on I/O.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.optim import optimizer as torch_optimizer

from tensorpager.gradients import Factor
from tensorpager.paged_tensor import Backing, PagedTensor

if TYPE_CHECKING:
    from tensorpager.windows import Window

__all__ = ["Update", "Updates"]

Run = Callable[[], Any]
#: A gradient that is not paged may change without anybody seeing it: a small one is copied.
_COPIED_BYTES_MAX = 16 * 2**10


class Updates:
    """Those of one model. `make(update)` makes one, now; together_bytes: of parameters, for one that is worth while."""

    def __init__(self, make: Callable[[Update], None], together_bytes: int) -> None:
        self._make = make
        self._together_bytes = together_bytes
        self._lock = threading.RLock()
        self._waiting: dict[int, Update] = {}  # in the order of step()
        self._made_now = 0  # under the lock
        #: Whether updates may wait at all.
        self.may_wait = True

    @property
    def any_wait(self) -> bool:
        """Whether there are updates to be made."""
        return bool(self._waiting)

    def put_off(self, optimizer: torch.optim.Optimizer, run: Run) -> list[list[torch.Tensor]]:
        """Note what a step would update. Returns what can't wait, by group: to be updated by the caller, now."""
        self.settle(optimizer)
        groups = optimizer.param_groups
        if not self.may_wait or not _can_wait(optimizer):
            return [group["params"] for group in groups]
        options = [{key: _kept(value) for key, value in group.items() if key != "params"} for group in groups]
        now: list[list[torch.Tensor]] = [[] for _ in groups]
        later: list[_Entry] = []
        for number, group in enumerate(groups):
            for parameter in group["params"]:
                with torch._C.DisableTorchFunctionSubclass():
                    gradient = parameter.grad
                if gradient is None:
                    continue  # no step would do anything to it
                kept = _kept_gradient(parameter, gradient)
                if kept is None:
                    now[number].append(parameter)
                else:
                    later.append(_Entry(number, parameter, kept, _module_windows(parameter)))
        for entries in _by_neighbours(later, self._together_bytes):
            update = Update(self, optimizer, run, options, entries)
            self._waiting[id(update)] = update
            update.announce()
        return now

    def settle(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Make all updates that wait, or all that touch the optimizer's parameters or are its own. Blocks on I/O."""
        if not self._waiting:
            return
        mine = None if optimizer is None else {id(each) for group in optimizer.param_groups for each in group["params"]}
        for update in list(self._waiting.values()):
            if mine is None or update.optimizer is optimizer or update.touches(mine):
                update.settle()

    def settle_for_state(self) -> None:
        """For who looks at an optimizer's state: make all updates, unless it is an update that looks."""
        if self._waiting:
            with self._lock:
                if self._made_now == 0:
                    self.settle()

    @contextmanager
    def being_made(self) -> Iterator[None]:
        """While some are: those who look at an optimizer's state are the updates themselves."""
        with self._lock:
            self._made_now += 1
            try:
                yield
            finally:
                self._made_now -= 1

    def drop(self) -> None:
        """The pages are gone: forget what waits."""
        with self._lock:
            while self._waiting:
                self._waiting.popitem()[1].withdraw()

    def _settle(self, update: Update) -> None:
        with self._lock:
            if id(update) not in self._waiting:
                return  # made by another thread, or under way further up in this one
            # Whoever came first may be in another mode than the one who called step().
            with self.being_made(), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
                self._make(update)

    def _begin(self, update: Update) -> None:
        """Its pages are there, and it is being made: from here on nobody has to wait for it, nor may make it again."""
        del self._waiting[id(update)]
        update.withdraw()


class _Entry(NamedTuple):
    """One parameter of a step, and the gradient to update it by. group: its number among the optimizer's."""

    group: int
    parameter: torch.Tensor
    gradient: torch.Tensor
    windows: list[Window]


def _by_neighbours(entries: list[_Entry], together_bytes: int) -> Iterator[list[_Entry]]:
    """Those of one module together, and of modules that follow one another as long as they are small.

    Every update costs some time of Python's, and one of many modules pins more than what is used next.
    """
    in_modules = sorted((entry for entry in entries if entry.windows), key=lambda entry: entry.windows[0].set_id)
    part: list[_Entry] = []
    part_bytes = 0
    for entry in in_modules:
        size_bytes = entry.parameter.nbytes
        goes_on = part and entry.windows[0] is part[-1].windows[0]
        if part and not goes_on and part_bytes + size_bytes > together_bytes:
            yield part
            part, part_bytes = [], 0
        part.append(entry)
        part_bytes += size_bytes
    if part:
        yield part
    for entry in entries:
        if not entry.windows:
            yield [entry]


class Update:
    """Some parameters of an optimizer, those of one module, with what step() would have updated them by."""

    def __init__(
        self,
        updates: Updates,
        optimizer: torch.optim.Optimizer,
        run: Run,
        options: list[dict[str, Any]],
        entries: list[_Entry],
    ) -> None:
        self.optimizer = optimizer
        self.run = run
        self._updates = updates
        self._options = options
        self._parameters: list[list[torch.Tensor]] = [[] for _ in options]
        self._gradients: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._backings: list[Backing] = []
        self._factors: list[Factor] = []  # that gradients are still to be multiplied by
        self._windows: list[Window] = []
        for entry in entries:
            self._parameters[entry.group].append(entry.parameter)
            self._gradients.append((entry.parameter, entry.gradient))
            for tensor in (entry.parameter, entry.gradient):
                if type(tensor) is PagedTensor and tensor._tp_backing is not None:
                    self._backings.append(tensor._tp_backing)
            self._windows += [window for window in entry.windows if window not in self._windows]

    def announce(self) -> None:
        """From now on whoever comes to the parameters settles this first."""
        for backing in self._backings:
            if isinstance(backing.update, Factor):
                self._factors.append(backing.update)
            backing.update = self
        for window in self._windows:
            window.updates.append(self)
        for parameter, _ in self._gradients:
            # As the update itself would: a graph that saved the weight can't be gone through again.
            torch.autograd.graph.increment_version(parameter)

    def withdraw(self) -> None:
        """Nobody has to settle this any more."""
        for backing in self._backings:
            if backing.update is self:
                backing.update = None
        for window in self._windows:
            if self in window.updates:
                window.updates.remove(self)

    def touches(self, parameters: set[int]) -> bool:
        """Whether one of the parameters, by id, is among those to be updated."""
        return any(id(parameter) in parameters for parameter, _ in self._gradients)

    def settle(self) -> None:
        """Make the update, unless it is made. When its pages can't be had it waits on, and the error comes out."""
        self._updates._settle(self)

    def begin(self) -> None:
        """Called before anything is changed, with the pages of a part there at least. Once."""
        self._updates._begin(self)
        factors, self._factors = self._factors, []
        for factor in factors:
            factor.apply()

    @contextmanager
    def as_at_step(self) -> Iterator[None]:
        """The optimizer has these parameters alone, and options and gradients as they were at step()."""
        groups = list(self.optimizer.param_groups)
        groups_before = [dict(group) for group in groups]
        with torch._C.DisableTorchFunctionSubclass():
            gradients_before = [parameter.grad for parameter, _ in self._gradients]
        try:
            for number, group in enumerate(groups):
                known = number < len(self._options)
                group.update(self._options[number] if known else {})
                group["params"] = self._parameters[number] if known else []
            with torch._C.DisableTorchFunctionSubclass():
                for parameter, gradient in self._gradients:
                    parameter.grad = gradient
            yield
        finally:
            for group, before in zip(groups, groups_before, strict=True):
                group.update(before)
            with torch._C.DisableTorchFunctionSubclass():
                for (parameter, _), gradient_before in zip(self._gradients, gradients_before, strict=True):
                    parameter.grad = gradient_before


def _can_wait(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step now would be the same one later, as far as the optimizer tells."""
    scaled = (getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf"))
    hooks = optimizer._optimizer_step_post_hooks or torch_optimizer._global_optimizer_post_hooks
    return (
        torch._C._current_graph_task_id() == -1
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_inference_mode_enabled()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not hooks
        and not any(scaled)
        and not any(group.get("differentiable") for group in optimizer.param_groups)
    )


def _kept(value: Any) -> Any:
    """An option as it is now: tensors and lists among them can be changed in place."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.copy(value)


def _module_windows(parameter: torch.Tensor) -> list[Window]:
    backing = parameter._tp_backing if type(parameter) is PagedTensor else None
    return [] if backing is None else [window for window in backing.windows if window.set_id >= 0]


def _kept_gradient(parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor | None:
    """The gradient to update the parameter by, later; None when that can't wait."""
    if type(parameter) is not PagedTensor or parameter._tp_backing is None:
        return None
    with torch._C.DisableTorchFunctionSubclass():
        if gradient.requires_grad or gradient.numel() == 0:
            return None
        if type(gradient) is PagedTensor:
            return gradient if gradient._tp_backing is not None else None
        small = gradient.layout is torch.strided and gradient.nbytes <= _COPIED_BYTES_MAX
        return gradient.clone() if type(gradient) is torch.Tensor and small else None
