"""The seconds of a first call, measured in a new process."""

from __future__ import annotations

import pytest
import torch

from bench import fresh, measure, report
from bench.problem import Cell, Problem
from bench.rows import FreshRow
from mlp_fused.module import FusedMLP


def test_the_lecture_runs_in_a_new_process() -> None:
    """The phase "lecture" times one large product on the CPU and on the GPU."""
    lecture = Cell("copy", Problem((32, 32), 32, activation="identity"), "lecture")
    row = measure.measure(lecture, "cpu")
    assert isinstance(row, FreshRow)
    assert set(row.seconds["any"]) == {"cpu_product", "cpu_product_2"}


class WarmedUp(FusedMLP):
    """A model that records the batch size of its warmup."""

    def warmup(self, batch_size: int) -> None:  # type: ignore[override]
        self.warmed_up_for = batch_size


def test_warmup_is_timed_by_itself() -> None:
    model = WarmedUp(5, [7, 3])
    actual = fresh.warmup(model, torch.randn(4, 5))
    assert model.warmed_up_for == 4
    assert list(actual) == ["warmup", "training", "training_2"]


class Event:
    def __init__(self, enable_timing: bool) -> None: ...

    def record(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 1.0


def test_the_report_names_each_time_of_a_lecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    actual = fresh.lecture(8, cpu=True, gpu=True)
    assert set(actual) == {name + again for name in report.LECTURE for again in ("", "_2")}
    assert actual["product_device"] == 1e-3
