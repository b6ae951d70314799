"""Make a report with tables and plots from results: `python -m bench.report RESULTS.json [MORE.json ...] --out DIR`.

RESULTS.json is a file of `pytest bench --benchmark --benchmark-json=FILE` or of gpu.py. Several files are merged if
they have the same machine, versions and user's table. If two files have the same row, the later one counts, and the
report has the number of replaced rows. Files that differ, or whose times are distorted by a debug switch, are refused.

DIR then has <gpu>.md, with every cell of the grid, measured or not, and its plots, for light and for dark pages. All
files are written together at the end.

The same command makes the report of a file of published readings (see readings.py and published.py). For such files,
`--table` instead of `--out DIR` prints the README's block: the figure of the first, the table of the last.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import goals, published
from bench.copies import WAYS
from bench.figures import Plot, draw_all, file_name
from bench.markdown import folded, number, picture, table
from bench.problem import COPIED_PHASES, FRESH_PHASES, GRID, Cell
from bench.report_plots import COPYING, LABELS, make_plots
from bench.results import (
    COPIES,
    NETWORKS,
    Results,
    UnfitError,
    groups,
    is_meant,
    load,
    merge,
    read,
    speedup,
)
from bench.rows import CallRow, CopyRow, FailedRow, FreshRow, NetworkRow, TimedRow, TinycudannRow
from mlp_fused import plots
from mlp_fused.errors import count
from mlp_fused.files import write_all
from mlp_fused.kernels.devices import device_slug

NOT_MEASURED = "not measured"
NOT_MEANT = "-"  # the cell is not compared with this baseline

# Numbers


def speed(row: TimedRow, cell: Cell, name: str, device: str) -> str:
    """Return a baseline's time / ours, or the reason why there is none."""
    if name in row.failures:
        return "failed"
    if (value := speedup(row, cell, name)) is not None:
        return f"{number(value)}x"
    return NOT_MEASURED if is_meant(name, cell, device) else NOT_MEANT


def noise(row: TimedRow) -> str:
    """Return the relative difference of our times before and after the baselines."""
    ms, repeat_ms = row.ours.timing.ms, row.repeat_ms
    return NOT_MEASURED if repeat_ms is None else f"{abs(repeat_ms - ms) / ms:.0%}"


def spread(values: Sequence[float], unit: str = "x") -> str:
    """Return the median, with the minimum and the maximum."""
    if not values:
        return NOT_MEASURED
    median = f"{number(statistics.median(values))}{unit}"
    return median if len(values) == 1 else f"{median} ({number(min(values))} to {number(max(values))})"


# The Markdown


def markdown(results: Results, by_name: dict[str, Plot], slug: str) -> str:
    """Return the report. `by_name` has its plots by name; the names of their files begin with `slug`."""

    def plot(name: str) -> Iterator[str]:
        if name in by_name:
            light, dark = (file_name(slug, name, theme, by_name[name]) for theme in (plots.LIGHT, plots.DARK))
            yield picture(light, dark, by_name[name].alt)
            yield ""

    lines = [f"# Measured on {results.name}", ""]
    lines += _provenance(results)
    lines += ["## Summary", "", *_summary(results)]
    lines += ["```text", *goals.report(results.rows.values()), "```", ""]
    lines += ["## Copies and kernels", "", *plot("copy"), *_copies(results), *plot("throughput")]
    lines += [*_throughput(results), *_fresh(results)]
    lines += ["## Speed against each baseline", ""]
    lines += ["A baseline's time / ours: above 1, ours is faster.", "", *plot("speed"), *plot("products")]
    for family in (*NETWORKS, "gemm"):
        lines += _speeds(results, family)
    lines += [*_tinycudann(results), *_calls(results)]
    lines += ["## Distance from the floor", ""]
    lines += ["Device time / max(FLOPs / peak, bytes / bandwidth); both rates are measured in the same process.", ""]
    lines += [*plot("floor"), *_floors(results)]
    lines += ["## Memory saved for backward", "", *plot("memory"), *_memory(results)]
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
            ("the user's own table of tiles", machine["user_table"] or "none"),
            ("CPU", machine["cpu"]),
            ("date", first if first == last else f"{first} to {last}"),
            ("files", ", ".join(results.names)),
        ),
    )
    for name, rows in results.replaced.items():
        yield f"{count(rows, 'row', ',')} of {name} {'were' if rows > 1 else 'was'} measured again later."
        yield ""


