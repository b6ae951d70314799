"""What `mlp-fused transfer --plot` draws, by matplotlib."""

from __future__ import annotations

import math
import os
from pathlib import Path

from .timing import Spread
from .transfer import Transfer

__all__ = ["draw"]

# Okabe and Ito's colours, which the colour-blind tell apart (https://jfly.uni-koeln.de/color/), with markers and dashes
# besides.
BLACK, ORANGE, BLUE, GREEN, VERMILION, PURPLE = "#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7"


def draw(found: Transfer, path: Path) -> None:
    """Milliseconds against batch size on log axes: the CPU's step, the GPU's, its parts, and where the two cross.

    The file, .png or .svg, is written whole or not at all. Its background is white, on dark pages too.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(8, 5.2), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
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
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rows, _: f"{rows:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.xaxis.set_minor_formatter("")
    axes.set_xticks(sizes)
    axes.minorticks_off()
    axes.grid(True, which="major", color="#DDDDDD", lw=0.6)
    axes.set_axisbelow(True)
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
    axes.legend(fontsize=8, frameon=True, facecolor="white", framealpha=0.9, loc="lower right")

    temporary = path.resolve().with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(temporary, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
        os.replace(temporary, path.resolve())
    finally:
        temporary.unlink(missing_ok=True)
