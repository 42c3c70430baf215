# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import _thread
import copy
import gc
import json
import os
import pickle
import stat
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tensorpager as tp
from tensorpager.budget import format_bytes, parse_bytes
from tensorpager.paged_tensor import PagedTensor, span_of
from tensorpager.windows import inert_hook
from torch_models import BUDGET, MIB, core_of, make_net, resident_pages_of, some_ids

# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("1GiB", 2**30), ("1.5 GB", 15 * 10**8), ("512mib", 2**29), ("7", 7), (4096, 4096), ("0.001KiB", 1), (" 2 B ", 2)],
)
def test_sizes(text: str | int, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "1 GiB free", "-1GiB", "1e9", "0", 0, -5, 2**61, "0.1B", "50%"])
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)


@pytest.mark.parametrize("value", [1.5, True, None, b"1GiB"])
def test_what_can_be_no_size(value: Any) -> None:
    with pytest.raises(TypeError, match="1GiB"):
        parse_bytes(value)


def test_sizes_for_people() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 3 * MIB // 2, 5 * 2**30, 2**41)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 MiB",
        "5.0 GiB",
        "2.0 TiB",
    ]


# -- results, budget and schedule --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "pread"])
def test_a_paged_model_gives_the_same_bits_within_its_budget(engine: str) -> None:
    net, twin = make_net()
    with tp.page(net, budget="16MiB", engine=engine) as pager, torch.no_grad():
        assert pager.budget_bytes == BUDGET
        for shift in range(4):
            ids = (some_ids() + shift) % 1000
            assert torch.equal(net(ids), twin(ids))
        stats = pager.stats()
    assert stats["resident_bytes_max"] <= BUDGET
    assert stats["paged_bytes"] > 2 * BUDGET
    assert stats["pinned_pages"] == 0
    assert (stats["plans"], stats["trace_failure"], stats["plan_failure"]) == (1, None, None)
    if engine != "auto":
        assert stats["engine"] == engine


def test_steady_passes_read_what_the_schedule_promises() -> None:
    net, _ = make_net()
    passes = 6
    with tp.page(net, budget=BUDGET) as pager, torch.no_grad():
        for _ in range(2):
            net(some_ids())
        before = pager.stats()
        for _ in range(passes):
            net(some_ids())
        after = pager.stats()
        promised = after["schedule"]["page_ins_per_pass"]
    # Read-ahead may have some of the next pass's pages in at either end; its depth is at most the frames.
    assert abs(after["page_ins"] - before["page_ins"] - passes * promised) <= after["schedule"]["frame_count"]
    assert after["schedule"]["lower_bound_page_ins"] <= promised
    assert after["schedule_jumps"] == before["schedule_jumps"]
    assert after["off_schedule_acquires"] == before["off_schedule_acquires"]
    assert after["touches"] == before["touches"]
    assert after["passes"] - before["passes"] == passes


def test_a_model_that_fits_is_read_once() -> None:
    net, twin = make_net()
    with tp.page(net, budget=64 * MIB) as pager, torch.no_grad():
        net(some_ids())
        before = pager.stats()
        for _ in range(3):
            assert torch.equal(net(some_ids()), twin(some_ids()))
        after = pager.stats()
    assert after["page_ins"] == before["page_ins"]
    assert after["bytes_written"] == 0


