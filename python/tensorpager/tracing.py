# SPDX-License-Identifier: Apache-2.0
"""Makes a Trace of any pass of a program, by running it once on fake tensors: tensors with shapes and no memory.

What runs is a copy: modules, optimizers and tensors among the arguments are deep-copied into fake tensors that share
storages as the real ones do. So nothing of the caller's changes, no weight is read, and a model on the `meta` device is
as good as one in memory.

[Note: below autograd]
The recorder is a dispatch mode. It sees the operators after autograd and after composite ones were taken apart, those
of backward and of the optimizer as well, and keeps every storage it meets, which holds no memory: an address of one
that is kept is never given to another.

[Note: scope of backward]
Autograd numbers its nodes as it makes them, just before their operator is dispatched. The recorder notes which module
was running then, and looks the number of the node up while backward runs it.

[Note: steady state]
An optimizer makes its state in its first step, a training loop takes every later one from the same state. So when
state is missing, the pass runs once unrecorded.
"""

from __future__ import annotations

import copy
import dis
import functools
import math
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from tensorpager.errors import TraceError
from tensorpager.fake_pass import _random_state_kept
from tensorpager.operator_trace import PERSISTENT, Trace, TraceStep, TraceTensor

__all__ = ["trace"]

_one_at_a_time = threading.RLock()  # the hooks on all modules and all optimizers are global

# Operators that allocate without writing, that write a tensor without looking at it, that look at its shape alone, and
# that read as many elements of it as they put out, or write as many as they read; and those whose schema conceals what
# they write.
_EMPTY = frozenset({"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"})
_FILLS = frozenset(
    {"_foreach_copy_", "_foreach_zero_", "bernoulli_", "cauchy_", "copy_", "exponential_", "fill_", "geometric_"}
    | {"log_normal_", "normal_", "random_", "uniform_", "zero_"}
)
_LIKE = frozenset(
    {"full_like", "new_full", "new_ones", "new_zeros", "ones_like", "rand_like", "randint_like", "randn_like"}
    | {"zeros_like"}
)
_GATHERS = frozenset({"embedding", "gather", "index", "index_select"})
_SCATTERS = frozenset(
    {"_index_put_impl_", "index_add_", "index_copy_", "index_put_", "scatter_", "scatter_add_", "scatter_reduce_"}
)
_UNTOLD_WRITES = {"cudnn_batch_norm": (3, 4), "native_batch_norm": (3, 4)}  # arguments, when argument 5 says training
_QUERIES = frozenset(
    {"is_contiguous", "is_non_overlapping_and_dense", "is_pinned", "is_same_size", "is_strides_like_format", "numel"}
    | {"size", "stride", "storage_offset", "sym_numel", "sym_size", "sym_storage_offset", "sym_stride"}
)
# What an optimizer reads back is its step counter, which goes into factors. Late in training, so that optimizers that
# start in another way (RAdam) take the path of nearly all steps.
_STEPS_DONE = 1000


def trace(fn: Callable[..., Any], *args: Any, name: str | None = None, tokens: int = 0, **kwargs: Any) -> Trace:
    """Record one pass of fn(*args, **kwargs): every operator, with the tensors it reads and writes.

    fn: a module, or a function, such as a training step, that is given its modules, optimizers and tensors as
    arguments. Works for models on any device, `meta` included. Optimizers work parameter by parameter in the pass
    (foreach and fused are off), so that a planner may move each update. tokens: how many one pass handles.

    Blocks for as long as the Python code of one pass takes, two when an optimizer has no state yet. Weights, state,
    gradients, arguments and torch's, numpy's and Python's random generators stay as they are; their memory is neither
    read nor written. One trace at a time runs in a process, others wait.

    What was passed and is changed in place lives on, as "state"; other tensors that were passed are inputs, which
    arrive in a first step of that name.

    TraceError, which names the operator in the way, when the program can't run on fake tensors; and when it reaches a
    parameter that was not passed as an argument. ValueError when it runs no operator at all.
    """
    _refuse_hidden(fn)
    label = name if name is not None else getattr(fn, "__name__", type(fn).__name__)
    with ExitStack() as stack:
        stack.enter_context(_one_at_a_time)
        stack.enter_context(_random_state_kept())
        stack.enter_context(_disable_current_modes())  # another fake mode may be active
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # they would be about the copies
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        recorder = None
        try:
            program = _Program(mode, fn, args, kwargs)
            if program.state_is_missing():
                recorder = _Recorder(program)
                recorder.run()
            recorder = _Recorder(program)
            recorder.run()
        except TraceError:
            raise
        except Exception as error:
            raise TraceError(_explain(label, error, recorder)) from error
    return recorder.trace(label, tokens)


