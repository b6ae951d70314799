"""What `mlp-fused transfer --plot` draws, by matplotlib; and how all plots of this project look."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .timing import Spread
from .transfer import Transfer

__all__ = ["DARK", "LIGHT", "Theme", "blank", "draw", "file_of", "finish", "write"]

# Okabe and Ito's colours, which the colour-blind tell apart (https://jfly.uni-koeln.de/color/), with markers and dashes
# besides.
BLACK, ORANGE, BLUE, GREEN, VERMILION, PURPLE = "#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7"
SKY, YELLOW = "#56B4E9", "#F0E442"


@dataclass(frozen=True)
class Theme:
    """The page that a plot stands on."""

    name: str
    background: str
    ink: str
    grid: str
    blue: str  # the one that shows on this background
    pale: str  # another that does
    orange: str = ORANGE
    green: str = GREEN
    vermilion: str = VERMILION
    purple: str = PURPLE


LIGHT = Theme("light", "#FFFFFF", BLACK, "#DDDDDD", BLUE, SKY)
DARK = Theme("dark", "#0D1117", "#E6EDF3", "#30363D", SKY, YELLOW)  # GitHub's


def blank(theme: Theme, width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches, 150 dots each, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor=theme.background, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot(facecolor=theme.background)


def finish(axes: Any, theme: Theme, **legend: Any) -> None:
    """The grid and the legend, which may stand outside the axes, and all lettering in the theme's ink."""
    axes.grid(True, which="major", color=theme.grid, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=theme.ink)
    for spine in axes.spines.values():
        spine.set_color(theme.ink)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_color(theme.ink)
    owner = axes.figure if str(legend.get("loc")).startswith("outside") else axes
    shown = owner.legend(frameon=True, facecolor=theme.background, edgecolor=theme.grid, framealpha=0.9, **legend)
    for text in shown.get_texts():
        text.set_color(theme.ink)


def file_of(figure: Any, kind: str) -> bytes:
    """The contents of a file of `kind`, "png" or "svg"; of equal figures, equal ones."""
    from matplotlib import rc_context

    written = io.BytesIO()
    with rc_context({"svg.hashsalt": "mlp_fused"}):
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(written, format=kind, facecolor=figure.get_facecolor(), metadata=metadata)
    return written.getvalue()


def write(files: Mapping[Path, bytes]) -> None:
    """Write these files, whole or not at all, and none before all have found room."""
    temporaries = {path.resolve(): path.resolve().with_name(f".{path.name}.{os.getpid()}") for path in files}
    try:
        for temporary, content in zip(temporaries.values(), files.values()):
            temporary.write_bytes(content)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def _apart(sizes: list[int]) -> list[int]:
    """Those of ascending sizes whose numbers do not run into each other on a log axis: the largest, and on down."""
    least = (sizes[-1] / sizes[0]) ** (1 / 12)
    shown: list[int] = []
    for size in reversed(sizes):
        if not shown or shown[-1] / size >= least:
            shown.append(size)
    return shown[::-1]


def draw(found: Transfer, path: Path) -> None:
    """Milliseconds against batch size on log axes: the CPU's step, the GPU's, its parts, and where the two cross.

    The file, .png or .svg, is written whole or not at all. Its background is white, on dark pages too.
    """
    from matplotlib.ticker import FuncFormatter

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
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rows, _: f"{rows:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.xaxis.set_minor_formatter("")
    axes.set_xticks(_apart(sizes))
    axes.minorticks_off()
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
    write({path: file_of(figure, path.suffix[1:])})
