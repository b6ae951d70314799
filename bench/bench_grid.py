"""Measure every cell of the grid. `-k` selects families, dtypes, phases or devices.

    seed     the network of a first course: 784→512→512→10, fp32, small batches, a step with cross entropy and Adam
    narrow   widths from 16 to 128 and many rows: bound by memory and launches
    middle   widths from 256 to 1024 in bf16: pointwise operations take much of the time
    large    widths from 1024 to 16384 in bf16 and fp32: matrix products dominate
    gemm     one kernel of the layer path, against cuBLAS's bare product and PyTorch's operations (see gemm.py)
    odd      widths that no tile divides, rows that are not aligned, transposed and sliced inputs
    warmup   `model.warmup` in a new process, with an empty and with a filled Triton cache
    copy     the copy of the input against the computation on it; the cost of a first call; the lecture's product

`pytest bench --benchmark -k copy` takes less than three minutes on an H100 with 16 CPU cores, according to a model of
its time in tests/bench/test_bench_grid.py. It has 98 rows with ten numbers each, which take `COPY_SECONDS` or a few
calls. Its kernels are compiled ahead, and some rows start new processes.
"""

from __future__ import annotations

import pytest

from bench.conftest import Row
from bench.problem import FAMILIES, Cell, cases


@pytest.mark.parametrize(("cell", "device"), [case for family in FAMILIES for case in cases(family)], ids=str)
def test_grid(row: Row, cell: Cell, device: str) -> None:
    row(cell, device)
