# SPDX-License-Identifier: Apache-2.0
"""A callback for the Trainer of transformers: paged training in a store, resumed where it was interrupted.

    training = PagedTraining("run", budget="8GiB", commit_every=100)
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[training])
    trainer.train(resume_from_checkpoint=training.checkpoint())

The store's commits take the place of the Trainer's own checkpoints: give save_strategy="no" to its arguments. For one
process: what the Trainer wraps for several, it wraps before the callback sees it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from tensorpager.commit import random_states, set_random_states
from tensorpager.errors import PagedTensorError
from tensorpager.pager import Pager, page
from tensorpager.private_file import open_private, write_private
from tensorpager.resumption import committed, last_record, resume
from tensorpager.store import Store, store_directories

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["PagedTraining"]

_EMPTY_SAFETENSORS = (2).to_bytes(8, "little") + b"{}"


class PagedTraining(transformers.TrainerCallback):  # type: ignore[misc]
    """Pages the Trainer's model and optimizer when training begins, and commits every `commit_every` steps and at its
    end.

    store, budget, engine: as for page(). After training, `pager` is what page() or resume() returned; it is closed by
    whoever has no more use for the model, which computes as long as it is open.
    """

    def __init__(
        self, store: Store, *, budget: int | str = "1GiB", commit_every: int = 100, engine: str = "auto"
    ) -> None:
        if commit_every < 1:
            msg = f"commit_every is {commit_every}; it is a number of steps, 1 or more"
            raise ValueError(msg)
        self.pager: Pager | None = None
        self._store = store
        self._budget = budget
        self._engine = engine
        self._commit_every = commit_every
        self._random: dict[str, Any] | None = None  # of the last commit, until the first step is about to begin

    def checkpoint(self) -> str | None:
        """For resume_from_checkpoint: a folder in the store from which the Trainer learns its position, or None.

        None when the store has no commit by this callback yet. The weights in it are empty: resume() brings them.
        Raises IoError, CheckpointError.
        """
        directory = store_directories(self._store)[0]
        if not committed(self._store):
            return None
        state = last_record(self._store).state
        if not isinstance(state, dict) or "trainer_state" not in state:
            return None
        folder = Path(directory) / "trainer"
        folder.mkdir(mode=0o700, exist_ok=True)
        write_private(folder / "trainer_state.json", state["trainer_state"])
        with open_private(folder / "model.safetensors") as file:
            file.write(_EMPTY_SAFETENSORS)
        return os.fspath(folder)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **kwargs: Any
    ) -> None:
        """Page the model with its optimizer, or resume from the last commit."""
        if args.world_size > 1:
            msg = (
                f"PagedTraining is for one process, and {args.world_size} train here; write the loop yourself, with "
                "page() and fully_shard() or DistributedDataParallel (examples/finetune_distributed.py)"
            )
            raise PagedTensorError(msg)
        model, optimizer = kwargs["model"], _inner(kwargs["optimizer"])
        if self.pager is not None and not self.pager.closed:
            msg = "this PagedTraining pages a model already; make one for each Trainer, and close its pager before"
            raise PagedTensorError(msg)
        if not committed(self._store):
            self.pager = page(model, optimizer, budget=self._budget, store=self._store, engine=self._engine)
            return
        self.pager = resume(self._store, model, optimizer, budget=self._budget, engine=self._engine)
        kept = self.pager.state or {}
        if kept.get("step", 0) != state.global_step:
            self.pager.close()
            msg = (
                f"the store's last commit is of step {kept.get('step', 0)}, but the Trainer begins at step "
                f"{state.global_step}; give train(resume_from_checkpoint=) what checkpoint() of this callback returns"
            )
            raise PagedTensorError(msg)
        if kept:
            kwargs["lr_scheduler"].load_state_dict(kept["scheduler"])
            self._random = kept["random"]

    def on_step_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **kwargs: Any
    ) -> None:
        """Commit every commit_every steps: here, when the step before is logged and the next one's data are drawn."""
        if self._random is not None:  # skipping the data that was seen has drawn some
            set_random_states(self._random)
            self._random = None
        elif state.global_step > 0 and state.global_step % self._commit_every == 0:
            self._commit(state, kwargs["lr_scheduler"])

    def on_train_end(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **kwargs: Any
    ) -> None:
        """Commit what the last steps trained."""
        self._commit(state, kwargs["lr_scheduler"])

    def _commit(self, state: TrainerState, scheduler: Any) -> None:
        assert self.pager is not None
        kept = {
            "step": state.global_step,
            "scheduler": scheduler.state_dict(),
            "trainer_state": _as_json(state),
            "random": random_states(),
        }
        self.pager.commit(kept)


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """Of accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _as_json(state: TrainerState) -> str:
    import dataclasses
    import json

    return json.dumps(dataclasses.asdict(state), indent=1)
