# SPDX-License-Identifier: Apache-2.0
"""Two gloo ranks that train one model: the bits of unpaged training, and commits that both have or neither.

What the ranks run is in distributed_models.py.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tensorpager as tp
from distributed_models import Case, Run, begin_and_die, compare, go_on, live_and_die, make_optimizer, reference, shard
from gloo_ranks import Ended, digest, digests, run_ranks
from tensorpager import ranks as ranks_module
from tensorpager.export import export_store, verify_store
from tensorpager.joint_commit import stores_of_ranks
from tensorpager.paged_tensor import PagedTensor
from tensorpager.shards import local_of
from torch_models import BUDGET, MIB, Net, evict, resident_pages_of


def results(ended: list[Ended]) -> list[Any]:
    assert [each.error for each in ended] == [None] * len(ended)
    assert [each.signal for each in ended] == [0] * len(ended)
    return [each.result for each in ended]


# -- the same bits -----------------------------------------------------------------------------------------------------

SHARDED = (
    Case("shard"),
    Case("shard", optimizer="SGD", width=255, halves=2, reduces_halves=True),
    Case("shard", width=255, halves=2, options={"reshard_after_forward": False}),
)
REPLICATED = (
    Case("ddp", halves=2),
    Case("page, ddp", optimizer="SGD"),
    Case("ddp", halves=2, options={"gradient_as_bucket_view": True}),
    Case("page, ddp", halves=2, options={"gradient_as_bucket_view": True}),
    Case("ddp", halves=2, options={"find_unused_parameters": True}),
    Case("page, ddp", options={"static_graph": True, "gradient_as_bucket_view": True}),
)


def assert_the_same(case: Case, of_ranks: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]) -> None:
    for expected, got, statistics in of_ranks:
        assert got == expected, case
        assert statistics["resident_bytes_max"] <= BUDGET
        stays = case.options.get("gradient_as_bucket_view", False)
        state = {"AdamW": ["exp_avg", "exp_avg_sq"], "SGD": ["momentum_buffer"]}[case.optimizer]
        assert statistics["paged"] == sorted([*state, "weight", *([] if stays else ["gradient"])])
    assert of_ranks[0][1]["numbers"] != of_ranks[1][1]["numbers"], "the ranks have the same data"


def test_shards_train_bit_for_bit() -> None:
    of_ranks = results(run_ranks(compare, *SHARDED))
    for case, both in zip(SHARDED, zip(*of_ranks, strict=True), strict=True):
        assert_the_same(case, list(both))
        sizes = [statistics["paged_bytes"] + statistics["training_bytes"] for _, _, statistics in both]
        whole = (2 if case.optimizer == "SGD" else 4) * 4 * sum(each.numel() for each in Net(case.width).parameters())
        assert max(sizes) < 0.8 * whole, "a rank pages more than its own shard"
    assert all(statistics["bytes_read"] > 0 for statistics in (each[0][2] for each in of_ranks)), "all of it fitted"


def test_replicas_train_bit_for_bit() -> None:
    of_ranks = results(run_ranks(compare, *REPLICATED))
    for case, both in zip(REPLICATED, zip(*of_ranks, strict=True), strict=True):
        assert_the_same(case, list(both))
        assert both[0][1]["bits"] == both[1][1]["bits"], "the ranks differ"
        assert all(statistics["bytes_read"] > 0 for _, _, statistics in both)


def mixed_and_replicated(rank: int) -> list[tuple[list[float], list[float]]]:
    """Mixed precision, and shards that are replicated too: what the losses of three steps are, unpaged and paged."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    found = []
    for mesh, policy in (
        (init_device_mesh("cpu", (2,)), MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)),
        (init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")), MixedPrecisionPolicy()),
    ):
        losses: tuple[list[float], list[float]] = ([], [])
        for paged in (False, True):
            torch.manual_seed(0)
            model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(3)))
            for layer in model:
                fully_shard(layer, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            optimizer = make_optimizer("AdamW", model)
            pager = tp.page(model, optimizer, budget=BUDGET) if paged else None
            for number in range(3):
                generator = torch.Generator().manual_seed(10 * number + rank)
                loss = model(torch.randn(4, 256, generator=generator)).float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[paged].append(float(loss.detach()))
            if pager is not None:
                pager.close()
        found.append(losses)
    return found


def test_mixed_precision_and_replicated_shards_give_the_same_losses() -> None:
    for of_rank in results(run_ranks(mixed_and_replicated)):
        for unpaged, paged in of_rank:
            assert paged == unpaged
            assert len(set(paged)) == 3


# -- around the paged parameters ---------------------------------------------------------------------------------------


def use_shards(_rank: int) -> dict[str, Any]:
    """What a sharded, paged model does outside of training; it is larger than its budget."""
    torch.manual_seed(0)
    whole = Net(512)
    expected = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    net = shard(whole)
    optimizer = make_optimizer("SGD", net)
    pager = tp.page(net, optimizer, budget=BUDGET)
    told: dict[str, Any] = {}
    told["full"] = {name: torch.equal(each.full_tensor(), expected[name]) for name, each in net.named_parameters()}
    doubled = {name: value.clone() * 2 for name, value in net.state_dict().items()}
    net.load_state_dict(doubled)
    up = net.blocks[0].up.weight
    told["loaded"] = torch.equal(up.full_tensor(), 2 * expected["blocks.0.up.weight"])
    told["paged"] = type(local_of(up)) is PagedTensor
    net(torch.arange(16).reshape(2, 8)).sum().backward()
    small = net.blocks[0].gain.grad
    assert small is not None
    told["small gradient keeps"] = local_of(small).untyped_storage().nbytes() - 4 * local_of(small).numel()
    optimizer.zero_grad()
    for refused in (net.half, net.float):
        with pytest.raises(tp.PagedTensorError, match="paged shard with a permanent address"):
            refused()
    told["resident"] = pager.stats()["resident_bytes_max"]
    pager.close()
    with pytest.raises(tp.ClosedError):
        net(torch.arange(16).reshape(2, 8))
    return told


def test_shards_are_used_like_others() -> None:
    for told in results(run_ranks(use_shards)):
        assert all(told["full"].values())
        assert told["loaded"]
        assert told["paged"]
        assert told["small gradient keeps"] == 0
        assert told["resident"] <= BUDGET


def save_activations(rank: int) -> list[dict[str, str]]:
    """Gathered weights are among what autograd saves, and are gone when activations have to leave."""
    found = []
    for paged in (False, True):
        torch.manual_seed(0)
        net = shard(Net(256))
        optimizer = make_optimizer("AdamW", net)
        pager = tp.page(net, optimizer, budget=BUDGET) if paged else None
        for number in range(2):
            ids = torch.arange(256).reshape(4, 64) * (rank + 3 + number) % 1000
            with nullcontext() if pager is None else pager.activations():
                loss = net(ids).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if pager is not None:
            assert pager.stats()["activations_paged"] > 0
            assert pager.stats()["activation_bytes_max"] > 4 * MIB
        found.append(digests(net, optimizer))
    return found


def test_activations_of_shards_are_paged_and_gathered_weights_left_alone() -> None:
    for unpaged, paged in results(run_ranks(save_activations)):
        assert paged == unpaged


def broadcast_at_first(rank: int) -> dict[str, Any]:
    """Wraps a model after page() that differs on the ranks, and in which one dtype has one tensor alone, absent."""
    torch.manual_seed(rank)
    layers = [torch.nn.Linear(512, 1000, bias=False).double(), *(torch.nn.Linear(1000, 1000) for _ in range(8))]
    model = torch.nn.Sequential(*layers)
    expected = digests(model)
    pager = tp.page(model, make_optimizer("SGD", model), budget=BUDGET)
    first = model[0].weight
    evict(pager, model, first)
    assert resident_pages_of(pager, first) == 0
    wrapper = DistributedDataParallel(model)
    got = digests(model)
    assert got == expected or rank > 0
    evict(pager, model, first)
    pager.reset_stats()
    del wrapper
    DistributedDataParallel(model)
    evict(pager, model, first)
    written = [pager.stats()["bytes_written"]]
    with torch.no_grad():
        first += 1
    evict(pager, model, first)
    written.append(pager.stats()["bytes_written"])
    return {"bits": got, "changed": got != expected, "written": written}


def test_the_first_broadcast_reaches_absent_pages_and_leaves_equal_ones_alone() -> None:
    first, second = results(run_ranks(broadcast_at_first))
    assert first["bits"] == second["bits"]
    assert second["changed"]
    for told in (first, second):
        assert told["written"][0] == 0
        assert told["written"][1] > 0, "nothing is counted"


class Unused(torch.nn.Module):
    """Each rank leaves another layer unused."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(256, 256) for _ in range(3))

    def forward(self, x: torch.Tensor, left_out: int) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = x if number == left_out else layer(x)
        return x


def leave_unused(rank: int, store: str) -> list[dict[str, str]]:
    """Gradients that only other ranks made come without a hook; and stay plain in a bucket, in a commit too."""
    found = []
    for paged in (False, True):
        torch.manual_seed(0)
        inner = Unused()
        options = {"find_unused_parameters": True, "gradient_as_bucket_view": True}
        model = DistributedDataParallel(inner, **options)
        optimizer = make_optimizer("AdamW", model)
        pager = tp.page(model, optimizer, budget=BUDGET, store=store) if paged else None
        for number in range(3):
            model(torch.full((2, 256), 0.1 + number), rank).square().mean().backward()
            if pager is not None and number == 1:
                pager.commit()  # with gradients
                pager.close()
                inner = Unused()
                model = DistributedDataParallel(inner, **options)
                optimizer = make_optimizer("AdamW", model)
                pager = tp.resume(store, model, optimizer, budget=BUDGET)
            optimizer.step()
            optimizer.zero_grad()
        found.append(digests(inner, optimizer))
    return found


def test_unused_parameters_and_gradients_in_buckets_go_on(tmp_path: Path) -> None:
    for unpaged, paged in results(run_ranks(leave_unused, str(tmp_path / "run"))):
        assert paged == unpaged


# -- refusals ----------------------------------------------------------------------------------------------------------


def refused(kind: type[Exception], act: Any) -> str:
    with pytest.raises(kind) as caught:
        act()
    return str(caught.value)


def refuse_wrappers(_rank: int) -> dict[str, str]:
    """What can't be right, by what it is."""
    x = torch.ones(2, 64)

    def made(**options: Any) -> tuple[torch.nn.Module, DistributedDataParallel]:
        inner = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        return inner, DistributedDataParallel(inner, **options)

    def page(model: torch.nn.Module) -> tp.Pager:
        return tp.page(model, make_optimizer("AdamW", model), budget=BUDGET)

    told = {}
    inner, wrapper = made()
    told["inner paged"] = refused(tp.PagedTensorError, lambda: (page(inner), wrapper(x)))
    told["inside"] = refused(tp.PagedTensorError, lambda: page(torch.nn.Sequential(made()[1])))
    told["group"] = refused(tp.PagedTensorError, lambda: page(made(process_group=torch.distributed.new_group())[1]))
    inner, wrapper = made()
    wrapper.register_comm_hook(None, lambda state, bucket: None)  # noqa: ARG005 (names that torch looks at)
    told["hook"] = refused(tp.PagedTensorError, lambda: page(wrapper))
    inner = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    delayed = DistributedDataParallel(
        inner,
        delay_all_reduce_named_params=[("0.weight", inner[0].weight)],
        param_to_hook_all_reduce=inner[1].weight,
    )
    told["delayed"] = refused(tp.PagedTensorError, lambda: page(delayed))
    inner, _ = made()
    page(inner)
    for layer in inner:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    told["sharded late"] = refused(tp.PagedTensorError, lambda: inner(x))
    return told


def test_wrappers_that_would_be_wrong_are_refused() -> None:
    for told in results(run_ranks(refuse_wrappers)):
        assert "made before page(), and knows '0.weight' as it was" in told["inner paged"]
        assert "page the model first, and wrap it then" in told["inside"]
        assert "can't be made anew" in told["group"]
        assert "communication hook is registered already" in told["hook"]
        assert "delay_all_reduce_named_params=" in told["delayed"]
        assert "shard the model first, and page it then" in told["sharded late"]


def refuse_shards(_rank: int, store: str) -> dict[str, str]:
    mesh = init_device_mesh("cpu", (2,))

    def made(device: str = "cpu") -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(64, 64, device=device))
        fully_shard(model, mesh=mesh)
        return model

    told = {}
    model = made()
    told["Adafactor"] = refused(tp.PagedTensorError, lambda: tp.page(model, make_optimizer("Adafactor", model)))
    told["meta"] = refused(tp.PagedTensorError, lambda: tp.page(made("meta"), budget=BUDGET))
    tp.page(model, budget=BUDGET)
    told["again"] = refused(tp.PagedTensorError, lambda: tp.page(model, budget=BUDGET))
    model = made()
    pager = tp.page(model, make_optimizer("AdamW", model), budget=BUDGET, store=store)
    model.set_requires_gradient_sync(False)  # type: ignore[operator]
    model(torch.ones(2, 64)).sum().backward()
    told["not reduced"] = refused(tp.PagedTensorError, pager.commit)
    model.set_requires_gradient_sync(True)  # type: ignore[operator]
    model(torch.ones(2, 64)).sum().backward()
    assert pager.commit() == 2
    from torch.distributed.fsdp import FullyShardedDataParallel

    old = FullyShardedDataParallel(torch.nn.Linear(64, 64), device_id=torch.device("cpu"))
    told["the older one"] = refused(tp.PagedTensorError, lambda: tp.page(old, budget=BUDGET))
    return told


