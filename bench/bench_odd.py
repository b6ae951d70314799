"""Widths that no tile divides, rows that no vector load fits, transposed and sliced inputs."""

from __future__ import annotations

import pytest

from bench.conftest import Row
from bench.problem import Cell, cases


@pytest.mark.parametrize(("cell", "device"), cases("odd"), ids=str)
def test_odd(row: Row, cell: Cell, device: str) -> None:
    row(cell, device)
