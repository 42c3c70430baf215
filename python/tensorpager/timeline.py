# SPDX-License-Identifier: Apache-2.0
"""A pager's events as pictures: a trace for Perfetto (or chrome://tracing), and which pages were resident when, as PNG.

Events are what `_core.Pager.events()` returns: a structured array, oldest first, with the fields time_ns (u8, monotonic
clock), kind (u1, index into EVENT_KINDS), page, frame, step, set (i4, -1: none) and thread (u4). Needs neither torch
nor the native module; matplotlib is imported by `residency_png` alone.
"""

from __future__ import annotations

import heapq
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tensorpager.private_file import open_private

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["EVENT_KINDS", "chrome_trace", "residency_intervals", "residency_png"]

#: As in the native module (`_core.EVENT_KINDS`), which numbers them.
EVENT_KINDS = (
    "page_in_begin",
    "page_in_end",
    "evict",
    "writeback_begin",
    "writeback_end",
    "acquire_begin",
    "acquire_end",
    "release",
    "stall_begin",
    "stall_end",
    "fault",
    "read_begin",
    "read_end",
    "copy_out_begin",
    "copy_out_end",
)

Events = npt.NDArray[np.void]
JsonEvent = dict[str, Any]

PROCESS_ID = 1
EVICT_TRACK = 1
TRANSFER_TRACK = 100  # one track for each transfer that is in flight beside others


def chrome_trace(
    events: Events,
    *,
    page_bytes: int,
    kinds: Sequence[str] = EVENT_KINDS,
    set_names: Mapping[int, str] | None = None,
) -> dict[str, Any]:
    """The events in Chrome's trace format, for `json.dump`; times in microseconds since the first event.

    Tracks: one for each transfer in flight at a time (page-in, writeback), evictions and faults, one for each thread
    that
    acquires (waits and stalls), the windows between acquire and release, and counters of resident and in-flight bytes.
    set_names: what to call a set; "set 7" otherwise. A transfer that is cut off by either end of the ring is left out.
    """
    names = set_names or {}
    start_ns = int(events["time_ns"][0]) if len(events) else 0
    builder = _TraceBuilder(start_ns, page_bytes, names)
    for event in events.tolist():
        time_ns, kind, page, frame, step, set_id, thread = _fields(event, events.dtype.names)
        builder.add(kinds[kind], time_ns, page, frame, step, set_id, thread)
    builder.counters(events, kinds)
    return {"traceEvents": builder.finish(), "displayTimeUnit": "ms"}


def _fields(event: tuple[int, ...], names: tuple[str, ...] | None) -> tuple[int, int, int, int, int, int, int]:
    by_name = dict(zip(names or (), event, strict=True))
    return (
        by_name["time_ns"],
        by_name["kind"],
        by_name["page"],
        by_name["frame"],
        by_name["step"],
        by_name.get("set", -1),
        by_name["thread"],
    )


