"""From results to the tables and plots of a README: `python -m bench.report RESULTS.json [MORE.json ...] --out DIR`.

RESULTS.json is what `pytest bench --benchmark --benchmark-json=FILE` or gpu.py wrote. Several files of one machine, one
set of versions and one user's table are merged, by their dates: of two rows of the same thing the later one counts, and
the report says how many were replaced. Files that do not belong together, or whose times a debugging switch distorts,
are refused in one sentence.

DIR then holds <gpu>.md, every cell of the grid in it, measured or not, and its plots, each for light and for dark
pages. They are written when all of them are there.

The report of a file of published readings (see readings.py) is made by published.py, by the same command. In the place
of `--out DIR`, `--table` prints the README's block of such a file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import goals, published
from bench.figures import Plot, Series, Strips, drawn, file_name, scatter, strip
from bench.gpu import SAME, SCHEMA
from bench.markdown import digits, folded, picture, table
from bench.measure import BASELINES, GEMM_BASELINES, WAYS
from bench.problem import COPIED_PHASES, FAMILIES, FRESH_PHASES, GEMM_PHASES, GRID, PHASES, Cell
from mlp_fused import plots
from mlp_fused.kernels.configs import device_slug

Row = dict[str, Any]

ONE_MACHINE = (*SAME, "cpu")
NOT_MEASURED = "not measured"
NOT_MEANT = "-"  # a baseline that a cell is not compared with
NETWORKS = tuple(family for family in FAMILIES if family not in ("gemm", "warmup", "copy"))


class UnfitError(ValueError):
    """Files of which no report can be made; its text says why, in a sentence."""


@dataclass(frozen=True)
class Results:
    """What one or more files of one machine hold.

    Attributes:
        machine: as machine.py has it.
        dates: when each file was written, ISO 8601.
        names: the files', in the order of their dates.
        rows: by id and device, as measure.py has them.
        replaced: how many rows of each file a later file has again.
    """

    machine: dict[str, Any]
    dates: tuple[str, ...]
    names: tuple[str, ...]
    rows: dict[tuple[str, str], Row]
    replaced: dict[str, int] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """What the report is about: "cuda" where there is a GPU."""
        return "cpu" if self.machine["gpu"] is None else "cuda"

    @property
    def name(self) -> str:
        return self.machine["gpu"] or self.machine["cpu"]

    def row(self, cell: Cell) -> Row | None:
        return self.rows.get((str(cell), self.device))

    def measured(self, cells: Iterable[Cell]) -> list[tuple[Cell, Row]]:
        """Those of the cells that have a row which did not fail, with it."""
        found = [(cell, self.row(cell)) for cell in cells]
        return [(cell, row) for cell, row in found if row is not None and "error" not in row]


# Reading


def load(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UnfitError: it cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UnfitError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UnfitError(f"{path} is not JSON; it needs to be what --benchmark-json or bench/gpu.py wrote") from None


def read(path: Path) -> Results:
    """The results in a file.

    Raises:
        UnfitError: it cannot be read, is none of ours, holds no row, or is distorted.
    """
    content = load(path)
    try:
        if "benchmarks" in content:
            machine, date = content["machine_info"], content["datetime"]
            rows = [each["extra_info"] for each in content["benchmarks"]]
        else:
            machine, date, rows = content["machine"], content["updated"], list(content["rows"].values())
            if content["schema"] != SCHEMA:
                raise UnfitError(f"{path} is of schema {content['schema']}; this report reads {SCHEMA}: measure anew")
        rows = [row for row in rows if "id" in row]
        missing = [name for name in (*ONE_MACHINE, "distorted") if name not in machine]
    except (KeyError, TypeError, AttributeError):
        raise UnfitError(f"{path} holds no results of --benchmark-json or bench/gpu.py") from None
    if missing:
        raise UnfitError(f"{path} does not say what it was measured on ({', '.join(missing)}): measure anew")
    if machine["distorted"] is not None:
        raise UnfitError(f"{path} was measured in vain: {machine['distorted']}")
    if not rows:
        raise UnfitError(f"{path} holds no row that was measured")
    return Results(machine, (date,), (path.name,), {(row["id"], row.get("device", "cuda")): row for row in rows})


def merge(several: Sequence[Results]) -> Results:
    """The rows of some files, those of a later one in place of an earlier one's.

    Raises:
        UnfitError: they are of more than one machine, set of versions or user's table.
    """
    first, *others = sorted(several, key=lambda results: results.dates)
    rows = dict(first.rows)
    replaced: dict[str, int] = {}
    owner = dict.fromkeys(rows, first.names[0])
    for other in others:
        differs = [name for name in ONE_MACHINE if other.machine[name] != first.machine[name]]
        if differs:
            values = (f"{name} {other.machine[name]} instead of {first.machine[name]}" for name in differs)
            raise UnfitError(
                f"{other.names[0]} and {first.names[0]} do not mix ({'; '.join(values)}): make a report of each"
            )
        for key, row in other.rows.items():
            if key in rows:
                replaced[owner[key]] = replaced.get(owner[key], 0) + 1
            rows[key], owner[key] = row, other.names[0]
    dates = tuple(date for results in (first, *others) for date in results.dates)
    names = tuple(name for results in (first, *others) for name in results.names)
    return Results(first.machine, dates, names, rows, replaced)


# Numbers


def is_meant(name: str, cell: Cell, device: str) -> bool:
    """Whether a cell is compared with a baseline."""
    if cell.phase in GEMM_PHASES:
        return name in GEMM_BASELINES
    return any(each.name == name and each.applies(cell, device) for each in BASELINES)


def ratio(cell: Cell) -> str:
    """Which of a baseline's figures is told: of a kernel by itself the device's time, else that of a call."""
    return "kernel_speedup" if cell.phase in GEMM_PHASES else "speedup"


def speed(row: Row, cell: Cell, name: str, device: str) -> str:
    """A baseline's time over ours, or why there is none."""
    found = row["baselines"].get(name)
    if found is None:
        return NOT_MEASURED if is_meant(name, cell, device) else NOT_MEANT
    return "failed" if "error" in found else f"{digits(found[ratio(cell)])}x"


