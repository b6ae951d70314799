"""The benches of single kernels, with torch in place of Triton."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from stand_ins import (
    environment,
)

from bench import gemm, gpu, measure
from bench.machine import ROOT
from bench.problem import GEMM_PHASES, Cell, Problem
from bench.rows import GemmRow, Row, from_json, to_json


def torch_forward(x: Any, weight: Any, bias: Any, h: Any, z: Any, activation: Any, *_: Any) -> None:
    product = torch.addmm(bias, x, weight.t())
    h.copy_(gemm.FORWARDS[activation.name](product))
    if z is not None:
        z.copy_(product)


def torch_dgrad(dz: Any, weight: Any, saved: Any, dx: Any, h: Any, below: Any, *_: Any) -> None:
    dx.copy_(gemm.BACKWARDS[below.name](dz @ weight, saved))
    if h is not None:
        h.copy_(gemm.FORWARDS[below.name](saved))


def torch_wgrad(dz: Any, h: Any, dw: Any, db: Any, *_: Any) -> None:
    dw.copy_(dz.t() @ h)
    db.copy_(dz.sum(0))


def gemm_cell(phase: str, dtype: Any = "fp32", activation: str = "gelu") -> Cell:
    return Cell("gemm", Problem((40, 24), 33, dtype, "identity" if phase == "wgrad" else activation), phase)


BY_TORCH = gemm.Kernels(torch_forward, torch_dgrad, torch_wgrad)


@pytest.mark.parametrize(
    ("phase", "dtype"), [("layer_forward", "bf16"), ("layer_forward_z", "fp32"), ("dgrad", "fp32"), ("wgrad", "bf16")]
)
def test_a_gemm_row_is_complete(phase: str, dtype: str) -> None:
    reported: list[Row] = []
    row = measure.measure(gemm_cell(phase, dtype), "cpu", reported.append, kernels=BY_TORCH)
    assert isinstance(row, GemmRow)
    assert from_json(json.loads(json.dumps(to_json(row)))) == row
    assert row.ours.floor.flops == 2 * 33 * 40 * 24
    assert list(row.baselines) == ["matmul", "eager"]
    matmul = row.baselines["matmul"]
    assert matmul.kernel_speedup == pytest.approx(matmul.timing.kernel_ms / row.ours.timing.kernel_ms)
    assert row.ours.floor.ratio == pytest.approx(1e-3 * row.ours.timing.kernel_ms / row.ours.floor.seconds)
    assert "warps" in row.ours.tile
    assert row.ours.tile in gpu.summary(row)
    assert len(reported) == 2
    assert (row.errors is not None) == (dtype == "fp32")
    for errors in (row.errors or {}).values():
        assert 1e-9 < errors.norm < 1e-6
        assert 1e-9 < errors.entry < 1e-6


@pytest.mark.parametrize("phase", GEMM_PHASES)
def test_a_kernel_that_writes_nothing_is_detected(phase: str) -> None:
    nothing = gemm.Kernels(*[lambda *arguments: None] * 3)
    with pytest.raises(AssertionError, match="wrong against eager"):
        measure.prepare(gemm_cell(phase), "cpu", nothing)


def test_the_bare_product_is_the_product_of_the_kernel() -> None:
    for phase in GEMM_PHASES:
        product_bench = gemm.Gemm(gemm_cell(phase, activation="relu").problem, phase, "cpu")
        product = product_bench.matmul(0)
        if phase == "dgrad":
            product = gemm.BACKWARDS["relu"](product, product_bench.operands[0].saved)  # type: ignore[arg-type]
        elif phase != "wgrad":
            product = torch.relu(product.add(product_bench.operands[0].bias))  # type: ignore[arg-type]
        torch.testing.assert_close(product, product_bench.eager(0)[0])


def test_kernels_run_in_triton_s_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    cells = [gemm_cell("layer_forward_z"), gemm_cell("dgrad"), gemm_cell("wgrad")]
    cells += [gemm_cell("layer_forward", "bf16", "relu"), gemm_cell("dgrad", "bf16", "relu")]
    script = "from bench import measure\nfrom bench.problem import Cell, Problem\n"
    script += f"for cell in {cells}: measure.prepare(cell, 'cpu')\n"
    variables = environment() | {"TRITON_INTERPRET": "1"}
    child = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
