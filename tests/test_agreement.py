"""The largest difference allowed between two correct results."""

from __future__ import annotations

import math

import pytest
import torch

from mlp_fused.agreement import BOUNDS, relative_error


def test_relative_error() -> None:
    ones = torch.ones(4)
    assert relative_error(ones, ones) == 0.0
    assert relative_error(1.5 * ones, ones) == pytest.approx(0.5)
    assert relative_error(torch.ones(3), ones) == math.inf
    assert not relative_error(ones * math.nan, ones) <= 1.0
    assert relative_error(ones, 0 * ones) == pytest.approx(2.0)


def test_bounds_are_wider_for_fewer_bits_and_for_gradients() -> None:
    assert list(BOUNDS) == ["fp32", "tf32", "fp16", "bf16"]
    for column in zip(*BOUNDS.values()):
        assert list(column) == sorted(column)
    assert all(output < gradients for output, gradients in BOUNDS.values())
