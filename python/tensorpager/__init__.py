# SPDX-License-Identifier: Apache-2.0
"""Virtual memory for tensors: a model's weights live on disk, and a fixed budget of RAM holds what is needed next.

    import tensorpager as tp

    model = tp.from_pretrained("path/to/checkpoint", budget="4GiB")   # a transformers model, paged in place
    pager = tp.page(module, budget="1GiB")                            # any torch.nn.Module

    pass_ = tp.trace(step, model, optimizer, batch)                   # operator by operator, without memory
    schedule = tp.plan(pass_, "22GiB", tp.profile("rtx-4090", "gen4-nvme"))

Importing the package is cheap: torch, transformers and the native core are loaded by what first needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tensorpager.errors import (
    BudgetError,
    CheckpointError,
    ClosedError,
    CorruptPageError,
    DeviceError,
    EngineError,
    ForkedProcessError,
    IoError,
    MemoryMapError,
    PagedTensorError,
    RanksError,
    TensorPagerError,
    TraceError,
)

if TYPE_CHECKING:
    from tensorpager.hardware import Hardware, profile
    from tensorpager.kv_cache import KVCache
    from tensorpager.measured_hardware import this_machine
    from tensorpager.operator_trace import Trace
    from tensorpager.paged_tensor import PagedTensor
    from tensorpager.pager import Pager, page
    from tensorpager.planner import Budgets, plan
    from tensorpager.prefix_store import PrefixStore
    from tensorpager.pretrained import from_pretrained
    from tensorpager.reorder import Choices
    from tensorpager.resumption import committed, resume
    from tensorpager.schedule import Schedule
    from tensorpager.tracing import trace

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "Budgets",
    "CheckpointError",
    "Choices",
    "ClosedError",
    "CorruptPageError",
    "DeviceError",
    "EngineError",
    "ForkedProcessError",
    "Hardware",
    "IoError",
    "KVCache",
    "MemoryMapError",
    "PagedTensor",
    "PagedTensorError",
    "Pager",
    "PrefixStore",
    "RanksError",
    "Schedule",
    "TensorPagerError",
    "Trace",
    "TraceError",
    "__version__",
    "committed",
    "from_pretrained",
    "page",
    "plan",
    "profile",
    "resume",
    "this_machine",
    "trace",
]

_HOME = {
    "Budgets": "tensorpager.planner",
    "Choices": "tensorpager.reorder",
    "Hardware": "tensorpager.hardware",
    "KVCache": "tensorpager.kv_cache",
    "PagedTensor": "tensorpager.paged_tensor",
    "Pager": "tensorpager.pager",
    "PrefixStore": "tensorpager.prefix_store",
    "from_pretrained": "tensorpager.pretrained",
    "Schedule": "tensorpager.schedule",
    "Trace": "tensorpager.operator_trace",
    "committed": "tensorpager.resumption",
    "page": "tensorpager.pager",
    "resume": "tensorpager.resumption",
    "plan": "tensorpager.planner",
    "profile": "tensorpager.hardware",
    "this_machine": "tensorpager.measured_hardware",
    "trace": "tensorpager.tracing",
}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        msg = f"module 'tensorpager' has no attribute '{name}'"
        raise AttributeError(msg)
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
