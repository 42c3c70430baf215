# SPDX-License-Identifier: Apache-2.0
"""Between a KV cache and a store of prefixes: blocks go out when they are finished, and come back in another run.

Layer by layer, so that each page of the cache is written once, and from the last layer to the first, so that what the
first pass begins with is resident. Parts are read, and verified, by a few threads ahead of the one that copies them
into pages; nothing is copied that was not verified. A block that turns out damaged ends the prefix before it.

How long computing takes is measured in the passes that the cache sees (prefix_pace.py), how long loading takes in every
load; what an earlier run took to compute a block is in its header. So a new process knows both once it has read one.

Threads: one at a time, and its own for the drive. Blocking: until all is read or written.
"""

from __future__ import annotations

import mmap
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from tensorpager.errors import IoError, PagedTensorError
from tensorpager.kv_layer import PagedLayer, RecordForm
from tensorpager.prefix_block import ALIGN_BYTES, BlockHeader, Part, laid_out
from tensorpager.prefix_chain import block_names, chain_root
from tensorpager.prefix_pace import Pace, ReadPace
from tensorpager.prefix_plan import ComputeRate, PrefixPlan, plan_prefix
from tensorpager.prefix_store import NewBlock, PrefixStore, StoredBlock

__all__ = ["PrefixReuse"]

#: Parts on their way at a time: enough for a drive to be busy.
_PARTS_AT_A_TIME = 4
#: Blocks that are open at a time.
_OPEN_BLOCKS_MAX = 48

Item = TypeVar("Item")
Result = TypeVar("Result")


