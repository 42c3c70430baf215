# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

import tensorpager as tp
from tensorpager import op_rules
from tensorpager.addresses import data_set_by_value
from tensorpager.paged_tensor import PagedTensor
from torch_models import BUDGET, Net, brought_in, core_of, evict, make_net, resident_pages_of, some_ids

Pair = tuple[Net, Net, tp.Pager]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A paged net, its ordinary twin, the pager."""
    net, twin = make_net()
    with tp.page(net, budget=BUDGET) as pager:
        yield net, twin, pager


@pytest.fixture(scope="module")
def shared_pair() -> Iterator[Pair]:
    """The same for tests that change nothing."""
    net, twin = make_net()
    with tp.page(net, budget=BUDGET) as pager:
        yield net, twin, pager


def a_weight(pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """A paged weight none of whose pages is resident, and the ordinary one."""
    net, twin, pager = pair
    paged = net.blocks[1].up.weight
    evict(pager, net, paged)
    return paged, twin.blocks[1].up.weight


def assert_nothing_held(pager: tp.Pager) -> None:
    assert pager.stats()["pinned_pages"] == 0


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "operator": lambda w: w + 1,
    "reflected operator": lambda w: 2 - w,
    "method": lambda w: w.sum(),
    "function": torch.linalg.vector_norm,
    "matmul": lambda w: w[:8] @ w[:8].T,
    "linear": lambda w: torch.nn.functional.linear(torch.ones(2, 512), w),
    "embedding": lambda w: torch.nn.functional.embedding(torch.tensor([5, 2000]), w),
    "list of tensors": lambda w: torch.cat([w[:3], w[100:103]]),
    "nested list": lambda w: torch.block_diag(*[w[:2, :2], w[5:7, :2]]),
    "keyword": lambda w: torch.where(condition=w > 0, input=w, other=-w),
    "out": lambda w: torch.mul(w.detach(), 3, out=torch.empty(2048, 512)),
    "foreach": lambda w: torch._foreach_mul([w, w], 2)[1],
    "index by tensor": lambda w: w[torch.tensor([1, 2000])],
    "index by mask": lambda w: w[w > 2],
    "index by number": lambda w: w[2047],
    "index by slice": lambda w: w[::512, 3:5],
    "other dtype": lambda w: w.to(torch.float64),
    "transposed copy": lambda w: w.t().contiguous(),
    "reshape of a view": lambda w: w.t().reshape(-1),
    "several outputs": lambda w: torch.aminmax(w).max,
    "several views": lambda w: w.chunk(4)[3] + w.split(1024)[1][512:],
    "iteration": lambda w: next(iter(w)) * 2,
    "comparison": lambda w: w.eq(w).all(),
    "sort": lambda w: w[:4].sort().values,
    "clone": lambda w: w.clone(),
    "item": lambda w: w[7, 7].item(),
    "tolist": lambda w: w[3, :5].tolist(),
    "formatted": lambda w: f"{w[3, 4].item():.3f}",
    "numpy": lambda w: w.detach().numpy(),
    "numpy forced": lambda w: w.numpy(force=True),
    "asarray": lambda w: np.asarray(w.detach()),
    "asarray as": lambda w: np.asarray(w.detach(), dtype=np.float64),
    "format of a number": lambda w: f"{w[3, 4].detach():.3f}",
    "dlpack to numpy": lambda w: np.from_dlpack(w.detach()),
    "dlpack to torch": lambda w: torch.from_dlpack(w.detach()),
    "vmap": torch.vmap(torch.sum),
    "grad of a function": lambda w: torch.func.grad(lambda v: (v * v).sum())(w.detach()),
    "autograd": lambda w: torch.autograd.grad((w * w).sum(), w)[0],
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_every_way_to_read_an_absent_tensor_gives_its_values(
    shared_pair: Pair, read: Callable[[torch.Tensor], Any]
) -> None:
    paged, ordinary = a_weight(shared_pair)
    result, expected = read(paged), read(ordinary)
    assert type(result) in (type(expected), PagedTensor)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(result, expected)
    else:
        assert np.array_equal(result, expected)
    assert_nothing_held(shared_pair[2])


VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "data": lambda w: w.data,
    "detach": lambda w: w.detach(),
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "row": lambda w: w[17],
    "slice": lambda w: w[3:9, ::2],
    "view": lambda w: w.view(-1),
    "view as bytes": lambda w: w.view(torch.uint8),
    "reshape": lambda w: w.reshape(512, 2048),
    "flatten": lambda w: w.flatten(),
    "expand": lambda w: w[:1].expand(4, 512),
    "narrow": lambda w: torch.narrow(w, 0, 5, 6),
    "chunk": lambda w: w.chunk(2)[1],
    "unbind": lambda w: torch.unbind(w)[9],
    "as_strided": lambda w: w.as_strided((4, 4), (512, 1)),
    "view of a view": lambda w: w.data.t()[5:7].view(2, 2048),
    "parameter of it": lambda w: torch.nn.Parameter(w.data),
    "parameter of the parameter": torch.nn.Parameter,
    "no conversion": lambda w: w.to(torch.float32).float().to("cpu").type(torch.float32).type_as(torch.empty(0)),
    "contiguous": lambda w: w.contiguous(),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views_stay_paged_and_taking_them_reads_nothing(shared_pair: Pair, view: Callable[[torch.Tensor], Any]) -> None:
    paged, ordinary = a_weight(shared_pair)
    before = brought_in(shared_pair[2])
    result = view(paged)
    assert type(result) is PagedTensor
    assert brought_in(shared_pair[2]) == before
    assert torch.equal(result, view(ordinary))
    assert resident_pages_of(shared_pair[2], paged) > 0
    evict(shared_pair[2], shared_pair[0], paged)
    assert torch.equal(result * 2, view(ordinary) * 2)


def test_looking_at_a_tensor_reads_nothing(pair: Pair) -> None:
    net, twin, pager = pair
    paged, ordinary = a_weight(pair)
    before = brought_in(pager)
    for name in (
        "shape",
        "dtype",
        "device",
        "requires_grad",
        "grad",
        "is_leaf",
        "ndim",
        "layout",
        "is_cuda",
        "itemsize",
    ):
        assert getattr(paged, name) == getattr(ordinary, name), name
    for name in (
        "size",
        "stride",
        "dim",
        "numel",
        "element_size",
        "is_contiguous",
        "storage_offset",
        "is_floating_point",
    ):
        assert getattr(paged, name)() == getattr(ordinary, name)(), name
    assert len(paged) == 2048
    assert hash(paged) == id(paged)
    assert torch.empty_like(paged).shape == paged.shape
    assert type(paged.new_zeros(3)) is torch.Tensor
    assert paged.to("meta").device.type == "meta"
    assert {name: value.shape for name, value in net.state_dict().items()} == {
        name: value.shape for name, value in twin.state_dict().items()
    }
    assert net.float() is net
    assert net.cpu() is net
    assert net.to(torch.float32) is net
    net.requires_grad_(False)
    net.eval()
    net.zero_grad()
    assert brought_in(pager) == before


def test_a_span_that_is_read_is_all_that_comes_in(pair: Pair) -> None:
    paged, _ = a_weight(pair)
    before = brought_in(pair[2])
    paged[1024].sum()
    assert brought_in(pair[2]) == before + 1


def test_an_operation_larger_than_the_budget_still_works(pair: Pair) -> None:
    net, twin, pager = pair
    everything = [p.detach().flatten() for p in net.parameters()]
    assert torch.equal(torch.cat(everything), torch.cat([p.detach().flatten() for p in twin.parameters()]))
    assert torch.equal(
        torch.nn.utils.parameters_to_vector(net.parameters()), torch.nn.utils.parameters_to_vector(twin.parameters())
    )
    assert_nothing_held(pager)
    assert pager.stats()["resident_bytes_max"] <= BUDGET


def test_a_paged_parameter_is_a_parameter(pair: Pair) -> None:
    net, twin, _ = pair
    assert all(type(p) is PagedTensor and isinstance(p, torch.nn.Parameter) for p in net.parameters())
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in twin.named_parameters()]
    assert net.head.weight is net.embed.weight
    assert not isinstance(net.head.weight.data, torch.nn.Parameter)
    assert list(net.state_dict()) == list(twin.state_dict())


def test_printing_looks_as_ever_and_reads_little(pair: Pair) -> None:
    paged, ordinary = a_weight(pair)
    before = brought_in(pair[2])
    assert repr(paged) == repr(ordinary)
    assert str(paged.data) == str(ordinary.data)
    assert f"{paged[0, :3].data}" == f"{ordinary[0, :3].data}"
    assert brought_in(pair[2]) <= before + 4  # both ends, on either side of a page border at most


def test_a_printed_result_of_a_view_with_history(pair: Pair) -> None:
    paged, _ = a_weight(pair)
    assert "grad_fn" in repr(paged[:2, :2])


def test_numpy_gives_a_copy_that_does_not_pretend(pair: Pair) -> None:
    paged, ordinary = a_weight(pair)
    array = paged.detach().numpy()
    assert not array.flags.writeable
    with pytest.raises(RuntimeError, match="requires grad"):
        paged.numpy()
    with pytest.raises(RuntimeError, match="requires grad"):
        ordinary.numpy()
    with pytest.raises((RuntimeError, BufferError), match="require"):
        paged.__dlpack__()


def test_pickle_and_copies_are_ordinary(pair: Pair) -> None:
    paged, ordinary = a_weight(pair)
    for copied in (pickle.loads(pickle.dumps(paged)), copy.deepcopy(paged), copy.copy(paged)):
        assert type(copied) is torch.nn.Parameter
        assert copied.requires_grad
        assert torch.equal(copied, ordinary)
    view = copy.deepcopy(paged.data[5])
    assert type(view) is torch.Tensor
    assert torch.equal(view, ordinary.data[5])
    memo: dict[int, Any] = {}
    assert copy.deepcopy(paged, memo) is copy.deepcopy(paged, memo)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(paged[1:])


def test_torch_save_round_trip(pair: Pair) -> None:
    net, twin, _ = pair
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert loaded.keys() == twin.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in twin.state_dict().items())


def test_safetensors_save_file_and_save_model(pair: Pair, tmp_path: Any) -> None:
    net, twin, pager = pair
    a_weight(pair)
    state = net.state_dict()
    del state["head.weight"]
    save_file(state, tmp_path / "file.safetensors")
    save_model(net, str(tmp_path / "model.safetensors"))
    for name in ("file", "model"):
        loaded = load_file(tmp_path / f"{name}.safetensors")
        assert len(loaded) == len(state)
        assert all(torch.equal(value, twin.state_dict()[key]) for key, value in loaded.items())
    assert_nothing_held(pager)
    assert all(type(value) is PagedTensor for value in state.values())


def test_the_address_of_a_tensor_is_its_own_for_life(pair: Pair) -> None:
    net, _, pager = pair
    paged, _ = a_weight(pair)
    address = paged.data_ptr()
    with torch.no_grad():
        for _ in range(3):
            net(some_ids())
    assert paged.data_ptr() == address == paged.untyped_storage().data_ptr()
    assert core_of(pager).contains(address)
    assert paged.untyped_storage().nbytes() == paged.numel() * 4


def test_writes_survive_eviction(pair: Pair) -> None:
    net, _, pager = pair
    paged, ordinary = a_weight(pair)
    paged.data.mul_(2)
    paged.data[100, 5] = 7.0
    with torch.no_grad():
        paged[0].fill_(3.0)
        paged.t()[1].copy_(torch.arange(2048.0))
    expected = ordinary.detach() * 2
    expected[100, 5] = 7.0
    expected[0] = 3.0
    expected[:, 1] = torch.arange(2048.0)
    evict(pager, net, paged)
    assert torch.equal(paged, expected)
    assert pager.stats()["bytes_written"] > 0


def test_initialisers_write(pair: Pair) -> None:
    net, _, pager = pair
    paged, _ = a_weight(pair)
    torch.nn.init.constant_(paged, 0.5)
    evict(pager, net, paged)
    assert torch.equal(paged.detach(), torch.full((2048, 512), 0.5))


def test_memory_outside_of_the_space_is_refused(pair: Pair) -> None:
    net, _, _ = pair
    paged, ordinary = a_weight(pair)
    with pytest.raises(tp.PagedTensorError, match=r"blocks\.1\.up\.weight.*copy_"):
        paged.data = torch.zeros(2048, 512)
    for convert in (
        net.half,
        lambda: net.to(torch.bfloat16),
        lambda: net.to("meta"),
        net.double,
        net.share_memory,
        lambda: paged.data.resize_(3),
        paged.data.set_,
        paged.data.share_memory_,
    ):
        with pytest.raises(tp.PagedTensorError, match="paged"):
            convert()
    assert type(paged.to(torch.float16)) is torch.Tensor
    paged.data = paged.data[:]
    assert torch.equal(paged, ordinary)


def test_a_loader_may_set_data_by_value(pair: Pair) -> None:
    paged, _ = a_weight(pair)
    pager = pair[2]
    address = paged.data_ptr()
    with data_set_by_value():
        paged.data = torch.full((2048, 512), 3.0)
        with pytest.raises(tp.PagedTensorError, match="permanent address"):
            paged.data = torch.zeros(2048, 511)
        written = pager.stats()["bytes_written"]
        paged.data = paged.data.clone()  # the same values: not even modified
    assert paged.data_ptr() == address
    assert bool((paged == 3).all())
    assert pager.stats()["bytes_written"] == written
    with pytest.raises(tp.PagedTensorError, match="permanent address"):
        paged.data = torch.zeros(2048, 512)


def test_gradients_through_absent_weights_are_right(pair: Pair) -> None:
    net, twin, pager = pair
    for model in (net, twin):
        model(some_ids()).square().mean().backward()
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
        assert type(p.grad) is torch.Tensor
    assert_nothing_held(pager)


def test_gradients_of_inputs_through_frozen_weights(pair: Pair) -> None:
    net, twin, _ = pair
    grads = []
    for model in (net, twin):
        model.requires_grad_(False)
        hidden = torch.ones(3, 512, requires_grad=True)
        model.blocks[3](model.blocks[0](hidden)).sum().backward()
        grads.append(hidden.grad)
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD], ids=["AdamW", "SGD"])
def test_an_optimizer_trains_what_it_would_have_trained(pair: Pair, make: Callable[..., Any]) -> None:
    net, twin, _ = pair
    optimizers = [make(model.parameters(), lr=1e-2, foreach=False) for model in (net, twin)]
    for _ in range(2):
        for model, optimizer in zip((net, twin), optimizers, strict=True):
            optimizer.zero_grad()
            model(some_ids()).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


def test_load_state_dict_writes_into_the_pages(pair: Pair) -> None:
    net, twin, pager = pair
    doubled = {name: value * 2 for name, value in twin.state_dict().items()}
    net.load_state_dict(doubled)
    assert all(type(p) is PagedTensor for p in net.parameters())
    evict(pager, net, net.blocks[1].up.weight)
    assert all(torch.equal(value, doubled[name]) for name, value in net.state_dict().items())


class Logged(torch.Tensor):
    """Another subclass with rules of its own."""

    calls: list[str] = []  # noqa: RUF012 (what the test looks at)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs)


def test_another_tensor_subclass_keeps_its_rules(pair: Pair) -> None:
    paged, ordinary = a_weight(pair)
    other = torch.ones(512).as_subclass(Logged)
    Logged.calls.clear()
    result = paged + other
    assert type(result) is Logged
    assert Logged.calls == ["add"]
    assert torch.equal(result.as_subclass(torch.Tensor), ordinary + 1)
    assert_nothing_held(pair[2])


def test_threads_read_together(pair: Pair) -> None:
    net, twin, pager = pair
    wrong: list[str] = []

    def work(seed: int) -> None:
        names = list(dict(net.named_parameters()))
        for turn in range(12):
            name = names[(turn * 7 + seed * 3) % len(names)]
            if not torch.equal(net.get_parameter(name) * seed, twin.get_parameter(name) * seed):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert_nothing_held(pager)


def test_after_close_every_use_says_so() -> None:
    net, _ = make_net()
    pager = tp.page(net, budget=BUDGET)
    weight = net.blocks[0].up.weight
    view = weight.data[3]
    pager.close()
    for use in (
        lambda: weight + 1,
        view.sum,
        weight.data_ptr,
        weight.untyped_storage,
        lambda: weight.detach().numpy(),
        lambda: copy.deepcopy(weight),
        lambda: pickle.dumps(weight),
        lambda: weight.data.fill_(1),
        lambda: torch.cat([view, view]),
        lambda: torch.nn.utils.parameters_to_vector(net.parameters()),
        lambda: net(some_ids()),
    ):
        with pytest.raises(tp.ClosedError, match=r"closed|close\(\)"):
            use()
    assert repr(weight) == "Parameter containing:\nPagedTensor(closed, shape=(2048, 512), dtype=torch.float32)"
    assert weight.shape == (2048, 512)


def test_no_function_is_in_two_tables_that_disagree() -> None:
    tables = (op_rules.METADATA, op_rules.VIEWS, op_rules.VIEWS_IF_CONTIGUOUS, op_rules.CONVERSIONS, op_rules.ADDRESSES)
    for position, table in enumerate(tables):
        assert len(table) > 0
        for other in tables[position + 1 :]:
            assert not table & other
