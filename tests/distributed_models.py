# SPDX-License-Identifier: Apache-2.0
"""Models, and how they are trained, for the tests of several ranks. What a rank of gloo_ranks.py runs is here."""

from __future__ import annotations

import contextlib
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import tensorpager as tp
from gloo_ranks import digests
from tensorpager.joint_commit import JointCommits
from tensorpager.paged_tensor import PagedTensor
from tensorpager.shards import local_of
from torch_models import BUDGET, Net

Optimizer = torch.optim.Optimizer


def make_optimizer(kind: str, model: torch.nn.Module) -> Optimizer:
    if kind == "SGD":
        return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    made: Optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3)
    return made


def ids_of(rank: int, number: int) -> torch.Tensor:
    """Other data on each rank."""
    return (torch.arange(16).reshape(2, 8) * 37 + 11 * rank + 5 * number) % 1000


def shard(net: Net, **options: Any) -> Net:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in net.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)
    return net


@dataclass
class Case:
    """One way to train. wrapper: "shard", "ddp", or "page, ddp" for a wrapper that is made after page()."""

    wrapper: str
    optimizer: str = "AdamW"
    options: dict[str, Any] = field(default_factory=dict)  # of the wrapper
    width: int = 256
    halves: int = 1  # backwards for each step
    reduces_halves: bool = False  # each of them; else the last one alone

    def train(self, rank: int, *, paged: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What came of three steps: losses, norms and bits; and the pager's statistics."""
        torch.manual_seed(0)
        net = Net(self.width)
        early = self.wrapper == "page, ddp" and paged
        model = net if early else self._wrap(net)
        optimizer = make_optimizer(self.optimizer, model)
        pager = tp.page(model, optimizer, budget=BUDGET) if paged else None
        if early:
            model = self._wrap(net)
        facts: dict[str, Any] = {"numbers": []}
        for number in range(3):
            facts["numbers"] += self._step(rank, number, model, net, optimizer)
        facts["bits"] = digests(net, optimizer)
        if pager is None:
            return facts, None
        statistics = {**pager.stats(), "paged": sorted(_kinds_of_paged(net, optimizer))}
        pager.close()
        return facts, statistics

    def _wrap(self, net: Net) -> torch.nn.Module:
        if self.wrapper == "shard":
            return shard(net, **self.options)
        return DistributedDataParallel(net, **self.options)

    def _step(self, rank: int, number: int, model: torch.nn.Module, net: Net, optimizer: Optimizer) -> list[float]:
        optimizer.zero_grad()
        for half in range(self.halves):
            reduces = self.reduces_halves or half == self.halves - 1
            with self._reducing(model, reduces):
                loss = model(ids_of(rank, 10 * number + half)).square().mean()
                loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        return [float(loss.detach()), float(local_of(norm))]

    def _reducing(self, model: torch.nn.Module, reduces: bool) -> contextlib.AbstractContextManager[None]:
        if isinstance(model, DistributedDataParallel):
            return nullcontext() if reduces else model.no_sync()
        model.set_requires_gradient_sync(reduces)  # type: ignore[operator]
        return nullcontext()


def _kinds_of_paged(net: torch.nn.Module, optimizer: Optimizer) -> Iterator[str]:
    """Of the largest parameter's tensors, those that are paged."""
    parameter = net.get_parameter("embed.weight")
    held = {"weight": parameter, "gradient": parameter.grad, **optimizer.state[parameter]}
    for name, value in held.items():
        if isinstance(value, torch.Tensor) and type(local_of(value)) is PagedTensor:
            yield name


def compare(rank: int, *cases: Case) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """For each case what came of it unpaged, paged, and the pager's statistics."""
    results = []
    for case in cases:
        expected, _ = case.train(rank, paged=False)
        got, statistics = case.train(rank, paged=True)
        assert statistics is not None
        results.append((expected, got, statistics))
    return results


# -- runs in a store ---------------------------------------------------------------------------------------------------


class Small(torch.nn.Module):
    """2 MiB, with dropout and a buffer that differs on each rank."""

    def __init__(self, width: int = 301) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(6))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.get_buffer("seen").add_(x.mean())
        for layer in self.layers:
            x = x + torch.nn.functional.dropout(layer(x), 0.1)
        return x


