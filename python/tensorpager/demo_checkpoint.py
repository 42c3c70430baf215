# SPDX-License-Identifier: Apache-2.0
"""Makes the demo's checkpoint: a Llama-architecture model with random weights, sharded, written shard by shard.

The weights are a function of the size alone (a fixed seed), so two machines make the same files.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Shape", "make_checkpoint", "shape_for"]

SEED = 20240917
SHARD_BYTES = 512 * 2**20
FLOAT_BYTES = 4  # float32: a decode step on a CPU then takes less time than reading what it needs


@dataclass(frozen=True)
class Shape:
    """What makes up a Llama model of a given size. Counts, but for the name."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    layers: int

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters in float32; embedding and head are separate."""
        return FLOAT_BYTES * (self.layers * self._layer_parameters + 2 * self.vocabulary * self.hidden + self.hidden)

    @property
    def _layer_parameters(self) -> int:
        key_value = self.hidden // self.heads * self.key_value_heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * key_value
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    def name(self) -> str:
        """A directory name that differs between shapes."""
        return f"llama-{self.hidden}x{self.layers}-{self.vocabulary}"


def shape_for(size_bytes: int) -> Shape:
    """The shape whose parameters come closest to size_bytes: the width by order of magnitude, then as many layers."""
    if size_bytes >= 2**30:
        base = Shape(2048, 5632, 32, 8, 32000, 1)
    elif size_bytes >= 2**27:
        base = Shape(512, 1408, 8, 2, 8000, 1)
    else:
        base = Shape(256, 704, 4, 2, 2000, 1)
    layer_bytes = FLOAT_BYTES * base._layer_parameters
    layers = max(2, 1 + round((size_bytes - base.parameter_bytes) / layer_bytes))
    return Shape(base.hidden, base.intermediate, base.heads, base.key_value_heads, base.vocabulary, layers)


def make_checkpoint(parent: Path, shape: Shape) -> Path:
    """The checkpoint's directory below parent; made now unless it is there. Needs the space of the model and one
    shard of RAM.

    Written under another name and renamed when it is complete and on the disk, so what is there is whole. Files are
    0600.
    """
    directory = parent / shape.name()
    if directory.is_dir():
        return directory
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < shape.parameter_bytes * 1.1:
        msg = (
            f"{parent} has {free_bytes} bytes free and the checkpoint takes {shape.parameter_bytes}; "
            "make room, or choose another --directory or a smaller --size"
        )
        raise OSError(msg)
    unfinished = parent / f"{shape.name()}.unfinished.{os.getpid()}"
    unfinished.mkdir(mode=0o700)
    try:
        _write_checkpoint(unfinished, shape)
        unfinished.rename(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def _write_checkpoint(directory: Path, shape: Shape) -> None:
    from tqdm import tqdm
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        num_hidden_layers=shape.layers,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    config.save_pretrained(directory)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(directory)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    shards = _split(shapes)
    generator = torch.Generator().manual_seed(SEED)
    weight_map: dict[str, str] = {}
    total_bytes = sum(shape.numel() for shape in shapes.values()) * FLOAT_BYTES
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="making the checkpoint") as progress:
        for number, names in enumerate(shards, start=1):
            file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weights = {name: _random(name, shapes[name], generator) for name in names}
            _save(weights, directory / file_name)
            weight_map.update(dict.fromkeys(names, file_name))
            progress.update(sum(weight.nbytes for weight in weights.values()))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    for path in directory.iterdir():
        path.chmod(0o600)


def _split(shapes: dict[str, torch.Size]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled_bytes = 0
    for name, shape in shapes.items():
        size_bytes = shape.numel() * FLOAT_BYTES
        if shards[-1] and filled_bytes + size_bytes > SHARD_BYTES:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(name)
        filled_bytes += size_bytes
    return shards


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    return torch.empty(shape).normal_(std=0.02, generator=generator)


def _save(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write one shard, wait until it is on the disk and drop it from the page cache: the next reader finds it cold."""
    from safetensors.torch import save_file

    save_file(weights, path, metadata={"format": "pt"})
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