class _TraceBuilder:
    """Pairs begins with ends and puts transfers that overlap on tracks of their own."""

    def __init__(self, start_ns: int, page_bytes: int, set_names: Mapping[int, str]) -> None:
        self._start_ns = start_ns
        self._page_bytes = page_bytes
        self._set_names = set_names
        self._rows: list[JsonEvent] = []
        self._transfers: list[tuple[int, int, str, int, int]] = []  # begin, end, what, page, frame
        self._open_transfers: dict[tuple[str, int], int] = {}
        self._open_waits: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        self._open_windows: dict[int, list[int]] = defaultdict(list)
        self._window_count = 0
        self._threads: set[int] = set()

    def _microseconds(self, time_ns: int) -> float:
        return (time_ns - self._start_ns) / 1000

    def _name(self, set_id: int) -> str:
        return self._set_names.get(set_id, f"set {set_id}") if set_id >= 0 else "off schedule"

    def add(self, kind: str, time_ns: int, page: int, frame: int, step: int, set_id: int, thread: int) -> None:
        what, _, edge = kind.rpartition("_")
        if what in ("page_in", "writeback", "read", "copy_out"):
            if edge == "begin":
                self._open_transfers[what, page] = time_ns
            elif (begin := self._open_transfers.pop((what, page), None)) is not None:
                self._transfers.append((begin, time_ns, what, page, frame))
        elif what in ("acquire", "stall"):
            self._add_wait(what, edge, time_ns, step, set_id, thread)
        elif kind == "release":
            if self._open_windows[set_id]:
                self._async("e", self._open_windows[set_id].pop(), time_ns, set_id)
        else:  # evict, fault
            place = {"pid": PROCESS_ID, "tid": EVICT_TRACK, "s": "t"}
            args = {"page": page, "frame": frame, "step": step}
            self._rows.append({"ph": "i", "name": kind, "ts": self._microseconds(time_ns), **place, "args": args})

    def _add_wait(self, what: str, edge: str, time_ns: int, step: int, set_id: int, thread: int) -> None:
        self._threads.add(thread)
        opened = self._open_waits[what, thread]
        if edge == "begin":
            opened.append((time_ns, set_id))
            return
        if opened:
            begin, begin_set = opened.pop()
            name = f"{what} {self._name(begin_set if set_id < 0 else set_id)}"
            self._slice(name, begin, time_ns, thread, {"step": step})
        if what == "acquire":
            self._window_count += 1
            self._open_windows[set_id].append(self._window_count)
            self._async("b", self._window_count, time_ns, set_id)

    def _async(self, phase: str, window: int, time_ns: int, set_id: int) -> None:
        place = {"pid": PROCESS_ID, "tid": 0, "id": window, "cat": "window"}
        self._rows.append({"ph": phase, "name": self._name(set_id), "ts": self._microseconds(time_ns), **place})

    def _slice(self, name: str, begin: int, end: int, track: int, args: dict[str, int]) -> None:
        times = {"ts": self._microseconds(begin), "dur": (end - begin) / 1000}
        self._rows.append({"ph": "X", "name": name, **times, "pid": PROCESS_ID, "tid": track, "args": args})

    def counters(self, events: Events, kinds: Sequence[str]) -> None:
        """Resident and in-flight bytes. Residents that the ring has forgotten are counted once they are evicted."""
        index = {name: number for number, name in enumerate(kinds)}
        resident = len(_resident_at_start(events, kinds))
        in_flight = 0
        for time_ns, kind in zip(events["time_ns"].tolist(), events["kind"].tolist(), strict=True):
            if kind == index["page_in_begin"]:
                in_flight += 1
            elif kind == index["page_in_end"]:
                in_flight, resident = max(in_flight - 1, 0), resident + 1
            elif kind == index["evict"]:
                resident -= 1
            else:
                continue
            for name, count in (("resident bytes", resident), ("in flight bytes", in_flight)):
                value = {"bytes": count * self._page_bytes}
                row = {"ph": "C", "name": name, "ts": self._microseconds(time_ns), "pid": PROCESS_ID, "args": value}
                self._rows.append(row)

    def finish(self) -> list[JsonEvent]:
        lanes = self._place_transfers()
        titles = {EVICT_TRACK: "evictions and faults"}
        titles.update({TRANSFER_TRACK + lane: f"transfer {lane}" for lane in range(lanes)})
        titles.update({thread: f"thread {thread}" for thread in self._threads})
        head: list[JsonEvent] = [
            {"ph": "M", "name": "process_name", "pid": PROCESS_ID, "args": {"name": "tensorpager"}},
            *(
                {"ph": "M", "name": "thread_name", "pid": PROCESS_ID, "tid": track, "args": {"name": title}}
                for track, title in sorted(titles.items())
            ),
        ]
        return head + sorted(self._rows, key=lambda row: float(row["ts"]))

    def _place_transfers(self) -> int:
        """Give each transfer the lowest track that is free; returns how many tracks that takes."""
        free: list[int] = []
        busy: list[tuple[int, int]] = []  # end, lane
        lanes = 0
        for begin, end, what, page, frame in sorted(self._transfers):
            while busy and busy[0][0] <= begin:
                heapq.heappush(free, heapq.heappop(busy)[1])
            if not free:
                free.append(lanes)
                lanes += 1
            lane = heapq.heappop(free)
            heapq.heappush(busy, (end, lane))
            args = {"page": page, "frame": frame}
            self._slice(f"{what.replace('_', '-')} {page}", begin, end, TRANSFER_TRACK + lane, args)
        return lanes


