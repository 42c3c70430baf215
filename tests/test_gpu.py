# SPDX-License-Identifier: Apache-2.0
"""Paging to a real CUDA device: `pytest -m gpu` where there is one. Skipped everywhere else, with the reason."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import tensorpager as tp
from tensorpager._core import Pager as NativePager
from tensorpager.spill import choose_directory, tensor_at
from torch_models import MIB, Net, some_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and "TENSORPAGER_REQUIRE_GPU" not in os.environ,  # set by bench/gpu_check.py
        reason="torch sees no CUDA device",
    ),
]

PAGE_BYTES = 2 * MIB


def make_device_net() -> tuple[Net, Any]:
    """A net to page, and its twin on the device."""
    torch.manual_seed(0)
    net = Net()
    return net, copy.deepcopy(net).to("cuda")


@pytest.mark.parametrize("host_budget", ["12MiB", "80MiB"])
def test_the_same_bits_as_the_model_on_the_device(host_budget: str) -> None:
    net, twin = make_device_net()
    ids = some_ids().to("cuda")
    with (
        tp.page(net, budget="16MiB", device="cuda", host_budget=host_budget, page_bytes=PAGE_BYTES) as pager,
        torch.no_grad(),
    ):
        for _ in range(20):
            assert torch.equal(net(ids), twin(ids))
        stats = pager.stats()
    assert stats["resident_bytes_max"] <= stats["budget_bytes"] == 16 * MIB
    assert stats["page_ins"] > 0


@pytest.mark.parametrize("stored_as", ["int8", "float8_e4m3fn"])
def test_weights_stored_as_codes_are_the_same_numbers(stored_as: str) -> None:
    torch.manual_seed(1)
    layers = torch.nn.Sequential(*(torch.nn.Linear(1536, 1536) for _ in range(8))).bfloat16()
    on_host = copy.deepcopy(layers)
    x = torch.randn(4, 1536).bfloat16()
    with tp.page(on_host, budget="20MiB", stored_as=stored_as), torch.no_grad():
        expected = copy.deepcopy(on_host).to("cuda")  # the host's numbers, which test_quantised.py holds to torch's
    with (
        tp.page(layers, budget="16MiB", device="cuda", page_bytes=PAGE_BYTES, stored_as=stored_as) as pager,
        torch.no_grad(),
    ):
        for _ in range(20):
            assert torch.equal(layers(x.to("cuda")), expected(x.to("cuda")))
        stats = pager.stats()
    assert stats["dequantised_on_device"] == stats["dequantised"] > 0
    assert stats["bytes_to_device"] < 0.55 * stats["page_ins"] * PAGE_BYTES


def test_on_a_stream_of_its_own_too() -> None:
    net, twin = make_device_net()
    ids = some_ids().to("cuda")
    stream = torch.cuda.Stream()
    with tp.page(net, budget="16MiB", device="cuda", page_bytes=PAGE_BYTES), torch.no_grad():
        expected = twin(ids)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results = [net(ids) for _ in range(20)]
        torch.cuda.synchronize()
        assert all(torch.equal(result, expected) for result in results)


def test_what_is_written_in_place_survives_eviction() -> None:
    net, twin = make_device_net()
    ids = some_ids().to("cuda")
    with (
        tp.page(net, budget="16MiB", device="cuda", host_budget="12MiB", page_bytes=PAGE_BYTES) as pager,
        torch.no_grad(),
    ):
        for model in (net, twin):
            for block in model.blocks:
                block.up.weight.mul_(0.5)
        for _ in range(5):
            assert torch.equal(net(ids), twin(ids))
        assert pager.stats()["copies_out"] > 0


def test_ten_thousand_page_cycles_under_compute() -> None:
    """Each page holds its own number all over; a product keeps the device busy, so that kernels look at pages late."""
    pages = 96
    core = NativePager(
        budget_bytes=24 * PAGE_BYTES,
        page_bytes=PAGE_BYTES,
        spill_directory=choose_directory(None),
        device=torch.cuda.current_device(),
        host_budget_bytes=160 * MIB,
    )
    region = core.map_spill(pages * PAGE_BYTES)
    stream = torch.cuda.current_stream().cuda_stream
    count = PAGE_BYTES // 4

    def of_page(page: int) -> torch.Tensor:  # made anew each time: a failing test prints its variables, and reads them
        return tensor_at(core, region.address + page * PAGE_BYTES, (count,), (1,), torch.int32)

    sets = [core.add_set([(region.address + page * PAGE_BYTES, PAGE_BYTES)], f"page {page}") for page in range(pages)]
    for page in range(pages):
        core.acquire(sets[page], stream)
        of_page(page).fill_(page + 1)
        core.mark_written(sets[page])
        core.release(sets[page], stream)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    busy = torch.randn(2048, 2048, device="cuda")
    order = torch.Generator().manual_seed(1)
    while core.stats()["page_ins"] < 10_000:
        page = int(torch.randint(pages, (1,), generator=order))
        core.acquire(sets[page], stream)
        busy = torch.nn.functional.normalize(busy @ busy)
        wrong += (of_page(page) != page + 1).sum()
        core.release(sets[page], stream)
    assert int(wrong) == 0
    core.close()


def test_what_leaves_the_device_is_a_copy_on_the_host() -> None:
    net, twin = make_device_net()
    with tp.page(net, budget="16MiB", device="cuda", host_budget="12MiB", page_bytes=PAGE_BYTES), torch.no_grad():
        for copied in (net.blocks[0].up.weight.cpu(), net.blocks[0].up.weight.to("cpu")):
            assert copied.device.type == "cpu"
            assert torch.equal(copied, twin.blocks[0].up.weight.cpu())


def test_parameters_that_share_memory_move_together() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = torch.nn.Parameter(torch.randn(1024, 1024))
            self.part = torch.nn.Parameter(self.whole.data[:512])

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs @ self.whole.t() @ self.whole[:, :512] @ self.part

    model = Tied().requires_grad_(False)
    twin = copy.deepcopy(model).to("cuda")
    inputs = torch.randn(4, 1024, device="cuda")
    with tp.page(model, budget="32MiB", device="cuda", host_budget="16MiB", page_bytes=PAGE_BYTES):
        assert torch.equal(model(inputs), twin(inputs))
        with torch.no_grad():
            model.whole[0].mul_(0)
            assert not model.part[0].any()


def test_a_captured_function_gives_the_bits_of_the_unpaged_one() -> None:
    net, twin = make_device_net()
    with (
        tp.page(net, budget="16MiB", device="cuda", host_budget="12MiB", page_bytes=PAGE_BYTES) as pager,
        torch.no_grad(),
    ):
        ids = some_ids().to("cuda")
        for piece_bytes in (None, "4MiB", "10MiB"):
            graph = pager.capture(net, ids, piece_bytes=piece_bytes)
            for seed in range(30):
                other = (ids * 7 + seed) % 1000
                assert torch.equal(graph(other), twin(other))
        stats = pager.stats()
    assert stats["evictions"] > 100
    assert stats["resident_bytes_max"] <= 16 * MIB


def test_what_a_captured_function_writes_in_place_survives_eviction() -> None:
    net, twin = make_device_net()

    def halve(model: Any, ids: torch.Tensor) -> Any:
        for block in model.blocks:
            block.up.weight.mul_(0.5)
        return model(ids)

    ids = some_ids().to("cuda")
    with (
        tp.page(net, budget="16MiB", device="cuda", host_budget="12MiB", page_bytes=PAGE_BYTES) as pager,
        torch.no_grad(),
    ):
        graph = pager.capture(lambda ids: halve(net, ids), ids, warmup=1)
        halve(twin, ids)
        for _ in range(4):
            assert torch.equal(graph(ids), halve(twin, ids))
        assert pager.stats()["copies_out"] > 0


def test_a_capture_of_torchs_own_is_refused_and_not_spoilt() -> None:
    net, twin = make_device_net()
    ids = some_ids().to("cuda")
    x = torch.ones(8, device="cuda")
    with tp.page(net, budget="16MiB", device="cuda", page_bytes=PAGE_BYTES), torch.no_grad():
        assert torch.equal(net(ids), twin(ids))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x + 1
            with pytest.raises(tp.DeviceError, match=r"Pager\.capture\(\)"):
                net(ids)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, x + 1)
        assert torch.equal(net(ids), twin(ids))


GATES = """
import torch
import tensorpager as tp
from test_gpu import PAGE_BYTES, make_device_net
from torch_models import some_ids

net, twin = make_device_net()
ids = some_ids().to("cuda")
with tp.page(net, budget="16MiB", device="cuda", host_budget="12MiB", page_bytes=PAGE_BYTES) as pager, torch.no_grad():
    try:
        graph = pager.capture(net, ids, gates=True)
    except tp.EngineError as error:
        print(f"refused: {error}")
        raise SystemExit(0)
    assert graph.pieces == 1
    for seed in range(30):
        other = (ids * 7 + seed) % 1000
        assert torch.equal(graph(other), twin(other)), seed
    assert pager.stats()["evictions"] > 100
print("right")
"""


def test_one_graph_with_gates_is_right_or_refused() -> None:
    """In a process of its own, which can be ended if the device hangs all the same."""
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", GATES],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("refused: "):
        pytest.skip(done.stdout)
    assert done.stdout.strip() == "right"
