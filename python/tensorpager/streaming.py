# SPDX-License-Identifier: Apache-2.0
"""Tensors that are larger than what may be held at once: one part after the other, while the next ones arrive.

A `Sweep` goes over groups of pages in order. It begins to bring in those that come next, as far ahead as half of the
budget allows, so the drive works while the caller computes with what is held. A group is one step of a pass (a tile of
a weight), which a recording sees and a schedule brings in, or what only the data names (rows of a table, experts), and
no schedule knows. What can't be held, because other open steps have the room, is used without: on the host its pages
come in as they are touched, on a device that is BudgetError.

Threads: any; a Sweep belongs to one. Blocking: iterating waits for I/O, and raises what the core's acquire raises.
Nothing is held any more when the `with` of a Sweep is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from tensorpager.errors import BudgetError, PagedTensorError
from tensorpager.paged_tensor import Backing, PagedTensor, known_cores
from tensorpager.windows import let_go_of_extras

if TYPE_CHECKING:
    from typing_extensions import Self

    from tensorpager._core import Pager as Core
    from tensorpager._core import Ticket

__all__ = [
    "TILE_ROWS",
    "Rows",
    "Sweep",
    "backing_of",
    "fits",
    "is_too_large",
    "page_sets",
    "refuse_device_backward",
    "row_tiles",
    "rows_of",
]

#: Tiles have a multiple of so many rows, the last one what is left over too. Kernels of a matrix product treat the last
#: few columns in other ways; cut at such multiples, all of them are treated as they are in one piece.
TILE_ROWS = 64
#: Small enough that the first one, which nothing can be computed beside, is soon there.
_TILE_BYTES = 8 * 2**20
#: Twice what the core has in flight.
_AHEAD_BYTES = 64 * 2**20


def backing_of(tensor: torch.Tensor) -> Backing | None:
    """What pages the tensor, which may be a plain one over a pager's address space; None for ordinary memory."""
    if type(tensor) is PagedTensor:
        return tensor._tp_backing
    if not known_cores or tensor.layout is not torch.strided:
        return None
    address = tensor.data_ptr()
    for core in list(known_cores):
        if address != 0 and core.contains(address):
            return Backing(core, "a tensor over paged memory")
    return None


def is_too_large(core: Core, span: tuple[int, int]) -> bool:
    """Whether holding (address, size_bytes) leaves less than half of the budget to what is read ahead."""
    return span[1] > core.pinnable_page_count * core.page_bytes // 2


def fits(core: Core, span: tuple[int, int]) -> bool:
    """Whether all of (address, size_bytes) can be held at once, beside nothing else."""
    address, size_bytes = span
    page_count = (address + size_bytes - 1) // core.page_bytes - address // core.page_bytes + 1
    return page_count <= core.pinnable_page_count


def refuse_device_backward(weight: torch.Tensor) -> None:
    """PagedTensorError for a weight that is paged on a device, where training does not work yet."""
    backing = weight._tp_backing if type(weight) is PagedTensor else None
    if backing is not None and backing.on_device:
        msg = (
            f"'{backing.name}' is paged on a device, which works for inference so far: use torch.no_grad(), or "
            "detach() it, and give inputs that require no gradient"
        )
        raise PagedTensorError(msg)


class Rows(NamedTuple):
    """Where the rows of a tensor lie: row i takes the row_bytes from first + i * stride_bytes on."""

    first: int
    row_count: int
    stride_bytes: int
    row_bytes: int

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """(address, size_bytes) of the rows begin..end-1."""
        return self.first + begin * self.stride_bytes, (end - begin - 1) * self.stride_bytes + self.row_bytes

    @property
    def apart(self) -> bool:
        """Whether each row ends before the next one begins, so that some can be had without the others."""
        return self.row_count <= 1 or self.stride_bytes >= self.row_bytes


def rows_of(tensor: torch.Tensor) -> Rows:
    """The rows of a tensor that is not empty: what its first dimension counts. Call it with the guard off."""
    element_bytes = tensor.element_size()
    sizes, strides = tensor.shape[1:], tensor.stride()[1:]
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    stride_bytes = tensor.stride(0) * element_bytes
    return Rows(tensor.data_ptr(), tensor.shape[0], stride_bytes, (last + 1) * element_bytes)