def test_shards_that_would_be_wrong_are_refused(tmp_path: Path) -> None:
    for told in results(run_ranks(refuse_shards, str(tmp_path / "run"))):
        assert "torch.optim.Adafactor needs more than a rank's own shard" in told["Adafactor"]
        assert "'0.weight' is on the meta device" in told["meta"]
        assert "'0.weight' is paged already" in told["again"]
        assert "have not been reduced over the ranks" in told["not reduced"]
        assert "torch.distributed.fsdp.fully_shard" in told["the older one"]


# -- commits -----------------------------------------------------------------------------------------------------------

STEPS = 5


@pytest.fixture(scope="module")
def bits() -> dict[str, list[list[dict[str, str]]]]:
    """By wrapper and rank, those of the unpaged run after each step."""
    return {wrapper: results(run_ranks(reference, wrapper, STEPS)) for wrapper in ("shard", "ddp")}


def assert_goes_on(
    ended: list[Ended], bits: list[list[dict[str, str]]], commit: int | None = None, number: int | None = None
) -> int:
    """Both ranks found the same commit, and came to the same bits as the unpaged run. The steps that it has."""
    told = results(ended)
    assert len({(each["commit"], each["number"]) for each in told}) == 1
    assert commit is None or (told[0]["commit"], told[0]["number"]) == (commit, number)
    for rank, each in enumerate(told):
        assert each["found"] == bits[rank][each["number"]]
        assert each["last"] == bits[rank][STEPS]
        assert each["committed"] == told[0]["commit"] + 1
    return int(told[0]["number"])


