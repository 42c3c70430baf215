# SPDX-License-Identifier: Apache-2.0
"""Figures of GPUs and drives, as their vendors publish them, each part with where its figures are from.

The figures are data sheet values: peaks ("up to"), not what a program reaches. What the planner expects of them is
decided in hardware.py, with fractions that are named there. An address is where the figure, or the document that holds
it, could be looked up when it was entered; where there is none, only the document's name was known. Figures of the
"genN-nvme" drives and of the CPU are no product's: they are assumptions, and their source says so.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CPU", "DRIVES", "GPUS", "PCIE_LINE_BYTES_PER_SECOND", "Drive", "Processor"]

GIB = 2**30
PCIE_LANES = 16

# Bytes per second each way: transfers per second of a lane, 128 of 130 bits carry data. Packet headers are not taken
# off here.
PCIE_LINE_BYTES_PER_SECOND = {
    generation: transfers * PCIE_LANES * 128 / 130 / 8 for generation, transfers in ((3, 8e9), (4, 16e9), (5, 32e9))
}


@dataclass(frozen=True)
class Processor:
    """What computes. memory_bytes: as sold, in GiB; what ECC and the driver keep for themselves is not taken off.

    dense_flops_per_second: peak of dense matmuls, no sparsity: bfloat16 with float32 accumulation on GPUs (GeForce
    cards run that at half the rate of their float16 accumulation), float32 on the CPU. memory_bytes_per_second: peak.
    pcie_generation: of the x16 link; 0 for the CPU. source: where these figures are from.
    """

    memory_bytes: int
    dense_flops_per_second: float
    memory_bytes_per_second: float
    pcie_generation: int
    source: str


@dataclass(frozen=True)
class Drive:
    """Sequential rates in bytes per second and rated bytes written over life. source: where these are from."""

    read_bytes_per_second: float
    write_bytes_per_second: float
    endurance_bytes: float
    source: str


_GA102 = (
    "NVIDIA Ampere GA102 GPU Architecture whitepaper V2.0 "
    "(https://studylib.net/doc/25947241/nvidia-ampere-ga102-gpu-architecture)"
)
_ADA = "NVIDIA Ada GPU Architecture whitepaper V2.01 (https://www.scribd.com/document/656196379/004)"
_BLACKWELL = (
    "NVIDIA RTX Blackwell GPU Architecture whitepaper; memory also at "
    "https://www.libertify.com/interactive-library/nvidia-rtx-blackwell-gpu-architecture-neural-rendering/"
)
_L40S = "NVIDIA L40S data sheet (table at https://www.mullet.se/product.html?product_id=355414)"
_A100 = (
    "NVIDIA A100 80GB SXM data sheet (https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf)"
)
_H100 = (
    "NVIDIA H100 SXM5 data sheet, half of the rate with sparsity (https://glennklockwood.com/garden/processors/h100)"
)
_H200 = (
    "NVIDIA H200 SXM data sheet, half of the rate with sparsity "
    "(https://itkb.uw.cz/2026/06/nvidia-h200-vs-b300-precisions-cores.html)"
)

GPUS: dict[str, Processor] = {
    "rtx-3090": Processor(24 * GIB, 71e12, 936e9, 4, _GA102),
    "rtx-4090": Processor(24 * GIB, 165.2e12, 1008e9, 4, _ADA),
    "rtx-5090": Processor(32 * GIB, 209.5e12, 1792e9, 5, _BLACKWELL),
    "rtx-a6000": Processor(48 * GIB, 154.8e12, 768e9, 4, _GA102),
    "l40s": Processor(48 * GIB, 362.05e12, 864e9, 4, _L40S),
    "a100-80gb": Processor(80 * GIB, 312e12, 2039e9, 4, _A100),
    "h100-sxm": Processor(80 * GIB, 989.4e12, 3350e9, 5, _H100),
    "h200-sxm": Processor(141 * GIB, 989.4e12, 4800e9, 5, _H200),
}

# A desktop: 8 cores, 32 float32 operations a cycle each (two 256-bit fused multiply-adds), 4 GHz; two channels of
# DDR5-4800.
CPU = Processor(0, 8 * 32 * 4e9, 2 * 8 * 4800e6, 0, "assumption: 8 cores with AVX2 at 4 GHz, two channels of DDR5-4800")

_CACHE = "the write rate is that of the SLC cache: writing on when it is full is slower"

DRIVES: dict[str, Drive] = {
    "samsung-990-pro-2tb": Drive(
        7450e6,
        6900e6,
        1200e12,
        "Samsung 990 PRO data sheet (rates at https://www.digitec.ch/en/s1/product/samsung-990-pro-2000-gb-m2-7450-mbs-"
        "2000-gb-m2-ssd-35511542, endurance at "
        "https://bytebuys.com/samsung-990-pro-a-detailed-look-at-speed-and-endurance-metrics/); " + _CACHE,
    ),
    "wd-sn850x-2tb": Drive(
        7300e6,
        6600e6,
        1200e12,
        "WD_BLACK SN850X data sheet (https://www.pgrid.app/au/ssds/western-digital-wd-black-sn850x-2000gb); "
        + _CACHE
        + " (a test that filled the drive saw 5.3 GB/s for 30 % of it and a median of 3.4 GB/s, "
        "https://euro.dayfr.com/technology/2474828.html)",
    ),
    "crucial-t705-2tb": Drive(
        14500e6,
        12700e6,
        1200e12,
        "Crucial T705 product flyer (rates at https://julliannepiano.com/crucial-t705-2tb-pcie-gen5-nvme-m-2-ssd); "
        + _CACHE,
    ),
    "solidigm-d7-p5520-3.84tb": Drive(
        7100e6,
        4200e6,
        7.0e15,
        "Solidigm D7-P5520 product brief: 128 KiB sequential, 1 drive write a day for 5 years",
    ),
    "samsung-pm9a3-3.84tb": Drive(
        6800e6,
        4000e6,
        7.008e15,
        "Samsung PM9A3 U.2 data sheet: 128 KiB sequential, 1 drive write a day for 5 years",
    ),
    "gen3-nvme": Drive(3400e6, 2500e6, 1200e12, "assumption: a good 2 TB drive for desktops on PCIe 3.0 x4; " + _CACHE),
    "gen4-nvme": Drive(7000e6, 5000e6, 1200e12, "assumption: a good 2 TB drive for desktops on PCIe 4.0 x4; " + _CACHE),
    "gen5-nvme": Drive(
        12000e6, 10000e6, 1200e12, "assumption: a good 2 TB drive for desktops on PCIe 5.0 x4; " + _CACHE
    ),
}
