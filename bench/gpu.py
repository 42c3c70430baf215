# SPDX-License-Identifier: Apache-2.0
"""Paging to a GPU beside what it is made of and beside its peers, in interleaved rounds. Run by gpu_check.py.

Bars: host to device >= 0.95 of plain copies from registered memory, mapping included; drive to device >= 0.97 of
io_uring to host memory; a step <= 1.08 of the slower of compute and link; acquire + release <= 10 us.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.overhead import microseconds_a_call
from bench.rounds import Measured, Sample, Skipped, interleave, print_table, ratio_of_medians

MIB = 2**20
GIB = 2**30
PAGES_A_STEP = 4
PASSES = 3
STEPS = 20


class Device:
    """How cores are made: on a GPU, or in this benchmark's own test on another driver."""

    def __init__(self, number: int = 0, driver_library: str = "") -> None:
        self.number = number
        self.driver_library = driver_library

    def core(self, budget_bytes: int, host_budget_bytes: int, **more: Any) -> Any:
        from tensorpager._core import Pager
        from tensorpager.spill import choose_directory

        return Pager(
            budget_bytes=budget_bytes,
            host_budget_bytes=host_budget_bytes,
            device=self.number,
            driver_library=self.driver_library,
            spill_directory=choose_directory(None),
            **more,
        )

    def mapping_costs(self) -> dict[str, Any]:
        from tensorpager._core import mapping_costs

        return dict(mapping_costs(self.number, driver_library=self.driver_library))