# Who dies when in the commit that is number 4, and which commit and step both go on from.
DEATHS = [
    ("shard", {1: "before it prepares"}, 3, 2),
    ("ddp", {0: "prepared"}, 3, 2),
    ("shard", {0: "prepared", 1: "prepared"}, 3, 2),
    ("shard", {0: "before it publishes"}, 4, 3),
    ("ddp", {0: "published", 1: "before it publishes"}, 4, 3),
]


@pytest.mark.parametrize(("wrapper", "moments", "commit", "number"), DEATHS, ids=str)
def test_whoever_is_killed_in_a_commit_both_have_it_or_neither(
    tmp_path: Path,
    bits: dict[str, list[list[dict[str, str]]]],
    wrapper: str,
    moments: dict[int, str],
    commit: int,
    number: int,
) -> None:
    store = str(tmp_path / "run")
    ended = run_ranks(live_and_die, wrapper, store, moments)
    for rank, each in enumerate(ended):
        if rank in moments:
            assert each.signal == signal.SIGKILL
        elif commit == 4:  # it was agreed on
            assert each.result == {"number": 4}
        else:
            assert "commit 4 is undecided" in each.result["error"]
            assert "Most likely another rank has died" in each.result["error"]
            assert "has prepared commit 4 together with others" in each.result["again"]
    # Whoever looks at one store alone sees a commit, whole.
    for each in stores_of_ranks(store):
        assert verify_store(each)[1] == []
    assert_goes_on(run_ranks(go_on, wrapper, store, STEPS), bits[wrapper], commit, number)
    for directory in (tmp_path / "run").iterdir():
        assert sorted(path.name for path in directory.iterdir()) == [
            "lock.tensorpager",
            "pages.tensorpager",
            "root.tensorpager",
        ]
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in directory.iterdir())


