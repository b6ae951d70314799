"""Make the tables and figures of a file of published readings, for bench/results and the README.

readings.py makes such a file. `throughput`, `step_parts` and `speeds` return the data of the figures, `page` the report
for bench/results, and `readme` the README's block of measured numbers. `python -m bench.report FILE --out DIR` writes
the page and the figures. `python -m bench.report FILE ... --table` prints the block.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.figures import LEGEND, WIDTH, Plot, Series, draw_all, file_name, look
from bench.markdown import NONE, folded, number, picture, table, times
from bench.readings import FORMAT, SYSTEMS, Record
from mlp_fused import plots
from mlp_fused.errors import count
from mlp_fused.kernels.devices import device_slug
from mlp_fused.plots import Theme

ITEMSIZE = {"fp16": 2, "bf16": 2, "fp32": 4}


def is_published(content: Any) -> bool:
    """True if the content of a JSON file is published readings."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def slug(content: Record) -> str:
    """Return the beginning of the names of all files: the GPU and the date."""
    return f"{device_slug(content['origin']['gpu'])}-{content['origin']['date']}"


def report_files(content: Record) -> dict[str, bytes]:
    """Return the page and the figures, by file name."""
    by_name, name = figures(content), slug(content)
    return {**draw_all(by_name, name), f"{name}.md": page(content, by_name, name).encode()}


def figures(content: Record) -> dict[str, Plot]:
    """Return the figures for which there are readings, by name."""
    measured = {"throughput": beside_tinycudann(content), "step": content["transfer"], "speed": beside_eager(content)}
    make = {"throughput": throughput_plot, "step": step_plot, "speed": speed_plot}
    return {name: make[name](content) for name, readings in measured.items() if readings}


# Names and numbers of a network


def shape(network: Record) -> str:
    """Return the layers in words: "64 wide, 4 layers", or the widths if they differ."""
    widths = network["widths"]
    if len(set(widths)) == 1:
        return f"{widths[0]} wide, {len(widths) - 1} layers"
    return "→".join(map(str, widths))


def rows(network: Record) -> str:
    """Return the number of rows in words."""
    return count(network["rows"], "row", ",")


def label(network: Record) -> str:
    """Return a network's layers, activation, dtype and rows in words. The dtype "tf32" is fp32 with tf32 allowed."""
    dtype = "tf32" if network["precision"] == "tf32" else network["dtype"]
    return f"{shape(network)}, {network['activation']}, {dtype}, {rows(network)}"


def milliseconds(network: Record, system: str, clock: str) -> float | None:
    """Return the time of a system by the clock "loop" or "device"; None if it was not measured."""
    reading = network["systems"][system]
    return None if reading is None else reading[f"{clock}_ms"]


def ratio(network: Record, clock: str) -> float | None:
    """Return eager's time / ours; None if one of them was not measured."""
    ours, eager = (milliseconds(network, system, clock) for system in ("ours", "eager"))
    return None if ours is None or eager is None else eager / ours


def beside_eager(content: Record) -> dict[str, dict[str, Record]]:
    """Return the networks in which both our kernels and eager's were timed: name -> phase -> record."""
    networks: dict[str, dict[str, Record]] = {}
    for network in content["networks"]:
        if ratio(network, "device") is not None:
            name = network["id"].removesuffix(f"-{network['phase']}")
            networks.setdefault(name, {})[network["phase"]] = network
    return networks


# Rows per second of narrow networks

THEIRS = tuple(system for system in SYSTEMS if system.startswith("tinycudann"))
FLOOR = (
    "the bytes of a row / the rate of a large copy in the GPU's memory. Inference reads x and writes y. Training reads "
    "x twice, writes y and reads its gradient"
)


@dataclass(frozen=True)
class Throughput:
    """The rows per second of one network in one phase.

    Attributes:
        network: its record without the gradient of x.
        rates: the rows per second of "ours", "eager" and "tinycudann". A name ends in " dx" if the gradient of x is
            also computed.
        floor: the rows per second that the memory allows.
    """

    network: Record
    rates: Mapping[str, float]
    floor: float

    @property
    def over_eager(self) -> float:
        """Our rows per second / eager's."""
        return self.rates["ours"] / self.rates["eager"]

    @property
    def over_tinycudann(self) -> float:
        """Our rows per second / tiny-cuda-nn's; in training, both with the gradient of x."""
        dx = " dx" if "tinycudann dx" in self.rates else ""
        return self.rates[f"ours{dx}"] / self.rates[f"tinycudann{dx}"]


