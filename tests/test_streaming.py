# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import tensorpager as tp
from paged_weights import PAGE_BYTES, counted, evict_all, in_file, make_core, pages_of, plain_alias
from tensorpager._core import Pager as Core
from tensorpager.paged_tensor import Backing, PagedTensor, no_guard
from tensorpager.streaming import TILE_ROWS, Rows, Sweep, backing_of, page_sets, row_tiles, rows_of


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    core = make_core(tmp_path)
    yield core
    core.close()


@pytest.fixture
def weight(core: Core, tmp_path: Path) -> PagedTensor:
    """20 MiB and a bit, which are 11 pages for its offset."""
    return in_file(core, tmp_path / "weight", torch.randn(5160, 1024), offset_bytes=4096)


def groups_of(core: Core, weight: PagedTensor) -> list[list[int]]:
    rows = rows_of(weight)
    return [[core.add_set([rows.span(begin, end)], "tile")] for begin, end in row_tiles(rows, core)]


def backing(weight: PagedTensor) -> Backing:
    found = weight._tp_backing
    assert found is not None
    return found


def test_a_sweep_reads_each_page_once_and_ahead(core: Core, weight: PagedTensor) -> None:
    groups = groups_of(core, weight)
    assert len(groups) > 8
    ahead = []
    with counted(core) as counts, Sweep(backing(weight), groups) as sweep:
        for position in sweep:
            pinned = core.stats()["pinned_pages"]
            assert pinned <= core.pinnable_page_count // 2 + 1  # the page before the first one read ahead
            ahead.append(pinned > len(core.set_pages(groups[position][0])))
    assert counts.page_ins == pages_of(core, weight)
    assert counts.acquires == len(groups)
    assert all(ahead[:-4])  # while one is looked at others are on their way
    assert counts.faults < counts.prefetches


def test_a_sweep_that_is_no_step_is_not_recorded(core: Core, weight: PagedTensor) -> None:
    core.record_begin(False)
    with Sweep(backing(weight), groups_of(core, weight), steps=False) as sweep:
        assert list(sweep) == list(range(len(groups_of(core, weight))))
    assert len(core.record_end()) == 0
    groups = groups_of(core, weight)
    core.record_begin(False)
    with Sweep(backing(weight), groups) as sweep:
        assert list(sweep) == list(range(len(groups)))
    expected = [event for (set_id,) in groups for event in (set_id + 1, -set_id - 1)]
    assert core.record_end().tolist() == expected


def test_a_dry_sweep_tells_the_recording_and_reads_nothing(core: Core, weight: PagedTensor) -> None:
    groups = groups_of(core, weight)
    core.record_begin(True)
    with counted(core) as counts, Sweep(backing(weight), groups, dry=True) as sweep:
        assert len(list(sweep)) == len(groups)
    assert len(core.record_end()) == 2 * len(groups)
    assert counts.page_ins == 0


@pytest.mark.parametrize("steps", [True, False])
def test_leaving_a_sweep_half_way_lets_go_of_everything(core: Core, weight: PagedTensor, steps: bool) -> None:
    def fail_at_the_third() -> None:
        with Sweep(backing(weight), groups_of(core, weight), steps=steps) as sweep:
            for position in sweep:
                assert core.stats()["pinned_pages"] > 0
                assert position < 2 or 1 / 0

    with pytest.raises(ZeroDivisionError) as kept:  # and with it the frames, as for a user who looks at the traceback
        fail_at_the_third()
    assert core.stats()["pinned_pages"] == 0
    assert kept.traceback


@pytest.mark.parametrize("steps", [True, False])
def test_what_others_hold_leaves_room_for_less_ahead_and_none_is_no_error(
    core: Core, weight: PagedTensor, steps: bool
) -> None:
    other = core.map_spill(core.budget_bytes)
    groups = groups_of(core, weight)
    for others_pages in (core.pinnable_page_count - 3, core.pinnable_page_count):
        held = core.add_set([(other.address, others_pages * PAGE_BYTES)], "other steps")
        core.acquire(held)
        with Sweep(backing(weight), groups, steps=steps) as sweep:
            for position in sweep:
                begin, end = row_tiles(rows_of(weight), core)[position]
                assert bool(plain_alias(weight)[begin:end].isfinite().all())
        assert core.stats()["pinned_pages"] == others_pages
        core.release(held)
    assert core.stats()["touches"] > 0  # of the second time


