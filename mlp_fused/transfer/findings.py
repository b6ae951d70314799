"""The result of a measurement: its table, its advice, and the batch size from which the GPU is faster."""

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

WAYS = ("step", "non_waiting", "prefetched")  # fields of OnGpu: the ways to copy unchanged host data for a step
GAIN = 0.05  # advice is given only if it saves more than this fraction of a step


@dataclass(frozen=True)
class OnCpu:
    """Times of one batch on the CPU: forward, backward (None for inference), and a step, which is both."""

    forward: Spread
    backward: Spread | None
    step: Spread


@dataclass(frozen=True)
class OnGpu:
    """Times of one batch on the GPU.

    Attributes:
        pageable: the copy of the batch to the device from pageable memory.
        pinned: the copy from pinned memory; the host waits for it.
        non_blocking: the copy from pinned memory with non_blocking=True; the host does not wait.
        to_host: the copy of the output to pageable memory.
        staging: the host's copy of the batch into pinned memory.
        launch: the launch of a kernel that sets one number.
        forward: the forward kernels; the batch is on the device.
        backward: the backward kernels, for the gradients of all parameters; None for inference.
        resident: a step in a loop; the batch is already on the device.
        step: a step in the usual loop: `x.to(device)`, forward, backward. For inference: `x.to(device)`, forward, copy
            of the output to the host.
        prefetched: the step with DevicePrefetcher and a loader that pins memory. (Without pinned memory, the host would
            also need the time `staging`.)
        non_waiting: the step with a non_blocking copy from pinned memory, in the stream of the kernels.
        narrowed: the step as in `prefetched`, but the batch is in 16 bits on the host and converted to float32 on the
            device; None if the batch has no float32 tensor.
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
        """The device time of a step's kernels, without copies."""
        return self.forward.device if self.backward is None else self.forward.device + self.backward.device

    @property
    def issued(self) -> Spread:
        """The host time to launch a step's kernels."""
        return self.forward.returned if self.backward is None else self.forward.returned + self.backward.returned

    @property
    def parts(self) -> dict[str, Spread]:
        """The times of copy, launch and kernels, which overlap in a loop with prefetching. The slowest bounds it."""
        return {"copy": self.non_blocking.device, "launch": self.issued, "kernel": self.kernels}

    @property
    def bound(self) -> str:
        """The name of the slowest of `parts`."""
        return max(self.parts, key=lambda name: self.parts[name].ms)

    @property
    def hidden(self) -> float:
        """The fraction of the possible overlap of copy and kernels that prefetching reaches, 0 to 1."""
        return hidden(self.non_blocking.device.ms, self.resident.ms, self.prefetched.ms)


@dataclass(frozen=True)
class Point:
    """The measurement of one batch size: the bytes of batch and output, and the times. `gpu` is None without a GPU.

    `least` has the minimum bytes that the forward kernels move (batch, output, parameters), and that the backward
    kernels move (the same, and the gradients of the parameters).
    """

    rows: int
    bytes_in: int
    bytes_out: int
    least: tuple[int, int]
    cpu: OnCpu
    gpu: OnGpu | None


@dataclass(frozen=True)
class Crossing:
    """The batch size from which the GPU is faster, interpolated between the measured sizes.

    Attributes:
        rows: the batch size. 0 if the GPU is faster at every measured size, infinity if it is slower at the largest.
        low: the batch size if the CPU takes its upper quartile and the GPU its lower one.
        high: the batch size if the CPU takes its lower quartile and the GPU its upper one.
        measured: the smallest and the largest measured size.
    """

    rows: float
    low: float
    high: float
    measured: tuple[int, int]

    def __str__(self) -> str:
        if self.rows == 0:
            perhaps = "" if self.high == 0 else f" (by the quartiles, perhaps only {_from(self.high)})"
            return f"at every measured batch size, from {count(self.measured[0], 'row', ',')} on{perhaps}"
        if self.rows == math.inf:
            perhaps = "" if self.low == math.inf else f" (by the quartiles, perhaps {_from(self.low)})"
            return f"at no measured batch size, up to {count(self.measured[1], 'row', ',')}{perhaps}"
        ends = [
            "below the smallest" if end == 0 else "above the largest" if end == math.inf else f"{end:,.0f}"
            for end in (self.low, self.high)
        ]
        return f"from about {count(self.rows, 'row', ',')} on ({' to '.join(ends)})"