def _summary(results: Results) -> Iterator[str]:
    """Yield a table with a line for each family and phase: medians, with minimum and maximum."""

    def lines() -> Iterator[tuple[str, ...]]:
        for (family, phase), cells in groups((*NETWORKS, "gemm")).items():
            good = results.measured(cells, TimedRow)
            failed = sum(results.row(cell) is not None for cell in cells) - len(good)
            yield (
                f"{family} {phase}",
                f"{len(good)} of {len(cells)}" + f", {failed} failed" * bool(failed),
                *(_speed_spread(good, name, cells, results.device) for name in LABELS),
                spread([row.ours.floor.ratio for _, row in good]),
            )

    yield from table(("", "measured", *LABELS.values(), "time / floor"), lines())


def _speed_spread(good: Sequence[tuple[Cell, TimedRow]], name: str, cells: Sequence[Cell], device: str) -> str:
    if not any(is_meant(name, cell, device) for cell in cells):
        return NOT_MEANT
    return spread([value for cell, row in good if (value := speedup(row, cell, name)) is not None])


def _cells(
    results: Results,
    cells: Sequence[Cell],
    title: str,
    header: Sequence[str],
    figures: Callable[[Cell, Any], list[str]],
) -> Iterator[str]:
    """Yield a folded table with a line for each cell, or one sentence if none was measured."""
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
            elif isinstance(row, FailedRow):
                yield name, f"failed: {row.error}", *[""] * (len(header) - 1)
            else:
                yield name, *figures(cell, row)

    yield from folded(title, table(("", *header), lines()))


def _speeds(results: Results, family: str) -> Iterator[str]:
    cells = [cell for cell in GRID if cell.family == family]
    names = [name for name in LABELS if any(is_meant(name, cell, results.device) for cell in cells)]

    def figures(cell: Cell, row: TimedRow) -> list[str]:
        return [
            row.how,
            number(row.ours.timing.ms),
            number(row.ours.timing.kernel_ms),
            *(speed(row, cell, name, results.device) for name in names),
            noise(row),
        ]

    header = ("path or tile", "ms", "device ms", *(LABELS[name] for name in names), "noise")
    yield from _cells(results, cells, family, header, figures)


def _floors(results: Results) -> Iterator[str]:
    def figures(cell: Cell, row: TimedRow) -> list[str]:
        floor = row.ours.floor
        return [
            number(1e3 * floor.seconds),
            number(row.ours.timing.kernel_ms),
            f"{number(floor.ratio)}x",
            floor.bound,
            number(floor.tflops),
            number(floor.gbps),
        ]

    header = ("floor, ms", "device, ms", "device / floor", "bound by", "TFLOP/s", "GB/s")
    for family in (*NETWORKS, "gemm"):
        yield from _cells(results, [cell for cell in GRID if cell.family == family], family, header, figures)


def _memory(results: Results) -> Iterator[str]:
    def figures(cell: Cell, row: NetworkRow) -> list[str]:
        memory = row.memory
        if memory is None:
            return [NOT_MEASURED] * len(header)
        saved = (side.kept_bytes / 2**20 for side in (memory.ours, memory.eager))
        return [*map(number, saved), f"{memory.kept_ratio:.2f}", f"{memory.peak_ratio:.2f}"]

    header = ("ours saved, MiB", "eager saved, MiB", "saved, ours / eager", "peak, ours / eager")
    yield "Saved is the memory allocated between forward and backward, including the output. The peak is over both."
    yield ""
    for family in NETWORKS:
        if cells := [cell for cell in GRID if cell.family == family and cell.phase == "training"]:
            yield from _cells(results, cells, family, header, figures)


def _copies(results: Results) -> Iterator[str]:
    def figures(cell: Cell, row: CopyRow) -> list[str]:
        copied = (row.copies[kind] for kind in ("pageable", "pinned", "pinned_side_stream"))
        pinned = row.copies["pinned_side_stream"]
        return [
            number(1e-6 * pinned.nbytes),
            *(f"{number(copy.ms)} ({number(copy.gbps)})" for copy in copied),
            f"{1e9 * pinned.gbps / row.link.to_device:.0%}",
            *(f"{number(pinned.ms / row.phases[phase].timing.kernel_ms)}x" for phase in COPIED_PHASES),
        ]

    header = ["MB", "pageable, ms (GB/s)", "pinned", "pinned, side stream", "of the link"]
    header += [f"copy / kernels of {phase}" for phase in COPIED_PHASES]
    yield from _cells(results, COPIES, "Copies of the inputs, and their time / the kernels' time", header, figures)


