# SPDX-License-Identifier: Apache-2.0
"""The Trainer of transformers, paged: the same losses and weights, also after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tensorpager as tp
from tensorpager.trainer_callback import PagedTraining

STEPS = 7


def make_model() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=4,
        attention_dropout=0.2,  # draws random numbers
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


class StopAt(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        if state.global_step == self._step:
            raise KeyboardInterrupt


def make_trainer(path: Path, callbacks: list[Any]) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(path),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = torch.randint(256, (20, 16), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in rows]
    return transformers.Trainer(make_model(), arguments, train_dataset=data, callbacks=callbacks)


def losses_of(trainer: transformers.Trainer) -> list[tuple[int, float, float]]:
    return [(each["step"], each["loss"], each["grad_norm"]) for each in trainer.state.log_history if "loss" in each]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> transformers.Trainer:
    trainer = make_trainer(tmp_path_factory.mktemp("unpaged"), [])
    trainer.train()
    return trainer


def assert_same_as(reference: transformers.Trainer, trainer: transformers.Trainer) -> None:
    assert losses_of(trainer) == losses_of(reference)
    assert len(losses_of(trainer)) == STEPS
    for (name, parameter), other in zip(trainer.model.named_parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_training_is_the_same(tmp_path: Path, reference: transformers.Trainer) -> None:
    training = PagedTraining(tmp_path / "run", budget="16MiB", commit_every=3)
    assert training.checkpoint() is None
    trainer = make_trainer(tmp_path, [training])
    trainer.train(resume_from_checkpoint=training.checkpoint())
    assert_same_as(reference, trainer)
    assert training.pager is not None
    assert training.pager.stats()["page_ins"] > 0
    training.pager.close()
    assert tp.committed(tmp_path / "run") == 1 + 2 + 1  # page()'s own, of steps 3 and 6, and at the end


@pytest.mark.parametrize("interrupted_after", [3, 4, 6])
def test_it_goes_on_where_it_was_interrupted(
    tmp_path: Path, reference: transformers.Trainer, interrupted_after: int
) -> None:
    training = PagedTraining(tmp_path / "run", budget="16MiB", commit_every=3)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, [training, StopAt(interrupted_after)]).train()
    assert training.pager is not None
    training.pager.close()
    training = PagedTraining(tmp_path / "run", budget="16MiB", commit_every=3)
    folder = training.checkpoint()
    assert (folder is None) == (interrupted_after <= 3)
    trainer = make_trainer(tmp_path, [training])
    trainer.train(resume_from_checkpoint=folder)
    assert_same_as(reference, trainer)
    assert training.pager is not None
    training.pager.close()


def test_a_store_that_is_not_told_of_is_refused(tmp_path: Path) -> None:
    training = PagedTraining(tmp_path / "run", budget="16MiB", commit_every=2)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, [training, StopAt(3)]).train()
    with pytest.raises(tp.PagedTensorError, match="pages a model already"):
        make_trainer(tmp_path, [training]).train()
    assert training.pager is not None
    training.pager.close()
    with pytest.raises(tp.PagedTensorError, match=r"commit is of step 2, but the Trainer begins at step 0.*checkpoint"):
        make_trainer(tmp_path, [PagedTraining(tmp_path / "run", budget="16MiB")]).train()
    with pytest.raises(ValueError, match="1 or more"):
        PagedTraining(tmp_path / "run", commit_every=0)


def test_it_is_for_one_process(tmp_path: Path) -> None:
    class OfTwo:
        world_size = 2

    with pytest.raises(tp.PagedTensorError, match="is for one process, and 2 train here"):
        PagedTraining(tmp_path).on_train_begin(OfTwo(), None, None)  # type: ignore[arg-type]
    assert tp.committed(tmp_path) == 0
