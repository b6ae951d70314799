"""`mlp_fused.transfer`: its arithmetic, and its measuring on a simulated GPU of stated link, launch and kernels."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mlp_fused import timing
from mlp_fused.environment import DISTORTING
from mlp_fused.module import FusedMLP
from mlp_fused.prefetch import DevicePrefetcher
from mlp_fused.timing import Link, Measured, Spread, Timed
from mlp_fused.transfer import findings, first_touch, measurement
from mlp_fused.transfer.findings import Crossing, OnCpu, OnGpu, Point, Transfer, crossing, hidden
from mlp_fused.transfer.first_touch import FirstTouch
from mlp_fused.transfer.measurement import measure, measure_on

GB = 1e9


def exact(ms: float) -> Spread:
    return Spread(ms, ms, ms, 9)


def both(ms: float) -> Measured:
    return Measured(exact(ms), exact(ms), exact(ms))


# Arithmetic


@given(st.floats(2, 5000), st.floats(-0.5, 0.9), st.floats(0.91, 2.0))
def test_where_two_power_laws_cross_is_found_exactly(rows: float, slope: float, steeper: float) -> None:
    sizes = [1, 7, 100, 6000]
    found = crossing(
        sizes, [exact((size / rows) ** steeper) for size in sizes], [exact((size / rows) ** slope) for size in sizes]
    )
    assert found.rows == pytest.approx(rows)
    assert found.low == found.high == found.rows


def test_the_range_of_a_crossing_is_that_of_the_spread() -> None:
    sizes = [1, 10, 100, 1000]
    cpu = [Spread(size, size / 1.2, size * 1.2, 9) for size in sizes]
    gpu = [Spread(50, 40, 60, 9)] * 4
    found = crossing(sizes, cpu, gpu)
    assert found == Crossing(pytest.approx(50), pytest.approx(40 / 1.2), pytest.approx(60 * 1.2), (1, 1000))
    assert str(found) == "from about 50 rows on (33 to 72)"


@pytest.mark.parametrize(
    ("cpu", "rows", "text"),
    [
        ([2, 3], 0, "at every batch size measured, from 1 row on"),
        ([0.5, 1.0], math.inf, "at no batch size measured, up to 10 rows"),
        ([2, 0.5], math.inf, "at no batch size measured"),
    ],
    ids=["always", "never", "no longer"],
)
def test_a_crossing_outside_of_what_was_measured_is_not_made_up(cpu: list[float], rows: float, text: str) -> None:
    found = crossing([1, 10], [exact(ms) for ms in cpu], [exact(1)] * 2)
    assert found.rows == rows
    assert str(found).startswith(text)


def test_a_crossing_outside_says_what_the_spread_allows() -> None:
    spread = [Spread(1.1, 0.9, 1.3, 9), Spread(20, 19, 21, 9)]
    found = crossing([10, 1000], spread, [exact(1)] * 2)
    assert (found.rows, found.low) == (0, 0)
    perhaps = f"(by the spread perhaps only from {found.high:,.0f} on)"
    assert str(found) == f"at every batch size measured, from 10 rows on {perhaps}"
    behind = [Spread(0.1, 0.05, 0.2, 9), Spread(0.9, 0.5, 1.2, 9)]
    found = crossing([10, 1000], behind, [exact(1)] * 2)
    assert str(found) == (
        f"at no batch size measured, up to 1,000 rows (by the spread perhaps from {found.low:,.0f} on)"
    )
    assert str(Crossing(0, 0, math.inf, (1, 2))).endswith("(by the spread perhaps only at none)")
    assert str(Crossing(math.inf, 0, math.inf, (1, 2))).endswith("(by the spread perhaps at every one)")


def test_the_gpu_wins_for_good_from_the_last_crossing_on() -> None:
    found = crossing([1, 10, 100, 1000], [exact(ms) for ms in (2, 0.5, 0.5, 2)], [exact(1)] * 4)
    assert found.rows == pytest.approx(math.sqrt(100 * 1000))


def test_ends_of_a_range_may_lie_outside_of_what_was_measured() -> None:
    cpu = [Spread(0.9, 0.5, 1.5, 9), Spread(1.1, 0.7, 1.6, 9)]
    found = crossing([10, 1000], cpu, [exact(1)] * 2)
    assert (found.low, found.high) == (0, math.inf)
    assert str(found).endswith("rows on (below the smallest to above the largest)")


@pytest.mark.parametrize(
    ("copied", "computed", "together", "part"),
    [(2, 3, 5, 0), (2, 3, 3, 1), (3, 2, 3, 1), (2, 3, 4, 0.5), (2, 3, 6, 0), (2, 3, 2.9, 1), (0, 3, 3, 1)],
)
def test_overlap(copied: float, computed: float, together: float, part: float) -> None:
    assert hidden(copied, computed, together) == pytest.approx(part)


def on_gpu(**changes: Any) -> OnGpu:
    """Times in which nothing is worth any advice, but for the changes."""
    usual = OnGpu(
        pageable=both(0.01),
        pinned=both(0.01),
        non_blocking=both(0.01),
        to_host=both(0.01),
        staging=exact(0.01),
        launch=both(0.01),
        forward=Measured(exact(4), exact(4.1), exact(0.2)),
        backward=Measured(exact(6), exact(6.1), exact(0.3)),
        resident=exact(10),
        step=exact(10.01),
        prefetched=exact(10),
        non_waiting=exact(10),
        narrowed=None,
    )
    return dataclasses.replace(usual, **changes)


def found_with(gpu: OnGpu | None, cpu_ms: float = 1000, **changes: Any) -> Transfer:
    cpu = OnCpu(exact(cpu_ms / 3), exact(2 * cpu_ms / 3), exact(cpu_ms))
    fast = None if gpu is None else on_gpu()
    points = tuple(Point(rows, 4 * rows, rows, (rows, rows), cpu, fast) for rows in (8, 16))
    point = Point(32, 128, 32, (32, 32), cpu, gpu)
    usual = Transfer("MLP", 32, True, "CPU", "GPU", Link(GB, GB), GB, None, (*points, point), ())
    return dataclasses.replace(usual, **changes)


def test_what_bounds_a_step() -> None:
    slow = Measured(exact(1), exact(20), exact(20))
    assert on_gpu().bound == "kernel"
    assert on_gpu(forward=slow).bound == "launch"
    assert on_gpu(non_blocking=both(30)).bound == "copy"
    assert on_gpu(backward=None).kernels == exact(4)
    copied = on_gpu(pageable=both(25), non_blocking=both(30), step=exact(50))
    assert found_with(copied).bounds == (
        "of a step of 32 rows as usually written, 50 ms, the copy is 25 ms (50%); prefetched it is bound by the copy "
        "to the device: copy 30 ms, launch 500 µs, kernel 10 ms"
    )


ADVICE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "nothing": ({}, {}, "nothing: all but 0% of a step is the network's own work"),
    "stay": (
        {},
        {"cpu_ms": 2},
        "stay on the CPU at 32 rows: a step takes 2 ms there and 10 ms on the GPU, which wins at no batch size",
    ),
    "larger": (
        {"forward": Measured(exact(1), exact(20), exact(20)), "resident": exact(20), "step": exact(20)},
        {"points": ()},
        "take a larger batch: the device works 7 ms of the 20.3 ms that the host takes to launch it; ",
    ),
    "pin": (
        {"step": exact(12), "non_waiting": exact(11), "prefetched": exact(11.5)},
        {},
        "pin the batch in the loader (DataLoader's pin_memory=True), and copy it with non_blocking=True: a step takes "
        "11 ms, not 12 ms",
    ),
    "prefetch": (
        {"step": exact(14), "non_waiting": exact(13), "non_blocking": both(4), "prefetched": exact(11)},
        {},
        "prefetch (mlp_fused.DevicePrefetcher) from a loader that pins (DataLoader's pin_memory=True): a step takes 11 "
        "ms, not 14 ms; 75% of what",
    ),
    "16 bits": (
        {"step": exact(30), "non_waiting": exact(25), "prefetched": exact(20), "narrowed": exact(12)},
        {},
        "keep the loader's data in 16 bits, prefetch them, and widen them on the GPU or compute under torch.autocast: "
        "half the bytes, 12 ms instead of 20 ms a step",
    ),
    "keep": (
        {"step": exact(30), "non_waiting": exact(25), "prefetched": exact(20)},
        {},
        "keep the data on the GPU where they fit: a step on data that are there takes 10 ms instead of 20 ms",
    ),
}


@pytest.mark.parametrize(("gpu", "rest", "sentence"), ADVICE.values(), ids=ADVICE)
def test_advice_is_given_where_it_saves_something(gpu: dict[str, Any], rest: dict[str, Any], sentence: str) -> None:
    if "points" in rest:
        points = found_with(on_gpu(**gpu)).points[-1:]
        rest = {"points": points}
    advice = found_with(on_gpu(**gpu), **rest).advice
    assert any(each.startswith(sentence) for each in advice), advice
    begin = sentence.split()[0]
    assert begin == "nothing:" or not any(each.startswith(begin) for each in found_with(on_gpu()).advice)


@pytest.mark.parametrize("narrowed", [None, exact(19.9)], ids=["none", "no faster"])
def test_16_bits_are_no_advice_where_they_were_not_faster(narrowed: Spread | None) -> None:
    gpu = on_gpu(step=exact(30), non_blocking=both(20), non_waiting=exact(25), prefetched=exact(20), narrowed=narrowed)
    assert not any("16 bits" in each for each in found_with(gpu).advice)


@given(*[st.floats(0.01, 1000)] * 4)
def test_the_choice_is_the_fastest_or_as_good_and_simpler(cpu: float, step: float, pinned: float, ahead: float) -> None:
    found = found_with(on_gpu(step=exact(step), non_waiting=exact(pinned), prefetched=exact(ahead)), cpu_ms=cpu)
    times = {"cpu": cpu, "step": step, "non_waiting": pinned, "prefetched": ahead}
    least = min(times.values())
    assert times[found.choice] <= (1 + findings.GAIN) * least
    simpler = list(times)[: list(times).index(found.choice)]
    assert all(times[name] > (1 + findings.GAIN) * least for name in simpler)
    begins = {"cpu": "stay on the CPU", "non_waiting": "pin the batch", "prefetched": "prefetch"}
    given_advice = any(each.startswith(begins.get(found.choice, "no such")) for each in found.advice)
    assert given_advice == (found.choice in begins)


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0.0021, "2.1 µs"), (0.5, "500 µs"), (1, "1 ms"), (12.34, "12.3 ms"), (2500, "2.5 s"), (1.25e6, "1250 s")],
)
def test_times_are_written_with_three_digits(ms: float, text: str) -> None:
    assert findings._time(ms) == text


# Measuring, simulated


class Clock(timing.Clock):
    """A host, a device and a link side by side, in seconds."""

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
        """A kernel: the host takes `issue` to launch it, the device `work`."""
        self.host += issue
        self.device = max(self.device, self.host) + work


@dataclass
class Simulated:
    """A GPU, its link and the CPU beside it: bytes/s, seconds, seconds a row."""

    link: float = 50 * GB
    pageable: float = 10 * GB  # also the host's own copy into pinned memory
    launch: float = 10e-6
    latency: float = 5e-6
    gpu_row: float = 20e-9
    cpu_row: float = 2e-6


class Network(nn.Module):
    """(M, 1000) -> (M, 10); takes the simulated CPU its time."""

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

    def __init__(self, clock: Clock, speeds: Simulated) -> None:
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
            "staging": Timed(lambda _: clock_forward(clock, nbytes / speeds.pageable)),
            "launch": Timed(lambda _: clock.run(speeds.launch, 1e-6)),
            "forward": Timed(lambda _: compute(1)),
            "backward": Timed(lambda _: compute(1), setup=lambda _: compute(1)),
            "resident": Timed(lambda _: compute(2)),
            "step": Timed(step),
            "prefetched": Timed(prefetched),
            "non_waiting": Timed(non_waiting),
            "narrowed": Timed(lambda i: prefetched(i, nbytes / 2)),
        }


def clock_forward(clock: Clock, seconds: float) -> None:
    clock.host += seconds


SIZES = (16, 64, 256, 1024, 4096)


def simulate(speeds: Simulated, rows: int = 1024, gpu: bool = True, training: bool = True) -> Transfer:
    clock = Clock()
    model = Network(clock, speeds.cpu_row)
    simulated = SimulatedGpu(clock, speeds) if gpu else None
    return measure_on(simulated, model, torch.randn(rows, 1000), SIZES, training, True, 0.01, ["a reason"], clock)


def test_every_part_is_read_off_the_right_clock() -> None:
    speeds = Simulated()
    found = simulate(speeds)
    assert found.at_rows.gpu is not None
    gpu, nbytes = found.at_rows.gpu, 1024 * 1000 * 4
    assert found.at_rows.bytes_in == nbytes
    assert found.at_rows.bytes_out == 1024 * 10 * 4
    assert gpu.non_blocking.device.ms == pytest.approx(1e3 * nbytes / speeds.link)
    assert gpu.non_blocking.returned.ms == pytest.approx(1e3 * speeds.latency)
    assert gpu.pinned.returned.ms == gpu.pinned.host.ms == pytest.approx(1e3 * (nbytes / speeds.link + speeds.latency))
    assert gpu.pageable.host.ms == pytest.approx(1e3 * (nbytes / speeds.pageable + speeds.latency))
    assert gpu.staging.ms == pytest.approx(1e3 * nbytes / speeds.pageable)
    assert gpu.launch.returned.ms == pytest.approx(1e3 * speeds.launch)
    assert gpu.forward.device.ms == pytest.approx(1e3 * speeds.gpu_row * 1024)
    assert gpu.forward.host.ms == pytest.approx(1e3 * (speeds.launch + speeds.gpu_row * 1024))
    assert gpu.kernels.ms == pytest.approx(2e3 * speeds.gpu_row * 1024)
    assert gpu.issued.ms == pytest.approx(2e3 * speeds.launch)
    assert gpu.resident.ms == pytest.approx(2e3 * speeds.gpu_row * 1024, rel=0.02)
    assert found.at_rows.cpu.forward.ms == pytest.approx(1e3 * speeds.cpu_row * 1024)
    assert gpu.bound == "copy"


def test_the_crossing_is_where_the_stated_speeds_put_it() -> None:
    """Of a CPU of 2 µs a row and a GPU whose step costs 100 µs and next to nothing a row: 50 rows."""
    found = simulate(Simulated(link=1e18, pageable=1e18, launch=50e-6, latency=0.0, gpu_row=1e-15))
    assert found.crossings["resident"].rows == pytest.approx(50, rel=0.01)
    assert found.crossings["step"].rows == pytest.approx(50, rel=0.05)
    bound = [point.gpu.bound for point in found.points if point.gpu]
    assert bound == ["launch"] * len(SIZES)


def test_a_gpu_behind_a_slow_link_does_not_win() -> None:
    found = simulate(Simulated(link=1 * GB, pageable=0.5 * GB))
    assert found.crossings["step"].rows == math.inf
    assert found.crossings["resident"].rows == pytest.approx(16, abs=16)
    assert found.advice[0].startswith("stay on the CPU at 1,024 rows")
    assert any(each.startswith("keep the data on the GPU") for each in found.advice)


def test_prefetching_hides_the_copy() -> None:
    slow = Simulated(gpu_row=500e-9)
    found = simulate(slow).at_rows.gpu
    assert found is not None
    assert found.bound == "kernel"
    assert found.prefetched.ms == pytest.approx(found.resident.ms, rel=0.1)
    assert found.hidden > 0.9


def test_the_table_has_every_part() -> None:
    text = str(simulate(Simulated()))
    for part in (
        "simulated",
        "context         300 ms",
        "first forward      4 s  kernels compiled",
        "50 ms  kernels loaded from Triton's cache",
        "copy to the device, pageable",
        "pinned, non_blocking",
        "copy of the output to the host",
        "launch of a kernel",
        "forward, its kernels",
        "backward, its kernels",
        "into pinned memory, by the host",
        "step on the CPU",
        "ceilings: to the device 50.0 GB/s",
        "of the forward's",
        "of a step of 1,024 rows as usually written, ",
        "; prefetched it is bound by the copy to the device: copy 81.9 µs",
        "pinned copy",
        "the GPU wins over this CPU, prefetched: ",
        "- prefetch (mlp_fused.DevicePrefetcher) from",
        "not measured: a reason",
    ):
        assert part in text
    (pinned,) = (line for line in text.splitlines() if "pinned, non_blocking" in line)
    assert pinned.split()[-2:] == ["50.0", "100%"]
    assert max(map(len, text.splitlines())) < 180


def test_a_record_as_json() -> None:
    found = simulate(Simulated(link=1 * GB, pageable=0.5 * GB))
    again = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert again["crossings"]["step"]["rows"] is None
    assert (again["bound"], again["choice"], again["bounds"]) == ("copy", "cpu", found.bounds)
    assert again["rates"]["pinned"] == pytest.approx([1.0, 1.0], rel=1e-2)
    assert set(again["rates"]) == {"pageable", "pinned", "non_blocking", "to_host", "forward", "backward"}
    assert again["points"][3]["gpu"]["pinned"]["host"]["ms"] == found.at_rows.gpu.pinned.host.ms  # type: ignore[union-attr]
    assert again["advice"] == found.advice


def test_without_a_gpu_the_cpu_is_measured_and_the_rest_is_said_to_be_missing() -> None:
    found = simulate(Simulated(), gpu=False)
    assert [point.rows for point in found.points] == list(SIZES)
    assert [point.cpu.step.ms for point in found.points] == pytest.approx([2e-3 * size for size in SIZES], rel=0.01)
    assert (found.gpu, found.crossings, found.advice, found.bounds, found.explanation) == (None, {}, [], "", "")
    assert "GPU: none" in str(found)
    assert "not measured: a reason" in str(found)
    json.dumps(found.as_dict(), allow_nan=False)


def test_sizes_that_do_not_fit_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = SimulatedGpu.calls

    def fit(limit: int) -> None:
        def bounded(self: SimulatedGpu, model: nn.Module, batch: Sequence[Tensor], training: bool) -> dict[str, Timed]:
            if len(batch[0]) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")
            return calls(self, model, batch, training)

        monkeypatch.setattr(SimulatedGpu, "calls", bounded)

    fit(1024)
    found = simulate(Simulated())
    assert [point.rows for point in found.points] == [16, 64, 256, 1024]
    assert found.notes[-1] == "4,096 rows and more: CUDA out of memory. Tried"
    fit(1023)
    with pytest.raises(torch.OutOfMemoryError):  # of what was asked about
        simulate(Simulated())


def test_a_first_touch_that_cannot_be_measured_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> FirstTouch:
        raise RuntimeError("the model cannot be pickled: a lambda")

    monkeypatch.setattr(SimulatedGpu, "first_touch", fail)
    found = simulate(Simulated())
    assert found.first_touch is None
    assert "first touch: the model cannot be pickled: a lambda" in found.notes


# Measuring, on this CPU


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("training", [True, False])
def test_a_network_of_ones_own(training: bool) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"sum": self.b(self.a(x)) + y, "count": torch.tensor(len(x))}

    model = Sum()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = [torch.randn(8, 4, requires_grad=True), torch.randn(3)]
    found = measure(model, batch, sizes=[2, 32], training=training, seconds=0.001)
    assert [point.rows for point in found.points] == [2, 8, 32]
    assert found.at_rows.bytes_in == 4 * (8 * 4 + 3)
    assert (found.at_rows.cpu.backward is not None) is training
    assert found.at_rows.cpu.step.ms > 0
    assert "no GPU that torch" in found.notes[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


@pytest.mark.usefixtures("no_gpu")
def test_sizes_stand_around_the_batch() -> None:
    found = measure(nn.Linear(2, 2), torch.randn(32, 2), seconds=0.001)
    assert [point.rows for point in found.points] == [2, 8, 32, 128, 512]
    assert found.at_rows.bytes_in == 32 * 2 * 4


MISTAKES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no batch": (lambda: measure(nn.Linear(2, 2), []), TypeError, "batch needs to be a tensor, or several"),
    "no tensor": (lambda: measure(nn.Linear(2, 2), [1]), TypeError, "batch needs to be a tensor"),  # type: ignore[list-item]
    "no rows": (
        lambda: measure(nn.Linear(2, 2), torch.ones(0, 2)),
        ValueError,
        r"shape \(0, 2\); it needs to have rows",
    ),
    "a number": (lambda: measure(nn.Linear(2, 2), torch.ones(())), ValueError, r"shape \(\); it needs to have rows"),
    "sizes": (lambda: measure(nn.Linear(2, 2), torch.ones(2, 2), sizes=[0]), ValueError, r"sizes is \[0\]; it needs"),
    "frozen": (
        lambda: measure(nn.ReLU(), torch.ones(2, 2)),
        ValueError,
        "no parameter of the model requires a gradient; set training=False",
    ),
    "meta": (lambda: measure(nn.Linear(2, 2), torch.ones(2, 2), device="meta"), ValueError, "device is meta; it needs"),
    "cuda": (
        lambda: measure(nn.Linear(2, 2), torch.ones(2, 2), device="cuda"),
        ValueError,
        "device is cuda, and torch",
    ),
}


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("call", "error", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call: Callable[[], object], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()


@pytest.mark.parametrize("switch", DISTORTING)
def test_a_distorted_gpu_is_not_measured(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DISTORTING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(switch, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=f"{switch} is set, which .*: unset it to measure"):
        measure(nn.Linear(2, 2), torch.ones(2, 2))


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("backend", "count"), [("triton", 2), ("auto", 1)])
def test_distorted_times_of_a_cpu_are_marked(backend: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLP_FUSED_BACKEND", backend)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = measure(nn.Linear(2, 2), torch.ones(2, 2), sizes=[2], seconds=0.001)
    assert len(found.notes) == count
    assert ("not measured: times that mean something (" in str(found)) is (count == 2)


def test_the_calls_of_a_gpu_with_the_cpu_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but CUDA: each call does what it is named for, on the batch that it was given."""
    copied = []
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 4096)
    monkeypatch.setattr(Tensor, "copy_", lambda target, source, **_: copied.append(source))
    model, x = nn.Linear(4, 2), torch.randn(8, 4)
    seen: list[Tensor] = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    gpu = measurement.Gpu(torch.device("cpu"))
    for training in (True, False):
        calls = gpu.calls(model, [x], training)
        both_ways = {field.name for field in dataclasses.fields(OnGpu)}
        assert set(calls) == (both_ways if training else both_ways - {"backward"})
        assert calls["forward"].sets == 2 * 4096 // x.nbytes
        assert [name for name, timed in calls.items() if timed.drain is not None] == ["prefetched", "narrowed"]
        for name, timed in calls.items():
            copied.clear(), seen.clear()
            timed.prepare(3)
            timed(3)
            assert bool(copied) is (name in ("pageable", "pinned", "non_blocking", "staging"))
            assert len(seen) == (name in ("forward", "backward", *measurement.LOOPS))
            given = x.bfloat16().float() if name == "narrowed" else x
            assert all(torch.equal(each, given) for each in (*copied, *seen))
    assert all(parameter.grad is None for parameter in model.parameters())


