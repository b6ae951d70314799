"""`mlp_fused.transfer.measure`: on a simulated GPU of stated speeds, on this CPU, and on a real GPU."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from simulated_gpu import GB, SIZES, SimulatedGpu, Speeds, simulate
from torch import Tensor, nn

from mlp_fused import timing
from mlp_fused.environment import DISTORTING
from mlp_fused.module import FusedMLP
from mlp_fused.prefetch import DevicePrefetcher
from mlp_fused.timing import Timed
from mlp_fused.transfer import measurement
from mlp_fused.transfer.findings import OnGpu
from mlp_fused.transfer.first_touch import FirstTouch
from mlp_fused.transfer.measurement import measure


def test_every_part_is_timed_by_the_right_clock() -> None:
    speeds = Speeds()
    transfer = simulate(speeds)
    assert transfer.at_rows.gpu is not None
    gpu, nbytes = transfer.at_rows.gpu, 1024 * 1000 * 4
    assert transfer.at_rows.bytes_in == nbytes
    assert transfer.at_rows.bytes_out == 1024 * 10 * 4
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
    assert transfer.at_rows.cpu.forward.ms == pytest.approx(1e3 * speeds.cpu_row * 1024)
    assert gpu.bound == "copy"


def test_the_crossing_follows_from_the_simulated_speeds() -> None:
    """A CPU with 2 µs per row and a GPU with 100 µs per step cross at 50 rows."""
    transfer = simulate(Speeds(link=1e18, pageable=1e18, launch=50e-6, latency=0.0, gpu_row=1e-15))
    assert transfer.crossings["resident"].rows == pytest.approx(50, rel=0.01)
    assert transfer.crossings["step"].rows == pytest.approx(50, rel=0.05)
    bound = [point.gpu.bound for point in transfer.points if point.gpu]
    assert bound == ["launch"] * len(SIZES)


def test_a_gpu_behind_a_slow_link_does_not_win() -> None:
    transfer = simulate(Speeds(link=1 * GB, pageable=0.5 * GB))
    assert transfer.crossings["step"].rows == math.inf
    assert transfer.crossings["resident"].rows == pytest.approx(16, abs=16)
    assert transfer.advice[0].startswith("stay on the CPU at 1,024 rows")
    assert any(line.startswith("keep the data on the GPU") for line in transfer.advice)


def test_prefetching_hides_the_copy() -> None:
    slow = Speeds(gpu_row=500e-9)
    gpu = simulate(slow).at_rows.gpu
    assert gpu is not None
    assert gpu.bound == "kernel"
    assert gpu.prefetched.ms == pytest.approx(gpu.resident.ms, rel=0.1)
    assert gpu.hidden > 0.9


def test_without_a_gpu_only_the_cpu_is_measured() -> None:
    transfer = simulate(Speeds(), gpu=False)
    assert [point.rows for point in transfer.points] == list(SIZES)
    assert [point.cpu.step.ms for point in transfer.points] == pytest.approx([2e-3 * size for size in SIZES], rel=0.01)
    assert (transfer.gpu, transfer.crossings, transfer.advice) == (None, {}, [])
    assert (transfer.bounds, transfer.explanation) == ("", "")
    assert "GPU: none" in str(transfer)
    assert "not measured: a reason" in str(transfer)
    json.dumps(transfer.as_dict(), allow_nan=False)


def test_sizes_that_do_not_fit_give_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = SimulatedGpu.calls

    def fit(limit: int) -> None:
        def bounded(self: SimulatedGpu, model: nn.Module, batch: Sequence[Tensor], training: bool) -> dict[str, Timed]:
            if len(batch[0]) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")
            return calls(self, model, batch, training)

        monkeypatch.setattr(SimulatedGpu, "calls", bounded)

    fit(1024)
    transfer = simulate(Speeds())
    assert [point.rows for point in transfer.points] == [16, 64, 256, 1024]
    assert transfer.notes[-1] == "4,096 rows and more: CUDA out of memory. Tried"
    fit(1023)
    with pytest.raises(torch.OutOfMemoryError):  # the requested batch itself does not fit
        simulate(Speeds())


def test_an_unmeasurable_first_touch_gives_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> FirstTouch:
        raise RuntimeError("the model cannot be pickled: a lambda")

    monkeypatch.setattr(SimulatedGpu, "first_touch", fail)
    transfer = simulate(Speeds())
    assert transfer.first_touch is None
    assert "first touch: the model cannot be pickled: a lambda" in transfer.notes


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("training", [True, False])
def test_a_users_own_network(training: bool) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"sum": self.b(self.a(x)) + y, "count": torch.tensor(len(x))}

    model = Sum()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = [torch.randn(8, 4, requires_grad=True), torch.randn(3)]
    transfer = measure(model, batch, sizes=[2, 32], training=training, seconds=0.001)
    assert [point.rows for point in transfer.points] == [2, 8, 32]
    assert transfer.at_rows.bytes_in == 4 * (8 * 4 + 3)
    assert (transfer.at_rows.cpu.backward is not None) is training
    assert transfer.at_rows.cpu.step.ms > 0
    assert "can use no GPU here" in transfer.notes[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


@pytest.mark.usefixtures("no_gpu")
def test_sizes_surround_the_batch() -> None:
    transfer = measure(nn.Linear(2, 2), torch.randn(32, 2), seconds=0.001)
    assert [point.rows for point in transfer.points] == [2, 8, 32, 128, 512]
    assert transfer.at_rows.bytes_in == 32 * 2 * 4


MISTAKES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no batch": (lambda: measure(nn.Linear(2, 2), []), TypeError, "batch needs to be a tensor or a sequence of"),
    "no tensor": (lambda: measure(nn.Linear(2, 2), [1]), TypeError, "batch needs to be a tensor"),  # type: ignore[list-item]
    "no rows": (
        lambda: measure(nn.Linear(2, 2), torch.ones(0, 2)),
        ValueError,
        r"shape \(0, 2\); it needs at least one row",
    ),
    "a number": (lambda: measure(nn.Linear(2, 2), torch.ones(())), ValueError, r"shape \(\); it needs at least one"),
    "sizes": (lambda: measure(nn.Linear(2, 2), torch.ones(2, 2), sizes=[0]), ValueError, r"sizes is \[0\]; it needs"),
    "frozen": (
        lambda: measure(nn.ReLU(), torch.ones(2, 2)),
        ValueError,
        "no parameter of the model requires a gradient; set training=False",
    ),
    "meta": (lambda: measure(nn.Linear(2, 2), torch.ones(2, 2), device="meta"), ValueError, "device is meta; it needs"),
    "no device": (
        lambda: measure(nn.Linear(2, 2), torch.ones(2, 2), device="xyz"),
        ValueError,
        "device is 'xyz'; it needs to be a CUDA or ROCm GPU, or cpu",
    ),
    "an index": (
        lambda: measure(nn.Linear(2, 2), torch.ones(2, 2), device=0),  # type: ignore[arg-type]
        ValueError,
        "device is 0; it needs",
    ),
    "cuda": (
        lambda: measure(nn.Linear(2, 2), torch.ones(2, 2), device="cuda"),
        ValueError,
        "device is cuda, but torch",
    ),
}


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("call", "error", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_wrong_arguments_are_refused(call: Callable[[], object], error: type[Exception], sentence: str) -> None:
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
    transfer = measure(nn.Linear(2, 2), torch.ones(2, 2), sizes=[2], seconds=0.001)
    assert len(transfer.notes) == count
    assert ("not measured: undistorted times (" in str(transfer)) is (count == 2)


def test_the_calls_for_a_gpu_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call does what its name says, on its batch. Only CUDA is not tested here."""
    copied = []
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    monkeypatch.setattr(Tensor, "copy_", lambda target, source, **_: copied.append(source))
    model, x = nn.Linear(4, 2), torch.randn(8, 4)
    seen: list[Tensor] = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    gpu = measurement.Gpu(torch.device("cpu"), cache_bytes=lambda device: 4096)
    for training in (True, False):
        calls = gpu.calls(model, [x], training)
        fields = {field.name for field in dataclasses.fields(OnGpu)}
        assert set(calls) == (fields if training else fields - {"backward"})
        assert calls["forward"].sets == 2 * 4096 // x.nbytes
        assert [name for name, timed in calls.items() if timed.drain is not None] == ["prefetched", "narrowed"]
        for name, timed in calls.items():
            copied.clear(), seen.clear()
            timed.prepare(3)
            timed(3)
            assert bool(copied) is (name in ("pageable", "pinned", "non_blocking", "staging"))
            assert len(seen) == (name in ("forward", "backward", *measurement.LOOPS))
            expected = x.bfloat16().float() if name == "narrowed" else x
            assert all(torch.equal(tensor, expected) for tensor in (*copied, *seen))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_16_bit_copies_are_measured_only_for_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    gpu = measurement.Gpu(torch.device("cpu"), cache_bytes=lambda device: 4096)
    calls = gpu.calls(nn.Linear(4, 2, dtype=dtype), [torch.randn(8, 4, dtype=dtype)], training=True)
    assert "prefetched" in calls
    assert "narrowed" not in calls


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("training", [True, False])
def test_a_real_gpu(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    transfer = measure(FusedMLP(784, [512, 512, 10]), torch.randn(256, 784), sizes=[16, 4096], training=training)
    assert transfer.first_touch is not None, transfer.notes
    assert transfer.first_touch.context > 10
    assert transfer.first_touch.compiled > transfer.first_touch.again
    for point in transfer.points:
        assert point.gpu is not None
        assert (point.gpu.backward is not None) is training
        assert point.gpu.forward.device.ms <= 1.1 * point.gpu.forward.host.ms
        assert point.gpu.forward.returned.ms <= 1.1 * point.gpu.forward.host.ms
    assert transfer.points[-1].gpu is not None
    assert transfer.points[-1].gpu.prefetched.ms <= 1.2 * transfer.points[-1].gpu.step.ms
    assert transfer.crossings
    assert transfer.advice
    print(transfer)


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.usefixtures("device")
def test_pinned_copies_reach_the_links_ceiling() -> None:
    """A copy of 64 MiB reaches at least 0.9 of the ceiling."""
    link, x = timing.link("cuda:0"), torch.randn(1 << 24)
    copied = timing.time_apart(measurement.copy_calls([x], torch.device("cuda"))["non_blocking"])
    assert x.nbytes / (1e-3 * copied.device.ms) >= 0.9 * link.to_device


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
def test_a_prefetched_batch_equals_its_source() -> None:
    x = torch.randn(64, 8)
    (prefetched,) = next(iter(DevicePrefetcher([[x]], "cuda")))
    assert torch.equal(prefetched.cpu(), x)
