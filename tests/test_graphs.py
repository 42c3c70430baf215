# SPDX-License-Identifier: Apache-2.0
"""Functions captured in pieces, replayed on the stand-in device while their pages come and go.

torch's own graphs need a GPU: tests/test_gpu.py. Here those of standin_pieces.py stand for them.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tensorpager as tp
from standin import standin
from standin_pieces import StandinPieces, pieces
from tensorpager.passes import REPLAYS_KNOWN_MAX
from torch_models import MIB, Net, core_of, make_net, some_ids

__all__ = ["pieces", "standin"]

pytestmark = pytest.mark.usefixtures("standin", "pieces")


def paged_net(budget: str = "16MiB", depth: int = 4) -> tuple[Net, Net, tp.Pager]:
    net, twin = make_net(depth)
    return net, twin, tp.page(net, budget=budget, device="cuda:0", host_budget="12MiB")


def other_ids(seed: int) -> torch.Tensor:
    return (some_ids() * 7 + seed) % 1000


def replayed(pager: tp.Pager, graph: Any, *args: Any, **kwargs: Any) -> Any:
    """A call's output, once the stream has come to it. The host does not wait in between."""
    core = core_of(pager)
    core.waits = False
    try:
        output = graph(*args, **kwargs)
    finally:
        core.waits = True
    core.synchronize()
    return output


def page_ids_held(pager: tp.Pager, graph: Any) -> list[int]:
    return [len(core_of(pager).set_pages(set_id)) for set_id in graph.set_ids]


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("piece_bytes", [None, "2MiB", "4MiB", "10MiB"])
def test_replays_give_the_bits_of_the_unpaged_function(piece_bytes: str | None, gates: bool) -> None:
    net, twin, pager = paged_net()
    with pager, torch.no_grad():
        graph = pager.capture(net, some_ids(), piece_bytes=piece_bytes, gates=gates)
        assert graph.output.isnan().all()  # nothing has run yet
        for seed in range(6):
            output = replayed(pager, graph, other_ids(seed))
            assert torch.equal(output, twin(other_ids(seed)))
            assert output is graph.output
        assert pager.stats()["resident_bytes_max"] <= 16 * MIB
        assert pager.stats()["pinned_pages"] == 0
        assert pager.stats()["evictions"] > 0


