# SPDX-License-Identifier: Apache-2.0
"""Training a model whose parameters are paged: gradients and optimizer state move into the address space too.

Gradients. As soon as autograd has finished a parameter's gradient it is copied to spill, and `parameter.grad` is a
PagedTensor from then on: one plain gradient at a time is in RAM. When the last reference to it is gone (zero_grad()),
its pages are discarded: they need not be written, nor read again. One that was gone before the next one came, as with
an optimizer that steps inside of backward, stays where it is the next time, and is copied only if it is still there
when the next one has come.

Optimizers. `step()` runs on some parameters at a time, as many as half of the budget holds with their gradients and
state, which are resident together while it does: those of one module when it is next entered (`updates.py`), or all of
them at once. What state it made is moved to spill after each group. The update of a
parameter must depend on no other parameter's: so the optimizers of torch.optim are taken (but for LBFGS), the one of
optim.py, and any subclass that leaves their step() alone; others are refused.

Threads: a model is trained by one thread, in which autograd runs the nodes of the CPU. Nothing here is for a device.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from tensorpager.backward import HeldRanges
from tensorpager.errors import PagedTensorError
from tensorpager.gradient_places import restore_paged_gradient
from tensorpager.gradients import GradientNotes, NormsWanted
from tensorpager.optim import AdamW
from tensorpager.paged_tensor import PagedTensor, span_of
from tensorpager.places import Places
from tensorpager.shards import is_sharded, local_of, put_local
from tensorpager.spill import SpillArena
from tensorpager.updates import Update, Updates
from tensorpager.windows import Hook, Window

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core
    from tensorpager._core import Region
    from tensorpager.passes import PassDirector

__all__ = ["Training", "check_optimizers"]

#: Smaller gradients and state stay in RAM: step counts, biases, norms. Of a page, so that little of it is ever lost.
_MOVED_BYTES_MIN = 16 * 2**10

#: Updates of small modules are made together, of parameters (a quarter of what an update needs, most often) up to so
#: small a part of the budget.
_TOGETHER_SHARE = 64

_STEPS_EACH_ALONE = (
    torch.optim.Adadelta,
    torch.optim.Adafactor,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.AdamW,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
    torch.optim.SparseAdam,
    AdamW,
)


def check_optimizers(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """PagedTensorError for an optimizer whose step() can't be taken group by group. Changes nothing."""
    known = {inspect.unwrap(kind.step) for kind in _STEPS_EACH_ALONE}
    for optimizer in optimizers:
        kind = type(optimizer)
        if not isinstance(optimizer, torch.optim.Optimizer):
            msg = f"page() takes optimizers of torch.optim, not {kind.__name__}; a budget is given as budget="
            raise TypeError(msg)
        if issubclass(kind, _PagedStep):
            msg = f"this {kind.__name__} updates another paged model already; make one for each model"
            raise PagedTensorError(msg)
        if inspect.unwrap(kind.step) not in known:
            msg = (
                f"{kind.__name__}.step() is not one of torch.optim that updates each parameter by itself, and the "
                "parameters of a paged model are updated some at a time. Use one of "
                f"{', '.join(dict.fromkeys(each.__name__ for each in _STEPS_EACH_ALONE))}"
            )
            raise PagedTensorError(msg)
        made_by_scheduler = hasattr(optimizer.step, "_wrapped_by_lr_sched")
        if "step" in vars(optimizer) and not made_by_scheduler:
            msg = f"something has replaced step() of this {kind.__name__}; page the model before that"
            raise PagedTensorError(msg)


