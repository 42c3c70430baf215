# SPDX-License-Identifier: Apache-2.0
"""Training with gradients and optimizer state paged: the same bits as unpaged, whatever the loop does."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint

import tensorpager as tp
from standin import standin
from tensorpager.paged_tensor import PagedTensor
from torch_models import MIB, Net, make_net, some_ids

__all__ = ["standin"]

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1),
    "AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=True),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
}


def make_adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def backward(model: torch.nn.Module, step: int) -> torch.Tensor:
    loss: torch.Tensor = model(some_ids() + step).square().mean()
    loss.backward()
    return loss


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        losses.append(backward(model, step).detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses


def assert_same(model: torch.nn.Module, optimizer: Any, twin: torch.nn.Module, twin_optimizer: Any) -> None:
    for (name, parameter), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, expected), name
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        state, expected_state = optimizer.state[parameter], twin_optimizer.state[expected]
        assert state.keys() == expected_state.keys()
        for key, value in state.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, expected_state[key]), key


# 18 MiB of weights, as much in gradients, and up to twice as much in state: 72 MiB, these are a third and a half.
@pytest.mark.parametrize("budget", ["24MiB", "36MiB"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_bits_as_unpaged(name: str, budget: str) -> None:
    net, twin = make_net(depth=2)
    optimizer, twin_optimizer = OPTIMIZERS[name](net.parameters()), OPTIMIZERS[name](twin.parameters())
    with tp.page(net, optimizer, budget=budget) as pager:
        losses = train(net, optimizer, range(4))
        assert all(map(torch.equal, losses, train(twin, twin_optimizer, range(4))))
        assert_same(net, optimizer, twin, twin_optimizer)
        stats = pager.stats()
    assert stats["resident_bytes_max"] <= stats["budget_bytes"]
    assert stats["page_ins"] > 0


@pytest.fixture
def trained() -> Iterator[tuple[Net, torch.optim.AdamW, Net, torch.optim.AdamW, tp.Pager]]:
    """A small net paged with its optimizer, and its twin."""
    net, twin = make_net(depth=2)
    optimizer, twin_optimizer = make_adamw(net), make_adamw(twin)
    with tp.page(net, optimizer, budget="40MiB") as pager:
        yield net, optimizer, twin, twin_optimizer, pager


Trained = tuple[Net, torch.optim.AdamW, Net, torch.optim.AdamW, tp.Pager]


def test_large_gradients_and_state_are_paged(trained: Trained) -> None:
    net, optimizer, _, _, pager = trained
    train(net, optimizer, range(2))
    large = net.blocks[0].up.weight
    assert type(large.grad) is PagedTensor
    assert {key for key, value in optimizer.state[large].items() if type(value) is PagedTensor} == {
        "exp_avg",
        "exp_avg_sq",
    }
    first = pager.stats()["training_bytes"]
    assert first >= 3 * sum(p.nbytes for p in net.parameters() if p.nbytes > MIB)
    train(net, optimizer, range(2, 5))
    assert pager.stats()["training_bytes"] == first  # the same places, step for step


def test_a_gradient_that_is_no_more_is_not_written(trained: Trained) -> None:
    net, optimizer, _, _, pager = trained
    train(net, optimizer, range(4))
    optimizer.zero_grad()
    with torch.no_grad():
        for _ in range(3):
            net(some_ids())
    before = pager.stats()["writebacks"]
    for _ in range(4):
        backward(net, 0)
        optimizer.zero_grad()
    gradient_pages = sum(p.nbytes for p in net.parameters()) // (2 * MIB)
    assert pager.stats()["writebacks"] - before < 2 * gradient_pages  # of 4 times as many that were made


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_accumulated(trained: Trained, set_to_none: bool) -> None:
    net, optimizer, twin, twin_optimizer, pager = trained
    for model, its in ((net, optimizer), (twin, twin_optimizer)):
        for step in range(4):
            for micro in range(3):
                backward(model, 3 * step + micro)
            its.step()
            its.zero_grad(set_to_none=set_to_none)
    assert_same(net, optimizer, twin, twin_optimizer)
    assert pager.stats()["passes"] == 4  # a pass is a whole step


def test_a_gradient_that_somebody_keeps_stays(trained: Trained) -> None:
    net, optimizer, _, _, _ = trained
    train(net, optimizer, range(1))
    kept = net.blocks[1].down.weight.grad
    others = [
        net.blocks[1].up.weight.grad[:, 3:5],
        net.blocks[0].up.weight.grad.detach(),
        net.blocks[0].down.weight.grad.data,
        net.embed.weight.grad.view(-1),
    ]
    before, others_before = kept.clone(), [other.clone() for other in others]
    train(net, optimizer, range(1, 4))
    assert torch.equal(kept, before)
    assert all(map(torch.equal, others, others_before))
    assert not torch.equal(net.blocks[1].down.weight.grad, before)


def test_a_planned_step_faults_little(trained: Trained) -> None:
    net, optimizer, _, _, pager = trained
    train(net, optimizer, range(4))
    pager.reset_stats()
    train(net, optimizer, range(4, 8))
    stats = pager.stats()
    assert stats["plan_failure"] is None
    assert stats["mispredicted_passes"] <= 2  # the first, without updates, and the one whose state was to be made
    assert stats["faults"] <= 4 * 8
    assert stats["page_ins"] >= 4 * 20


def test_evaluating_between_steps_changes_nothing(trained: Trained) -> None:
    net, optimizer, twin, twin_optimizer, _ = trained
    for step in range(4):
        train(net, optimizer, range(step, step + 1))
        train(twin, twin_optimizer, range(step, step + 1))
        with torch.no_grad():
            assert torch.equal(net(some_ids()), twin(some_ids()))


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_schedulers_hooks_and_closures_see_one_step(scheduler_first: bool) -> None:
    net, twin = make_net(depth=2)
    seen: list[str] = []
    pairs = []
    for model in (net, twin):
        optimizer = make_adamw(model)
        if scheduler_first or model is twin:
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        if model is net:
            tp.page(model, optimizer, budget="40MiB")
        if not scheduler_first and model is net:
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        pairs.append((model, optimizer, scheduler))
    pairs[0][1].register_step_pre_hook(lambda *_: seen.append("before"))
    pairs[0][1].register_step_post_hook(lambda *_: seen.append("after"))
    for model, optimizer, scheduler in pairs:
        for step in range(3):
            optimizer.zero_grad()
            loss = optimizer.step(lambda model=model, step=step: backward(model, step))
            assert loss.shape == ()
            scheduler.step()
    assert seen == ["before", "after"] * 3
    assert_same(*pairs[0][:2], *pairs[1][:2])
    assert pairs[0][1].param_groups[0]["lr"] == pairs[1][1].param_groups[0]["lr"] == 1e-3 / 8


def test_optimizers_inside_of_backward() -> None:
    net, twin = make_net(depth=2)
    made = []
    for model in (net, twin):
        optimizers = {parameter: torch.optim.AdamW([parameter], lr=1e-3) for parameter in model.parameters()}
        if model is net:
            pager = tp.page(net, list(optimizers.values()), budget="32MiB")
            optimizers = {optimizer.param_groups[0]["params"][0]: optimizer for optimizer in optimizers.values()}

        def update(parameter: torch.Tensor, optimizers: Any = optimizers) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(update)
        made.append(optimizers)
    for step in range(4):
        assert torch.equal(backward(net, step), backward(twin, step))
    for (parameter, optimizer), (expected, twin_optimizer) in zip(made[0].items(), made[1].items(), strict=True):
        assert torch.equal(parameter, expected)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], twin_optimizer.state[expected]["exp_avg"])
    stats = pager.stats()
    pager.close()
    assert stats["passes"] == 4
    assert stats["plan_failure"] is None


class Recomputing(torch.nn.Module):
    """A net whose blocks are run again in backward."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.net.embed(ids)
        for block in self.net.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.net.head(x).float()