class Run:
    """Training in a store, by steps that are the same in every life of the run."""

    def __init__(self, rank: int, wrapper: str, store: str | list[str] | None) -> None:
        self.rank = rank
        torch.manual_seed(1)
        self.width = 302 if wrapper == "columns" else 301  # columns are shared evenly, or not at all
        self.inner = Small(self.width)
        self.model: torch.nn.Module = self.inner
        if wrapper == "ddp":
            with warnings.catch_warnings():  # of another name in later versions
                warnings.simplefilter("ignore", FutureWarning)
                self.model = DistributedDataParallel(self.inner, broadcast_buffers=False)
        else:
            mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
            placed = (lambda parameter: Shard(parameter.ndim - 1)) if wrapper == "columns" else None
            for layer in self.inner.layers:
                fully_shard(layer, mesh=mesh, shard_placement_fn=placed)
            fully_shard(self.inner, mesh=mesh)
        torch.manual_seed(2 + rank)
        self.optimizer = make_optimizer("AdamW", self.model)
        self.number = 0
        self.pager: tp.Pager | None = None
        if store is None:
            return
        if tp.committed(store):
            self.pager = tp.resume(store, self.model, self.optimizer, budget=BUDGET)
            self.number = (self.pager.state or {"number": 0})["number"]  # page()'s own commit has no state
        else:
            self.pager = tp.page(self.model, self.optimizer, budget=BUDGET, store=store)
            self.pager.commit({"number": 0})

    def step(self) -> None:
        self.optimizer.zero_grad()
        generator = torch.Generator().manual_seed(100 * self.number + self.rank)
        self.model(torch.randn(4, self.width, generator=generator)).square().mean().backward()
        self.optimizer.step()
        self.number += 1

    def commit(self) -> int:
        assert self.pager is not None
        return self.pager.commit({"number": self.number})

    def bits(self) -> dict[str, str]:
        """Of the state, of the buffer and of what the generator would give next."""
        after = f"{self.inner.get_buffer('seen').item()} {torch.get_rng_state().sum()}"
        return {**digests(self.inner, self.optimizer), "after": after}


def reference(rank: int, wrapper: str, steps: int) -> list[dict[str, str]]:
    """The bits after each of so many unpaged steps, from none on."""
    run = Run(rank, wrapper, None)
    found = [run.bits()]
    for _ in range(steps):
        run.step()
        found.append(run.bits())
    return found


class Dying:
    """A core that kills its process at a moment of its commit."""

    def __init__(self, core: Any, moment: str) -> None:
        self._core = core
        self._moment = moment

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def prepare_commit(self, record: bytes) -> None:
        self._die_at("before it prepares")
        self._core.prepare_commit(record)
        self._die_at("prepared")

    def publish_commit(self) -> None:
        self._die_at("before it publishes")
        self._core.publish_commit()
        self._die_at("published")

    def _die_at(self, moment: str) -> None:
        if self._moment == moment:
            os.kill(os.getpid(), signal.SIGKILL)


def live_and_die(rank: int, wrapper: str, store: str, moments: dict[int, str]) -> dict[str, Any]:
    """Two steps, a commit, a step, and a commit in which the ranks of `moments` die."""
    run = Run(rank, wrapper, store)
    run.step()
    run.step()
    run.commit()
    run.step()
    assert run.pager is not None
    committer: Any = run.pager._committer
    if rank in moments:
        committer._core = Dying(committer._core, moments[rank])
    told: dict[str, Any] = {"number": run.pager._core.commit_number}
    try:
        told["number"] = run.commit()
    except tp.RanksError as error:
        told["error"] = str(error)
        try:
            run.commit()
        except tp.TensorPagerError as again:
            told["again"] = str(again)
    return told


def begin_and_die(rank: int, wrapper: str, store: str, moments: dict[int, str]) -> str:
    """As live_and_die(), in the first commit, which page() makes. The error."""
    commit = JointCommits.commit

    def deadly(self: JointCommits, core: Any, record: Any) -> None:
        commit(self, Dying(core, moments[rank]) if rank in moments else core, record)

    JointCommits.commit = deadly  # type: ignore[method-assign]
    try:
        Run(rank, wrapper, store)
    except tp.RanksError as error:
        return str(error)
    return ""


def go_on(rank: int, wrapper: str, store: str, steps: int) -> dict[str, Any]:
    """What the run's next life finds, and the bits that it comes to by so many steps in all."""
    run = Run(rank, wrapper, store)
    assert run.pager is not None
    told = {"commit": run.pager._core.commit_number, "number": run.number, "found": run.bits()}
    while run.number < steps:
        run.step()
    told["last"] = run.bits()
    told["committed"] = run.commit()
    run.pager.close()
    return told