def noise(row: Row) -> str:
    return f"{abs(row['repeat_ms'] - row['ms']) / row['ms']:.0%}"


def spread(values: Sequence[float], unit: str = "x") -> str:
    """The median, and the smallest to the largest."""
    if not values:
        return NOT_MEASURED
    middle = f"{digits(statistics.median(values))}{unit}"
    return middle if len(values) == 1 else f"{middle} ({digits(min(values))} to {digits(max(values))})"


# The Markdown


def markdown(results: Results, shown: dict[str, Plot], slug: str) -> str:
    """The report; `shown` are its plots by name, whose files begin with `slug`."""

    def plot(name: str) -> Iterator[str]:
        if name in shown:
            light, dark = (file_name(slug, name, theme, shown[name]) for theme in (plots.LIGHT, plots.DARK))
            yield picture(light, dark, shown[name].alt)
            yield ""

    lines = [f"# Measured on {results.name}", ""]
    lines += _provenance(results)
    lines += ["## Summary", "", *_summary(results)]
    lines += ["```text", *goals.report(results.rows.values()), "```", ""]
    lines += ["## Copy against kernel", "", *plot("copy"), *_copies(results), *plot("throughput")]
    lines += [*_throughput(results), *_fresh(results)]
    lines += ["## Speed against each baseline", ""]
    lines += ["A baseline's time over ours: above 1 we are faster.", "", *plot("speed"), *plot("products")]
    for family in (*NETWORKS, "gemm"):
        lines += _speeds(results, family)
    lines += [*_tinycudann(results), *_calls(results)]
    lines += ["## Distance from the floor", ""]
    lines += ["The device's time over max(FLOPs / peak, bytes / bandwidth), both measured in the same process.", ""]
    lines += [*plot("floor"), *_floors(results)]
    lines += ["## Memory kept for backward", "", *plot("memory"), *_memory(results)]
    return "\n".join(lines).rstrip() + "\n"


