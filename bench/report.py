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
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import goals, published
from bench.copies import WAYS
from bench.figures import Plot, drawn, file_name
from bench.markdown import folded, number, picture, table
from bench.problem import COPIED_PHASES, FRESH_PHASES, GRID, Cell
from bench.report_plots import COPYING, LABELS, plots_of
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
NOT_MEANT = "-"  # a baseline that a cell is not compared with

# Numbers


def speed(row: TimedRow, cell: Cell, name: str, device: str) -> str:
    """A baseline's time over ours, or why there is none."""
    if name in row.failures:
        return "failed"
    if (value := speedup(row, cell, name)) is not None:
        return f"{number(value)}x"
    return NOT_MEASURED if is_meant(name, cell, device) else NOT_MEANT


def noise(row: TimedRow) -> str:
    """The difference of our time before and after the baselines."""
    ms, again = row.ours.timing.ms, row.repeat_ms
    return NOT_MEASURED if again is None else f"{abs(again - ms) / ms:.0%}"


def spread(values: Sequence[float], unit: str = "x") -> str:
    """The median, and the smallest to the largest."""
    if not values:
        return NOT_MEASURED
    middle = f"{number(statistics.median(values))}{unit}"
    return middle if len(values) == 1 else f"{middle} ({number(min(values))} to {number(max(values))})"


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
    for name, rows in results.replaced.items():
        yield f"{count(rows, 'row', ',')} of {name} {'were' if rows > 1 else 'was'} measured again later."
        yield ""


def _summary(results: Results) -> Iterator[str]:
    """A line for each family and phase: medians, and the smallest to the largest."""

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

    yield from table(("", "measured", *LABELS.values(), "time over the floor"), lines())


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

    header = ("path or tile", "ms", "of it device", *(LABELS[name] for name in names), "noise")
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

    header = ("floor, ms", "device, ms", "over the floor", "bound by", "TFLOP/s", "GB/s")
    for family in (*NETWORKS, "gemm"):
        yield from _cells(results, [cell for cell in GRID if cell.family == family], family, header, figures)


def _memory(results: Results) -> Iterator[str]:
    def figures(cell: Cell, row: NetworkRow) -> list[str]:
        found = row.memory
        if found is None:
            return [NOT_MEASURED] * len(header)
        kept = (side.kept_bytes / 2**20 for side in (found.ours, found.eager))
        return [*map(number, kept), f"{found.kept_ratio:.2f}", f"{found.peak_ratio:.2f}"]

    header = ("ours kept, MiB", "eager's kept, MiB", "kept, ours over eager's", "peak, ours over eager's")
    yield "Between forward and backward, the output included; the peak is that of both."
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
            *(f"{number(each.ms)} ({number(each.gbps)})" for each in copied),
            f"{1e9 * pinned.gbps / row.link.to_device:.0%}",
            *(f"{number(pinned.ms / row.phases[phase].timing.kernel_ms)}x" for phase in COPIED_PHASES),
        ]

    header = ["MB", "pageable, ms (GB/s)", "pinned", "pinned, side stream", "of the link"]
    header += [f"over the {phase}'s kernels" for phase in COPIED_PHASES]
    yield from _cells(results, COPIES, "Each input's copy, and its time over the kernels'", header, figures)


def _throughput(results: Results) -> Iterator[str]:
    def figures(cell: Cell, row: CopyRow) -> list[str]:
        found = row.throughput
        rates = [number(found.ways[way].examples_per_s) for way in WAYS]
        shares = [f"{found.ways[way].of_bound:.0%}" for way in COPYING]
        cpu = NOT_MEANT if found.cpu_ms is None else number(found.cpu_ms)
        advised = {"cpu": "the CPU", **WAYS}[found.advised]
        parts = [number(found.copy_ms), number(found.compute_ms), *shares, cpu]
        return [*rates, *parts, advised, f"{number(found.over_fastest)}x"]

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
        good = {device: row for device, row in found.items() if isinstance(row, FreshRow)}
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
        states: dict[str, dict[str, float]] = {}
        for row in reversed(good.values()):  # on the GPU last, which has the CPU's product beside it
            for state, seconds in row.seconds.items():
                states[state] = seconds | states.get(state, {}) if cell.phase == "lecture" else seconds
        yield f"### {title}"
        yield ""
        for state, each in states.items():
            if state != "any":
                yield f"Triton's cache {'empty' if state == 'cold' else 'filled'}:"
                yield ""
            names = [name for name in each if not name.endswith("_2")]
            told = LECTURE if cell.phase == "lecture" else {}
            lines = (
                (told.get(name, name), number(1e3 * each[name]), number(1e3 * each[again]) if again in each else "")
                for name, again in ((name, f"{name}_2") for name in names)
            )
            yield from table(("", "first time, ms", "second time, ms"), lines)
        if cell.phase == "lecture":
            yield from _famous(states["any"])


# What the clocks of fresh.py's lecture read.
LECTURE = {
    "cpu_product": "product on the CPU",
    "copy": "both operands to the GPU, the first time with the context's creation",
    "product_returned": "product on the GPU, the host's clock, not waiting",
    "product": "product on the GPU, the host's clock, waiting",
    "product_device": "product on the GPU, between events on the device",
}


def _famous(seconds: dict[str, float]) -> Iterator[str]:
    """The explanation of a clock that does not wait and reads 0.00 s."""
    if "product_returned_2" in seconds:
        read, done = seconds["product_returned_2"], seconds["product_2"]
        yield (
            f"The second time, a clock that does not wait reads {read:.2f} s: after {1e6 * read:,.0f} µs the host has "
            f"the call back. The product is there after {done:.4f} s, {number(done / read)} times as long."
        )
        if "cpu_product_2" in seconds:
            moved = seconds["copy_2"] + done
            yield f"The CPU takes {seconds['cpu_product_2']:.4f} s; copies and product on the GPU take {moved:.4f} s."
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
            *(number(ms) for each in (row.ours, row.tinycudann) for ms in (each.timing.ms, each.timing.kernel_ms)),
            f"{number(row.speedup)}x",
            f"{number(row.kernel_speedup)}x",
        )
        for row in rows
    )
    header = ("", "ours, ms", "of it device", "tiny-cuda-nn, ms", "of it device", "its time over ours", "device's")
    yield from folded("tiny-cuda-nn", table(header, lines))


def _calls(results: Results) -> Iterator[str]:
    rows = [row for row in results.rows.values() if isinstance(row, CallRow)]
    if not rows:
        yield f"The Python of a call: {NOT_MEASURED}."
        yield ""
        return
    lines = ((f"`{row.id.removeprefix('call-')}`", number(row.us), number(row.eager_us)) for row in rows)
    yield from folded("The Python of a call", table(("", "ours, µs", "eager's, one wide, µs"), lines))


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
        content: dict[str, Any] = load(path)
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
        files = files_of(results)
        told = [f"{count} rows of {name} were replaced by later ones" for name, count in results.replaced.items()]
        told.append(f"{len(results.rows)} rows")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_all({folder / name: content for name, content in files.items()})
    except OSError as error:
        raise UnfitError(f"{folder} cannot be written into: {error.strerror}") from None
    told[-1] += f", {len(files) - 1} plots: {folder / list(files)[-1]}"
    print("\n".join(told))


if __name__ == "__main__":
    sys.exit(main())