def crossing(sizes: Sequence[int], cpu: Sequence[Spread], gpu: Sequence[Spread]) -> Crossing:
    """Return the batch size from which the GPU is faster at all larger measured sizes. `sizes` are ascending.

    Between two sizes, log(time) is interpolated linearly in log(rows), because a time is a constant plus a power of the
    rows.
    """

    def where(cpu_ms: Callable[[Spread], float], gpu_ms: Callable[[Spread], float]) -> float:
        log_speedup = [math.log(cpu_ms(c) / gpu_ms(g)) for c, g in zip(cpu, gpu, strict=True)]
        if log_speedup[-1] <= 0:
            return math.inf
        slower = [i for i, value in enumerate(log_speedup) if value <= 0]
        if not slower:
            return 0.0
        i = slower[-1]
        fraction = -log_speedup[i] / (log_speedup[i + 1] - log_speedup[i])
        growth: float = (sizes[i + 1] / sizes[i]) ** fraction
        return sizes[i] * growth

    return Crossing(
        where(lambda c: c.ms, lambda g: g.ms),
        where(lambda c: c.high, lambda g: g.low),
        where(lambda c: c.low, lambda g: g.high),
        (sizes[0], sizes[-1]),
    )


def _from(rows: float) -> str:
    """Return one end of a crossing's range in words."""
    if rows == 0:
        return "at every one"
    return "at none" if rows == math.inf else f"from {rows:,.0f} on"


def fastest(times: Mapping[str, float]) -> str:
    """Return the name of the shortest time, or the first name whose time is within GAIN of it."""
    least = min(times.values())
    return next(name for name, time in times.items() if time <= (1 + GAIN) * least)


def hidden(copied: float, computed: float, together: float) -> float:
    """The overlap of a copy and a computation as a fraction of the possible overlap, 0 to 1.

    It is (copied + computed - together) / min(copied, computed).
    """
    possible = min(copied, computed)
    return min(1.0, max(0.0, (copied + computed - together) / possible)) if possible else 1.0