def _resident_at_start(events: Events, kinds: Sequence[str]) -> list[int]:
    """Pages whose first event is an eviction or a writeback: they were resident before the first event."""
    seen: set[int] = set()
    resident = []
    evict, writeback = kinds.index("evict"), kinds.index("writeback_begin")
    for kind, page in zip(events["kind"].tolist(), events["page"].tolist(), strict=True):
        if page < 0 or page in seen:
            continue
        seen.add(page)
        if kind in (evict, writeback):
            resident.append(page)
    return resident


def residency_intervals(
    events: Events,
    *,
    kinds: Sequence[str] = EVENT_KINDS,
    resident_at_end: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.int64]:
    """When each page was resident: int64 [N, 3], rows (page, begin_ns, end_ns), by page and time.

    A page that was resident before the first event begins there, one that still is ends at the last. resident_at_end
    (bool [pages], `_core.Pager.resident_pages()`) also brings in the pages that no event mentions.
    """
    if len(events) == 0:
        return np.zeros((0, 3), np.int64)
    first_ns, last_ns = int(events["time_ns"][0]), int(events["time_ns"][-1])
    opened: dict[int, int] = dict.fromkeys(_resident_at_start(events, kinds), first_ns)
    mentioned = {page for page in events["page"].tolist() if page >= 0}
    if resident_at_end is not None:
        silent = (page for page in np.flatnonzero(resident_at_end).tolist() if page not in mentioned)
        opened.update(dict.fromkeys(silent, first_ns))
    arrive, leave = kinds.index("page_in_end"), kinds.index("evict")
    rows: list[tuple[int, int, int]] = []
    for time_ns, kind, page in zip(
        events["time_ns"].tolist(), events["kind"].tolist(), events["page"].tolist(), strict=True
    ):
        if kind == arrive:
            opened[page] = time_ns
        elif kind == leave and page in opened:
            rows.append((page, opened.pop(page), time_ns))
    rows.extend((page, begin, last_ns) for page, begin in opened.items())
    return np.array(sorted(rows), np.int64).reshape(-1, 3)


COLUMNS = 1600  # of the picture's time axis
ROWS_MAX = 1200  # of its page axis; more pages than that share rows
INK = "#1f2933"
RESIDENT_COLOUR = "#9cc3e6"
IN_USE_COLOUR = "#12508c"
BUDGET_COLOUR = "#c2410c"