def test_steps_that_fit_together_are_one_launch() -> None:
    net, _, pager = paged_net()
    with pager:
        counts = []
        for piece_bytes in ("2MiB", "6MiB", "10MiB"):
            graph = pager.capture(net, some_ids(), piece_bytes=piece_bytes)
            StandinPieces.launches = 0
            before = pager.stats()["acquires"]
            graph.replay()
            assert StandinPieces.launches == graph.pieces
            assert pager.stats()["acquires"] - before == len(graph.set_ids)
            counts.append(graph.pieces)
            largest = max(page_ids_held(pager, graph))
            assert largest <= max(int(piece_bytes[:-3]) // 2, 3)  # a single step needs up to three pages
        assert counts[0] > counts[1] > counts[2] >= 17 * 2 // 8


def test_what_fits_the_budget_is_one_launch() -> None:
    net, twin, pager = paged_net("48MiB")
    with pager, torch.no_grad():
        graph = pager.capture(net, some_ids())
        assert graph.pieces == 1
        page_ins = pager.stats()["page_ins"]
        for seed in range(3):
            assert torch.equal(replayed(pager, graph, other_ids(seed)), twin(other_ids(seed)))
        assert pager.stats()["page_ins"] == page_ins


def test_replays_are_planned_for_and_leave_no_faults() -> None:
    net, _, pager = paged_net("20MiB")
    with pager:
        graph = pager.capture(net, some_ids(), piece_bytes="4MiB")
        for _ in range(3):
            graph.replay()
        pager.reset_stats()
        for _ in range(4):
            graph.replay()
        stats = pager.stats()
    assert stats["faults"] == 0
    assert stats["off_schedule_acquires"] == 0
    assert stats["passes"] == 4
    assert stats["schedule"]["steps"] == len(graph.set_ids)
    ahead = stats["schedule"]["frame_count"]  # page-ins of the passes before and after
    assert stats["page_ins"] <= 4 * stats["schedule"]["page_ins_per_pass"] + ahead < stats["page_accesses"]


def test_more_graphs_than_the_core_knows_and_ordinary_passes_between() -> None:
    net, twin, pager = paged_net()
    with pager, torch.no_grad():
        sizes = range(1, REPLAYS_KNOWN_MAX + 4)
        inputs = [other_ids(3).flatten()[:size].reshape(1, size) for size in sizes]
        graphs = [
            pager.capture(net, ids, piece_bytes=2 * MIB * (1 + place % 5), warmup=1) for place, ids in enumerate(inputs)
        ]
        assert len({tuple(graph.set_ids) for graph in graphs}) > REPLAYS_KNOWN_MAX
        for _ in range(2):
            for graph, ids in zip(graphs, inputs, strict=True):
                assert torch.equal(replayed(pager, graph, ids), twin(ids))
                assert pager.stats()["schedule"]["steps"] == len(graph.set_ids)
                assert torch.equal(net(ids), twin(ids))


def test_the_function_runs_so_often_and_what_it_changes_changes() -> None:
    net, twin, pager = paged_net()
    calls = torch.zeros(())
    python_calls = 0

    def step(ids: torch.Tensor) -> torch.Tensor:
        nonlocal python_calls
        python_calls += 1
        calls.add_(1)
        logits: torch.Tensor = net(ids)
        return logits.argmax(-1)

    with pager, torch.no_grad():
        graph = pager.capture(step, some_ids(), warmup=3)
        assert python_calls == 4
        assert calls == 3  # captured, it does nothing
        for seed in range(3):
            assert torch.equal(replayed(pager, graph, other_ids(seed)), twin(other_ids(seed)).argmax(-1))
        assert calls == 6
        assert python_calls == 4


@pytest.mark.parametrize("gates", [False, True])
def test_what_a_graph_writes_in_place_survives_eviction(gates: bool) -> None:
    net, twin, pager = paged_net()

    def halve(model: Net, ids: torch.Tensor) -> torch.Tensor:
        for block in model.blocks:
            block.up.weight.mul_(0.5)
            block.gain.data.add_(1)
        output: torch.Tensor = model(ids)
        return output

    with pager, torch.no_grad():
        graph = pager.capture(lambda ids: halve(net, ids), some_ids(), gates=gates)
        halve(twin, some_ids())
        halve(twin, some_ids())
        for seed in range(3):
            assert torch.equal(replayed(pager, graph, other_ids(seed)), halve(twin, other_ids(seed)))
        assert pager.stats()["copies_out"] > 0
        for name, value in net.state_dict().items():
            assert torch.equal(value, twin.state_dict()[name]), name


def test_one_graph_with_gates_is_one_launch() -> None:
    net, _, pager = paged_net("20MiB")
    with pager:
        graph = pager.capture(net, some_ids(), piece_bytes="4MiB", gates=True)
        assert graph.pieces == 1
        assert graph.set_ids == pager.capture(net, some_ids(), piece_bytes="4MiB").set_ids
        StandinPieces.launches = 0
        for _ in range(3):
            graph.replay()
        assert StandinPieces.launches == 3
        pager.reset_stats()
        for _ in range(3):
            graph.replay()
        core_of(pager).synchronize()
        stats = pager.stats()
        assert stats["faults"] == 0
        assert stats["acquires"] == stats["releases"] == 3 * len(graph.set_ids)


def test_gates_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    net, twin, pager = paged_net()
    core = core_of(pager)
    usable, reason = core.probe_gates(0)
    assert usable
    assert "get on" in reason

    def refuse(_stream: int, _steps_max: int) -> None:
        message = "a CUDA graph can't wait for pages on this stream"
        raise tp.EngineError(message)

    with pager, torch.no_grad():
        monkeypatch.setattr(core, "make_gated_graph", refuse, raising=False)
        with pytest.raises(tp.EngineError, match="can't wait"):
            pager.capture(net, some_ids(), gates=True)
        assert torch.equal(net(some_ids()), twin(some_ids()))


def test_parameters_that_are_used_outside_of_modules() -> None:
    net, twin, pager = paged_net()

    def through(model: Net, x: torch.Tensor) -> torch.Tensor:
        for block in model.blocks:
            x = x @ block.up.weight.t()[:, :512] + block.gain
        return torch.nn.functional.linear(x, model.head.weight[:100])

    x = torch.randn(3, 512)
    with pager, torch.no_grad():
        graph = pager.capture(lambda x: through(net, x), x)
        for _ in range(3):
            y = torch.randn(3, 512)
            assert torch.equal(replayed(pager, graph, y), through(twin, y))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=4000,
        max_position_embeddings=128,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def decoder(model: Any) -> tuple[Any, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """A static cache, and a step that gives the next token [1, 1] after tokens [1, n] at positions [n]."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def step(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = model(tokens, position_ids=positions[None], cache_position=positions, use_cache=True, **{name: cache})
        token: torch.Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
        return token

    return cache, step


def decode(first: Any, step: Any, prompt: torch.Tensor, tokens: int) -> list[int]:
    length = prompt.shape[1]
    token = first(prompt, torch.arange(length))
    result = [int(token)]
    for position in range(length, length + tokens):
        token = step(token, torch.tensor([position])).clone()
        result.append(int(token))
    return result


@pytest.mark.parametrize("gates", [False, True])
def test_a_captured_decode_step_of_a_checkpoint_gives_its_tokens(checkpoint: Path, gates: bool) -> None:
    prompt = torch.arange(5, 17).reshape(1, 12)
    plain = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
    with torch.no_grad():
        _, step = decoder(plain)
        expected = decode(step, step, prompt, 20)
        model = tp.from_pretrained(checkpoint, "16MiB", device="cuda:0", host_budget="16MiB")
        with model.pager as pager:
            cache, step = decoder(model)
            graph = pager.capture(step, prompt[:, :1], torch.tensor([0]), piece_bytes="4MiB", gates=gates)
            cache.reset()  # what the runs before the capture left in it
            assert decode(step, lambda *args: replayed(pager, graph, *args), prompt, 20) == expected
            assert pager.stats()["evictions"] > 100
    assert len(set(expected)) > 2  # each from the cache of those before


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_only_a_device_has_graphs() -> None:
    net, _ = make_net()
    with tp.page(net, budget="32MiB") as pager, pytest.raises(tp.PagedTensorError, match="device='cuda'"):
        pager.capture(net, some_ids())


def test_a_capture_inside_of_a_call_is_refused() -> None:
    net, twin, pager = paged_net()
    errors: list[BaseException] = []

    def nested(_module: Any, args: Any) -> None:
        try:
            pager.capture(net, *args)
        except tp.PagedTensorError as error:
            errors.append(error)

    handle = net.blocks[0].register_forward_pre_hook(nested)
    with pager, torch.no_grad():
        assert torch.equal(net(some_ids()), twin(some_ids()))
        handle.remove()
        assert "inside of a call" in str(errors[0])
        assert torch.equal(replayed(pager, pager.capture(net, some_ids()), other_ids(1)), twin(other_ids(1)))


def test_arguments_that_a_graph_can_not_take() -> None:
    net, twin, pager = paged_net()

    def scaled(ids: torch.Tensor, factor: float, *, shift: Any = None) -> torch.Tensor:
        logits: torch.Tensor = (net(ids) if shift is None else net(ids) + shift) * factor
        return logits

    with pager, torch.no_grad():
        graph = pager.capture(scaled, some_ids(), 2.0, shift=torch.ones(1000))
        shift = torch.randn(1000)
        assert torch.equal(replayed(pager, graph, other_ids(1), 2.0, shift=shift), (twin(other_ids(1)) + shift) * 2.0)
        for args, keywords, match in (
            ((some_ids()[:1], 2.0), {"shift": shift}, r"argument 0 was \(2, 8\) of torch.int64.*and is \(1, 8\)"),
            ((some_ids().float(), 2.0), {"shift": shift}, "argument 0 was .*torch.float32"),
            ((some_ids(), 3.0), {"shift": shift}, "argument 1 was 2.0 .* and is 3.0"),
            ((some_ids(), 2.0), {"shift": None}, "argument shift was"),
            ((some_ids(), 2.0), {}, "captured with 2 arguments and the keywords"),
            ((some_ids(),), {"shift": shift}, "called with 1 and"),
        ):
            launches = StandinPieces.launches
            with pytest.raises(ValueError, match=match):
                graph(*args, **keywords)
            assert StandinPieces.launches == launches
        with pytest.raises(ValueError, match="warmup is 0"):
            pager.capture(net, some_ids(), warmup=0)
        with pytest.raises(ValueError, match="not a size"):
            pager.capture(net, some_ids(), piece_bytes="all")


def test_a_closed_pager_captures_and_replays_nothing() -> None:
    net, _, pager = paged_net()
    graph = pager.capture(net, some_ids())
    no_step = pager.capture(lambda x: x + 1, torch.zeros(3))
    assert torch.equal(replayed(pager, no_step, torch.ones(3)), torch.full((3,), 2.0))
    launches = StandinPieces.launches
    pager.close()
    for call in (graph.replay, no_step.replay, lambda: pager.capture(net, some_ids())):
        with pytest.raises(tp.ClosedError):
            call()
    assert StandinPieces.launches == launches


@pytest.mark.parametrize("gates", [False, True])
def test_a_function_that_raises_leaves_nothing_held(gates: bool) -> None:
    net, twin, pager = paged_net()
    runs = 0

    def fails(ids: torch.Tensor, when: int) -> torch.Tensor:
        nonlocal runs
        runs += 1
        x = net.embed(ids)
        for block in net.blocks:
            x = block(x)
            if runs == when:
                raise KeyError(runs)
        return net.head(x)  # type: ignore[no-any-return]

    with pager, torch.no_grad():
        for when in (1, 2, 3):
            runs = 0
            with pytest.raises(KeyError, match=str(when)):
                pager.capture(fails, some_ids(), when, gates=gates)
            assert pager.stats()["pinned_pages"] == 0
            assert torch.equal(net(some_ids()), twin(some_ids()))
        graph = pager.capture(fails, some_ids(), -1, gates=gates)
        assert torch.equal(replayed(pager, graph, other_ids(2), -1), twin(other_ids(2)))


def test_a_page_that_can_not_be_had_ends_the_replay_between_two_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    net, twin, pager = paged_net()
    core = core_of(pager)
    with pager, torch.no_grad():
        graph = pager.capture(net, some_ids())
        acquire, calls = core.acquire, 0

        def fails(set_id: int, stream: int = 0) -> None:
            nonlocal calls
            calls += 1
            if calls == 5:
                raise tp.IoError(5, "page 7 could not be read")
            acquire(set_id, stream)

        before = StandinPieces.launches
        with monkeypatch.context() as patch:
            patch.setattr(core, "acquire", fails, raising=False)
            with pytest.raises(tp.IoError, match="page 7"):
                graph(other_ids(1))
        assert StandinPieces.launches - before == 4
        assert pager.stats()["pinned_pages"] == 0
        assert torch.equal(replayed(pager, graph, other_ids(1)), twin(other_ids(1)))


def test_a_function_that_takes_another_way_when_it_is_captured_is_right_all_the_same() -> None:
    net, twin, pager = paged_net()
    runs = 0

    def backwards(model: Net, x: torch.Tensor) -> torch.Tensor:
        for block in reversed(model.blocks):
            x = block(x)
        return x

    def turns(x: torch.Tensor) -> torch.Tensor:
        nonlocal runs
        runs += 1
        return backwards(net, x) if runs > 2 else net.blocks[1](x)  # type: ignore[no-any-return]

    x = torch.randn(2, 512)
    with pager, torch.no_grad():
        graph = pager.capture(turns, x)
        for _ in range(3):
            assert torch.equal(replayed(pager, graph, x), backwards(twin, x))
        assert pager.stats()["pinned_pages"] == 0


# -- the seam in the core ----------------------------------------------------------------------------------------------


class Handler:
    """Notes calls, and passes acquires on."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.calls: list[tuple[Any, ...]] = []

    def acquire(self, *args: int) -> None:
        self.calls.append(("acquire", *args))
        self.core.acquire(*args)

    def release(self, *args: int) -> None:
        self.calls.append(("release", *args))
        self.core.release(*args)

    def hold(self, *args: int) -> int:
        self.calls.append(("hold", *args))
        return 77

    def mark_written(self, *args: int) -> None:
        self.calls.append(("mark_written", *args))
        message = "not now"
        raise RuntimeError(message)


def test_page_operations_of_one_thread_and_pager_can_be_redirected() -> None:
    _, _, pager = paged_net()
    _, _, other_pager = paged_net()
    with pager, other_pager:
        core, other = core_of(pager)._native, core_of(other_pager)._native
        handler = Handler(core)
        core.redirect(handler)
        core.acquire(0, 0)
        assert core.hold(1, 2, 3) == 77
        core.release(0, stream=0)
        with pytest.raises(RuntimeError, match="not now"):
            core.mark_written(5)
        expected = [("acquire", 0, 0), ("hold", 1, 2, 3), ("release", 0, 0), ("mark_written", 5)]
        assert handler.calls == expected
        other.acquire(0)
        other.release(0)
        thread = threading.Thread(target=lambda: (core.acquire(0), core.release(0)))
        thread.start()
        thread.join()
        assert handler.calls == expected
        assert core.stats()["acquires"] == core.stats()["releases"] > 0
        core.redirect(None)
        core.acquire(0)
        core.release(0)
        assert handler.calls == expected


def test_sets_can_be_joined() -> None:
    _, _, pager = paged_net()
    with pager:
        core = core_of(pager)
        first, second = set(core.set_pages(0).tolist()), set(core.set_pages(3).tolist())
        joined = core.join_sets([0, 3], "both")
        assert set(core.set_pages(joined).tolist()) == first | second
        assert core.set_name(joined) == "both"
        assert core.join_sets([3, 0], "again") == joined
        with pytest.raises(ValueError, match="no set has the id 999"):
            core.join_sets([0, 999], "none")
        with pytest.raises(ValueError, match="not being captured"):
            core.captured_nothing(0)