def throughput(content: Record) -> list[Throughput]:
    """Return the throughput of the networks that tiny-cuda-nn also ran, in a loop, with its fastest mode.

    They are sorted by phase (inference first), by rows (many first), and by width (narrow first).
    """
    grouped: dict[tuple[str, int, tuple[int, ...]], list[Record]] = {}
    for network in beside_tinycudann(content):
        grouped.setdefault((network["phase"], -network["rows"], tuple(network["widths"])), []).append(network)
    return [
        Throughput(records[0], _rates(records), 1e3 * records[0]["rows"] / floor_ms(records[0], content))
        for _, records in sorted(grouped.items(), key=lambda item: item[0])
    ]


def beside_tinycudann(content: Record) -> list[Record]:
    """Return the records of the networks that tiny-cuda-nn also ran."""
    return [network for network in content["networks"] if network["id"].startswith("tinycudann-")]


def _rates(networks: Iterable[Record]) -> dict[str, float]:
    rates: dict[str, float] = {}
    for network in networks:
        dx = " dx" if network["input_gradient"] else ""
        for name, systems in {"ours": ("ours",), "eager": ("eager",), "tinycudann": THEIRS}.items():
            times_ms = [ms for system in systems if (ms := milliseconds(network, system, "loop")) is not None]
            if times_ms:
                rates[f"{name}{dx}"] = 1e3 * network["rows"] / min(times_ms)
    return rates


def floor_ms(network: Record, content: Record) -> float:
    """Return the milliseconds of the floor: the bytes of FLOOR, and of writing the gradient of x if it is computed."""
    first, last = network["widths"][0], network["widths"][-1]
    elements = first + last if network["phase"] == "inference" else 2 * (first + last)
    elements += first * bool(network["input_gradient"])
    bytes_per_ms: float = 1e6 * content["ceilings"]["memory_gbps"]
    moved: int = network["rows"] * elements * ITEMSIZE[network["dtype"]]
    return moved / bytes_per_ms


SYSTEM_SERIES = {
    "ours": Series("mlp_fused", "blue", "o"),
    "eager": Series("torch, eager", "vermilion", "s"),
    "tinycudann": Series("tiny-cuda-nn, its fastest mode", "orange", "D"),
}


def throughput_plot(content: Record) -> Plot:
    """Plot the rows per second of narrow networks for ours, eager and tiny-cuda-nn, with the memory floor."""
    entries, gpu = throughput(content), content["origin"]["gpu"]

    def describe(phase: str) -> str:
        return "; ".join(
            f"{shape(entry.network)}, {rows(entry.network)}: {number(1e-9 * entry.rates['ours'])} of at most "
            f"{number(1e-9 * entry.floor)}, {times(entry.over_eager)} eager, "
            f"{times(entry.over_tinycudann)} tiny-cuda-nn"
            for entry in entries
            if entry.network["phase"] == phase
        )

    alt = f"Billions of rows a second of narrow fp16 networks on {gpu}, and how many the memory allows."
    alt = f"{alt} Inference: {describe('inference')}. Training: {describe('training')}."
    return Plot(alt, lambda theme: throughput_figure(theme, entries, gpu), "svg")