def _explain(label: str, error: Exception, recorder: _Recorder | None) -> str:
    first_line = (str(error).strip() or "no message").splitlines()[0]
    failure = None if recorder is None else recorder.failure
    where = f" at {failure[1]}" if failure is not None and failure[0] is error else ""
    text = f"{label} can't be run on fake tensors{where}: {type(error).__name__}: {first_line}"
    if type(error).__name__ in ("DataDependentOutputException", "DynamicOutputShapeException"):
        text += ". What the operator gives depends on the content of a tensor: leave `.item()`, printing and the like"
        text += " out of what is traced, and choose an implementation of the model without such branches"
    return text


def _refuse_hidden(fn: Any, seen: tuple[Any, ...] = ()) -> None:
    """The caller's own model would run, and its optimizer could drop gradients, if fn got at them by itself."""
    if not isinstance(fn, types.FunctionType) or fn in seen:
        return
    in_globals, closed_over = _reached_by(fn)
    for inner in closed_over.values():
        _refuse_hidden(inner, (*seen, fn))  # what a decorator wraps
    for variable, value in {**in_globals, **closed_over}.items():
        found = _found_in(value)
        if found.optimizers or any(True for module in found.modules.values() for _ in module.parameters()):
            msg = f"{fn.__name__} reaches '{variable}' by itself: pass models and optimizers as arguments"
            raise TraceError(msg)


