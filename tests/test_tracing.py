# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import trace_suite
from tensorpager.errors import TraceError
from tensorpager.operator_trace import Trace, TraceStep
from tensorpager.tracing import trace

F = torch.nn.functional


def named(traced: Trace, indices: tuple[int, ...]) -> set[str]:
    return {traced.tensors[index].name for index in indices}


def short(traced: Trace, step: TraceStep) -> tuple[str, str, str, str, str]:
    """The step in names, lists joined by blanks and in order of the tensors."""
    lists = (step.reads, step.writes, step.overwrites, step.dies)
    return (step.name, *(" ".join(traced.tensors[index].name for index in indices) for indices in lists))


def kinds(traced: Trace) -> dict[str, str]:
    return {tensor.name: tensor.kind for tensor in traced.tensors}


def phases(traced: Trace) -> list[str]:
    return [step.phase for step in traced.steps]


def writing(traced: Trace, name: str) -> list[TraceStep]:
    return [step for step in traced.steps if name in named(traced, (*step.writes, *step.overwrites))]


def make_mlp() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def tiny_llama(**extra: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **extra))


# -- forward


def test_every_operator_of_an_inference_is_a_step_with_what_it_uses() -> None:
    with torch.no_grad():
        traced = trace(make_mlp(), torch.zeros(3, 4), name="mlp", tokens=3)
    first, second, third = "0/aten.addmm", "1/aten.relu", "2/aten.addmm"
    assert [short(traced, step) for step in traced.steps] == [
        ("inputs", "", "", "arg0", ""),
        ("aten.addmm", "0.weight 0.bias arg0", "", first, "arg0"),
        ("aten.relu", first, "", second, first),
        ("aten.addmm", f"2.weight 2.bias {second}", "", third, f"{second} {third}"),
    ]
    assert [(tensor.name, tensor.size_bytes, tensor.kind) for tensor in traced.tensors] == [
        ("0.weight", 4 * 8 * 4, "weight"),
        ("0.bias", 8 * 4, "weight"),
        ("2.weight", 8 * 2 * 4, "weight"),
        ("2.bias", 2 * 4, "weight"),
        ("arg0", 3 * 4 * 4, "input"),
        (first, 3 * 8 * 4, "activation"),
        (second, 3 * 8 * 4, "activation"),
        (third, 3 * 2 * 4, "activation"),
    ]
    assert [step.flops for step in traced.steps] == [0, 2 * 3 * 4 * 8, 3 * 8, 2 * 3 * 8 * 2]
    assert [step.moved_bytes for step in traced.steps] == [48, 4 * (32 + 8 + 12 + 24), 2 * 96, 4 * (16 + 2 + 24 + 6)]
    assert [step.scope for step in traced.steps] == ["", "0", "1", "2"]
    assert (traced.name, traced.tokens, set(phases(traced))) == ("mlp", 3, {"forward"})