@dataclass(frozen=True)
class Transfer:
    """The result of `measure`. `print` it to read it.

    Attributes:
        network: a description of the network and its input.
        rows: the batch size of the batch given to `measure`.
        training: True if a step has a backward.
        cpu, gpu: descriptions of the CPU and the GPU; gpu is None without a GPU.
        link: the measured rates of the link with pinned memory, in bytes/s.
        memory: the measured rate of the GPU's memory in a large copy, in bytes/s, read plus written.
        first_touch: the one-time costs of a process, measured in new processes.
        points: one Point for each batch size, ascending.
        notes: the parts that were not measured, with the reasons.
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
        """The point of the batch size `rows`."""
        return next(point for point in self.points if point.rows == self.rows)

    @property
    def crossings(self) -> dict[str, Crossing]:
        """The crossings of the CPU's step with `step`, `prefetched` and `resident`, by name. Empty without a GPU."""
        on_gpu = [point.gpu for point in self.points if point.gpu is not None]
        if not on_gpu:
            return {}
        sizes, cpu = [point.rows for point in self.points], [point.cpu.step for point in self.points]
        return {
            name: crossing(sizes, cpu, [getattr(times, name) for times in on_gpu])
            for name in ("step", "prefetched", "resident")
        }

    @property
    def explanation(self) -> str:
        """A line that explains why the host's clock and the device's differ. Empty without a GPU."""
        gpu = self.at_rows.gpu
        if gpu is None:
            return ""
        forward = gpu.forward
        device, host, returned = forward.device.ms, forward.host.ms, forward.returned.ms
        return (
            f"the forward takes {_time(host)} by the host's clock: {_time(device)} of kernels, and "
            f"{_time(max(0.0, host - device))} of Python, launches and waiting; without a synchronization the clock "
            f"would show {_time(returned)}"
        )

    @property
    def bounds(self) -> str:
        """A line with the copy's part of a step, and the part that bounds a prefetched step. Empty without a GPU."""
        gpu = self.at_rows.gpu
        if gpu is None:
            return ""
        names = {
            "copy": "the copy to the device",
            "launch": "the launches",
            "kernel": "the kernels",
        }
        parts = ", ".join(f"{name} {_time(part.ms)}" for name, part in gpu.parts.items())
        copied = gpu.pageable.host.ms
        return (
            f"a step of {count(self.rows, 'row', ',')} with x.to(device) takes {_time(gpu.step.ms)}, of which the copy "
            f"takes {_time(copied)} ({min(1.0, copied / gpu.step.ms):.0%}); with prefetching, {names[gpu.bound]} "
            f"bound{'s' * (gpu.bound == 'copy')} it: {parts}"
        )

    @property
    def choice(self) -> str:
        """The fastest way to compute a step if the data are on the host: "cpu" or one of WAYS."""
        point = self.at_rows
        times = {"cpu": point.cpu.step.ms}
        if point.gpu is not None:
            times |= {name: getattr(point.gpu, name).ms for name in WAYS}
        return fastest(times)

    @property
    def advice(self) -> list[str]:
        """Advice, with the time of a step that it would give. Empty without a GPU."""
        point = self.at_rows
        gpu, cpu = point.gpu, point.cpu.step
        if gpu is None:
            return []
        advice = []
        usual, prefetched, resident = gpu.step.ms, gpu.prefetched.ms, gpu.resident.ms
        ways = {name: getattr(gpu, name).ms for name in WAYS}
        way, best = fastest(ways), min(ways.values())
        if self.choice == "cpu":
            advice.append(
                f"stay on the CPU at {count(self.rows, 'row', ',')}: a step takes {_time(cpu.ms)} there and "
                f"{_time(best)} on the GPU, which is faster {self.crossings['prefetched']}"
            )
        if gpu.bound == "launch":
            sizes, on_gpu = zip(*((point.rows, point.gpu) for point in self.points if point.gpu is not None))
            filled = crossing(sizes, [times.kernels for times in on_gpu], [times.issued for times in on_gpu])
            advice.append(
                f"take a larger batch: launching takes {_time(gpu.issued.ms)}, and the kernels only "
                f"{_time(gpu.kernels.ms)}; the kernels take longer {filled}"
            )
        if way == "prefetched":
            advice.append(
                f"prefetch with mlp_fused.DevicePrefetcher and a DataLoader with pin_memory=True: a step takes "
                f"{_time(prefetched)} instead of {_time(usual)}; {gpu.hidden:.0%} of the possible overlap is reached"
            )
        elif way == "non_waiting":
            advice.append(
                f"pin the batch (DataLoader's pin_memory=True) and copy it with non_blocking=True: a step takes "
                f"{_time(gpu.non_waiting.ms)} instead of {_time(usual)}"
            )
        if gpu.narrowed is not None and best - gpu.narrowed.ms > GAIN * best:
            advice.append(
                f"store the data on the host in 16 bits, prefetch them, and convert them to float32 on the GPU or use "
                f"torch.autocast: with half the bytes a step takes {_time(gpu.narrowed.ms)} instead of {_time(best)}"
            )
        if best - resident > GAIN * best:
            advice.append(
                f"keep the data on the GPU if they fit: a step then takes {_time(resident)} instead of {_time(best)}"
            )
        return advice or [f"no advice: all but {1 - resident / usual:.0%} of a step is the work of the network"]

    def as_dict(self) -> dict[str, Any]:
        """Return the values, including the derived ones, as plain types for JSON. In crossings, infinity is None."""

        def finite(crossing: Crossing) -> dict[str, Any]:
            values = dataclasses.asdict(crossing)
            return {name: None if value == math.inf else value for name, value in values.items()}

        gpu = self.at_rows.gpu
        return {
            **dataclasses.asdict(self),
            "bound": None if gpu is None else gpu.bound,
            "hidden": None if gpu is None else gpu.hidden,
            "choice": self.choice,
            "bounds": self.bounds,
            "explanation": self.explanation,
            # GB/s, and the fraction of the ceiling
            "rates": None if gpu is None else {name: list(rates) for name, rates in _rates(self)},
            "crossings": {name: finite(crossing) for name, crossing in self.crossings.items()},
            "advice": self.advice,
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(result: Transfer) -> Iterator[str]:
    """Yield the lines of the report. `bench.readings` parses its tables."""
    point = result.at_rows
    yield f"{result.network}; {'training' if result.training else 'inference'}, {count(result.rows, 'row', ',')}"
    yield f"CPU: {result.cpu}"
    yield f"GPU: {result.gpu or 'none'}"
    if result.link is not None and result.memory is not None:
        yield (
            f"ceilings: to the device {_rate(result.link.to_device)}, to the host {_rate(result.link.to_host)}, the "
            f"GPU's memory {_rate(result.memory)}"
        )
    if (first := result.first_touch) is not None:
        yield ""
        yield "first touch, in a new process"
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
        f"after the first call, {count(result.rows, 'row', ',')}, {point.bytes_in:,} bytes in, {point.bytes_out:,} "
        "bytes out (medians ± quartiles)"
    )
    if point.gpu is not None:
        yield from _columns(list(_gpu_rows(result, point.gpu)), "<>>>>>")
        yield (
            "device: time between events; host: time from the call until the device is done; returned: time until the "
            "call returns"
        )
        yield result.explanation
        yield ""
    yield from _columns(list(_cpu_rows(point.cpu)), "<>")
    yield ""
    yield "a step by batch size"
    yield from _columns(list(_size_rows(result)), ">" * 9)
    if result.crossings:
        yield ""
        yield result.bounds
        ways = {"step": "with x.to(device)", "prefetched": "with prefetching", "resident": "with the data on the GPU"}
        for name, crossing in result.crossings.items():
            yield f"the GPU is faster than this CPU, {ways[name]}: {crossing}"
        yield ""
        yield from (f"- {sentence}" for sentence in result.advice)
    for note in result.notes:
        yield f"not measured: {note}"


