"""What the kernels compile to for sm_80, sm_90, sm_100 and gfx942: it fits, it hardly spills, it uses tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from compile_kernels import SPILL_LIMIT, Compilation, compilations, table
from conftest import COMPILED

pytest.importorskip("triton", reason="Triton is not installed")

SAMPLE = compilations(full=False)
REST = [row for row in compilations(full=True) if row not in SAMPLE]


def compiled(full: bool) -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    script = Path(__file__).with_name("compile_kernels.py")
    child = subprocess.run(
        [sys.executable, script, "--json", *(["--full"] if full else [])],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    rows = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    return {row["id"]: row for row in rows}


@pytest.fixture(scope="module")
def sample(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    rows = compiled(full=False)
    request.config.stash.setdefault(COMPILED, []).extend(table(list(rows.values())))
    return rows


@pytest.fixture(scope="module")
def everything(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    rows = compiled(full=True)
    request.config.stash.setdefault(COMPILED, []).extend(table(list(rows.values())))
    return rows


def holds(row: Compilation, found: dict[str, Any]) -> None:
    assert found["shared"] <= found["shared_limit"], found
    assert found["spills"] <= SPILL_LIMIT, found
    if row.kernel in ("output_gradient", "sum_partials"):
        return
    if row.target == "AMD MI300X":
        assert found["mfma"] > 0, found
        return
    on_fma_units = row.dtype == "float32" and row.precision == "ieee"
    whole = row.tile.block_m >= 64  # an instruction of the newer kinds multiplies 64 rows
    wanted = {"NVIDIA H100": "wgmma", "NVIDIA B200": "tcgen05"}.get(row.target, "mma") if whole else "mma"
    assert (found[wanted] > 0) == (not on_fma_units), found


@pytest.mark.parametrize("row", SAMPLE, ids=lambda row: row.id)
def test_sample(row: Compilation, sample: dict[str, dict[str, Any]]) -> None:
    holds(row, sample[row.id])


def test_the_sample_has_each_kernel_tile_and_target() -> None:
    for field in ("kernel", "tile", "target", "dtype", "precision", "activation"):
        assert {getattr(row, field) for row in REST} <= {getattr(row, field) for row in SAMPLE}, field


@pytest.mark.full
@pytest.mark.parametrize("row", REST, ids=lambda row: row.id)
def test_everything(row: Compilation, everything: dict[str, dict[str, Any]]) -> None:
    holds(row, everything[row.id])