def throughput_figure(theme: Theme, entries: list[Throughput], gpu: str) -> Any:
    """Draw a strip for each network, with a lane for each system, the floor, and the ratios on the right."""
    figure, axes = plots.blank(theme, WIDTH, 4.6)
    for lane, (name, series) in enumerate(SYSTEM_SERIES.items()):
        for dx in ("", " dx"):
            points = [
                (1e-9 * entry.rates[name + dx], y + 0.25 * (lane - 1))
                for y, entry in enumerate(entries)
                if name + dx in entry.rates
            ]
            style = look(theme, series) | {"ms": 7}
            if dx:
                style |= {"mfc": "none", "mec": style["color"], "mew": 1.4}
            if points:
                axes.plot(*zip(*points), **style, label=None if dx else series.label)
    hollow = {"ls": "", "marker": "o", "mfc": "none", "mec": theme.ink, "mew": 1.4, "ms": 7}
    axes.plot([], [], **hollow, label="hollow: with the gradient of x")
    for y, entry in enumerate(entries):
        floor = None if y else "memory floor, as rows a second"
        axes.plot([1e-9 * entry.floor] * 2, [y - 0.4, y + 0.4], color=theme.ink, lw=2, label=floor)
        text = f"{times(entry.over_eager)} eager\n{times(entry.over_tinycudann)} tiny-cuda-nn"
        axes.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=theme.ink)
    for y in range(1, len(entries)):
        same = entries[y].network["phase"] == entries[y - 1].network["phase"]
        axes.axhline(y - 0.5, color=theme.grid if same else theme.ink, lw=0.6 if same else 1.2)
    names = [f"{entry.network['phase']}, {rows(entry.network)}\n{shape(entry.network)}" for entry in entries]
    axes.set_yticks(range(len(entries)), names, fontsize=8)
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.set(xscale="log", xlabel="billion rows a second (further right is faster)")
    axes.set_title(f"Narrow networks, fp16, relu, no bias, as a caller waits for them\n{gpu}", fontsize=10)
    plots.finish(axes, theme, **LEGEND)
    axes.grid(False, axis="y")
    return figure


# The parts of one step

WHOLE = {
    "cpu_ms": Series("whole step on the CPU", "ink", "o"),
    "usual_ms": Series("whole step, x.to(device)", "vermilion", "s"),
    "prefetched_ms": Series("whole step, prefetched", "orange", "D"),
}
PARTS = {
    "copy_ms": Series("copy, from pinned memory", "blue", "^"),
    "launch_ms": Series("launches, by the host", "purple", "v"),
    "kernels_ms": Series("kernels", "green", "P"),
}
STEP_SERIES = {**WHOLE, **PARTS}


def step_parts(content: Record) -> dict[str, list[tuple[int, float]]]:
    """Return (batch size, milliseconds) of whole steps and of their parts, by name."""
    return {name: [(step["rows"], step[name]) for step in content["transfer"]["steps"]] for name in STEP_SERIES}


def step_plot(content: Record) -> Plot:
    """Plot the time of a training step and of its parts (copy, launches, kernels) against the batch size."""
    lines, gpu = step_parts(content), content["origin"]["gpu"]
    numbers = "; ".join(
        f"{step['rows']:,} rows: copy {number(step['copy_ms'])}, launches {number(step['launch_ms'])}, kernels "
        f"{number(step['kernels_ms'])}, whole step with x.to(device) {number(step['usual_ms'])}, prefetched "
        f"{number(step['prefetched_ms'])}, on the CPU {number(step['cpu_ms'])}"
        for step in content["transfer"]["steps"]
    )
    alt = f"Milliseconds of a training step and of its parts, by batch size, on {gpu}. {numbers}."
    title = f"A training step and its parts: {content['transfer']['network'].partition(', input')[0]}, fp32\n{gpu}"
    return Plot(alt, lambda theme: step_figure(theme, lines, title), "svg")


def step_figure(theme: Theme, lines: Mapping[str, list[tuple[int, float]]], title: str) -> Any:
    """Draw milliseconds against batch size. Parts are solid lines, whole steps are dotted."""
    figure, axes = plots.blank(theme, WIDTH, 4.8)
    for name, points in lines.items():
        line = {"ls": "-", "lw": 2.2} if name in PARTS else {"ls": ":", "lw": 1.6}
        style = look(theme, STEP_SERIES[name]) | {"ms": 7} | line
        axes.plot(*zip(*points), **style, label=STEP_SERIES[name].label)
    axes.set(xscale="log", yscale="log", xlabel="batch size (rows)", ylabel="time (milliseconds)")
    axes.set_xticks([batch for batch, _ in lines["copy_ms"]])
    axes.set_title(title, fontsize=10)
    plots.finish(axes, theme, **LEGEND)
    return figure


# Speed against eager

PHASE_SERIES = {"inference": Series("inference", "blue", "o"), "training": Series("training", "vermilion", "s")}


def speeds(content: Record) -> list[tuple[str, dict[str, float]]]:
    """Return (network, {phase: kernel time of eager / ours}), sorted by the slower phase, fastest network first."""
    speed: list[tuple[str, dict[str, float]]] = []
    for phases in beside_eager(content).values():
        ratios = {
            "training" if phase == "step" else phase: value
            for phase, network in phases.items()
            if (value := ratio(network, "device")) is not None
        }
        name = label(next(iter(phases.values())))
        speed.append((f"{name}, a step with Adam" if "step" in phases else name, ratios))
    return sorted(speed, key=lambda item: -min(item[1].values()))


