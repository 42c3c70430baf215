# SPDX-License-Identifier: Apache-2.0
"""Runs a function as the ranks of a gloo process group, each in a process of its own, on this machine."""

from __future__ import annotations

import datetime as dt
import hashlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from tensorpager.shards import local_of

SECONDS_MAX = 100
#: How long a rank waits for another one in a collective of the training.
COLLECTIVE_SECONDS_MAX = 60

Rank = Callable[..., Any]


@dataclass
class Ended:
    """How a rank ended: what its function returned, or the error that it raised, or the signal that killed it."""

    result: Any = None
    error: str | None = None
    error_type: str | None = None
    signal: int = 0


def run_ranks(function: Rank, *arguments: Any, count: int = 2) -> list[Ended]:
    """function(rank, *arguments) on each rank, with the default group made. One process at a time uses a port."""
    processes = multiprocessing.get_context("forkserver")  # which imports torch once
    processes.set_forkserver_preload(["tensorpager.resumption", "torch.distributed.fsdp", "torch.distributed.tensor"])
    with tempfile.TemporaryDirectory() as directory:
        ranks = []
        for rank in range(count):
            reader, writer = processes.Pipe(duplex=False)
            arguments_of_rank = (writer, f"{directory}/meet", rank, count, function, arguments)
            worker = processes.Process(target=_be_rank, args=arguments_of_rank)
            worker.start()
            writer.close()
            ranks.append((worker, reader))
        return [_ended(worker, reader) for worker, reader in ranks]


def _be_rank(told: Connection, meet: str, rank: int, count: int, function: Rank, arguments: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    ended = Ended()
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{meet}",
            rank=rank,
            world_size=count,
            timeout=dt.timedelta(seconds=COLLECTIVE_SECONDS_MAX),
        )
        ended.result = function(rank, *arguments)
    except Exception as error:  # told to the test
        ended.error, ended.error_type = str(error), type(error).__name__
    told.send(ended)
    told.close()
    os._exit(0)  # not through the destructors of a group that another rank may have left


def _ended(worker: Any, reader: Connection) -> Ended:
    ended = Ended()
    try:
        if reader.poll(SECONDS_MAX):
            ended = reader.recv()
    except EOFError:
        pass
    worker.join(10)
    if worker.is_alive():
        worker.kill()
        worker.join()
    if worker.exitcode is not None and worker.exitcode < 0:
        ended.signal = -worker.exitcode
    return ended


def digest(tensor: torch.Tensor) -> str:
    """Of a tensor's bytes, or of this rank's part of them."""
    plain = local_of(tensor).detach().clone().contiguous()
    return hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def digests(model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, str]:
    """Of all parameters, gradients and state, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = digest(parameter)
        if parameter.grad is not None:
            found[f"{name}.grad"] = digest(parameter.grad)
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                found[f"{name}.{key}"] = digest(torch.as_tensor(value))
    return found
