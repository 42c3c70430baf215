# SPDX-License-Identifier: Apache-2.0
"""generate() and pipelines of transformers on paged models: the tokens of the unpaged model, whatever is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tensorpager as tp
from generation_models import BUDGET, COMMON, MODELS, VOCABULARY, WAYS, Checkpoint, tokens_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Checkpoint(request.param, tmp_path_factory.mktemp(request.param.replace(" ", "_")))
    yield made
    made.paged.pager.close()


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
