"""Compile the kernels of narrow networks for this GPU: registers, spills, shared memory, instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from bench.machine import ROOT

TARGETS = {80: "NVIDIA A100", 90: "NVIDIA H100", 100: "NVIDIA B200"}  # a device for each architecture
SCRIPT = ROOT / "tests" / "compile_kernels.py"


def target() -> str:
    """Return the device of `TARGETS` with this GPU's architecture; without a GPU, the H100."""
    if not torch.cuda.is_available():
        return TARGETS[90]
    if torch.version.hip is not None:
        return "AMD MI300X"
    major, minor = torch.cuda.get_device_capability()
    return TARGETS.get(10 * major + minor, TARGETS[80])


def test_compiled(benchmark: Any) -> None:
    """Store one record for each kernel, as tests/compile_kernels.py prints them, in `extra_info["compiled"]`."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if benchmark.disabled:
        pytest.skip("compiles for a minute; use --benchmark to run it")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device; use `python tests/compile_kernels.py --networks` to compile for other GPUs")
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
