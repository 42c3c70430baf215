# SPDX-License-Identifier: Apache-2.0
"""Models paged to a device: on the stand-in here, on a GPU where there is one (marked gpu)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tensorpager as tp
from standin import standin
from tensorpager.device import HOST, device_budget_bytes, device_number
from torch_models import MIB, core_of, make_net, some_ids

__all__ = ["standin"]

SMALL_LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4000,
    "max_position_embeddings": 128,
}


def test_names_of_devices() -> None:
    assert device_number(None) == HOST
    assert device_number("cpu") == HOST
    assert device_number("cuda:1") == 1
    assert device_number(torch.device("cuda", 2)) == 2
    assert device_number(3) == 3
    with pytest.raises(ValueError, match="CUDA device"):
        device_number("meta")


def test_what_a_host_has_not() -> None:
    net, _ = make_net()
    with pytest.raises(ValueError, match="'auto' is for a device"):
        device_budget_bytes("auto", HOST)
    with pytest.raises(ValueError, match="host_budget"):
        tp.page(net, budget="16MiB", host_budget="16MiB")
    tp.page(net, budget="32MiB").close()  # nothing was changed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_a_machine_without_a_driver_says_so() -> None:
    net, _ = make_net()
    with pytest.raises(tp.EngineError, match="no CUDA driver"):
        tp.page(net, budget="16MiB", device="cuda:0")
    tp.page(net, budget="32MiB").close()


@pytest.mark.usefixtures("standin")
@pytest.mark.parametrize("host_budget", ["12MiB", "80MiB"])
def test_the_same_bits_within_both_budgets(host_budget: str) -> None:
    net, twin = make_net()
    with tp.page(net, budget="16MiB", device="cuda:0", host_budget=host_budget) as pager, torch.no_grad():
        for _ in range(4):
            assert torch.equal(net(some_ids()), twin(some_ids()))
        stats = pager.stats()
    assert stats["device"] == 0
    assert stats["resident_bytes_max"] <= stats["budget_bytes"] == 16 * MIB
    assert 0 < stats["host_bytes_max"] <= stats["host_budget_bytes"] <= 80 * MIB
    assert stats["bytes_to_device"] >= stats["page_ins"] * 0.9 * stats["page_bytes"]
    assert stats["schedule"] is not None
    if host_budget == "80MiB":  # all of the model: read never, since page() wrote it there
        assert stats["reads"] == 0
        assert stats["host_hits"] == stats["page_ins"]
    else:
        assert stats["reads"] > 0


@pytest.mark.usefixtures("standin")
def test_a_schedule_leaves_no_faults() -> None:
    net, _ = make_net()
    with tp.page(net, budget="20MiB", device="cuda:0", host_budget="80MiB") as pager, torch.no_grad():
        for _ in range(3):
            net(some_ids())
        pager.reset_stats()
        for _ in range(3):
            net(some_ids())
        stats = pager.stats()
    assert stats["faults"] == 0
    assert stats["page_ins"] <= 3 * stats["schedule"]["page_ins_per_pass"] + 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("llama")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL_LLAMA))
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size="8MB")
    return directory


def ordinary(directory: Path, **kwargs: Any) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(directory, dtype="auto", **kwargs).eval()


@pytest.mark.usefixtures("standin")
def test_a_checkpoint_is_paged_in_place(checkpoint: Path) -> None:
    ids = torch.arange(5, 29).reshape(2, 12)
    model = tp.from_pretrained(checkpoint, "8MiB", device="cuda:0", host_budget="10MiB")
    with model.pager as pager, torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(ids).logits, ordinary(checkpoint)(ids).logits)
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(tokens, ordinary(checkpoint).generate(ids, max_new_tokens=4, do_sample=False))
        stats = pager.stats()
        for parameter in model.parameters():
            assert parameter.data_ptr() % parameter.element_size() == 0
    assert stats["spill_bytes"] == 0
    assert stats["bytes_written"] == 0
    assert stats["resident_bytes_max"] <= 8 * MIB


@pytest.mark.usefixtures("standin")
def test_tensors_start_where_device_kernels_like_it(checkpoint: Path) -> None:
    model = tp.from_pretrained(checkpoint, "16MiB", device="cuda:0")
    with model.pager:
        starts = {parameter.data_ptr() % 256 for parameter in model.parameters()}
    # Sizes in this checkpoint are multiples of 256 bytes, so a file's alignment is that of its first tensor.
    assert starts == {0}


@pytest.mark.usefixtures("standin")
def test_another_dtype_is_converted_into_spill(checkpoint: Path) -> None:
    ids = torch.arange(5, 29).reshape(2, 12)
    model = tp.from_pretrained(checkpoint, "16MiB", device="cuda:0", host_budget="16MiB", dtype=torch.float32)
    expected = ordinary(checkpoint).float()
    with model.pager, torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.usefixtures("standin")
def test_what_is_written_in_place_survives_eviction() -> None:
    net, twin = make_net()
    with tp.page(net, budget="16MiB", device="cuda:0", host_budget="12MiB") as pager, torch.no_grad():
        net(some_ids())
        for model in (net, twin):
            for block in model.blocks:
                block.up.weight.mul_(0.5)
                block.gain.data.add_(1)
                torch._foreach_add_([block.down.weight, block.down.bias], 0.25)
        for _ in range(3):
            assert torch.equal(net(some_ids()), twin(some_ids()))
        state = twin.state_dict()
        for name, value in net.state_dict().items():
            assert torch.equal(value, state[name]), name
        assert pager.stats()["copies_out"] > 0
        assert pager.stats()["writebacks"] > 0


@pytest.mark.usefixtures("standin")
def test_a_pass_with_gradients_is_refused_before_it_begins() -> None:
    net, twin = make_net()
    with tp.page(net, budget="16MiB", device="cuda:0") as pager:
        with pytest.raises(tp.PagedTensorError, match="no_grad"):
            net(some_ids())
        assert pager.stats()["page_ins"] == 0
        net.requires_grad_(False)
        assert torch.equal(net(some_ids()), twin(some_ids()))
        x = torch.randn(2, 512, requires_grad=True)
        with pytest.raises(tp.PagedTensorError, match="inputs that require no gradient"):
            net.blocks[0].up(x)  # frozen, and still read by the backward of its input
        assert torch.equal(net.blocks[0].up(x.detach()), twin.blocks[0].up(x.detach()))


def test_a_device_is_refused_where_writes_could_not_be_seen() -> None:
    net, _ = make_net()
    with torch.inference_mode(), pytest.raises(tp.PagedTensorError, match="version counter"):
        tp.page(net, budget="16MiB", device="cuda:0")


@pytest.mark.usefixtures("standin")
def test_an_operation_on_more_than_the_budget_is_refused() -> None:
    net, _ = make_net()
    with tp.page(net, budget="16MiB", device="cuda:0", host_budget="32MiB") as pager:
        with pytest.raises(tp.BudgetError, match="resident at once"):
            torch.nn.utils.parameters_to_vector(net.parameters())
        assert core_of(pager).stats()["pinned_pages"] == 0


@pytest.mark.usefixtures("standin")
def test_a_closed_pager() -> None:
    net, _ = make_net()
    pager = tp.page(net, budget="16MiB", device="cuda:0")
    pager.close()
    pager.close()
    with pytest.raises(tp.ClosedError), torch.no_grad():
        net(some_ids())


@pytest.mark.usefixtures("standin")
def test_a_failing_driver_call_is_named() -> None:
    net, twin = make_net()
    with tp.page(net, budget="16MiB", device="cuda:0") as pager, torch.no_grad():
        with pytest.raises(tp.DeviceError, match=r"cuStreamSynchronize failed.*CUDA_ERROR_INVALID_HANDLE, 400"):
            core_of(pager).synchronize(12345)
        assert torch.equal(net(some_ids()), twin(some_ids()))  # nothing was lost by it


@pytest.mark.usefixtures("standin")
def test_what_is_used_outside_of_modules_is_held_or_refused() -> None:
    net, twin = make_net()
    with tp.page(net, budget="16MiB", device="cuda", host_budget="12MiB", page_bytes=2 * MIB) as pager:
        with torch.no_grad():
            net(some_ids())
        weight, plain = net.blocks[0].up.weight, twin.blocks[0].up.weight
        before = core_of(pager).stats()["acquires"]
        assert repr(weight) == repr(plain)
        assert core_of(pager).stats()["acquires"] > before
        with pytest.raises(tp.PagedTensorError, match="asked for its gradient"):
            (weight * 2).sum()
        with torch.no_grad():
            assert torch.equal(weight * 2, plain * 2)
        assert torch.equal(weight.detach() * 2, plain.detach() * 2)


@pytest.mark.usefixtures("standin")
def test_a_fused_module_that_does_not_fit_at_once_is_refused() -> None:
    """Its kernel takes all parameters without calling a child, so windows of the children's would not be enough."""
    layer = torch.nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True).eval()
    with pytest.raises(tp.BudgetError, match="at once"):
        tp.page(layer, budget="8MiB", device="cuda", host_budget="16MiB", page_bytes=2 * MIB)
    fits = torch.nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True).eval()
    inputs = torch.randn(2, 4, 512)
    with torch.no_grad():
        expected = fits(inputs)
        with tp.page(fits, budget="32MiB", device="cuda", host_budget="16MiB", page_bytes=2 * MIB):
            assert torch.equal(fits(inputs), expected)


@pytest.mark.usefixtures("standin")
def test_a_device_elsewhere_does_not_page_in_what_is_printed_on_the_host() -> None:
    on_device, _ = make_net()
    on_host, _ = make_net()
    with (
        tp.page(on_device, budget="16MiB", device="cuda", host_budget="12MiB", page_bytes=2 * MIB),
        tp.page(on_host, budget="32MiB") as pager,
    ):
        before = core_of(pager).stats()["acquires"]
        repr(on_host.blocks[0].up.weight)
        assert core_of(pager).stats()["acquires"] == before
