# SPDX-License-Identifier: Apache-2.0
"""Training in a store: what resume() brings back, bit for bit; what it refuses; what a kill in the middle leaves."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tensorpager as tp
from tensorpager.store import bandwidth_weights
from torch_models import MIB, Net, make_net, some_ids

Optimizer = torch.optim.Optimizer
BUDGET = 24 * MIB


def step(model: torch.nn.Module, optimizer: Optimizer, number: int) -> float:
    optimizer.zero_grad()
    loss = model(some_ids() + number).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.item())


def make(kind: Any = torch.optim.AdamW, **options: Any) -> tuple[Net, Optimizer]:
    net, _ = make_net()
    return net, kind(net.parameters(), **{"lr": 1e-3, **options})


def assert_same_training(
    model: torch.nn.Module, optimizer: Optimizer, twin: torch.nn.Module, twin_optimizer: Optimizer
) -> None:
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other), name
        state, other_state = optimizer.state[parameter], twin_optimizer.state[other]
        assert state.keys() == other_state.keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other_state[key])), (name, key)
    for (name, buffer), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    for group, other_group in zip(optimizer.param_groups, twin_optimizer.param_groups, strict=True):
        assert {**group, "params": 0} == {**other_group, "params": 0}


@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adafactor, {})],
)
def test_training_goes_on_bit_for_bit(tmp_path: Path, kind: Any, options: dict[str, Any]) -> None:
    twin, twin_optimizer = make(kind, **options)
    losses = [step(twin, twin_optimizer, number) for number in range(6)]
    model, optimizer = make(kind, **options)
    with tp.page(model, optimizer, budget=BUDGET, store=tmp_path / "run") as pager:
        assert pager.commit() == 2  # page() has made the first
        got = [step(model, optimizer, number) for number in range(3)]
        assert pager.commit({"number": 3}) == 3
        step(model, optimizer, 99)  # is lost
    assert tp.committed(tmp_path / "run") == 3
    model, optimizer = make(kind, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with tp.resume(tmp_path / "run", model, optimizer, budget=2 * BUDGET) as pager:
        assert pager.state == {"number": 3}
        got += [step(model, optimizer, number) for number in range(3, 6)]
        assert got == losses
        assert_same_training(model, optimizer, twin, twin_optimizer)
        assert model.head.weight is model.embed.weight


class Noisy(torch.nn.Module):
    """Draws from torch's generator, and has buffers, small and large, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(512, 2048)
        self.norm = torch.nn.BatchNorm1d(2048)
        self.second = torch.nn.Linear(2048, 512)
        self.second.bias.requires_grad_(False)
        self.register_buffer("table", torch.zeros(300, 512))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table: torch.Tensor = self.get_buffer("table")
        table += x.detach().mean()
        return self.second(torch.nn.functional.dropout(self.norm(self.first(x)), 0.3)) + table[0]


def noisy_run(store: Path | None, stops: bool) -> tuple[list[float], list[float], torch.Tensor, torch.Tensor]:
    """Losses, learning rates, statistics and table of 8 rounds; with a store, in two processes' worth."""
    torch.manual_seed(3)
    random.seed(4)
    np.random.seed(5)  # noqa: NPY002
    losses, rates = [], []

    def made() -> tuple[Noisy, Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        model = Noisy()
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, amsgrad=True)
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=9)

    model, optimizer, scheduler = made()
    pager = None if store is None else tp.page(model, optimizer, budget="32MiB", store=store)
    for number in range(8):
        x = torch.randn(8, 512) * random.random() + float(np.random.rand())  # noqa: NPY002
        for half in (x[:4], x[4:]):  # accumulated
            model(half).square().mean().backward()
            if stops and number == 4 and half is not x[4:] and pager is not None and store is not None:
                pager.commit({"scheduler": scheduler.state_dict(), "rest": x[4:]})  # with gradients
                pager.close()
                model, optimizer, scheduler = made()
                pager = tp.resume(store, model, optimizer, budget="32MiB")
                scheduler.load_state_dict(pager.state["scheduler"])
                x[4:] = pager.state["rest"]
        losses.append(float(model(x).square().mean().item()))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    statistics = model.norm.running_var.clone()
    table = model.get_buffer("table").clone()
    if pager is not None:
        pager.close()
    return losses, rates, statistics, table


