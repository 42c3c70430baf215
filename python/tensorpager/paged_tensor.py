# SPDX-License-Identifier: Apache-2.0
"""Tensors over a pager's address space, and the guard that pages in what an operation reads.

A `PagedTensor` is an ordinary strided tensor whose bytes may be absent. Its address never changes, so autograd,
views, optimizers and tied weights need nothing special. Every torch function that gets one passes through the guard:

* what only looks at shape, dtype or flags passes straight through;
* a view stays paged and is guarded in turn;
* everything else runs while the bytes its arguments span are held resident, unless the call of the module that owns
  them holds them already (`windows.py`).

The guard is an optimisation and the place for clear errors. A raw access it does not see (autograd's backward, a C++
extension) traps in the core and is paged in there. What does not work on absent memory is a system call: it fails with
EFAULT. Hence `numpy()`, DLPack, pickle, `copy.deepcopy` and safetensors get ordinary copies.

On a device nothing traps: there the guard and the module calls are all there is, and a kernel that reads an absent page
ends the context. Nor are writes seen, so the guard looks at the tensors' version counters, which every operation that
writes in place moves on, and tells the core.

Threads: any. A tensor's shape and place are not changed concurrently, as in torch.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch

from tensorpager import op_rules
from tensorpager.device import HOST, stream_getter
from tensorpager.errors import ClosedError, PagedTensorError

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core
    from tensorpager.gradients import Factor, GradientNotes
    from tensorpager.places import Places
    from tensorpager.updates import Update
    from tensorpager.windows import Window

__all__ = [
    "Backing",
    "Held",
    "PagedTensor",
    "Tracer",
    "guarded",
    "handle",
    "handle_instead",
    "hold_arguments",
    "is_traced",
    "known_cores",
    "leave_to_operator",
    "make_paged",
    "no_guard",
    "ordinary_copy",
    "pass_through",
    "plain_alias",
    "reads_bytes",
    "set_tracer",
    "settle",
    "span_of",
    "streamed",
    "throw_if_closed",
]

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]
Handler = Callable[[Callable[..., Any], Arguments, Keywords], Any]

_NoGuard = no_guard = torch._C.DisableTorchFunctionSubclass
# The same for one call, and twice as fast: (func, types, args, kwargs).
_call_unguarded = torch._C._disabled_torch_function_impl


#: Those that page any tensor of this process.
known_cores: weakref.WeakSet[Core] = weakref.WeakSet()


class Backing:
    """What a paged tensor and all its views have in common: the core that pages them, and who holds them resident.

    windows: the module calls that hold the tensor while one of them is open (`Window.open`).
    hold_bytes_max: an operation on more than this is not held at once; its pages come in as they are touched. On a
    device they can't, and it is held or refused with BudgetError.
    places: for gradients that are too large to be held (gradient_places.py).
    stream: gives the handle of the current stream of the core's device; None on the host.
    update: what is to be done before the bytes are looked at (`updates.py`, `gradients.py`).
    gradient: what is known of it, if it is one (`gradients.py`).
    """

    __slots__ = (
        "__weakref__",
        "core",
        "gradient",
        "hold_bytes_max",
        "name",
        "on_device",
        "places",
        "stream",
        "update",
        "windows",
    )

    def __init__(self, core: Core, name: str) -> None:
        self.core = core
        known_cores.add(core)
        self.name = name
        self.windows: list[Window] = []
        self.update: Update | Factor | None = None
        self.gradient: GradientNotes | None = None
        self.places: Places | None = None
        self.on_device = core.device != HOST
        self.stream = stream_getter(core)
        budget_bytes = core.pinnable_page_count * core.page_bytes
        self.hold_bytes_max = sys.maxsize if self.on_device else budget_bytes // 2
        if self.on_device:
            _watch_writes()

    def in_window(self) -> bool:
        """Whether a module call that is open holds the tensor."""
        return any(window.open for window in self.windows)


class Tracer(Protocol):
    """Takes over all guarded functions of one thread while a model is run on fake tensors."""

    thread_id: int

    def run(self, func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
        """What the function call gives."""


_tracer: Tracer | None = None


def set_tracer(tracer: Tracer | None) -> None:
    """Route guarded functions of the tracer's thread to it; None ends that. One tracer at a time (see fake_pass.py)."""
    global _tracer  # noqa: PLW0603 (read on every guarded call: a plain global is the fastest there is)
    _tracer = tracer


