# SPDX-License-Identifier: Apache-2.0
"""A program on fake tensors: copies of its function and arguments in which every tensor has a shape and no memory.

Modules, optimizers, hooks, closures and plain containers are copied with one memo, so that what was shared stays
shared: tied weights, an optimizer's parameters, a hook that reaches the model through its closure. The originals are
neither changed nor read.
"""

from __future__ import annotations

import copy
import dis
import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tensorpager.errors import TraceError

__all__ = ["FakeProgram", "Found", "found_in", "reached_by"]


def reached_by(function: types.FunctionType) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of the global variables a function names, and of those it closes over."""
    names = {item.argval for item in dis.get_instructions(function) if item.opname == "LOAD_GLOBAL"}
    in_globals = {name: value for name, value in function.__globals__.items() if name in names}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return in_globals, {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}  # else: not set


@dataclass
class Found:
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


def found_in(value: Any) -> Found:
    """The modules, optimizers and tensors that an argument holds, however deep, with their names."""
    found = Found()
    found.look_into(value, "")
    return found


def _children(item: Any, name: str) -> Iterator[tuple[Any, str]]:
    if isinstance(item, torch.Tensor):
        if item.is_leaf and item.grad is not None:
            yield item.grad, f"grad.{name}"
        for _, hook in _hooks_of(item):
            yield (reached_by(hook) if isinstance(hook, types.FunctionType) else hook), name
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
    in_globals, _ = reached_by(hook)
    variables = dict(hook.__globals__)
    for name, value in in_globals.items():
        if found_in(value).tensors:
            variables[name] = copy.deepcopy(value, memo)
    cells = tuple(types.CellType(copy.deepcopy(cell.cell_contents, memo)) for cell in hook.__closure__ or ())
    copied = types.FunctionType(hook.__code__, variables, hook.__name__, None, cells)
    copied.__defaults__ = copy.deepcopy(hook.__defaults__, memo)
    copied.__kwdefaults__ = copy.deepcopy(hook.__kwdefaults__, memo)
    return copied


class _FakeCopies(TorchFunctionMode):
    """While active, copy.deepcopy makes fake tensors of those that were not found before."""

    def __init__(self, program: FakeProgram) -> None:
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


class FakeProgram:
    """The copy that runs. others: tensors beside parameters, buffers and their gradients, with name and kind."""

    def __init__(
        self, mode: FakeTensorMode, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.mode = mode
        self.size_of: dict[int, int] = {}  # in bytes, by fake storage: that of the real one
        self._bases: dict[int, torch.Tensor] = {}  # fake, by real storage
        found = Found()
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
        kind_of = {key: "buffer" for module in found.modules.values() for key in found_in(module).tensors}
        kind_of.update({key: "state" for item in found.optimizers.values() for key in found_in(item).tensors})
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

    def _name(self, found: Found, modules: dict[int, torch.nn.Module]) -> None:
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
