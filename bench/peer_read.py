# SPDX-License-Identifier: Apache-2.0
"""Reads a safetensors file into torch tensors with one peer; run by page_in.py inside the peers' environment.

    python bench/peer_read.py PEER FILE

Prints {"seconds", "cpu_seconds", "bytes"}. Peers that read into memory they are given get it allocated and touched
before the clock
starts, which is their best case; peers that allocate the tensors themselves pay for it, since their users do.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

BLOCK_BYTES = 1 << 20
DEPTH = 8
CHUNK_BYTES = 256 << 20  # peers with buffers of a fixed size take the file in pieces of this


def main() -> None:
    peer, path = sys.argv[1], Path(sys.argv[2])
    read = PEERS[peer](path)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    bytes_read = read()
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "bytes": bytes_read}))


def _total(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _touch(tensors: dict[str, torch.Tensor]) -> None:
    """One byte of every 4 KiB: what is only mapped is read now."""
    for tensor in tensors.values():
        tensor.view(-1).view(torch.uint8)[::4096].sum()


def safetensors_load_file(path: Path) -> Callable[[], int]:
    from safetensors.torch import load_file

    def read() -> int:
        tensors = load_file(path)
        _touch(tensors)
        return _total(tensors)

    return read


def torch_load_mmap(path: Path) -> Callable[[], int]:
    archive = path.with_suffix(".pt")

    def read() -> int:
        tensors = torch.load(archive, mmap=True, weights_only=True)
        _touch(tensors)
        return _total(tensors)

    return read


def accelerate_disk_offload(path: Path) -> Callable[[], int]:
    """What its hook does before a module runs: ask the offloaded weights for each tensor and put it on the CPU."""
    from accelerate.utils import OffloadedWeightsLoader
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    index = {name: {"safetensors_file": str(path), "weight_name": name, "dtype": "float32"} for name in names}
    loader = OffloadedWeightsLoader(index=index, device="cpu")

    def read() -> int:
        total = 0
        for name in names:
            tensor = loader[name].to("cpu", copy=False)
            _touch({name: tensor})
            total += tensor.nbytes
        return total

    return read


def accelerate_offload_folder(path: Path) -> Callable[[], int]:
    """The same from a folder of .dat files, as `disk_offload` writes them. The folder is made by page_in.py."""
    from accelerate.utils import OffloadedWeightsLoader

    loader = OffloadedWeightsLoader(save_folder=str(path.with_suffix(".offload")))

    def read() -> int:
        total = 0
        for name in loader:
            tensor = loader[name]
            _touch({name: tensor})
            total += tensor.nbytes
        return total

    return read


def _deepspeed(path: Path, own_buffers: bool) -> Callable[[], int]:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    handle = AsyncIOBuilder().load().aio_handle(BLOCK_BYTES, DEPTH, False, True, 1)
    buffer = torch.ones(CHUNK_BYTES, dtype=torch.uint8)
    if own_buffers:
        buffer = handle.new_cpu_locked_tensor(CHUNK_BYTES, torch.empty(0, dtype=torch.uint8))
        buffer.fill_(1)
    chunks = path.stat().st_size // CHUNK_BYTES

    def read() -> int:
        for chunk in range(chunks):
            handle.async_pread(buffer, str(path), chunk * CHUNK_BYTES)
            handle.wait()
        return chunks * CHUNK_BYTES

    return read


def deepspeed_own_buffers(path: Path) -> Callable[[], int]:
    return _deepspeed(path, own_buffers=True)


def deepspeed_torch_tensors(path: Path) -> Callable[[], int]:
    return _deepspeed(path, own_buffers=False)


def kvikio_torch_tensors(path: Path) -> Callable[[], int]:
    import kvikio
    import kvikio.defaults

    kvikio.defaults.set({"num_threads": DEPTH, "task_size": 4 * BLOCK_BYTES, "auto_direct_io_read": True})
    buffer = torch.ones(CHUNK_BYTES, dtype=torch.uint8).numpy()
    chunks = path.stat().st_size // CHUNK_BYTES

    def read() -> int:
        total = 0
        with kvikio.CuFile(path, "r") as file:
            for chunk in range(chunks):
                total += file.pread(buffer, CHUNK_BYTES, chunk * CHUNK_BYTES).get()
        return total

    return read


PEERS = {
    "safetensors load_file": safetensors_load_file,
    "torch.load(mmap) + touch": torch_load_mmap,
    "accelerate, in place": accelerate_disk_offload,
    "accelerate disk offload": accelerate_offload_folder,
    "DeepSpeed async_io, own buffers": deepspeed_own_buffers,
    "DeepSpeed async_io, torch tensors": deepspeed_torch_tensors,
    "KvikIO": kvikio_torch_tensors,
}


if __name__ == "__main__":
    main()