# First touch


def test_the_model_goes_to_fresh_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def run(module: str, file: str, environment: dict[str, str]) -> dict[str, float]:
        assert module == "mlp_fused.transfer.first_touch"
        model, batch = torch.load(file, weights_only=False)
        assert isinstance(model, FusedMLP)
        seen.append((environment["TRITON_CACHE_DIR"], environment["CUDA_VISIBLE_DEVICES"], batch[0].shape))
        names = ("context", "allocation", "copy", "launch", "forward", "forward_2")
        return {name: len(seen) + i for i, name in enumerate(names)}

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    found = first_touch.in_fresh_processes(FusedMLP(3, [2]), [torch.ones(5, 3)], torch.device("cuda:1"), run)
    assert found == FirstTouch(2000, 3000, 4000, 5000, compiled=5000, loaded=6000, again=7000)
    assert seen[0] == seen[1]
    assert seen[0][1:] == ("6", (5, 3))


def test_a_model_that_cannot_be_pickled() -> None:
    model = nn.Linear(2, 2)
    model.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="^the model cannot be pickled: "):
        first_touch.in_fresh_processes(model, [torch.ones(1, 2)], torch.device("cuda:0"))


def test_a_network_of_the_running_script_has_to_move_into_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Network, "__module__", "__main__")
    model = nn.Sequential(nn.Linear(2, 2), Network(Clock(), 0.0))
    with pytest.raises(RuntimeError, match="^Network is defined in the script that runs, .*; define it in a module"):
        first_touch.in_fresh_processes(model, [torch.ones(1, 2)], torch.device("cuda:0"))


