"""Draw the plots of reports: points on log axes, and strips of points, for light and for dark pages."""

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
    """A plot for light and for dark pages.

    Attributes:
        alt: the alt text.
        figure: a function from a theme to the matplotlib figure.
        kind: the type of the file, "png" or "svg".
    """

    alt: str
    figure: Callable[[Theme], Any]
    kind: str = "png"

    def draw(self, theme: Theme) -> bytes:
        """Return the content of the file. An svg includes the alt text."""
        return plots.file_content(self.figure(theme), self.kind, *([self.alt] if self.kind == "svg" else []))


@dataclass(frozen=True)
class Series:
    """The label of some points, the name of their color in the theme, and their marker."""

    label: str
    color: str
    marker: str


WIDTH = 8  # inches; about the width of a README, so that it shows the letters in their size
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
    """Plot points on log axes, with a line at y = 1."""
    figure, axes = plots.blank(theme, WIDTH, 4.6)
    for name, coordinates in points.items():
        axes.plot(*zip(*coordinates), **look(theme, series[name]), label=series[name].label)
    axes.set(xscale="log", yscale="log" if log_y else "linear", xlabel=x, ylabel=y)
    axes.axhline(1, color=theme.ink, lw=1, ls="--")
    if not log_y:
        axes.set_ylim(0, max(1.1, *(1.05 * y for coordinates in points.values() for _, y in coordinates)))
    axes.set_title(title, fontsize=10)
    plots.finish(axes, theme, **LEGEND)
    return figure


def strip(theme: Theme, strips: Strips, series: dict[str, Series], label: str, title: str, log: bool) -> Any:
    """Plot one horizontal strip for each group: a line of points for each series, with a bar at their median."""
    present = [name for name in series if any(name in group for group in strips.values())]
    lanes = max(2, len(present))
    figure, axes = plots.blank(theme, WIDTH, 1.6 + 0.09 * (lanes + 1) * len(strips))
    for name in present:
        shift = (present.index(name) - (len(present) - 1) / 2) / (lanes + 1)
        xs = [(x, y + shift) for y, group in enumerate(strips.values()) for x in group.get(name, [])]
        axes.plot(*zip(*xs), **look(theme, series[name]), label=series[name].label)
        several = [(group[name], y + shift) for y, group in enumerate(strips.values()) if len(group.get(name, ())) > 2]
        medians = [(statistics.median(values), y) for values, y in several]
        axes.plot([x for x, _ in medians], [y for _, y in medians], ls="", marker="|", ms=9, mew=2, color=theme.ink)
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
    """Return the arguments of `Axes.plot` for the markers of a series, without a line."""
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
    """Return the name of a plot's file: <slug>-<name>-<theme>.<kind>."""
    return f"{slug}-{name}-{theme.name}.{plot.kind}"


def draw_all(by_name: Mapping[str, Plot], slug: str) -> dict[str, bytes]:
    """Return the files of the plots by name, for light and for dark pages."""
    return {
        file_name(slug, name, theme, plot): plot.draw(theme)
        for name, plot in by_name.items()
        for theme in (plots.LIGHT, plots.DARK)
    }
