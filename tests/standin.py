# SPDX-License-Identifier: Apache-2.0
"""Models on the stand-in device: the CUDA driver of csrc/sim, whose device memory is host memory.

torch runs on the CPU and reads that memory directly, so a kernel here is a call on the host's thread. It has to wait
for the stream that the core made wait for the copies: `StandinCore` does so after every acquire, hold and ticket.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tensorpager._core import Pager as NativePager
from tensorpager.budget import parse_bytes
from tensorpager.spill import choose_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tensorpager._core import Ticket

#: Built with the C++ tests.
LIBRARY = Path(__file__).parents[1] / "build" / "dev" / "libtensorpager_standin_cuda.so"


class StandinTicket:
    """A ticket whose wait is over when the copies are done: what computes here is no stream of the stand-in's."""

    def __init__(self, native: NativePager, ticket: Ticket) -> None:
        self._native = native
        self._ticket = ticket
        self.release = ticket.release

    def wait(self, stream: int = 0) -> None:
        self._ticket.wait(stream)
        self._native.synchronize(stream)


class StandinCore:
    """A core on the stand-in device. What it does not define is the native core's.

    waits: whether acquire and hold return when the pages are there. Not for what runs in the stream itself.
    """

    def __init__(self, native: NativePager) -> None:
        self._native = native
        self.waits = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def acquire(self, set_id: int, stream: int = 0) -> None:
        self._native.acquire(set_id, stream)
        if self.waits:
            self._native.synchronize(stream)

    def prefetch(self, set_id: int) -> StandinTicket:
        return StandinTicket(self._native, self._native.prefetch(set_id))

    def hold(self, address: int, size_bytes: int, stream: int = 0) -> int:
        set_id = self._native.hold(address, size_bytes, stream)
        if self.waits:
            self._native.synchronize(stream)
        return set_id


def make_standin_core(
    budget: int | str,
    store: str | None = None,
    engine: str = "auto",
    page_bytes: int = 0,
    device: Any = None,
    host_budget: int | str | None = None,
    pagefile: Any = None,
) -> Any:
    """In place of tensorpager.pager.make_core, for both kinds of device."""
    if device is None:
        return NativePager(
            budget_bytes=parse_bytes(budget),
            page_bytes=page_bytes,
            engine=engine,
            spill_directory=choose_directory(store),
            pagefile=pagefile,
        )
    assert pagefile is None
    return StandinCore(
        NativePager(
            budget_bytes=parse_bytes(budget),
            page_bytes=page_bytes or 2**21,
            engine=engine,
            spill_directory=choose_directory(store),
            device=0,
            host_budget_bytes=0 if host_budget is None else parse_bytes(host_budget),
            driver_library=str(LIBRARY),
        )
    )


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While active, page(device=...) and from_pretrained(device=...) go to the stand-in device."""
    if not LIBRARY.exists():
        pytest.skip(f"{LIBRARY} is built by `make test-cpp`")
    monkeypatch.setattr("tensorpager.pager.make_core", make_standin_core)
    monkeypatch.setattr("tensorpager.pretrained.make_core", make_standin_core)
    monkeypatch.setattr("tensorpager.kv_cache.make_core", make_standin_core)
    return
