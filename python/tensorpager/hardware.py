# SPDX-License-Identifier: Apache-2.0
"""A machine as the planner sees it: sizes and rates of its tiers, built from data sheets or measured here.

Three tiers: the device's memory, the host's, the drive. Without a GPU the device's memory *is* a slice of RAM, and
there is no host tier. Data sheets give peaks; no program reaches them. What profile() expects of a peak is an
assumption of the planner, no figure of any vendor, and stands here by name: MATMUL_EFFICIENCY, MEMORY_EFFICIENCY and
PCIE_EFFICIENCY. The rates of drives are taken from their data sheets as they are, and so is everything in
hardware_profiles.py. measured_hardware.this_machine() applies no fraction: it measures what is reached.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tensorpager.budget import format_bytes
from tensorpager.hardware_profiles import CPU, DRIVES, GPUS, PCIE_LINE_BYTES_PER_SECOND, Drive, Processor

__all__ = ["DRIVES", "GPUS", "Drive", "Hardware", "Processor", "profile"]

HARDWARE_FORMAT = "tensorpager-hardware"
HARDWARE_VERSION = 1

# Assumptions, all three. A tuned bfloat16 matmul of a good shape reaches 780 of 989 TFLOP/s on an H100
# (https://gist.github.com/Chillee/2ec89696db8b7ed1c24461159e325405); a model's matmuls are no such shapes.
MATMUL_EFFICIENCY = 0.6
MEMORY_EFFICIENCY = 0.8
# Of the line rate after encoding: packet headers, and credits that come back late.
PCIE_EFFICIENCY = 0.8

SIZE_FIELDS = ("device_bytes", "host_bytes")
POSITIVE_FIELDS = (
    "flops_per_second",
    "memory_bytes_per_second",
    "drive_read_bytes_per_second",
    "drive_write_bytes_per_second",
)
OPTIONAL_FIELDS = ("host_to_device_bytes_per_second", "device_to_host_bytes_per_second", "drive_endurance_bytes")
FIGURE_MAX = 1e24  # beyond anything that is built; keeps infinities and integers no float can hold out


@dataclass(frozen=True)
class Hardware:
    """Sizes in bytes, rates per second.

    device_bytes: memory of the GPU, or the slice of RAM where there is none; 0 when unknown. host_bytes: RAM of the
    host that can be a tier; 0 for no such tier. flops_per_second: sustained rate of dense matmuls (half precision on
    GPUs). memory_bytes_per_second: bandwidth of the device's memory. host_to_device and device_to_host: 0, both, where
    device memory is host memory. drive_endurance_bytes: rated bytes written over the drive's life, 0 when unknown.
    sources: from a figure's field name to where it is from. ValueError that names the rule when one is broken.
    """

    name: str
    device_bytes: int
    host_bytes: int
    flops_per_second: float
    memory_bytes_per_second: float
    host_to_device_bytes_per_second: float
    device_to_host_bytes_per_second: float
    drive_read_bytes_per_second: float
    drive_write_bytes_per_second: float
    drive_endurance_bytes: float
    sources: Mapping[str, str] = field(hash=False)

    def __post_init__(self) -> None:
        _check(self)
        # A copy, so that nobody changes it behind the frozen class.
        object.__setattr__(self, "sources", dict(self.sources))

    def step_seconds(self, flops: int, moved_bytes: int) -> float:
        """Seconds a step takes that computes flops and moves moved_bytes through device memory: whichever is slower.

        ValueError when one of them is negative.
        """
        if flops < 0 or moved_bytes < 0:
            msg = f"a step computes {flops} operations and moves {moved_bytes} bytes; neither can be negative"
            raise ValueError(msg)
        return max(flops / self.flops_per_second, moved_bytes / self.memory_bytes_per_second)

    def to_json(self) -> str:
        """The same hardware always gives the same text, byte for byte."""
        content: dict[str, object] = {"format": HARDWARE_FORMAT, "version": HARDWARE_VERSION}
        content.update((each.name, getattr(self, each.name)) for each in fields(self))
        content["sources"] = dict(sorted(self.sources.items()))
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Hardware:
        """Read to_json()'s text. ValueError that names the rule when the text breaks one."""
        try:
            content: Any = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: also for integers of thousands of digits
            msg = f"hardware: not JSON: {error}"
            raise ValueError(msg) from None
        _require(isinstance(content, dict), "the text is one JSON object")
        _require(content.pop("format", None) == HARDWARE_FORMAT, f'"format" is "{HARDWARE_FORMAT}"')
        version = content.pop("version", None)
        _require(version == HARDWARE_VERSION and type(version) is int, f'"version" is {HARDWARE_VERSION}')
        names = {each.name for each in fields(cls)}
        missing, unknown = sorted(names - content.keys()), sorted(content.keys() - names)
        _require(not missing and not unknown, f"exactly the known fields (missing {missing}, unknown {unknown})")
        return cls(**content)


def _require(holds: bool, rule: str) -> None:
    if not holds:
        msg = f"hardware breaks a rule: {rule}"
        raise ValueError(msg)


