"""Draw the plots of reports: series of points over log axes, in strips, for light and for dark pages."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlp_fused import plots
from mlp_fused.plots import Theme

Strips = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Plot:
    """A figure for light and for dark pages.

    Attributes:
        alt: what it shows, in words.
        figure: returns the matplotlib figure for a theme.
        kind: of the file, "png" or "svg".
    """

    alt: str
    figure: Callable[[Theme], Any]
    kind: str = "png"

    def draw(self, theme: Theme) -> bytes:
        """The contents of the file; an svg has the words in it."""
        return plots.file_of(self.figure(theme), self.kind, *([self.alt] if self.kind == "svg" else []))


@dataclass(frozen=True)
class Series:
    """The look of some points: a colour by its name in the theme, and a marker."""

    label: str
    color: str
    marker: str


WIDTH = 8  # inches; a README is about as many wide, so that letters are as large as drawn
LEGEND = {"fontsize": 9, "loc": "outside lower center", "ncols": 3}


def scatter(
    theme: Theme,
    points: dict[str, list[tuple[float, float]]],
    series: dict[str, Series],
    x: str,
    y: str,
    title: str,
    log_y: bool = True,
) -> Any:
    """A figure of points on log axes, with a line at 1."""
    figure, axes = plots.blank(theme, WIDTH, 4.6)
    for name, each in points.items():
        axes.plot(*zip(*each), **look(theme, series[name]), label=series[name].label)
    axes.set(xscale="log", yscale="log" if log_y else "linear", xlabel=x, ylabel=y)
    axes.axhline(1, color=theme.ink, lw=1, ls="--")
    if not log_y:
        axes.set_ylim(0, max(1.1, *(1.05 * y for each in points.values() for _, y in each)))
    axes.set_title(title, fontsize=10)
    plots.finish(axes, theme, **LEGEND)
    return figure


def strip(theme: Theme, strips: Strips, series: dict[str, Series], label: str, title: str, log: bool) -> Any:
    """A figure with a strip a group: in it a line of points for each series, and a bar at their median."""
    present = [name for name in series if any(name in each for each in strips.values())]
    lanes = max(2, len(present))
    figure, axes = plots.blank(theme, WIDTH, 1.6 + 0.09 * (lanes + 1) * len(strips))
    for name in present:
        shift = (present.index(name) - (len(present) - 1) / 2) / (lanes + 1)
        xs = [(x, place + shift) for place, each in enumerate(strips.values()) for x in each.get(name, [])]
        axes.plot(*zip(*xs), **look(theme, series[name]), label=series[name].label)
        several = [
            (each[name], place + shift) for place, each in enumerate(strips.values()) if len(each.get(name, ())) > 2
        ]
        middle = [(statistics.median(values), y) for values, y in several]
        axes.plot([x for x, _ in middle], [y for _, y in middle], ls="", marker="|", ms=9, mew=2, color=theme.ink)
    axes.set_yticks(range(len(strips)), list(strips))
    axes.set_ylim(len(strips) - 0.5, -0.5)
    axes.set(xlabel=label, xscale="log" if log else "linear")
    axes.axvline(1, color=theme.ink, lw=1, ls="--")
    if not log:
        axes.set_xlim(left=0)
    for edge in range(1, len(strips)):
        axes.axhline(edge - 0.5, color=theme.grid, lw=0.6)
    axes.set_title(title, fontsize=10)
    plots.finish(axes, theme, **LEGEND)
    axes.grid(False, axis="y")
    return figure


def look(theme: Theme, series: Series) -> dict[str, Any]:
    """The marker of a series without a line, as arguments of `Axes.plot`."""
    color = getattr(theme, series.color)
    return {
        "ls": "",
        "marker": series.marker,
        "ms": 5,
        "color": color,
        "alpha": 0.9,
        "mec": theme.background,
        "mew": 0.3,
    }


def file_name(slug: str, name: str, theme: Theme, plot: Plot) -> str:
    return f"{slug}-{name}-{theme.name}.{plot.kind}"


def drawn(shown: Mapping[str, Plot], slug: str) -> dict[str, bytes]:
    """The plots' files by name, for light and for dark pages."""
    return {
        file_name(slug, name, theme, plot): plot.draw(theme)
        for name, plot in shown.items()
        for theme in (plots.LIGHT, plots.DARK)
    }