def test_a_read_that_fails_is_an_error_and_nothing_stays_held(core: Core, weight: PagedTensor, tmp_path: Path) -> None:
    evict_all(core)
    (tmp_path / "weight").write_bytes(b"short")
    with pytest.raises(tp.IoError), Sweep(backing(weight), groups_of(core, weight)) as sweep:
        list(sweep)
    assert core.stats()["pinned_pages"] == 0
    core.close()
    with pytest.raises(tp.ClosedError), Sweep(backing(weight), [[0]]) as sweep:
        list(sweep)


def test_a_schedule_that_expects_the_steps_reads_ahead_itself(core: Core, weight: PagedTensor) -> None:
    from tensorpager.pass_plan import plan_pass, steps_from_events

    groups = groups_of(core, weight)
    core.record_begin(True)
    with Sweep(backing(weight), groups, dry=True) as sweep:
        list(sweep)
    steps = steps_from_events(core.record_end(), {set_id: core.set_pages(set_id) for (set_id,) in groups})
    plan = plan_pass(
        steps, frame_count=core.frame_count, page_bytes=core.page_bytes, page_count=core.page_count, step_name=str
    )
    names = "step_set initial_pages action_step action_deadline action_page_in action_evict"
    core.set_schedule(**{name: getattr(plan, name) for name in names.split()})
    assert core.next_set == groups[0][0]
    for turn in range(3):
        core.begin_pass()
        with counted(core) as counts, Sweep(backing(weight), groups) as sweep:
            for position in sweep:
                assert core.stats()["pinned_pages"] == len(core.set_pages(groups[position][0]))  # no tickets
        assert turn == 0 or counts.page_ins == plan.page_ins_per_pass
        assert turn == 0 or counts.faults == 0
    core.clear_schedule()
    assert core.next_set is None


def test_tiles_are_multiples_of_rows_and_leave_no_few_rows_over(core: Core) -> None:
    for count in (1, 63, 64, 65, 127, 4097, 5160):
        for row_bytes in (4, 4096, PAGE_BYTES, 64 * PAGE_BYTES):
            tiles = row_tiles(Rows(0, count, row_bytes, row_bytes), core)
            assert tiles[0][0] == 0
            assert tiles[-1][1] == count
            assert all(one[1] == other[0] for one, other in pairwise(tiles))
            sizes = [end - begin for begin, end in tiles]
            assert all(size % TILE_ROWS == 0 for size in sizes[:-1])
            assert len(tiles) == 1 or min(sizes) >= TILE_ROWS
            if row_bytes * TILE_ROWS <= PAGE_BYTES:
                limit = core.pinnable_page_count * PAGE_BYTES // 8 + TILE_ROWS * row_bytes
                assert max(sizes) * row_bytes <= limit


def test_rows_that_interleave_are_told(weight: PagedTensor) -> None:
    with no_guard():
        assert rows_of(weight).apart
        assert not rows_of(weight.t()).apart
        assert rows_of(weight.t()[:1]).apart
        assert rows_of(weight[::3]).span(1, 3) == (weight.data_ptr() + 3 * 4096, 3 * 4096 + 4096)
        assert not rows_of(weight[0].expand(3, 1024)).apart


def test_sets_of_pages_are_as_many_as_pages(core: Core, weight: PagedTensor) -> None:
    with no_guard():
        address = weight.data_ptr()
    first = page_sets(core, address, 3 * PAGE_BYTES, "page")
    assert [len(core.set_pages(set_id)) for set_id in first] == [1, 1, 1, 1]
    assert page_sets(core, address + PAGE_BYTES, PAGE_BYTES, "page") == first[1:3]


def test_paged_memory_is_known_by_its_address(core: Core, weight: PagedTensor) -> None:
    assert backing_of(weight) is weight._tp_backing
    found = backing_of(plain_alias(weight)[7:])
    assert found is not None
    assert found.core is core
    assert backing_of(torch.ones(3)) is None
    assert backing_of(torch.ones(3).to_sparse()) is None
    assert backing_of(torch.ones(0)) is None


def test_looking_up_memory_keeps_no_pager_alive(tmp_path: Path) -> None:
    from tensorpager.paged_tensor import known_cores

    core = make_core(tmp_path)
    weight = in_file(core, tmp_path / "weight", torch.randn(8, 8))
    alias = plain_alias(weight)
    assert backing_of(alias) is not None
    watched = weakref.ref(core)
    assert watched() in known_cores
    core.close()
    del core, weight
    gc.collect()
    assert watched() is None
    assert backing_of(alias) is None
