"""A simulated GPU with given speeds of link, launches and kernels, and transfers measured on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fused import timing
from mlp_fused.timing import Link, Measured, Spread, Timed
from mlp_fused.transfer import measurement
from mlp_fused.transfer.findings import Transfer
from mlp_fused.transfer.first_touch import FirstTouch
from mlp_fused.transfer.measurement import measure_on

GB = 1e9


def exact(ms: float) -> Spread:
    return Spread(ms, ms, ms, 9)


def both(ms: float) -> Measured:
    """A measurement in which every clock shows the same time."""
    return Measured(exact(ms), exact(ms), exact(ms))


class Clock(timing.Clock):
    """The clocks of a simulated host, device and link, in seconds."""

    def __init__(self) -> None:
        self.host = self.device = self.link = 0.0

    def __deepcopy__(self, memo: Any) -> Clock:
        return self

    def now(self) -> float:
        return self.host

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def event(self) -> float:
        return max(self.host, self.device)

    def elapsed_ms(self, start: float, end: float) -> float:
        return 1e3 * (end - start)

    def spin(self, seconds: float) -> None:
        self.run(1e-6, seconds)

    def run(self, issue: float, work: float) -> None:
        """Run a kernel: the host needs `issue` seconds to launch it, and the device `work` seconds to run it."""
        self.host += issue
        self.device = max(self.device, self.host) + work


@dataclass
class Speeds:
    """The speeds of a GPU, its link and a CPU, in bytes/s, seconds, and seconds per row."""

    link: float = 50 * GB
    pageable: float = 10 * GB  # also the host's own copy into pinned memory
    launch: float = 10e-6
    latency: float = 5e-6
    gpu_row: float = 20e-9
    cpu_row: float = 2e-6


class Network(nn.Module):
    """A network (M, 1000) -> (M, 10) that advances the clock of the simulated CPU."""

    def __init__(self, clock: Clock, row: float) -> None:
        super().__init__()
        self.inner = nn.Linear(10, 10)
        self.clock = clock
        self.row = row

    def forward(self, x: Tensor) -> Tensor:
        self.clock.host += self.row * len(x)
        return self.inner(x[:, :10])


class SimulatedGpu(measurement.Gpu):
    name = "simulated"

    def __init__(self, clock: Clock, speeds: Speeds) -> None:
        self.clock: Any = clock
        self.speeds = speeds
        self.touched = FirstTouch(300, 1, 2, 3, 4000, 50, 0.1)

    def link(self) -> Link:
        return Link(self.speeds.link, self.speeds.link)

    def memory(self) -> float:
        return 4000 * GB

    def first_touch(self, model: nn.Module, batch: Sequence[Tensor]) -> FirstTouch:
        return self.touched

    def calls(self, model: nn.Module, batch: Sequence[Tensor], training: bool) -> dict[str, Timed]:
        clock, speeds = self.clock, self.speeds
        rows, nbytes = len(batch[0]), sum(tensor.nbytes for tensor in batch)

        def copy(rate: float, waits: bool) -> None:
            clock.run(speeds.latency, nbytes / rate)
            if waits:
                clock.synchronize()

        def compute(parts: int) -> None:
            clock.run(parts * speeds.launch, parts * speeds.gpu_row * rows)

        def step(_: int) -> None:
            copy(speeds.pageable, True)
            compute(2)

        def non_waiting(_: int) -> None:
            copy(speeds.link, False)
            compute(2)

        def prefetched(_: int, nbytes: float = nbytes) -> None:
            copied = clock.link = max(clock.host, clock.link) + nbytes / speeds.link
            clock.device = max(clock.device, copied)
            compute(2)

        return {
            "pageable": Timed(lambda _: copy(speeds.pageable, True), waits=True),
            "pinned": Timed(lambda _: copy(speeds.link, True), waits=True),
            "non_blocking": Timed(lambda _: copy(speeds.link, False)),
            "to_host": Timed(lambda _: copy(speeds.pageable, True), waits=True),
            "staging": Timed(lambda _: advance_host(clock, nbytes / speeds.pageable)),
            "launch": Timed(lambda _: clock.run(speeds.launch, 1e-6)),
            "forward": Timed(lambda _: compute(1)),
            "backward": Timed(lambda _: compute(1), setup=lambda _: compute(1)),
            "resident": Timed(lambda _: compute(2)),
            "step": Timed(step),
            "prefetched": Timed(prefetched),
            "non_waiting": Timed(non_waiting),
            "narrowed": Timed(lambda i: prefetched(i, nbytes / 2)),
        }


def advance_host(clock: Clock, seconds: float) -> None:
    clock.host += seconds


SIZES = (16, 64, 256, 1024, 4096)


def simulate(speeds: Speeds, rows: int = 1024, gpu: bool = True, training: bool = True) -> Transfer:
    clock = Clock()
    model = Network(clock, speeds.cpu_row)
    simulated = SimulatedGpu(clock, speeds) if gpu else None
    return measure_on(simulated, model, torch.randn(rows, 1000), SIZES, training, True, 0.01, ["a reason"], clock)
