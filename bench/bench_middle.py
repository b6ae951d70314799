"""Widths of 256 to 1024 in bf16: the pointwise traffic is a good part of the time."""

from __future__ import annotations

import pytest

from bench.conftest import Row
from bench.problem import Cell, cases


@pytest.mark.parametrize(("cell", "device"), cases("middle"), ids=str)
def test_middle(row: Row, cell: Cell, device: str) -> None:
    row(cell, device)