@pytest.mark.parametrize(("moments", "commit"), [({1: "prepared"}, 2), ({0: "published", 1: "before it publishes"}, 1)])
def test_whoever_is_killed_in_page_both_begin_anew_or_go_on(
    tmp_path: Path, bits: dict[str, list[list[dict[str, str]]]], moments: dict[int, str], commit: int
) -> None:
    store = str(tmp_path / "run")
    ended = run_ranks(begin_and_die, "shard", store, moments)
    assert [each.signal for each in ended] == [signal.SIGKILL if rank in moments else 0 for rank in range(2)]
    assert commit == 1 or "commit 1 is undecided" in ended[0].result
    # A new run's second commit is the one that Run makes; what was agreed on before is page()'s own.
    assert_goes_on(run_ranks(go_on, "shard", store, STEPS), bits["shard"], commit, 0)


def train_and_commit(rank: int, store: str, moment: float) -> None:
    """Every step a commit, until rank 1 is killed; rank 0 then learns of it."""
    run = Run(rank, "shard", store)
    if rank == 1:
        threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL)).start()
    while True:
        run.step()
        run.commit()


def test_a_kill_at_any_moment_leaves_both_at_one_commit(tmp_path: Path) -> None:
    rng = random.Random(5)
    store = str(tmp_path / "run")
    steps: list[int] = []
    for _ in range(3):
        ended = run_ranks(train_and_commit, store, rng.uniform(0.2, 1.2))
        assert ended[1].signal == signal.SIGKILL
        assert ended[0].error is not None
        told = results(run_ranks(look_and_leave, store))
        assert told[0]["commit"] == told[1]["commit"]
        assert told[0]["number"] == told[1]["number"]
        assert [each["bits"] for each in told] == [each["again"] for each in told]
        steps.append(told[0]["number"])
    assert steps == sorted(steps)
    assert steps[-1] > 0, "killed before anything was committed"


