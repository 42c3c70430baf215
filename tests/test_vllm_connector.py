# SPDX-License-Identifier: Apache-2.0
"""The connector for vLLM, against its interface and against a small engine that calls it as vLLM's does."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tensorpager as tp
import vllm_interface
from prefix_files import chain_in
from vllm_interface import ABSTRACT, INIT, MODULE, OPTIONAL, PROPERTIES, parameters

BLOCK_SIZE = 4  # of vLLM
BLOCK_TOKENS = 8
BLOCKS_FIRST = "blocks first"


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    with vllm_interface.stand_in():
        yield importlib.import_module("tensorpager.vllm_connector")


def is_installed() -> bool:
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return False
    return True


# -- the interface -----------------------------------------------------------------------------------------------------


def test_every_method_has_the_interfaces_parameters(module: Any) -> None:
    connector = module.PrefixConnector
    base = sys.modules[MODULE].KVConnectorBase_V1
    assert issubclass(connector, base)
    assert not getattr(connector, "__abstractmethods__", None)
    own = {name for name, value in vars(connector).items() if inspect.isfunction(value) and not name.startswith("_")}
    known = {**ABSTRACT, **OPTIONAL}
    assert ABSTRACT.keys() <= own <= known.keys(), own - known.keys()
    for name in own:
        assert parameters(getattr(connector, name)) == known[name], name
    assert parameters(connector.__init__) == INIT
    assert isinstance(vars(connector)["requires_kv_delivery"], property)


def test_the_table_is_the_interface() -> None:
    if not is_installed():
        pytest.skip("vLLM is not installed")
    base = importlib.import_module(MODULE).KVConnectorBase_V1
    assert base.__abstractmethods__ == ABSTRACT.keys()
    for name, names in {**ABSTRACT, **OPTIONAL}.items():
        assert parameters(getattr(base, name)) == names, name
    assert parameters(base.__init__) == INIT
    for name in PROPERTIES:
        assert isinstance(inspect.getattr_static(base, name), property), name


def test_without_vllm_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.delitem(sys.modules, "tensorpager.vllm_connector", raising=False)
    with pytest.raises(ImportError, match="connector for vLLM, which is not installed"):
        importlib.import_module("tensorpager.vllm_connector")


# -- an engine ---------------------------------------------------------------------------------------------------------


class Engine:
    """A scheduler and its workers, which share nothing but what vLLM's do. Keys tell token, place, layer and rank."""

    def __init__(
        self, module: Any, directory: Path, *, ranks: int = 1, layout: str = "blocks first", **extra: Any
    ) -> None:
        roles = sys.modules[MODULE].KVConnectorRole
        options = {"directory": str(directory), "block_tokens": BLOCK_TOKENS, "fingerprint": "model", **extra}
        self.layout = layout

        def config(rank: int) -> Any:
            return SimpleNamespace(
                kv_transfer_config=SimpleNamespace(kv_connector_extra_config=options, is_kv_producer=True),
                cache_config=SimpleNamespace(block_size=BLOCK_SIZE, cache_dtype="auto"),
                parallel_config=SimpleNamespace(rank=rank, world_size=ranks),
                model_config=SimpleNamespace(model="nowhere", dtype=torch.float32),
            )

        groups = SimpleNamespace(kv_cache_groups=["one"])
        self.scheduler = module.PrefixConnector(config(0), roles.SCHEDULER, groups)
        self.workers = [module.PrefixConnector(config(rank), roles.WORKER, groups) for rank in range(ranks)]
        shape = (256, 2, BLOCK_SIZE, 6) if layout == BLOCKS_FIRST else (2, 256, BLOCK_SIZE, 6)
        self.caches = [{f"layer {n}": torch.zeros(shape) for n in range(3)} for _ in range(ranks)]
        for worker, caches in zip(self.workers, self.caches, strict=True):
            worker.register_kv_caches(caches)
        self._next_block = 1

    def blocks(self, rank: int, layer: str) -> torch.Tensor:
        tensor = self.caches[rank][layer]
        return tensor if self.layout == BLOCKS_FIRST else tensor.transpose(0, 1)

    def content(self, tokens: list[int], place: int, layer: str, rank: int) -> torch.Tensor:
        """What attention would write at a place: it depends on all tokens up to there."""
        seed = hash((*tokens[: place + 1], layer, rank)) % 2**31
        return torch.randn(2, 6, generator=torch.Generator().manual_seed(seed))

    def request(self, name: str, tokens: list[int], **facts: Any) -> Any:
        return SimpleNamespace(request_id=name, prompt_token_ids=tokens, all_token_ids=list(tokens), **facts)

    def run(self, request: Any, *, local: int = 0, chunk: int = 1000, outputs: int = 0) -> tuple[int, list[int]]:
        """From the first step to the last. Returns tokens that were loaded, and block ids of vLLM."""
        found, before_the_step = self.scheduler.get_num_new_matched_tokens(request, local)
        assert before_the_step is False
        assert (found, False) == self.scheduler.get_num_new_matched_tokens(request, local)  # changes nothing
        self.scheduler.update_state_after_alloc(request, SimpleNamespace(), found)
        ids: list[int] = []
        computed = local + found
        is_new = True
        while computed < len(request.all_token_ids) or outputs > 0:
            if computed == len(request.all_token_ids):
                request.all_token_ids.append(1000 + outputs)
                outputs -= 1
            scheduled = min(chunk, len(request.all_token_ids) - computed)
            added = self._allocate(len(ids), computed + scheduled)
            ids += added
            if is_new and local:
                self._compute(request.all_token_ids, ids, 0, local)  # what vLLM had by itself
            self._step(request, added, computed, scheduled, ids, is_new=is_new)
            computed += scheduled
            is_new = False
        assert self.scheduler.request_finished(request, ids) == (False, None)
        return found, ids

    def _allocate(self, have: int, tokens: int) -> list[int]:
        wanted = -(-tokens // BLOCK_SIZE) - have
        self._next_block += max(0, wanted)
        return list(range(self._next_block - max(0, wanted), self._next_block))

    def _step(
        self, request: Any, added: list[int], computed: int, scheduled: int, ids: list[int], *, is_new: bool
    ) -> None:
        new = SimpleNamespace(req_id=request.request_id, block_ids=(added,), num_computed_tokens=computed)
        old = SimpleNamespace(req_ids=[], resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[])
        if not is_new:
            old.req_ids.append(request.request_id)
            old.new_block_ids.append((added,) if added else None)
            old.num_computed_tokens.append(computed)
        output = SimpleNamespace(
            scheduled_new_reqs=[new] if is_new else [],
            scheduled_cached_reqs=old,
            num_scheduled_tokens={request.request_id: scheduled},
        )
        transfers = self.scheduler.build_connector_meta(output)
        failed: set[int] = set()
        for worker in self.workers:
            worker.bind_connector_metadata(transfers)
            worker.start_load_kv(SimpleNamespace(attn_metadata=None))
            failed |= worker.get_block_ids_with_load_errors()
            assert worker.get_block_ids_with_load_errors() == set()
        for index, block_id in enumerate(ids):  # as vLLM does with what failed
            if block_id in failed:
                self._compute(request.all_token_ids, ids, index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)
        self.failed = failed
        self._compute(request.all_token_ids, ids, computed, computed + scheduled)
        for worker, caches in zip(self.workers, self.caches, strict=True):
            for layer, tensor in caches.items():
                worker.wait_for_layer_load(layer)
                worker.save_kv_layer(layer, tensor, None)
            worker.wait_for_save()
            worker.clear_connector_metadata()

    def _compute(self, tokens: list[int], ids: list[int], first: int, end: int) -> None:
        for rank in range(len(self.workers)):
            for layer in self.caches[rank]:
                for place in range(first, min(end, len(tokens))):
                    block = self.blocks(rank, layer)[ids[place // BLOCK_SIZE]]
                    block[:, place % BLOCK_SIZE] = self.content(tokens, place, layer, rank)

    def check(self, request: Any, ids: list[int]) -> None:
        """Every key of the request is what computing it gives."""
        for rank in range(len(self.workers)):
            for layer in self.caches[rank]:
                for place in range(len(request.all_token_ids)):
                    block = self.blocks(rank, layer)[ids[place // BLOCK_SIZE]]
                    expected = self.content(request.all_token_ids, place, layer, rank)
                    assert torch.equal(block[:, place % BLOCK_SIZE], expected), (rank, layer, place)


def prompt(length: int, start: int = 7) -> list[int]:
    return [(start + 3 * index) % 50 for index in range(length)]


def run_and_check(engine: Engine, tokens: list[int], name: str = "a", **kwargs: Any) -> int:
    facts = {key: kwargs.pop(key) for key in ("cache_salt", "lora_request", "mm_features") if key in kwargs}
    request = engine.request(name, tokens, **facts)
    found, ids = engine.run(request, **kwargs)
    engine.check(request, ids)
    return found


@pytest.mark.parametrize("layout", [BLOCKS_FIRST, "keys and values first"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("chunk", [1000, 5])
def test_a_prompt_is_loaded_by_the_next_server(
    module: Any, tmp_path: Path, layout: str, ranks: int, chunk: int
) -> None:
    tokens = prompt(30)
    assert run_and_check(Engine(module, tmp_path / "s", ranks=ranks, layout=layout), tokens, chunk=chunk) == 0
    engine = Engine(module, tmp_path / "s", ranks=ranks, layout=layout)
    assert run_and_check(engine, tokens, chunk=chunk) == 24
    assert run_and_check(engine, [*tokens, 1, 2, 3], "b", chunk=chunk) == 24
    assert run_and_check(engine, tokens[:17] + [49] * 9, "c", chunk=chunk) == 16
    assert run_and_check(engine, tokens[:24], "d") == 16  # one token is computed
    assert len(list((tmp_path / "s").glob("*.prefix"))) == ranks * (3 + 1 + 1)


def test_what_was_answered_is_kept_too(module: Any, tmp_path: Path) -> None:
    engine = Engine(module, tmp_path / "s")
    request = engine.request("a", prompt(13))
    engine.run(request, outputs=12)
    assert len(request.all_token_ids) == 25
    again = Engine(module, tmp_path / "s")
    assert run_and_check(again, [*request.all_token_ids, 5]) == 24


def test_what_vllm_has_by_itself_is_not_loaded_again(module: Any, tmp_path: Path) -> None:
    tokens = prompt(30)
    run_and_check(Engine(module, tmp_path / "s"), tokens)
    for local in (4, 8, 12, 20, 24, 28):
        engine = Engine(module, tmp_path / "s")
        assert run_and_check(engine, tokens, local=local) == max(0, 24 - local)


@pytest.mark.parametrize("place", ["last layer", "gone"])
def test_a_damaged_block_is_computed(module: Any, tmp_path: Path, place: str) -> None:
    """It is found by name, and when it is loaded it is not what it was: vLLM is told which of its blocks."""
    tokens = prompt(30)
    run_and_check(Engine(module, tmp_path / "s"), tokens)
    engine = Engine(module, tmp_path / "s")
    request = engine.request("a", tokens)
    found, _ = engine.scheduler.get_num_new_matched_tokens(request, 0)
    assert found == 24
    second = chain_in(tmp_path / "s")[1]
    content = bytearray(second.read_bytes())
    content[-4000] ^= 1
    if place == "gone":  # after the scheduler has looked
        engine.scheduler._store.find = lambda names: len(names)
        second.unlink()
    else:
        second.write_bytes(content)
    found, ids = engine.run(request)
    engine.check(request, ids)
    assert engine.failed == set(ids[2:4])
    assert found == 24
    assert not second.exists()


def test_nobody_gets_what_is_another_ones(module: Any, tmp_path: Path) -> None:
    tokens = prompt(30)
    run_and_check(Engine(module, tmp_path / "s"), tokens)
    for extra in ({"fingerprint": "other"}, {"namespace": "b"}, {"block_tokens": 4}):
        assert run_and_check(Engine(module, tmp_path / "s", **extra), tokens) == 0
    assert run_and_check(Engine(module, tmp_path / "s", ranks=2), tokens) == 0
    engine = Engine(module, tmp_path / "s")
    image, other = ([SimpleNamespace(identifier=name)] for name in ("cat", "dog"))
    adapter = SimpleNamespace(lora_name="poet")
    for number, facts in enumerate(
        (
            {"cache_salt": "x"},
            {"cache_salt": "y"},
            {"lora_request": adapter},
            {"mm_features": image},
            {"mm_features": other},
        )
    ):
        assert run_and_check(engine, tokens, f"first {number}", **facts) == 0
        assert run_and_check(engine, tokens, f"second {number}", **facts) == 24
    assert run_and_check(engine, tokens, "plain") == 24


def test_a_request_that_is_resumed_has_other_blocks(module: Any, tmp_path: Path) -> None:
    engine = Engine(module, tmp_path / "s")
    request = engine.request("a", prompt(12))
    engine.scheduler.update_state_after_alloc(request, None, 0)

    def step(new: Any, old: Any, scheduled: int) -> Any:
        return engine.scheduler.build_connector_meta(
            SimpleNamespace(
                scheduled_new_reqs=new, scheduled_cached_reqs=old, num_scheduled_tokens={"a": scheduled, "unknown": 1}
            )
        )

    nothing = SimpleNamespace(req_ids=["unknown"], resumed_req_ids=set(), new_block_ids=[None], num_computed_tokens=[0])
    new = [SimpleNamespace(req_id="a", block_ids=([1],), num_computed_tokens=0)]
    assert step(new, nothing, 4).saves == []
    resumed = SimpleNamespace(
        req_ids=["a"], resumed_req_ids={"a"}, new_block_ids=[([7, 8, 9],)], num_computed_tokens=[0]
    )
    (save,) = step([], resumed, 12).saves
    assert (save.block_ids, save.first, save.end, save.tokens) == ((7, 8, 9), 0, 8, tuple(prompt(12)[:8]))


def test_configurations_that_can_not_be(module: Any, tmp_path: Path) -> None:
    for extra in ({"block_tokens": 6}, {"directory": None}):
        with pytest.raises((ValueError, TypeError)):
            Engine(module, tmp_path / "s", **extra)
    engine = Engine(module, tmp_path / "s")
    with pytest.raises(tp.PagedTensorError, match="no blocks"):
        engine.workers[0].register_kv_caches({"odd": torch.zeros(5)})
    with pytest.raises(ValueError, match="no directory"):
        Engine(module, tmp_path / "s", fingerprint=None)
    roles = sys.modules[MODULE].KVConnectorRole
    config = engine.scheduler._vllm_config
    with pytest.raises(ValueError, match="one kind of KV cache"):
        module.PrefixConnector(config, roles.SCHEDULER, SimpleNamespace(kv_cache_groups=[1, 2]))
    config.kv_transfer_config.kv_connector_extra_config = {}
    with pytest.raises(ValueError, match="with a directory"):
        module.PrefixConnector(config, roles.SCHEDULER, SimpleNamespace(kv_cache_groups=[]))
    assert engine.scheduler.requires_kv_delivery is False


def test_a_model_is_told_by_its_files(module: Any, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    prints = [module._of_files(str(tmp_path / "model"))]
    (tmp_path / "model" / "model.safetensors").write_bytes(b"Weights")
    prints.append(module._of_files(str(tmp_path / "model")))
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "other.safetensors")
    prints.append(module._of_files(str(tmp_path / "model")))
    assert len(set(prints)) == 3