class OwnLinear(torch.nn.Linear):
    """What its forward does with its weight nobody can know, so it is held whole."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


def test_a_budget_too_small_for_a_module_changes_nothing() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), OwnLinear(256, 16384))
    parameters = list(model.parameters())
    values = [p.detach().clone() for p in parameters]
    with pytest.raises(
        tp.BudgetError, match=r"module '1' needs its 16\.1 MiB.*smallest budget that works is (\d+) bytes"
    ) as caught:
        tp.page(model, budget=BUDGET)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(p, v) for p, v in zip(parameters, values, strict=True))
    assert not model._forward_pre_hooks
    needed = int(str(caught.value).split("works is ")[1].split()[0])
    with pytest.raises(tp.BudgetError):
        tp.page(model, budget=needed - 1)
    with tp.page(model, budget=needed) as pager:
        assert model(torch.ones(1, 256)).shape == (1, 16384)
        assert pager.stats()["resident_bytes_max"] <= needed


def test_a_budget_too_small_for_anything() -> None:
    with pytest.raises(tp.BudgetError, match="too small"):
        tp.page(torch.nn.Linear(4, 4), budget="1MiB")
    with pytest.raises(ValueError, match="size"):
        tp.page(torch.nn.Linear(4, 4), budget="lots")


# -- what is paged, and how it is moved --------------------------------------------------------------------------------


class Mixed(torch.nn.Module):
    """All kinds of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = torch.nn.Parameter(torch.randn(300, 7).bfloat16())
        self.doubles = torch.nn.Parameter(torch.randn(5, 1001).double())
        self.complex = torch.nn.Parameter(torch.randn(33, dtype=torch.complex64))
        self.integers = torch.nn.Parameter(torch.arange(-64, 63, dtype=torch.int8), requires_grad=False)
        self.mask = torch.nn.Parameter(torch.rand(77) > 0.5, requires_grad=False)
        self.scalar = torch.nn.Parameter(torch.tensor(2.5))
        self.empty = torch.nn.Parameter(torch.zeros(0, 3))
        self.transposed = torch.nn.Parameter(torch.randn(40, 60).t())
        self.images = torch.nn.Parameter(torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last))
        self.expanded = torch.nn.Parameter(torch.randn(1, 9).expand(5, 9), requires_grad=False)
        self.strided = torch.nn.Parameter(torch.randn(10, 10)[::2, 1::3].detach())
        flat = torch.randn(1000)
        self.front = torch.nn.Parameter(flat[:600].view(20, 30))
        self.back = torch.nn.Parameter(flat[400:].view(torch.int32), requires_grad=False)
        self.alone = torch.nn.Parameter(flat.clone()[10:20])
        self.register_buffer("buffer", torch.ones(3))


def test_every_kind_of_parameter_keeps_its_values() -> None:
    torch.manual_seed(0)
    model = Mixed()
    model.scalar.grad = torch.tensor(0.5)
    model.scalar.note = "kept"  # type: ignore[attr-defined]
    twin = {name: (p.detach().clone(), p.stride(), p.requires_grad) for name, p in model.named_parameters()}
    with tp.page(model, budget=BUDGET) as pager:
        for name, parameter in model.named_parameters():
            values, stride, requires_grad = twin[name]
            assert torch.equal(parameter, values), name
            assert (parameter.dtype, parameter.shape) == (values.dtype, values.shape)
            assert parameter.requires_grad == requires_grad
            if name not in ("expanded", "strided"):
                assert parameter.stride() == stride, name
            assert (type(parameter) is PagedTensor) == (name != "empty")
        assert model.scalar.grad == 0.5
        assert model.scalar.note == "kept"
        assert type(model.buffer) is torch.Tensor
        model.front.data[19, 29] = 42.0  # the last of 600: in both
        assert model.back[199] == torch.tensor(42.0).view(torch.int32)
        assert pager.stats()["paged_tensors"] == 13
        for parameter in model.parameters():
            assert parameter.numel() == 0 or span_of(parameter)[0] % parameter.element_size() == 0


def test_tied_parameters_stay_one() -> None:
    net, _ = make_net()
    with tp.page(net, budget=BUDGET) as pager:
        assert net.head.weight is net.embed.weight
        assert pager.stats()["paged_tensors"] == len(list(net.parameters()))
        core = core_of(pager)
        sets = [next(iter(m._forward_pre_hooks.values())).window.set_id for m in (net.head, net.embed)]
        assert sets[0] == sets[1]
        assert core.set_name(sets[0]) == "embed"


def test_originals_are_freed_as_they_are_moved() -> None:
    net, _ = make_net()
    storages = [weakref.ref(p) for p in net.parameters()]
    with tp.page(net, budget=BUDGET):
        assert [ref() for ref in storages] == [None] * len(storages)


def test_recurrent_layers_use_the_paged_weights() -> None:
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(256, 256, num_layers=2, batch_first=True)
    twin = copy.deepcopy(lstm)
    x = torch.randn(2, 7, 256)
    with tp.page(lstm, budget=BUDGET):
        assert all(type(weight) is PagedTensor for weight in lstm._flat_weights)
        result, expected = lstm(x)[0], twin(x)[0]
        assert torch.equal(result, expected)
        result.sum().backward()
        expected.sum().backward()
        assert torch.equal(lstm.weight_hh_l1.grad, twin.weight_hh_l1.grad)