def look_and_leave(rank: int, store: str) -> dict[str, Any]:
    """What is found, beside what unpaged training comes to by as many steps."""
    run = Run(rank, "shard", store)
    assert run.pager is not None
    found = {"commit": run.pager._core.commit_number, "number": run.number, "bits": run.bits()}
    run.pager.close()
    return {**found, "again": reference(rank, "shard", run.number)[-1]}


class Failing:
    """A core whose commits meet a file that can't grow: the kernel's own error."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def prepare_commit(self, record: bytes) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            self._core.prepare_commit(record)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fail_and_go_on(rank: int, store: str) -> dict[str, Any]:
    """A commit that fails on rank 1, one whose state can't be kept on rank 0, and one that does not fail."""
    run = Run(rank, "shard", store)
    run.step()
    assert run.pager is not None
    committer: Any = run.pager._committer
    core = committer._core
    told: dict[str, Any] = {}
    if rank == 1:
        committer._core = Failing(core)
    told["full"] = refused(tp.IoError if rank == 1 else tp.RanksError, run.commit)
    committer._core = core
    run.step()
    state: object = {"model": run.model} if rank == 0 else {"number": run.number}
    pager = run.pager
    told["state"] = refused(TypeError if rank == 0 else tp.RanksError, lambda: pager.commit(state))
    told["number"] = run.commit()
    return told