class PrefixReuse:
    """See the head of the file. facts: of the model, for the chain's root, whenever they are asked for."""

    def __init__(
        self,
        store: PrefixStore,
        layers: Sequence[PagedLayer],
        facts: Callable[[], Mapping[str, object]],
        pace: Callable[[], Pace],
    ) -> None:
        self._store = store
        self._layers = list(layers)
        self._facts = facts
        self._make_pace = pace
        self._pace: Pace | None = None
        self._read_pace = ReadPace()
        self.plan: PrefixPlan | None = None  # of the last load

    @property
    def pace(self) -> Pace:
        """What is known of how fast passes are."""
        if self._pace is None:
            self._pace = self._make_pace()
        return self._pace

    def _names(self, tokens: torch.Tensor, context: str) -> list[list[bytes]]:
        """Of the blocks of each row."""
        facts = {
            **self._facts(),
            "format": 1,
            "namespace": self._store.namespace,
            "context": context,
            "block_tokens": self._store.block_tokens,
            "windows": [layer.sliding_window for layer in self._layers],
        }
        root = chain_root(facts)
        return [block_names(root, row.numpy(), self._store.block_tokens) for row in tokens.cpu()]

    # -- loading

    def load(self, tokens: torch.Tensor, context: str, *, longest: bool) -> int:
        """Fill the layers, which are empty, with what is stored of these prompts, [rows, tokens]: the tokens of it that
        all rows have in blocks, or fewer when computing some is faster. Returns how many. IoError."""
        block_tokens = self._store.block_tokens
        rows = self._names(tokens, context)
        blocks = (tokens.shape[1] - 1) // block_tokens
        count = min((self._store.find(names[:blocks]) for names in rows), default=0)
        self.plan = None
        if count > 0 and not longest:
            count = self._cheaper(rows, count, tokens.shape[1])
        while count > 0:
            began = time.perf_counter()
            loaded, size_bytes = self._fill([names[:count] for names in rows])
            if loaded == count:
                self._read_pace.loaded(size_bytes, time.perf_counter() - began)
                break
            count = loaded  # what was damaged is not there any more
        for layer in self._layers:
            if count == 0:
                layer.reset()
            layer.saved_until(count * block_tokens)
        return count * block_tokens

    def _cheaper(self, rows: list[list[bytes]], count: int, prompt_tokens: int) -> int:
        """How many blocks to load. All, while it is not known how fast either way is."""
        block_tokens = self._store.block_tokens
        block = self._store.open(rows[0][count - 1])
        if block is None:
            return count  # filling will find that out too
        try:
            size_bytes = sum(part.size_bytes for part in block.header.parts)
            end = count * block_tokens
            self.pace.computed(end - block_tokens, end, block.header.recompute_seconds)
            if self._read_pace.rate is None:
                began = time.perf_counter()
                for _ in self._read([(block, part) for part in block.header.parts]):
                    pass
                self._read_pace.loaded(size_bytes, time.perf_counter() - began)
        finally:
            block.close()
        compute = self.pace.rate
        read = self._read_pace.rate
        if compute is None or read is None:
            return count
        self.plan = plan_prefix(
            prompt_tokens=prompt_tokens,
            stored_tokens=count * block_tokens,
            block_tokens=block_tokens,
            bytes_per_token=size_bytes / block_tokens * len(rows),
            read=read,
            compute=_for_rows(compute, len(rows)),
        )
        return self.plan.load_tokens // block_tokens

    def _fill(self, rows: list[list[bytes]]) -> tuple[int, int]:
        """(blocks that are there in every row, bytes read). Fewer than were asked for: one was gone, or damaged."""
        count = len(rows[0])
        size_bytes = 0
        for start in range(0, count, max(1, _OPEN_BLOCKS_MAX // len(rows))):
            end = min(count, start + max(1, _OPEN_BLOCKS_MAX // len(rows)))
            opened: list[list[StoredBlock]] = []
            try:
                for index in range(start, end):
                    blocks = self._open([names[index] for names in rows])
                    if blocks is None:
                        return index, 0
                    opened.append(blocks)
                if start == 0:
                    self._begin(opened[0][0].header, len(rows), count)
                size_bytes += self._fill_from(opened, start)
            except _DamagedError as damage:
                return start + damage.index, 0
            finally:
                for block in (block for blocks in opened for block in blocks):
                    block.close()
        return count, size_bytes

    def _open(self, names: list[bytes]) -> list[StoredBlock] | None:
        """The blocks of all rows at one place; None when one of them is not what it has to be."""
        blocks: list[StoredBlock] = []
        for name in names:
            block = self._store.open(name)
            if block is not None:
                blocks.append(block)
                if self._fits(block.header):
                    continue
                block.delete()
            for each in blocks:
                each.close()
            return None
        return blocks

    def _fits(self, header: BlockHeader) -> bool:
        """A part for each layer, of the right size. (The name says so; a size is looked at before it is used.)"""
        if header.tokens != self._store.block_tokens or len(header.parts) != len(self._layers):
            return False
        return all(
            part.layer == number and part.size_bytes == header.tokens * _form_of(part, 1).row_bytes > 0
            for number, part in enumerate(header.parts)
        )

    def _begin(self, header: BlockHeader, row_count: int, count: int) -> None:
        end = count * self._store.block_tokens
        for layer, part in zip(self._layers, header.parts, strict=True):
            layer.begin_restore(_form_of(part, row_count), self._first_block(layer, end) * header.tokens, end)

    def _first_block(self, layer: PagedLayer, end: int) -> int:
        """The first block that a layer with so many tokens still sees."""
        if layer.sliding_window is None:
            return 0
        return max(0, end - layer.sliding_window + 1) // self._store.block_tokens

    def _fill_from(self, opened: list[list[StoredBlock]], start: int) -> int:
        size_bytes = 0
        block_tokens = self._store.block_tokens
        for number, layer in reversed(list(enumerate(self._layers))):
            seen_from = self._first_block(layer, layer.get_seq_length()) - start
            wanted = [(index, row) for index in range(max(0, seen_from), len(opened)) for row in range(len(opened[0]))]
            parts = [(opened[index][row], opened[index][row].header.parts[number]) for index, row in wanted]
            for (index, row), payload in zip(wanted, self._read(parts), strict=True):
                if payload is None:
                    raise _DamagedError(index)
                part = opened[index][row].header.parts[number]
                if _form_of(part, len(opened[0])) != layer.form:
                    opened[index][row].delete()
                    raise _DamagedError(index)
                begin = (start + index) * block_tokens
                self._copy(layer.records(row, begin, begin + block_tokens), _split(payload, part), into_pages=True)
                size_bytes += part.size_bytes
        return size_bytes

    def _copy(
        self, records: tuple[torch.Tensor, torch.Tensor], parts: tuple[torch.Tensor, torch.Tensor], *, into_pages: bool
    ) -> None:
        for record, part in zip(records, parts, strict=True):
            if into_pages:
                record.copy_(part.transpose(0, 1))
            else:
                part.transpose(0, 1).copy_(record)

    def _read(self, parts: list[tuple[StoredBlock, Part]]) -> Iterator[memoryview | None]:
        """The payload of each part in order, valid until the next one is asked for; None when it is damaged."""

        def work(item: tuple[StoredBlock, Part], memory: memoryview) -> memoryview | None:
            block, part = item
            return memory[: part.size_bytes] if block.read_part(part, memory) else None

        size_bytes = max((part.size_bytes for _, part in parts), default=0)
        return _ahead(work, parts, size_bytes)

    # -- saving

    def save(self, tokens: torch.Tensor, context: str) -> int:
        """Store the blocks of these prompts, [rows, tokens], that the layers have whole and the store has not. Returns
        the blocks that were stored: fewer than there are when the budget does not allow for all. IoError."""
        length = min(layer.get_seq_length() for layer in self._layers)
        whole = min(tokens.shape[1], length) // self._store.block_tokens
        forms = [layer.form for layer in self._layers]
        if whole == 0 or any(form is None or form.batch != tokens.shape[0] for form in forms):
            if whole > 0:
                msg = f"the cache holds {forms[0]}, and was given tokens of {tokens.shape[0]} rows"
                raise PagedTensorError(msg)
            return 0
        for layer in self._layers:
            layer.settle()
        rows = [names[:whole] for names in self._names(tokens[:, : whole * self._store.block_tokens], context)]
        saved = 0
        done: set[bytes] = set()  # rows that begin alike share their blocks
        for row, names in enumerate(rows):
            saved += self._save_row(row, names, done)
            done.update(names)
        for layer in self._layers:
            layer.saved_until(whole * self._store.block_tokens)
        return saved

    def _save_row(self, row: int, names: list[bytes], done: set[bytes]) -> int:
        block_tokens = self._store.block_tokens
        gone = max(layer.stored_from for layer in self._layers)
        first = next((index for index, name in enumerate(names) if name not in done), len(names))
        first = max(first, self._store.find(names))
        if first * block_tokens < gone:  # a window is past them, and they were not kept
            return 0
        saved = 0
        for start in range(first, len(names), _OPEN_BLOCKS_MAX):
            headers = [
                (name, self._header(names[index - 1] if index > 0 else b""))
                for index, name in list(enumerate(names))[start : start + _OPEN_BLOCKS_MAX]
            ]
            blocks = self._store.create(headers)
            place = {name: index for index, name in enumerate(names)}
            try:
                self._write(row, [(place[block.name] * block_tokens, block) for block in blocks])
                for block in blocks:
                    block.finish(self._seconds(place[block.name]))
                    saved += 1
            except OSError as error:
                if isinstance(error, IoError):
                    raise
                raise self._store.error(error) from error
            finally:
                for block in blocks:
                    block.abandon()
            if len(blocks) < len(headers):
                break
        return saved

    def _header(self, parent: bytes) -> BlockHeader:
        tokens = self._store.block_tokens
        parts = []
        for number, layer in enumerate(self._layers):
            form = layer.form
            assert form is not None
            of_keys = (form.key_heads, form.key_size, _name_of(form.key_dtype))
            of_values = (form.value_heads, form.value_size, _name_of(form.value_dtype))
            parts.append(Part(number, 0, tokens * form.row_bytes, "", *of_keys, *of_values))
        return laid_out(parent, tokens, parts)

    def _seconds(self, index: int) -> float:
        rate = self.pace.rate
        if rate is None:
            return 0.0
        tokens = self._store.block_tokens
        return rate.flops(index * tokens, (index + 1) * tokens) / rate.flops_per_second

    def _write(self, row: int, blocks: list[tuple[int, NewBlock]]) -> None:
        """All parts of the blocks, which begin at these tokens."""
        if not blocks:
            return
        block_tokens = self._store.block_tokens
        part_bytes = max(part.size_bytes for _, block in blocks for part in block.header.parts)
        memories = [mmap.mmap(-1, _aligned(part_bytes)) for _ in range(_PARTS_AT_A_TIME)]
        with ThreadPoolExecutor(_PARTS_AT_A_TIME) as pool:
            busy: deque[Future[None]] = deque()
            turn = 0
            for number, layer in enumerate(self._layers):
                for begin, block in blocks:
                    if len(busy) == _PARTS_AT_A_TIME:
                        busy.popleft().result()
                    part = block.header.parts[number]
                    payload = memoryview(memories[turn % _PARTS_AT_A_TIME])[: part.size_bytes]
                    self._copy(layer.records(row, begin, begin + block_tokens), _split(payload, part), into_pages=False)
                    busy.append(pool.submit(block.write_part, number, payload))
                    turn += 1
            while busy:
                busy.popleft().result()


class _DamagedError(Exception):
    """A block at this place of those that are open is not what it should be; it has been deleted."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


def _for_rows(rate: ComputeRate, rows: int) -> ComputeRate:
    return ComputeRate(
        rate.flops_per_second, rows * rate.flops_per_token, rows * rate.flops_per_pair, rate.pass_seconds
    )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_of(name: str) -> torch.dtype:
    """complex128, which no layer is of, for what is none."""
    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) else torch.complex128


def _form_of(part: Part, batch: int) -> RecordForm:
    of_keys = (part.key_heads, part.key_size, _dtype_of(part.key_dtype))
    return RecordForm(batch, *of_keys, part.value_heads, part.value_size, _dtype_of(part.value_dtype))


def _split(payload: memoryview, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    """A part's keys and values, [tokens, heads, size] each, over its bytes."""
    form = _form_of(part, 1)
    tokens = len(payload) // form.row_bytes
    keys_bytes = tokens * form.key_heads * form.key_size * form.key_dtype.itemsize
    keys = torch.frombuffer(payload[:keys_bytes], dtype=form.key_dtype)
    values = torch.frombuffer(payload[keys_bytes:], dtype=form.value_dtype)
    return keys.view(tokens, form.key_heads, form.key_size), values.view(tokens, form.value_heads, form.value_size)


def _aligned(size_bytes: int) -> int:
    return -(-max(1, size_bytes) // ALIGN_BYTES) * ALIGN_BYTES


def _ahead(work: Callable[[Item, memoryview], Result], items: Iterable[Item], size_bytes: int) -> Iterator[Result]:
    """work(item, memory) for each item, some ahead in threads, each with memory of its own until the next is asked
    for. Results in order."""
    memories = [memoryview(mmap.mmap(-1, _aligned(size_bytes))) for _ in range(_PARTS_AT_A_TIME + 1)]
    with ThreadPoolExecutor(_PARTS_AT_A_TIME) as pool:
        under_way: deque[Future[Result]] = deque()
        for turn, item in enumerate(items):
            if len(under_way) == _PARTS_AT_A_TIME:
                yield under_way.popleft().result()
            under_way.append(pool.submit(work, item, memories[turn % len(memories)]))
        while under_way:
            yield under_way.popleft().result()
