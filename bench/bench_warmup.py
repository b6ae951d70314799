"""What compiling a network's kernels takes: `model.warmup` in a fresh process, Triton's cache empty and full."""

from __future__ import annotations

import pytest

from bench.conftest import Row
from bench.problem import Cell, cases


@pytest.mark.parametrize(("cell", "device"), cases("warmup"), ids=str)
def test_warmup(row: Row, cell: Cell, device: str) -> None:
    row(cell, device)