def speed_plot(content: Record) -> Plot:
    """Plot the time of eager's kernels / the time of ours, with a line for each network."""
    entries, gpu = speeds(content), content["origin"]["gpu"]
    slower = sum(min(ratios.values()) < 1 for _, ratios in entries)
    ends = {"fastest": entries[0], "slowest": entries[-1]}
    extremes = "; ".join(
        f"{end}: {name}, {', '.join(f'{phase} {times(value)}' for phase, value in ratios.items())}"
        for end, (name, ratios) in ends.items()
    )
    alt = (
        f"Time of eager's kernels / ours for {len(entries)} networks on {gpu}, sorted by the slower of inference and "
        f"training: {len(entries) - slower} are faster than eager in both, {slower} slower in at least one; {extremes}."
    )
    return Plot(alt, lambda theme: speed_figure(theme, entries, gpu), "svg")


def speed_figure(theme: Theme, entries: list[tuple[str, dict[str, float]]], gpu: str) -> Any:
    """Draw a line for each network, with its ratios in inference and in training. A dashed line marks 1."""
    figure, axes = plots.blank(theme, WIDTH, 1.7 + 0.21 * len(entries))
    for y, (_, ratios) in enumerate(entries):
        axes.plot([min(ratios.values()), max(ratios.values())], [y, y], color=theme.grid, lw=2)
    for phase, series in PHASE_SERIES.items():
        points = [(ratios[phase], y) for y, (_, ratios) in enumerate(entries) if phase in ratios]
        axes.plot(*zip(*points), **look(theme, series) | {"ms": 6}, label=series.label)
    axes.axvline(1, color=theme.ink, lw=1.2, ls="--", label="1: as fast as eager")
    axes.set_yticks(range(len(entries)), [name for name, _ in entries], fontsize=8)
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.set(xscale="log", xlabel="time of eager's kernels / ours")
    axes.set_title(f"Our kernels and eager's: above 1, ours are faster\n{gpu}", fontsize=10)
    plots.finish(axes, theme, **LEGEND)
    return figure


# The page for bench/results


def page(content: Record, by_name: Mapping[str, Plot], slug: str) -> str:
    """Return all readings as tables, with the figures. The names of their files begin with `slug`."""

    def plot(name: str) -> Iterator[str]:
        light, dark = (file_name(slug, name, theme, by_name[name]) for theme in (plots.LIGHT, plots.DARK))
        yield picture(light, dark, by_name[name].alt)
        yield ""

    lines = [f"# Measured on {content['origin']['gpu']}", "", *_provenance(content)]
    if "throughput" in by_name:
        lines += ["## Narrow networks", "", *plot("throughput"), *_tinycudann(content)]
    if "step" in by_name:
        lines += ["## A step and its parts", "", *plot("step"), *_transfer(content)]
    lines += ["## Against eager PyTorch", "", *plot("speed"), *_eager(content), *_quack(content)]
    if "float32" in content:
        lines += ["## Full fp32 on tensor cores", "", *_float32(content)]
    if any(network["error_float64"] for network in content["networks"]):
        lines += ["## Errors against float64", "", *_errors(content)]
    return "\n".join(lines).rstrip() + "\n"


def _provenance(content: Record) -> Iterator[str]:
    origin, ceilings = content["origin"], content["ceilings"]
    lines = [
        *((name, origin[name]) for name in ("date", "commit", "changed", "driver") if name in origin),
        *origin["versions"].items(),
        ("a large copy in the GPU's memory, read and written", f"{ceilings['memory_gbps']:,} GB/s"),
    ]
    if "to_device_gbps" in ceilings:
        links = f"{ceilings['to_device_gbps']}, {ceilings['to_host_gbps']} GB/s"
        lines.append(("large pinned copies to the device, to the host", links))
    yield from table(("", ""), lines)
    yield from (f"- {name}: {how}." for name, how in (*origin["timed"].items(), *origin["scripts"].items()))
    yield ""
    yield f"All times are milliseconds; {NONE}: not measured. Training is forward and backward."
    yield ""