def test_buffers_random_states_schedules_and_gradients_go_on_too(tmp_path: Path) -> None:
    losses, rates, statistics, table = noisy_run(None, stops=False)
    got_losses, got_rates, got_statistics, got_table = noisy_run(tmp_path / "run", stops=True)
    assert got_losses == losses
    assert got_rates == rates
    assert torch.equal(got_statistics, statistics)
    assert torch.equal(got_table, table)


def test_a_model_on_the_meta_device_is_enough(tmp_path: Path) -> None:
    twin, twin_optimizer = make()
    model, optimizer = make()
    for number in range(2):
        step(twin, twin_optimizer, number)
    with tp.page(model, optimizer, budget=BUDGET, store=tmp_path) as pager:
        for number in range(2):
            step(model, optimizer, number)
        pager.commit()
    with torch.device("meta"):
        model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with tp.resume(tmp_path, model, optimizer, budget=BUDGET):
        assert model.head.weight is model.embed.weight
        step(model, optimizer, 2)
        step(twin, twin_optimizer, 2)
        assert_same_training(model, optimizer, twin, twin_optimizer)


def test_a_buffer_that_no_commit_has_must_be_there(tmp_path: Path) -> None:
    model = Noisy()
    with tp.page(model, torch.optim.SGD(model.parameters(), lr=1.0), budget="32MiB", store=tmp_path):
        pass
    with torch.device("meta"):
        model = Noisy()
    with pytest.raises(tp.PagedTensorError, match="'scratch' is on the meta device, and not persistent"):
        tp.resume(tmp_path, model, torch.optim.SGD(model.parameters(), lr=1.0))


def test_pages_that_did_not_change_are_not_written_again(tmp_path: Path) -> None:
    model, optimizer = make()
    with tp.page(model, optimizer, budget="256MiB", store=tmp_path) as pager:
        step(model, optimizer, 0)
        optimizer.zero_grad()
        pager.commit()
        pager.reset_stats()
        pager.commit()
        assert pager.stats()["bytes_written"] == 0
        with torch.no_grad():
            model.blocks[0].gain += 1
        pager.commit()
        assert pager.stats()["bytes_written"] == pager.stats()["page_bytes"]


def test_resuming_again_and_again_takes_no_more_room(tmp_path: Path) -> None:
    model, optimizer = make()
    pager = tp.page(model, optimizer, budget=BUDGET, store=tmp_path)
    sizes = []
    for life in range(5):
        step(model, optimizer, life)
        pager.commit()
        pager.close()
        sizes.append(pager.stats()["training_bytes"])
        model, optimizer = make()
        pager = tp.resume(tmp_path, model, optimizer, budget=BUDGET)
    pager.close()
    assert sizes == sizes[:1] * 5


# -- refusals ----------------------------------------------------------------------------------------------------------


def a_store(path: Path) -> None:
    model, optimizer = make()
    with tp.page(model, optimizer, budget=BUDGET, store=path):
        pass


def test_a_store_is_no_store_until_it_has_a_commit(tmp_path: Path) -> None:
    assert tp.committed(tmp_path) == 0
    assert tp.committed(tmp_path / "nothing") == 0
    model, optimizer = make()
    with pytest.raises(tp.IoError, match="holds no pagefile"):
        tp.resume(tmp_path, model, optimizer)
    from tensorpager._core import Pagefile

    Pagefile.create([str(tmp_path)], page_bytes=2 * MIB).close()  # what a kill in page() leaves
    assert tp.committed(tmp_path) == 0
    with pytest.raises(tp.CheckpointError, match="no commit yet"):
        tp.resume(tmp_path, model, optimizer)
    a_store(tmp_path)
    assert tp.committed(tmp_path) == 1


