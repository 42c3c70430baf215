# SPDX-License-Identifier: Apache-2.0
"""A KV connector for vLLM: prompts' blocks go to a store of prefixes, and come back in any later run of the server.

    vllm serve path/to/model --kv-transfer-config '{"kv_connector": "PrefixConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "tensorpager.vllm_connector",
        "kv_connector_extra_config": {"directory": "prefixes", "budget": "50GiB"}}'

vLLM's interface has two sides. The scheduler's asks how many tokens of a request are stored, and says which blocks are
to be loaded before a step and saved after it. The worker's does that, with the tensors vLLM has registered: whatever a
block of vLLM's looks like in a layer, it is kept byte for byte, and found by those alone whose blocks look the same.

extra_config: directory; budget ("10GiB"); namespace (""); block_tokens (256, a multiple of vLLM's block_size);
fingerprint: of the model. Without one every file of the model's directory is read and hashed at the start. A request's
salt, adapter and images are part of what it is found by.

Each rank of tensor and pipeline parallelism keeps its own part. A block that is damaged is reported to vLLM, which
computes it again (kv_load_failure_policy "recompute"). Models with several kinds of KV cache are refused.

Threads: vLLM's. Blocking: loads and saves are done when start_load_kv() and wait_for_save() return.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tensorpager.errors import IoError, PagedTensorError
from tensorpager.prefix_block import ALIGN_BYTES, Part, laid_out
from tensorpager.prefix_chain import block_names, chain_root
from tensorpager.prefix_store import PrefixStore

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorMetadata,
        KVConnectorRole,
    )
except ImportError as error:
    message = "this is a connector for vLLM, which is not installed (or has no KVConnectorBase_V1)"
    raise ImportError(message) from error

if TYPE_CHECKING:
    from tensorpager.prefix_store import StoredBlock

__all__ = ["PrefixConnector", "PrefixTransfers", "Transfer"]

_HASHED_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Transfer:
    """What a worker is to do for one request. tokens: of the prompt from its start, as many as are concerned; context:
    whatever else the blocks depend on; block_ids: of vLLM, for the tokens from the first on. first .. end - 1: the
    tokens to load, or to save whole blocks of."""

    tokens: tuple[int, ...]
    context: str
    block_ids: tuple[int, ...]
    first: int
    end: int


@dataclass
class PrefixTransfers(KVConnectorMetadata):  # type: ignore[misc]
    """From the scheduler's side to the workers', for one step."""

    loads: list[Transfer] = field(default_factory=list)
    saves: list[Transfer] = field(default_factory=list)


@dataclass
class _Followed:
    """A request that is under way, as the scheduler's side knows it."""

    request: Any
    external_tokens: int = 0  # to be loaded when it is scheduled
    block_ids: list[int] = field(default_factory=list)
    saved_tokens: int = 0  # that a worker was told to save, or that are stored


class PrefixConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """See the head of the file. ValueError for a configuration that can't be, IoError for the directory."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        newer = () if kv_cache_config is None else (kv_cache_config,)  # older ones call with two arguments
        super().__init__(vllm_config, role, *newer)
        options = vllm_config.kv_transfer_config.kv_connector_extra_config or {}
        self._block_size: int = vllm_config.cache_config.block_size
        block_tokens = int(options.get("block_tokens", max(256, self._block_size)))
        groups = getattr(kv_cache_config, "kv_cache_groups", None) or []
        if "directory" not in options or block_tokens % self._block_size != 0 or len(groups) > 1:
            msg = (
                "PrefixConnector wants kv_connector_extra_config with a directory, block_tokens that are a multiple of "
                f"vLLM's block_size ({self._block_size}; it is {block_tokens}), and one kind of KV cache "
                f"({len(groups)} there are)"
            )
            raise ValueError(msg)
        self._store = PrefixStore(
            options["directory"],
            options.get("budget", "10GiB"),
            namespace=options.get("namespace", ""),
            block_tokens=block_tokens,
        )
        parallel = vllm_config.parallel_config
        self._ranks = range(int(getattr(parallel, "world_size", 1)))
        self._rank = int(getattr(parallel, "rank", 0)) if role == KVConnectorRole.WORKER else 0
        self._fingerprint = str(options.get("fingerprint") or _of_files(str(vllm_config.model_config.model)))
        self._dtype = str(getattr(vllm_config.cache_config, "cache_dtype", "auto"))
        self._model_dtype = str(getattr(vllm_config.model_config, "dtype", None))
        self._followed: dict[str, _Followed] = {}
        self._layers: dict[str, torch.Tensor] = {}
        self._failed_block_ids: set[int] = set()

    # -- both sides

    @property
    def requires_kv_delivery(self) -> bool:
        """A block that was not saved is computed again: nothing depends on it."""
        return False

    def _names(self, tokens: Sequence[int], context: str, rank: int) -> list[bytes]:
        facts = {
            "format": 1,
            "kept by": "vllm",
            "model": self._fingerprint,
            "model dtype": self._model_dtype,
            "cache dtype": self._dtype,
            "block_size": self._block_size,
            "block_tokens": self._store.block_tokens,
            "namespace": self._store.namespace,
            "context": context,
            "rank": [rank, len(self._ranks)],
        }
        return block_names(chain_root(facts), list(tokens), self._store.block_tokens)

    # -- the scheduler's side

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """(tokens that can be loaded beyond those that vLLM has, False: before the step). Changes nothing."""
        tokens = list(request.prompt_token_ids or [])
        block_tokens = self._store.block_tokens
        whole = max(0, len(tokens) - 1) // block_tokens * block_tokens  # one token at least is computed
        if whole <= num_computed_tokens:
            return 0, False
        found = min(self._store.find(self._names(tokens[:whole], _context_of(request), rank)) for rank in self._ranks)
        return max(0, found * block_tokens - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:  # noqa: ARG002
        """The request has blocks of vLLM now; so many tokens are to be loaded into them."""
        followed = self._followed.setdefault(request.request_id, _Followed(request))
        followed.request = request
        followed.external_tokens = num_external_tokens

    def build_connector_meta(self, scheduler_output: Any) -> PrefixTransfers:
        """What the workers are to load before, and to save after this step."""
        transfers = PrefixTransfers()
        for new in scheduler_output.scheduled_new_reqs:
            followed = self._followed.get(new.req_id)
            if followed is not None:
                followed.block_ids = list(new.block_ids[0])
                scheduled = scheduler_output.num_scheduled_tokens[new.req_id]
                self._schedule(followed, new.num_computed_tokens, scheduled, transfers)
        cached = scheduler_output.scheduled_cached_reqs
        resumed = set(getattr(cached, "resumed_req_ids", ()))
        for index, request_id in enumerate(cached.req_ids):
            followed = self._followed.get(request_id)
            if followed is None:
                continue
            new_block_ids = cached.new_block_ids[index]
            added = list(new_block_ids[0]) if new_block_ids else []
            followed.block_ids = added if request_id in resumed else followed.block_ids + added
            scheduled = scheduler_output.num_scheduled_tokens[request_id]
            self._schedule(followed, cached.num_computed_tokens[index], scheduled, transfers)
        return transfers

    def _schedule(self, followed: _Followed, computed: int, scheduled: int, transfers: PrefixTransfers) -> None:
        """A step computes `scheduled` tokens after `computed`, the last of which may be to be loaded."""
        block_tokens = self._store.block_tokens
        context = _context_of(followed.request)
        tokens = list(followed.request.all_token_ids)
        block_ids = tuple(followed.block_ids)
        if followed.external_tokens > 0:
            first = computed - followed.external_tokens
            whole = -(-computed // block_tokens) * block_tokens
            transfers.loads.append(Transfer(tuple(tokens[:whole]), context, block_ids, first, computed))
            followed.saved_tokens = max(followed.saved_tokens, computed // block_tokens * block_tokens)
            followed.external_tokens = 0
        end = min(computed + scheduled, len(tokens)) // block_tokens * block_tokens
        if end > followed.saved_tokens:
            transfers.saves.append(Transfer(tuple(tokens[:end]), context, block_ids, followed.saved_tokens, end))
            followed.saved_tokens = end

    def request_finished(
        self,
        request: Any,
        block_ids: list[int],  # noqa: ARG002
    ) -> tuple[bool, dict[str, Any] | None]:
        """Its blocks may go: everything was saved after the step that computed it."""
        self._followed.pop(request.request_id, None)
        return False, None

    # -- the worker's side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """All layers' tensors, by name; blocks are their first dimension, or their second behind one of two (keys and
        values). PagedTensorError for others."""
        self._layers = {name: _by_block(name, tensor) for name, tensor in kv_caches.items()}

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Load what this step's requests have stored. What can't be had is in get_block_ids_with_load_errors()."""
        for transfer in self._transfers().loads:
            self._load(transfer)

    def wait_for_layer_load(self, layer_name: str) -> None:  # noqa: ARG002
        """It is loaded."""
        return

    def save_kv_layer(
        self,
        layer_name: str,  # noqa: ARG002
        kv_layer: torch.Tensor,  # noqa: ARG002
        attn_metadata: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Nothing yet: wait_for_save() saves, when the step has been computed."""
        return

    def wait_for_save(self) -> None:
        """Save the blocks that this step has finished. IoError when the drive is full or fails."""
        for transfer in self._transfers().saves:
            self._save(transfer)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of vLLM whose content could not be loaded since the last call."""
        failed, self._failed_block_ids = self._failed_block_ids, set()
        return failed

    def _transfers(self) -> PrefixTransfers:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, PrefixTransfers)
        return metadata

    def _ids_of(self, transfer: Transfer, index: int) -> list[int]:
        """Of vLLM's blocks in block `index`."""
        per_block = self._store.block_tokens // self._block_size
        return list(transfer.block_ids[index * per_block : (index + 1) * per_block])

    def _load(self, transfer: Transfer) -> None:
        block_tokens = self._store.block_tokens
        names = self._names(transfer.tokens, transfer.context, self._rank)
        for index in range(transfer.first // block_tokens, -(-transfer.end // block_tokens)):
            wanted = {
                slot: block_id
                for slot, block_id in enumerate(self._ids_of(transfer, index))
                if transfer.first <= index * block_tokens + slot * self._block_size < transfer.end
            }
            block = self._store.open(names[index]) if index < len(names) else None
            try:
                done = block is not None and self._load_block(block, wanted)
            except IoError:
                done = False  # vLLM computes it, and the drive's trouble shows when something is saved
            finally:
                if block is not None:
                    block.close()
            if not done:
                self._failed_block_ids.update(wanted.values())

    def _load_block(self, block: StoredBlock, wanted: dict[int, int]) -> bool:
        parts = self._parts()
        stored = [(part.layer, part.size_bytes) for part in block.header.parts]
        if stored != [(part.layer, part.size_bytes) for part in parts]:
            block.delete()
            return False
        memory = memoryview(mmap.mmap(-1, _aligned(max(part.size_bytes for part in parts))))
        for part, layer in zip(block.header.parts, self._layers.values(), strict=True):
            if not block.read_part(part, memory):
                return False
            content = torch.frombuffer(memory[: part.size_bytes], dtype=layer.dtype)
            content = content.view(self._store.block_tokens // self._block_size, *layer.shape[1:])
            for slot, block_id in wanted.items():
                layer[block_id].copy_(content[slot])
        return True

    def _save(self, transfer: Transfer) -> None:
        block_tokens = self._store.block_tokens
        names = self._names(transfer.tokens, transfer.context, self._rank)
        parts = self._parts()
        wanted = [
            (names[index], laid_out(names[index - 1] if index > 0 else b"", block_tokens, parts))
            for index in range(transfer.first // block_tokens, transfer.end // block_tokens)
        ]
        per_block = self._store.block_tokens // self._block_size
        place = {name: index for index, name in enumerate(names)}
        blocks = self._store.create(
            [(name, header) for name, header in wanted if len(self._ids_of(transfer, place[name])) == per_block]
        )
        try:
            for block in blocks:
                ids = self._ids_of(transfer, place[block.name])
                for number, layer in enumerate(self._layers.values()):
                    content = layer[torch.tensor(ids, device=layer.device)].contiguous().cpu()
                    payload: Any = content.view(-1).view(torch.uint8).numpy()
                    block.write_part(number, memoryview(payload))
                block.finish(0.0)
        except OSError as error:
            raise (error if isinstance(error, IoError) else self._store.error(error)) from error
        finally:
            for block in blocks:
                block.abandon()

    def _parts(self) -> list[Part]:
        per_block = self._store.block_tokens // self._block_size
        parts = []
        for number, layer in enumerate(self._layers.values()):
            size_bytes = per_block * layer[0].numel() * layer.element_size()
            parts.append(Part(number, 0, size_bytes, "", 1, layer[0].numel(), _name_of(layer.dtype), 0, 0, "uint8"))
        return parts


def _by_block(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A view [blocks, ...] of a layer's tensor."""
    keys_and_values = 2
    if tensor.dim() > keys_and_values and tensor.shape[0] == keys_and_values and tensor.shape[1] > keys_and_values:
        return tensor.transpose(0, 1)  # [2, blocks, ...]
    if tensor.dim() > 1:
        return tensor
    msg = f"the KV cache of layer '{name}' has shape {list(tensor.shape)}: there are no blocks in it"
    raise PagedTensorError(msg)


def _context_of(request: Any) -> str:
    """What a request's blocks depend on beside its tokens."""
    images = [feature.identifier for feature in getattr(request, "mm_features", None) or []]
    adapter = getattr(request, "lora_request", None)
    return repr((getattr(request, "cache_salt", None), getattr(adapter, "lora_name", None), images))


def _of_files(model: str) -> str:
    """A hash of all files of a model's directory. ValueError when it is none."""
    directory = Path(model)
    if not directory.is_dir():
        msg = (
            f"'{model}' is no directory, so its weights can't be told from others: give vLLM one, or a fingerprint in "
            "kv_connector_extra_config that no other model has"
        )
        raise ValueError(msg)
    state = hashlib.blake2b(digest_size=32, person=b"tp model files")
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        state.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while piece := file.read(_HASHED_BYTES):
                state.update(piece)
    return state.hexdigest()


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _aligned(size_bytes: int) -> int:
    return -(-max(1, size_bytes) // ALIGN_BYTES) * ALIGN_BYTES
