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

# Baselines by name, in the order in which they are told.
SERIES = {
    "eager": Series("torch, eager", "vermilion", "s"),
    "matmul": Series("torch's bare product", "ink", "o"),
    "addmm_activation": Series("torch._addmm_activation", "purple", "v"),
    "cuda_graph": Series("CUDA graph of eager", "blue", "^"),
    "captured": Series("ours, captured", "ink", "<"),
    "captured_eager": Series("torch, captured", "pale", ">"),
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
KEPT = {"kept": Series("kept between forward and backward", "blue", "^"), "peak": Series("peak", "orange", "D")}


def plots_of(results: Results) -> dict[str, Plot]:
    """The plots for which there are rows, by name."""
    found: dict[str, Plot | None] = {
        "copy": _copy_plot(results),
        "throughput": _throughput_plot(results),
        "speed": _speed_plot(results, NETWORKS, "Speed against each baseline", "time of the baseline over ours"),
        "products": _speed_plot(
            results, ("gemm",), "A kernel by itself against torch", "device time of torch's over ours"
        ),
        "floor": _floor_plot(results),
        "memory": _memory_plot(results),
    }
    return {name: plot for name, plot in found.items() if plot is not None}


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
    medians = {phase: statistics.median(y for _, y in each) for phase, each in points.items()}
    told = ", ".join(f"{number(median)} times the {phase}'s kernels" for phase, median in medians.items())
    alt = f"Time of an input's copy from pinned memory over its kernels', against its size: in the median {told}"
    return Plot(
        alt,
        lambda theme: scatter(
            theme,
            points,
            PHASE_SERIES,
            "input (MB)",
            "copy over kernels (times; above 1 it takes longer)",
            f"Copying the input from pinned memory against computing on it\n{results.name}",
        ),
    )


def _throughput_plot(results: Results) -> Plot | None:
    rows = [row.throughput for _, row in results.measured(COPIES, CopyRow)]
    points = {
        way: [(found.compute_ms / found.copy_ms, share) for found in rows if (share := found.ways[way].of_bound)]
        for way in COPYING
    }
    if not rows:
        return None
    told = ", ".join(f"{statistics.median(y for _, y in each):.0%} {WAYS[way]}" for way, each in points.items())
    alt = f"Speed of a training loop fed from the host, as a part of what max(copy, compute) allows: medians {told}"
    return Plot(
        alt,
        lambda theme: scatter(
            theme,
            points,
            WAY_SERIES,
            "compute over copy (times)",
            "bound over time (1: all that could be is hidden)",
            f"A training loop fed from the host; the bound is max(copy, compute)\n{results.name}",
            log_y=False,
        ),
    )


def _speed_plot(results: Results, families: Sequence[str], title: str, label: str) -> Plot | None:
    strips: Strips = {}
    for (family, phase), cells in groups(families).items():
        each: dict[str, list[float]] = {}
        for cell, row in results.measured(cells, TimedRow):
            for name in SERIES:
                if (value := speedup(row, cell, name)) is not None:
                    each.setdefault(name, []).append(value)
        if each:
            strips[f"{family} {phase.replace('_', ' ')}"] = each
    title = f"{title}; a point is a cell, a bar the median\n{results.name}"
    return _strip_plot(strips, SERIES, f"{label} (times; above 1 we are faster)", title)


def _floor_plot(results: Results) -> Plot | None:
    strips: Strips = {}
    for (family, phase), cells in groups((*NETWORKS, "gemm")).items():
        each: dict[str, list[float]] = {}
        for cell, row in results.measured(cells, TimedRow):
            each.setdefault(cell.problem.dtype, []).append(row.ours.floor.ratio)
        if each:
            strips[f"{family} {phase.replace('_', ' ')}"] = each
    title = f"Distance from the floor; a point is a cell, a bar the median\n{results.name}"
    return _strip_plot(strips, DTYPES, "device time over the floor (times; 1 is the floor)", title)


def _memory_plot(results: Results) -> Plot | None:
    strips: Strips = {}
    cells = sorted((cell for cell in GRID if cell.family in NETWORKS), key=lambda cell: NETWORKS.index(cell.family))
    for cell, row in results.measured(cells, NetworkRow):
        if row.memory is not None:
            each = strips.setdefault(f"{cell.family} {cell.problem.activation}", {})
            for name, value in (("kept", row.memory.kept_ratio), ("peak", row.memory.peak_ratio)):
                each.setdefault(name, []).append(value)
    title = f"Memory of a forward and backward, over eager's; a point is a cell, a bar the median\n{results.name}"
    return _strip_plot(strips, KEPT, "ours over eager's (times; below 1 we keep less)", title, log=False)


def _strip_plot(strips: Strips, series: dict[str, Series], label: str, title: str, log: bool = True) -> Plot | None:
    if not strips:
        return None
    all_of = {name: [value for each in strips.values() for value in each.get(name, [])] for name in series}
    told = ", ".join(f"{series[name].label} {number(statistics.median(each))}" for name, each in all_of.items() if each)
    what = label.partition(" (")[0]
    alt = f"{what[0].upper()}{what[1:]}, by {', '.join(strips)}; medians of all: {told}"
    return Plot(alt, lambda theme: strip(theme, strips, series, label, title, log))