@pytest.mark.parametrize("kind", ["encoder", "padded encoder", "attention"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_fused_attention_kernels_are_taken_as_without_paging(kind: str, grad: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 256)
    layer = torch.nn.TransformerEncoderLayer(256, 8, 512, batch_first=True)
    mask = torch.arange(9) > torch.tensor([[8], [5]]) if kind == "padded encoder" else None
    attention = torch.nn.MultiheadAttention(256, 8, batch_first=True)
    model = attention if kind == "attention" else torch.nn.TransformerEncoder(layer, 6)
    model.eval()
    twin = copy.deepcopy(model)

    def run(module: Any) -> torch.Tensor:
        return module(x, x, x)[0] if kind == "attention" else module(x, src_key_padding_mask=mask)

    with tp.page(model, budget=BUDGET) as pager, torch.set_grad_enabled(grad):
        for _ in range(3):
            assert torch.equal(run(model), run(twin))
        assert torch._C._is_torch_function_enabled()
        stats = pager.stats()
        assert stats["schedule"]["steps"] == (1 if kind == "attention" else 6)
        assert stats["touches"] == 0
        assert torch.equal(next(model.parameters()) + 1, next(twin.parameters()) + 1)
        if kind != "attention" and grad:
            run(model).sum().backward()


@pytest.mark.parametrize("traced", [True, False], ids=["while tracing", "while running"])
def test_the_guard_is_back_after_an_interrupted_fused_kernel(traced: bool) -> None:
    class Activation(torch.nn.Linear):
        interrupts = traced

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.interrupts:
                raise KeyboardInterrupt
            return torch.relu(x)

    activation = Activation(1, 1)
    layer = torch.nn.TransformerEncoderLayer(256, 8, 512, batch_first=True, activation=activation)
    pager = tp.page(layer, budget=BUDGET)
    x = torch.randn(1, 3, 256)
    if not traced:
        layer(x)
        activation.interrupts = True
    with pytest.raises(KeyboardInterrupt):
        layer(x)
    pager.close()
    assert torch._C._is_torch_function_enabled()
    with pytest.raises(tp.ClosedError):
        layer.linear1.weight.sum()


def test_a_module_that_is_its_own_root() -> None:
    layer = torch.nn.Linear(512, 512)
    twin = copy.deepcopy(layer)
    x = torch.ones(1, 512)
    with tp.page(layer, budget=BUDGET) as pager:
        for _ in range(3):
            assert torch.equal(layer(x), twin(x))
        assert pager.stats()["schedule"]["steps"] == 1
        assert pager.stats()["off_schedule_acquires"] == 0


class Odd(torch.Tensor):
    pass


def bad_model(kind: str) -> torch.nn.Module:
    model = torch.nn.Linear(8, 8)
    if kind == "meta":
        return torch.nn.Linear(8, 8, device="meta")
    if kind == "subclass":
        model.weight = torch.nn.Parameter(torch.ones(8, 8).as_subclass(Odd))
    if kind == "sparse":
        model.weight = torch.nn.Parameter(torch.eye(8).to_sparse())
    if kind == "hooks":
        model.weight.register_hook(lambda grad: grad)
    if kind == "none":
        return torch.nn.ReLU()
    if kind == "lazy":
        return torch.nn.LazyLinear(8)
    return model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("meta", "'weight' is on the meta device"),
        ("subclass", "'weight' is of the subclass Odd"),
        ("sparse", "'weight' is sparse"),
        ("hooks", "'weight' has gradient hooks"),
        ("none", "ReLU has no parameters"),
        ("lazy", "'weight' is of the subclass UninitializedParameter"),
    ],
)
def test_what_cannot_be_paged_is_refused(kind: str, message: str) -> None:
    with pytest.raises(tp.PagedTensorError, match=message):
        tp.page(bad_model(kind), budget=BUDGET)


def test_paging_twice_is_refused() -> None:
    layer = torch.nn.Linear(8, 8)
    with tp.page(layer, budget=BUDGET), pytest.raises(tp.PagedTensorError, match="paged already"):
        tp.page(layer, budget=BUDGET)


def test_a_store_that_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(tp.IoError, match="nowhere"):
        tp.page(torch.nn.Linear(8, 8), budget=BUDGET, store=tmp_path / "nowhere")


def test_spill_leaves_no_name_behind(tmp_path: Path) -> None:
    net, _ = make_net()
    with tp.page(net, budget=BUDGET, store=tmp_path) as pager:
        assert pager.stats()["spill_bytes"] > 0
        assert list(tmp_path.iterdir()) == []


# -- windows -----------------------------------------------------------------------------------------------------------


