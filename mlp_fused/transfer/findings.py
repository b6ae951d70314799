"""The findings of a measurement: a table, advice, and from how many rows on the GPU wins."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import count
from ..timing import Link, Measured, Spread
from .first_touch import FirstTouch

__all__ = ["Crossing", "OnCpu", "OnGpu", "Point", "Transfer", "crossing"]

WAYS = ("step", "non_waiting", "prefetched")  # of OnGpu, by which data of the host as they are come to a step
GAIN = 0.05  # of a step's time; advice that promises less is not given


@dataclass(frozen=True)
class OnCpu:
    """One batch on the CPU: forward, backward (None for inference), both in one step."""

    forward: Spread
    backward: Spread | None
    step: Spread


@dataclass(frozen=True)
class OnGpu:
    """One batch on the GPU.

    Attributes:
        pageable: its copy to the device, from the memory that a loader makes it in.
        pinned: the same from pinned memory; the host waits for it.
        non_blocking: the same, and the host does not wait.
        to_host: the output's copy back, to pageable memory.
        staging: copying the batch into pinned memory, by the host.
        launch: the smallest kernel there is: one number.
        forward: the network's kernels on a batch that lies on the device.
        backward: those of every parameter's gradient; None for inference.
        resident: a step in a loop, its batch on the device already.
        step: a step in a loop as it is usually written: `x.to(device)`, forward, backward; for inference the copy of
            the output back instead of the backward.
        prefetched: the same through DevicePrefetcher, from a loader that pins (without, the host has `staging` to do).
        non_waiting: the same from pinned memory, copied in the stream that computes; the host does not wait.
        narrowed: as `prefetched`, of a batch that lies in pinned memory in 16 bits, and is widened on the device; None
            where it has no float32 numbers.
    """

    pageable: Measured
    pinned: Measured
    non_blocking: Measured
    to_host: Measured
    staging: Spread
    launch: Measured
    forward: Measured
    backward: Measured | None
    resident: Spread
    step: Spread
    prefetched: Spread
    non_waiting: Spread
    narrowed: Spread | None

    @property
    def kernels(self) -> Spread:
        """The device's work in a step, copies apart."""
        return self.forward.device if self.backward is None else self.forward.device + self.backward.device

    @property
    def issued(self) -> Spread:
        """The host's time to launch a step."""
        return self.forward.returned if self.backward is None else self.forward.returned + self.backward.returned

    @property
    def parts(self) -> dict[str, Spread]:
        """The parts that go on side by side in a loop that prefetches: the slowest of them bounds it."""
        return {"copy": self.non_blocking.device, "launch": self.issued, "kernel": self.kernels}

    @property
    def bound(self) -> str:
        """The slowest of `parts`, by name."""
        return max(self.parts, key=lambda name: self.parts[name].ms)

    @property
    def hidden(self) -> float:
        """The part of the copy that prefetching hides, 0 to 1: of a copy that could be hidden whole, 1."""
        return hidden(self.non_blocking.device.ms, self.resident.ms, self.prefetched.ms)


@dataclass(frozen=True)
class Point:
    """One batch size: bytes in and out, and the times; `gpu` is None without one.

    `least` is the bytes that the forward's, and that the backward's kernels move at least: the batch, the output, the
    parameters, and for backward the gradients of the last two.
    """

    rows: int
    bytes_in: int
    bytes_out: int
    least: tuple[int, int]
    cpu: OnCpu
    gpu: OnGpu | None


@dataclass(frozen=True)
class Crossing:
    """From how many rows on the GPU wins, interpolated between the sizes measured; `low` to `high` is its range.

    The range is that of the quartiles: the CPU slow and the GPU fast, and the other way about. 0 says that the GPU wins
    at the smallest size measured already, infinity that it does not win at the largest.
    """

    rows: float
    low: float
    high: float
    measured: tuple[int, int]

    def __str__(self) -> str:
        if self.rows == 0:
            perhaps = "" if self.high == 0 else f" (by the spread perhaps only {_from(self.high)})"
            return f"at every batch size measured, from {count(self.measured[0], 'row', ',')} on{perhaps}"
        if self.rows == math.inf:
            perhaps = "" if self.low == math.inf else f" (by the spread perhaps {_from(self.low)})"
            return f"at no batch size measured, up to {count(self.measured[1], 'row', ',')}{perhaps}"
        ends = [
            "below the smallest" if end == 0 else "above the largest" if end == math.inf else f"{end:,.0f}"
            for end in (self.low, self.high)
        ]
        return f"from about {count(self.rows, 'row', ',')} on ({' to '.join(ends)})"


