# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import tensorpager as tp
from tensorpager.fake_pass import record_on_fakes
from tensorpager.pass_plan import steps_from_events
from torch_models import BUDGET, Net, brought_in, core_of, make_net, some_ids

Events = "np.ndarray[Any, np.dtype[np.int32]]"


def recorded(model: torch.nn.Module, pager: tp.Pager, *args: Any, **kwargs: Any) -> list[int]:
    """The events of a real pass."""
    core = core_of(pager)
    core.record_begin(False)
    try:
        model.forward(*args, **kwargs)  # not by its hooks, which record on their own
    finally:
        events = core.record_end()
    return events.tolist()


def traced(model: torch.nn.Module, pager: tp.Pager, *args: Any, **kwargs: Any) -> list[int]:
    return record_on_fakes(model, core_of(pager), args, kwargs).tolist()


class Recurrent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(256, 256, num_layers=2, batch_first=True)
        self.out = torch.nn.Linear(256, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(x)[0])


class Attention(torch.nn.Module):
    """Uses its child's weight itself, beside one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(512, 8, batch_first=True)
        self.norm = torch.nn.LayerNorm(512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


class Shared(torch.nn.Module):
    """One module called three times, and its weight used from outside through views."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(512, 512)
        self.other = torch.nn.Linear(512, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(self.layer(x))
        x = x @ self.other.weight.t()[:, 3:5] @ self.layer.weight[1:3, :]
        return self.other(self.layer(x)) + self.other.weight[0]


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 64, 3)
        self.norm = torch.nn.BatchNorm2d(64)
        self.second = torch.nn.Conv2d(64, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.nn.functional.dropout(self.norm(self.first(x)), training=self.training))


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], torch.Tensor]]] = {
    "net with tied weights": (Net, some_ids),
    "LSTM": (Recurrent, lambda: torch.ones(2, 5, 256)),
    "attention": (Attention, lambda: torch.ones(2, 5, 512)),
    "shared module and views": (Shared, lambda: torch.ones(2, 512)),
    "convolutions": (Convolutions, lambda: torch.ones(2, 3, 12, 12)),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", MODELS)
def test_a_pass_on_fake_tensors_takes_the_steps_of_a_real_one(name: str, grad: bool) -> None:
    make_model, make_input = MODELS[name]
    model = make_model()
    with tp.page(model, budget=BUDGET) as pager, torch.set_grad_enabled(grad):
        before = brought_in(pager)
        events = traced(model, pager, make_input())
        assert brought_in(pager) == before
        assert events == recorded(model, pager, make_input())
        core = core_of(pager)
        steps = steps_from_events(events, {abs(e) - 1: core.set_pages(abs(e) - 1) for e in events})
        assert steps.count >= 2


def test_tracing_in_inference_mode_and_under_autocast() -> None:
    net, _ = make_net()
    with tp.page(net, budget=BUDGET) as pager:
        with torch.no_grad():
            expected = traced(net, pager, some_ids())
        with torch.inference_mode():
            assert traced(net, pager, some_ids()) == expected
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert traced(net, pager, some_ids()) == expected


def test_views_read_outside_of_windows_are_steps_of_their_own() -> None:
    model = Shared()
    with tp.page(model, budget=BUDGET) as pager, torch.no_grad():
        events = traced(model, pager, torch.ones(2, 512))
        names = [core_of(pager).set_name(event - 1) for event in events if event > 0]
    assert names.count("layer") >= 3
    assert len(names) == 3 + 1 + 3  # calls of the one, a call of the other, uses of views


def test_tracing_reads_nothing_and_needs_no_memory() -> None:
    net, _ = make_net()
    with tp.page(net, budget=BUDGET) as pager:
        pager.reset_stats()
        before = pager.stats()
        traced(net, pager, some_ids())
        after = pager.stats()
    for counter in ("page_ins", "touches", "bytes_read", "acquires"):
        assert after[counter] == before[counter], counter


class Stateful(torch.nn.Module):
    """Everything a forward may change: buffers, attributes, containers, generators, its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(512)
        self.layer = torch.nn.Linear(512, 512)
        self.register_buffer("seen", torch.zeros(1))
        self.calls = 0
        self.history: list[torch.Tensor] = []
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, cache: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        self.calls += 1
        self.seen += 1
        x = self.norm(x) + torch.rand(512) + random.random() + np.random.rand()  # noqa: NPY002
        x = torch.nn.functional.dropout(self.layer(x))
        self.last = x
        self.history.append(x)
        self.register_buffer("made_up", x.detach())
        cache["states"].append(x)
        cache["total"][0].add_(x.sum())
        return x


def test_tracing_leaves_no_trace() -> None:
    model = Stateful().train()
    x = torch.randn(4, 512)
    cache = {"states": [], "total": [torch.zeros(())]}
    with tp.page(model, budget=BUDGET) as pager:
        attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
        traced(model, pager, x, cache=cache)
        assert attributes == {name: dict(vars(module)) for name, module in model.named_modules()}
        assert (model.calls, model.history, model.last) == (0, [], None)
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
        assert cache["states"] == []
        assert cache["total"][0] == 0
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1] == random.getstate()
        assert np.array_equal(states[2][1], np.random.get_state()[1])  # noqa: NPY002
        model(x, cache=cache)
        assert model.calls == len(model.history) == len(cache["states"]) == 1
        assert type(model.last) is torch.Tensor


class DecidesByValue(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(512, 512)
        self.other = torch.nn.Linear(512, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) if x.sum().item() > 0 else self.other(x)


def test_a_model_that_looks_at_values_is_planned_from_its_first_pass() -> None:
    torch.manual_seed(0)
    model = DecidesByValue()
    x = torch.ones(2, 512)
    expected = [torch.nn.functional.linear(x, model.one.weight, model.one.bias).detach()]
    expected.append(torch.nn.functional.linear(-x, model.other.weight, model.other.bias).detach())
    with tp.page(model, budget=BUDGET) as pager, torch.no_grad():
        with pytest.raises(tp.TraceError, match=r"DecidesByValue can't be run on fake tensors: DataDependent"):
            traced(model, pager, x)
        assert torch.equal(model(x), expected[0])
        stats = pager.stats()
        assert stats["plans"] == 1
        assert stats["schedule"]["steps"] == 1
        assert "DataDependent" in stats["trace_failure"]
        assert torch.equal(model(-x), expected[1])
        assert pager.stats()["plans"] == 2


def test_a_model_with_hooks_of_the_users_is_not_traced() -> None:
    net, twin = make_net()
    seen: list[type] = []
    net.blocks[2].register_forward_hook(lambda _module, _args, output: seen.append(type(output)))
    with tp.page(net, budget=BUDGET) as pager, torch.no_grad():
        with pytest.raises(tp.TraceError, match=r"blocks\.2"):
            traced(net, pager, some_ids())
        assert seen == []
        assert torch.equal(net(some_ids()), twin(some_ids()))
        assert seen == [torch.Tensor]
        assert pager.stats()["plans"] == 1


def test_a_model_that_reaches_no_parameter_has_no_steps() -> None:
    class Unused(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(512, 512)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    model = Unused()
    with tp.page(model, budget=BUDGET) as pager:
        with pytest.raises(tp.TraceError, match="reached no paged parameter"):
            traced(model, pager, torch.ones(1))
        assert torch.equal(model(torch.ones(1)), torch.full((1,), 2.0))
        assert pager.stats()["schedule"] is None


def test_an_error_of_the_models_own_comes_out_of_the_real_pass() -> None:
    net, twin = make_net()
    with tp.page(net, budget=BUDGET) as pager:
        with pytest.raises(IndexError):
            net(torch.tensor([[5000]]))
        with torch.no_grad():
            assert torch.equal(net(some_ids()), twin(some_ids()))
        assert pager.stats()["pinned_pages"] == 0


class FakeFailure(torch.nn.Module):
    """Its float32 experts have a kernel, and no rule for fake tensors (torch 2.13)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(2, 512, 512))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(x, self.weight, offs=torch.tensor([4, 8], dtype=torch.int32))


def test_what_fails_on_fake_tensors_is_not_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    model = FakeFailure()
    x = torch.randn(8, 512)
    with torch.no_grad():
        expected = model(x)
        with tp.page(model, budget=BUDGET) as pager:
            assert torch.equal(model(x), expected)
            failure = pager.stats()["trace_failure"]
    if failure is None:
        pytest.skip("this torch has a rule for it")
    assert "_grouped_mm" in failure or "BF16" in failure
    assert not caplog.records
    assert not logging.getLogger("torch._subclasses.fake_tensor").disabled