@pytest.mark.alone
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine on which the process fails")
def test_a_fresh_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="^the process failed: .*(CUDA|NVIDIA|GPU)"):
        first_touch.in_fresh_processes(nn.Linear(2, 2), [torch.ones(1, 2)], torch.device("cuda:0"))


# The plot

matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")


@matplotlib
@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "cpu"])
def test_the_plot(tmp_path: Path, suffix: str, gpu: bool) -> None:
    from mlp_fused.transfer.figure import draw

    path = tmp_path / f"plot{suffix}"
    draw(simulate(Simulated(), gpu=gpu), path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    assert len(content) > 5000
    assert list(tmp_path.iterdir()) == [path]


@matplotlib
def test_the_plot_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from mlp_fused.transfer.figure import draw

    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: figures.append(figure))
    found = simulate(Simulated(link=1e18, pageable=1e18, launch=50e-6, latency=0.0, gpu_row=1e-15))
    draw(found, tmp_path / "plot.png")
    (axes,) = figures[0].axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlabel() == "batch size (rows)"
    assert axes.get_ylabel() == "time of a step (milliseconds)"
    lines = {line.get_label(): line for line in axes.lines}
    cpu = lines["a step on this CPU"]
    assert list(cpu.get_xdata()) == list(SIZES)
    assert list(cpu.get_ydata()) == [point.cpu.step.ms for point in found.points]
    drawn = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert len({line.get_marker() for line in drawn}) == len(drawn) == 6
    assert len({line.get_color() for line in drawn}) == 6
    marked = [line.get_xdata()[0] for line in axes.lines if line.get_label().startswith("_")]
    assert marked == [found.crossings["step"].rows]
    assert any("the GPU wins" in text.get_text() for text in axes.texts)


