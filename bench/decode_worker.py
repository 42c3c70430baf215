# SPDX-License-Identifier: Apache-2.0
"""One run of a peer for decode.py: `python -m bench.decode_worker JOB` prints {"pass_seconds", "memory_bytes_max"}
as JSON.

Runs what the demo runs (same prompt, same generate), so that the passes compare one to one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tensorpager.demo_worker import PassClock, _generate, _status_bytes


def load_accelerate(model_directory: str, budget_bytes: int, scratch: str) -> Any:
    """Disk offload with as much of the model in RAM as the budget holds; accelerate decides which part."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        model_directory,
        dtype="auto",
        device_map="auto",
        max_memory={"cpu": budget_bytes},
        offload_folder=scratch,
        offload_buffers=True,
    )


def load_mapped(model_directory: str, budget_bytes: int, scratch: str) -> Any:
    """Parameters are the mapped file: the kernel pages them, inside the limit of this process's memory cgroup."""
    del budget_bytes, scratch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_directory)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    state: dict[str, torch.Tensor] = {}
    for path in sorted(Path(model_directory).glob("*.safetensors")):
        state.update(load_file(path))
    return type(skeleton).from_pretrained(None, config=config, state_dict=state, dtype="auto")


LOADERS = {"accelerate": load_accelerate, "mmap": load_mapped}


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory(dir=job["scratch"]) as scratch:
        model = LOADERS[job["peer"]](job["model"], job["budget_bytes"], scratch).eval()
        clock = PassClock(None)
        _generate(model, job["tokens"], clock)
    print(json.dumps({"pass_seconds": clock.seconds(), "memory_bytes_max": _status_bytes("VmHWM")}))


if __name__ == "__main__":
    main()
