"""A network on one device: its inputs, phases and verification."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from stand_ins import (
    SMALL,
)
from torch import nn

from bench.network import Bench
from bench.problem import Problem


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_layouts(layout: str) -> None:
    (x,) = Bench(Problem((5, 3), 4, layout=layout), "cpu").inputs
    assert x.shape == (4, 5)
    assert x.stride() == ((1, 4) if layout == "transposed" else (10, 1))
    assert not x.is_contiguous()


def test_a_step_changes_the_parameters_and_verifying_restores_them() -> None:
    bench = Bench(SMALL, "cpu")
    before = [p.detach().clone() for p in bench.parameters]
    timed = bench.timed(bench.model, "step")
    bench.verify(timed, "step")
    assert all(torch.equal(p, q) for p, q in zip(bench.parameters, before, strict=True))
    timed(0)
    assert not any(torch.equal(p, q) for p, q in zip(bench.parameters, before, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    "problem",
    [Problem((16,) * 5, 256), Problem((2, 2), 2**20)],
    ids=["gradients of zero", "gradients over a million rows"],
)
def test_many_steps_leave_parameters_and_optimizer_state_finite(problem: Problem, dtype: Any) -> None:
    bench = Bench(replace(problem, dtype=dtype), "cpu")
    optimizer = bench.optimizer()
    step = bench.step(bench.model, optimizer)
    for _ in range(100):
        step(0)
    state = [value for values in optimizer.state.values() for value in values.values()]
    assert len(state) == 3 * len(bench.parameters)  # a count of steps and two moments each
    for tensor in (*bench.parameters, *state):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("phase", ["forward", "backward", "training", "step"])
def test_a_wrong_function_is_not_timed(phase: str) -> None:
    bench = Bench(SMALL, "cpu")
    wrong = nn.Sequential(bench.eager[0], nn.Tanh(), bench.eager[2])
    with pytest.raises(AssertionError, match="wrong against eager"):
        bench.verify(bench.timed(wrong, phase), phase)