class _Blocks(torch.nn.Module):
    """Pairs of layers: in backward the first is run again while the second is held."""

    def __init__(self) -> None:
        super().__init__()
        pairs = (torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 1024)) for _ in range(2))
        self.blocks = torch.nn.ModuleList(pairs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def test_the_smallest_budget_trains_too() -> None:
    torch.manual_seed(0)
    net = _Blocks()
    twin = copy.deepcopy(net)
    optimizer, twin_optimizer = make_adamw(net), make_adamw(twin)
    with pytest.raises(tp.BudgetError, match="at least 16 MiB are needed"):
        tp.page(net, optimizer, budget="15MiB")
    # Of which a step may hold four pages; one of these layers has three.
    with tp.page(net, optimizer, budget="16MiB"):
        for step in range(2):
            for model, its in ((net, optimizer), (twin, twin_optimizer)):
                its.zero_grad()
                model(torch.full((3, 1024), step + 1.0)).square().mean().backward()
                its.step()
        assert_same(net, optimizer, twin, twin_optimizer)


def test_groups_with_options_of_their_own() -> None:
    made = []
    for model in make_net(depth=2):
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "lr": 1e-2, "weight_decay": 0.0}]
        made.append((model, torch.optim.AdamW(groups, lr=1e-3)))
    (net, optimizer), (twin, twin_optimizer) = made
    with tp.page(net, optimizer, budget="36MiB"):
        train(net, optimizer, range(3))
        train(twin, twin_optimizer, range(3))
        assert_same(net, optimizer, twin, twin_optimizer)
        assert [len(group["params"]) for group in optimizer.param_groups] == [
            len(group["params"]) for group in twin_optimizer.param_groups
        ]


