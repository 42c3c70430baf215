# SPDX-License-Identifier: Apache-2.0
"""What torch's functions do with a tensor's bytes: nothing, share, convert, hand out the address, or read them.

The guard looks a function up here. One that is in no table reads its arguments, which is always a safe assumption: it
costs a page-in at most. Names that this torch lacks are skipped, so one table serves every version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import GetSetDescriptorType
from typing import Any

import torch

__all__ = ["ADDRESSES", "CONVERSIONS", "METADATA", "VIEWS", "VIEWS_IF_CONTIGUOUS"]

TorchFunction = Callable[..., Any]

# Attributes that give another tensor over the same bytes.
_VIEW_ATTRIBUTES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
# Setting one of these writes the tensor's bytes, or replaces its memory.
_WRITING_ATTRIBUTES = frozenset({"data", "real", "imag"})

_METADATA_METHODS = (
    "__dir__ __len__ _has_symbolic_sizes_strides _is_view _is_zerotensor dim dim_order element_size get_device "
    "has_names is_complex is_conj is_contiguous is_distributed is_floating_point is_inference is_neg is_pinned "
    "is_same_size is_set_to is_shared is_signed ndimension nelement new_empty new_empty_strided new_full new_ones "
    "new_zeros numel register_hook register_post_accumulate_grad_hook requires_grad_ retain_grad size storage_offset "
    "stride sym_numel unregister_hook"
)
_METADATA_FUNCTIONS = (
    "can_cast empty_like full_like is_complex is_conj is_distributed is_floating_point is_inference is_neg "
    "is_same_size is_signed numel ones_like promote_types rand_like randint_like randn_like result_type zeros_like"
)
_VIEW_METHODS = (
    "adjoint alias as_strided chunk detach detach_ diagonal dsplit expand expand_as hsplit moveaxis movedim narrow "
    "permute select split split_with_sizes squeeze squeeze_ swapaxes swapaxes_ swapdims "
    "swapdims_ t t_ tensor_split transpose transpose_ unbind unflatten unfold unsqueeze unsqueeze_ unsafe_chunk "
    "unsafe_split view view_as view_as_complex view_as_real vsplit"
)
_VIEW_IF_CONTIGUOUS_METHODS = "contiguous flatten ravel reshape reshape_as"
_CONVERSION_METHODS = "bfloat16 bool byte char cpu cuda double float half int long short to type type_as"
_ADDRESS_METHODS = "_storage _typed_storage data_ptr storage untyped_storage"


def _present(owner: object, names: str) -> Iterable[TorchFunction]:
    return (getattr(owner, name) for name in names.split() if hasattr(owner, name))


def _attributes() -> Iterable[tuple[str, GetSetDescriptorType]]:
    for owner in (torch.Tensor, torch._C.TensorBase):
        for name, attribute in vars(owner).items():
            if isinstance(attribute, (GetSetDescriptorType, property)):
                yield name, attribute  # type: ignore[misc]


def _accessors() -> tuple[set[TorchFunction], set[TorchFunction]]:
    """(metadata, views) among the get, set and delete functions of all attributes."""
    metadata: set[TorchFunction] = set()
    views: set[TorchFunction] = set()
    for name, attribute in _attributes():
        (views if name in _VIEW_ATTRIBUTES else metadata).add(attribute.__get__)
        if name not in _WRITING_ATTRIBUTES:
            metadata.update((attribute.__set__, attribute.__delete__))
    return metadata, views


_attribute_metadata, _attribute_views = _accessors()

#: Read or change what describes the tensor, never its bytes; a tensor they return is new.
METADATA: frozenset[TorchFunction] = frozenset(
    {*_attribute_metadata, *_present(torch.Tensor, _METADATA_METHODS), *_present(torch, _METADATA_FUNCTIONS)}
)
#: Return tensors over the same bytes, without reading them.
VIEWS: frozenset[TorchFunction] = frozenset(
    {*_attribute_views, *_present(torch.Tensor, _VIEW_METHODS), *_present(torch, _VIEW_METHODS)}
)
#: Views of a contiguous tensor, copies of another.
VIEWS_IF_CONTIGUOUS: frozenset[TorchFunction] = frozenset(
    {*_present(torch.Tensor, _VIEW_IF_CONTIGUOUS_METHODS), *_present(torch, _VIEW_IF_CONTIGUOUS_METHODS)}
)
#: Return the tensor itself when it already is what is asked for, else a converted copy.
CONVERSIONS: frozenset[TorchFunction] = frozenset(_present(torch.Tensor, _CONVERSION_METHODS))
#: Hand out the tensor's raw memory.
ADDRESSES: frozenset[TorchFunction] = frozenset(_present(torch.Tensor, _ADDRESS_METHODS))
