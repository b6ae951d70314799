"""FLOPs, bytes and the floor of a phase."""

from __future__ import annotations

import pytest
import torch

from bench.problem import Problem
from bench.work import against_floor, phase_work
from mlp_fused.explain import Work, work
from mlp_fused.timing import Ceilings


def test_work_of_phases() -> None:
    problem = Problem((784, 512, 10), 64, cross_entropy=True)
    layers = work(64, (784, 512, 10), torch.float32, "relu")
    assert phase_work(problem, "forward", "cpu") == layers["inference"]
    assert phase_work(problem, "forward", "cpu").flops == 2 * 64 * (784 * 512 + 512 * 10)
    assert phase_work(problem, "training", "cpu") == layers["forward"] + layers["backward"]
    parameters = 784 * 512 + 512 + 512 * 10 + 10
    extra = 4 * (7 * parameters + 2 * 64 * 10)
    assert phase_work(problem, "step", "cpu") == phase_work(problem, "training", "cpu") + Work(0, extra)
    assert phase_work(Problem((10, 10), 10), "lecture", "cpu") == Work(2000, 1200)


def test_against_floor() -> None:
    actual = against_floor(Work(flops=2_000_000, bytes=500_000), Ceilings(1e12, 1e12), ms=0.004)
    assert actual.seconds == pytest.approx(2e-6)
    assert (actual.bound, actual.ratio) == ("compute", pytest.approx(2.0))
    assert (actual.tflops, actual.gbps) == (pytest.approx(0.5), pytest.approx(125.0))
    assert against_floor(Work(1, 500_000), Ceilings(1e12, 1e12), ms=1.0).bound == "memory"
