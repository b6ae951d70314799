"""The figure of a transfer: its axes, lines and file."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from simulated_gpu import SIZES, Speeds, simulate

matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")


@matplotlib
@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "cpu"])
def test_the_plot(tmp_path: Path, suffix: str, gpu: bool) -> None:
    from mlp_fused.transfer.figure import draw

    path = tmp_path / f"plot{suffix}"
    draw(simulate(Speeds(), gpu=gpu), path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    assert len(content) > 5000
    assert list(tmp_path.iterdir()) == [path]


@matplotlib
def test_the_plot_shows_the_readings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from mlp_fused.transfer.figure import draw

    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: figures.append(figure))
    transfer = simulate(Speeds(link=1e18, pageable=1e18, launch=50e-6, latency=0.0, gpu_row=1e-15))
    draw(transfer, tmp_path / "plot.png")
    (axes,) = figures[0].axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlabel() == "batch size (rows)"
    assert axes.get_ylabel() == "time of a step (milliseconds)"
    lines = {line.get_label(): line for line in axes.lines}
    cpu = lines["step on the CPU"]
    assert list(cpu.get_xdata()) == list(SIZES)
    assert list(cpu.get_ydata()) == [point.cpu.step.ms for point in transfer.points]
    drawn = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert len({line.get_marker() for line in drawn}) == len(drawn) == 6
    assert len({line.get_color() for line in drawn}) == 6
    marked = [line.get_xdata()[0] for line in axes.lines if line.get_label().startswith("_")]
    assert marked == [transfer.crossings["step"].rows]
    assert any("the GPU is faster" in text.get_text() for text in axes.texts)


@matplotlib
@pytest.mark.parametrize("points", [slice(1, 4), slice(1, 3), slice(3, 4)], ids=["64-to-1024", "64-to-256", "1024"])
@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "cpu"])
def test_both_axes_of_the_plot_have_three_labels_or_more(points: slice, gpu: bool) -> None:
    from mlp_fused.transfer.figure import step_figure

    transfer = simulate(Speeds(), gpu=gpu)
    figure = step_figure(dataclasses.replace(transfer, points=transfer.points[points]))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        shown = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high and t.label1.get_text()]
        assert len(shown) >= 3


@matplotlib
def test_a_plot_that_fails_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mlp_fused.transfer.figure import draw

    def fail(path: Path, content: bytes) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "plot.png").write_text("old")
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space"):
        draw(simulate(Speeds()), tmp_path / "plot.png")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
