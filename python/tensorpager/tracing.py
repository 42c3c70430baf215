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

import functools
import math
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from tensorpager.errors import TraceError
from tensorpager.fake_pass import _random_state_kept
from tensorpager.fake_program import FakeProgram, found_in, reached_by
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
            program = FakeProgram(mode, fn, args, kwargs)
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
    in_globals, closed_over = reached_by(fn)
    for inner in closed_over.values():
        _refuse_hidden(inner, (*seen, fn))  # what a decorator wraps
    for variable, value in {**in_globals, **closed_over}.items():
        found = found_in(value)
        if found.optimizers or any(True for module in found.modules.values() for _ in module.parameters()):
            msg = f"{fn.__name__} reaches '{variable}' by itself: pass models and optimizers as arguments"
            raise TraceError(msg)


class _Tensors:
    """The storages met so far, numbered."""

    def __init__(self, program: FakeProgram) -> None:
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

    def __init__(self, program: FakeProgram) -> None:
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