class Failing(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(512, 512)
        self.second = torch.nn.Linear(512, 512)
        self.error: BaseException | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        if self.error is not None:
            raise self.error
        return x


class FailingLeaf(torch.nn.Linear):
    error: BaseException | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize("place", ["root", "leaf"])
@pytest.mark.parametrize("error", [ValueError("its own"), KeyboardInterrupt(), SystemExit(3)], ids=type)
def test_a_forward_that_is_left_early_holds_nothing_afterwards(place: str, error: BaseException) -> None:
    model = Failing()
    model.second = FailingLeaf(512, 512)
    twin = copy.deepcopy(model)
    x = torch.ones(1, 512)
    failing: Any = model if place == "root" else model.second
    with tp.page(model, budget=BUDGET) as pager:
        assert torch.equal(model(x), twin(x))
        failing.error = error
        for _ in range(3):
            with pytest.raises(type(error)):
                model(x)
        failing.error = None
        assert torch.equal(model(x), twin(x))
        assert pager.stats()["pinned_pages"] == 0
        assert pager.stats()["plans"] == 1
        assert torch.equal(model(x), twin(x))
        assert pager.stats()["schedule_jumps"] == 0


class Recursive(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(512, 512)

    def forward(self, x: torch.Tensor, depth: int) -> torch.Tensor:
        x = self.layer(x)
        return self(x, depth - 1) if depth > 0 else x


def test_a_module_that_calls_itself() -> None:
    model = Recursive()
    twin = copy.deepcopy(model)
    x = torch.ones(1, 512)
    with tp.page(model, budget=BUDGET) as pager:
        for _ in range(2):
            assert torch.equal(model(x, 3), twin(x, 3))
        stats = pager.stats()
        assert (stats["schedule"]["steps"], stats["passes"], stats["pinned_pages"]) == (4, 2, 0)


def test_threads_share_a_model() -> None:
    net, twin = make_net()
    ids = [(some_ids() + shift) % 1000 for shift in range(2)]
    with torch.no_grad():
        expected = [twin(i) for i in ids]
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                wrong.extend([index] * (not torch.equal(net(ids[index]), expected[index])))

    with tp.page(net, budget=24 * MIB) as pager:
        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert pager.stats()["pinned_pages"] == 0
        assert pager.stats()["passes"] == 6


def test_two_pagers_at_a_time() -> None:
    nets = [make_net() for _ in range(2)]
    pagers = [tp.page(net, budget=BUDGET) for net, _ in nets]
    with torch.no_grad():
        for _ in range(2):
            for net, twin in nets:
                assert torch.equal(net(some_ids()), twin(some_ids()))
        pagers[0].close()
        assert torch.equal(nets[1][0](some_ids()), nets[1][1](some_ids()))
        both = nets[1][0].embed.weight
        with pytest.raises(tp.ClosedError):
            torch.add(nets[0][0].embed.weight, both)
    pagers[1].close()


# -- copies, life and death --------------------------------------------------------------------------------------------


def test_copies_of_a_model_are_ordinary_models() -> None:
    net, twin = make_net()
    net.pager = tp.page(net, budget=BUDGET)  # as from_pretrained does
    net(some_ids())
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    net.pager.close()
    for copied in copies:
        assert copied.pager is None
        assert all(type(p) is torch.nn.Parameter for p in copied.parameters())
        assert copied.head.weight is copied.embed.weight
        hooks = [
            hook for m in copied.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())
        ]
        assert hooks
        assert all(hook is inert_hook for hook in hooks)
        assert torch.equal(copied(some_ids()), twin(some_ids()))
    with pytest.raises(tp.ClosedError):
        net(some_ids())


def test_a_copy_can_be_paged_again() -> None:
    net, twin = make_net()
    with tp.page(net, budget=BUDGET):
        copied = copy.deepcopy(net)
    with tp.page(copied, budget=BUDGET):
        assert torch.equal(copied(some_ids()), twin(some_ids()))


def test_a_pager_nobody_keeps_goes_on_paging() -> None:
    net, twin = make_net()
    tp.page(net, budget=BUDGET)
    gc.collect()
    for _ in range(2):
        assert torch.equal(net(some_ids()), twin(some_ids()))


def test_model_pager_and_memory_go_without_the_collector() -> None:
    net, _ = make_net()
    pager = tp.page(net, budget=BUDGET)
    with torch.no_grad():
        net(some_ids())
    refs = [weakref.ref(net), weakref.ref(pager), weakref.ref(net.embed.weight)]
    before = threading.active_count(), native_threads()
    gc.disable()
    try:
        del net, pager
        assert [ref() for ref in refs] == [None] * 3
        deadline = time.monotonic() + 10
        while native_threads() >= before[1] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert native_threads() < before[1]
    finally:
        gc.enable()


def native_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_a_tensor_outlives_model_and_pager() -> None:
    net, twin = make_net()
    tp.page(net, budget=BUDGET)
    weight = net.blocks[0].up.weight
    del net
    assert torch.equal(weight + 1, twin.blocks[0].up.weight + 1)


def test_close_ends_the_context_and_comes_twice() -> None:
    net, _ = make_net()
    with tp.page(net, budget=BUDGET) as pager:
        net(some_ids())
        assert not pager.closed
        assert "29 tensors, 34.0 MiB in a budget of 16.0 MiB" in repr(pager)
    assert pager.closed
    pager.close()
    assert "closed" in repr(pager)
    assert pager.stats()["passes"] == 1
    with pytest.raises(tp.ClosedError, match="closed"):
        net(some_ids())


def test_trace_writes_a_file_for_perfetto(tmp_path: Path) -> None:
    net, _ = make_net()
    with tp.page(net, budget=BUDGET) as pager:
        net(some_ids())
        events = pager.trace(tmp_path / "trace.json")
    assert len(events) > 0
    assert np.all(np.diff(events["time_ns"].astype(np.int64)) >= 0)
    content = json.loads((tmp_path / "trace.json").read_text())
    assert len(content["traceEvents"]) > 0
    assert "blocks.0.up" in (tmp_path / "trace.json").read_text()
    assert stat.S_IMODE((tmp_path / "trace.json").stat().st_mode) == 0o600


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    head = "import os, signal, sys, threading, time\nimport torch\nimport tensorpager as tp\n"
    head += (
        "from torch_models import BUDGET, make_net, some_ids\n"
        "net, twin = make_net()\npager = tp.page(net, budget=BUDGET)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(program)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )


def test_a_child_of_fork_is_told_and_its_parent_unharmed() -> None:
    result = run_python(
        """
        child = os.fork()
        if child == 0:
            codes = 0
            uses = [lambda: net(some_ids()), lambda: net.embed.weight + 1, lambda: net.embed.weight.tolist()]
            for use in uses:
                try:
                    use()
                except tp.ForkedProcessError as error:
                    codes += "fork" in str(error)
            os._exit(codes)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.equal(net(some_ids()), twin(some_ids())))
        """
    )
    assert result.stdout.split() == ["3", "True"], result.stderr
    assert result.returncode == 0


def test_data_loader_workers_do_not_mind() -> None:
    result = run_python(
        """
        data = torch.utils.data.DataLoader([some_ids() + i for i in range(4)], batch_size=None, num_workers=2)
        with torch.no_grad():
            print(all(torch.equal(net(ids), twin(ids)) for ids in data))
        """
    )
    assert result.stdout.split() == ["True"], result.stderr
    assert result.returncode == 0


@pytest.mark.parametrize(
    "ending", ["pass", "sys.exit(0)", "pager.close()", "del net", "weight = net.embed.weight; del net, pager"]
)
def test_the_interpreter_ends_cleanly(ending: str) -> None:
    result = run_python(f"net(some_ids())\n{ending}\n")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_ctrl_c_in_the_middle_of_a_run() -> None:
    result = run_python(
        """
        def interrupt():
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)
        net(some_ids())
        caught = 0
        for _ in range(3):
            threading.Thread(target=interrupt).start()
            try:
                with torch.no_grad():
                    while True:
                        net(some_ids())
            except KeyboardInterrupt:
                caught += 1
        with torch.no_grad():
            print(caught, torch.equal(net(some_ids()), twin(some_ids())), pager.stats()["pinned_pages"])
        """
    )
    assert result.stdout.split() == ["3", "True", "0"], result.stderr


def test_importing_the_package_is_cheap() -> None:
    heavy = "('torch', 'numpy', 'transformers', 'tensorpager._core')"
    program = f"import sys, tensorpager; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program + "; print(tensorpager.page.__name__, 'transformers' in sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.stdout.splitlines() == ["[]", "page False"]
    assert {"page", "from_pretrained", "Pager"} <= set(dir(tp))
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = tp.nothing_like_it


def test_interrupt_main_while_it_computes() -> None:
    """KeyboardInterrupt between two bytecodes of a leaf's forward, where no always-called hook runs."""
    net, twin = make_net()

    class Interrupting(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            _thread.interrupt_main()
            for _ in range(10_000):  # somewhere in here it arrives
                x = x + 0
            return super().forward(x)

    with tp.page(net, budget=BUDGET) as pager:
        net(some_ids())
        plain_class = type(net.head)
        net.head.__class__ = Interrupting
        with pytest.raises(KeyboardInterrupt):
            net(some_ids())
        assert resident_pages_of(pager, net.head.weight) > 0
        net.head.__class__ = plain_class
        assert torch.equal(net(some_ids()), twin(some_ids()))
        assert pager.stats()["pinned_pages"] == 0
