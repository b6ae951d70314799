"""What moving the input costs beside computing on it; what only the first call costs; the lecture's product.

`pytest bench --benchmark -k copy` takes less than three minutes of an H100 with 16 cores beside it, by the model of its
time in test_bench_tools.py: 98 rows, of each ten numbers that take `COPY_SECONDS` or a few calls; their kernels,
compiled ahead; and the processes of the rows that begin with one.
"""

from __future__ import annotations

import pytest

from bench.conftest import Row
from bench.problem import Cell, cases


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("cell", "device"), cases("copy"), ids=str)
def test_copy(row: Row, cell: Cell, device: str) -> None:
    row(cell, device)
