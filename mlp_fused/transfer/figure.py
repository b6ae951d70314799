"""Plot the time of a step and of its parts against the batch size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..files import write_all as write
from ..plots import BLACK, BLUE, GREEN, LIGHT, ORANGE, PURPLE, VERMILION, blank, file_content, finish
from ..timing import Spread
from .findings import Transfer

__all__ = ["draw", "step_figure"]


def draw(result: Transfer, path: Path) -> None:
    """Write the plot to a .png or .svg file, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    write({path: file_content(step_figure(result), path.suffix[1:])})


def step_figure(result: Transfer) -> Any:
    """Plot milliseconds against batch size on log axes: a step on the CPU, a step on the GPU, and its parts.

    A line marks the batch size from which the GPU is faster. The background is white, also on dark pages.
    """
    figure, axes = blank(LIGHT, 8, 5.2)
    sizes = [point.rows for point in result.points]

    def line(label: str, spreads: list[Spread], color: str, marker: str, dashes: str, width: float = 1.8) -> None:
        axes.plot(sizes, [s.ms for s in spreads], dashes, color=color, marker=marker, label=label, lw=width, ms=6)
        axes.fill_between(sizes, [s.low for s in spreads], [s.high for s in spreads], color=color, alpha=0.15, lw=0)

    line("step on the CPU", [point.cpu.step for point in result.points], BLACK, "o", "-", 2.2)
    gpu = [point.gpu for point in result.points if point.gpu is not None]
    if gpu:
        line("step on the GPU, x.to(device)", [times.step for times in gpu], VERMILION, "s", "-", 2.2)
        line("step on the GPU, prefetched", [times.prefetched for times in gpu], ORANGE, "D", "-")
        line("its copy, pageable", [times.pageable.device for times in gpu], PURPLE, "v", ":")
        line("its copy, pinned", [times.non_blocking.device for times in gpu], BLUE, "^", "--")
        line("its kernels", [times.kernels for times in gpu], GREEN, "P", "--")
    axes.set(xscale="log", yscale="log", xlabel="batch size (rows)", ylabel="time of a step (milliseconds)")
    axes.set_xticks(_ticks(sizes))
    crossing = result.crossings.get("step")
    if crossing is not None and 0 < crossing.rows < math.inf:
        low = max(crossing.low, sizes[0])
        high = min(crossing.high, sizes[-1])
        axes.axvspan(low, high, color=VERMILION, alpha=0.12, lw=0)
        axes.axvline(crossing.rows, color=VERMILION, lw=1.2, ls="-.")
        axes.annotate(
            f"from {crossing.rows:,.0f} rows on\nthe GPU is faster",
            (crossing.rows, 0.98),
            xycoords=("data", "axes fraction"),
            xytext=(6, 0),
            textcoords="offset points",
            va="top",
            fontsize=9,
        )
    elif crossing is not None:
        axes.text(0.02, 0.98, f"the GPU is faster {crossing}", transform=axes.transAxes, va="top", fontsize=9)
    mode = "training: forward and backward" if result.training else "inference"
    network = result.network.partition(", input")[0]
    axes.set_title(f"{network}; {mode}\n{result.gpu or 'no GPU'}; CPU: {result.cpu}", fontsize=10)
    finish(axes, LIGHT, fontsize=9, loc="outside lower center", ncols=3)
    return figure


def _ticks(sizes: list[int]) -> list[int]:
    """Return the sizes to label, from the largest down, so that labels do not overlap on a log axis."""
    least = (sizes[-1] / sizes[0]) ** (1 / 12)
    ticks: list[int] = []
    for size in reversed(sizes):
        if not ticks or ticks[-1] / size >= least:
            ticks.append(size)
    return ticks[::-1]
