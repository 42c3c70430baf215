# SPDX-License-Identifier: Apache-2.0
"""`from_pretrained()`: a transformers model whose weights stay in its safetensors files and are paged from there.

transformers' own loader does what it knows best (renaming keys, base-model prefixes, tied weights, buffers that are in
no file): it is given a state dict of paged tensors, one over each tensor of the mapped files, and assigns them without
reading them. What it has to make anew (converted dtypes, experts fused into one tensor, weights the checkpoint lacks)
is moved to spill the moment it is assigned, so at most one such tensor is in RAM beside the budget.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from tensorpager.addresses import data_set_by_value
from tensorpager.checkpoint import (
    Checkpoint,
    CheckpointFile,
    TensorEntry,
    aligned,
    open_checkpoint,
    torch_dtype_name,
    torch_shape,
)
from tensorpager.device import HOST, Device
from tensorpager.errors import CheckpointError, PagedTensorError
from tensorpager.experts import register_experts
from tensorpager.paged_tensor import Backing, PagedTensor, make_paged, ordinary_copy, span_of
from tensorpager.pager import install, make_core
from tensorpager.quantised import QuantisedWeights
from tensorpager.spill import SpillArena, dense_strides, tensor_at

if TYPE_CHECKING:
    from tensorpager._core import Pager as Core
    from tensorpager._core import Region

__all__ = ["from_pretrained"]

# These contradict paging in place, or would be ignored.
_REFUSED = frozenset(
    {
        "device_map",
        "device_mesh",
        "gguf_file",
        "max_memory",
        "offload_folder",
        "quantization_config",
        "state_dict",
        "tp_plan",
    }
    | {"output_loading_info", "revision", "subfolder", "trust_remote_code", "use_safetensors", "weights_only"}
)


def from_pretrained(  # noqa: PLR0913 (they are the user's, each with a default)
    directory: str | os.PathLike[str],
    budget: int | str = "1GiB",
    *,
    store: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    engine: str = "auto",
    page_bytes: int = 0,
    variant: str | None = None,
    model_class: type[Any] | None = None,
    device: Device = None,
    host_budget: int | str | None = None,
    stored_as: str | None = None,
    **kwargs: Any,
) -> Any:
    """A transformers model in eval mode, with at most `budget` bytes of its weights in RAM; `model.pager` is its Pager.

    With device= the budget is of that device's memory and the model is on it; device, host_budget and stored_as as for
    `page()`. With stored_as= the large weights are written anew, as codes, in the store: about half the files' size.

    directory: a local checkpoint with config.json and safetensors files (single or sharded). They are opened read-only
    and must not change while the model lives. The model is built on the meta device and never materialised. budget,
    store, engine, page_bytes: as for `page()`. dtype: as in transformers, "auto" by default, which is what the files
    hold; weights in another dtype are converted into spill, on disk. variant: "fp16" for model.fp16.safetensors.
    model_class: instead of the class that config.json names, a class of transformers or one of its auto classes. Other
    keyword arguments go to the class's `from_pretrained`, for instance attn_implementation="eager"; or
    experts_implementation="tensorpager", with which only those experts of a mixture are brought in that are chosen
    (experts.py).

    Raises CheckpointError for a file that breaks the format, PagedTensorError for an argument that contradicts paging
    or a class transformers does not have, ImportError without transformers; BudgetError, IoError, EngineError,
    MemoryMapError, ValueError as `page()` does.
    """
    refused = sorted(_REFUSED & kwargs.keys())
    if refused:
        msg = (
            f"from_pretrained() can't take {', '.join(refused)}: weights are paged from local safetensors files on the "
            "CPU. Load the model with transformers and use page() on it"
        )
        raise PagedTensorError(msg)
    directory = os.fspath(directory)
    checkpoint = open_checkpoint(directory, variant=variant)
    register_experts()
    config, kwargs = _load_config(directory, kwargs)
    model_class = _model_class(config) if model_class is None else _concrete(model_class, config)
    core = make_core(budget, store, engine, page_bytes, device, host_budget)
    try:
        quantised_bytes = 0
        if core.device == HOST and stored_as is None:
            model, spilled_bytes = _load(core, checkpoint, config, model_class, dtype, kwargs)[:2]
        else:
            with closing(make_core(_LOADING_BUDGET_BYTES, store, engine)) as loading_core:
                model, _, regions = _load(loading_core, checkpoint, config, model_class, dtype, kwargs)
                weights = None if stored_as is None else QuantisedWeights(core, store, stored_as)
                spilled_bytes = _move_to(model, regions, core, weights)
                quantised_bytes = 0 if weights is None else weights.size_bytes
        _finish(model, directory)
        model.pager = install(model, core, spilled_bytes, quantised_bytes)
    except BaseException:
        core.close()
        raise
    return model


# Each tensor the loader has to convert is paged in, in part when it is larger.
_LOADING_BUDGET_BYTES = 256 * 2**20


def _load(
    core: Core, checkpoint: Checkpoint, config: Any, model_class: type[Any], dtype: Any, kwargs: dict[str, Any]
) -> tuple[Any, int, list[tuple[CheckpointFile, Region]]]:
    """The model over the core's address space, the bytes that went to spill, and where each file lies."""
    arena = SpillArena(core)
    state_dict, regions = _paged_state_dict(core, checkpoint, arena)
    with _assigned_tensors_moved(arena), _loading_in_this_thread(), data_set_by_value():
        model = model_class.from_pretrained(
            None, config=config, state_dict=state_dict, dtype="auto" if dtype is None else dtype, **kwargs
        )
    del state_dict
    _parameters_of_their_own(model)
    _plain_buffers(model)
    return model, arena.size_bytes, regions


