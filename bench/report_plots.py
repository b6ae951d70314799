"""The plots of a report."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.copies import WAYS
from bench.figures import Plot, Series, Strips, scatter, strip
from bench.markdown import number
from bench.problem import COPIED_PHASES, GRID
from bench.results import COPIES, NETWORKS, Results, groups, speedup
from bench.rows import CopyRow, NetworkRow, TimedRow

# The baselines by name, in their order in the report.
SERIES = {
    "eager": Series("eager", "vermilion", "s"),
    "matmul": Series("PyTorch's bare product", "ink", "o"),
    "addmm_activation": Series("torch._addmm_activation", "purple", "v"),
    "cuda_graph": Series("CUDA graph of eager", "blue", "^"),
    "captured": Series("ours, captured", "ink", "<"),
    "captured_eager": Series("eager, captured", "pale", ">"),
    "compile": Series("torch.compile", "green", "P"),
    "compile_max_autotune": Series("torch.compile, max-autotune", "orange", "D"),
}
LABELS = {name: series.label for name, series in SERIES.items()}
DTYPES = {
    "fp32": Series("fp32", "vermilion", "s"),
    "bf16": Series("bf16", "blue", "^"),
    "fp16": Series("fp16", "green", "P"),
}
COPYING = [way for way in WAYS if way != "resident"]
WAY_SERIES = {
    "to_device": Series(WAYS["to_device"], "vermilion", "s"),
    "non_blocking": Series(WAYS["non_blocking"], "blue", "^"),
    "prefetched": Series(WAYS["prefetched"], "orange", "D"),
}
PHASE_SERIES = {
    "forward": Series("forward", "blue", "^"),
    "backward": Series("backward", "green", "P"),
    "step": Series("step", "vermilion", "s"),
}
KEPT = {"kept": Series("saved for backward", "blue", "^"), "peak": Series("peak", "orange", "D")}


def make_plots(results: Results) -> dict[str, Plot]:
    """Return the plots that have rows, by name."""
    plots: dict[str, Plot | None] = {
        "copy": _copy_plot(results),
        "throughput": _throughput_plot(results),
        "speed": _speed_plot(results, NETWORKS, "Speed against each baseline", "baseline's time / ours"),
        "products": _speed_plot(
            results, ("gemm",), "Speed of single kernels against PyTorch", "PyTorch's device time / ours"
        ),
        "floor": _floor_plot(results),
        "memory": _memory_plot(results),
    }
    return {name: plot for name, plot in plots.items() if plot is not None}


def _copy_plot(results: Results) -> Plot | None:
    rows = [row for _, row in results.measured(COPIES, CopyRow)]
    points: dict[str, list[tuple[float, float]]] = {
        phase: [
            (1e-6 * pinned.nbytes, pinned.ms / row.phases[phase].timing.kernel_ms)
            for row in rows
            for pinned in (row.copies["pinned_side_stream"],)
        ]
        for phase in COPIED_PHASES
    }
    if not rows:
        return None
    medians = {phase: statistics.median(y for _, y in values) for phase, values in points.items()}
    numbers = ", ".join(f"{number(median)} times the kernels of {phase}" for phase, median in medians.items())
    alt = f"Time of copying an input from pinned memory / time of its kernels, against its size. Medians: {numbers}"
    return Plot(
        alt,
        lambda theme: scatter(
            theme,
            points,
            PHASE_SERIES,
            "input (MB)",
            "copy / kernels (above 1: the copy takes longer)",
            f"Copying the input from pinned memory and computing on it\n{results.name}",
        ),
    )


def _throughput_plot(results: Results) -> Plot | None:
    rows = [row.throughput for _, row in results.measured(COPIES, CopyRow)]
    points = {
        way: [(loop.compute_ms / loop.copy_ms, share) for loop in rows if (share := loop.ways[way].bound_share)]
        for way in COPYING
    }
    if not rows:
        return None
    medians = ", ".join(f"{statistics.median(y for _, y in values):.0%} {WAYS[way]}" for way, values in points.items())
    alt = f"max(copy, compute) / time of a training loop with batches from the host. Medians: {medians}"
    return Plot(
        alt,
        lambda theme: scatter(
            theme,
            points,
            WAY_SERIES,
            "compute / copy",
            "bound / time (1: perfect overlap)",
            f"A training loop with batches from the host; the bound is max(copy, compute)\n{results.name}",
            log_y=False,
        ),
    )


def _speed_plot(results: Results, families: Sequence[str], title: str, label: str) -> Plot | None:
    strips: Strips = {}
    for (family, phase), cells in groups(families).items():
        values: dict[str, list[float]] = {}
        for cell, row in results.measured(cells, TimedRow):
            for name in SERIES:
                if (value := speedup(row, cell, name)) is not None:
                    values.setdefault(name, []).append(value)
        if values:
            strips[f"{family} {phase.replace('_', ' ')}"] = values
    title = f"{title}; a point is a cell, a bar is the median\n{results.name}"
    return _strip_plot(strips, SERIES, f"{label} (above 1: ours is faster)", title)


def _floor_plot(results: Results) -> Plot | None:
    strips: Strips = {}
    for (family, phase), cells in groups((*NETWORKS, "gemm")).items():
        ratios: dict[str, list[float]] = {}
        for cell, row in results.measured(cells, TimedRow):
            ratios.setdefault(cell.problem.dtype, []).append(row.ours.floor.ratio)
        if ratios:
            strips[f"{family} {phase.replace('_', ' ')}"] = ratios
    title = f"Distance from the floor; a point is a cell, a bar is the median\n{results.name}"
    return _strip_plot(strips, DTYPES, "device time / floor (1 is the floor)", title)


def _memory_plot(results: Results) -> Plot | None:
    strips: Strips = {}
    cells = sorted((cell for cell in GRID if cell.family in NETWORKS), key=lambda cell: NETWORKS.index(cell.family))
    for cell, row in results.measured(cells, NetworkRow):
        if row.memory is not None:
            ratios = strips.setdefault(f"{cell.family} {cell.problem.activation}", {})
            for name, value in (("kept", row.memory.kept_ratio), ("peak", row.memory.peak_ratio)):
                ratios.setdefault(name, []).append(value)
    title = f"Memory of a forward and backward / eager's; a point is a cell, a bar is the median\n{results.name}"
    return _strip_plot(strips, KEPT, "ours / eager's (below 1: ours needs less)", title, log=False)


def _strip_plot(strips: Strips, series: dict[str, Series], label: str, title: str, log: bool = True) -> Plot | None:
    if not strips:
        return None
    pooled = {name: [value for group in strips.values() for value in group.get(name, [])] for name in series}
    medians = ", ".join(
        f"{series[name].label} {number(statistics.median(values))}" for name, values in pooled.items() if values
    )
    quantity = label.partition(" (")[0]
    alt = f"{quantity[0].upper()}{quantity[1:]}, by {', '.join(strips)}. Medians of all: {medians}"
    return Plot(alt, lambda theme: strip(theme, strips, series, label, title, log))