def crossing(sizes: Sequence[int], cpu: Sequence[Spread], gpu: Sequence[Spread]) -> Crossing:
    """Where the GPU's time falls below the CPU's, for good as far as was measured; sizes ascending.

    Between two sizes log(time) is taken to be linear in log(rows): times are sums of a constant and of powers.
    """

    def where(slow: Callable[[Spread], float], fast: Callable[[Spread], float]) -> float:
        ahead = [math.log(slow(c) / fast(g)) for c, g in zip(cpu, gpu, strict=True)]
        if ahead[-1] <= 0:
            return math.inf
        lost = [i for i, value in enumerate(ahead) if value <= 0]
        if not lost:
            return 0.0
        i = lost[-1]
        part = -ahead[i] / (ahead[i + 1] - ahead[i])
        growth: float = (sizes[i + 1] / sizes[i]) ** part
        return sizes[i] * growth

    return Crossing(
        where(lambda c: c.ms, lambda g: g.ms),
        where(lambda c: c.high, lambda g: g.low),
        where(lambda c: c.low, lambda g: g.high),
        (sizes[0], sizes[-1]),
    )


def _from(rows: float) -> str:
    """One end of a crossing's range."""
    if rows == 0:
        return "at every one"
    return "at none" if rows == math.inf else f"from {rows:,.0f} on"


def fastest(ms: Mapping[str, float]) -> str:
    """The name of the least of some times; of those that are within GAIN of it, the one that stands first."""
    least = min(ms.values())
    return next(name for name, each in ms.items() if each <= (1 + GAIN) * least)


def hidden(copied: float, computed: float, together: float) -> float:
    """The part, 0 to 1, of what two things that take so long each could hide of each other, and did in one step."""
    possible = min(copied, computed)
    return min(1.0, max(0.0, (copied + computed - together) / possible)) if possible else 1.0


