# SPDX-License-Identifier: Apache-2.0
"""The training of finetune.py by the Trainer of transformers, with a callback that pages it.

python examples/finetune_trainer.py --budget 100MiB --store run      # stop it whenever you like
python examples/finetune_trainer.py --budget 100MiB --store run      # and it goes on from its last commit
"""

from __future__ import annotations

import argparse

import torch
import transformers

from finetune import draw, make_model, read_texts
from tensorpager.trainer_callback import PagedTraining


class Pieces(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Pieces of the standard library's source, one for each number."""

    def __init__(self, text: torch.Tensor, count: int, columns: int) -> None:
        self._text = text
        self._count = count
        self._columns = columns

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        piece = draw(self._text, number, 1, self._columns)[0]
        return {"input_ids": piece, "labels": piece}


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(description="Train a byte-level Llama with a budget of memory, by the Trainer.")
    parser.add_argument("--budget", default="100MiB", help="a size (default: 100MiB)")
    parser.add_argument("--store", default="finetune-run", help="directory for what must survive")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    text, held_out = read_texts()
    # ------------------------------------------------------------------------------------------------------------------
    training = PagedTraining(options.store, budget=options.budget, commit_every=5)
    # ------------------------------------------------------------------------------------------------------------------
    trainer = transformers.Trainer(
        make_model(options.hidden, options.layers),
        transformers.TrainingArguments(
            output_dir=options.store,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=6e-4,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            weight_decay=0.1,
            logging_steps=5,
            eval_strategy="steps",
            eval_steps=20,
            save_strategy="no",  # the store's commits are the checkpoints
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=Pieces(text, 4 * options.steps, 128),
        eval_dataset=Pieces(held_out, 8, 128),
        callbacks=[training],
    )
    trainer.train(resume_from_checkpoint=training.checkpoint())
    print(f"held out {trainer.evaluate()['eval_loss']:.3f} nats a byte")


if __name__ == "__main__":
    main()