def _reached_by(function: types.FunctionType) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of the global variables a function names, and of those it closes over."""
    names = {item.argval for item in dis.get_instructions(function) if item.opname == "LOAD_GLOBAL"}
    in_globals = {name: value for name, value in function.__globals__.items() if name in names}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return in_globals, {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}  # else: not set


@dataclass
class _Found:
    """What objects hold: modules, optimizers and tensors, by id; each with the name of the argument it is in."""

    modules: dict[int, torch.nn.Module] = field(default_factory=dict)
    optimizers: dict[int, torch.optim.Optimizer] = field(default_factory=dict)
    tensors: dict[int, torch.Tensor] = field(default_factory=dict)
    label: dict[int, str] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set)
    _kept: list[Any] = field(default_factory=list)  # an id is only good for as long as its object lives

    def look_into(self, value: Any, label: str) -> None:
        """Find everything that copy.deepcopy would copy."""
        pending = [(value, label)]
        while pending:
            item, name = pending.pop()
            if id(item) in self._seen or isinstance(item, (type, types.ModuleType, types.FunctionType, str, bytes)):
                continue
            self._seen.add(id(item))
            self._kept.append(item)
            self._file(item, name)
            pending.extend(reversed([(child, child_name) for child, child_name in _children(item, name)]))

    def _file(self, item: Any, name: str) -> None:
        self.label[id(item)] = name
        if isinstance(item, torch.Tensor):
            self.tensors[id(item)] = item
        elif isinstance(item, torch.nn.Module):
            self.modules[id(item)] = item
        elif isinstance(item, torch.optim.Optimizer):
            self.optimizers[id(item)] = item


def _found_in(value: Any) -> _Found:
    found = _Found()
    found.look_into(value, "")
    return found


def _children(item: Any, name: str) -> Iterator[tuple[Any, str]]:
    if isinstance(item, torch.Tensor):
        if item.is_leaf and item.grad is not None:
            yield item.grad, f"grad.{name}"
        for _, hook in _hooks_of(item):
            yield (_reached_by(hook) if isinstance(hook, types.FunctionType) else hook), name
    elif isinstance(item, dict):
        for entry, value in item.items():
            yield entry, name
            yield value, f"{name}.{entry}" if isinstance(entry, str) else name
    elif isinstance(item, (list, tuple, set, frozenset)):
        for index, value in enumerate(item):
            yield value, f"{name}.{index}"
    elif isinstance(item, types.MethodType):
        yield item.__self__, name
    elif isinstance(item, functools.partial):
        yield item.func, name
        yield item.args, name
        yield item.keywords, name
    if hasattr(item, "__dict__") and not isinstance(item, torch.Tensor):
        for key, value in vars(item).items():
            yield value, f"{name}.{key}"


def _hooks_of(tensor: torch.Tensor) -> list[tuple[str, Callable[..., Any]]]:
    """What a tensor runs when it gets its gradient: the function that registers it, and the hook."""
    dicts = {"_backward_hooks": "register_hook", "_post_accumulate_grad_hooks": "register_post_accumulate_grad_hook"}
    return [(register, hook) for name, register in dicts.items() for hook in (getattr(tensor, name) or {}).values()]


def _copy_hook(hook: Any, memo: dict[int, Any]) -> Any:
    """A deep copy that, other than that of copy.deepcopy, includes the tensors and optimizers a function reaches."""
    if not isinstance(hook, types.FunctionType):
        return copy.deepcopy(hook, memo)
    in_globals, _ = _reached_by(hook)
    variables = dict(hook.__globals__)
    for name, value in in_globals.items():
        if _found_in(value).tensors:
            variables[name] = copy.deepcopy(value, memo)
    cells = tuple(types.CellType(copy.deepcopy(cell.cell_contents, memo)) for cell in hook.__closure__ or ())
    copied = types.FunctionType(hook.__code__, variables, hook.__name__, None, cells)
    copied.__defaults__ = copy.deepcopy(hook.__defaults__, memo)
    copied.__kwdefaults__ = copy.deepcopy(hook.__kwdefaults__, memo)
    return copied


class _FakeCopies(TorchFunctionMode):
    """While active, copy.deepcopy makes fake tensors of those that were not found before."""

    def __init__(self, program: _Program) -> None:
        super().__init__()
        self._program = program

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = self._program.fake_of(tensor)
        return memo[id(tensor)]


class _Program:
    """The copy that runs. others: tensors beside parameters, buffers and their gradients, with name and kind."""

    def __init__(
        self, mode: FakeTensorMode, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.mode = mode
        self.size_of: dict[int, int] = {}  # in bytes, by fake storage: that of the real one
        self._bases: dict[int, torch.Tensor] = {}  # fake, by real storage
        found = _Found()
        found.look_into(fn, "fn")
        names = fn.__code__.co_varnames if isinstance(fn, types.FunctionType) else ()
        for index, value in enumerate(args):
            found.look_into(value, names[index] if index < len(names) else f"arg{index}")
        for keyword, value in kwargs.items():
            found.look_into(value, keyword)
        memo: dict[int, Any] = {key: self.fake_of(tensor) for key, tensor in found.tensors.items()}
        gradients = set()
        for key, tensor in found.tensors.items():
            if tensor.is_leaf and tensor.grad is not None:
                memo[key].grad = memo[id(tensor.grad)]
                gradients.add(id(tensor.grad))
        kind_of = {key: "buffer" for module in found.modules.values() for key in _found_in(module).tensors}
        kind_of.update({key: "state" for item in found.optimizers.values() for key in _found_in(item).tensors})
        self.others = [
            (memo[key], found.label[key], kind_of.get(key, "input")) for key in found.tensors if key not in gradients
        ]
        with self.mode, _FakeCopies(self):
            self._call: tuple[Any, Any, Any] = copy.deepcopy((fn, args, kwargs), memo)
            self.tensor_hooks = [
                (memo[key], register, _copy_hook(hook, memo))
                for key, tensor in found.tensors.items()
                for register, hook in _hooks_of(tensor)
            ]
            for key, optimizer in found.optimizers.items():  # copies lose what the optimizer's own class added to it
                lost = {name: value for name, value in vars(optimizer).items() if name not in vars(memo[key])}
                lost.pop("step", None)  # which a scheduler put around the one of the class
                vars(memo[key]).update(copy.deepcopy(lost, memo))
        self.optimizers: list[torch.optim.Optimizer] = [memo[key] for key in found.optimizers]
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group.update({key: False for key in ("foreach", "fused") if key in group})
        self._name(found, {key: memo[key] for key in found.modules if key in memo})

    def _name(self, found: _Found, modules: dict[int, torch.nn.Module]) -> None:
        inner = {id(child) for module in modules.values() for child in module.modules() if child is not module}
        roots = {key: module for key, module in modules.items() if id(module) not in inner}
        names = [name for module in roots.values() for name, _ in (*module.named_parameters(), *module.named_buffers())]
        ambiguous = len(set(names)) < len(names)
        self.module_name: dict[int, str] = {}
        self.parameters: dict[str, torch.Tensor] = {}
        self.buffers: dict[str, torch.Tensor] = {}
        for key, root in roots.items():
            prefix = found.label[key] if ambiguous else ""
            dotted = prefix and f"{prefix}."
            self.module_name.update({id(item): name for name, item in root.named_modules(prefix=prefix)})
            self.parameters.update({dotted + name: item for name, item in root.named_parameters()})
            self.buffers.update({dotted + name: item for name, item in root.named_buffers()})
        self.parameter_name = {id(parameter): name for name, parameter in self.parameters.items()}

    def fake_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor like this one; those of one storage share a fake one. TraceError for what has no storage."""
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) or isinstance(tensor, FakeTensor)
        if tensor.layout != torch.strided or not (plain or hasattr(tensor, "_tp_backing")):
            msg = f"a tensor of type {type(tensor).__name__} ({tensor.layout}) can't be traced: it has no one storage"
            raise TraceError(msg)
        device = "cpu" if tensor.device.type == "meta" else tensor.device
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad(), self.mode:
            storage = tensor.untyped_storage()
            base = self._bases.get(storage._cdata)
            if base is None:
                whole = -(-storage.nbytes() // 16) * 16  # a view as any other dtype needs whole elements
                base = torch.empty(whole // tensor.element_size(), dtype=tensor.dtype, device=device)
                self._bases[storage._cdata] = base
                self.size_of[base.untyped_storage()._cdata] = storage.nbytes()
            typed = base if base.dtype == tensor.dtype else base.view(tensor.dtype)
            fake = typed.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).detach()
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad and tensor.is_leaf)

    def state_is_missing(self) -> bool:
        """Whether an optimizer has parameters to train without state. See [Note: steady state]."""
        return any(
            param.requires_grad and not optimizer.state.get(param)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for param in group["params"]
        )

    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of optimizer state, with a name."""
        for optimizer in self.optimizers:
            for number, (param, entries) in enumerate(optimizer.state.items()):
                owner = self.parameter_name.get(id(param), str(number))
                for key, value in entries.items() if isinstance(entries, dict) else ():
                    for tensor in tree_leaves(value):
                        if isinstance(tensor, torch.Tensor):
                            yield f"{key}.{owner}", tensor

    def run(self) -> None:
        """Run the copy. Whatever it raises comes out."""
        fn, args, kwargs = self._call
        fn(*args, **kwargs)


class _Tensors:
    """The storages met so far, numbered."""

    def __init__(self, program: _Program) -> None:
        self.names: list[str] = []
        self.kinds: list[str] = []
        self.sizes: list[int] = []
        self.written: set[int] = set()  # those that have content
        self.outside: list[int] = []  # content that is there before the pass, without persisting
        self.passed: set[int] = set()  # among these, what was passed as an argument
        self._index: dict[int, int] = {}
        self._kept: list[torch.UntypedStorage] = []
        self._size_of = program.size_of
        for name, tensor in program.parameters.items():
            self.add(tensor, name, "weight")
        for name, tensor in program.buffers.items():
            self.add(tensor, name, "buffer")
        for name, tensor in program.optimizer_state():
            self.add(tensor, name, "state")
        for name, parameter in program.parameters.items():
            if parameter.grad is not None:
                self.passed.add(self.add(parameter.grad, f"grad.{name}", "gradient"))
        for tensor, name, kind in program.others:
            self.passed.add(self.add(tensor, name, kind))

    def find(self, tensor: torch.Tensor) -> int | None:
        """The tensor's number, or None when its storage was not met yet."""
        return self._index.get(tensor.untyped_storage()._cdata)

    def add(self, tensor: torch.Tensor, name: str, kind: str) -> int:
        """Number a storage, unless it has a number. Activations and gradients have no content yet."""
        storage = tensor.untyped_storage()
        index = self._index.get(storage._cdata)
        if index is None:
            index = self._index[storage._cdata] = len(self.names)
            self._kept.append(storage)
            self.names.append(name)
            self.kinds.append(kind)
            self.sizes.append(self._size_of.get(storage._cdata, storage.nbytes()))
            if kind != "activation":
                self.written.add(index)
                if kind not in PERSISTENT:
                    self.outside.append(index)
        return index