@dataclass(frozen=True)
class Transfer:
    """The findings of `measure`; `print` them.

    Attributes:
        network: what was measured.
        rows: the batch size that was asked about; `at_rows` is its point.
        training: whether a step has a backward.
        cpu, gpu: names; gpu is None where there is none.
        link: what the link reaches with pinned memory, bytes/s.
        memory: what the GPU's memory reaches in a large copy, bytes/s read plus written.
        first_touch: what only the first call costs, in a process of its own.
        points: one for each batch size, ascending.
        notes: what is missing, and why.
    """

    network: str
    rows: int
    training: bool
    cpu: str
    gpu: str | None
    link: Link | None
    memory: float | None
    first_touch: FirstTouch | None
    points: tuple[Point, ...]
    notes: tuple[str, ...]

    @property
    def at_rows(self) -> Point:
        return next(point for point in self.points if point.rows == self.rows)

    @property
    def crossings(self) -> dict[str, Crossing]:
        """From which batch size on the GPU wins: by `step`, by `prefetched` and by `resident`. Empty without a GPU."""
        on_gpu = [point.gpu for point in self.points if point.gpu is not None]
        if not on_gpu:
            return {}
        sizes, cpu = [point.rows for point in self.points], [point.cpu.step for point in self.points]
        return {
            name: crossing(sizes, cpu, [getattr(each, name) for each in on_gpu])
            for name in ("step", "prefetched", "resident")
        }

    @property
    def explanation(self) -> str:
        """The reason for which the two clocks differ, in a line. Empty without a GPU."""
        gpu = self.at_rows.gpu
        if gpu is None:
            return ""
        device, host, returned = (each.ms for each in (gpu.forward.device, gpu.forward.host, gpu.forward.returned))
        return (
            f"of the forward's {_time(host)} by the host's clock the device works {_time(device)}; the other "
            f"{_time(max(0.0, host - device))} are Python, launching and waiting; a clock that does not wait reads "
            f"{_time(returned)}"
        )

    @property
    def bounds(self) -> str:
        """The part that bounds the step, in a line. Empty without a GPU."""
        gpu = self.at_rows.gpu
        if gpu is None:
            return ""
        what = {
            "copy": "the copy to the device",
            "launch": "the host, which launches",
            "kernel": "the device, which computes",
        }
        parts = ", ".join(f"{name} {_time(part.ms)}" for name, part in gpu.parts.items())
        copied = gpu.pageable.host.ms
        return (
            f"of a step of {count(self.rows, 'row', ',')} as usually written, {_time(gpu.step.ms)}, the copy is "
            f"{_time(copied)} ({min(1.0, copied / gpu.step.ms):.0%}); prefetched it is bound by "
            f"{what[gpu.bound]}: {parts}"
        )

    @property
    def choice(self) -> str:
        """The fastest way to do a step with data of the host: "cpu", or one of WAYS. Without a GPU, "cpu"."""
        point = self.at_rows
        times = {"cpu": point.cpu.step.ms}
        if point.gpu is not None:
            times |= {name: getattr(point.gpu, name).ms for name in WAYS}
        return fastest(times)

    @property
    def advice(self) -> list[str]:
        """Advice, with the time that it saves. Empty without a GPU."""
        point = self.at_rows
        gpu, cpu = point.gpu, point.cpu.step
        if gpu is None:
            return []
        advice = []
        usual, ahead, resident = gpu.step.ms, gpu.prefetched.ms, gpu.resident.ms
        ways = {name: getattr(gpu, name).ms for name in WAYS}
        way, best = fastest(ways), min(ways.values())
        if self.choice == "cpu":
            advice.append(
                f"stay on the CPU at {count(self.rows, 'row', ',')}: a step takes {_time(cpu.ms)} there and "
                f"{_time(best)} on the GPU, which wins {self.crossings['prefetched']}"
            )
        if gpu.bound == "launch":
            sizes, on_gpu = zip(*((each.rows, each.gpu) for each in self.points if each.gpu is not None))
            filled = crossing(sizes, [each.kernels for each in on_gpu], [each.issued for each in on_gpu])
            advice.append(
                f"take a larger batch: the device works {_time(gpu.kernels.ms)} of the {_time(gpu.issued.ms)} that the "
                f"host takes to launch it; it has more work than that {filled}"
            )
        if way == "prefetched":
            advice.append(
                f"prefetch (mlp_fused.DevicePrefetcher) from a loader that pins (DataLoader's pin_memory=True): a step "
                f"takes {_time(ahead)}, not {_time(usual)}; {gpu.hidden:.0%} of what could be hidden is"
            )
        elif way == "non_waiting":
            advice.append(
                f"pin the batch in the loader (DataLoader's pin_memory=True), and copy it with non_blocking=True: a "
                f"step takes {_time(gpu.non_waiting.ms)}, not {_time(usual)}"
            )
        if gpu.narrowed is not None and best - gpu.narrowed.ms > GAIN * best:
            advice.append(
                f"keep the loader's data in 16 bits, prefetch them, and widen them on the GPU or compute under "
                f"torch.autocast: half the bytes, {_time(gpu.narrowed.ms)} instead of {_time(best)} a step"
            )
        if best - resident > GAIN * best:
            advice.append(
                f"keep the data on the GPU where they fit: a step on data that are there takes {_time(resident)} "
                f"instead of {_time(best)}"
            )
        return advice or [f"nothing: all but {1 - resident / usual:.0%} of a step is the network's own work"]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, those that follow from others included. Of crossings, infinity is None."""

        def ends(found: Crossing) -> dict[str, Any]:
            values = dataclasses.asdict(found)
            return {name: None if value == math.inf else value for name, value in values.items()}

        gpu = self.at_rows.gpu
        return {
            **dataclasses.asdict(self),
            "bound": None if gpu is None else gpu.bound,
            "hidden": None if gpu is None else gpu.hidden,
            "choice": self.choice,
            "bounds": self.bounds,
            "explanation": self.explanation,
            "rates": None if gpu is None else {name: list(each) for name, each in _rates(self)},  # GB/s, of ceiling
            "crossings": {name: ends(found) for name, found in self.crossings.items()},
            "advice": self.advice,
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(found: Transfer) -> Iterator[str]:
    point = found.at_rows
    yield f"{found.network}; {'training' if found.training else 'inference'}, {count(found.rows, 'row', ',')}"
    yield f"CPU: {found.cpu}"
    yield f"GPU: {found.gpu or 'none'}"
    if found.link is not None and found.memory is not None:
        yield (
            f"ceilings: to the device {_rate(found.link.to_device)}, to the host {_rate(found.link.to_host)}, the "
            f"GPU's memory {_rate(found.memory)}"
        )
    if (first := found.first_touch) is not None:
        yield ""
        yield "first touch, in a process of its own"
        steps = (
            ("context", first.context, ""),
            ("allocation", first.allocation, ""),
            ("first copy", first.copy, ""),
            ("first launch", first.launch, ""),
            ("first forward", first.compiled, "kernels compiled"),
            ("", first.loaded, "kernels loaded from Triton's cache"),
            ("second forward", first.again, ""),
        )
        yield from _columns([(name, _time(ms), note) for name, ms, note in steps], "<><")
    yield ""
    yield (
        f"every time after that, {count(found.rows, 'row', ',')}, {point.bytes_in:,} bytes in, {point.bytes_out:,} out "
        "(medians, with their quartiles)"
    )
    if point.gpu is not None:
        yield from _columns(list(_gpu_rows(found, point.gpu)), "<>>>>>")
        yield "device: between events; host: from the call until the device is done; returned: until it comes back"
        yield found.explanation
        yield ""
    yield from _columns(list(_cpu_rows(point.cpu)), "<>")
    yield ""
    yield "a step by batch size"
    yield from _columns(list(_size_rows(found)), ">" * 9)
    if found.crossings:
        yield ""
        yield found.bounds
        ways = {"step": "as usually written", "prefetched": "prefetched", "resident": "with the data on it"}
        for name, each in found.crossings.items():
            yield f"the GPU wins over this CPU, {ways[name]}: {each}"
        yield ""
        yield from (f"- {sentence}" for sentence in found.advice)
    for note in found.notes:
        yield f"not measured: {note}"


def _moved(found: Transfer) -> dict[str, tuple[Measured, int, float]]:
    """The GPU's copies and kernels that move bytes: their times, the bytes that they must move, the most a second."""
    point, link, memory = found.at_rows, found.link, found.memory
    assert point.gpu is not None
    assert link is not None
    assert memory is not None
    gpu = point.gpu
    moved = {
        "pageable": (gpu.pageable, point.bytes_in, link.to_device),
        "pinned": (gpu.pinned, point.bytes_in, link.to_device),
        "non_blocking": (gpu.non_blocking, point.bytes_in, link.to_device),
        "to_host": (gpu.to_host, point.bytes_out, link.to_host),
        "forward": (gpu.forward, point.least[0], memory),
    }
    return moved if gpu.backward is None else {**moved, "backward": (gpu.backward, point.least[1], memory)}