def row_tiles(rows: Rows, core: Core) -> list[tuple[int, int]]:
    """(begin, end) of consecutive rows, about _TILE_BYTES each and an eighth of the budget at most; see TILE_ROWS."""
    limit_bytes = min(max(_TILE_BYTES, core.page_bytes), core.pinnable_page_count * core.page_bytes // 8)
    units = rows.row_count // TILE_ROWS
    units_each = max(1, limit_bytes // (TILE_ROWS * max(rows.stride_bytes, 1)))
    count = max(1, -(-units // units_each))
    bounds = [units * index // count * TILE_ROWS for index in range(count)]
    return list(zip(bounds, [*bounds[1:], rows.row_count], strict=True))


def page_sets(core: Core, address: int, size_bytes: int, name: str) -> list[int]:
    """The set of each page of a range: as many sets as there are pages, whatever ranges are asked for."""
    page_bytes = core.page_bytes
    first, last = address // page_bytes, (address + size_bytes - 1) // page_bytes
    return [core.add_set([(page * page_bytes, 1)], name) for page in range(first, last + 1)]


class Sweep:
    """Goes over groups of set ids; while an item of the iteration is looked at, the pages of its group are held.

        with Sweep(backing, [[first], [second]]) as sweep:
            for position in sweep:
                ...

    steps: each group is a single set, and a step of the pass: recorded, and known to schedules. Else a group may have
    any number of sets, and is neither. dry: only tell the recording which steps there would be.
    """

    def __init__(
        self, backing: Backing, groups: Sequence[Sequence[int]], *, steps: bool = True, dry: bool = False
    ) -> None:
        self._core = backing.core
        self._stream_of = backing.stream
        self._on_device = backing.on_device
        self._groups = groups
        self._steps = steps
        self._dry = dry
        self._tickets: dict[int, list[Ticket]] = {}  # by position
        self._pages: dict[int, set[int]] = {}  # of the tickets
        self._begun = 0  # positions before this one have had their tickets
        self._step_set = -1
        self._step_done: list[None] = []  # one entry once acquired, two once released: [Note: one C call] in windows.py

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._release_step()
        for position in list(self._tickets):
            self._let_go(position)

    def __iter__(self) -> Iterator[int]:
        for position in range(len(self._groups)):
            looks_ahead = not (self._dry or self._is_scheduled(position))
            if looks_ahead:
                self._begin_up_to(position, position)  # before the last one goes: a page at the border of both stays
            self._release_step()
            self._let_go(position - 1)
            if looks_ahead:
                self._begin_up_to(len(self._groups) - 1, position)
            self._hold(position)
            yield position
        self._release_step()
        self._let_go(len(self._groups) - 1)

    def _stream(self) -> int:
        return 0 if self._stream_of is None else self._stream_of()

    def _is_scheduled(self, position: int) -> bool:
        """Whether the schedule has this step next: then it reads ahead, and knows better which pages to give up."""
        return self._steps and self._core.next_set == self._groups[position][0]

    def _begin_up_to(self, last: int, needed: int) -> None:
        """Begin to bring in the groups up to `last`: `needed` in any case, the others as far as they fit."""
        page_bytes = self._core.page_bytes
        limit = min(self._core.pinnable_page_count // 2, max(_AHEAD_BYTES, 2 * page_bytes) // page_bytes)
        self._begun = max(self._begun, needed)
        while self._begun <= last:
            pages = {int(page) for set_id in self._groups[self._begun] for page in self._core.set_pages(set_id)}
            if self._begun > needed and len(pages.union(*self._pages.values())) > limit:
                return
            self._pages[self._begun] = pages
            try:
                self._begin(self._begun)
            except BudgetError:  # beside what other steps hold
                return
            self._begun += 1

    def _hold(self, position: int) -> None:
        """Wait for the pages of a group, which are pinned then, unless that is not possible on the host."""
        if self._steps:
            self._room_made(position, lambda: self._acquire_step(self._groups[position][0]))
        elif position in self._tickets or self._room_made(position, lambda: self._begin(position)):
            for ticket in self._tickets[position]:
                ticket.wait(self._stream())

    def _acquire_step(self, set_id: int) -> None:
        self._step_set, self._step_done = set_id, []
        self._step_done.extend(map(self._core.acquire, (set_id,), (self._stream(),)))

    def _begin(self, position: int) -> None:
        tickets = self._tickets.setdefault(position, [])
        try:
            for set_id in self._groups[position]:
                tickets.append(self._core.prefetch(set_id))
        except BudgetError:
            self._let_go(position)
            raise

    def _room_made(self, position: int, pin: Callable[[], None]) -> bool:
        """Whether `pin` could be done, after letting go of what only speed depends on. On a device it has to be."""
        if _pinned(pin):
            return True
        self._let_go_of_all_but(position)
        if _pinned(pin):
            return True
        let_go_of_extras()
        if self._on_device:
            pin()
        return self._on_device or _pinned(pin)

    def _release_step(self) -> None:
        if len(self._step_done) == 1:
            self._step_done.extend(map(self._core.release, (self._step_set,), (self._stream(),)))

    def _let_go_of_all_but(self, position: int) -> None:
        for other in [each for each in self._tickets if each != position]:
            self._let_go(other)
        self._begun = position + 1

    def _let_go(self, position: int) -> None:
        self._pages.pop(position, None)
        for ticket in self._tickets.pop(position, ()):
            ticket.release(self._stream())


def _pinned(pin: Callable[[], None]) -> bool:
    try:
        pin()
    except BudgetError:
        return False
    return True