def test_beside_recomputation_and_autocast() -> None:
    net, twin = (Recomputing(each) for each in make_net(depth=2))
    optimizer, twin_optimizer = make_adamw(net), make_adamw(twin)
    with tp.page(net, optimizer, budget="40MiB"), torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, train(net, optimizer, range(3)), train(twin, twin_optimizer, range(3))))
        assert_same(net, optimizer, twin, twin_optimizer)


def test_paged_in_the_middle_of_training_and_restored_later() -> None:
    net, twin = make_net(depth=2)
    optimizer, twin_optimizer = make_adamw(net), make_adamw(twin)
    train(net, optimizer, range(2))
    backward(net, 2)
    with tp.page(net, optimizer, budget="40MiB"):
        optimizer.step()  # with the gradient from before
        train(net, optimizer, range(3, 5))
        saved = copy.deepcopy(optimizer.state_dict())
        weights = copy.deepcopy(net.state_dict())
        train(net, optimizer, range(5, 7))
        optimizer.load_state_dict(saved)
        net.load_state_dict(weights)
        train(net, optimizer, range(5, 8))
        train(twin, twin_optimizer, range(2))
        backward(twin, 2)
        twin_optimizer.step()
        train(twin, twin_optimizer, range(3, 8))
        assert_same(net, optimizer, twin, twin_optimizer)


def test_copies_of_the_optimizer_are_ordinary(trained: Trained) -> None:
    net, optimizer, _, _, _ = trained
    train(net, optimizer, range(1))
    assert type(optimizer) is not torch.optim.AdamW
    assert isinstance(optimizer, torch.optim.AdamW)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(copied) is torch.optim.AdamW
        assert type(copied.param_groups[0]["params"][0]) is torch.nn.Parameter
        copied.step()


def test_an_error_in_backward_leaves_nothing_held(trained: Trained) -> None:
    net, optimizer, twin, twin_optimizer, pager = trained

    def fail(_gradient: torch.Tensor) -> None:
        msg = "on purpose"
        raise RuntimeError(msg)

    train(net, optimizer, range(1))
    hidden = net.blocks[0].register_forward_hook(lambda _module, _args, output: output.register_hook(fail) and None)
    with pytest.raises(RuntimeError, match="on purpose"):
        backward(net, 1)
    hidden.remove()
    optimizer.zero_grad()
    train(net, optimizer, range(1, 3))
    train(twin, twin_optimizer, range(3))
    assert_same(net, optimizer, twin, twin_optimizer)
    assert pager.stats()["pinned_pages"] == 0


