# SPDX-License-Identifier: Apache-2.0
"""Planning time and page-ins per pass beside the lower bound and LRU. Needs neither torch nor the native module.

    python bench/bench_plan.py [--rounds 5] [--json FILE]

Planning time is the median over the rounds, from recorded events to a validated schedule, by the clock and in CPU time.
`stationary` is what keeping the same pages for good would read: all pages less the frames that the largest step
leaves. `modelled time` is that of a pass over max(time to read the fewest page-ins, time to compute), when computing
on a page takes a quarter of reading it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from plan_traces import MODEL_PASSES, PassBuilder, many_pages
from tensorpager.pass_plan import PageSchedule, lru_page_ins, plan_pass, steps_from_events
from tensorpager.readahead import pass_time
from tensorpager.steps import UseClasses, use_classes

PAGE_BYTES = 2 << 20
COMPUTE_PER_PAGE = 0.25
PASSES = {**MODEL_PASSES, "70,000 pages x 500 steps": many_pages}


def planned(built: PassBuilder, frame_count: int, read_ahead: float | None) -> tuple[PageSchedule, float, float]:
    """(schedule, seconds by the clock, CPU seconds)"""
    events = np.array(built.events, np.int32)
    started, cpu_started = time.perf_counter(), time.process_time()
    steps = steps_from_events(events, built.sets)
    schedule = plan_pass(
        steps,
        frame_count=frame_count,
        page_bytes=PAGE_BYTES,
        page_count=built.page_count,
        read_ahead=read_ahead,
    )
    return schedule, time.perf_counter() - started, time.process_time() - cpu_started


def modelled_time(schedule: PageSchedule, classes: UseClasses) -> float:
    """One pass of the model in readahead.py; how much of each gap is kept is read off the actions."""
    evictions = {
        (page, step): deadline
        for page, step, deadline in zip(
            schedule.action_evict.tolist(),
            schedule.action_step.tolist(),
            schedule.action_deadline.tolist(),
            strict=True,
        )
    }
    kept = [
        int(pages) - sum((page, int(start) + 1) in evictions for page in classes.pages[int(index)].tolist())
        for index, start, pages in zip(classes.gap_class, classes.gap_start, classes.gap_pages, strict=True)
    ]
    return pass_time(classes, kept, schedule.frame_count, COMPUTE_PER_PAGE)


def measure(name: str, share: float, rounds: int) -> dict[str, object]:
    built = PASSES[name]()
    steps = built.steps()
    classes = use_classes(steps)
    frame_count = max(int(built.page_count * share), int(classes.step_pages.max()))
    timed = [planned(built, frame_count, None)[1:] for _ in range(rounds)]
    seconds, cpu_seconds = [wall for wall, _ in timed], [cpu for _, cpu in timed]
    chosen, fewest = (planned(built, frame_count, read_ahead)[0] for read_ahead in (None, 0))
    stationary = built.page_count - frame_count + chosen.largest_step_pages
    floor = max(float(fewest.page_ins_per_pass), COMPUTE_PER_PAGE * float(classes.own_pages.sum()))
    return {
        "pass": name,
        "pages": built.page_count,
        "steps": steps.count,
        "frames": frame_count,
        "planning_s_median": round(statistics.median(seconds), 3),
        "planning_cpu_s_median": round(statistics.median(cpu_seconds), 3),
        "planning_s_max": round(max(seconds), 3),
        "page_ins": chosen.page_ins_per_pass,
        "page_ins_fewest": fewest.page_ins_per_pass,
        "page_ins_bound": round(chosen.lower_bound_page_ins, 1),
        "page_ins_lru": lru_page_ins(steps, frame_count),
        "page_ins_over_stationary": round(chosen.page_ins_per_pass / stationary, 3),
        "modelled_time": round(modelled_time(chosen, classes) / floor, 3),
        "modelled_time_fewest": round(modelled_time(fewest, classes) / floor, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    arguments = parser.parse_args()
    print(
        "pass, budget: planning s | page-ins: chosen / fewest / bound / LRU | over stationary | modelled time (fewest)"
    )
    rows = []
    for name in PASSES:
        for share in (0.25, 0.5, 0.75):
            row = measure(name, share, arguments.rounds)
            rows.append(row)
            print(
                f"{name}, {share:.0%}: {row['planning_s_median']} ({row['planning_cpu_s_median']} CPU) | "
                f"{row['page_ins']} / {row['page_ins_fewest']} / {row['page_ins_bound']} / {row['page_ins_lru']} | "
                f"{row['page_ins_over_stationary']} | "
                f"{row['modelled_time']} ({row['modelled_time_fewest']})",
                flush=True,
            )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