def make_file(size_bytes: int, directory: Path) -> Path:
    path = directory / f"gpu-{size_bytes}.bin"
    block = os.urandom(4 * MIB)
    with path.open("wb") as file:
        for _ in range(size_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return path


class Sweeps:
    """Passes over a file's pages through a device budget of a quarter of it."""

    def __init__(self, device: Device, path: Path, host_budget_bytes: int, page_bytes: int = 0) -> None:
        from tensorpager.sweep import set_sweep_schedule

        size_bytes = path.stat().st_size
        self.core = device.core(size_bytes // 4, host_budget_bytes, page_bytes=page_bytes)
        region = self.core.map_file(str(path))
        self.page_bytes = self.core.page_bytes
        ranges = [
            (region.address + offset, min(self.page_bytes, size_bytes - offset))
            for offset in range(0, size_bytes, self.page_bytes)
        ]
        self.sets = [
            self.core.add_set(ranges[place : place + PAGES_A_STEP], f"step {place}")
            for place in range(0, len(ranges), PAGES_A_STEP)
        ]
        set_sweep_schedule(self.core, self.sets)
        self.run(PASSES)

    def run(self, passes: int = 1) -> Sample:
        """GiB/s to the device, and bytes read from the drive for each of them."""
        before = self.core.stats()
        begin = time.perf_counter()
        for _ in range(passes):
            for set_id in self.sets:
                self.core.acquire(set_id)
                self.core.release(set_id)
        self.core.synchronize()
        seconds = time.perf_counter() - begin
        after = self.core.stats()
        moved = after["bytes_to_device"] - before["bytes_to_device"]
        read = after["bytes_read"] - before["bytes_read"]
        return {"bandwidth": moved / seconds / GIB, "read_a_byte": read / max(moved, 1), "seconds": seconds}


def pages_to_device(device: Device, path: Path, rounds: int) -> dict[str, Measured]:
    """Both transports of pages: out of the host tier, and from the drive."""
    size_bytes = path.stat().st_size
    in_host = Sweeps(device, path, size_bytes + size_bytes // 4)
    from_drive = Sweeps(device, path, max(64 * MIB, size_bytes // 16), in_host.page_bytes)

    def to_host() -> Sample:
        from tensorpager.sweep import sweep_files

        swept = sweep_files([path])
        return {"bandwidth": swept.bandwidth / GIB, "read_a_byte": 1.0, "seconds": swept.seconds}

    contenders: dict[str, Callable[[], Sample]] = {
        "plain copies, registered": lambda: {"bandwidth": device.mapping_costs()["link_bytes_per_second"] / GIB},
        "paging, host tier -> device": lambda: in_host.run(PASSES),
        "paging, drive -> device": from_drive.run,
        "io_uring, drive -> host": to_host,
        "torch, pinned -> device": lambda: _torch_copies(size_bytes // 4),
    }
    print(f"pages of {in_host.page_bytes // MIB} MiB, a file of {size_bytes / GIB:.1f} GiB, {rounds} rounds")
    try:
        return interleave(contenders, rounds)
    finally:
        in_host.core.close()
        from_drive.core.close()


def _torch_copies(size_bytes: int) -> Sample:
    torch = _torch()
    source = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size_bytes, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(PASSES):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return {"bandwidth": PASSES * size_bytes / (time.perf_counter() - begin) / GIB}


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise Skipped(str(error)) from None
    if not torch.cuda.is_available():
        msg = "torch sees no CUDA device"
        raise Skipped(msg)
    return torch


def acquire_and_release(device: Device, stream: int = 0) -> float:
    """Microseconds a pair, everything resident."""
    core = device.core(64 * MIB, 64 * MIB, page_bytes=2 * MIB)
    try:
        region = core.map_spill(4 * MIB)
        set_id = core.add_set([(region.address, 4 * MIB)], "resident")

        def pair() -> None:
            core.acquire(set_id, stream)
            core.release(set_id, stream)

        pair()
        return microseconds_a_call(pair)
    finally:
        core.close()


def make_blocks(width: int, depth: int) -> Any:
    torch = _torch()
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(depth))).half()


def steps(rounds: int, width: int = 8192, depth: int = 48) -> dict[str, Measured]:
    """A forward pass of a stack of layers: all on the device, paged at a third of it, and the peers' offloading."""
    import tensorpager as tp

    torch = _torch()
    tokens = 4096
    weights_bytes = 2 * width * width * depth
    inputs = torch.randn(tokens, width, dtype=torch.float16, device="cuda")
    plain = make_blocks(width, depth).to("cuda")
    paged = make_blocks(width, depth)
    pager = tp.page(paged, budget=weights_bytes // 3, device="cuda", host_budget=weights_bytes + weights_bytes // 4)
    link = Device().mapping_costs()["link_bytes_per_second"]

    def timed(model: Any, warm: int) -> Callable[[], Sample]:
        started = False

        def run() -> Sample:
            nonlocal started
            with torch.no_grad():
                for _ in range(0 if started else warm):
                    model(inputs)
                started = True
                before = pager.stats()["bytes_to_device"]
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(PASSES):
                    model(inputs)
                torch.cuda.synchronize()
                seconds = (time.perf_counter() - begin) / PASSES
                moved = (pager.stats()["bytes_to_device"] - before) / PASSES
            return {"seconds": seconds, "link_seconds": moved / link}

        return run

    contenders: dict[str, Callable[[], Sample]] = {
        "unpaged": timed(plain, 1),
        "paged": timed(paged, 4),
        **{f"accelerate, {kind} offload": _accelerated(kind, width, depth, timed) for kind in ("cpu", "disk")},
    }
    try:
        same = torch.equal(plain(inputs[:64]).detach(), _no_grad(paged, inputs[:64]))
        if not same:
            msg = "the paged model's output differs from the unpaged one's"
            raise RuntimeError(msg)
        return interleave(contenders, rounds)
    finally:
        pager.close()


def captured_steps(rounds: int, width: int = 2048, depth: int = 96) -> dict[str, Measured]:
    """A step of one token, whose kernels are short: what launching them costs, and what a captured step saves of it.

    With all weights resident, where paging costs the host alone, and with half of them.
    """
    import tensorpager as tp

    torch = _torch()
    weights_bytes = 2 * width * width * depth
    token = torch.randn(1, width, dtype=torch.float16, device="cuda")
    plain = make_blocks(width, depth).to("cuda")
    link = Device().mapping_costs()["link_bytes_per_second"]
    contenders: dict[str, Callable[[], Sample]] = {}
    pagers = []
    with torch.no_grad():
        contenders["token, unpaged"] = _timed_steps(lambda: plain(token), None, link)
        whole = torch.cuda.CUDAGraph()
        with torch.cuda.graph(whole):
            plain(token)
        contenders["token, unpaged, one graph"] = _timed_steps(whole.replay, None, link)
        for share, budget_bytes in (("all", weights_bytes + weights_bytes // 8), ("half", weights_bytes // 2)):
            paged = make_blocks(width, depth)
            pager = tp.page(paged, budget=budget_bytes, device="cuda", host_budget=weights_bytes + weights_bytes // 4)
            pagers.append(pager)
            contenders[f"token, paged, {share}"] = _timed_steps(functools.partial(paged, token), pager, link)
            for name, gates in (("in pieces", False), ("one graph with gates", True)):
                contenders[f"token, paged, {share}, {name}"] = _captured(paged, token, pager, link, gates=gates)
    try:
        return interleave(contenders, rounds)
    finally:
        for pager in pagers:
            pager.close()


def _captured(model: Any, token: Any, pager: Any, link: float, *, gates: bool) -> Callable[[], Sample]:
    made: list[Callable[[], Sample]] = []

    def run() -> Sample:
        if not made:
            from tensorpager.errors import EngineError

            try:
                graph = pager.capture(model, token, gates=gates)
            except EngineError as error:
                raise Skipped(str(error)) from None
            made.append(_timed_steps(graph.replay, pager, link, launches=graph.pieces))
        return made[0]()

    return run


def _timed_steps(step: Callable[[], Any], pager: Any, link: float, launches: int = 0) -> Callable[[], Sample]:
    """Seconds of STEPS steps, each, after some that are not counted; and of the link, for what they move."""
    torch = _torch()

    def moved() -> int:
        return 0 if pager is None else int(pager.stats()["bytes_to_device"])

    def run() -> Sample:
        with torch.no_grad():
            for _ in range(PASSES):
                step()
            torch.cuda.synchronize()
            before = moved()
            begin = time.perf_counter()
            for _ in range(STEPS):
                step()
            torch.cuda.synchronize()
            seconds = (time.perf_counter() - begin) / STEPS
        return {"seconds": seconds, "link_seconds": (moved() - before) / STEPS / link, "launches": launches}

    return run


def _no_grad(model: Any, inputs: Any) -> Any:
    with _torch().no_grad():
        return model(inputs)


def _accelerated(kind: str, width: int, depth: int, timed: Callable[[Any, int], Callable[[], Sample]]) -> Any:
    made: list[Callable[[], Sample]] = []
    folder = tempfile.TemporaryDirectory(prefix="tensorpager-bench-")

    def run() -> Sample:
        if not made:
            try:
                import accelerate
            except ImportError as error:
                raise Skipped(str(error)) from None
            model = make_blocks(width, depth)
            if kind == "cpu":
                model = accelerate.cpu_offload(model, execution_device="cuda:0")
            else:
                model = accelerate.disk_offload(model, folder.name, execution_device="cuda:0")
            made.append(timed(model, 1))
        return made[0]()

    return run


def summarise_pages(measured: dict[str, Measured]) -> dict[str, Any]:
    print_table(
        ("", "GiB/s"),
        [
            (name, f"{each.median('bandwidth'):.2f}" if each.samples else each.skipped)
            for name, each in measured.items()
        ],
    )
    return {
        "host_to_device_of_plain_copies": ratio_of_medians(
            measured, "paging, host tier -> device", "plain copies, registered", "bandwidth"
        ),
        "drive_to_device_of_io_uring": ratio_of_medians(
            measured, "paging, drive -> device", "io_uring, drive -> host", "bandwidth"
        ),
    }


def summarise_steps(measured: dict[str, Measured]) -> dict[str, Any]:
    rows = [
        (name, f"{each.median('seconds') * 1e3:.1f}" if each.samples else each.skipped)
        for name, each in measured.items()
    ]
    print_table(("a step", "ms"), rows)
    if not measured["paged"].samples or not measured["unpaged"].samples:
        return {}
    floor = max(measured["unpaged"].median("seconds"), measured["paged"].median("link_seconds"))
    return {
        "step_of_floor": measured["paged"].median("seconds") / floor,
        "step_of_unpaged": ratio_of_medians(measured, "paged", "unpaged", "seconds"),
        **{
            f"{name}_of_paged": ratio_of_medians(measured, name, "paged", "seconds")
            for name in measured
            if name.startswith("accelerate")
        },
    }


def summarise_captured_steps(measured: dict[str, Measured]) -> dict[str, Any]:
    print_table(
        ("a step of one token", "us", "launches"),
        [
            (name, f"{each.median('seconds') * 1e6:.0f}", f"{each.median('launches'):.0f}")
            if each.samples
            else (name, each.skipped, "")
            for name, each in measured.items()
        ],
    )
    return {
        f"{share}_{name.replace(' ', '_')}_of_eager": ratio_of_medians(
            measured, f"token, paged, {share}, {name}", f"token, paged, {share}", "seconds"
        )
        for share in ("all", "half")
        for name in ("in pieces", "one graph with gates")
        if measured[f"token, paged, {share}, {name}"].samples
    }
