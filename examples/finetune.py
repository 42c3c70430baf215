# SPDX-License-Identifier: Apache-2.0
"""Train a byte-level Llama on the source text of Python's standard library, with a budget of memory and a store.

    python examples/finetune.py --budget 100MiB --store run        # stop it whenever you like, even with kill -9
    python examples/finetune.py --budget 100MiB --store run        # and it goes on from its last commit
    python examples/finetune.py --unpaged                          # the same training, all in memory
    tensorpager export run --output weights.safetensors            # what other tools load

What tensorpager asks of a training loop is between the two lines of dashes in main(). Losses go to losses.csv, and a
picture of them to loss.png, beside the store's own files.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sysconfig
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import tensorpager as tp

HELD_OUT_EVERY = 20  # of the files: never trained on
TEXT_BYTES_MAX = 24 * 2**20


def read_texts() -> tuple[torch.Tensor, torch.Tensor]:
    """The standard library's source, as bytes: to train on, and held out. Two 1-D uint8 tensors."""
    training, held_out = bytearray(), bytearray()
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path for path in root.rglob("*.py") if "site-packages" not in path.parts and "test" not in path.parts
    )
    for number, path in enumerate(files):
        (held_out if number % HELD_OUT_EVERY == 0 else training).extend(path.read_bytes())
        if len(training) > TEXT_BYTES_MAX:
            break
    return torch.frombuffer(training, dtype=torch.uint8), torch.frombuffer(held_out, dtype=torch.uint8)


def draw(text: torch.Tensor, seed: int, rows: int, columns: int) -> torch.Tensor:
    """Pieces of the text at places that the seed says: int64, rows x columns. Step n's data need no other state."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - columns, (rows,), generator=generator).tolist()
    return torch.stack([text[start : start + columns] for start in starts]).long()


def make_model(hidden: int, layers: int) -> transformers.LlamaForCausalLM:
    """A Llama over bytes, float32, the same weights each time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=1024,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def training_bytes(model: torch.nn.Module) -> int:
    """Of weights, gradients and AdamW's two moments."""
    return 4 * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def held_out_loss(model: torch.nn.Module, text: torch.Tensor, rows: int, columns: int) -> float:
    """Mean over two batches that are always the same, nats a byte."""
    model.eval()
    with torch.no_grad():
        batches = [draw(text, 10**6 + number, rows, columns) for number in range(2)]
        losses: list[float] = [model(input_ids=batch, labels=batch).loss.item() for batch in batches]
    model.train()
    return sum(losses) / len(losses)


def rate_at(step: int, warmup: int, steps: int) -> float:
    """Warm-up, then a half cosine: a share of the learning rate."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def plot(losses: list[float], held_out: dict[int, float], path: Path) -> None:
    """The losses as a picture, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats a byte", title="a byte-level Llama on Python's library")
    axes.plot(range(1, len(losses) + 1), losses, label="training", linewidth=1)
    axes.plot(list(held_out), list(held_out.values()), "o-", label="held out")
    axes.legend()
    figure.savefig(path)


def parse_arguments() -> argparse.Namespace:
    """See --help."""
    parser = argparse.ArgumentParser(description="Train a byte-level Llama with a budget of memory.")
    parser.add_argument("--budget", default="25%", help="a size, or a share of the training state (default: 25%%)")
    parser.add_argument("--store", type=Path, default=Path("finetune-run"), help="directory for what must survive")
    parser.add_argument("--unpaged", action="store_true", help="without tensorpager, for comparison; nothing is kept")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--commit-every", type=int, default=5, help="steps (default: 5)")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4, help="of a batch (default: 4)")
    parser.add_argument("--columns", type=int, default=128, help="bytes of a row (default: 128)")
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--facts", type=Path, help="write what was measured to this file, as JSON")
    return parser.parse_args()


def report(options: argparse.Namespace, run: Run, model: torch.nn.Module, pager: tp.Pager | None) -> None:
    """Files for people (losses.csv, loss.png) and, with --facts, for programs."""
    print(f"loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f}, held out {run.held_out[len(run.losses)]:.3f} nats a byte")
    if pager is not None:
        with (options.store / "losses.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("step", "loss"), *enumerate(run.losses, 1)])
        plot(run.losses, run.held_out, options.store / "loss.png")
    if options.facts is not None:
        checksums = [float(parameter.detach().double().sum()) for parameter in model.parameters()]
        facts: dict[str, object] = {**asdict(run), "checksums": checksums}
        if pager is not None:
            facts["stats"] = {key: value for key, value in pager.stats().items() if isinstance(value, (int, float))}
            facts["schedule"] = pager.stats()["schedule"]
        options.facts.write_text(json.dumps(facts))


@dataclass
class Run:
    """What has come of the steps so far. seconds, moved_bytes (read and written): of those of this process."""

    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    moved_bytes: list[int] = field(default_factory=list)


def moved_bytes(pager: tp.Pager | None) -> int:
    """Read from the drive and written to it so far."""
    return 0 if pager is None else pager.stats()["bytes_read"] + pager.stats()["bytes_written"]


def main() -> None:
    """Train, or go on training."""
    options = parse_arguments()
    text, held_out_text = read_texts()
    model = make_model(options.hidden, options.layers)
    state_bytes = training_bytes(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, 10, options.steps))
    share = options.budget.removesuffix("%")
    budget = options.budget if share == options.budget else int(state_bytes * float(share) / 100)

    run = Run()
    pager = None
    # ------------------------------------------------------------------------------------------------------------------
    if options.unpaged:
        pass
    elif tp.committed(options.store):
        pager = tp.resume(options.store, model, optimizer, budget=budget)
    else:
        pager = tp.page(model, optimizer, budget=budget, store=options.store)
    if pager is not None and pager.state is not None:
        scheduler.load_state_dict(pager.state["scheduler"])
        run.losses, run.held_out = pager.state["losses"], pager.state["held_out"]
    # ------------------------------------------------------------------------------------------------------------------
    where = "in memory" if pager is None else f"in {pager.budget_bytes / 2**20:,.0f} MiB"
    print(f"{state_bytes / 2**20:,.0f} MiB of training state {where}; from step {len(run.losses)}", flush=True)

    with tqdm(total=options.steps, initial=len(run.losses), desc="training", unit="step") as bar:
        while len(run.losses) < options.steps:
            begin, moved_before = time.perf_counter(), moved_bytes(pager)
            batch = draw(text, len(run.losses), options.rows, options.columns)
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            run.losses.append(loss.item())
            run.seconds.append(time.perf_counter() - begin)
            run.moved_bytes.append(moved_bytes(pager) - moved_before)
            bar.update()
            done = len(run.losses)
            if done % 20 == 0 or done == options.steps:
                run.held_out[done] = held_out_loss(model, held_out_text, options.rows, options.columns)
            bar.set_postfix(
                loss=f"{loss.item():.3f}", held_out=f"{next(reversed(run.held_out.values()), math.nan):.3f}"
            )
            if pager is not None and (done % options.commit_every == 0 or done == options.steps):
                pager.commit({"scheduler": scheduler.state_dict(), "losses": run.losses, "held_out": run.held_out})
    report(options, run, model, pager)


if __name__ == "__main__":
    main()