def _throughput(results: Results) -> Iterator[str]:
    def figures(cell: Cell, row: CopyRow) -> list[str]:
        loop = row.throughput
        rates = [number(loop.ways[way].examples_per_s) for way in WAYS]
        shares = [f"{loop.ways[way].bound_share:.0%}" for way in COPYING]
        cpu = NOT_MEANT if loop.cpu_ms is None else number(loop.cpu_ms)
        advised = {"cpu": "the CPU", **WAYS}[loop.advised]
        parts = [number(loop.copy_ms), number(loop.compute_ms), *shares, cpu]
        return [*rates, *parts, advised, f"{number(loop.over_fastest)}x"]

    header = [f"{label}, examples/s" for label in WAYS.values()] + ["copy, ms", "compute, ms"]
    header += [f"{WAYS[way]}, of the bound" for way in COPYING]
    header += ["on the CPU, ms", "advised", "advised / fastest"]
    title = "Forward and backward on batches from the host; the bound is max(copy, compute)"
    yield from _cells(results, COPIES, title, header, figures)


def _fresh(results: Results) -> Iterator[str]:
    """Yield tables of first touch, lecture and warmup: milliseconds of first and second calls."""
    for cell in GRID:
        if cell.phase not in FRESH_PHASES:
            continue
        rows = {device: results.rows.get((str(cell), device)) for device in cell.devices}
        good = {device: row for device, row in rows.items() if isinstance(row, FreshRow)}
        title = {
            "lecture": f"The lecture's product, {cell.problem.rows} x {cell.problem.rows}",
            "first_touch": f"First touch, `{cell.problem}`",
            "warmup": f"`model.warmup`, `{cell.problem}`",
        }[cell.phase]
        if not good:
            failed = any(row is not None for row in rows.values())
            yield f"{title}: {'failed' if failed else NOT_MEASURED}."
            yield ""
            continue
        states: dict[str, dict[str, float]] = {}
        for row in reversed(good.values()):  # the GPU's row last, because it also has the CPU's product
            for state, seconds in row.seconds.items():
                states[state] = seconds | states.get(state, {}) if cell.phase == "lecture" else seconds
        yield f"### {title}"
        yield ""
        for state, seconds in states.items():
            if state != "any":
                yield f"Triton's cache {'empty' if state == 'cold' else 'filled'}:"
                yield ""
            names = [name for name in seconds if not name.endswith("_2")]
            labels = LECTURE if cell.phase == "lecture" else {}
            lines = (
                (
                    labels.get(name, name),
                    number(1e3 * seconds[name]),
                    number(1e3 * seconds[f"{name}_2"]) if f"{name}_2" in seconds else "",
                )
                for name in names
            )
            yield from table(("", "first time, ms", "second time, ms"), lines)
        if cell.phase == "lecture":
            yield from _explain_lecture(states["any"])


# The names of the times of fresh.py's lecture.
LECTURE = {
    "cpu_product": "product on the CPU",
    "copy": "copy of both operands to the GPU; the first one includes creating the context",
    "product_returned": "product on the GPU, by the host's clock without synchronization",
    "product": "product on the GPU, by the host's clock with synchronization",
    "product_device": "product on the GPU, between events on the device",
}


def _explain_lecture(seconds: dict[str, float]) -> Iterator[str]:
    """Yield an explanation why a clock without synchronization shows 0.00 s."""
    if "product_returned_2" in seconds:
        returned, done = seconds["product_returned_2"], seconds["product_2"]
        yield (
            f"Without synchronization, the host's clock shows {returned:.2f} s for the second product, because the "
            f"call returns after {1e6 * returned:,.0f} µs. The product is done after {done:.4f} s, "
            f"{number(done / returned)} times as long."
        )
        if "cpu_product_2" in seconds:
            gpu = seconds["copy_2"] + done
            yield f"The CPU takes {seconds['cpu_product_2']:.4f} s; copies and product on the GPU take {gpu:.4f} s."
        yield ""