def _tinycudann(content: Record) -> Iterator[str]:
    yield f"fp16, relu, no bias, timed in a loop. The memory floor: {FLOOR}, and writes the gradient of x (dx) if any."
    yield ""
    systems = ("ours", "eager", *THEIRS)
    lines = (
        (
            f"{shape(network)}, {rows(network)}, {network['phase']}" + " with dx" * network["input_gradient"],
            number(floor_ms(network, content)),
            *_times(network, systems, "loop"),
        )
        for network in beside_tinycudann(content)
    )
    yield from table(("", "floor", *_headers(systems)), lines)


def _headers(systems: Iterable[str], clock: str = "") -> list[str]:
    return [f"{system.replace('tinycudann', 'tiny-cuda-nn').replace('_', ' ')}{clock}" for system in systems]


def _times(network: Record, systems: Iterable[str], clock: str) -> list[str]:
    return [number(milliseconds(network, system, clock)) for system in systems]


def _transfer(content: Record) -> Iterator[str]:
    transfer = content["transfer"]
    yield f"{transfer['network']}."
    yield ""
    header = ("rows", *(series.label for series in STEP_SERIES.values()), "whole step, data on the GPU")
    columns = (*STEP_SERIES, "resident_ms")
    lines = ((f"{step['rows']:,}", *(number(step[name]) for name in columns)) for step in transfer["steps"])
    yield from table(header, lines)
    clocks = ("device_ms", "host_ms", "returned_ms", "gbps")
    lines = ((part["name"], *(number(part[clock]) for clock in clocks)) for part in transfer["each_time"])
    yield from folded("Each part at the largest batch", table(("", "device", "host", "returned", "GB/s"), lines))
    first = ((name, number(value)) for name, value in transfer["first_touch_ms"].items())
    yield from folded("First touch, in a new process", table(("", "ms"), first))


def _eager(content: Record) -> Iterator[str]:
    both, loops = ("ours", "eager"), ("ours", "eager", "compile", "captured", "captured_eager")
    lines = (
        (
            f"{label(network)}, {phase}",
            network["path"],
            *_times(network, both, "device"),
            times(ratio(network, "device")),
            *_times(network, loops, "loop"),
            times(ratio(network, "loop")),
        )
        for phases in beside_eager(content).values()
        for phase, network in phases.items()
    )
    header = ("", "path", *_headers(both, ", device"), "eager / ours", *_headers(loops, ", loop"), "eager / ours")
    yield from table(header, lines)


def _quack(content: Record) -> Iterator[str]:
    if "quack" not in content["origin"]["versions"]:
        return
    yield f"Against quack {content['origin']['versions']['quack']}: gelu_tanh, no bias, timed in a loop, in two runs."
    yield ""
    systems = ("ours", "eager", "quack", "quack_tuned")
    lines = (
        (f"{shape(network)}, {rows(network)}, {network['phase']}", *_times(network, systems, "loop"))
        for network in content["networks"]
        if network["id"].startswith("quack")
    )
    yield from table(("", *_headers(systems)), lines)


def _float32(content: Record) -> Iterator[str]:
    yield (
        "fp16x3, beside torch in full fp32. Errors are relative, against float64. They are the errors of y. Only in "
        "the training of the network 64 wide, they are those of the weights' gradients, and our time is the sum of its "
        "kernels."
    )
    yield ""
    yield from float32_table(content)


def float32_table(content: Record) -> Iterator[str]:
    """Yield a table of full fp32 on tensor cores: milliseconds and relative errors, of ours and of torch's."""
    header = ("network, fp32", "", "ours", "torch", "speed", "error: ours", "torch")
    lines = []
    for entry in content["float32"]:
        ours, eager = entry["ours"], entry["eager"]
        name = f"{shape(entry)}, {entry['activation']}, {rows(entry)}"
        milliseconds = (number(ours["ms"]), number(eager["ms"]), times(eager["ms"] / ours["ms"]))
        errors = (f"{system['error_float64']:.1e}" for system in (ours, eager))
        lines.append((name, entry["phase"], *milliseconds, *errors))
    yield from table(header, lines)


