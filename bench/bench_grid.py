"""Every cell of the grid on every device on which it means something. `-k` selects: by family, dtype, phase or device.

    seed     the network of a first course: 784→512→512→10, fp32, small batches, a step with cross entropy and Adam
    narrow   widths of 16 to 128 over many rows: bound by memory and launches
    middle   widths of 256 to 1024 in bf16: the pointwise traffic is a good part of the time
    large    widths of 1024 to 16384 in bf16 and fp32: matrix products dominate
    gemm     one kernel of the layer path by itself, beside cuBLAS's bare product and torch's whole way (see gemm.py)
    odd      widths that no tile divides, rows that no vector load fits, transposed and sliced inputs
    warmup   `model.warmup` in a fresh process, with Triton's cache empty and full
    copy     the input's copy beside the computation on it; the cost of a first call; the lecture's product

`pytest bench --benchmark -k copy` takes less than three minutes of an H100 with 16 cores beside it, by the model of its
time in tests/bench/test_bench_grid.py: 98 rows, of each ten numbers that take `COPY_SECONDS` or a few calls; their
kernels, compiled ahead; and the processes of the rows that begin with one.
"""

from __future__ import annotations

import pytest

from bench.conftest import Row
from bench.problem import FAMILIES, Cell, cases


@pytest.mark.parametrize(("cell", "device"), [case for family in FAMILIES for case in cases(family)], ids=str)
def test_grid(row: Row, cell: Cell, device: str) -> None:
    row(cell, device)