def is_traced() -> bool:
    """Whether this thread runs a model on fake tensors."""
    return _tracer is not None and _tracer.thread_id == threading.get_ident()


class PagedTensor(torch.Tensor):
    """A tensor whose bytes lie in a pager's address space; any shape, stride and dtype, on the pager's device.

    Made by `tensorpager.page` and `tensorpager.from_pretrained`, and by taking views of one. A paged parameter is an
    instance of `torch.nn.Parameter` too. Operations give ordinary tensors. `numpy()`, DLPack, pickle and
    `copy.deepcopy` give ordinary copies. Raises ClosedError after `Pager.close()`, IoError when a page can't be read,
    PagedTensorError when its memory would be replaced (`p.data = other`, `model.half()`).
    """

    _tp_backing: Backing | None = None
    _tp_span: tuple[int, int] | None = None  # (address, size_bytes), once computed

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> Any:
        if _tracer is not None and _tracer.thread_id == threading.get_ident():
            return _tracer.run(func, args, kwargs or {})
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(func, args, kwargs or {})
        if len(types) > 1:
            return _with_other_subclasses(func, types, args, kwargs or {})
        return guarded(func, args, kwargs or {})

    def set_(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Raises PagedTensorError. (torch does not route this one method through __torch_function__.)"""
        from tensorpager.addresses import move_error

        raise move_error(self, "set_")


_ORDINARY_TYPES = frozenset({PagedTensor, torch.Tensor, torch.nn.Parameter})


class Held:
    """What one operation holds resident. Released explicitly, or at the latest when the operation's frame is gone."""

    __slots__ = ("_backings", "_dry", "_released", "_set_ids", "_streams", "size_bytes", "too_large")

    def __init__(self) -> None:
        self.size_bytes = 0
        self.too_large = False  # something was not held, for its size
        self._dry = _tracer is not None  # then nothing is held, and by the time of __del__ the core may not be dry
        self._backings: list[Backing] = []
        self._streams: list[int] = []  # where each was acquired, and so is used
        self._set_ids: list[int] = []
        self._released: list[None] = []

    def hold(self, backing: Backing, address: int, size_bytes: int) -> None:
        """Wait until a byte range is resident. What the core raises comes out, and then nothing is held.

        For the way it is noted see [Note: one C call] in windows.py.
        """
        self._backings.append(backing)
        stream = 0 if backing.stream is None else backing.stream()
        self._streams.append(stream)
        try:
            self._set_ids.extend(map(backing.core.hold, (address,), (size_bytes,), (stream,)))
        except BaseException:
            self.release()
            raise
        self.size_bytes += size_bytes

    def release(self) -> None:
        """Let all of it go; again is harmless."""
        while len(self._released) < len(self._set_ids):
            done = len(self._released)
            if self._set_ids[done] < 0:  # more than fits: nothing was held
                self._released.append(None)
            else:
                release = self._backings[done].core.release
                self._released.extend(map(release, (self._set_ids[done],), (self._streams[done],)))

    def __del__(self) -> None:
        if not self._dry:
            self.release()


def make_paged(
    plain: torch.Tensor, backing: Backing, *, parameter: bool = False, requires_grad: bool = False
) -> PagedTensor:
    """Wrap a plain tensor over the address space of backing.core; a parameter if asked for. Reads nothing.

    requires_grad needs a floating or complex dtype, as in torch.
    """
    paged = torch.Tensor._make_subclass(PagedTensor, plain, requires_grad)
    paged._tp_backing = backing
    paged._tp_span = span_of(plain)
    if parameter:
        paged._is_param = True
    return paged


def span_of(tensor: torch.Tensor) -> tuple[int, int]:
    """(address, size_bytes) from the first to the last byte the tensor covers; (address, 0) for an empty one."""
    with _NoGuard():
        if tensor.numel() == 0:
            return tensor.data_ptr(), 0
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.data_ptr(), (last + 1) * tensor.element_size()


def ordinary_copy(tensor: PagedTensor) -> torch.Tensor:
    """An ordinary tensor with the same values, strides and requires_grad; a Parameter for a paged parameter."""
    held = _hold(tensor, None)
    try:
        with _NoGuard():
            copy = tensor.detach().clone(memory_format=torch.preserve_format)
            if getattr(tensor, "_is_param", False):
                return torch.nn.Parameter(copy, tensor.requires_grad)
            return copy.requires_grad_(tensor.requires_grad)
    finally:
        if held is not None:
            held.release()


def _hold(tensor: PagedTensor, held: Held | None) -> Held | None:
    """Make the tensor resident, unless its module's call does already, and note it. Blocks on I/O."""
    backing = tensor._tp_backing
    if backing is None:
        return held
    if backing.update is not None:
        backing.update.settle()
    if backing.gradient is not None:
        backing.gradient.forget()
    for window in backing.windows:
        if window.open:
            return held
    span = tensor._tp_span
    if span is None:
        span = tensor._tp_span = span_of(tensor)
    address, size_bytes = span
    if held is None:
        held = Held()
    if held.size_bytes + size_bytes > backing.hold_bytes_max:
        held.too_large = True
        throw_if_closed(backing)
    elif size_bytes > 0:
        held.hold(backing, address, size_bytes)
    return held


def hold_arguments(values: Any, held: Held | None) -> Held | None:
    """Make every paged tensor among arguments resident, those in lists too; None when there is nothing to release."""
    for value in values:
        kind = type(value)
        if kind is PagedTensor:
            held = _hold(value, held)
        elif kind is list or kind is tuple:
            held = hold_arguments(value, held)
    return held


def guarded(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """The call, while all that its arguments span is resident."""
    held = hold_arguments(args, None)
    if kwargs:
        held = hold_arguments(kwargs.values(), held)
    versions = _versions((*args, *kwargs.values())) if _writes_watched else []
    try:
        if held is not None and held.too_large and func in streamed:
            return streamed[func](func, args, kwargs)
        result = _call_unguarded(func, (), args, kwargs)
        if held is not None and args and func.__name__[-1:] == "_":  # in place, by torch's rule for names
            _note_modified(args[0])
    finally:
        _tell_changed(versions)
        if held is not None:
            held.release()
    if _writes_watched and torch.is_grad_enabled():
        _refuse_backward(func, args, kwargs, result)
    return _keep_views_paged(result, args)


#: What carries out calls of a function that were given a tensor too large to be held. See op_library.py.
streamed: dict[Callable[..., Any], Handler] = {}


def leave_to_operator(operator: torch._ops.OpOverloadPacket) -> None:
    """An operator of this package makes what it reads resident itself."""
    _HANDLERS.update(dict.fromkeys((operator, operator.default), _left_to_operator))


def _left_to_operator(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    for value in (*args, *kwargs.values()):
        if type(value) is PagedTensor:
            settle(value)
    return _call_unguarded(func, (), args, kwargs)


_writes_watched = False


def _watch_writes() -> None:
    """From the first tensor on a device on, look at every guarded call's tensors for writes."""
    global _writes_watched  # noqa: PLW0603 (read on every guarded call: a plain global is the fastest there is)
    _writes_watched = True


def _versions(values: Any) -> list[tuple[PagedTensor, int]]:
    """The paged tensors of a device among values, those in lists too, each with its version counter."""
    found: list[tuple[PagedTensor, int]] = []
    for value in values:
        kind = type(value)
        if kind is PagedTensor:
            backing = value._tp_backing
            if backing is not None and backing.on_device and not value.is_inference():
                found.append((value, value._version))
        elif kind is list or kind is tuple:
            found.extend(_versions(value))
    return found


def _tell_changed(versions: list[tuple[PagedTensor, int]]) -> None:
    for tensor, version in versions:
        if tensor._version != version:
            _tell_written(tensor)


def _refuse_backward(func: Callable[..., Any], args: Arguments, kwargs: Keywords, result: Any) -> None:
    """PagedTensorError when backward would go through an operation on a device's pages, which have left by then."""
    results = result if isinstance(result, (list, tuple)) else (result,)
    if not any(isinstance(value, torch.Tensor) and value.grad_fn is not None for value in results):
        return
    if _versions((*args, *kwargs.values())):
        msg = (
            f"{getattr(func, '__name__', func)} of a tensor paged on a device was asked for its gradient; on a device "
            "only inference works so far: use torch.no_grad(), or detach() the tensor, or call requires_grad_(False)"
        )
        raise PagedTensorError(msg)


def _note_modified(value: Any) -> None:
    """For the plan: the step that holds the tensor, or those in the list, has modified it."""
    for tensor in value if type(value) in (list, tuple) else (value,):
        if type(tensor) is PagedTensor and tensor._tp_backing is not None:
            address, size_bytes = span_of(tensor)
            if size_bytes > 0 and not tensor._tp_backing.on_device:
                tensor._tp_backing.core.note_modified(address, size_bytes)


def _tell_written(tensor: PagedTensor) -> None:
    """The operation that just ran has written to the tensor, whose pages are still held."""
    backing = tensor._tp_backing
    assert backing is not None
    address, size_bytes = span_of(tensor)
    if size_bytes == 0:
        return
    stream = 0 if backing.stream is None else backing.stream()
    set_id = backing.core.hold(address, size_bytes, stream)
    try:
        backing.core.mark_written(set_id)
    finally:
        backing.core.release(set_id, stream)


def _with_other_subclasses(func: Callable[..., Any], types: Sequence[type], args: Arguments, kwargs: Keywords) -> Any:
    """Another tensor subclass takes part: hold ours, hand over plain aliases, and let the other one's rules decide."""
    if all(kind in _ORDINARY_TYPES for kind in types):
        return guarded(func, args, kwargs)
    held = hold_arguments((*args, *kwargs.values()), None)
    versions = _versions((*args, *kwargs.values())) if _writes_watched else []
    try:
        return func(*plain_alias(args), **{name: plain_alias(value) for name, value in kwargs.items()})
    finally:
        _tell_changed(versions)
        if held is not None:
            held.release()


def plain_alias(value: Any) -> Any:
    """Paged tensors as plain ones over the same bytes, those in lists too, which nobody guards; else the value."""
    kind = type(value)
    if kind is PagedTensor:
        with _NoGuard():
            return value.as_subclass(torch.Tensor)
    if kind is list or kind is tuple:
        return kind(plain_alias(item) for item in value)
    return value


def _keep_views_paged(result: Any, args: Arguments) -> Any:
    """`result`, with plain tensors over the address space of a paged argument turned into paged ones."""
    kind = type(result)
    if kind is torch.Tensor:
        return _paged_if_view(result, args)
    if kind is tuple or kind is list:
        return kind(_keep_views_paged(item, args) for item in result)
    if isinstance(result, tuple) and hasattr(result, "n_fields"):  # torch.return_types: made from one sequence
        return kind([_keep_views_paged(item, args) for item in result])
    return result


def _paged_if_view(result: torch.Tensor, args: Any) -> torch.Tensor:
    backing = _first_backing(args)
    if backing is None:
        return result
    try:
        address = result.data_ptr()
    except RuntimeError:  # no storage: sparse, or a wrapper of torch.func
        return result
    if not backing.core.contains(address):
        return result
    paged: PagedTensor = result.as_subclass(PagedTensor)
    paged._tp_backing = backing
    return paged


def _first_backing(values: Any) -> Backing | None:
    for value in values:
        kind = type(value)
        if kind is PagedTensor:
            backing: Backing | None = value._tp_backing
            return backing
        if kind is list or kind is tuple:
            backing = _first_backing(value)
            if backing is not None:
                return backing
    return None


def settle(tensor: PagedTensor) -> None:
    """For what does not hold the tensor, and looks at its bytes, or writes to them, all the same."""
    backing = tensor._tp_backing
    if backing is not None and backing.update is not None:
        backing.update.settle()
    if backing is not None and backing.gradient is not None:
        backing.gradient.forget()


def throw_if_closed(backing: Backing | None) -> None:
    """ClosedError for what is used after Pager.close()."""
    if backing is not None and backing.core.closed:
        msg = (
            f"'{backing.name}' was used after Pager.close(): its bytes are gone from memory. "
            "Load the model again, or close the pager later"
        )
        raise ClosedError(msg)


# -- handlers of functions that need something else than guarded ------------------------------------------------------


def pass_through(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    """The call, with the guard off and nothing held."""
    return _call_unguarded(func, (), args, kwargs)


def _view(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    return _keep_views_paged(_call_unguarded(func, (), args, kwargs), args)


def _is_contiguous(args: Arguments, kwargs: Keywords) -> bool:
    with _NoGuard():
        return isinstance(args[0], torch.Tensor) and args[0].is_contiguous() and "memory_format" not in kwargs


def _view_if_contiguous(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    return _view(func, args, kwargs) if _is_contiguous(args, kwargs) else guarded(func, args, kwargs)


def _is_basic_index(index: object) -> bool:
    parts = index if type(index) is tuple else (index,)
    return all(part is None or part is Ellipsis or type(part) is int or type(part) is slice for part in parts)


def _is_lazy(tensor: torch.Tensor) -> bool:
    """Whether the elements are still to be conjugated or negated."""
    return tensor.is_conj() or tensor.is_neg()


def _resolve(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    return guarded(func, args, kwargs) if _is_lazy(args[0]) else _view(func, args, kwargs)


def _get_item(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    return _view(func, args, kwargs) if _is_basic_index(args[1]) else guarded(func, args, kwargs)


def _conversion(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> str:
    """What a conversion does with its tensor: "keep" it, "describe" it without reading, or "copy" it."""
    tensor = args[0]
    if type(tensor) is not PagedTensor or "memory_format" in kwargs:
        return "copy"
    with _NoGuard():
        probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        converted = func(probe, *args[1:], **kwargs)
    if converted is probe:
        return "keep"
    described = not isinstance(converted, torch.Tensor) or converted.device.type == "meta"  # .type(); .to("meta")
    return "describe" if described else "copy"


def _convert(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
    what = _conversion(func, args, kwargs)
    if what == "keep":
        return args[0]
    return pass_through(func, args, kwargs) if what == "describe" else guarded(func, args, kwargs)


def _known(handler: Handler, owner: object, names: str) -> dict[Callable[..., Any], Handler]:
    return {getattr(owner, name): handler for name in names.split() if hasattr(owner, name)}


def _make_handlers() -> dict[Callable[..., Any], Handler]:
    handlers: dict[Callable[..., Any], Handler] = {}
    for functions, handler in (
        (op_rules.METADATA, pass_through),
        (op_rules.VIEWS, _view),
        (op_rules.VIEWS_IF_CONTIGUOUS, _view_if_contiguous),
        (op_rules.CONVERSIONS, _convert),
    ):
        handlers.update(dict.fromkeys(functions, handler))
    handlers.update(_known(_get_item, torch.Tensor, "__getitem__"))
    handlers.update(_known(_resolve, torch.Tensor, "resolve_conj resolve_neg"))
    handlers.update(_known(_resolve, torch, "resolve_conj resolve_neg"))
    return handlers


_HANDLERS: dict[Callable[..., Any], Handler] = _make_handlers()


def handle(func: Callable[..., Any], handler: Callable[[Arguments, Keywords], Any]) -> None:
    """From now on ask `handler` first, which may answer NotImplemented. For functions that have no handler yet."""
    assert func not in _HANDLERS

    def ask(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
        result = handler(args, kwargs)
        return guarded(func, args, kwargs) if result is NotImplemented else result

    _HANDLERS[func] = ask
    _ASK_FIRST.add(ask)


_ASK_FIRST: set[Handler] = set()


def handle_instead(functions: Iterable[Callable[..., Any]], handler: Handler, *, reads: bool) -> None:
    """From now on `handler` carries out the functions. reads: it holds its arguments, as a tracer is told."""
    _HANDLERS.update(dict.fromkeys(functions, handler))
    if not reads:
        _READ_NOTHING.add(handler)


_READ_NOTHING: set[Handler] = {pass_through, _left_to_operator, _view}


def reads_bytes(func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> bool:
    """Whether the guard would hold the paged arguments of a call resident. For the tracer."""
    handler = _HANDLERS.get(func, guarded)
    if handler in _ASK_FIRST:
        return True
    if handler is _view_if_contiguous:
        return not _is_contiguous(args, kwargs)
    if handler is _get_item:
        return not _is_basic_index(args[1])
    if handler is _resolve:
        return _is_lazy(args[0])
    if handler is _convert:
        return _conversion(func, args, kwargs) == "copy"
    return handler not in _READ_NOTHING
