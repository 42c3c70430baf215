# SPDX-License-Identifier: Apache-2.0
"""Weights that lie on the drive as 8-bit codes with a scale for each block, and are 16-bit numbers where they are used.

Half the bytes are read, and on a device half of them cross the link; `csrc/device/quantised_page.hpp` says how a page
is stored. The weights change by it (by at most half a step of their block's scale), once, when they are written: from
then on every pass sees the same numbers, whatever is resident. A weight that is modified afterwards is kept exactly, in
the spill.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from tensorpager.errors import PagedTensorError
from tensorpager.spill import choose_directory, dense_strides

if TYPE_CHECKING:
    import os

    from tensorpager._core import Pager as Core
    from tensorpager._core import QuantisedFile

__all__ = ["STORED_AS", "QuantisedWeights"]

#: What stored_as= may be: the codes' dtype, by torch's name.
STORED_AS = ("int8", "float8_e4m3fn", "float8_e5m2")

_NUMBERS = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


class QuantisedWeights:
    """The weights of one model that are stored so: written one by one, then mapped all at once. Not for concurrent use.

    takes() and write() for each, in any order; then map(); then address(). Files have no names and end with the
    process. ValueError for a stored_as that is not in STORED_AS.
    """

    def __init__(self, core: Core, store: str | os.PathLike[str] | None, stored_as: str) -> None:
        if stored_as not in STORED_AS:
            msg = f"stored_as is {stored_as!r}; weights can be stored as {', '.join(STORED_AS)}"
            raise ValueError(msg)
        self._core = core
        self._directory = choose_directory(store)
        self._stored_as = stored_as
        self._files: dict[torch.dtype, QuantisedFile] = {}
        self._places: dict[int, tuple[torch.dtype, int]] = {}
        self._addresses: dict[torch.dtype, int] = {}
        self.size_bytes = 0  # in the files

    def takes(self, weight: torch.Tensor, owners: Iterable[torch.nn.Module]) -> bool:
        """Whether it is a matrix (or more) of 16-bit numbers that fills a page, and no module's table to look up in.

        Norms, biases and embeddings stay exact: they are small, or few of their rows are read.
        """
        if weight.dtype not in _NUMBERS or weight.dim() < 2:  # noqa: PLR2004 (a matrix)
            return False
        if weight.numel() * weight.element_size() < self._core.page_bytes:
            return False
        return not any(isinstance(owner, (torch.nn.Embedding, torch.nn.EmbeddingBag)) for owner in owners)

    def write(self, key: int, name: str, values: torch.Tensor) -> None:
        """Quantise and write a plain CPU tensor that takes() took; key: of the caller's, for address().

        Blocks on I/O. IoError; PagedTensorError when a value is infinite or NaN.
        """
        from tensorpager._core import QuantisedFile

        file = self._files.get(values.dtype)
        if file is None:
            file = self._files[values.dtype] = QuantisedFile(
                directory=self._directory,
                page_bytes=self._core.page_bytes,
                codes=self._stored_as,
                numbers=_NUMBERS[values.dtype],
            )
        dense = torch.empty_strided(values.shape, dense_strides(values), dtype=values.dtype).copy_(values.detach())
        bits = dense.as_strided((dense.numel(),), (1,)).view(torch.uint16).numpy()
        try:
            place = file.append(bits)
        except ValueError as error:
            msg = f"parameter '{name}' can't be stored as {self._stored_as}: {error}"
            raise PagedTensorError(msg) from error
        self._places[key] = (values.dtype, place)

    def map(self) -> None:
        """Reserve the addresses of all that was written. PagedTensorError when nothing was; MemoryMapError."""
        if not self._places:
            msg = (
                f"stored_as={self._stored_as!r}: no parameter can be stored so. It takes matrices of bfloat16 or "
                f"float16 numbers of at least a page ({self._core.page_bytes} bytes) that are no embeddings; convert "
                "the model (model.bfloat16()), or leave stored_as out"
            )
            raise PagedTensorError(msg)
        for dtype, file in self._files.items():
            self.size_bytes += file.size_bytes
            self._addresses[dtype] = self._core.map_quantised(file).address
        self._files.clear()

    def address(self, key: int) -> int | None:
        """Where the numbers of a weight begin, dense; None for one that was not written."""
        place = self._places.get(key)
        return None if place is None else self._addresses[place[0]] + place[1] * self._core.page_bytes
