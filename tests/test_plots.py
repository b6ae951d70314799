"""The common style of plots: ticks of log axes, tested on figures with one line."""

from __future__ import annotations

from typing import Any

import pytest

from mlp_fused import plots

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


def labelled(axis: Any) -> list[str]:
    """The drawn labels of an axis within its limits."""
    axis.figure.draw_without_rendering()
    low, high = sorted(axis.get_view_interval())
    return [
        tick.label1.get_text()
        for tick in axis.get_major_ticks()
        if low <= tick.get_loc() <= high and tick.label1.get_text()
    ]


def line(values: list[float]) -> Any:
    """Axes with a line through the values, in the common style."""
    _, axes = plots.blank(plots.LIGHT, 8, 5)
    axes.plot(values, values, label="a line")
    axes.set(xscale="log", yscale="log")
    return axes


RANGES = [[0.98, 1.02], [0.9, 1.3], [0.35, 1.2], [64, 1024], [0.5, 4.0], [0.01, 90.0], [1e-3, 1e9], [7, 7]]


@pytest.mark.parametrize("values", RANGES, ids=str)
def test_a_log_axis_has_three_labels_or_more(values: list[float]) -> None:
    axes = line(values)
    plots.finish(axes, plots.LIGHT)
    for axis in (axes.xaxis, axes.yaxis):
        labels = labelled(axis)
        assert 3 <= len(labels) <= 12
        assert len(set(labels)) == len(labels)


def test_three_ticks_of_the_caller_are_kept() -> None:
    axes = line([64, 16384])
    axes.set_xticks([64, 1024, 16384])
    axes.set_yticks([64, 16384])
    plots.finish(axes, plots.LIGHT)
    assert labelled(axes.xaxis) == ["64", "1,024", "16,384"]
    assert labelled(axes.yaxis) == ["100", "300", "1,000", "3,000", "10,000"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.15, "0.15"), (2.0, "2"), (64, "64"), (1024, "1,024"), (2**20, "1,048,576"), (1e-3, "0.001")]
)
def test_numbers_on_axes_are_written_out(value: float, text: str) -> None:
    assert plots.number(value) == text
