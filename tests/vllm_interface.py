# SPDX-License-Identifier: Apache-2.0
"""vLLM's interface for KV connectors, written down: names, parameters, and which of them a connector has to have.

Taken from KVConnectorBase_V1 of vLLM's repository (v1/base.py of its KV connectors, November 2026). Where vLLM is
installed, a test compares. Where it is not, `stand_in()` makes a base class out of this table.
"""

from __future__ import annotations

import abc
import enum
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

MODULE = "vllm.distributed.kv_transfer.kv_connector.v1.base"

#: Name: parameters after self. Those a connector has to define.
ABSTRACT: dict[str, tuple[str, ...]] = {
    "start_load_kv": ("forward_context", "**kwargs"),
    "wait_for_layer_load": ("layer_name",),
    "save_kv_layer": ("layer_name", "kv_layer", "attn_metadata", "**kwargs"),
    "wait_for_save": (),
    "get_num_new_matched_tokens": ("request", "num_computed_tokens"),
    "update_state_after_alloc": ("request", "blocks", "num_external_tokens"),
    "build_connector_meta": ("scheduler_output",),
}
#: And those it may.
OPTIONAL: dict[str, tuple[str, ...]] = {
    "bind_connector_metadata": ("connector_metadata",),
    "clear_connector_metadata": (),
    "has_connector_metadata": (),
    "register_kv_caches": ("kv_caches",),
    "register_cross_layers_kv_cache": ("kv_cache", "attn_backend"),
    "set_host_xfer_buffer_ops": ("copy_operation",),
    "handle_preemptions": ("kv_connector_metadata",),
    "get_finished": ("finished_req_ids",),
    "get_block_ids_with_load_errors": (),
    "shutdown": (),
    "get_kv_connector_stats": (),
    "get_kv_connector_kv_cache_events": (),
    "get_handshake_metadata": (),
    "build_connector_worker_meta": (),
    "bind_gpu_block_pool": ("gpu_block_pool",),
    "on_new_request": ("request",),
    "update_connector_output": ("connector_output",),
    "request_finished": ("request", "block_ids"),
    "take_events": (),
    "has_pending_push_work": (),
    "get_finished_count": (),
    "set_xfer_handshake_metadata": ("metadata",),
    "reset_cache": (),
}
INIT = ("vllm_config", "role", "kv_cache_config")
PROPERTIES = ("prefer_cross_layer_blocks", "requires_kv_delivery", "role")


def parameters(function: Any) -> tuple[str, ...]:
    """Of a method, without self; those by keyword alone with their stars."""
    stars = {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.VAR_POSITIONAL: "*"}
    found = list(inspect.signature(function).parameters.values())[1:]
    return tuple(stars.get(parameter.kind, "") + parameter.name for parameter in found)


class Role(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


def _method(name: str, names: tuple[str, ...], *, abstract: bool) -> Any:
    """A method of these parameters that does nothing."""
    kinds = {True: inspect.Parameter.VAR_KEYWORD, False: inspect.Parameter.POSITIONAL_OR_KEYWORD}

    def nothing(*_args: Any, **_kwargs: Any) -> None:
        return None

    described = [inspect.Parameter(each.lstrip("*"), kinds[each.startswith("**")]) for each in ("self", *names)]
    nothing.__signature__ = inspect.Signature(described)  # type: ignore[attr-defined]
    nothing.__name__ = name
    return abc.abstractmethod(nothing) if abstract else nothing


class _Bound:
    """What the real base class keeps for a connector."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        if vllm_config.kv_transfer_config is None:
            msg = "kv_transfer_config must be set"
            raise ValueError(msg)
        self._connector_metadata: Any = None
        self._vllm_config = vllm_config
        self._kv_transfer_config = vllm_config.kv_transfer_config
        self._kv_cache_config = kv_cache_config
        self._role = role

    @property
    def requires_kv_delivery(self) -> bool:
        return True

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        self._connector_metadata = connector_metadata

    def clear_connector_metadata(self) -> None:
        self._connector_metadata = None

    def _get_connector_metadata(self) -> Any:
        assert self._connector_metadata is not None
        return self._connector_metadata


@contextmanager
def stand_in() -> Iterator[None]:
    """While active, vLLM can be imported as far as a connector needs it; the real one, where it is installed."""
    try:
        __import__(MODULE)
        yield
        return
    except ImportError:
        pass
    members = {name: _method(name, names, abstract=True) for name, names in ABSTRACT.items()}
    members |= {
        name: _method(name, names, abstract=False) for name, names in OPTIONAL.items() if not hasattr(_Bound, name)
    }
    base = abc.ABCMeta("KVConnectorBase_V1", (_Bound, abc.ABC), members)
    metadata = abc.ABCMeta("KVConnectorMetadata", (abc.ABC,), {})
    made: dict[str, ModuleType] = {}
    names = MODULE.split(".")
    for length in range(1, len(names) + 1):
        name = ".".join(names[:length])
        made[name] = ModuleType(name)
    contents = {"KVConnectorBase_V1": base, "KVConnectorMetadata": metadata, "KVConnectorRole": Role}
    vars(made[MODULE]).update(contents)
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in (*made, "tensorpager.vllm_connector"):
            sys.modules.pop(name, None)
