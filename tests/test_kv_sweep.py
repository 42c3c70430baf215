# SPDX-License-Identifier: Apache-2.0
"""Sweeps over growing layers: what they read and write beside the least that any schedule could."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import pytest

import tensorpager as tp
from standin import make_standin_core, standin
from tensorpager.contents import MODIFIED, Contents
from tensorpager.kv_sweep import BLOCK_TOKENS_MIN, Sweep, Track, block_pages
from tensorpager.pager import make_core
from tensorpager.pass_plan import Steps, plan_pass

__all__ = ["standin"]

PAGE = 2**21
RECORD = PAGE // 32


def test_blocks_hold_what_is_needed_and_little_more() -> None:
    for pages_per_token in (1e-4, 1 / 32, 1.0, 8.0):
        values = [block_pages(count, pages_per_token) for count in range(1, 5000)]
        least = max(1, int(np.ceil(BLOCK_TOKENS_MIN * pages_per_token)))
        for count, value in enumerate(values, 1):
            assert count <= value < count + max(least, count / 128 + 1)
        assert len(set(values)) <= 256 + 128 * np.log(5000)  # not one for each page


def make(layers: int, frames: int, pages_max: int) -> tuple[Any, Sweep, list[Track]]:
    core = make_core(frames * PAGE, None, "auto", page_bytes=PAGE)
    sweep = Sweep(core)
    tracks = []
    for number in range(layers):
        track = sweep.track(number, f"layer {number}")
        track.address = core.map_spill(pages_max * PAGE).address
        track.record_bytes, track.capacity = RECORD, pages_max * PAGE // RECORD
        tracks.append(track)
    return core, sweep, tracks


def one_pass(sweep: Sweep, tracks: list[Track], added: int) -> None:
    """As attention does: everything is looked at, what is new is written behind it."""
    for track in tracks:
        sweep.enter(track, added)
        assert len(track.window.open) == 1
        marks = [ctypes.c_uint64.from_address(track.address + record * RECORD) for record in range(track.end)]
        assert all(mark.value == track.number << 32 | record for record, mark in enumerate(marks)), track.number
        for record in range(track.end, track.end + added):
            ctypes.c_uint64.from_address(track.address + record * RECORD).value = track.number << 32 | record
        track.end += added
    sweep.leave()


def least_reads(sets: list[set[int]], frames: int) -> int:
    """Belady's MIN, of which no schedule reads less; what nobody has written costs nothing."""
    uses: dict[int, list[int]] = {}
    for step, pages in enumerate(sets):
        for page in pages:
            uses.setdefault(page, []).append(step)
    following = {page: iter([*steps[1:], len(sets)]) for page, steps in uses.items()}
    next_use = {page: steps[0] for page, steps in uses.items()}
    resident: set[int] = set()
    seen: set[int] = set()
    reads = 0
    for pages in sets:
        reads += len((pages - resident) & seen)
        seen |= pages
        resident |= pages
        for page in pages:
            next_use[page] = next(following[page])
        for page in sorted(resident - pages, key=lambda each: -next_use[each])[: max(0, len(resident) - frames)]:
            resident.remove(page)
    return reads


def bound_of_a_pass(layers: int, pages: int, frames: int) -> float:
    """Pages that any schedule moves in a pass that is repeated, and modifies the last page of each layer."""
    layer = np.arange(layers, dtype=np.int64)
    sets = {index: np.arange(index * pages, (index + 1) * pages, dtype=np.int32) for index in range(layers)}
    index = layer.astype(np.int32)
    modified = Contents(layer, (layer + 1) * pages - 1, (layer + 1) * pages, np.full(layers, MODIFIED, np.int64))
    schedule = plan_pass(
        Steps(index, index, sets), frame_count=frames, page_bytes=PAGE, page_count=layers * pages, contents=modified
    )
    return schedule.lower_bound_moved_pages


def moved_pages(core: Any) -> int:
    stats = core.stats()
    return int(stats["bytes_read"] + stats["bytes_written"]) // PAGE