def test_a_failure_on_one_rank_is_told_to_all_and_training_goes_on(
    tmp_path: Path, bits: dict[str, list[list[dict[str, str]]]]
) -> None:
    store = str(tmp_path / "run")
    first, second = results(run_ranks(fail_and_go_on, store))
    assert "File too large" in second["full"]
    assert "commit 3 failed on 1 of 2 ranks, so it is undone on all. rank 1: IoError" in first["full"]
    assert "state['model'] is of type" in first["state"]
    assert "rank 0: TypeError" in second["state"]
    assert (first["number"], second["number"]) == (3, 3)
    assert_goes_on(run_ranks(go_on, "shard", store, STEPS), bits["shard"], 3, 2)


def hang(rank: int, store: str) -> str:
    """Rank 1 does not come to the commit, and lives on."""
    ranks_module.AGREEMENT_TIMEOUT = ranks_module.AGREEMENT_TIMEOUT * 0 + 2 * SECOND
    run = Run(rank, "ddp", store)
    if rank == 1:
        time.sleep(4)
        return ""
    return refused(tp.RanksError, run.commit)


SECOND = ranks_module.AGREEMENT_TIMEOUT / ranks_module.AGREEMENT_TIMEOUT.total_seconds()


def test_a_rank_that_hangs_is_an_error_after_a_while(
    tmp_path: Path, bits: dict[str, list[list[dict[str, str]]]]
) -> None:
    store = str(tmp_path / "run")
    first, _ = results(run_ranks(hang, store))
    assert "commit 3 is undecided" in first
    assert "2000ms" in first
    assert_goes_on(run_ranks(go_on, "ddp", store, STEPS), bits["ddp"], 2, 0)


# -- the ranks of a run ------------------------------------------------------------------------------------------------


def begin(rank: int, store: str) -> int:
    run = Run(rank, "shard", store)
    assert run.pager is not None
    run.step()
    number = run.commit()
    run.pager.close()
    return number


def try_to_go_on(rank: int, store: str) -> dict[str, str]:
    """The errors of committed(), resume() and page(), of as many ranks as there are."""
    run = Run(rank, "ddp", None)
    arguments: dict[str, Any] = {"model": run.model, "optimizer": run.optimizer, "budget": BUDGET}
    return {
        "committed": refused(tp.TensorPagerError, lambda: tp.committed(store)),
        "resume": refused(tp.TensorPagerError, lambda: tp.resume(store=store, **arguments)),
        "page": refused(tp.TensorPagerError, lambda: tp.page(store=store, **arguments)),
    }


def part_ways(rank: int, store: str) -> list[str]:
    """Two ranks that make different calls."""
    run = Run(rank, "ddp", None)
    arguments: dict[str, Any] = {"store": store, "model": run.model, "optimizer": run.optimizer, "budget": BUDGET}
    return [refused(tp.RanksError, lambda: (tp.page if rank == 0 else tp.resume)(**arguments))]


