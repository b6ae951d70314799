"""What moving the input costs beside computing on it; what only the first call costs; the lecture's product."""

from __future__ import annotations

import pytest

from bench.conftest import Row
from bench.shapes import Cell, cases


@pytest.mark.parametrize(("cell", "device"), cases("copy"), ids=str)
def test_copy(row: Row, cell: Cell, device: str) -> None:
    row(cell, device)