def _errors(content: Record) -> Iterator[str]:
    yield "Relative errors of ours and of eager's."
    yield ""
    lines = (
        (f"{label(network)}, {network['phase']}", *(f"{errors[name]:.2e}" for name in ("ours", "eager")))
        for network in content["networks"]
        if (errors := network["error_float64"])
    )
    yield from table(("", "ours", "eager"), lines)


# The README's block

FOLDER = "bench/results"
TABLE = (
    *("narrow64", "narrow64-gelu", "narrow128", "narrow16-64-64-16", "narrow64-fp32", "fp32-1024"),
    *("middle512", "middle1024", "large1024", "large4096", "large4096-1k"),
)


def readme_picture(content: Record, name: str, folder: str = FOLDER) -> str:
    """Return a figure as a README shows it; `folder` is the path from the README to bench/results."""
    plot = figures(content)[name]
    light, dark = (f"{folder}/{file_name(slug(content), name, theme, plot)}" for theme in (plots.LIGHT, plots.DARK))
    return picture(light, dark, plot.alt)


def readme(contents: Sequence[Record]) -> str:
    """Return the README's block of measured numbers, from one file or more.

    The figure and its conditions are of the first file that has tiny-cuda-nn, and the table is of the last file.
    """
    header = ("network", "inference: ours", "eager", "speed", "training: ours", "eager", "speed")
    newest = contents[-1]
    networks = beside_eager(newest)
    lines: list[str] = []
    sentences = []
    for content in [content for content in contents if beside_tinycudann(content)][:1]:
        lines += [readme_picture(content, "throughput"), ""]
        sentences = [f"The figure: {_measured_with(content)}. {_how_to_read_the_figure(content)}"]
    sentences.append(f"The table: {_measured_with(newest)}.")
    lines += [*_paragraph(" ".join(sentences)), ""]
    shown = {cell: networks[cell] for cell in TABLE}
    lines += table(header, map(_readme_row, shown.values()))
    lines += _paragraph(_explanation(shown))
    return "\n".join(lines) + "\n"


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_on_hyphens=False)


def _measured_with(content: Record) -> str:
    """Return the GPU, the date, the commit and a later change, the versions and the page of all readings, in words."""
    origin, versions = content["origin"], content["origin"]["versions"]
    other = f", tiny-cuda-nn {versions['tinycudann']}" if "tinycudann" in versions else ""
    changed = f" and a later change ({origin['changed']})" if "changed" in origin else ""
    return (
        f"{origin['gpu']}, {origin['date']}, commit {origin['commit']}{changed}, torch {versions['torch']}, "
        f"Triton {versions['triton']}{other} ([readings]({FOLDER}/{slug(content)}.md))"
    )


def _how_to_read_the_figure(content: Record) -> str:
    copy_rate = content["ceilings"]["memory_gbps"] / 1e3
    return (
        f"Vertical bars: the most rows a second that the memory allows, at the {copy_rate:.2f} TB/s of a large copy. "
        "In training, only the comparison with tiny-cuda-nn includes the gradient of x."
    )


def _explanation(shown: Mapping[str, Mapping[str, Record]]) -> str:
    """Return the sentences on how to read the table. They name the calls that are not 1 % faster in a loop."""
    loops = [
        f"{shape(phases['inference'])}, {rows(phases['inference'])}, {', '.join(slower)}"
        for phases in shown.values()
        if (slower := [*_slower_in_a_loop(phases)])
    ]
    text = (
        "Times are milliseconds of GPU kernels. Training is a forward and a backward. Speed is eager PyTorch's time "
        "divided by ours: below 1x, our kernels are slower. Python overhead comes on top. "
    )
    return text + (
        "With it, timed in a loop, these calls are slower than eager's, or less than 1 % faster (ours / eager, in ms): "
        f"{'; '.join(loops)}."
        if loops
        else ""
    )


def _slower_in_a_loop(phases: Mapping[str, Record]) -> Iterator[str]:
    for phase, network in phases.items():
        if (speed := ratio(network, "loop")) is not None and speed < 1.01:
            yield f"{phase} {' / '.join(_times(network, ('ours', 'eager'), 'loop'))}"


def _readme_row(phases: Mapping[str, Record]) -> list[str]:
    row = [label(phases["inference"])]
    for phase in ("inference", "training"):
        network = phases.get(phase)
        if network is None:
            row += [NONE] * 3
        else:
            row += [*_times(network, ("ours", "eager"), "device"), times(ratio(network, "device"))]
    return row
