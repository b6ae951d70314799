"""How long a network's work takes, how long moving its data takes, and when the GPU is worth it.

A GPU operation's time has parts: on its first call creating the context, allocating, compiling; then on every call the
copy of its input, launching, and the kernels. `measure` takes them apart, for a network and batch of your own, and sets
the CPU's time beside them. `mlp-fused transfer` is `run(Config(...))` with a command line before it.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import timing
from ..checkpoint import load_checkpoint, make_model
from ..dtypes import DTYPES, DtypeName, pick_device
from ..engine.recognize import resolve
from ..environment import distorted
from ..errors import UserError, first_line
from ..module import FusedMLP
from ..prefetch import DevicePrefetcher, use_up
from ..timing import Link, Measured, Spread, Timed
from .first_touch import FirstTouch, in_fresh_processes

__all__ = [
    "Config",
    "Crossing",
    "Gpu",
    "OnCpu",
    "OnGpu",
    "Point",
    "Transfer",
    "copy_calls",
    "crossing",
    "measure",
    "run",
]

GAIN = 0.05  # of a step's time; advice that promises less is not given
LADDER = (1 / 16, 1 / 4, 1, 4, 16)  # of the batch's rows: what is measured where `sizes` does not say


# What is measured


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
            where it has no wider numbers.
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
        """What the device works in a step, copies apart."""
        return self.forward.device if self.backward is None else self.forward.device + self.backward.device

    @property
    def issued(self) -> Spread:
        """What the host takes to launch a step."""
        return self.forward.returned if self.backward is None else self.forward.returned + self.backward.returned

    @property
    def parts(self) -> dict[str, Spread]:
        """What goes on side by side in a loop that prefetches: the slowest of them bounds it."""
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
            return f"at every batch size measured, from {_rows(self.measured[0])} on{perhaps}"
        if self.rows == math.inf:
            perhaps = "" if self.low == math.inf else f" (by the spread perhaps {_from(self.low)})"
            return f"at no batch size measured, up to {_rows(self.measured[1])}{perhaps}"
        ends = [
            "below the smallest" if end == 0 else "above the largest" if end == math.inf else f"{end:,.0f}"
            for end in (self.low, self.high)
        ]
        return f"from about {_rows(self.rows)} on ({' to '.join(ends)})"


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
        return sizes[i] * (sizes[i + 1] / sizes[i]) ** part

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
    """What `measure` found; `print` it.

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
        """Why the two clocks differ, in a line. Empty without a GPU."""
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
        """Which part bounds the step, in a line. Empty without a GPU."""
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
            f"of a step of {_rows(self.rows)} as usually written, {_time(gpu.step.ms)}, the copy is {_time(copied)} "
            f"({min(1.0, copied / gpu.step.ms):.0%}); prefetched it is bound by {what[gpu.bound]}: {parts}"
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
        """What to do, with what it saves. Empty without a GPU."""
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
                f"stay on the CPU at {_rows(self.rows)}: a step takes {_time(cpu.ms)} there and {_time(best)} on the "
                f"GPU, which wins {self.crossings['prefetched']}"
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


# The table


def _lines(found: Transfer) -> Iterator[str]:
    point = found.at_rows
    yield f"{found.network}; {'training' if found.training else 'inference'}, {_rows(found.rows)}"
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
        f"every time after that, {_rows(found.rows)}, {point.bytes_in:,} bytes in, {point.bytes_out:,} out "
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
    """What moves bytes on the GPU: as measured, how many bytes it moves at least, and what is the most a second."""
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


def _rows(rows: float) -> str:
    return f"{rows:,.0f} row{'s' * (round(rows) != 1)}"


# Measuring

LOOPS = ("resident", "step", "prefetched", "non_waiting", "narrowed")
WAYS = ("step", "non_waiting", "prefetched")  # of OnGpu, by which data of the host as they are come to a step