def _rates(found: Transfer) -> Iterator[tuple[str, tuple[float, float]]]:
    """GB/s, and the part of the ceiling that they are, by the names of `_moved`; of what takes no time, none."""
    for name, (measured, nbytes, ceiling) in _moved(found).items():
        if measured.device.ms and nbytes:
            rate = nbytes / (1e-3 * measured.device.ms)
            yield name, (1e-9 * rate, rate / ceiling)


PARTS = {
    "pageable": "copy to the device, pageable",
    "pinned": "  pinned",
    "non_blocking": "  pinned, non_blocking",
    "to_host": "copy of the output to the host",
    "launch": "launch of a kernel",
    "forward": "forward, its kernels",
    "backward": "backward, its kernels",
}


def _gpu_rows(found: Transfer, gpu: OnGpu) -> Iterator[tuple[str, ...]]:
    yield "", "device", "host", "returned", "GB/s", "of ceiling"
    rates = dict(_rates(found))
    for name, told in PARTS.items():
        if (measured := getattr(gpu, name)) is not None:
            rate = (f"{rates[name][0]:.1f}", f"{rates[name][1]:.0%}") if name in rates else ("", "")
            yield told, *map(_spread, (measured.device, measured.host, measured.returned)), *rate
    yield "into pinned memory, by the host", "", _spread(gpu.staging), "", "", ""


def _cpu_rows(cpu: OnCpu) -> Iterator[tuple[str, str]]:
    yield "forward on the CPU", _spread(cpu.forward)
    if cpu.backward is not None:
        yield "backward on the CPU", _spread(cpu.backward)
    yield "step on the CPU", _spread(cpu.step)


def _size_rows(found: Transfer) -> Iterator[tuple[str, ...]]:
    if found.gpu is None:
        yield "rows", "bytes in", "CPU"
        for point in found.points:
            yield f"{point.rows:,}", f"{point.bytes_in:,}", _time(point.cpu.step.ms)
        return
    yield "rows", "bytes in", "CPU", "GPU", "prefetched", "data there", "pinned copy", "launch", "kernel"
    for point in found.points:
        assert point.gpu is not None
        steps = (point.cpu.step, point.gpu.step, point.gpu.prefetched, point.gpu.resident)
        parts = ("*" * (name == point.gpu.bound) + _time(part.ms) for name, part in point.gpu.parts.items())
        yield f"{point.rows:,}", f"{point.bytes_in:,}", *(_time(step.ms) for step in steps), *parts
    yield ("* what bounds it",)


def _columns(rows: Sequence[tuple[str, ...]], sides: str) -> Iterator[str]:
    """Rows in columns, each to its side, `<` or `>`. A row of one cell is no row of the table."""
    widths = [max(len(row[i]) for row in rows if len(row) > 1) for i in range(len(rows[0]))]
    for row in rows:
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths))
        yield "  " + (row[0] if len(row) == 1 else "  ".join(cells)).rstrip()


def _time(ms: float) -> str:
    """Three digits and a unit."""
    for unit, factor in (("s", 1e-3), ("ms", 1.0)):
        if ms * factor >= 1:
            return f"{ms * factor:.3g} {unit}" if ms * factor < 1000 else f"{ms * factor:.0f} {unit}"
    return f"{1e3 * ms:.3g} µs"


def _spread(spread: Spread) -> str:
    """The median, and how far the quartiles are from it."""
    around = max(spread.high - spread.ms, spread.ms - spread.low)
    return f"{_time(spread.ms)} ±{around / spread.ms if spread.ms else 0:.0%}"


def _rate(bytes_per_second: float) -> str:
    return f"{1e-9 * bytes_per_second:.1f} GB/s"