def test_a_run_goes_on_with_the_ranks_that_it_had(tmp_path: Path) -> None:
    store = tmp_path / "run"
    assert results(run_ranks(begin, str(store))) == [3, 3]
    parts = [store / "rank-0-of-2", store / "rank-1-of-2"]
    assert [tp.committed(part) for part in parts] == [3, 3]
    for told in results(run_ranks(try_to_go_on, str(store), count=3)):
        assert all("holds a run of 2 ranks, and 3 are here" in text for text in told.values())
    for path, message in ((store, "holds a run of 2 ranks, and 1 is here"), (parts[1], "is the store of rank 1 of 2")):
        net = Net(64)
        with pytest.raises(tp.RanksError, match=message):
            tp.resume(path, net, make_optimizer("AdamW", net), budget=BUDGET)
    net = Net(64)
    with pytest.raises(tp.RanksError, match="and 1 is here"):
        tp.page(net, make_optimizer("AdamW", net), budget=BUDGET, store=store)
    # The parts of two ranks exchanged, of two runs, and one that is missing.
    shutil.copytree(store, tmp_path / "kept")
    parts[0].rename(store / "aside")
    parts[1].rename(parts[0])
    (store / "aside").rename(parts[1])
    for told in results(run_ranks(try_to_go_on, str(store))):
        assert "what rank 0 has is of rank 1 of 2" in told["committed"]
        assert "what rank 0 has is of rank 1 of 2" in told["resume"]
        assert "holds a training run already, at commit 3" in told["page"]
    assert results(run_ranks(begin, str(tmp_path / "other"))) == [3, 3]
    shutil.rmtree(parts[1])
    shutil.rmtree(parts[0])
    shutil.copytree(tmp_path / "kept" / parts[0].name, parts[0])
    shutil.copytree(tmp_path / "other" / parts[1].name, parts[1])
    for told in results(run_ranks(try_to_go_on, str(store))):
        assert "commit 3 of rank 1 and that of rank 0 were not made together" in told["resume"]
    shutil.rmtree(parts[1])
    first, second = results(run_ranks(try_to_go_on, str(store)))
    assert "rank 1 does not have commit 3" in first["committed"]
    assert "holds no pagefile" in second["resume"]
    assert "resume() failed on 1 of 2 ranks" in first["resume"]
    with pytest.raises(tp.RanksError, match="rank-1-of-2 is not there"):
        stores_of_ranks(store)


def test_ranks_that_make_different_calls_are_told(tmp_path: Path) -> None:
    first, second = results(run_ranks(part_ways, str(tmp_path / "run")))
    assert "rank 0 is in page(), and rank 1 in resume()" in first[0]
    assert "rank 1 is in resume(), and rank 0 in page()" in second[0]


# -- what other tools get ----------------------------------------------------------------------------------------------


def end_with_bits(rank: int, wrapper: str, store: str | list[str]) -> dict[str, str]:
    """Of the whole weights, after a step that is the unpaged one."""
    run, unpaged = Run(rank, wrapper, store), Run(rank, wrapper, None)
    torch.manual_seed(rank)
    run.step()
    run.commit()
    torch.manual_seed(rank)
    unpaged.step()
    assert digests(run.inner, run.optimizer) == digests(unpaged.inner, unpaged.optimizer)
    return {
        name: digest(each.detach() if wrapper == "ddp" else each.full_tensor())  # type: ignore[operator]
        for name, each in run.inner.named_parameters()
    }


@pytest.mark.parametrize("wrapper", ["shard", "columns", "ddp"])
def test_the_export_of_a_joint_run_has_whole_weights(tmp_path: Path, wrapper: str) -> None:
    from safetensors.torch import load_file

    stores = [tmp_path / "run", tmp_path / "more"] if wrapper == "ddp" else [tmp_path / "run"]
    expected, _ = results(run_ranks(end_with_bits, wrapper, [str(store) for store in stores]))
    assert export_store(stores, tmp_path / "weights.safetensors") > MIB
    weights = load_file(tmp_path / "weights.safetensors")
    assert {name: digest(weights[name]) for name in expected} == expected
    assert "seen" in weights
    parts = stores_of_ranks(stores)
    assert parts == [[str(store / f"rank-{rank}-of-2") for store in stores] for rank in range(2)]
    pages, damaged = verify_store(stores)
    assert damaged == []
    assert pages == sum(verify_store(part)[0] for part in parts) > 2
    if wrapper != "ddp":
        with pytest.raises(tp.RanksError, match="is of rank 0 of 2, and has a part"):
            export_store(parts[0], tmp_path / "part.safetensors")


def test_a_commit_that_is_undecided_is_not_exported(tmp_path: Path) -> None:
    store = str(tmp_path / "run")
    run_ranks(live_and_die, "ddp", store, {0: "before it publishes"})
    with pytest.raises(tp.RanksError, match=r"rank-1-of-2 is at commit 4, and .*rank-0-of-2 at 3: resume the run once"):
        export_store(store, tmp_path / "weights.safetensors")
    assert not (tmp_path / "weights.safetensors.part").exists()