def copy_calls(host: Sequence[Tensor], device: torch.device) -> dict[str, Timed]:
    """The copies of pageable tensors to the device, into memory that is there: pageable, pinned, non_blocking."""
    pinned = [tensor.pin_memory() for tensor in host]
    there = [torch.empty_like(tensor, device=device) for tensor in host]

    def copies(sources: Sequence[Tensor], non_blocking: bool) -> Callable[[int], None]:
        def call(_: int) -> None:
            for target, source in zip(there, sources):
                target.copy_(source, non_blocking=non_blocking)

        return call

    return {
        "pageable": Timed(copies(host, False), waits=True),
        "pinned": Timed(copies(pinned, False), waits=True),
        "non_blocking": Timed(copies(pinned, True)),
    }


class Work:
    """A network and its batches on a device: forward, backward, a step. The network is a copy."""

    def __init__(self, model: nn.Module, training: bool, device: torch.device | str) -> None:
        self.model = copy.deepcopy(model).to(device).train(training)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad] if training else []

    def forward(self, batch: Sequence[Tensor]) -> list[Tensor]:
        """The output's tensors; those that have gradients, in training."""
        with torch.set_grad_enabled(bool(self.parameters)):
            outputs = [leaf for leaf in tree_leaves(self.model(*batch)) if isinstance(leaf, Tensor)]
        return [each for each in outputs if each.requires_grad] if self.parameters else outputs

    def gradients(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Random ones of the outputs, in training."""
        return [torch.randn_like(each) for each in outputs] if self.parameters else []

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        torch.autograd.grad(outputs, self.parameters, gradients, allow_unused=True)

    def calls(self, batches: Sequence[Sequence[Tensor]]) -> dict[str, Timed]:
        """Forward, backward where there is one, and `resident`, on batches that are on the device, taken in turn."""
        gradients = self.gradients(self.forward(batches[0]))
        waiting: list[Sequence[Tensor]] = []

        def setup(i: int) -> None:
            waiting[:] = [self.forward(batches[i])]

        def step(i: int) -> None:
            self.step(batches[i], gradients)

        calls = {"forward": Timed(lambda i: self.forward(batches[i]), sets=len(batches))}
        if self.parameters:
            calls["backward"] = Timed(lambda _: self.backward(waiting.pop(), gradients), setup, len(batches))
        return {**calls, "resident": Timed(step, sets=len(batches))}

    def step(self, batch: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        outputs = self.forward(batch)
        if self.parameters:
            self.backward(outputs, gradients)
        return outputs


class Gpu:
    """The GPU that is measured: its name, its ceilings, its clock, and the calls that are timed.

    Tests have one that is made up, with a link, a launch and kernels of stated speed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clock = timing.CLOCK

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def link(self) -> Link:
        return timing.link(str(self.device))

    def memory(self) -> float:
        return timing.memory_ceiling(str(self.device))

    def first_touch(self, model: nn.Module, batch: Sequence[Tensor]) -> FirstTouch:
        return in_fresh_processes(copy.deepcopy(model).cpu(), batch, self.device)

    def calls(self, model: nn.Module, batch: Sequence[Tensor], training: bool) -> dict[str, Timed]:
        """What is timed for OnGpu's fields, by their names; batch lies in pageable memory."""
        work = Work(model, training, self.device)
        nbytes = sum(tensor.nbytes for tensor in batch)
        sets = min(64, timing.rotation(nbytes, timing.cache_bytes("cuda")))
        there = [[tensor.to(self.device) for tensor in batch] for _ in range(sets)]
        outputs = work.forward(there[0])
        gradients = work.gradients(outputs)
        outputs = [each.detach() for each in outputs]
        pinned, loaded = ([tensor.pin_memory() for tensor in batch] for _ in range(2))
        one = torch.zeros(1, device=self.device)
        batches = iter(DevicePrefetcher(itertools.repeat(loaded), self.device))
        narrow = [tensor.bfloat16().pin_memory() if _is_wide(tensor) else tensor for tensor in loaded]
        narrowed = iter(DevicePrefetcher(itertools.repeat(narrow), self.device))

        def back(tensors: Iterable[Tensor]) -> None:
            for tensor in tensors:
                tensor.cpu()

        def stage(_: int) -> None:
            for target, source in zip(pinned, batch):
                target.copy_(source)

        def step(x: Sequence[Tensor]) -> None:
            made = work.step(x, gradients)
            if not training:
                back(made)

        def widened(x: Sequence[Tensor]) -> list[Tensor]:
            return [tensor.to(given.dtype) for tensor, given in zip(x, batch)]

        calls = {
            **copy_calls(batch, self.device),
            "to_host": Timed(lambda _: back(outputs), waits=True),
            "staging": Timed(stage),
            "launch": Timed(lambda _: one.fill_(1)),
            **work.calls(there),
            "step": Timed(lambda _: step([tensor.to(self.device) for tensor in batch])),
            "prefetched": Timed(lambda _: step(next(batches)), drain=partial(use_up, batches)),
            "non_waiting": Timed(lambda _: step([tensor.to(self.device, non_blocking=True) for tensor in loaded])),
        }
        if any(map(_is_wide, batch)):
            calls["narrowed"] = Timed(lambda _: step(widened(next(narrowed))), drain=partial(use_up, narrowed))
        return calls


def measure(
    model: nn.Module,
    batch: Tensor | Sequence[Tensor],
    *,
    sizes: Iterable[int] | None = None,
    training: bool = True,
    device: torch.device | str | None = None,
    first_touch: bool = True,
    seconds: float = timing.SECONDS,
) -> Transfer:
    """Take a network's time apart, on the GPU and on the CPU beside it. Neither model nor batch is changed or moved.

    Without a GPU the CPU's part is measured, and the record says what is missing.

    Args:
        model: any module, called as `model(*batch)`.
        batch: a tensor x (M, ...), or several that are the model's arguments; rows first.
        sizes: the batch sizes to measure besides M, made of batch's rows; default: from M/16 to 16 M.
        training: a step is forward and backward of every parameter; otherwise forward, and the output copied back.
        device: the GPU; default: the current one, where there is one. "cpu" measures the CPU alone.
        first_touch: whether to measure, in two fresh processes, what only the first call costs.
        seconds: spent on one number, about.

    Raises:
        TypeError: batch is neither a tensor nor several.
        ValueError: there are no rows; a size is below 1; the device is neither a GPU that is there nor the CPU; the
            environment has a switch that distorts a GPU's times; the model has nothing to train.
    """
    gpu: Gpu | None = None
    notes: list[str] = []
    chosen = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {chosen}; it needs to be a CUDA or ROCm GPU, or cpu")
    if chosen.type == "cpu":
        why = "as asked for" if device is not None else f"no GPU that torch {torch.__version__} can use"
        notes.append(f"the GPU's part, which is copies, launches, kernels and first touch ({why})")
        if (reason := distorted("cpu")) is not None:
            notes.append(f"times that mean something ({reason})")
        return measure_on(None, model, batch, sizes, training, first_touch, seconds, notes)
    if not torch.cuda.is_available():
        raise ValueError(f"device is {chosen}, and torch {torch.__version__} can use none here; cpu always can be used")
    if (reason := distorted()) is not None:
        raise ValueError(reason)
    gpu = Gpu(torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index))
    with torch.cuda.device(gpu.device):
        return measure_on(gpu, model, batch, sizes, training, first_touch, seconds, notes)