class Training:
    """The gradients and the optimizer state of one model. Made before its parameters move; see the head of the file."""

    def __init__(
        self, core: Core, optimizers: Iterable[torch.optim.Optimizer], regions: list[Region] | None = None
    ) -> None:
        self._core = core
        self.arena = SpillArena(core, regions)
        self._optimizers = list(optimizers)
        self._slots: dict[int, list[tuple[list[torch.Tensor], int]]] = {}  # in the optimizers' groups, by parameter
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for index, parameter in enumerate(group["params"]):
                    self._slots.setdefault(id(parameter), []).append((group["params"], index))
        self._window = Window(core, -1, "optimizer step")  # what a group of step() holds
        self.places = Places(core, self.arena, self._window)
        self._names: dict[int, str] = {}
        self._used_at_once: set[int] = set()  # parameters by id whose gradient is gone when the next one comes
        self._last_made: torch.Tensor | None = None  # in this backward
        self._backward_id = -1
        self.updates = Updates(self._make, core.pinnable_page_count * core.page_bytes // _TOGETHER_SHARE)
        self._norms = NormsWanted()
        #: Somebody else keeps the gradients where they are, see data_parallel.py.
        self.leaves_gradients = False

    @property
    def size_bytes(self) -> int:
        """What gradients and optimizer state take of the address space."""
        return self.arena.size_bytes

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those it was given."""
        return list(self._optimizers)

    def moved(self, original: torch.Tensor, paged: PagedTensor) -> None:
        """A parameter has moved: its optimizers get the paged one, with the state they had for it."""
        for parameters, index in self._slots.pop(id(original), []):
            parameters[index] = paged
        for optimizer in self._optimizers:
            if original in optimizer.state:
                optimizer.state[paged] = optimizer.state.pop(original)
        self.placed(paged)

    def placed(self, parameter: torch.Tensor) -> None:
        """The bytes of a parameter, or of this rank's shard of it, are paged: its gradients will be."""
        local = local_of(parameter)
        if type(local) is PagedTensor and local._tp_backing is not None:
            local._tp_backing.windows.append(self._window)
            local._tp_backing.places = self.places
            self._names[id(parameter)] = local._tp_backing.name
        if type(parameter) is PagedTensor and parameter.requires_grad:  # nothing of a shard waits
            parameter.register_hook(_BeforeGradientHook(weakref.ref(parameter)))  # type: ignore[no-untyped-call]
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_GradientHook(self))  # type: ignore[no-untyped-call]
        if parameter.grad is not None:
            self.move_gradient(parameter)

    def begin(self, director: PassDirector) -> None:
        """All parameters have moved: step() of the optimizers goes group by group from now on."""
        for optimizer in self._optimizers:
            for parameter in _parameters(optimizer):
                self._move_state(optimizer, parameter)
            _make_paged_step(optimizer, self, director)

    # -- gradients

    def gradient_made(self, parameter: torch.Tensor) -> None:
        """Autograd has finished the parameter's gradient: move it, or wait and see. Blocks on I/O."""
        if self.leaves_gradients:
            return
        restore_paged_gradient(parameter)
        backward_id = torch._C._current_graph_task_id()
        if backward_id != self._backward_id:
            self._backward_id = backward_id
            self.places.note_use()  # at its most: all that forward has saved
            torch.autograd.Variable._execution_engine.queue_callback(self._settle_last)
        if self._last_made is not parameter:
            self._settle_last()
        self._last_made = parameter
        if id(parameter) not in self._used_at_once:
            self.move_gradient(parameter)

    def _settle_last(self) -> None:
        """Of the gradient made last it is known now whether it was used at once."""
        parameter, self._last_made = self._last_made, None
        if parameter is None:
            return
        with torch._C.DisableTorchFunctionSubclass():
            is_gone = parameter.grad is None
        if is_gone:
            self._used_at_once.add(id(parameter))
        elif id(parameter) in self._used_at_once:
            self._used_at_once.remove(id(parameter))
            self.move_gradient(parameter)

    def move_gradient(self, parameter: torch.Tensor) -> None:
        """Copy a gradient to spill unless it is there, small, or not dense. Blocks on I/O."""
        with torch._C.DisableTorchFunctionSubclass():
            gradient = parameter.grad
            if gradient is None:
                return
            local = local_of(gradient)
            if type(local) is PagedTensor and local.numel() > 0:
                self._core.note_modified(*span_of(local))  # it was added to
                self._note_norm(local, local)
            elif _moves(local):
                paged = self.places.copy_in(local.detach(), f"{self._name(parameter)}.grad")
                assert paged._tp_backing is not None
                if not is_sharded(gradient):
                    paged._tp_backing.gradient = GradientNotes(self._norms)
                    self._note_norm(paged, local)
                parameter.grad = put_local(gradient, paged)
            elif is_sharded(gradient) and local.untyped_storage().nbytes() > local.numel() * local.element_size():
                put_local(gradient, local.clone())  # it would keep what all of its module's were reduced into

    def _note_norm(self, paged: PagedTensor, values: torch.Tensor) -> None:
        """While the gradient is at hand. `values`: those of `paged`."""
        notes = None if paged._tp_backing is None else paged._tp_backing.gradient
        if notes is not None and self._norms.wanted and values.is_floating_point():
            notes.note_norm(torch.linalg.vector_norm(values.detach(), 2.0), paged)

    def _name(self, parameter: torch.Tensor) -> str:
        return self._names.get(id(parameter), "parameter")

    # -- optimizers

    def step(self, optimizer: torch.optim.Optimizer, run: Callable[[], Any]) -> bool:
        """Update the optimizer's parameters by `run`, or put it off. Returns whether all is done."""
        self._norms.step_done()
        now = self.updates.put_off(optimizer, run)
        groups = list(optimizer.param_groups)
        everything = [group["params"] for group in groups]
        try:
            for group, parameters in zip(groups, now, strict=True):
                group["params"] = parameters
            if any(now) or not self.updates.any_wait:
                with self.updates.being_made():
                    self._in_parts(optimizer, run)
        finally:
            for group, parameters in zip(groups, everything, strict=True):
                group["params"] = parameters
        return not self.updates.any_wait

    def _make(self, update: Update) -> None:
        with update.as_at_step():
            self._in_parts(update.optimizer, update.run, update.begin)

    def _in_parts(
        self, optimizer: torch.optim.Optimizer, run: Callable[[], Any], begin: Callable[[], None] | None = None
    ) -> None:
        """`run` for some of the parameters that the optimizer has now at a time; `begin` before the first of them."""
        all_parameters = [group["params"] for group in optimizer.param_groups]
        for part in list(self._parts(optimizer)):  # the lists it looks at change below
            for group, parameters in zip(optimizer.param_groups, all_parameters, strict=True):
                group["params"] = [parameter for parameter in parameters if id(parameter) in part]
            spans = _spans(optimizer)
            held = HeldRanges(self._core, self._window, spans)
            with held:
                if begin is not None:
                    begin()
                    begin = None
                _settle(optimizer)
                # What is held needs no guard, and the guard is 5 us for each of a thousand operations of a step.
                with torch._C.DisableTorchFunctionSubclass() if held.acquired else nullcontext():
                    run()
                self._note_modified(optimizer)
            for parameter in _parameters(optimizer):
                self._move_state(optimizer, parameter)
            # What the update computed with, which a step that makes no state would keep all of.
            self.places.trim(sum(size_bytes for _, size_bytes in spans))

    def _note_modified(self, optimizer: torch.optim.Optimizer) -> None:
        """What a step changes: parameters that have gradients, and their state."""
        for parameter in _parameters(optimizer):
            with torch._C.DisableTorchFunctionSubclass():
                gradient = parameter.grad
            if gradient is None:
                continue
            gradient = local_of(gradient)
            for tensor in _belonging(optimizer, parameter):
                if tensor is not gradient and type(tensor) is PagedTensor and _span(tensor)[1] > 0:
                    self._core.note_modified(*_span(tensor))

    def _parts(self, optimizer: torch.optim.Optimizer) -> Iterator[set[int]]:
        """Parameters by id, as many as half of the budget holds together with what belongs to them."""
        limit_bytes = self._core.pinnable_page_count * self._core.page_bytes // 2
        part: set[int] = set()
        part_bytes = 0
        for parameter in _parameters(optimizer):
            size_bytes = _step_bytes(optimizer, parameter, self._core.page_bytes)
            if part and part_bytes + size_bytes > limit_bytes:
                yield part
                part, part_bytes = set(), 0
            part.add(id(parameter))
            part_bytes += size_bytes
        yield part

    def _move_state(self, optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
        state = optimizer.state.get(parameter)
        if not state:
            return
        for key, value in state.items():
            local = local_of(value)
            if _moves(local):
                state[key] = put_local(value, self.places.copy_in(local, f"{self._name(parameter)}.{key}"))


def _moves(value: object) -> bool:
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and isinstance(value, torch.Tensor)
        and value.device.type == "cpu"
        and value.layout is torch.strided
        and value.numel() * value.element_size() >= _MOVED_BYTES_MIN
    )


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _belonging(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> list[torch.Tensor]:
    with torch._C.DisableTorchFunctionSubclass():
        found = [parameter] if parameter.grad is None else [parameter, parameter.grad]
    state = optimizer.state.get(parameter) or {}
    found += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return [local_of(each) for each in found]


def _step_bytes(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, page_bytes: int) -> int:
    """Of the frames that one parameter's update needs; state to be made is taken for twice the parameter."""
    tensors = [each for each in _belonging(optimizer, parameter) if type(each) is PagedTensor]
    sizes = [_span(each)[1] + page_bytes for each in tensors]
    if parameter not in optimizer.state:
        of_torch = 2 * local_of(parameter).numel() * parameter.element_size()
        sizes += [optimizer.state_bytes(parameter) if isinstance(optimizer, AdamW) else of_torch]
    return sum(sizes)


def _settle(optimizer: torch.optim.Optimizer) -> None:
    """What gradients are still to be multiplied by: the guard would see to it."""
    for parameter in _parameters(optimizer):
        for tensor in _belonging(optimizer, parameter):
            backing = tensor._tp_backing if type(tensor) is PagedTensor else None
            if backing is not None and backing.update is not None:
                backing.update.settle()


def _spans(optimizer: torch.optim.Optimizer) -> list[tuple[int, int]]:
    tensors = [each for parameter in _parameters(optimizer) for each in _belonging(optimizer, parameter)]
    spans = {_span(each) for each in tensors if type(each) is PagedTensor}
    return sorted(span for span in spans if span[1] > 0)


def _span(tensor: PagedTensor) -> tuple[int, int]:
    """span_of(), which takes longer, once for a tensor."""
    if tensor._tp_span is None:
        tensor._tp_span = span_of(tensor)
    return tensor._tp_span


class _PagedStep:
    """Base of the classes that optimizers get; see _make_paged_step."""


def _make_paged_step(optimizer: torch.optim.Optimizer, training: Training, director: PassDirector) -> None:
    """Give the optimizer a subclass of its own class whose step() goes group by group.

    Hooks, profiling and learning rate schedulers see one step, as before. Copies are of the original class.
    """
    kind: Any = type(optimizer)
    plain_step = kind.step.__wrapped__ if getattr(kind.step, "hooked", False) else kind.step

    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        done = training.step(self, functools.partial(plain_step, self))
        director.step_done(pass_goes_on=not done or torch._C._current_graph_task_id() != -1)
        return loss

    def reduce_ex(self: Any, _protocol: object) -> Any:
        return _make_ordinary, (kind,), self.__getstate__()

    hooked: Any = torch.optim.Optimizer.profile_hook_step(functools.wraps(kind.step)(step))
    hooked.hooked = True

    def state(self: Any) -> Any:
        training.updates.settle_for_state()
        return vars(self)["state"]

    def set_state(self: Any, values: dict[str, Any]) -> None:
        training.updates.settle()  # load_state_dict() puts other state in place, and what waits is of the old
        kind.__setstate__(self, values)

    members = {
        "step": hooked,
        "__setstate__": set_state,
        "state": property(state, lambda self, value: vars(self).__setitem__("state", value)),
        "__reduce_ex__": reduce_ex,
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
    }
    scheduled = vars(optimizer).pop("step", None)
    optimizer.__class__ = type(kind.__name__, (kind, _PagedStep), members)
    if scheduled is not None:  # a learning rate scheduler watches whether step() is called
        watched = weakref.ref(optimizer)

        def tracked(*args: Any, **kwargs: Any) -> Any:
            target: Any = watched()
            target._opt_called = True
            return hooked(target, *args, **kwargs)

        tracked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        optimizer.step = tracked  # type: ignore[method-assign]


def _make_ordinary(kind: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    return kind.__new__(kind)


class _BeforeGradientHook(Hook):
    """Hook of a parameter: autograd is about to add to its gradient, which may be behind, or waited for."""

    __slots__ = ("_parameter",)

    def __init__(self, parameter: weakref.ref[torch.Tensor]) -> None:
        self._parameter = parameter

    def __call__(self, _gradient: torch.Tensor) -> None:
        """Make its update, or multiply it."""
        parameter = self._parameter()
        if parameter is None:
            return
        with torch._C.DisableTorchFunctionSubclass():
            gradient = parameter.grad
        for tensor in (parameter, gradient):
            backing = tensor._tp_backing if type(tensor) is PagedTensor else None
            if backing is not None and backing.update is not None:
                backing.update.settle()


class _GradientHook(Hook):
    """Post-accumulate-grad hook of a parameter."""

    __slots__ = ("_training",)

    def __init__(self, training: Training) -> None:
        self._training = training

    def __call__(self, parameter: torch.Tensor) -> None:
        """Its gradient is finished."""
        self._training.gradient_made(parameter)