def _covers(tensor: torch.Tensor, storage_bytes: int) -> bool:
    """Whether the tensor is all of its storage, each byte once."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return tensor.numel() * tensor.element_size() >= storage_bytes


def _tensors_in(value: Any) -> list[torch.Tensor]:
    """Of an operator's arguments or results, which nest lists and tuples only."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors_in(item)]
    return []


def _bytes_of(tensors: list[torch.Tensor]) -> int:
    """What is in memory of these: an expanded tensor is less there than its shape says."""
    total = 0
    for tensor in tensors:
        sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
        total += tensor.element_size() * math.prod(sizes)
    return total


def _is_free(func: Any) -> bool:
    """Views, and operators that look at a shape or change one, move nothing."""
    is_query = func.namespace in ("prim", "profiler") or func.overloadpacket.__name__ in _QUERIES
    if is_query or torch.Tag.inplace_view in func.tags:
        return True
    returns = func._schema.returns
    return bool(returns) and all(out.alias_info is not None and not out.alias_info.is_write for out in returns)


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Multiplications and additions by torch's formulas, else one per element put out."""
    packet = func.overloadpacket
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    name = packet.__name__
    shapes = [value.shape for value in args if isinstance(value, torch.Tensor)]
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        return int(sdpa_flop_count(*shapes[:3]))  # type: ignore[no-untyped-call]
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        return int(sdpa_backward_flop_count(*shapes[:4]))  # type: ignore[no-untyped-call]
    if name == "_grouped_mm":
        return 2 * int(args[0].numel()) * int(shapes[1][-1])
    return sum(tensor.numel() for tensor in _tensors_in(result))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """One run of the program, noted operator by operator. failure: the last error of an operator, and the operator."""

    def __init__(self, program: _Program) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.failure: tuple[Exception, str] | None = None
        self._program = program
        self._tensors = _Tensors(program)
        self._steps: list[TraceStep] = []
        self._modules: list[tuple[str, bool]] = []  # running ones: the name, and whether it began inside backward
        self._optimizers: list[tuple[int, int]] = []  # running ones: the backward, and how many modules, they began in
        self._scope_of_node: dict[int, str] = {}
        self._makes_graph: dict[int, bool] = {}  # by number of the backward
        self._gradient_names: dict[int, str] = {}
        self._allocated: dict[int, tuple[torch.UntypedStorage, str]] = {}  # what nothing was written to yet, if ever
        self._microbatch = 0
        self._backward_seen = False

    def run(self) -> None:
        """Run the program once. Whatever it raises comes out."""
        with ExitStack() as stack:
            for handle in self._hooks():
                stack.callback(handle.remove)
            stack.enter_context(self._program.mode)
            stack.enter_context(self)
            self._program.run()

    def _hooks(self) -> Iterator[Any]:
        yield register_module_forward_pre_hook(self._enter_module)
        yield register_module_forward_hook(self._leave_module, always_call=True)
        yield register_optimizer_step_pre_hook(self._enter_optimizer)
        yield register_optimizer_step_post_hook(self._leave_optimizer)
        for name, parameter in self._program.parameters.items():
            if parameter.requires_grad:  # before the program's own hooks, which may drop the gradient
                hook = functools.partial(self._note_gradient, name)
                yield parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        for tensor, register, hook in self._program.tensor_hooks:
            yield getattr(tensor, register)(hook)

    # -- where in the program it is

    def _enter_module(self, module: torch.nn.Module, _args: Any) -> None:
        name = self._program.module_name.get(id(module))
        if name is not None:
            inside_backward = torch._C._current_graph_task_id() != -1
            self._modules.append((name, inside_backward))
            if self._backward_seen and not inside_backward:
                self._microbatch += 1
                self._backward_seen = False

    def _leave_module(self, module: torch.nn.Module, _args: Any, _result: Any) -> None:
        if id(module) in self._program.module_name:
            self._modules.pop()

    def _enter_optimizer(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        self._optimizers.append((torch._C._current_graph_task_id(), len(self._modules)))
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            self._refuse_real(parameter)
            self._note_gradient(self._program.parameter_name.get(id(parameter), ""), parameter)

    def _leave_optimizer(self, _optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        self._optimizers.pop()

    def _note_gradient(self, name: str, parameter: torch.Tensor) -> None:
        index = None if parameter.grad is None else self._tensors.find(parameter.grad)
        if index is not None:
            self._gradient_names.setdefault(index, f"grad.{name}")

    def _place(self) -> tuple[str, str]:
        """The phase and the scope of what runs now."""
        task = torch._C._current_graph_task_id()
        if self._optimizers and self._optimizers[-1] == (task, len(self._modules)):  # not in the closure it was given
            return "optimizer", ""
        scope, inside_backward = self._modules[-1] if self._modules else ("", False)
        if task == -1:
            return "forward", scope
        # A checkpointed function need not call modules, but has gradients enabled; so has all of a backward that makes
        # a graph itself (create_graph), from its first operator on.
        has_gradients = torch.is_grad_enabled()
        makes_graph = self._makes_graph.setdefault(task, has_gradients)
        if inside_backward or (has_gradients and not makes_graph):
            return "recompute", scope if inside_backward else ""
        node = torch._C._current_autograd_node()
        scope = "" if node is None else self._scope_of_node.get(node._sequence_nr(), "")
        return "backward", scope

    # -- what it does there

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors_in((args, *kwargs.values())):
            self._refuse_real(tensor)
        if torch.is_grad_enabled():
            made_last = torch._C._autograd._get_sequence_nr() - 1
            self._scope_of_node.setdefault(made_last, self._modules[-1][0] if self._modules else "")
        is_counter = func is torch.ops.aten._local_scalar_dense.default and args[0].dtype != torch.bool
        if is_counter and self._place()[0] == "optimizer":
            result: Any = float(_STEPS_DONE) if args[0].is_floating_point() else _STEPS_DONE
        else:
            try:
                result = func(*args, **kwargs)
            except Exception as error:
                scope = self._place()[1]
                self.failure = (error, f"{func.overloadpacket}" + (f" in '{scope}'" if scope else ""))
                raise
        self._note(func, args, kwargs, result)
        return result

    @staticmethod
    def _refuse_real(tensor: torch.Tensor) -> None:
        if isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor, FakeTensor):
            msg = f"a parameter of shape {list(tensor.shape)} was not passed: make model and optimizer arguments of fn"
            raise TraceError(msg)

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Make the operator a step, unless it moves nothing."""
        packet = func.overloadpacket
        name = packet.__name__
        phase, scope = self._place()
        outputs = _tensors_in(result)
        how = f"{scope}/{packet}" if scope else str(packet)
        if name in _EMPTY:
            for tensor in outputs:
                storage = tensor.untyped_storage()
                self._allocated[storage._cdata] = (storage, how)
            return
        if _is_free(func):
            return
        read, changed, filled = self._arguments(func, args, kwargs)
        reads, writes, overwrites = ({self._number(tensor) for tensor in group} for group in (read, changed, filled))
        made = [tensor for tensor in outputs if self._tensors.find(tensor) is None]
        if outputs and not (made or changed or filled):
            return  # a view that its schema does not tell of
        overwrites |= {self._tensors.add(tensor, how, "activation") for tensor in made}
        blank = (reads | writes) - self._tensors.written  # allocated only: there is no content to keep
        writes = (writes | (reads & overwrites)) - blank
        overwrites = (overwrites - writes) | blank
        reads -= writes | overwrites
        self._tensors.written |= overwrites
        moved = _bytes_of(filled) + _bytes_of(made)
        moved += _bytes_of(changed) * 2 if name not in _SCATTERS else _bytes_of(read)
        moved += _bytes_of(read) if name not in _GATHERS else _bytes_of(made) + _bytes_of(read[1:])
        self._backward_seen |= phase == "backward"
        step = TraceStep(
            str(packet),
            tuple(sorted(reads)),
            tuple(sorted(writes)),
            tuple(sorted(overwrites)),
            flops=_flops(func, args, kwargs, result),
            moved_bytes=moved,
            scope=scope,
            phase=phase,
            microbatch=self._microbatch,
        )
        self._steps.append(step)

    def _arguments(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """What the operator reads, what it changes, and what it fills without looking at the old content."""
        read: list[torch.Tensor] = []
        changed: list[torch.Tensor] = []
        filled: list[torch.Tensor] = []
        name = func.overloadpacket.__name__
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            is_written |= position in _UNTOLD_WRITES.get(name, ()) and bool(args[5])
            fills = is_written and (argument.kwarg_only or (name in _FILLS and position == 0))
            for tensor in _tensors_in(value):
                if not is_written:
                    if name not in _LIKE:
                        read.append(tensor)
                elif fills and _covers(tensor, self._tensors.sizes[self._number(tensor)]):
                    filled.append(tensor)
                else:
                    changed.append(tensor)
        return read, changed, filled

    def _number(self, tensor: torch.Tensor) -> int:
        index = self._tensors.find(tensor)
        if index is not None:
            return index
        allocated = self._allocated.get(tensor.untyped_storage()._cdata)
        if allocated is not None:
            return self._tensors.add(tensor, allocated[1], "activation")
        return self._tensors.add(tensor, "constant", "input")  # the program brought it along

    # -- the result

    def trace(self, name: str, tokens: int) -> Trace:
        """What was recorded. ValueError when nothing was."""
        tensors = self._tensors
        kinds = list(tensors.kinds)
        names = list(tensors.names)
        for index, gradient_name in self._gradient_names.items():
            if kinds[index] == "activation":
                kinds[index], names[index] = "gradient", gradient_name
        first_use: dict[int, TraceStep] = {}
        changed: set[int] = set()
        for step in self._steps:
            changed.update(step.writes, step.overwrites)
            for index in step.uses:
                first_use.setdefault(index, step)
        arriving = []
        for index in tensors.outside:
            if kinds[index] == "gradient":  # left over from before: content, or merely memory to be filled
                is_content = index not in first_use or index not in first_use[index].overwrites
            else:  # the caller sees what was changed in place, so it lives on
                is_content = index in tensors.passed and index in changed
            if is_content:
                kinds[index] = "state"
            elif kinds[index] == "input":
                arriving.append(index)
        steps = self._steps
        if arriving:
            moved = sum(tensors.sizes[index] for index in arriving)
            steps = [TraceStep("inputs", overwrites=tuple(arriving), moved_bytes=moved), *steps]
        return Trace(
            name,
            tuple(TraceTensor(*row) for row in zip(names, tensors.sizes, kinds, strict=True)),
            _with_deaths(steps, kinds),
            tokens,
        )


def _with_deaths(steps: list[TraceStep], kinds: list[str]) -> tuple[TraceStep, ...]:
    """Everything that does not persist dies with its last use."""
    met: set[int] = set()
    result = []
    for step in reversed(steps):
        last = [index for index in step.uses if index not in met and kinds[index] not in PERSISTENT]
        met.update(last)
        result.append(replace(step, dies=tuple(sorted(last))) if last else step)
    return tuple(reversed(result))
