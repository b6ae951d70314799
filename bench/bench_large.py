"""Widths of 1024 to 16384 in bf16 and fp32: matrix products, and the time is theirs."""

from __future__ import annotations

import pytest

from bench.conftest import Row
from bench.problem import Cell, cases


@pytest.mark.parametrize(("cell", "device"), cases("large"), ids=str)
def test_large(row: Row, cell: Cell, device: str) -> None:
    row(cell, device)
