# SPDX-License-Identifier: Apache-2.0
"""`torch.ops.tensorpager`: how the operators that compute with paged tensors are made known to torch.

Each is defined with `torch.library.Library`, whose calls cost a fraction of those of `torch.library.custom_op`, and has

* a kernel, one for all devices, that sees tensors with the guard off and makes resident what it reads, part by part;
* a fake kernel, for shapes: tracing, `torch.compile`;
* an autograd rule that is made of operators of this library and of torch, so it can be traced, and differentiated in
  turn. No operator writes to its arguments or returns a view of one, so functionalisation has nothing to do;
* a rule for autocast: the operator gets the dtype, and converts the weight part by part instead of as a whole;
* what it will hold, for a run on fake tensors (`fake_pass.py`).

Where the tensors are ordinary, the operators are the plain ones of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tensorpager.paged_tensor import Arguments, Keywords, leave_to_operator, no_guard, streamed

__all__ = ["define", "instead_of", "may_convert", "record_steps", "rule_for_autocast"]

Kernel = Callable[..., Any]
# Tells the core's recording which steps a call takes. Called with all of the operator's arguments.
Record = Callable[..., None]
# The arguments for the operator, or None where torch's own function has to do.
Translate = Callable[..., tuple[Any, ...] | None]

_library: Any = torch.library.Library("tensorpager", "FRAGMENT")  # type: ignore[no-untyped-call]
_records: dict[Callable[..., Any], Record] = {}
_replaced: dict[Callable[..., Any], tuple[torch._ops.OpOverloadPacket, Translate, Record]] = {}


def define(
    signature: str,
    kernel: Kernel,
    fake: Kernel,
    *,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    record: Record,
) -> torch._ops.OpOverloadPacket:
    """Register an operator ("name(Tensor input, ...) -> Tensor"); see the head of the file. The rules are torch's.

    kernel is called with the guard off. record(*arguments), as the kernel would be called, acquires and releases the
    sets that this would, in the same order.
    """
    name = signature.split("(", 1)[0]
    full_name = f"tensorpager::{name}"
    _library.define(signature, tags=(torch.Tag.pt2_compliant_tag,))

    def unguarded(*args: Any, **kwargs: Any) -> Any:
        with no_guard():
            return kernel(*args, **kwargs)

    _library.impl(name, unguarded, "CompositeExplicitAutograd")
    torch.library.register_fake(full_name, fake, lib=_library)
    torch.library.register_autograd(full_name, backward, setup_context=setup_context, lib=_library)
    operator: torch._ops.OpOverloadPacket = getattr(torch.ops.tensorpager, name)
    leave_to_operator(operator)
    _records[operator] = _records[operator.default] = record
    return operator


def may_convert(dtype: torch.dtype, *given: torch.dtype) -> bool:
    """Whether numbers of the given dtypes may become such of `dtype`: all of them real, or all complex; no integers."""
    return all(
        (each.is_floating_point or each.is_complex) and each.is_complex == dtype.is_complex for each in (dtype, *given)
    )


def rule_for_autocast(operator: torch._ops.OpOverloadPacket, dtype_position: int) -> None:
    """Under autocast, give the operator autocast's dtype as the argument at that position, which is None otherwise.

    As for torch's own: float64 and what is no floating-point number stay as they are. The operator's first two
    arguments are what is multiplied.
    """
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def with_dtype(*args: Any, device: str = device) -> Any:
            given = [*args, *[None] * (dtype_position + 1 - len(args))]
            converts = all(value.is_floating_point() and value.dtype != torch.float64 for value in args[:2])
            if given[dtype_position] is None and converts:
                given[dtype_position] = torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):
                return operator.default(*given)

        _library.impl(operator.default._schema.name.split("::")[1], with_dtype, key)


def instead_of(
    func: Callable[..., Any], operator: torch._ops.OpOverloadPacket, translate: Translate, record: Record
) -> None:
    """Where the guard can't hold a tensor that func was given, for its size, the operator does its work.

    translate(*args, **kwargs) makes the operator's arguments of func's, or None of those that torch's own function has
    to work on, or refuse; then pages come in as they are touched.
    """

    def handler(_func: Callable[..., Any], args: Arguments, kwargs: Keywords) -> Any:
        transformed = torch._C._are_functorch_transforms_active()  # torch.func has rules for its own functions only
        translated = None if transformed else translate(*args, **kwargs)
        if translated is None:
            return torch._C._disabled_torch_function_impl(func, (), args, kwargs)
        return torch._C._disabled_torch_function_impl(operator.default, (), translated, {})

    _replaced[func] = (operator, translate, record)
    streamed[func] = handler


def record_steps(func: Callable[..., Any], args: Arguments, kwargs: Keywords, *, too_large: bool) -> bool:
    """Whether an operator of this library carries out the call; if so, its steps are recorded.

    too_large: the guard could not hold an argument.
    """
    record = _records.get(func)
    if record is not None:
        record(*_with_defaults(func, args, kwargs))
        return True
    if not too_large or func not in _replaced:
        return False
    operator, translate, record = _replaced[func]
    translated = translate(*args, **kwargs)
    if translated is not None:
        record(*_with_defaults(operator, translated, {}))
    return translated is not None


def _with_defaults(func: Any, args: Arguments, kwargs: Keywords) -> list[Any]:
    schema = getattr(func, "default", func)._schema
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    return [given.get(argument.name, argument.default_value) for argument in schema.arguments]
