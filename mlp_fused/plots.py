"""The figure of `mlp-fused transfer --plot`, by matplotlib, and the look of all plots of this project."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

__all__ = ["DARK", "LIGHT", "Theme", "blank", "file_content", "finish", "number"]

# Okabe and Ito's colours, which the colour-blind tell apart (https://jfly.uni-koeln.de/color/). Plots also use markers
# and dashes.
BLACK, ORANGE, BLUE, GREEN, VERMILION, PURPLE = "#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7"
SKY, YELLOW = "#56B4E9", "#F0E442"


@dataclass(frozen=True)
class Theme:
    """The colours of a plot for a light or a dark page."""

    name: str
    background: str
    ink: str
    grid: str
    blue: str  # a blue that is visible on this background
    pale: str  # a pale colour that is visible on it
    orange: str = ORANGE
    green: str = GREEN
    vermilion: str = VERMILION
    purple: str = PURPLE


LIGHT = Theme("light", "#FFFFFF", BLACK, "#DDDDDD", BLUE, SKY)
DARK = Theme("dark", "#0D1117", "#E6EDF3", "#30363D", SKY, YELLOW)  # GitHub's


def blank(theme: Theme, width: float, height: float) -> tuple[Any, Any]:
    """A figure of `width` x `height` inches with 150 dots per inch, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor=theme.background, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot(facecolor=theme.background)


def number(value: float) -> str:
    """A number as people write it: 0.15, 64, 1,048,576."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


# Choices of ticks on a log axis, the coarsest first: the step in decades, and the multiples of each power of ten.
STEPS = ((3, (1,)), (2, (1,)), (1, (1,)), (1, (1, 3)), (1, (1, 2, 5)), (1, (1, 1.5, 2, 3, 5, 7)))
ENOUGH_TICKS = 4


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers between low and high: the coarsest of STEPS with enough of them, else even steps."""
    from matplotlib.ticker import MaxNLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [[multiple * 10.0**d for d in decades if d % every == 0 for multiple in at] for every, at in STEPS]
    choices.append(list(MaxNLocator(6, min_n_ticks=ENOUGH_TICKS).tick_values(low, high)))
    shown = [[tick for tick in ticks if low <= tick <= high] for ticks in choices]
    return next((ticks for ticks in shown if len(ticks) >= ENOUGH_TICKS), shown[-1])


def _label_log_axis(axis: Any) -> None:
    """Set the ticks of a log axis, so that it has at least three labels. If the caller fixed as many, they stay."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = sorted(axis.get_view_interval())
    locator = axis.get_major_locator()
    fixed = locator() if isinstance(locator, FixedLocator) else ()
    if sum(low <= tick <= high for tick in fixed) < 3:
        axis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def finish(axes: Any, theme: Theme, **legend: Any) -> None:
    """Draw the grid, the ticks of log axes and the legend, which may be outside. Text gets the theme's ink."""
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            _label_log_axis(axis)
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


def file_content(figure: Any, kind: str, description: str | None = None) -> bytes:
    """Return the contents of a file of `kind`, "png" or "svg", with a description in its metadata.

    Equal figures give equal contents.
    """
    from matplotlib import rc_context

    written = io.BytesIO()
    metadata: dict[str, str | None] = {"Date": None} if kind == "svg" else {}
    if description is not None:
        metadata["Description"] = description
    with rc_context({"svg.hashsalt": "mlp_fused"}):
        figure.savefig(written, format=kind, facecolor=figure.get_facecolor(), metadata=metadata)
    return written.getvalue()