def measure_on(
    gpu: Gpu | None,
    model: nn.Module,
    batch: Tensor | Sequence[Tensor],
    sizes: Iterable[int] | None,
    training: bool,
    first_touch: bool,
    seconds: float,
    notes: Sequence[str] = (),
    clock: timing.Clock = timing.CLOCK,
) -> Transfer:
    """`measure` on that GPU, or on the CPU alone, which is read by `clock`."""
    given = [batch] if isinstance(batch, Tensor) else list(batch)
    if not given or not all(isinstance(tensor, Tensor) for tensor in given):
        raise TypeError("batch needs to be a tensor, or several that are the model's arguments")
    given = [tensor.detach().cpu().contiguous() for tensor in given]
    if not given[0].dim() or not len(given[0]):
        raise ValueError(f"batch is of shape {tuple(given[0].shape)}; it needs to have rows")
    rows = len(given[0])
    wanted = {max(1, round(part * rows)) for part in LADDER} if sizes is None else set(sizes)
    if any(not isinstance(size, int) or size < 1 for size in wanted):
        raise ValueError(f"sizes is {sorted(wanted)}; it needs to be whole numbers of rows, 1 or more")
    if training and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("training is True, and no parameter of the model requires a gradient; set training=False")
    notes = list(notes)
    link = memory = first = None
    if gpu is not None:
        link, memory = gpu.link(), gpu.memory()
        if first_touch:
            try:
                first = gpu.first_touch(model, given)
            except RuntimeError as error:
                notes.append(f"first touch: {first_line(error)}")
    points: list[Point] = []
    try:
        for size in sorted(wanted | {rows}):
            points.append(_point(gpu, model, _take(given, size), training, seconds, clock))
    except torch.OutOfMemoryError as error:
        if not points or points[-1].rows < rows:  # what was asked about
            raise
        notes.append(f"{_rows(size)} and more: {first_line(error)}")
    return Transfer(
        network=_describe(model, given),
        rows=rows,
        training=training,
        cpu=f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch",
        gpu=None if gpu is None else gpu.name,
        link=link,
        memory=memory,
        first_touch=first,
        points=tuple(points),
        notes=tuple(notes),
    )