def test_a_run_is_not_written_over(tmp_path: Path) -> None:
    a_store(tmp_path)
    model, optimizer = make()
    with pytest.raises(tp.IoError, match=r"holds a training run already, at commit 1.*resume\(\)"):
        tp.page(model, optimizer, budget=BUDGET, store=tmp_path)
    assert type(model.head.weight) is torch.nn.Parameter
    assert tp.committed(tmp_path) == 1


def test_one_process_at_a_time_has_a_store(tmp_path: Path) -> None:
    model, optimizer = make()
    with tp.page(model, optimizer, budget=BUDGET, store=tmp_path):
        other, other_optimizer = make()
        with pytest.raises(tp.IoError, match="open in another process"):
            tp.resume(tmp_path, other, other_optimizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("depth", "only in the model blocks.4"),
        ("width", "'embed.weight' is of shape"),
        ("dtype", "torch.bfloat16; there it is"),
        ("untied", "only in the model head.weight"),
        ("optimizer", "the optimizer is SGD; there it is AdamW"),
        ("groups", "groups of AdamW hold other parameters"),
        ("two", "2 optimizers are given; there are 1"),
    ],
)
def test_another_model_or_optimizer_is_refused(tmp_path: Path, change: str, message: str) -> None:
    a_store(tmp_path)
    model = Net(width=256) if change == "width" else Net(depth=5 if change == "depth" else 4)
    if change == "dtype":
        model = model.bfloat16()
    if change == "untied":
        model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())
    kind: Any = torch.optim.SGD if change == "optimizer" else torch.optim.AdamW
    parameters = list(model.parameters())
    optimizers = [kind(reversed(parameters) if change == "groups" else parameters, lr=0.1)]
    if change == "two":
        optimizers = [kind(parameters[:3], lr=0.1), kind(parameters[3:], lr=0.1)]
    with pytest.raises(tp.PagedTensorError, match=message):
        tp.resume(tmp_path, model, optimizers, budget=BUDGET)
    assert tp.committed(tmp_path) == 1  # and it is closed


def test_commits_in_the_wrong_place_are_refused(tmp_path: Path) -> None:
    model, optimizer = make()
    with tp.page(model, optimizer, budget=BUDGET, store=tmp_path) as pager:
        model.embed.weight.register_hook(lambda _gradient: pager.commit() and None)
        with pytest.raises(tp.PagedTensorError, match="inside of backward"):
            step(model, optimizer, 0)
        with pytest.raises(TypeError, match=r"state\['model'\] is of type"):
            pager.commit({"model": model})
        assert pager.commit() == 2
    with pytest.raises(tp.ClosedError):
        pager.commit()
    model, optimizer = make()
    with tp.page(model, optimizer, budget=BUDGET) as pager, pytest.raises(tp.PagedTensorError, match="needs a store"):
        pager.commit()


def test_an_optimizer_of_other_tensors_is_refused_by_commit(tmp_path: Path) -> None:
    net, _ = make_net()
    outside = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([*net.parameters(), outside], lr=1e-3)
    with pytest.raises(tp.PagedTensorError, match=r"shape \(3,\) that is no parameter"):
        tp.page(net, optimizer, budget=BUDGET, store=tmp_path)


