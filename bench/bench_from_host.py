"""A narrow network's forward on a batch of the host, copied first and read where it lies: see from_host.py."""

from __future__ import annotations

import pytest

from bench.conftest import Row
from bench.shapes import Cell, cases


@pytest.mark.parametrize(("cell", "device"), cases("from_host"), ids=str)
def test_from_host(row: Row, cell: Cell, device: str) -> None:
    row(cell, device)
