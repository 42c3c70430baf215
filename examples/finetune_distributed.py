# SPDX-License-Identifier: Apache-2.0
"""The training of finetune.py by several ranks, each of which pages what it has of the model.

torchrun --nproc-per-node 2 examples/finetune_distributed.py --budget 50MiB --store run     # stop it whenever you like
torchrun --nproc-per-node 2 examples/finetune_distributed.py --budget 50MiB --store run     # and it goes on
tensorpager export run --output weights.safetensors                                         # whole weights

fully_shard() gives each rank a shard of every parameter; with --ddp each has all of them. Wrap the model, make the
optimizer, then page: the loop stays as it is.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tensorpager as tp
from finetune import draw, make_model, read_texts


def wrap(model: torch.nn.Module, ddp: bool) -> torch.nn.Module:
    """For the ranks of the default group, on the CPU."""
    if ddp:
        return DistributedDataParallel(model, gradient_as_bucket_view=True)  # gradients lie in its buckets anyway
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.get_submodule("model.layers").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(description="Train a byte-level Llama by several ranks, with a budget for each.")
    parser.add_argument("--budget", default="50MiB", help="of each rank, a size (default: 50MiB)")
    parser.add_argument("--store", default="finetune-run", help="directory for what must survive")
    parser.add_argument("--ddp", action="store_true", help="DistributedDataParallel instead of fully_shard")
    parser.add_argument("--unpaged", action="store_true", help="without tensorpager, for comparison; nothing is kept")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    text, _ = read_texts()
    model = wrap(make_model(options.hidden, options.layers), options.ddp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1)
    pager = None
    # ------------------------------------------------------------------------------------------------------------------
    if options.unpaged:
        pass
    elif tp.committed(options.store):
        pager = tp.resume(options.store, model, optimizer, budget=options.budget)
    else:
        pager = tp.page(model, optimizer, budget=options.budget, store=options.store)
    begin = 0 if pager is None or pager.state is None else pager.state["step"]
    # ------------------------------------------------------------------------------------------------------------------
    for step in range(begin, options.steps):
        batch = draw(text, count * step + rank, 4, 128)  # another one on each rank
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if pager is not None and ((step + 1) % 5 == 0 or step + 1 == options.steps):
            pager.commit({"step": step + 1})  # all ranks, or none
        if rank == 0:
            print(f"step {step + 1}: loss {loss.item()!r} nats a byte, of rank 0", flush=True)
    if pager is not None:
        pager.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
