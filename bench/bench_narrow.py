"""Widths of 16 to 128 over many rows: bound by memory and launches."""

from __future__ import annotations

import pytest

from bench.conftest import Row
from bench.problem import Cell, cases


@pytest.mark.parametrize(("cell", "device"), cases("narrow"), ids=str)
def test_narrow(row: Row, cell: Cell, device: str) -> None:
    row(cell, device)