class _OwnStep(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


def test_what_can_not_be_trained_paged_is_refused() -> None:
    net, twin = make_net(depth=1)
    for optimizer in (torch.optim.LBFGS(net.parameters()), _OwnStep(net.parameters())):
        with pytest.raises(tp.PagedTensorError, match=rf"{type(optimizer).__name__}.step\(\) is not one of"):
            tp.page(net, optimizer, budget="32MiB")
    with pytest.raises(TypeError, match="budget="):
        tp.page(net, "32MiB")  # type: ignore[arg-type]
    replaced = make_adamw(net)
    replaced.step = lambda: None  # type: ignore[method-assign,assignment]
    with pytest.raises(tp.PagedTensorError, match="has replaced step"):
        tp.page(net, replaced, budget="32MiB")
    assert all(type(parameter) is torch.nn.Parameter for parameter in net.parameters())
    optimizer = make_adamw(net)
    with tp.page(net, optimizer, budget="32MiB"), pytest.raises(tp.PagedTensorError, match="another paged model"):
        tp.page(twin, optimizer, budget="32MiB")


@pytest.mark.usefixtures("standin")
def test_on_a_device_training_is_refused() -> None:
    net, _ = make_net(depth=1)
    with pytest.raises(tp.PagedTensorError, match="only inference"):
        tp.page(net, make_adamw(net), budget="32MiB", device="cuda:0")


def test_a_checkpoint_is_trained_and_stays_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8
    )
    twin = transformers.LlamaForCausalLM(config)
    twin.save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = tp.from_pretrained(tmp_path, budget="24MiB")
    ids = torch.randint(512, (2, 16))
    losses = []
    for trained in (model, twin):
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
        if trained is model:
            model.pager.add_optimizer(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            loss = trained(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == losses[3:]
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert model.pager.stats()["training_bytes"] > 3 * 0.9 * sum(each.nbytes for each in twin.parameters())
    model.pager.close()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_optimizers_are_added_once() -> None:
    net, _ = make_net(depth=1)
    with tp.page(net, budget="32MiB") as pager:
        pager.add_optimizer(make_adamw(net))
        with pytest.raises(tp.PagedTensorError, match="paged already; give page"):
            pager.add_optimizer(make_adamw(net))
        with pytest.raises(tp.PagedTensorError, match="needs a store"):
            pager.commit()
    net, _ = make_net(depth=1)
    pager = tp.page(net, budget="32MiB")
    pager.close()
    with pytest.raises(tp.ClosedError):
        pager.add_optimizer(make_adamw(net))


_MEMORY_SCRIPT = """
import ctypes, json, torch
import tensorpager as tp
torch.set_num_threads(1)
def mib(*names):
    with open("/proc/self/status") as status:
        found = dict(line.split()[:2] for line in status if line.split()[0].rstrip(":") in names)
    return sum(int(found[name + ":"]) for name in names) >> 10
def memory():
    return {name: mib(name) for name in ("VmHWM", "RssAnon", "RssShmem", "RssFile")}
model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(48)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
x = torch.randn(16, 1024)
torch.nn.Linear(1024, 1024)(x).sum().backward()
state_mib = 4 * sum(p.nbytes for p in model.parameters()) >> 20
seen = [memory()]
with tp.page(model, optimizer, budget="64MiB"):
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak counts from here
    seen.append(memory())
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        seen.append(memory())
print(json.dumps([state_mib, seen]))
"""


def test_memory_is_the_budget_and_little_more(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(_MEMORY_SCRIPT)
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=300)
    state_mib, seen = json.loads(result.stdout)
    assert state_mib == 768
    # Libraries' own pages come and go with the page cache, and are nobody's data.
    peak_mib = seen[-1]["VmHWM"] - seen[-1]["RssFile"]
    before_mib = seen[0]["RssAnon"] + seen[0]["RssShmem"] - state_mib // 4
    # Of 12 times the budget: activations, a gradient, a group's new state, the planner, the page table.
    assert peak_mib - before_mib <= 64 + 96, seen


def test_gradients_used_at_once_are_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer that steps inside of backward has its gradients where autograd made them, from the second time."""
    net = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(16)))
    twin = copy.deepcopy(net)
    x = torch.randn(4, 512)
    stepping = [True]

    def step_inside(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        for parameter, optimizer in zip(model.parameters(), optimizers, strict=True):

            def step(_: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                if stepping[0]:
                    optimizer.step()
                    optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]

    optimizers = [torch.optim.SGD([parameter], lr=0.1, momentum=0.9) for parameter in net.parameters()]
    twins = [torch.optim.SGD([parameter], lr=0.1, momentum=0.9) for parameter in twin.parameters()]
    with tp.page(net, optimizers, budget="24MiB") as pager:
        step_inside(net, optimizers)
        step_inside(twin, twins)
        moved: list[str] = []
        places = pager._training.places  # type: ignore[union-attr]
        copy_in = places.copy_in
        monkeypatch.setattr(places, "copy_in", lambda source, name: [moved.append(name), copy_in(source, name)][1])
        counts = []
        for number in range(6):
            stepping[0] = number != 4  # then they are kept after all
            for model in (net, twin):
                model(x).square().mean().backward()
            counts.append(sum(name.endswith(".grad") for name in moved))
            for parameter, other in zip(net.parameters(), twin.parameters(), strict=True):
                assert torch.equal(parameter, other)
                assert (parameter.grad is None) == (number != 4)
                if number == 4 and parameter.numel() * 4 >= 16 * 2**10:
                    assert type(parameter.grad) is PagedTensor
                if parameter.grad is not None and other.grad is not None:
                    assert torch.equal(parameter.grad, other.grad)
        assert counts == [16, 16, 16, 16, 32, 32]
