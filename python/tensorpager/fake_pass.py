# SPDX-License-Identifier: Apache-2.0
"""Which steps a model takes, found by running it on fake tensors: tensors with shapes and no memory.

The run works on a copy of the module tree whose parameters stay the paged ones, whose other tensors are fake, and whose
arguments are fake deep copies. Nothing the model keeps (buffers, caches, counters) can change, and nothing weight-sized
is allocated, so it works for models of any size. Hooks and guard are active and call the core, which only records.

Beside the guard, a dispatch mode sees every operator with every tensor it reads. One that reads a paged tensor outside
of all windows and holds (through a view, from C++) becomes a step of its own, as the real run will fault on it.

What can't run on fake tensors raises TraceError; the caller then records a real pass instead (`passes.py`).
"""

from __future__ import annotations

import copy
import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tensorpager import op_rules
from tensorpager.errors import TraceError
from tensorpager.op_library import record_steps
from tensorpager.paged_tensor import (
    Arguments,
    Keywords,
    PagedTensor,
    hold_arguments,
    reads_bytes,
    set_tracer,
    span_of,
)
from tensorpager.windows import Hook, drop_abandoned_calls

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core

__all__ = ["is_copying", "record_on_fakes"]

_one_at_a_time = threading.Lock()

# Operators that look at a tensor's shape, dtype or flags alone, and those of the namespace "prim".
_SHAPE_ONLY = frozenset(
    {"empty_like", "full_like", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros", "ones_like"}
    | {"rand_like", "randint_like", "randn_like", "zeros_like"}
    | {"is_contiguous", "is_non_overlapping_and_dense", "is_pinned", "is_same_size", "is_strides_like_format", "numel"}
    | {"size", "stride", "sym_numel", "sym_size", "sym_storage_offset", "sym_stride"}
)


def record_on_fakes(
    model: torch.nn.Module, core: Core, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> npt.NDArray[np.int32]:
    """The events of one forward pass: +(set_id + 1) for an acquire, -(set_id + 1) for a release, int32, in order.

    Runs model(*args, **kwargs) on fake tensors, in the caller's grad and autocast modes, and leaves model, arguments
    and random generators as they are. Blocks for as long as the Python code of the model takes; reads no weights.
    Raises TraceError when the model can't be run that way.
    """
    _refuse_foreign_hooks(model)
    with _one_at_a_time, _random_state_kept(), _no_word_of_failures():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        recorder = _FakeRun(core, mode)
        core.record_begin(True)
        try:
            recorder.execute(model, args, kwargs)
        except Exception as error:
            core.record_end()
            raise TraceError(_explain(model, error)) from error
        except BaseException:
            drop_abandoned_calls()  # while the core is still dry: it holds nothing for them
            core.record_end()
            raise
        events = core.record_end()
    if len(events) == 0:
        msg = f"a pass of {type(model).__name__} on fake tensors reached no paged parameter"
        raise TraceError(msg)
    return events


def _explain(model: torch.nn.Module, error: Exception) -> str:
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(model).__name__} can't be run on fake tensors: {type(error).__name__}: {first_line}"


def _refuse_foreign_hooks(model: torch.nn.Module) -> None:
    """A hook of the user's would be given fake tensors to keep, and may have effects that a copy does not contain."""
    from torch.nn.modules import module as torch_module

    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        msg = "there are global module hooks, which would see fake tensors"
        raise TraceError(msg)
    for name, module in model.named_modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for hook in hooks.values():
                if not isinstance(hook, Hook):
                    msg = f"module '{name}' has a forward hook ({hook!r}), which would see fake tensors"
                    raise TraceError(msg)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    torch_state = torch.random.get_rng_state()
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 (the global generator is what a model may draw from)
    try:
        yield
    finally:
        torch.random.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def _no_word_of_failures() -> Iterator[None]:
    """torch logs an operator that can't run on fake tensors, at length and as an error. Here it is no error."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class _Copying(threading.local):
    """Whether this thread makes the copies of a fake run."""

    on = False


_copying = _Copying()


def is_copying() -> bool:
    """Whether this thread copies a model's arguments to be run on fake tensors: shapes are all that is wanted."""
    return _copying.on


class _FakeCopies(TorchFunctionMode):
    """While active, copy.deepcopy makes fake tensors of ordinary ones and leaves paged ones as they are."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Arguments = (), kwargs: Keywords | None = None
    ) -> Any:
        if func is not torch.Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            paged = type(tensor) is PagedTensor
            memo[id(tensor)] = tensor if paged else self._mode.from_tensor(tensor, static_shapes=True)
        return memo[id(tensor)]


class _Twin:
    """A fake tensor that stands for a paged one."""

    __slots__ = ("fake", "paged")

    def __init__(self, paged: PagedTensor, fake: torch.Tensor) -> None:
        self.paged = paged
        self.fake = fake


class _FakeRun:
    """One run: swaps paged tensors for fake twins, and records what is read. A Tracer of paged_tensor.py."""

    def __init__(self, core: Core, mode: FakeTensorMode) -> None:
        self.thread_id = threading.get_ident()
        self._core = core
        self._mode = mode
        self._twin_of: dict[int, _Twin] = {}  # by id of the paged tensor
        self._twin_by_fake: dict[int, _Twin] = {}  # by id of the fake one
        self._twin_by_storage: dict[int, _Twin] = {}
        self._held: list[PagedTensor] = []

    def execute(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run a copy of the model. Whatever it raises comes out."""
        fake_model, fake_args, fake_kwargs = self._copies(model, args, kwargs)
        set_tracer(self)
        try:
            with self._mode, _ReadRecorder(self):
                fake_model(*fake_args, **fake_kwargs)
        finally:
            set_tracer(None)

    def _copies(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
        memo: dict[int, Any] = {}
        for module in model.modules():
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
                if isinstance(hook, Hook) and hook.traced:
                    memo[id(hook)] = hook
        for tensor in (*model.parameters(), *model.buffers()):
            is_paged = type(tensor) is PagedTensor
            memo[id(tensor)] = tensor if is_paged else self._mode.from_tensor(tensor, static_shapes=True)
        _copying.on = True
        try:
            with self._mode, _FakeCopies(self._mode):
                copies: tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]] = copy.deepcopy(
                    (model, args, kwargs), memo
                )
        finally:
            _copying.on = False
        return copies

    # -- the guard's place

    def run(self, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
        """Carry out a guarded function on the twins of its paged arguments, holding these if the guard would."""
        if func in op_rules.ADDRESSES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        depth = len(self._held)
        values = (*args, *kwargs.values())
        reads = reads_bytes(func, args, kwargs)
        held = hold_arguments(values, None) if reads else None
        try:
            by_operator = record_steps(func, args, kwargs, too_large=held is not None and held.too_large)
            self._held.extend(_paged_among(values) if reads or by_operator else ())
            fake_args = self._to_fake(args)
            fake_kwargs = {name: self._to_fake(value) for name, value in kwargs.items()}
            with torch._C.DisableTorchFunctionSubclass():
                return self._from_fake(func(*fake_args, **fake_kwargs))
        finally:
            del self._held[depth:]
            if held is not None:
                held.release()

    def _to_fake(self, value: Any) -> Any:
        kind = type(value)
        if kind is PagedTensor:
            return self._twin(value).fake
        if kind is list or kind is tuple:
            return kind(self._to_fake(item) for item in value)
        return value

    def _from_fake(self, result: Any) -> Any:
        """A function that returns its argument (`.to()`, in-place ones) returns the paged tensor, not the twin."""
        twin = self._twin_by_fake.get(id(result))
        return result if twin is None else twin.paged

    def _twin(self, paged: PagedTensor) -> _Twin:
        twin = self._twin_of.get(id(paged))
        if twin is not None:
            return twin
        with torch._C.DisableTorchFunctionSubclass():
            fake = torch.empty_strided(paged.shape, paged.stride(), dtype=paged.dtype, device=paged.device)
            if paged.requires_grad:
                fake.requires_grad_()
        twin = _Twin(paged, fake)
        self._twin_of[id(paged)] = self._twin_by_fake[id(fake)] = twin
        self._twin_by_storage[fake.untyped_storage()._cdata] = twin
        return twin

    # -- below the guard

    def fake_of(self, paged: PagedTensor) -> torch.Tensor:
        """The fake twin of a paged tensor."""
        return self._twin(paged).fake

    def note_read(self, tensor: FakeTensor) -> None:
        """An operator reads a tensor. If that is part of a twin, and nothing holds the paged one, it is a step."""
        twin = self._twin_by_storage.get(tensor.untyped_storage()._cdata)
        if twin is None or any(paged is twin.paged for paged in self._held):
            return
        backing = twin.paged._tp_backing
        assert backing is not None
        if backing.in_window() or tensor.numel() == 0:
            return
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        address = span_of(twin.paged)[0] + tensor.storage_offset() * tensor.element_size()
        size_bytes = (last + 1) * tensor.element_size()
        if size_bytes > backing.hold_bytes_max:
            return
        set_id = self._core.hold(int(address), int(size_bytes))
        if set_id >= 0:
            self._core.release(set_id)


def _paged_among(values: Any) -> Iterator[PagedTensor]:
    for value in values:
        if type(value) is PagedTensor:
            yield value
        elif type(value) is list or type(value) is tuple:
            yield from _paged_among(value)


class _ReadRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows every operator's inputs to the run; views and shape-only operators read nothing."""

    def __init__(self, run: _FakeRun) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Arguments = (), kwargs: Keywords | None = None) -> Any:
        kwargs = kwargs or {}
        if any(type(value) is PagedTensor for value in tree_leaves((args, kwargs))):  # the guard is off there
            args, kwargs = tree_map_only(PagedTensor, self._run.fake_of, (args, kwargs))
        if not _reads_nothing(func):
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, FakeTensor):
                    self._run.note_read(value)
        return func(*args, **kwargs)


def _reads_nothing(func: Any) -> bool:
    if func.namespace == "prim" or func.overloadpacket.__name__ in _SHAPE_ONLY:
        return True
    returns = func._schema.returns
    return bool(returns) and all(out.alias_info is not None and not out.alias_info.is_write for out in returns)
