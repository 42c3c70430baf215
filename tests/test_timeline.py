# SPDX-License-Identifier: Apache-2.0
"""Events as a trace and as a picture. The events are made by hand, so every number below is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tensorpager.timeline import EVENT_KINDS, chrome_trace, residency_intervals, residency_png

PAGE_BYTES = 2 << 20
FIELDS = [
    ("time_ns", "u8"),
    ("page", "i4"),
    ("frame", "i4"),
    ("step", "i4"),
    ("set", "i4"),
    ("thread", "u4"),
    ("kind", "u1"),
]
START_NS = 5_000_000_000


def made(*rows: tuple[int, str, int, int]) -> npt.NDArray[np.void]:
    """Events from (microseconds, kind, page, set), thread 42."""
    events = np.zeros(len(rows), FIELDS)
    for event, (microseconds, kind, page, set_id) in zip(events, rows, strict=True):
        event["time_ns"] = START_NS + microseconds * 1000
        event["kind"] = EVENT_KINDS.index(kind)
        event["page"], event["set"], event["frame"], event["step"] = page, set_id, page % 2, 0
        event["thread"] = 42
    return events


#: Page 9 is resident when the ring begins; 1 and 2 are read at the same time; 1 makes room for 3.
RUN = made(
    (0, "evict", 9, -1),
    (0, "page_in_begin", 1, -1),
    (10, "page_in_begin", 2, -1),
    (20, "acquire_begin", -1, 7),
    (21, "stall_begin", -1, 7),
    (30, "page_in_end", 1, -1),
    (40, "page_in_end", 2, -1),
    (41, "stall_end", -1, 7),
    (42, "acquire_end", -1, 7),
    (60, "release", -1, 7),
    (70, "evict", 1, -1),
    (70, "page_in_begin", 3, -1),
    (95, "page_in_end", 3, -1),
    (99, "page_in_begin", 4, -1),
)


def of(trace: dict[str, list[dict[str, object]]], **wanted: object) -> list[dict[str, object]]:
    return [row for row in trace["traceEvents"] if all(row.get(key) == value for key, value in wanted.items())]


def test_kinds_are_the_cores_kinds() -> None:
    core = pytest.importorskip("tensorpager._core")
    assert list(EVENT_KINDS) == list(core.EVENT_KINDS)


def test_transfers_that_overlap_lie_on_tracks_of_their_own() -> None:
    trace = chrome_trace(RUN, page_bytes=PAGE_BYTES)
    slices = {row["name"]: row for row in of(trace, ph="X") if str(row["name"]).startswith("page-in")}
    assert set(slices) == {"page-in 1", "page-in 2", "page-in 3"}  # 4 is cut off by the end
    assert (slices["page-in 1"]["ts"], slices["page-in 1"]["dur"]) == (0.0, 30.0)
    assert (slices["page-in 2"]["ts"], slices["page-in 2"]["dur"]) == (10.0, 30.0)
    assert slices["page-in 1"]["tid"] != slices["page-in 2"]["tid"]
    assert slices["page-in 3"]["tid"] == slices["page-in 1"]["tid"]  # free again


def test_waits_nest_on_the_threads_track_under_the_sets_name() -> None:
    trace = chrome_trace(RUN, page_bytes=PAGE_BYTES, set_names={7: "layer.7"})
    (acquire,) = of(trace, ph="X", name="acquire layer.7")
    (stall,) = of(trace, ph="X", name="stall layer.7")
    assert (acquire["ts"], acquire["dur"], acquire["tid"]) == (20.0, 22.0, 42)
    assert (stall["ts"], stall["dur"], stall["tid"]) == (21.0, 20.0, 42)
    (begin,) = of(trace, ph="b", name="layer.7")
    (end,) = of(trace, ph="e", name="layer.7")
    assert (begin["ts"], end["ts"]) == (42.0, 60.0)
    assert begin["id"] == end["id"]


def test_counters_follow_every_transfer_and_know_what_was_resident_before() -> None:
    trace = chrome_trace(RUN, page_bytes=PAGE_BYTES)
    resident = [row["args"]["bytes"] // PAGE_BYTES for row in of(trace, ph="C", name="resident bytes")]
    in_flight = [row["args"]["bytes"] // PAGE_BYTES for row in of(trace, ph="C", name="in flight bytes")]
    assert resident == [0, 0, 0, 1, 2, 1, 1, 2, 2]
    assert in_flight == [0, 1, 2, 1, 0, 0, 1, 0, 1]


def test_trace_is_json_in_order_of_time() -> None:
    trace = json.loads(json.dumps(chrome_trace(RUN, page_bytes=PAGE_BYTES)))
    times = [row["ts"] for row in trace["traceEvents"] if "ts" in row]
    assert times == sorted(times)
    assert len(of(trace, ph="i", name="evict")) == 2
    assert {row["args"]["name"] for row in of(trace, ph="M", name="thread_name")} >= {
        "transfer 0",
        "transfer 1",
        "thread 42",
    }


def test_no_events_give_an_empty_trace_and_no_picture(tmp_path: Path) -> None:
    trace = chrome_trace(RUN[:0], page_bytes=PAGE_BYTES)
    assert [row for row in trace["traceEvents"] if row["ph"] != "M"] == []
    assert residency_intervals(RUN[:0]).shape == (0, 3)
    with pytest.raises(ValueError, match="no events to draw"):
        residency_png(RUN[:0], tmp_path / "a.png", page_bytes=PAGE_BYTES, page_count=10, budget_bytes=2 * PAGE_BYTES)


def test_intervals_begin_with_the_read_and_end_with_the_eviction() -> None:
    rows = [
        (page, (begin - START_NS) // 1000, (end - START_NS) // 1000) for page, begin, end in residency_intervals(RUN)
    ]
    assert rows == [(1, 30, 70), (2, 40, 99), (3, 95, 99), (9, 0, 0)]


def test_pages_no_event_mentions_are_resident_throughout_if_they_are_at_the_end() -> None:
    resident = np.zeros(10, np.bool_)
    resident[[2, 3, 5]] = True
    rows = residency_intervals(RUN, resident_at_end=resident).tolist()
    assert [5, START_NS, START_NS + 99_000] in rows
    assert len(rows) == 5


def test_picture_shows_what_was_resident(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    path = tmp_path / "residency.png"
    sets = {7: np.array([1, 2], np.int32)}
    residency_png(RUN, path, page_bytes=PAGE_BYTES, page_count=10, budget_bytes=2 * PAGE_BYTES, set_pages=sets)
    assert path.stat().st_mode & 0o777 == 0o600
    pixels = np.round(imread(path)[..., :3] * 255).astype(int)
    counts = {
        name: int((pixels == colour).all(axis=-1).sum())
        for name, colour in {"resident": (0x9C, 0xC3, 0xE6), "in use": (0x12, 0x50, 0x8C)}.items()
    }
    # Of 10 x 99 cells: page 1 for 40, page 2 for 59, page 3 for 4; of these in use 2 x 18.
    assert counts["in use"] / counts["resident"] == pytest.approx(36 / (103 - 36), rel=0.15)