@matplotlib
@pytest.mark.parametrize("points", [slice(1, 4), slice(1, 3), slice(3, 4)], ids=["64-to-1024", "64-to-256", "1024"])
@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "cpu"])
def test_both_axes_of_the_plot_have_three_labels_or_more(points: slice, gpu: bool) -> None:
    from mlp_fused.transfer.figure import step_figure

    found = simulate(Simulated(), gpu=gpu)
    figure = step_figure(dataclasses.replace(found, points=found.points[points]))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        shown = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high and t.label1.get_text()]
        assert len(shown) >= 3


@matplotlib
def test_a_plot_that_fails_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mlp_fused.transfer.figure import draw

    def fail(path: Path, content: bytes) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "plot.png").write_text("old")
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space"):
        draw(simulate(Simulated()), tmp_path / "plot.png")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


# On a GPU


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("training", [True, False])
def test_a_real_gpu(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure(FusedMLP(784, [512, 512, 10]), torch.randn(256, 784), sizes=[16, 4096], training=training)
    assert found.first_touch is not None, found.notes
    assert found.first_touch.context > 10
    assert found.first_touch.compiled > found.first_touch.again
    for point in found.points:
        assert point.gpu is not None
        assert (point.gpu.backward is not None) is training
        assert point.gpu.forward.device.ms <= 1.1 * point.gpu.forward.host.ms
        assert point.gpu.forward.returned.ms <= 1.1 * point.gpu.forward.host.ms
    assert found.points[-1].gpu is not None
    assert found.points[-1].gpu.prefetched.ms <= 1.2 * found.points[-1].gpu.step.ms
    assert found.crossings
    assert found.advice
    print(found)


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.usefixtures("device")
def test_pinned_copies_reach_the_links_ceiling() -> None:
    """At least 0.9 of it, for 64 MiB."""
    link, x = timing.link("cuda:0"), torch.randn(1 << 24)
    copied = timing.time_apart(measurement.copy_calls([x], torch.device("cuda"))["non_blocking"])
    assert x.nbytes / (1e-3 * copied.device.ms) >= 0.9 * link.to_device


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
def test_the_prefetchers_batches_are_the_steps() -> None:
    """What `prefetched` times computes on the batch, and not on what lay there before."""
    x = torch.randn(64, 8)
    (there,) = next(iter(DevicePrefetcher([[x]], "cuda")))
    assert torch.equal(there.cpu(), x)
