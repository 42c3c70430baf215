# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random moments of training in a store, and resume, again and again: `python -m bench kill-resume`.

A model trains and commits after every step; its process is killed at a random moment, a step or a commit or resume()
itself, and another one goes on. Each commit that was told of must be there, and the run that is killed so often must
end with the losses and weights of one that nobody killed, bit for bit. Lives share one import of torch (forkserver).
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import tensorpager as tp

STEPS_PER_RUN = 24
BUDGET = "24MiB"


def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(6)])
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    optimizer.zero_grad()
    loss = model(torch.randn(8, 1024, generator=torch.Generator().manual_seed(number))).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.item())


def checksums(model: torch.nn.Module) -> list[float]:
    return [float(parameter.detach().double().sum()) for parameter in model.parameters()]


def live(store: Path, told: Connection) -> None:
    """One life: to the run's end, unless it is killed."""
    model, optimizer = make()
    losses: list[float] = []
    if tp.committed(store):
        pager = tp.resume(store, model, optimizer, budget=BUDGET)
        losses = pager.state["losses"] if pager.state else []
    else:
        pager = tp.page(model, optimizer, budget=BUDGET, store=store)
    told.send(len(losses))
    while len(losses) < STEPS_PER_RUN:
        losses.append(step(model, optimizer, len(losses)))
        pager.commit({"losses": losses})
        told.send(len(losses))
    told.send((losses, checksums(model)))


def one_run(store: Path, rng: random.Random, expected: tuple[list[float], list[float]]) -> tuple[int, int, bool]:
    """Kills, lives whose first word was not the last commit, and whether the end is the expected one."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tensorpager.resumption"])
    kills = wrong = committed = 0
    while True:
        reader, writer = processes.Pipe(duplex=False)
        worker = processes.Process(target=live, args=(store, writer))
        worker.start()
        writer.close()
        said: list[int | tuple[list[float], list[float]]] = []
        # From the first moment on, or after the first step of this life: or there would be no progress.
        deadline = time.monotonic() + rng.uniform(0.0, 3.0)
        if rng.random() < 0.7:
            while len(said) < 2 and (reader.poll(60)):
                said.append(reader.recv())
            deadline = time.monotonic() + rng.uniform(0.0, 0.5)
        time.sleep(max(0.0, deadline - time.monotonic()))
        worker.kill()
        worker.join()
        try:
            while True:
                said.append(reader.recv())
        except EOFError:
            pass
        kills += worker.exitcode == -signal.SIGKILL
        numbers = [each for each in said if isinstance(each, int)]
        if numbers:
            wrong += numbers[0] not in (committed, committed + 1)
            committed = max(numbers)
        ends = [each for each in said if isinstance(each, tuple)]
        if ends:
            return kills, wrong, ends[0] == expected
        if worker.exitcode not in (0, -signal.SIGKILL):
            wrong += 1


def main(arguments: list[str] | None = None) -> int:
    """Prints how many kills there were; 0 when every life went on from the last commit and every end was right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="at least so many (default: 200)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    model, optimizer = make()
    expected = ([step(model, optimizer, number) for number in range(STEPS_PER_RUN)], checksums(model))
    rng = random.Random(options.seed)
    root = Path(tempfile.mkdtemp(prefix="tensorpager-kill-", dir="/var/tmp"))
    kills = wrong = runs = different = 0
    try:
        while kills < options.kills:
            store = root / f"run{runs}"
            run_kills, run_wrong, same = one_run(store, rng, expected)
            kills, wrong, runs, different = kills + run_kills, wrong + run_wrong, runs + 1, different + (not same)
            shutil.rmtree(store)
            print(
                f"{kills} kills in {runs} runs: {wrong} lives began elsewhere, {different} runs ended otherwise",
                flush=True,
            )
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return 1 if wrong or different else 0


if __name__ == "__main__":
    sys.exit(main())