def _tinycudann(results: Results) -> Iterator[str]:
    rows = [row for row in results.rows.values() if isinstance(row, TinycudannRow)]
    if not rows:
        yield f"tiny-cuda-nn: {NOT_MEASURED}."
        yield ""
        return
    lines = (
        (
            f"`{row.id.removeprefix('tinycudann-')}`",
            *(number(ms) for side in (row.ours, row.tinycudann) for ms in (side.timing.ms, side.timing.kernel_ms)),
            f"{number(row.speedup)}x",
            f"{number(row.kernel_speedup)}x",
        )
        for row in rows
    )
    header = (
        *("", "ours, ms", "ours, device ms", "tiny-cuda-nn, ms", "tiny-cuda-nn, device ms"),
        *("tiny-cuda-nn / ours", "tiny-cuda-nn / ours, device"),
    )
    yield from folded("tiny-cuda-nn", table(header, lines))


def _calls(results: Results) -> Iterator[str]:
    rows = [row for row in results.rows.values() if isinstance(row, CallRow)]
    if not rows:
        yield f"Python overhead of a call: {NOT_MEASURED}."
        yield ""
        return
    lines = ((f"`{row.id.removeprefix('call-')}`", number(row.us), number(row.eager_us)) for row in rows)
    yield from folded("Python overhead of a call", table(("", "ours, µs", "eager with width 1, µs"), lines))


# Writing


def report_files(results: Results) -> dict[str, bytes]:
    """Return the content of the report and of its plots, by file name."""
    slug = device_slug(results.name)
    by_name = make_plots(results)
    return {**draw_all(by_name, slug), f"{slug}.md": markdown(results, by_name, slug).encode()}


def readings_in(paths: Sequence[Path]) -> dict[str, Any] | None:
    """Return the content of a file of published readings; None if the files are results of the benches.

    Raises:
        UnfitError: one of several files has published readings, or a file cannot be read.
    """
    for path in paths:
        content: dict[str, Any] = load(path)
        if published.is_published(content):
            if len(paths) > 1:
                raise UnfitError(
                    f"{path} has published readings, which cannot be merged with other files: make a report of each"
                )
            return content
    return None


def table_readings(path: Path) -> dict[str, Any]:
    """Return the content of a file of published readings.

    Raises:
        UnfitError: the file has no published readings, or cannot be read.
    """
    content: dict[str, Any] = load(path)
    if not published.is_published(content):
        raise UnfitError(f"{path} has no published readings, which --table needs")
    return content


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="make tables and plots of measured results")
    parser.add_argument(
        "results", type=Path, nargs="+", metavar="RESULTS.json", help="results of one machine and one set of versions"
    )
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--out", type=Path, metavar="DIR", help="folder for the report and its plots")
    output.add_argument("--table", action="store_true", help="print the README's block, of files of published readings")
    options = parser.parse_args(arguments)
    try:
        if options.table:
            print(published.readme([table_readings(path) for path in options.results]), end="")
        else:
            write_report(options.results, readings_in(options.results), options.out)
    except UnfitError as error:
        print(f"nothing was written: {error}", file=sys.stderr)
        return 2
    return 0


def write_report(paths: Sequence[Path], readings: dict[str, Any] | None, folder: Path) -> None:
    """Write the report of published readings, or of the results in several files, to a folder.

    Raises:
        UnfitError: the results cannot be used, matplotlib is missing, or the folder cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnfitError(
            'plots need matplotlib, which is not installed; install it (pip install "mlp_fused[plot]")'
        ) from None
    if readings is not None:
        files, lines = published.report_files(readings), [f"{len(readings['networks'])} networks"]
    else:
        results = merge([read(path) for path in paths])
        files = report_files(results)
        lines = [f"{count} rows of {name} were replaced by later ones" for name, count in results.replaced.items()]
        lines.append(f"{len(results.rows)} rows")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_all({folder / name: content for name, content in files.items()})
    except OSError as error:
        raise UnfitError(f"cannot write into {folder}: {error.strerror}") from None
    lines[-1] += f", {len(files) - 1} plots: {folder / list(files)[-1]}"
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
