# SPDX-License-Identifier: Apache-2.0
"""The curve of time against budget as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tensorpager.operator_trace import Trace
from tensorpager.private_file import open_private
from tensorpager.schedule import Schedule

if TYPE_CHECKING:
    from tensorpager.plan_command import CurvePoint

__all__ = ["draw_curve"]

INK, TIME, BOUND, COMPUTE, MARK = "#333333", "#2a6fbb", "#e0a030", "#4a9c5d", "#c8553d"
GIBIBYTE = 2**30


def draw_curve(path: Path, points: Sequence[CurvePoint], schedule: Schedule | None, trace: Trace, unit: str) -> None:
    """Write a PNG: predicted time, its bound and compute alone over the budget; the planned budget marked.

    ValueError when no budget of the curve works. ImportError without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    working = [(point.device_bytes / GIBIBYTE, point.certificate) for point in points if point.certificate is not None]
    if not working:
        msg = "there is no curve to draw: the step fits no budget of the curve, or the curve was left out"
        raise ValueError(msg)
    sizes = [size for size, _ in working]
    figure = Figure(figsize=(9, 5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    least = [proof.time_bound_seconds for _, proof in working]
    axes.plot(sizes, [proof.compute_seconds for _, proof in working], color=COMPUTE, label="compute alone")
    axes.plot(sizes, [proof.pass_seconds for _, proof in working], color=TIME, marker="o", label="this plan")
    axes.plot(sizes, least, color=BOUND, linestyle="--", label="least possible")
    if schedule is not None:
        here = schedule.device_frames * schedule.page_bytes / GIBIBYTE
        seconds = schedule.certificate.pass_seconds
        axes.plot([here], [seconds], color=MARK, marker="D", linestyle="", label="planned budget")
        axes.axvline(schedule.working_set_pages * schedule.page_bytes / GIBIBYTE, color=INK, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xticks(sizes, [f"{size:.3g}" for size in sizes])
    axes.set_xlabel("budget of the device in GiB (the line: everything fits)")
    axes.set_ylabel(f"seconds per {unit}")
    axes.set_title(trace.name, loc="left", color=INK, fontweight="bold")
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend(frameon=False)
    with open_private(path) as file:
        figure.savefig(file, format="png")
