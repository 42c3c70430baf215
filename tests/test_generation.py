# SPDX-License-Identifier: Apache-2.0
"""generate() and pipelines of transformers on paged models: the tokens of the unpaged model, whatever is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tensorpager as tp
from torch_models import MIB

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]

BUDGET = 20 * MIB
VOCABULARY = 2048
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
COMMON = {
    **SPECIAL,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
}
TWO_STACKS = {
    "d_model": 384,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 1024,
    "decoder_ffn_dim": 1024,
    "vocab_size": VOCABULARY,
}

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(  # sliding windows
        transformers.Gemma3TextConfig(
            **COMMON, head_dim=48, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2
        )
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**{**COMMON, "intermediate_size": 512}, num_local_experts=4)
    ),
    "qwen3 moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **COMMON, head_dim=48, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=256
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=384, d_ff=1024, num_layers=3, num_heads=8, d_kv=48, vocab_size=VOCABULARY, decoder_start_token_id=0
        )
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**TWO_STACKS)),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **TWO_STACKS,
            **SPECIAL,
            max_source_positions=50,
            num_mel_bins=16,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    ),
}

#: By name: what generate() gets, and how many prompts at once.
WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "greedy": ({"do_sample": False}, 2),
    "sampling": ({"do_sample": True, "top_k": 20, "temperature": 0.8}, 2),
    "beams": ({"num_beams": 3, "do_sample": False, "num_return_sequences": 2}, 2),
    "beam sampling": ({"num_beams": 2, "do_sample": True}, 2),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3, "do_sample": False}, 1),
}


class Checkpoint:
    """A model in a directory: unpaged, and paged in a budget that is smaller."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.directory = directory
        torch.manual_seed(0)
        model = MODELS[name]()
        for parameter in model.parameters():  # spread out: tokens depend on what was read
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(directory, max_shard_size="8MB")
        self.unpaged = type(model).from_pretrained(directory).eval()
        self.paged = self.load()

    def load(self) -> Any:
        return tp.from_pretrained(self.directory, BUDGET)

    def inputs(self, count: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        if self.name == "whisper":
            return {"input_features": torch.randn(count, 16, 100, generator=generator)}
        ids = torch.randint(3, VOCABULARY, (count, 12), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Checkpoint(request.param, tmp_path_factory.mktemp(request.param.replace(" ", "_")))
    yield made
    made.paged.pager.close()


def tokens_of(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    torch.manual_seed(2)
    tokens: torch.Tensor = model.generate(**inputs, max_new_tokens=6, **kwargs)
    return tokens


@pytest.mark.parametrize("way", WAYS)
def test_the_same_tokens(checkpoint: Checkpoint, way: str) -> None:
    kwargs, count = WAYS[way]
    inputs = checkpoint.inputs(count)
    tokens = tokens_of(checkpoint.paged, inputs, **kwargs)
    assert torch.equal(tokens, tokens_of(checkpoint.unpaged, inputs, **kwargs))
    stats = checkpoint.paged.pager.stats()
    assert stats["resident_bytes_max"] <= BUDGET < stats["paged_bytes"]
    assert stats["bytes_read"] > 0
    assert stats["pinned_pages"] == 0


def test_assisted_by_a_model_that_is_paged_too(checkpoint: Checkpoint) -> None:
    """The assistant is the model itself, so that its candidates are taken."""
    inputs = checkpoint.inputs(1)
    assistant = checkpoint.load()
    expected = tokens_of(checkpoint.unpaged, inputs, do_sample=False)
    assert torch.equal(tokens_of(checkpoint.paged, inputs, do_sample=False, assistant_model=assistant), expected)
    assert assistant.pager.stats()["passes"] > 0
    assert assistant.pager.stats()["resident_bytes_max"] <= BUDGET
    assert {assistant.pager.stats()["pinned_pages"], checkpoint.paged.pager.stats()["pinned_pages"]} == {0}
    assistant.pager.close()


def test_logits_too(checkpoint: Checkpoint) -> None:
    kwargs = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    inputs = checkpoint.inputs(2)
    found, expected = (tokens_of(model, inputs, **kwargs) for model in (checkpoint.paged, checkpoint.unpaged))
    assert len(found.logits) == len(expected.logits) > 1
    for step, wanted in zip(found.logits, expected.logits, strict=True):
        assert torch.equal(step, wanted)


# -- classes and pipelines ---------------------------------------------------------------------------------------------


def make_tokenizer() -> Any:
    """One token for each word w0, w1, ... No network."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2", "unk_token": "w3", "mask_token": "w4"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special, padding_side="left")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("bert")
    sizes = {key: COMMON[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes, num_attention_heads=8)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("task", "auto_class", "text"),
    [
        ("text-generation", "AutoModelForCausalLM", ["w7 w8 w9", "w10"]),
        ("fill-mask", "AutoModelForMaskedLM", "w7 w4 w9"),
        ("feature-extraction", "AutoModel", ["w7 w8 w9", "w10 w11"]),
        ("text-classification", "AutoModelForSequenceClassification", "w7 w8"),
    ],
)
def test_pipelines(task: str, auto_class: str, text: Any, bert: Path, tmp_path: Path) -> None:
    directory = bert
    if task == "text-generation":
        torch.manual_seed(0)
        MODELS["llama"]().save_pretrained(directory := tmp_path)
    classes = getattr(transformers, auto_class)
    kwargs = {"max_new_tokens": 4, "do_sample": False, "batch_size": 2} if task == "text-generation" else {}
    answers = []
    for load in (classes.from_pretrained, lambda path: tp.from_pretrained(path, BUDGET, model_class=classes)):
        torch.manual_seed(3)  # of a head that the checkpoint lacks
        model = load(directory)
        answers.append(transformers.pipeline(task, model=model, tokenizer=make_tokenizer())(text, **kwargs))
    assert answers[0] == answers[1]
    assert model.pager.stats()["page_ins"] > 0
    assert model.pager.stats()["resident_bytes_max"] <= BUDGET
    model.pager.close()


def test_an_auto_class_gives_the_class_that_the_configuration_names(bert: Path, tmp_path: Path) -> None:
    model = tp.from_pretrained(bert, BUDGET, model_class=transformers.AutoModelForTokenClassification)
    assert type(model) is transformers.BertForTokenClassification
    model.pager.close()
    torch.manual_seed(0)
    MODELS["t5"]().save_pretrained(tmp_path)
    model = tp.from_pretrained(tmp_path, BUDGET, model_class=transformers.AutoModelForSeq2SeqLM)
    assert type(model) is transformers.T5ForConditionalGeneration
    model.pager.close()
    with pytest.raises(tp.PagedTensorError, match="AutoModelForSeq2SeqLM has no class for BertConfig"):
        tp.from_pretrained(bert, BUDGET, model_class=transformers.AutoModelForSeq2SeqLM)
