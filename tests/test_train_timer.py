"""StepTimer: the phases of training steps and their times."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trainings import CPU, TINY, run, write_data

from mlp_fused.train.timer import StepTimer


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_data(tmp_path)


def test_phases_end_at_their_marks() -> None:
    ticks = iter([0.0, 1.0, 1.5, 3.5, 7.5, 8.0, 9.0, 9.5, 11.5, 15.5, 16.0])
    timer = StepTimer(CPU, now=lambda: next(ticks))
    timer.start()
    for phase in StepTimer.PHASES * 2:
        timer.mark(phase)
    timer.read()
    assert timer.steps == 2
    assert timer.milliseconds == {
        "loading": 1000.0,
        "copy": 500.0,
        "forward": 2000.0,
        "backward": 4000.0,
        "optimizer": 500.0,
    }
    assert timer.percent["forward"] == 25.0
    lines = [line.split() for line in str(timer).splitlines()]
    assert lines[0] == ["ms/step", "percent"]
    assert lines[3] == ["forward", "2000.000", "25.0"]
    assert lines[6] == ["sum", "8000.000", "100.0"]


def test_time_between_epochs_is_not_counted() -> None:
    ticks = iter([0.0, 1.0, 100.0, 101.0])
    timer = StepTimer(CPU, now=lambda: next(ticks))
    for _ in range(2):
        timer.start()
        timer.mark("optimizer")
    timer.read()
    assert timer.milliseconds["optimizer"] == 1000.0


class FakeEvent:
    """A stand-in for torch.cuda.Event. Events are one millisecond apart, and waits are counted."""

    clock = itertools.count()
    waits = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = next(self.clock)

    def synchronize(self) -> None:
        FakeEvent.waits += 1

    def elapsed_time(self, end: FakeEvent) -> float:
        return float(end.at - self.at)


@pytest.fixture
def gpu_timer(monkeypatch: pytest.MonkeyPatch) -> StepTimer:
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=FakeEvent))
    monkeypatch.setattr(FakeEvent, "waits", 0)
    return StepTimer(torch.device("cuda"))


def test_a_gpus_events_are_read_once_per_epoch(gpu_timer: StepTimer) -> None:
    gpu_timer.start()
    for phase in StepTimer.PHASES * 100:
        gpu_timer.mark(phase)
    assert FakeEvent.waits == 0
    gpu_timer.read()
    assert FakeEvent.waits == 1
    assert gpu_timer.steps == 100
    assert gpu_timer.milliseconds == dict.fromkeys(StepTimer.PHASES, 1.0)


def test_waiting_for_a_copy_does_not_count_as_loading(gpu_timer: StepTimer) -> None:
    """Each loading takes 1 ms, including a wait of 0.25 ms for a copy of 2 ms."""

    @dataclasses.dataclass
    class At:
        at: float

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: At) -> float:
            return end.at - self.at

    assert gpu_timer.copies
    gpu_timer.start()
    for _ in range(8):
        gpu_timer.copies.add(At(1), At(3), At(5), At(5.25))
        for phase in StepTimer.PHASES:
            if phase != "copy":
                gpu_timer.mark(phase)
    gpu_timer.read()
    assert gpu_timer.milliseconds == {**dict.fromkeys(StepTimer.PHASES, 1.0), "loading": 0.75, "copy": 0.25}
    assert sum(gpu_timer.percent.values()) == pytest.approx(100)
    assert str(gpu_timer).endswith(
        "\ncopying a batch takes 2.000 ms on a separate stream; 88% of it overlaps with other work"
    )
    gpu_timer.reset()
    assert "overlaps" not in str(gpu_timer)


@pytest.mark.usefixtures("gpu_timer")
def test_events_of_a_long_epoch_do_not_accumulate() -> None:
    gpu_timer = StepTimer(torch.device("cuda"), most_pending=12)
    gpu_timer.start()
    for phase in StepTimer.PHASES * 20:
        gpu_timer.mark(phase)
        assert len(gpu_timer._pending) < 12
    gpu_timer.read()
    assert gpu_timer.milliseconds == dict.fromkeys(StepTimer.PHASES, 1.0)


def test_the_first_epoch_is_left_out_if_there_are_more(data: str) -> None:
    assert run(TINY, data=data, epochs=1).timer.steps == 4
    timer = run(TINY, data=data, epochs=3).timer
    assert timer.steps == 8
    assert min(ms for phase, ms in timer.milliseconds.items() if phase != "copy") > 0
    assert timer.milliseconds["copy"] == 0  # a CPU copies nothing
    assert sum(timer.percent.values()) == pytest.approx(100)