def test_a_context_of_eight_times_the_budget_moves_little_more_than_the_least() -> None:
    """16 layers of 15 pages, then 16; 32 frames, in which a layer and every layer's last page fit."""
    pytest.importorskip("scipy")
    layers, frames, prompt, passes = 16, 32, 15 * 32 - 4, 9
    core, sweep, tracks = make(layers, frames, 16)
    try:
        one_pass(sweep, tracks, prompt)
        for _ in range(passes):
            one_pass(sweep, tracks, 1)
        moved = moved_pages(core)
        stats = core.stats()
    finally:
        core.close()
    assert layers * 16 * PAGE == 8 * frames * PAGE
    sets = []
    for tokens in (prompt, *range(prompt + 1, prompt + 1 + passes)):
        sets += [{layer * 16 + page for page in range(-(-tokens // 32))} for layer in range(layers)]
    written_at_least = layers * 16 - frames  # each page has left once, but for those that are resident
    least = least_reads(sets, frames) + written_at_least
    assert least <= moved <= 1.05 * least, (moved, least)
    assert sweep.plan_count == 2  # for 15 pages, and for 16
    assert stats["off_schedule_acquires"] == stats["schedule_jumps"] == 0
    assert stats["resident_bytes_max"] <= frames * PAGE
    assert stats["pinned_pages"] == 0


def test_a_steady_pass_comes_close_to_its_bound_where_last_pages_have_to_leave() -> None:
    """12 layers of 8 pages in 12 frames: not even the page that each layer writes to can stay."""
    pytest.importorskip("scipy")
    core, sweep, tracks = make(12, 12, 8)
    try:
        one_pass(sweep, tracks, 7 * 32 + 2)
        for _ in range(3):
            one_pass(sweep, tracks, 1)
        before = moved_pages(core)
        for _ in range(8):
            one_pass(sweep, tracks, 1)
        moved = moved_pages(core) - before
    finally:
        core.close()
    assert sweep.plan_count == 1
    assert moved <= 1.05 * 8 * bound_of_a_pass(12, 8, 12)


def test_what_fits_is_not_moved() -> None:
    core, sweep, tracks = make(4, 24, 6)
    try:
        for added in (40, 1, 1, 60, 1, 1):
            one_pass(sweep, tracks, added)
        assert moved_pages(core) == 0
    finally:
        core.close()


def test_a_layer_that_can_not_be_held_is_no_error_on_the_host() -> None:
    core, sweep, tracks = make(2, 8, 16)
    try:
        for track in tracks:
            sweep.enter(track, 10 * 32)
            assert track.window.open == []
            track.end = 10 * 32
        sweep.leave()
        sweep.enter(tracks[0], 1)
        assert sweep.schedule is None
        assert sweep.plan_failure is not None
        assert "smallest budget that works" in sweep.plan_failure
        assert core.stats()["pinned_pages"] == 0
    finally:
        core.close()


def test_layers_are_entered_again_left_and_forgotten() -> None:
    core, sweep, tracks = make(3, 16, 2)
    try:
        one_pass(sweep, tracks, 5)
        one_pass(sweep, tracks, 1)
        assert sweep.schedule is not None
        passes = core.stats()["passes"]
        sweep.enter(tracks[1], 0)
        sweep.enter(tracks[1], 0)  # again: of a new pass
        assert sweep.is_at(tracks[1])
        assert core.stats()["passes"] == passes + 2
        assert core.stats()["pinned_pages"] == 1
        other = threading.Thread(target=sweep.forward_ends)
        other.start()
        other.join()
        assert sweep.is_at(tracks[1])  # it was not that thread's forward
        sweep.forward_ends()
        sweep.leave()
        assert not sweep.is_at(tracks[1])
        assert core.stats()["pinned_pages"] == 0
        sweep.forget()
        assert sweep.schedule is None
        one_pass(sweep, tracks, 0)
        one_pass(sweep, tracks, 0)
        assert sweep.schedule is not None
    finally:
        core.close()
    with pytest.raises(tp.ClosedError):
        sweep.enter(tracks[0], 0)
    sweep.leave()


@pytest.mark.usefixtures("standin")
def test_a_host_tier_full_of_what_is_waited_for_is_no_end() -> None:
    """A device above a host tier of 5 frames: the next page found no room there, and nobody else was asked."""
    core = make_standin_core(10 * PAGE, None, "auto", PAGE, "cuda:0", "12MiB")
    sweep = Sweep(core)
    tracks = []
    for number in range(4):
        track = sweep.track(number, f"layer {number}")
        track.address, track.record_bytes, track.capacity = core.map_spill(8 * PAGE).address, RECORD, 8 * 32
        tracks.append(track)
    for added in (5 * 32 + 20, 1, 1, 1, 1):
        for track in tracks:
            sweep.enter(track, added)
            for page in range(track.end * RECORD // PAGE, (track.end + added - 1) * RECORD // PAGE + 1):
                core.mark_written(core.add_set([(track.address + page * PAGE, PAGE)], "written"))
            track.end += added
    sweep.leave()
    stats = core.stats()
    core.close()
    assert stats["acquires"] == 4 * 5
    assert stats["resident_bytes_max"] <= 10 * PAGE
    assert stats["host_bytes_max"] <= 12 * 2**20
