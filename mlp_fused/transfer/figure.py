"""The figure of a step's parts by batch size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..files import write_all as write
from ..plots import BLACK, BLUE, GREEN, LIGHT, ORANGE, PURPLE, VERMILION, blank, file_of, finish
from ..timing import Spread
from .findings import Transfer

__all__ = ["draw", "step_figure"]


def draw(found: Transfer, path: Path) -> None:
    """Write the figure of a step's parts to a file, .png or .svg, whole or not at all."""
    write({path: file_of(step_figure(found), path.suffix[1:])})


def step_figure(found: Transfer) -> Any:
    """Milliseconds against batch size on log axes: the CPU's step, the GPU's, its parts, and where the two cross.

    Its background is white, on dark pages too.
    """
    figure, axes = blank(LIGHT, 8, 5.2)
    sizes = [point.rows for point in found.points]

    def line(label: str, spreads: list[Spread], color: str, marker: str, dashes: str, width: float = 1.8) -> None:
        axes.plot(sizes, [s.ms for s in spreads], dashes, color=color, marker=marker, label=label, lw=width, ms=6)
        axes.fill_between(sizes, [s.low for s in spreads], [s.high for s in spreads], color=color, alpha=0.15, lw=0)

    line("a step on this CPU", [point.cpu.step for point in found.points], BLACK, "o", "-", 2.2)
    gpu = [point.gpu for point in found.points if point.gpu is not None]
    if gpu:
        line("a step on the GPU, as usually written", [each.step for each in gpu], VERMILION, "s", "-", 2.2)
        line("a step on the GPU, prefetched", [each.prefetched for each in gpu], ORANGE, "D", "-")
        line("of it: copy, pageable", [each.pageable.device for each in gpu], PURPLE, "v", ":")
        line("of it: copy, pinned", [each.non_blocking.device for each in gpu], BLUE, "^", "--")
        line("of it: kernels", [each.kernels for each in gpu], GREEN, "P", "--")
    axes.set(xscale="log", yscale="log", xlabel="batch size (rows)", ylabel="time of a step (milliseconds)")
    axes.set_xticks(_apart(sizes))
    crossing = found.crossings.get("step")
    if crossing is not None and 0 < crossing.rows < math.inf:
        low = max(crossing.low, sizes[0])
        high = min(crossing.high, sizes[-1])
        axes.axvspan(low, high, color=VERMILION, alpha=0.12, lw=0)
        axes.axvline(crossing.rows, color=VERMILION, lw=1.2, ls="-.")
        axes.annotate(
            f"from {crossing.rows:,.0f} rows on\nthe GPU wins",
            (crossing.rows, 0.98),
            xycoords=("data", "axes fraction"),
            xytext=(6, 0),
            textcoords="offset points",
            va="top",
            fontsize=9,
        )
    elif crossing is not None:
        axes.text(0.02, 0.98, f"the GPU wins {crossing}", transform=axes.transAxes, va="top", fontsize=9)
    what = "training: forward and backward" if found.training else "inference"
    network = found.network.partition(", input")[0]
    axes.set_title(f"{network}; {what}\n{found.gpu or 'no GPU'}; CPU: {found.cpu}", fontsize=10)
    finish(axes, LIGHT, fontsize=9, loc="outside lower center", ncols=3)
    return figure


def _apart(sizes: list[int]) -> list[int]:
    """The sizes whose numbers do not run into each other on a log axis: the largest, and on down."""
    least = (sizes[-1] / sizes[0]) ** (1 / 12)
    shown: list[int] = []
    for size in reversed(sizes):
        if not shown or shown[-1] / size >= least:
            shown.append(size)
    return shown[::-1]
