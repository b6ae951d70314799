"""The network of a first course: 784→512→512→10, fp32, small batches, a whole step with cross entropy and Adam."""

from __future__ import annotations

import pytest

from bench.conftest import Row
from bench.problem import Cell, cases


@pytest.mark.parametrize(("cell", "device"), cases("seed"), ids=str)
def test_seed(row: Row, cell: Cell, device: str) -> None:
    row(cell, device)
