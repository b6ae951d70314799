"""One kernel of the layer path by itself, beside cuBLAS's bare product and torch's whole way: see gemm.py."""

from __future__ import annotations

import pytest

from bench.conftest import Row
from bench.problem import Cell, cases


@pytest.mark.parametrize(("cell", "device"), cases("gemm"), ids=str)
def test_gemm(row: Row, cell: Cell, device: str) -> None:
    row(cell, device)