def _check(hardware: Hardware) -> None:
    """Every rule of a Hardware; ValueError with the one that is broken."""
    _require(type(hardware.name) is str and hardware.name != "", "name is a text that is not empty")
    for name in SIZE_FIELDS:
        value = getattr(hardware, name)
        _require(type(value) is int and 0 <= value < FIGURE_MAX, f"{name} is an integer, 0 or more")
    for name in POSITIVE_FIELDS:
        value = getattr(hardware, name)
        _require(type(value) in (int, float) and 0 < value < FIGURE_MAX, f"{name} is a positive number")
    for name in OPTIONAL_FIELDS:
        value = getattr(hardware, name)
        _require(type(value) in (int, float) and 0 <= value < FIGURE_MAX, f"{name} is a number, 0 or more")
    has_link = hardware.host_to_device_bytes_per_second > 0
    both = has_link == (hardware.device_to_host_bytes_per_second > 0)
    _require(both, "host_to_device and device_to_host are both positive or both 0")
    _require(has_link or hardware.host_bytes == 0, "host_bytes is 0 where device memory is host memory")
    sources: object = hardware.sources
    _require(isinstance(sources, Mapping), "sources is a mapping")
    assert isinstance(sources, Mapping)
    figures = {*SIZE_FIELDS, *POSITIVE_FIELDS, *OPTIONAL_FIELDS}
    _require(figures >= set(sources), "sources names figures of the hardware alone")
    _require(all(type(text) is str and text != "" for text in sources.values()), "a source is a text, not empty")


def profile(gpu: str | None, drive: str, *, drives: int = 1, host_bytes: int = 0) -> Hardware:
    """A machine of known parts: a GPU of GPUS, a drive of DRIVES, host_bytes of RAM.

    gpu None: the device is host_bytes of RAM beside a desktop's CPU. drives: that many, striped; their rates and their
    endurance add up, what PCIe links they may share is not considered. ValueError for a name that is not known (the
    message lists those that are), drives below 1, host_bytes below 0.
    """
    processor = CPU if gpu is None else _part(GPUS, gpu, "GPU")
    storage = _part(DRIVES, drive, "drive")
    if type(drives) is not int or drives < 1:
        msg = f"drives is {drives!r}; it must be an integer, 1 or more"
        raise ValueError(msg)
    if type(host_bytes) is not int or host_bytes < 0:
        msg = f"host_bytes is {host_bytes!r}; it must be an integer, 0 or more"
        raise ValueError(msg)
    link = PCIE_LINE_BYTES_PER_SECOND.get(processor.pcie_generation, 0.0) * PCIE_EFFICIENCY
    return Hardware(
        name=f"{gpu or 'cpu'}, {drives} x {drive}, {format_bytes(host_bytes)} of RAM",
        device_bytes=host_bytes if gpu is None else processor.memory_bytes,
        host_bytes=0 if gpu is None else host_bytes,
        flops_per_second=processor.dense_flops_per_second * MATMUL_EFFICIENCY,
        memory_bytes_per_second=processor.memory_bytes_per_second * MEMORY_EFFICIENCY,
        host_to_device_bytes_per_second=link,
        device_to_host_bytes_per_second=link,
        drive_read_bytes_per_second=storage.read_bytes_per_second * drives,
        drive_write_bytes_per_second=storage.write_bytes_per_second * drives,
        drive_endurance_bytes=storage.endurance_bytes * drives,
        sources=_sources(processor, storage, drives),
    )


def _part(parts: Mapping[str, Any], name: str, kind: str) -> Any:
    if name not in parts:
        msg = f"no {kind} {name!r} is known; known are {', '.join(sorted(parts))}"
        raise ValueError(msg)
    return parts[name]


def _sources(processor: Processor, storage: Drive, drives: int) -> dict[str, str]:
    if processor.pcie_generation > 0:
        line = PCIE_LINE_BYTES_PER_SECOND[processor.pcie_generation] / 1e9
        link = (
            f"PCIe {processor.pcie_generation}.0 x16, {line:.1f} GB/s each way, times PCIE_EFFICIENCY "
            f"{PCIE_EFFICIENCY} (assumption); generation: {processor.source}"
        )
        device, host = processor.source, "argument of profile()"
    else:
        link = "no GPU: device memory is host memory"
        device, host = "argument of profile()", link
    drive = storage.source if drives == 1 else f"{drives} drives striped, each: {storage.source}"
    return {
        "device_bytes": device,
        "host_bytes": host,
        "flops_per_second": f"peak times MATMUL_EFFICIENCY {MATMUL_EFFICIENCY} (assumption); peak: {processor.source}",
        "memory_bytes_per_second": (
            f"peak times MEMORY_EFFICIENCY {MEMORY_EFFICIENCY} (assumption); peak: {processor.source}"
        ),
        "host_to_device_bytes_per_second": link,
        "device_to_host_bytes_per_second": link,
        "drive_read_bytes_per_second": drive,
        "drive_write_bytes_per_second": drive,
        "drive_endurance_bytes": drive,
    }