def test_tied_weights_and_views_of_them_are_one_tensor() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(10, 4)
            self.head = torch.nn.Linear(4, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden = self.embedding(ids)
            return self.head(hidden) + self.embedding.weight[2:4, 1].sum()

    with torch.no_grad():
        traced = trace(Tied(), torch.zeros(3, dtype=torch.long))
    readers = [step.name for step in traced.steps if 0 in step.reads]
    assert readers == ["aten.embedding", "aten.mm", "aten.sum"]
    assert traced.total_bytes("weight") == 10 * 4 * 4
    embedding, _, total = (step for step in traced.steps if 0 in step.reads)
    assert embedding.moved_bytes == 3 * 8 + 2 * (3 * 4 * 4), "ids, and the rows they name, twice"
    assert total.moved_bytes == (2 + 1) * 4, "the part that is summed, and the sum"


def test_parameters_that_are_views_of_one_storage_are_one_tensor() -> None:
    flat = torch.zeros(8 * 4 + 3)
    model = torch.nn.Linear(4, 8)
    model.weight = torch.nn.Parameter(flat[: 8 * 4].view(8, 4))
    model.bias = torch.nn.Parameter(flat[-8:])
    traced = trace(model, torch.zeros(1, 4))
    assert [tensor.size_bytes for tensor in traced.tensors if tensor.kind == "weight"] == [(8 * 4 + 3) * 4]
    assert traced.steps[1].reads == (0, 1)


def test_in_place_operators_write_and_whole_fills_overwrite() -> None:
    def work(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty(4, 4)  # no step: nothing is written
        y.fill_(1.0)
        y += x
        y[0].zero_()
        y.t().copy_(x)
        torch.mul(x, 2.0, out=y)
        return y.copy_(y.t())

    traced = trace(work, torch.zeros(4, 4))
    y = "aten.empty"
    assert [short(traced, step) for step in traced.steps] == [
        ("inputs", "", "", "x", ""),
        ("aten.fill_", "", "", y, ""),
        ("aten.add_", "x", y, "", ""),
        ("aten.zero_", "", y, "", ""),
        ("aten.copy_", "x", "", y, ""),
        ("aten.mul", "x", "", y, "x"),
        ("aten.copy_", "", y, "", y),
    ]


def test_what_is_only_allocated_is_overwritten_by_its_first_use() -> None:
    def work(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty(8, 4)
        y[:4].copy_(x)
        y[4:].copy_(x)
        return y

    traced = trace(work, torch.zeros(4, 4))
    assert [short(traced, step)[2:4] for step in traced.steps[1:]] == [("", "aten.empty"), ("aten.empty", "")]


def test_operators_that_look_at_a_shape_read_nothing() -> None:
    traced = trace(lambda x: torch.zeros_like(x) + x.new_ones(4), torch.zeros(4))
    assert [short(traced, step)[:2] for step in traced.steps] == [
        ("inputs", ""),
        ("aten.zeros_like", ""),
        ("aten.new_ones", ""),
        ("aten.add", "aten.zeros_like aten.new_ones"),
    ]


def test_an_argument_that_is_changed_in_place_lives_on_as_state() -> None:
    def decode(cache: torch.Tensor, position: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(0, position, new)
        return cache.sum()

    traced = trace(decode, torch.zeros(100, 4), torch.zeros(1, dtype=torch.long), torch.zeros(1, 4))
    assert {name: kind for name, kind in kinds(traced).items() if kind != "activation"} == {
        "cache": "state",
        "position": "input",
        "new": "input",
    }
    assert writing(traced, "cache")[0].moved_bytes == 2 * 16 + 2 * 8, "one row, and where it goes"


def test_constants_of_the_program_arrive_with_the_inputs() -> None:
    traced = trace(lambda x: x * torch.tensor([1.0, 2.0]), torch.zeros(2))
    assert short(traced, traced.steps[0]) == ("inputs", "", "", "x constant", "")


def test_batch_norm_writes_its_statistics_in_training_only() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    for training in (True, False):
        traced = trace(model.train(training), torch.zeros(2, 3, 4, 4))
        written = {name for name, kind in kinds(traced).items() if kind == "buffer" and writing(traced, name)}
        assert written == ({"1.running_mean", "1.running_var", "1.num_batches_tracked"} if training else set())


def test_names_are_prefixed_only_when_two_modules_share_them() -> None:
    def distance(teacher: torch.nn.Module, student: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(student(x), teacher(x))

    traced = trace(
        distance, torch.nn.Linear(2, 2, bias=False), student=torch.nn.Linear(2, 2, bias=False), x=torch.ones(2)
    )
    assert [name for name, kind in kinds(traced).items() if kind == "weight"] == ["teacher.weight", "student.weight"]
    assert {step.scope for step in traced.steps} == {"teacher", "student", ""}


def test_persistent_tensors_that_nothing_uses_stay_in_the_trace() -> None:
    model = make_mlp()
    traced = trace(lambda model, x: model[0](x), model, torch.zeros(1, 4))
    assert "2.weight" in kinds(traced)
    assert all("2.weight" not in named(traced, step.uses) for step in traced.steps)


# -- training


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True}], ids=str)
def test_a_training_step_reads_and_writes_its_state_parameter_by_parameter(options: dict[str, Any]) -> None:
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    traced = trace(train_step, model, optimizer, torch.zeros(3, 4))
    names = [name for name, _ in model.named_parameters()]
    of_kind = {kind: {name for name, other in kinds(traced).items() if other == kind} for kind in ("state", "gradient")}
    entries = ["step", "exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * ("amsgrad" in options)
    assert of_kind["state"] == {f"{entry}.{name}" for entry in entries for name in names}
    assert of_kind["gradient"] == {f"grad.{name}" for name in names}
    for name in (*names, *of_kind["state"]):
        assert {step.phase for step in writing(traced, name)} == {"optimizer"}, name
    updated = [name for step in traced.steps if step.phase == "optimizer" for name in named(traced, step.writes)]
    in_order = [name for name in dict.fromkeys(updated) if name in names]
    assert in_order == names, "one parameter is done before the next begins"
    died = {name for step in traced.steps if step.phase == "optimizer" for name in named(traced, step.dies)}
    assert of_kind["gradient"] <= died
    order = list(dict.fromkeys(phases(traced)))
    assert order == ["forward", "backward", "optimizer"]
    assert {step.microbatch for step in traced.steps} == {0}


def test_backward_belongs_to_the_module_it_is_of() -> None:
    model = make_mlp()
    traced = trace(train_step, model, torch.optim.SGD(model.parameters()), torch.zeros(3, 4))
    backward = [(step.name, step.scope) for step in traced.steps if step.phase == "backward"]
    assert backward == [
        ("aten.mm", "2"),
        ("aten.mm", "2"),
        ("aten.sum", "2"),
        ("aten.threshold_backward", "1"),
        ("aten.mm", "0"),
        ("aten.sum", "0"),
    ]


def test_gradients_live_from_backward_to_the_optimizer() -> None:
    model = torch.nn.Linear(2, 2, bias=False)
    traced = trace(train_step, model, torch.optim.SGD(model.parameters(), lr=0.1), torch.zeros(1, 2))
    steps = [short(traced, step) for step in traced.steps]
    assert steps[-2:] == [
        ("aten.mm", "x aten.ones_like", "", "grad.weight", "x aten.ones_like"),
        ("aten.add_", "grad.weight", "weight", "", "grad.weight"),
    ]


def test_gradients_that_are_zeroed_but_kept_are_state() -> None:
    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    model = torch.nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert kinds(trace(step, model, optimizer, torch.zeros(1, 2)))["grad.weight"] == "state"


def update_in_backward(optimizers: dict[torch.Tensor, torch.optim.Optimizer], parameter: torch.Tensor) -> None:
    optimizers[parameter].step()
    optimizers[parameter].zero_grad()


def test_an_optimizer_inside_backward_updates_each_weight_as_its_gradient_is_there() -> None:
    model = make_mlp()
    optimizers = {parameter: torch.optim.AdamW([parameter]) for parameter in model.parameters()}

    def hook(parameter: torch.Tensor) -> None:
        update_in_backward(optimizers, parameter)

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    traced = trace(lambda model, x: model(x).sum().backward(), model, torch.zeros(3, 4))
    changes = [phase for before, phase in zip(["", *phases(traced)], phases(traced), strict=False) if before != phase]
    assert changes == ["forward"] + ["backward", "optimizer"] * 2, "a layer's two parameters are done together"
    assert kinds(traced)["grad.0.weight"] == "gradient"
    assert kinds(traced)["exp_avg.0.weight"] == "state"
    assert not any(optimizer.state for optimizer in optimizers.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_may_be_objects_and_partial_functions() -> None:
    model = torch.nn.Linear(2, 2, bias=False)
    optimizers = {model.weight: torch.optim.SGD([model.weight], lr=0.1)}
    model.weight.register_post_accumulate_grad_hook(functools.partial(update_in_backward, optimizers))
    model.weight.register_hook(lambda gradient: gradient * 2)
    traced = trace(lambda model, x: model(x).sum().backward(), model, torch.zeros(1, 2))
    assert [step.name for step in traced.steps[-3:]] == ["aten.mm", "aten.mul", "aten.add_"]


def test_accumulation_counts_microbatches() -> None:
    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor]) -> None:
        for x in batches:
            (model(x).sum() / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    model = make_mlp()
    traced = trace(step, model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.zeros(3, 4), torch.zeros(3, 4)])
    runs = dict.fromkeys((step.phase, step.microbatch) for step in traced.steps)
    assert [*runs] == [("forward", 0), ("backward", 0), ("forward", 1), ("backward", 1), ("optimizer", 1)]
    total = [
        step.name for step in traced.steps if step.phase == "backward" and "grad.0.weight" in named(traced, step.uses)
    ]
    assert total == ["aten.mm", "aten.add_"], "the second is added to the first in place"


@pytest.mark.parametrize("is_module", [True, False])
def test_checkpointed_work_is_done_again_in_backward(is_module: bool) -> None:
    def step(model: torch.nn.Module, x: torch.Tensor) -> None:
        function: Callable[..., Any] = model if is_module else (lambda x: F.linear(x, model[0].weight).relu())
        checkpoint(function, x, use_reentrant=False).sum().backward()

    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.ReLU())
    traced = trace(step, model, torch.zeros(3, 4))
    steps = [(step.phase, step.name) for step in traced.steps[-4:]]
    assert steps == [
        ("recompute", "aten.mm"),
        ("recompute", "aten.relu"),
        ("backward", "aten.threshold_backward"),
        ("backward", "aten.mm"),
    ]


def test_a_backward_that_makes_a_graph_recomputes_nothing() -> None:
    def step(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(model(x).sum(), x, create_graph=True)[0].sum()

    traced = trace(step, make_mlp(), torch.zeros(3, 4, requires_grad=True))
    assert "recompute" not in phases(traced)


def test_frozen_weights_are_never_written_and_get_no_state() -> None:
    model = make_mlp()
    model[0].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    traced = trace(train_step, model, torch.optim.AdamW(trained), torch.zeros(3, 4))
    assert not writing(traced, "0.weight")
    assert writing(traced, "2.weight")
    assert {name for name, kind in kinds(traced).items() if kind == "gradient"} == {"grad.2.weight", "grad.2.bias"}
    assert not any(name.endswith(("0.weight", "0.bias")) for name, kind in kinds(traced).items() if kind == "state")


OPTIMIZERS = ["Adadelta", "Adagrad", "Adam", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD", "Adafactor"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizers_of_torch_can_be_traced(name: str) -> None:
    model = torch.nn.Linear(4, 4)
    traced = trace(train_step, model, getattr(torch.optim, name)(model.parameters()), torch.zeros(3, 4))
    assert {step.phase for step in writing(traced, "weight")} == {"optimizer"}


def test_an_optimizer_that_is_given_a_closure_runs_forward_and_backward_in_it() -> None:
    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    model = make_mlp()
    traced = trace(step, model, torch.optim.SGD(model.parameters(), lr=0.1), torch.zeros(3, 4))
    assert [step.phase for step in traced.steps if step.scope == "2"] == ["forward"] + ["backward"] * 3
    assert traced.steps[-1].phase == "optimizer"


def test_a_scheduler_of_the_learning_rate_is_not_advanced() -> None:
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def step(model: torch.nn.Module, optimizers: list[Any], x: torch.Tensor) -> None:
        train_step(model, optimizers[0], x)
        optimizers[1].step()

    assert "optimizer" in phases(trace(step, model, [optimizer, scheduler], torch.zeros(3, 4)))
    assert (optimizer.param_groups[0]["lr"], scheduler.last_epoch) == (1.0, 0)


def test_an_object_with_model_and_optimizer_may_be_passed() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.model = make_mlp()
            self.optimizer = torch.optim.AdamW(self.model.parameters())

        def step(self, x: torch.Tensor) -> None:
            train_step(self.model, self.optimizer, x)

    trainer = Trainer()
    traced = trace(trainer.step, torch.zeros(3, 4))
    assert kinds(traced)["exp_avg.0.weight"] == "state"
    assert not trainer.optimizer.state


def test_tensors_that_a_module_merely_holds_are_buffers() -> None:
    model = torch.nn.Linear(4, 4)
    model.mask = torch.ones(4)
    traced = trace(lambda model, x: model(x) * model.mask, model, torch.zeros(3, 4))
    assert kinds(traced)["model.mask"] == "buffer"


# -- nothing of the caller's changes


def test_the_real_model_is_as_before() -> None:
    model = torch.nn.Sequential(make_mlp(), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.rand(3, 4)
    x_before = x.clone()
    generators = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    trace(train_step, model, optimizer, x)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(x, x_before)
    assert not optimizer.state
    assert optimizer.param_groups[0]["foreach"] is None
    assert all(parameter.grad is None and not parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == generators[1:]  # noqa: NPY002
    model(x).sum().backward()
    assert type(model[0][0].weight.grad) is torch.Tensor


def test_state_and_gradients_that_are_there_are_kept() -> None:
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    moments = [optimizer.state[parameter]["exp_avg"].clone() for parameter in model.parameters()]
    traced = trace(train_step, model, optimizer, torch.zeros(3, 4))
    assert kinds(traced)["grad.0.weight"] == "state", "what was left over from before is added to"
    for parameter, gradient, moment in zip(model.parameters(), gradients, moments, strict=True):
        assert torch.equal(parameter.grad, gradient)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)
        assert optimizer.state[parameter]["step"].item() == 1


def test_real_meta_and_fake_models_give_the_same_trace() -> None:
    with torch.device("meta"):
        on_meta = make_mlp()
    with FakeTensorMode():
        fake = make_mlp()
        inside = trace(train_step, fake, torch.optim.AdamW(fake.parameters()), torch.zeros(3, 4))
    traces = [
        trace(train_step, model, torch.optim.AdamW(model.parameters()), torch.zeros(3, 4)).to_json()
        for model in (make_mlp(), on_meta, fake)
    ]
    assert {*traces, inside.to_json()} == {traces[0]}
    assert Trace.from_json(traces[0]).to_json() == traces[0]


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def test_a_real_step_runs_the_operators_of_the_trace_in_its_order() -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = torch.nn.Sequential(
        torch.nn.Embedding(10, 16), torch.nn.TransformerEncoder(layer, 2), torch.nn.Linear(16, 3)
    )
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    ids = torch.zeros(2, 8, dtype=torch.long)
    traced = [step.name for step in trace(train_step, model, optimizer, ids).steps[1:]]
    train_step(model, optimizer, ids)
    with Names() as names:
        train_step(model, optimizer, ids)
    assert len(traced) > 300
    assert [name for name in names.seen if name in set(traced)] == traced


# -- what can't be traced


def test_a_branch_on_content_is_refused_with_the_operator_in_the_way() -> None:
    def until_small(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x) if model(x).sum().item() > 0 else x

    with pytest.raises(
        TraceError, match=r"until_small can't be run on fake tensors at aten\._local_scalar_dense.*\.item"
    ):
        trace(until_small, make_mlp(), torch.zeros(3, 4))


def test_an_error_of_the_program_names_the_module() -> None:
    with pytest.raises(TraceError, match=r"Sequential can't be run .* at aten\.addmm in '0': RuntimeError"):
        trace(make_mlp(), torch.zeros(3, 5))


MODEL = torch.nn.Linear(4, 4)


def test_a_model_that_was_not_passed_is_refused() -> None:
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters())
    everything = [model]
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(TraceError, match=r"reaches 'model' by itself: pass models"):
        trace(lambda x: model(x), torch.zeros(3, 4))
    with pytest.raises(TraceError, match=r"reaches 'optimizer' by itself"):
        trace(lambda: optimizer.zero_grad())
    with pytest.raises(TraceError, match=r"reaches 'MODEL' by itself"):
        trace(lambda x: MODEL(x), torch.zeros(3, 4))
    with pytest.raises(TraceError, match=r"reaches 'everything' by itself"):
        trace(torch.no_grad()(lambda x: everything[0](x)), torch.zeros(3, 4))
    with pytest.raises(TraceError, match=r"a parameter of shape \[4, 4\] was not passed"):
        trace(lambda x: hidden_twice(x), torch.zeros(3, 4))
    assert all(parameter.grad is not None for parameter in model.parameters())


def hidden_twice(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = MODEL(x)
    return result


def test_modules_without_parameters_may_be_closed_over() -> None:
    loss = torch.nn.MSELoss()
    assert trace(lambda x: loss(x, x), torch.zeros(3, 4)).steps[-1].name == "aten.mse_loss"


def test_tensors_without_a_storage_are_refused() -> None:
    with pytest.raises(TraceError, match=r"it has no one storage"):
        trace(lambda x: x.sum(), torch.eye(3).to_sparse())


def test_experts_that_loop_over_what_was_hit_are_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    config._experts_implementation = "eager"
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    with pytest.raises(TraceError, match=r"at aten\.nonzero in 'model\.layers\.0\.mlp.*choose an implementation"):
        trace(model, input_ids=torch.zeros(1, 4, dtype=torch.long))


def test_a_program_without_operators_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        trace(lambda: None)


# -- transformers


def test_a_llama_is_traced_from_its_configuration() -> None:
    traced = trace(tiny_llama(), input_ids=torch.zeros(1, 8, dtype=torch.long), attention_mask=torch.ones(1, 8))
    weights = [name for name, kind in kinds(traced).items() if kind == "weight"]
    first_reader = {name: next(s for s in traced.steps if name in named(traced, s.reads)) for name in weights}
    for name, step in first_reader.items():
        assert step.scope == name.removesuffix(".weight")
    assert first_reader["model.layers.1.mlp.up_proj.weight"].flops == 2 * 8 * 32 * 64
    attention = next(step for step in traced.steps if "attention" in step.name)
    assert attention.flops == 2 * 2 * 4 * 8 * 8 * 8


@pytest.mark.parametrize("recomputing", [True, False])
def test_a_llama_is_trained(recomputing: bool) -> None:
    model = tiny_llama()
    if recomputing:
        model.model.gradient_checkpointing = True
        for layer in model.model.layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    ids = torch.zeros(1, 8, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    traced = trace(trace_suite.step, model.train(), torch.optim.AdamW(model.parameters()), batch)
    assert ("recompute" in phases(traced)) is recomputing
    names = [name for name, kind in kinds(traced).items() if kind == "weight"]
    for name in names:
        assert {step.phase for step in writing(traced, name)} == {"optimizer"}
        assert kinds(traced)[f"grad.{name}"] == "gradient"
    scopes = {step.scope for step in traced.steps if step.phase == "recompute"}
    assert ("model.layers.1.mlp.up_proj" in scopes) is recomputing


SUITE_WEIGHTS = {
    "decode": 288,
    "lora_sweep": 288,
    "moe_decode": 864,
    "encoder_decoder": 464,
}  # MiB, without small change


@pytest.mark.parametrize("name", list(SUITE_WEIGHTS))
def test_the_suite_can_be_traced(name: str) -> None:
    traced = trace_suite.SUITE[name]()
    assert traced.total_bytes("weight") >> 20 == SUITE_WEIGHTS[name]
    used = {index for step in traced.steps for index in step.uses}
    unused = {tensor.kind for index, tensor in enumerate(traced.tensors) if index not in used}
    assert unused <= {"buffer"}


def test_the_suite_updates_inside_backward() -> None:
    traced = trace_suite.full_finetune(inside_backward=True)
    last_backward = max(index for index, phase in enumerate(phases(traced)) if phase == "backward")
    assert phases(traced).index("optimizer") < last_backward
    assert {step.microbatch for step in trace_suite.accumulation(2).steps if step.phase != "optimizer"} == {0, 1}


LARGE = """
import resource, torch
from transformers import LlamaConfig, LlamaForCausalLM
from tensorpager.tracing import trace

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                     num_key_value_heads=8, vocab_size=128256)
with torch.device("meta"):
    model = LlamaForCausalLM(config).to(torch.bfloat16)
before = peak()
with torch.no_grad():
    traced = trace(model, input_ids=torch.zeros(1, 2048, dtype=torch.long))
print(traced.total_bytes("weight"), (peak() - before) >> 10)
"""


@pytest.mark.slow
def test_a_model_of_70_billion_parameters_needs_no_memory() -> None:
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True, timeout=120)
    weight_bytes, grown_mib = map(int, done.stdout.split())
    assert weight_bytes == 141_107_412_992
    assert grown_mib < 1024
