# SPDX-License-Identifier: Apache-2.0
"""One way of training a small Llama, for training_peer.py; run inside the environment that has the library.

    python bench/training_worker.py JOB

JOB: JSON, {"library": "torch", "tensorpager" or "deepspeed", "directory", "hidden", "layers", "rows", "columns"}, and
for tensorpager the "share" of the training state that is the budget, for deepspeed "lean" (as little memory as it
runs with), "pipelined", and "own_aio" (its engine is `tensorpager.compat`). Each line on stdin is a number of steps to
do; the answer {"seconds" a step, "losses", "read_bytes" and "written_bytes" a step (the kernel's counts of what went to
the drive), "memory_bytes" (the peak of these steps, less what was there when the libraries had been imported)}.

All ways train the same numbers: float32, AdamW after backward, gradients clipped to a norm of 1.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers

RATE, CLIP_NORM = 6e-4, 1.0
MIB = 1 << 20


def make_model(job: dict[str, Any]) -> transformers.LlamaForCausalLM:
    """As examples/finetune.py makes it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=job["hidden"],
        intermediate_size=job["hidden"] * 11 // 4,
        num_hidden_layers=job["layers"],
        num_attention_heads=job["hidden"] // 64,
        max_position_embeddings=1024,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def plain_step(model: Any, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> Callable[[], float]:
    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        return loss.item()  # type: ignore[no-any-return]

    return step


def unpaged(job: dict[str, Any], batch: torch.Tensor) -> Callable[[], float]:
    model = make_model(job)
    return plain_step(model, torch.optim.AdamW(model.parameters(), lr=RATE), batch)


def paged(job: dict[str, Any], batch: torch.Tensor) -> Callable[[], float]:
    import tensorpager as tp

    model = make_model(job)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    tp.page(model, optimizer, budget=int(job["share"] * 16 * sum(each.numel() for each in model.parameters())))
    return plain_step(model, optimizer, batch)


def deepspeed(job: dict[str, Any], batch: torch.Tensor) -> Callable[[], float]:
    import deepspeed as library
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    _be_alone_in_the_world()
    _keep_float32()
    if job["own_aio"]:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        from tensorpager import compat

        AsyncIOBuilder.load = lambda *_, **__: compat
    model = make_model(job)
    optimizer = DeepSpeedCPUAdam(model.parameters(), lr=RATE, weight_decay=0.01, adamw_mode=True)  # torch's default
    config = deepspeed_config(job, max(parameter.numel() for parameter in model.parameters()))
    engine, *_ = library.initialize(model=model, optimizer=optimizer, config=config)

    def step() -> float:
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        return loss.item()  # type: ignore[no-any-return]

    return step


def deepspeed_config(job: dict[str, Any], largest: int) -> dict[str, Any]:
    """ZeRO-3 with parameters and optimizer on the drive. The counts of buffers are the fewest it runs with here: with
    fewer, its assertions on free buffers fail in the second step. Numbers of elements, not bytes."""
    live = 8 * largest
    parameters = {
        "device": "nvme",
        "nvme_path": job["directory"],
        "buffer_count": 24,
        "buffer_size": largest + 2048,
    }
    optimizer = {
        "device": "nvme",
        "nvme_path": job["directory"],
        "buffer_count": 12 if job["pipelined"] else 4,
        "pipeline_read": job["pipelined"],
        "pipeline_write": job["pipelined"],
    }
    if job["lean"]:
        parameters["max_in_cpu"] = 0
    return {
        "train_micro_batch_size_per_gpu": job["rows"],
        "gradient_clipping": CLIP_NORM,
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": largest if job["lean"] else 6 * largest,
            "stage3_prefetch_bucket_size": 3 * largest,
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": live,
            "stage3_param_persistence_threshold": 1000,
            "reduce_bucket_size": 3 * largest,
            "offload_param": parameters,
            "offload_optimizer": optimizer,
        },
        "aio": {"block_size": MIB, "queue_depth": 8, "overlap_events": True, "thread_count": 1},
    }


def _be_alone_in_the_world() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(world)


def _keep_float32() -> None:
    """0.19.8 takes bfloat16 for float32 parameters where the accelerator has no float16, as the CPU: its choice of a
    dtype asks that before it looks at what it was given, and the first layer then fails."""
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Initialisation

    choose = Initialisation._set_dtype

    def set_dtype(self: Any, config: Any, dtype: torch.dtype | None) -> None:
        if dtype is None:
            choose(self, config, dtype)
        else:
            self.dtype = dtype

    Initialisation._set_dtype = set_dtype


LIBRARIES = {"torch": unpaged, "tensorpager": paged, "deepspeed": deepspeed}


def drive_bytes() -> tuple[int, int]:
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["read_bytes"]), int(counts["write_bytes"])


def status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    job = json.loads(sys.argv[1])
    import_module(job["library"])
    imported_bytes = status_bytes("VmRSS")
    batch = torch.randint(256, (job["rows"], job["columns"]), generator=torch.Generator().manual_seed(0))
    step = LIBRARIES[job["library"]](job, batch)
    for line in sys.stdin:
        steps = int(line)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        read, written = drive_bytes()
        began = time.perf_counter()
        losses = [step() for _ in range(steps)]
        seconds = (time.perf_counter() - began) / steps
        read_now, written_now = drive_bytes()
        answer = {
            "seconds": seconds,
            "losses": losses,
            "read_bytes": (read_now - read) / steps,
            "written_bytes": (written_now - written) / steps,
            "memory_bytes": status_bytes("VmHWM") - imported_bytes,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