def test_drives_share_pages_by_what_they_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {str(tmp_path / "a"): (6e9, 3e9, ""), str(tmp_path / "b"): (2e9, 1e9, "")}
    monkeypatch.setattr("tensorpager.measured_hardware.drive_rates", lambda directory, _seconds: rates[directory])
    assert bandwidth_weights(list(rates)) == pytest.approx([2e9, 2e9 / 3])
    assert bandwidth_weights([str(tmp_path / "a")]) == []
    model, optimizer = make()
    with tp.page(model, optimizer, budget=BUDGET, store=[tmp_path / "a", tmp_path / "b"]) as pager:
        for number in range(2):
            step(model, optimizer, number)
        pager.commit()
    sizes = [(tmp_path / name / "pages.tensorpager").stat().st_size for name in "ab"]
    assert sizes[0] == pytest.approx(3 * sizes[1], rel=0.5)  # they grow by 64 MiB at a time
    assert sizes[0] > 1.5 * sizes[1]

    def full(_directory: str, _seconds: float) -> tuple[float, float, str]:
        raise OSError(28, "no room")

    monkeypatch.setattr("tensorpager.measured_hardware.drive_rates", full)
    assert bandwidth_weights(list(rates)) == []
    assert tp.committed([tmp_path / "a", tmp_path / "b"]) == 2


def test_several_directories_share_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorpager.measured_hardware.drive_rates", lambda _directory, _seconds: (1e9, 1e9, ""))
    twin, twin_optimizer = make()
    model, optimizer = make()
    stores = [tmp_path / "a", tmp_path / "b"]
    with tp.page(model, optimizer, budget=BUDGET, store=stores) as pager:
        step(model, optimizer, 0)
        pager.commit()
    sizes = [(store / "pages.tensorpager").stat().st_size for store in stores]
    assert min(sizes) > 0.4 * sum(sizes)
    model, optimizer = make()
    with tp.resume(stores, model, optimizer, budget=BUDGET):
        step(model, optimizer, 1)
        step(twin, twin_optimizer, 0)
        step(twin, twin_optimizer, 1)
        assert_same_training(model, optimizer, twin, twin_optimizer)
    for store in stores:
        for file in store.iterdir():
            assert file.stat().st_mode & 0o777 == 0o600


# -- kill -9 -----------------------------------------------------------------------------------------------------------


def live(store: Path, steps: int, told: Connection) -> None:
    """Trains and commits until it has done so many steps, or is killed."""
    model, optimizer = make()
    if tp.committed(store):
        pager = tp.resume(store, model, optimizer, budget=BUDGET)
        losses = pager.state["losses"] if pager.state else []
    else:
        pager = tp.page(model, optimizer, budget=BUDGET, store=store)
        losses = []
    told.send(len(losses))
    while len(losses) < steps:
        losses.append(step(model, optimizer, len(losses)))
        pager.commit({"losses": losses})
        told.send(len(losses))
    told.send((losses, [float(parameter.detach().double().sum()) for parameter in model.parameters()]))


def test_a_kill_at_any_moment_leaves_the_last_commit(tmp_path: Path) -> None:
    steps = 7
    twin, twin_optimizer = make()
    losses = [step(twin, twin_optimizer, number) for number in range(steps)]
    checksums = [float(parameter.detach().double().sum()) for parameter in twin.parameters()]
    store = tmp_path / "run"
    processes = multiprocessing.get_context("forkserver")  # which imports torch once
    processes.set_forkserver_preload(["tensorpager.resumption"])
    rng = random.Random(11)
    committed = kills = 0
    result = None
    while result is None:
        reader, writer = processes.Pipe(duplex=False)
        worker = processes.Process(target=live, args=(store, steps, writer))
        worker.start()
        writer.close()
        said = [reader.recv()]
        assert said[0] in (committed, committed + 1)  # what was told of is there, or the next one is
        if rng.random() < 0.7:  # or there would be no progress
            said.append(reader.recv())
        time.sleep(rng.uniform(0, 0.4))
        worker.kill()
        worker.join()
        try:
            while True:
                said.append(reader.recv())
        except EOFError:
            pass
        result = next((each for each in said if isinstance(each, tuple)), None)
        committed = max(each for each in said if isinstance(each, int))
        kills += worker.exitcode == -signal.SIGKILL
        assert worker.exitcode in (0, -signal.SIGKILL)
    assert kills >= 3
    assert result == (losses, checksums)