def _take(batch: Sequence[Tensor], size: int) -> list[Tensor]:
    """So many rows, over and over; tensors without those rows stay as they are."""
    rows = len(batch[0])
    order = torch.arange(size) % rows
    return [tensor[order] if tensor.dim() and len(tensor) == rows else tensor for tensor in batch]


def _is_wide(tensor: Tensor) -> bool:
    """Whether 16 bits would be fewer bytes."""
    return tensor.is_floating_point() and tensor.itemsize > 2


def _describe(model: nn.Module, batch: Sequence[Tensor]) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    inputs = ", ".join(f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in batch)
    return f"{type(model).__name__}, {parameters:,} parameters, input {inputs}"


def _point(
    gpu: Gpu | None, model: nn.Module, batch: Sequence[Tensor], training: bool, seconds: float, clock: timing.Clock
) -> Point:
    work = Work(model, training, "cpu")
    outputs = work.forward(batch)
    found = {name: timing.time_host(timed, seconds, clock) for name, timed in work.calls([batch]).items()}
    parameters = sum(parameter.nbytes for parameter in work.model.parameters())
    bytes_in, bytes_out = (sum(tensor.nbytes for tensor in tensors) for tensors in (batch, outputs))
    on_gpu = None
    if gpu is not None:
        read: dict[str, Any] = {}
        for name, timed in gpu.calls(model, batch, training).items():
            reader = timing.time_host if name == "staging" else timing.time_loop if name in LOOPS else timing.time_apart
            read[name] = reader(timed, seconds, gpu.clock)
        on_gpu = OnGpu(**{"backward": None, "narrowed": None, **read})
    return Point(
        rows=len(batch[0]),
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        least=(bytes_in + bytes_out + parameters, bytes_in + bytes_out + 2 * parameters),
        cpu=OnCpu(found["forward"], found.get("backward"), found["resident"]),
        gpu=on_gpu,
    )


# The command

DIMS = (784, 512, 512, 10)
BATCH = (64, 256, 1024)
ACTIVATION = "relu"