def _provenance(results: Results) -> Iterator[str]:
    machine = results.machine
    first, last = (date[:10] for date in (results.dates[0], results.dates[-1]))
    yield from table(
        ("", ""),
        (
            ("GPU", machine["gpu"] or "none"),
            ("driver", machine["driver"] or "none"),
            ("CUDA", machine["cuda"] or "none"),
            ("torch", machine["torch"]),
            ("Triton", machine["triton"] or "none"),
            ("Python", machine["python"]),
            ("mlp_fused", f"{machine['mlp_fused']}, sources {machine['source']}"),
            ("measured tiles of the user's own", machine["user_table"] or "none"),
            ("CPU", machine["cpu"]),
            ("date", first if first == last else f"{first} to {last}"),
            ("made of", ", ".join(results.names)),
        ),
    )
    for name, count in results.replaced.items():
        yield f"{count} row{'s' * (count > 1)} of {name} {'were' if count > 1 else 'was'} measured again later."
        yield ""


def _summary(results: Results) -> Iterator[str]:
    """A line for each family and phase: medians, and the smallest to the largest."""

    def lines() -> Iterator[tuple[str, ...]]:
        for (family, phase), cells in groups((*NETWORKS, "gemm")).items():
            good = results.measured(cells)
            failed = sum(results.row(cell) is not None for cell in cells) - len(good)
            yield (
                f"{family} {phase}",
                f"{len(good)} of {len(cells)}" + f", {failed} failed" * bool(failed),
                *(_speed_spread(good, name, cells, results.device) for name in LABELS),
                spread([row["floor_ratio"] for _, row in good]),
            )

    yield from table(("", "measured", *LABELS.values(), "time over the floor"), lines())


def _speed_spread(good: Sequence[tuple[Cell, Row]], name: str, cells: Sequence[Cell], device: str) -> str:
    if not any(is_meant(name, cell, device) for cell in cells):
        return NOT_MEANT
    return spread([value for cell, row in good if (value := speedup(row, cell, name)) is not None])


def speedup(row: Row, cell: Cell, name: str) -> float | None:
    return row["baselines"].get(name, {}).get(ratio(cell))


