"""The compiled kernels of narrow networks on this GPU: registers, spills, shared memory, instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from bench.machine import ROOT

TARGETS = {80: "NVIDIA A100", 90: "NVIDIA H100", 100: "NVIDIA B200"}  # one device an architecture
SCRIPT = ROOT / "tests" / "compile_kernels.py"


def target() -> str:
    """The device compiled for that has this GPU's architecture; without a GPU, the H100."""
    if not torch.cuda.is_available():
        return TARGETS[90]
    if torch.version.hip is not None:
        return "AMD MI300X"
    major, minor = torch.cuda.get_device_capability()
    return TARGETS.get(10 * major + minor, TARGETS[80])


def test_compiled(benchmark: Any) -> None:
    """`extra_info["compiled"]`: the readings, one a kernel, as tests/compile_kernels.py prints them."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if benchmark.disabled:
        pytest.skip("compiles for a minute: runs with --benchmark only")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: `python tests/compile_kernels.py --networks` compiles for others, in minutes")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--networks", "--json", "--target", target()]

    def run() -> list[dict[str, Any]]:
        child = subprocess.run(
            command, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
        )
        return [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]

    readings = benchmark.pedantic(run, rounds=1)
    assert readings
    benchmark.extra_info["target"] = target()
    benchmark.extra_info["compiled"] = readings