@dataclass(frozen=True)
class Config:
    """What `mlp-fused transfer` is told: one field for each of its flags.

    Attributes:
        dims: the network's widths from the input to the output; None for 784 512 512 10.
        checkpoint: the network of a checkpoint of `mlp-fused train`, instead.
        activation: after every hidden layer of `dims`, by name; None for relu.
        batch: the batch sizes; the largest is the one that is taken apart.
        dtype: of parameters and inputs.
        inference: forward and the output copied back, instead of forward and backward.
        device: a torch device; "auto" for a CUDA GPU where there is one, else the CPU.
        json: print JSON instead of the table.
        plot: a file to draw into, .png or .svg.

    Raises:
        UserError: a value that cannot be used.
    """

    dims: tuple[int, ...] | None = None
    checkpoint: str | None = None
    activation: str | None = None
    batch: tuple[int, ...] = BATCH
    dtype: DtypeName = "fp32"
    inference: bool = False
    device: str = "auto"
    json: bool = False
    plot: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch", tuple(self.batch))
        if self.dims is not None:
            object.__setattr__(self, "dims", tuple(self.dims))
            if len(self.dims) < 2 or min(self.dims) < 1:
                shown = " ".join(map(str, self.dims)) or "empty"
                raise UserError(f"--dims is {shown}; it needs to be two widths or more, each 1 or more, such as 784 10")
        for name in ("dims", "activation"):
            if self.checkpoint is not None and getattr(self, name) is not None:
                raise UserError(f"--{name} and --checkpoint are two networks; it needs to be one of them")
        if not self.batch or min(self.batch) < 1:
            raise UserError(f"--batch is {' '.join(map(str, self.batch)) or 'empty'}; it needs to be 1 or more")
        if self.dtype not in get_args(DtypeName):
            raise UserError(f"--dtype is {self.dtype}; it needs to be one of {', '.join(get_args(DtypeName))}")
        try:
            resolve(self.activation, "--activation")
        except ValueError as error:
            raise UserError(str(error)) from None


def run(config: Config, *, report: Callable[[str], None] = print) -> Transfer:
    """Measure as configured.

    Args:
        config: what to do.
        report: is given what a user wants to read.

    Raises:
        UserError: a mistake that the user can mend.
    """
    path = None if config.plot is None else _check_plot(Path(config.plot))
    device = pick_device(config.device)
    model = _network(config)
    width = next(model.parameters()).shape[1]
    asked = None if config.device == "auto" and device.type == "cpu" else device
    try:
        batch = torch.randn(max(config.batch), width, dtype=DTYPES[config.dtype])
        found = measure(model, batch, sizes=config.batch, training=not config.inference, device=asked)
    except (ValueError, RuntimeError) as error:  # of torch: out of memory, a kind of device that is not measured
        raise UserError(first_line(error)) from None
    report(json.dumps(found.as_dict(), indent=2) if config.json else str(found))
    if path is not None:
        from ..plots import draw

        try:
            draw(found, path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; what was there before is as it was") from None
        if not config.json:
            report(f"drawn into {path}")
    return found


def _network(config: Config) -> FusedMLP:
    if config.checkpoint is None:
        first, *rest = config.dims or DIMS
        try:
            model: Any = FusedMLP(first, rest, activation_layer=config.activation or ACTIVATION)
        except RuntimeError as error:
            shown = " ".join(map(str, config.dims or DIMS))
            raise UserError(f"--dims {shown} makes no network here: {first_line(error)}") from None
    else:
        trained = make_model(config.checkpoint, load_checkpoint(config.checkpoint), backend=None)
        model = trained.get_submodule("network")
    return model.to(DTYPES[config.dtype])


def _check_plot(path: Path) -> Path:
    """Before minutes of measuring rather than after.

    Raises:
        UserError: no plot can be drawn there, or by nothing that is installed.
    """
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--plot is {path}; it needs to be a name that ends in .png or .svg")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError('--plot needs matplotlib, which is not installed: pip install "mlp_fused[plot]"') from None
    if path.is_dir():
        raise UserError(f"--plot {path} is a folder; it needs to be a file")
    try:
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write into {path.resolve().parent}, the folder of --plot: {error.strerror}") from None
    return path