def _move_to(
    model: Any, regions: list[tuple[CheckpointFile, Region]], core: Core, weights: QuantisedWeights | None
) -> int:
    """Exchange parameters paged by the core that loaded them for such at the same places of the files, paged by `core`.

    transformers loads on the host, whose address space takes no memory; so nothing is read for a parameter that lies in
    a file, unless it is to be stored as codes: such are written first, one at a time. The others (converted,
    misaligned, made anew) are copied into the core's spill; returns their bytes.
    """
    if weights is not None:
        _write_quantised(model, weights)
    arena = SpillArena(core)
    new_regions = [(old, core.map_file(str(file.path), file.data_start)) for file, old in regions]
    moved: dict[int, PagedTensor] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if not isinstance(parameter, PagedTensor):
                continue
            new = moved.get(id(parameter))
            if new is None:
                new = moved[id(parameter)] = _moved(parameter, new_regions, core, arena, weights)
            setattr(module, name, new)
    return arena.size_bytes


def _write_quantised(model: Any, weights: QuantisedWeights) -> None:
    owners: dict[int, tuple[PagedTensor, list[torch.nn.Module]]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if isinstance(parameter, PagedTensor):
                owners.setdefault(id(parameter), (parameter, []))[1].append(module)
    for parameter, modules in owners.values():
        if weights.takes(parameter, modules):
            assert parameter._tp_backing is not None
            weights.write(id(parameter), parameter._tp_backing.name, ordinary_copy(parameter))
    weights.map()


def _moved(
    parameter: PagedTensor,
    new_regions: list[tuple[Region, Region]],
    core: Core,
    arena: SpillArena,
    weights: QuantisedWeights | None,
) -> PagedTensor:
    assert parameter._tp_backing is not None
    name = parameter._tp_backing.name
    address, size_bytes = span_of(parameter)
    new: PagedTensor | None = None
    codes_at = None if weights is None else weights.address(id(parameter))
    if codes_at is not None:
        plain = tensor_at(core, codes_at, tuple(parameter.shape), dense_strides(parameter), parameter.dtype)
        new = make_paged(plain, Backing(core, name), parameter=True, requires_grad=parameter.requires_grad)
    for old, region in new_regions if new is None else []:
        if old.address <= address and address + size_bytes <= old.address + old.size_bytes and size_bytes > 0:
            place = region.address + (address - old.address)
            plain = tensor_at(core, place, tuple(parameter.shape), tuple(parameter.stride()), parameter.dtype)
            new = make_paged(plain, Backing(core, name), parameter=True, requires_grad=parameter.requires_grad)
    if new is None:
        copy = ordinary_copy(parameter)
        new = arena.move_in(copy, name, parameter=True, requires_grad=parameter.requires_grad)
    new.__dict__.update({key: value for key, value in vars(parameter).items() if key not in vars(new)})
    return new


def _load_config(directory: str, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoConfig

    if "config" in kwargs:
        return kwargs["config"], {name: value for name, value in kwargs.items() if name != "config"}
    config, unused = AutoConfig.from_pretrained(directory, return_unused_kwargs=True, local_files_only=True, **kwargs)
    return config, unused


def _model_class(config: Any) -> type[Any]:
    import transformers

    names = config.architectures or []
    for name in names:
        found: type[Any] | None = getattr(transformers, name, None)
        if found is not None:
            return found
    if names:
        msg = (
            f"transformers {transformers.__version__} has no model class {' or '.join(names)}, which config.json "
            "names; use a version that has it, or give model_class="
        )
        raise PagedTensorError(msg)
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        if type(config) in mapping:
            return _of_several(mapping[type(config)], config)
    msg = f"config.json names no architecture, and {type(config).__name__} has none; give model_class="
    raise PagedTensorError(msg)


def _concrete(model_class: type[Any], config: Any) -> type[Any]:
    """The class itself, or the one that an auto class (AutoModelForSeq2SeqLM, ...) has for the configuration."""
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is None:
        return model_class
    if type(config) not in mapping:
        msg = f"{model_class.__name__} has no class for {type(config).__name__}; give another model_class="
        raise PagedTensorError(msg)
    return _of_several(mapping[type(config)], config)


def _of_several(found: Any, config: Any) -> type[Any]:
    """The one that the configuration names, of what an auto class's mapping holds: a class, or several."""
    classes: list[type[Any]] = list(found) if isinstance(found, (tuple, list)) else [found]
    names = config.architectures or []
    return next((each for each in classes if each.__name__ in names), classes[0])


# -- the state dict ----------------------------------------------------------------------------------------------------


def _paged_state_dict(
    core: Core, checkpoint: Checkpoint, arena: SpillArena
) -> tuple[dict[str, torch.Tensor], list[tuple[CheckpointFile, Region]]]:
    """A paged tensor over each tensor of the checkpoint, in file order; and each file's region.

    Reads only tensors that are misaligned.
    """
    state_dict: dict[str, torch.Tensor] = {}
    regions: list[tuple[CheckpointFile, Region]] = []
    for file in checkpoint.files:
        if not file.tensors:
            continue
        path = str(file.path)
        region = core.map_file(path)
        if region.size_bytes != file.size_bytes:
            msg = (
                f"{path} had {file.size_bytes} bytes when its header was read and has {region.size_bytes} now: "
                "something is still writing it. Wait for it to finish"
            )
            raise CheckpointError(
                msg,
                path=path,
                rule="file_changed",
            )
        regions.append((file, region))
        for entry in file.tensors.values():
            if checkpoint.files[checkpoint.file_of[entry.name]] is file:
                state_dict[entry.name] = _paged_entry(core, region, entry, path, arena)
    return state_dict, regions


def _paged_entry(core: Core, region: Region, entry: TensorEntry, path: str, arena: SpillArena) -> torch.Tensor:
    dtype = getattr(torch, torch_dtype_name(entry, path), None)
    if dtype is None:
        msg = f"{path}: tensor '{entry.name}' is of type {entry.dtype}, which torch {torch.__version__} does not have"
        raise PagedTensorError(msg)
    shape = torch_shape(entry, path)
    if entry.size_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    place = tensor_at(core, region.address + entry.offset_bytes, (entry.size_bytes,), (1,), torch.uint8)
    if aligned(entry):
        return make_paged(place.view(dtype).reshape(shape), Backing(core, entry.name))
    raw = make_paged(place, Backing(core, entry.name))
    copy = ordinary_copy(raw).view(dtype).reshape(shape)
    return arena.move_in(copy, entry.name, parameter=False, requires_grad=False)


# -- while transformers loads ------------------------------------------------------------------------------------------


@contextmanager
def _assigned_tensors_moved(arena: SpillArena) -> Iterator[None]:
    """While active, a parameter of ordinary memory that this thread assigns to a module is moved into spill.

    The loader marks parameters it has set by an attribute, which moves with them.
    """
    thread_id = threading.get_ident()

    def move(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> torch.nn.Parameter | None:
        if threading.get_ident() != thread_id or type(parameter) is not torch.nn.Parameter:
            return None
        if parameter.device.type != "cpu" or parameter.numel() == 0 or parameter.layout is not torch.strided:
            return None
        full_name = f"{type(module).__name__}.{name}"
        moved = arena.move_in(parameter, full_name, parameter=True, requires_grad=parameter.requires_grad)
        moved.__dict__.update({key: value for key, value in vars(parameter).items() if key not in vars(moved)})
        return moved  # type: ignore[return-value]

    handle = torch.nn.modules.module.register_module_parameter_registration_hook(move)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


_loading_lock = threading.Lock()


@contextmanager
def _loading_in_this_thread() -> Iterator[None]:
    """Make transformers convert one tensor at a time: its threads would have all converted ones in RAM at once."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    with _loading_lock:
        before = os.environ.get(name)
        os.environ[name] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def _parameters_of_their_own(model: Any) -> None:
    """Exchange parameters that are views of what the state dict held for such that are not.

    The loader leaves views, whose own views torch takes for tensors without a gradient. matmul asks for that when it
    chooses between mm and bmm, so the last bits would be others than those of an ordinary model.
    """
    made: dict[int, PagedTensor] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if not isinstance(parameter, PagedTensor):
                continue
            own = made.get(id(parameter))
            if own is None:
                assert parameter._tp_backing is not None
                with torch._C.DisableTorchFunctionSubclass():
                    plain = parameter.as_subclass(torch.Tensor)
                own = make_paged(plain, parameter._tp_backing, parameter=True, requires_grad=parameter.requires_grad)
                own.__dict__.update({key: value for key, value in vars(parameter).items() if key not in vars(own)})
                made[id(parameter)] = own
            module._parameters[name] = own


def _plain_buffers(model: Any) -> None:
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if isinstance(buffer, PagedTensor):
                module._buffers[key] = ordinary_copy(buffer)


def _finish(model: Any, directory: str) -> None:
    """Refuse parameters without values, and put back what transformers keeps of the path."""
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                msg = f"'{name}.{key}' got no values: the checkpoint has none, and {type(model).__name__} makes none"
                raise PagedTensorError(msg)
    model.config.name_or_path = directory
    model.name_or_path = directory
    if model.can_generate():
        model.generation_config = _generation_config(directory)


def _generation_config(directory: str) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(directory, local_files_only=True)
    except OSError:  # the file is optional; older checkpoints have it in config.json
        return GenerationConfig.from_pretrained(
            directory, config_file_name="config.json", _from_model_config=True, local_files_only=True
        )