def groups(families: Sequence[str]) -> dict[tuple[str, str], list[Cell]]:
    """The grid's cells by family and phase, in the order of both."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in GRID:
        if cell.family in families:
            found.setdefault((cell.family, cell.phase), []).append(cell)
    return dict(sorted(found.items(), key=lambda each: (FAMILIES.index(each[0][0]), PHASES.index(each[0][1]))))


def _cells(
    results: Results,
    cells: Sequence[Cell],
    title: str,
    header: Sequence[str],
    figures: Callable[[Cell, Row], list[str]],
) -> Iterator[str]:
    """A folded table with a line for each cell; one sentence where none was measured."""
    if all(results.row(cell) is None for cell in cells):
        yield f"{title}: {NOT_MEASURED} ({len(cells)} rows)."
        yield ""
        return

    def lines() -> Iterator[Sequence[str]]:
        for cell in cells:
            row = results.row(cell)
            name = f"`{str(cell).removeprefix(f'{cell.family}-')}`"
            if row is None:
                yield name, *[NOT_MEASURED] * len(header)
            elif "error" in row:
                yield name, f"failed: {row['error']}", *[""] * (len(header) - 1)
            else:
                yield name, *figures(cell, row)

    yield from folded(title, table(("", *header), lines()))


def _speeds(results: Results, family: str) -> Iterator[str]:
    cells = [cell for cell in GRID if cell.family == family]
    names = [name for name in LABELS if any(is_meant(name, cell, results.device) for cell in cells)]

    def figures(cell: Cell, row: Row) -> list[str]:
        return [
            row.get("path") or row["tile"],
            digits(row["ms"]),
            digits(row["kernel_ms"]),
            *(speed(row, cell, name, results.device) for name in names),
            noise(row),
        ]

    header = ("path or tile", "ms", "of it device", *(LABELS[name] for name in names), "noise")
    yield from _cells(results, cells, family, header, figures)


def _floors(results: Results) -> Iterator[str]:
    def figures(cell: Cell, row: Row) -> list[str]:
        return [
            digits(1e3 * row["floor_s"]),
            digits(row["kernel_ms"]),
            f"{digits(row['floor_ratio'])}x",
            row["bound"],
            digits(row["tflops"]),
            digits(row["gbps"]),
        ]

    header = ("floor, ms", "device, ms", "over the floor", "bound by", "TFLOP/s", "GB/s")
    for family in (*NETWORKS, "gemm"):
        yield from _cells(results, [cell for cell in GRID if cell.family == family], family, header, figures)


def _memory(results: Results) -> Iterator[str]:
    def figures(cell: Cell, row: Row) -> list[str]:
        found = row.get("memory")
        if found is None:
            return [NOT_MEASURED] * len(header)
        kept = (found[whose]["kept_bytes"] / 2**20 for whose in ("ours", "eager"))
        return [*map(digits, kept), f"{found['kept_ratio']:.2f}", f"{found['peak_ratio']:.2f}"]

    header = ("ours kept, MiB", "eager's kept, MiB", "kept, ours over eager's", "peak, ours over eager's")
    yield "Between forward and backward, the output included; the peak is that of both."
    yield ""
    for family in NETWORKS:
        if cells := [cell for cell in GRID if cell.family == family and cell.phase == "training"]:
            yield from _cells(results, cells, family, header, figures)


COPIES = [cell for cell in GRID if cell.phase == "copy"]


def _copies(results: Results) -> Iterator[str]:
    def figures(cell: Cell, row: Row) -> list[str]:
        copied = (row["copy"][kind] for kind in ("pageable", "pinned", "pinned_side_stream"))
        pinned = row["copy"]["pinned_side_stream"]
        return [
            digits(1e-6 * nbytes(pinned)),
            *(f"{digits(each['ms'])} ({digits(each['gbps'])})" for each in copied),
            f"{1e9 * pinned['gbps'] / row['link']['to_device']:.0%}",
            *(f"{digits(pinned['ms'] / row['phases'][phase]['kernel_ms'])}x" for phase in COPIED_PHASES),
        ]

    header = ["MB", "pageable, ms (GB/s)", "pinned", "pinned, side stream", "of the link"]
    header += [f"over the {phase}'s kernels" for phase in COPIED_PHASES]
    yield from _cells(results, COPIES, "Each input's copy, and its time over the kernels'", header, figures)


def nbytes(copied: Row) -> float:
    """How many bytes a copy of a row moved."""
    return 1e6 * copied["gbps"] * copied["ms"]


def _throughput(results: Results) -> Iterator[str]:
    def figures(cell: Cell, row: Row) -> list[str]:
        found = row["throughput"]
        rates = [f"{digits(found['ways'][way]['examples_per_s'])}" for way in WAYS]
        shares = [f"{found['ways'][way]['of_bound']:.0%}" for way in COPYING]
        cpu = NOT_MEANT if found["cpu_ms"] is None else digits(found["cpu_ms"])
        advised = {"cpu": "the CPU", **WAYS}[found["advised"]]
        parts = [digits(found["copy_ms"]), digits(found["compute_ms"]), *shares, cpu]
        return [*rates, *parts, advised, f"{digits(found['over_fastest'])}x"]

    header = [f"{label}, examples/s" for label in WAYS.values()] + ["copy, ms", "compute, ms"]
    header += [f"{WAYS[way]}, of the bound" for way in COPYING]
    header += ["on the CPU, ms", "advised", "its time over the fastest's"]
    title = "Forward and backward on batches of the host; the bound is max(copy, compute)"
    yield from _cells(results, COPIES, title, header, figures)


def _fresh(results: Results) -> Iterator[str]:
    """First touch, lecture and warm-up: seconds by name, for the first and for the second time."""
    for cell in GRID:
        if cell.phase not in FRESH_PHASES:
            continue
        found = {device: results.rows.get((str(cell), device)) for device in cell.devices}
        good = {device: row for device, row in found.items() if row is not None and "error" not in row}
        title = {
            "lecture": f"The lecture's product, {cell.problem.rows} x {cell.problem.rows}",
            "first_touch": f"First touch, `{cell.problem}`",
            "warmup": f"`model.warmup`, `{cell.problem}`",
        }[cell.phase]
        if not good:
            failed = any(row is not None for row in found.values())
            yield f"{title}: {'failed' if failed else NOT_MEASURED}."
            yield ""
            continue
        seconds: dict[str, float] = {}
        for row in reversed(good.values()):  # on the GPU last, which has the CPU's product beside it
            seconds = {**row["seconds"], **seconds} if cell.phase == "lecture" else row["seconds"]
        yield f"### {title}"
        yield ""
        parts: dict[str, Any] = {"": seconds} if cell.phase == "lecture" else seconds
        for state, each in parts.items():
            if state:
                yield f"Triton's cache {'empty' if state == 'cold' else 'filled'}:"
                yield ""
            names = [name for name in each if not name.endswith("_2")]
            told = LECTURE if cell.phase == "lecture" else {}
            lines = (
                (told.get(name, name), digits(1e3 * each[name]), digits(1e3 * each[again]) if again in each else "")
                for name, again in ((name, f"{name}_2") for name in names)
            )
            yield from table(("", "first time, ms", "second time, ms"), lines)
        if cell.phase == "lecture":
            yield from _famous(seconds)


# What the clocks of fresh.py's lecture read.
LECTURE = {
    "cpu_product": "product on the CPU",
    "copy": "both operands to the GPU, the first time with the context's creation",
    "product_returned": "product on the GPU, the host's clock, not waiting",
    "product": "product on the GPU, the host's clock, waiting",
    "product_device": "product on the GPU, between events on the device",
}


def _famous(seconds: dict[str, float]) -> Iterator[str]:
    """Why a clock that does not wait reads 0.00 s."""
    if "product_returned_2" in seconds:
        read, done = seconds["product_returned_2"], seconds["product_2"]
        yield (
            f"The second time, a clock that does not wait reads {read:.2f} s: after {1e6 * read:,.0f} µs the host has "
            f"the call back. The product is there after {done:.4f} s, {digits(done / read)} times as long."
        )
        if "cpu_product_2" in seconds:
            moved = seconds["copy_2"] + done
            yield f"The CPU takes {seconds['cpu_product_2']:.4f} s; copies and product on the GPU take {moved:.4f} s."
        yield ""


def _tinycudann(results: Results) -> Iterator[str]:
    rows = [row for row in results.rows.values() if row["id"].startswith("tinycudann-")]
    if not rows:
        yield f"tiny-cuda-nn: {NOT_MEASURED}."
        yield ""
        return
    lines = (
        (
            f"`{row['id'].removeprefix('tinycudann-')}`",
            *(digits(row[whose][name]) for whose in ("ours", "tinycudann") for name in ("ms", "kernel_ms")),
            f"{digits(row['speedup'])}x",
            f"{digits(row['kernel_speedup'])}x",
        )
        for row in rows
    )
    header = ("", "ours, ms", "of it device", "tiny-cuda-nn, ms", "of it device", "its time over ours", "device's")
    yield from folded("tiny-cuda-nn", table(header, lines))


def _calls(results: Results) -> Iterator[str]:
    rows = [row for row in results.rows.values() if row["id"].startswith("call-")]
    if not rows:
        yield f"The Python of a call: {NOT_MEASURED}."
        yield ""
        return
    lines = ((f"`{row['id'].removeprefix('call-')}`", digits(row["us"]), digits(row["eager_us"])) for row in rows)
    yield from folded("The Python of a call", table(("", "ours, µs", "eager's, one wide, µs"), lines))


# The plots


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
    rows = [row for _, row in results.measured(COPIES)]
    points: dict[str, list[tuple[float, float]]] = {
        phase: [
            (1e-6 * nbytes(pinned), pinned["ms"] / row["phases"][phase]["kernel_ms"])
            for row in rows
            for pinned in (row["copy"]["pinned_side_stream"],)
        ]
        for phase in COPIED_PHASES
    }
    if not rows:
        return None
    medians = {phase: statistics.median(y for _, y in each) for phase, each in points.items()}
    told = ", ".join(f"{digits(median)} times the {phase}'s kernels" for phase, median in medians.items())
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
    rows = [row["throughput"] for _, row in results.measured(COPIES)]
    points = {
        way: [(found["compute_ms"] / found["copy_ms"], found["ways"][way]["of_bound"]) for found in rows]
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
        for cell, row in results.measured(cells):
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
        for cell, row in results.measured(cells):
            each.setdefault(cell.problem.dtype, []).append(row["floor_ratio"])
        if each:
            strips[f"{family} {phase.replace('_', ' ')}"] = each
    title = f"Distance from the floor; a point is a cell, a bar the median\n{results.name}"
    return _strip_plot(strips, DTYPES, "device time over the floor (times; 1 is the floor)", title)


def _memory_plot(results: Results) -> Plot | None:
    strips: Strips = {}
    cells = sorted((cell for cell in GRID if cell.family in NETWORKS), key=lambda cell: NETWORKS.index(cell.family))
    for cell, row in results.measured(cells):
        if "memory" in row:
            each = strips.setdefault(f"{cell.family} {cell.problem.activation}", {})
            for name in KEPT:
                each.setdefault(name, []).append(row["memory"][f"{name}_ratio"])
    title = f"Memory of a forward and backward, over eager's; a point is a cell, a bar the median\n{results.name}"
    return _strip_plot(strips, KEPT, "ours over eager's (times; below 1 we keep less)", title, log=False)


def _strip_plot(strips: Strips, series: dict[str, Series], label: str, title: str, log: bool = True) -> Plot | None:
    if not strips:
        return None
    all_of = {name: [value for each in strips.values() for value in each.get(name, [])] for name in series}
    told = ", ".join(f"{series[name].label} {digits(statistics.median(each))}" for name, each in all_of.items() if each)
    what = label.partition(" (")[0]
    alt = f"{what[0].upper()}{what[1:]}, by {', '.join(strips)}; medians of all: {told}"
    return Plot(alt, lambda theme: strip(theme, strips, series, label, title, log))


# Writing


def files_of(results: Results) -> dict[str, bytes]:
    """Contents by name."""
    slug = device_slug(results.name)
    shown = plots_of(results)
    return {**drawn(shown, slug), f"{slug}.md": markdown(results, shown, slug).encode()}


def readings_in(paths: Sequence[Path]) -> dict[str, Any] | None:
    """The content of a file of published readings; None where the files are of the other kind.

    Raises:
        UnfitError: one of several files holds published readings, or one cannot be read.
    """
    for path in paths:
        content = load(path)
        if published.is_published(content):
            if len(paths) > 1:
                raise UnfitError(
                    f"{path} holds published readings, which do not mix with others: make a report of each"
                )
            return content
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="tables and plots of measured results")
    parser.add_argument(
        "results", type=Path, nargs="+", metavar="RESULTS.json", help="of one machine and one set of versions"
    )
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--out", type=Path, metavar="DIR", help="where the report and its plots go")
    wanted.add_argument("--table", action="store_true", help="print the README's block of a file of published readings")
    options = parser.parse_args(arguments)
    try:
        readings = readings_in(options.results)
        if not options.table:
            write_report(options.results, readings, options.out)
        elif readings is not None:
            print(published.readme(readings), end="")
        else:
            raise UnfitError(f"{options.results[0]} holds no published readings, of which the README's block is made")
    except UnfitError as error:
        print(f"nothing was written: {error}", file=sys.stderr)
        return 2
    return 0


def write_report(paths: Sequence[Path], readings: dict[str, Any] | None, folder: Path) -> None:
    """Write the report of published readings, or of the results in some files, into a folder.

    Raises:
        UnfitError: the results do not fit, matplotlib is missing, or the folder cannot be written into.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnfitError('plots need matplotlib, which is not installed: pip install "mlp_fused[plot]"') from None
    if readings is not None:
        files, told = published.files_of(readings), [f"{len(readings['networks'])} networks"]
    else:
        results = merge([read(path) for path in paths])
        try:
            files = files_of(results)
        except KeyError as error:
            raise UnfitError(
                f"a row has no {error}: it is of another state of bench/measure.py than this one; measure anew"
            ) from None
        told = [f"{count} rows of {name} were replaced by later ones" for name, count in results.replaced.items()]
        told.append(f"{len(results.rows)} rows")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plots.write({folder / name: content for name, content in files.items()})
    except OSError as error:
        raise UnfitError(f"{folder} cannot be written into: {error.strerror}") from None
    told[-1] += f", {len(files) - 1} plots: {folder / list(files)[-1]}"
    print("\n".join(told))


if __name__ == "__main__":
    sys.exit(main())