def residency_png(
    events: Events,
    path: str | os.PathLike[str],
    *,
    page_bytes: int,
    page_count: int,
    budget_bytes: int,
    title: str = "",
    kinds: Sequence[str] = EVENT_KINDS,
    set_pages: Mapping[int, npt.NDArray[np.int32]] | None = None,
    resident_at_end: npt.NDArray[np.bool_] | None = None,
) -> None:
    """Draw which pages were resident when (x: seconds, y: page), above it the bytes resident, with the budget as a
    line.

    set_pages: pages of each set, to show what is in use between acquire and release; resident_at_end: see
    residency_intervals. Written to path with mode 0600. ValueError without events; ImportError without matplotlib.
    """
    if len(events) == 0:
        msg = "there are no events to draw: nothing has been acquired, or the ring was just reset"
        raise ValueError(msg)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    intervals = residency_intervals(events, kinds=kinds, resident_at_end=resident_at_end)
    first_ns = int(events["time_ns"][0])
    seconds = max(int(events["time_ns"][-1]) - first_ns, 1) / 1e9
    figure = Figure(figsize=(12, 7), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    bytes_axes, pages_axes = figure.subplots(2, 1, sharex=True, height_ratios=[1, 4])
    _draw_bytes(bytes_axes, intervals, first_ns, page_bytes, budget_bytes)
    in_use = _use_intervals(events, kinds, set_pages or {})
    _draw_pages(pages_axes, (intervals, in_use), first_ns, seconds, page_bytes, page_count)
    bytes_axes.set_title(title or "Residency", loc="left", color=INK, fontweight="bold")
    with open_private(path) as file:
        figure.savefig(file, format="png")


def _use_intervals(
    events: Events, kinds: Sequence[str], set_pages: Mapping[int, npt.NDArray[np.int32]]
) -> npt.NDArray[np.int64]:
    """(page, begin_ns, end_ns) of every window between acquire and release."""
    acquired, released = kinds.index("acquire_end"), kinds.index("release")
    opened: dict[int, list[int]] = defaultdict(list)
    blocks = []
    for time_ns, kind, set_id in zip(
        events["time_ns"].tolist(), events["kind"].tolist(), events["set"].tolist(), strict=True
    ):
        if kind == acquired:
            opened[set_id].append(time_ns)
        elif kind == released and opened[set_id] and set_id in set_pages:
            pages = set_pages[set_id].astype(np.int64)
            begin = opened[set_id].pop()
            blocks.append(np.stack([pages, np.full_like(pages, begin), np.full_like(pages, time_ns)], axis=1))
    return np.concatenate(blocks) if blocks else np.zeros((0, 3), np.int64)


def _draw_bytes(
    axes: Axes, intervals: npt.NDArray[np.int64], first_ns: int, page_bytes: int, budget_bytes: int
) -> None:
    times = np.concatenate([intervals[:, 1], intervals[:, 2]])
    change = np.concatenate([np.ones(len(intervals)), -np.ones(len(intervals))])
    last_ns = times.max(initial=first_ns)
    change[times == last_ns] = np.maximum(change[times == last_ns], 0)  # resident at the end is not evicted
    order = np.lexsort((change, times))
    resident = np.cumsum(change[order]) * page_bytes / 2**20
    axes.step((times[order] - first_ns) / 1e9, resident, where="post", color=IN_USE_COLOUR, linewidth=1)
    axes.axhline(budget_bytes / 2**20, color=BUDGET_COLOUR, linewidth=1.4, linestyle="--")
    label = f"budget {budget_bytes / 2**20:,.0f} MiB"
    place = {"xytext": (-6, 4), "textcoords": "offset points", "ha": "right", "va": "bottom"}
    axes.annotate(label, (1, budget_bytes / 2**20), xycoords=("axes fraction", "data"), color=BUDGET_COLOUR, **place)
    axes.set_ylim(0, budget_bytes / 2**20 * 1.35)
    _style(axes, "resident, MiB")


def _draw_pages(
    axes: Axes,
    layers: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
    first_ns: int,
    seconds: float,
    page_bytes: int,
    page_count: int,
) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    rows = min(page_count, ROWS_MAX)
    picture = np.zeros((rows, COLUMNS), np.uint8)
    for shade, intervals in enumerate(layers, start=1):
        row = intervals[:, 0] * rows // page_count
        span = ((intervals[:, 1:] - first_ns) / 1e9 / seconds * COLUMNS).astype(np.int64).clip(0, COLUMNS)
        for index, (begin, end) in zip(row.tolist(), span.tolist(), strict=True):
            cells = picture[index, begin : max(end, begin + 1)]
            np.maximum(cells, shade, out=cells)
    model_mib = page_count * page_bytes / 2**20
    colours = ListedColormap(["#ffffff", RESIDENT_COLOUR, IN_USE_COLOUR])
    extent = (0.0, seconds, 0.0, model_mib)
    axes.imshow(
        picture, aspect="auto", origin="lower", interpolation="nearest", cmap=colours, vmin=0, vmax=2, extent=extent
    )
    patches = [
        Patch(facecolor="#ffffff", edgecolor=INK, linewidth=0.5, label="on disk"),
        Patch(facecolor=RESIDENT_COLOUR, label="resident"),
    ]
    if len(layers[1]):
        patches.append(Patch(facecolor=IN_USE_COLOUR, label="in use"))
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1.0), "borderaxespad": 0.2}
    axes.legend(handles=patches, ncols=3, frameon=False, fontsize=9, **place)
    axes.set_xlabel("time, s", color=INK)
    _style(axes, "place in the model, MiB")


def _style(axes: Axes, label: str) -> None:
    axes.set_ylabel(label, color=INK)
    axes.tick_params(colors=INK, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