def _moved(result: Transfer) -> dict[str, tuple[Measured, int, float]]:
    """Return (time, minimum bytes, ceiling in bytes/s) of each GPU copy and kernel that moves bytes, by name."""
    point, link, memory = result.at_rows, result.link, result.memory
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


def _rates(result: Transfer) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield (name, (GB/s, fraction of the ceiling)) for `_moved`. Entries without time or bytes are left out."""
    for name, (measured, nbytes, ceiling) in _moved(result).items():
        if measured.device.ms and nbytes:
            rate = nbytes / (1e-3 * measured.device.ms)
            yield name, (1e-9 * rate, rate / ceiling)


PARTS = {
    "pageable": "copy to the device, pageable",
    "pinned": "  pinned",
    "non_blocking": "  pinned, non_blocking",
    "to_host": "copy of the output to the host",
    "launch": "launch of a kernel",
    "forward": "forward kernels",
    "backward": "backward kernels",
}


def _gpu_rows(result: Transfer, gpu: OnGpu) -> Iterator[tuple[str, ...]]:
    yield "", "device", "host", "returned", "GB/s", "of ceiling"
    rates = dict(_rates(result))
    for name, label in PARTS.items():
        if (measured := getattr(gpu, name)) is not None:
            rate = (f"{rates[name][0]:.1f}", f"{rates[name][1]:.0%}") if name in rates else ("", "")
            yield label, *map(_spread, (measured.device, measured.host, measured.returned)), *rate
    yield "host copy into pinned memory", "", _spread(gpu.staging), "", "", ""


def _cpu_rows(cpu: OnCpu) -> Iterator[tuple[str, str]]:
    yield "forward on the CPU", _spread(cpu.forward)
    if cpu.backward is not None:
        yield "backward on the CPU", _spread(cpu.backward)
    yield "step on the CPU", _spread(cpu.step)


def _size_rows(result: Transfer) -> Iterator[tuple[str, ...]]:
    if result.gpu is None:
        yield "rows", "bytes in", "CPU"
        for point in result.points:
            yield f"{point.rows:,}", f"{point.bytes_in:,}", _time(point.cpu.step.ms)
        return
    yield "rows", "bytes in", "CPU", "GPU", "prefetched", "data on GPU", "pinned copy", "launch", "kernel"
    for point in result.points:
        assert point.gpu is not None
        steps = (point.cpu.step, point.gpu.step, point.gpu.prefetched, point.gpu.resident)
        parts = ("*" * (name == point.gpu.bound) + _time(part.ms) for name, part in point.gpu.parts.items())
        yield f"{point.rows:,}", f"{point.bytes_in:,}", *(_time(step.ms) for step in steps), *parts
    yield ("* the slowest part, which bounds the step",)


def _columns(rows: Sequence[tuple[str, ...]], sides: str) -> Iterator[str]:
    """Align rows in columns, `<` left or `>` right. A row with one cell is a line of its own."""
    widths = [max(len(row[i]) for row in rows if len(row) > 1) for i in range(len(rows[0]))]
    for row in rows:
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths))
        yield "  " + (row[0] if len(row) == 1 else "  ".join(cells)).rstrip()


def _time(ms: float) -> str:
    """Return a time with three digits and a unit."""
    for unit, factor in (("s", 1e-3), ("ms", 1.0)):
        if ms * factor >= 1:
            return f"{ms * factor:.3g} {unit}" if ms * factor < 1000 else f"{ms * factor:.0f} {unit}"
    return f"{1e3 * ms:.3g} µs"


def _spread(spread: Spread) -> str:
    """Return the median and, in percent of it, the larger distance of the quartiles."""
    around = max(spread.high - spread.ms, spread.ms - spread.low)
    return f"{_time(spread.ms)} ±{around / spread.ms if spread.ms else 0:.0%}"


def _rate(bytes_per_second: float) -> str:
    return f"{1e-9 * bytes_per_second:.1f} GB/s"
