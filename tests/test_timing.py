"""Clocks on a simulated device: the times of a call, of the device, and of the host."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlp_fused import DevicePrefetcher, timing
from mlp_fused.prefetch import use_up
from mlp_fused.timing import Spread, Timed


class SimulatedClock(timing.Clock):
    """A simulated host that issues work and a device that executes it, with times in seconds."""

    def __init__(self) -> None:
        self.host = 0.0
        self.free = 0.0  # when the device will have finished all its work

    def launch(self, issue: float, duration: float, *, waits: bool = False) -> None:
        """Issue work that takes the host `issue` seconds and the device `duration` seconds."""
        self.host += issue
        self.free = max(self.free, self.host) + duration
        if waits:
            self.synchronize()

    def now(self) -> float:
        return self.host

    def synchronize(self) -> None:
        self.host = max(self.host, self.free)

    def event(self) -> float:
        return max(self.host, self.free)

    def elapsed_ms(self, start: float, end: float) -> float:
        assert self.host >= end, "read before the device was waited for"
        return 1e3 * (end - start)

    def spin(self, seconds: float) -> None:
        self.launch(1e-6, seconds)


@pytest.fixture
def clock() -> SimulatedClock:
    return SimulatedClock()


@pytest.mark.parametrize(
    ("nbytes", "cache", "sets"),
    [(100, 0, 1), (100, 1000, 20), (2000, 1000, 1), (1999, 1000, 2), (1, 10**9, timing.MAX_SETS)],
)
def test_rotation_fills_the_cache_twice(nbytes: int, cache: int, sets: int) -> None:
    assert timing.rotation(nbytes, cache) == sets


def test_quartiles() -> None:
    assert timing.quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert timing.quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)


def test_a_spread_is_the_median_with_its_quartiles() -> None:
    assert Spread.from_readings(iter([5.0, 1.0, 2.0, 4.0, 3.0])) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread(3.0, 2.0, 4.0, 5) + Spread(1.0, 0.5, 3.0, 7) == Spread(4.0, 2.5, 7.0, 5)


def test_a_call_bound_by_the_device_has_one_time(clock: SimulatedClock) -> None:
    reading = timing.time_cuda(Timed(lambda _: clock.launch(10e-6, 500e-6)), clock=clock)
    assert reading.ms == reading.kernel_ms == pytest.approx(0.5, rel=0.03)


def test_a_call_bound_by_launches_has_two_times(clock: SimulatedClock) -> None:
    def call(_: int) -> None:
        for _ in range(4):
            clock.launch(10e-6, 2e-6)

    reading = timing.time_cuda(Timed(call), clock=clock)
    assert reading.ms == pytest.approx(0.040, rel=0.1)
    assert reading.kernel_ms == pytest.approx(0.008, rel=0.01)
    assert reading.calls > 1


def test_the_setup_is_not_timed(clock: SimulatedClock) -> None:
    timed = Timed(lambda _: clock.launch(10e-6, 300e-6), setup=lambda _: clock.launch(10e-6, 900e-6))
    reading = timing.time_cuda(timed, clock=clock)
    assert reading.ms == reading.kernel_ms == pytest.approx(0.3)
    assert reading.calls == 1
    assert timing.time_apart(timed, clock=clock).device.ms == pytest.approx(0.3)


def test_a_slow_call_is_read_three_times_only(clock: SimulatedClock) -> None:
    assert timing.time_cuda(Timed(lambda _: clock.launch(1e-3, 2.0)), clock=clock).rounds == 3


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_inputs_are_rotated(clock: SimulatedClock, where: str) -> None:
    used: Counter[int] = Counter()

    def call(i: int) -> None:
        used[i] += 1
        clock.launch(10e-6, 50e-6)

    timing.time_call(Timed(call, sets=3), where, clock=clock)
    assert set(used) == {0, 1, 2}
    assert max(used.values()) < 1.2 * min(used.values())


@pytest.mark.parametrize("kernels", [1, 20])
def test_times_of_device_and_host_without_waiting(clock: SimulatedClock, kernels: int) -> None:
    def call(_: int) -> None:
        for _ in range(kernels):
            clock.launch(10e-6, 4e-6)

    times = timing.time_apart(Timed(call), clock=clock)
    assert times.device.ms == pytest.approx(0.004 * kernels)
    assert times.returned.ms == pytest.approx(0.010 * kernels)
    assert times.host.ms == pytest.approx(0.010 * kernels + 0.004)
    assert min(times.device.readings, times.host.readings) >= 5


def test_a_call_that_waits_is_not_queued_behind_a_spin(clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "spin", None)
    times = timing.time_apart(Timed(lambda _: clock.launch(10e-6, 90e-6, waits=True), waits=True), clock=clock)
    assert times.returned.ms == times.host.ms == pytest.approx(0.1)
    assert times.device.ms == pytest.approx(0.1)  # the device waits until the host issues the copy


class SimulatedLink(SimulatedClock):
    """A simulated clock and link. It serves as DevicePrefetcher's streams, and copies a batch in `copy` seconds."""

    device, side = torch.device("cpu"), "side"

    def __init__(self, copy: float) -> None:
        super().__init__()
        self.seconds = copy
        self.linked = 0.0  # when the link will have finished all its copies

    def synchronize(self, event: Any = None) -> None:
        self.host = max(self.host, *([self.free, self.linked] if event is None else [event.at]))

    def event(self, **timing: Any) -> Any:
        return SimpleNamespace(at=0.0) if timing else super().event()

    def record(self, event: Any, stream: str) -> None:
        event.at = max(self.host, self.linked if stream == "side" else self.free)

    def wait(self, stream: str, event: Any) -> None:
        self.free = max(self.free, event.at)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.linked = max(self.host, self.linked) + self.seconds

    def current(self) -> str:
        return "consumer"

    def on_side(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return True

    def is_here(self, tensor: torch.Tensor) -> bool:
        return False

    def empty(self, *layout: Any) -> torch.Tensor:
        return torch.empty(0)

    def keep(self, *moved: Any) -> None: ...


@pytest.mark.parametrize("seconds", [0.01, 0.1])
@pytest.mark.parametrize(
    ("copy", "compute"),
    [(1e-3, 5e-4), (2.4e-3, 3e-4), (2.4e-3, 1.2e-3), (4.8e-3, 4e-3), (2e-2, 1e-2), (1e-3, 3e-3), (1e-5, 1e-5)],
)
def test_a_prefetching_loop_is_timed_without_earlier_copies(copy: float, compute: float, seconds: float) -> None:
    """The first batches may be copied before timing starts. They must not represent the others."""
    link = SimulatedLink(copy)
    prefetcher = DevicePrefetcher(itertools.repeat(torch.ones(1)), "cpu")
    prefetcher._streams = link  # type: ignore[assignment]
    batches = iter(prefetcher)

    def step(_: int) -> None:
        next(batches)
        link.launch(3e-5, compute)

    reading = timing.time_loop(Timed(step, drain=partial(use_up, batches)), seconds, link)
    assert reading.ms == pytest.approx(1e3 * max(copy, compute, 3e-5), rel=0.03)


def test_the_first_call_is_the_warm_up(clock: SimulatedClock) -> None:
    calls = iter(range(10**9))
    times = timing.time_apart(Timed(lambda _: clock.launch(1.0 if next(calls) == 0 else 10e-6, 1e-6)), clock=clock)
    assert times.returned.high == pytest.approx(0.010)
    calls = iter(range(10**9))
    reading = timing.time_host(Timed(lambda _: clock.launch(1.0 if next(calls) == 0 else 10e-6, 0)), clock=clock)
    assert reading.high == pytest.approx(0.010)


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.usefixtures("device")
def test_a_real_product_takes_the_device_longer_than_its_launch() -> None:
    a = torch.randn(4096, 4096, device="cuda")
    times = timing.time_apart(Timed(lambda _: a @ a))
    assert times.returned.ms < 0.5 * times.device.ms
    assert times.device.ms <= 1.05 * times.host.ms
