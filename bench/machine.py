"""Describe the machine of a result: GPU, driver, versions, CPU, and digests of the sources and of the user's tiles."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import mlp_fused
from mlp_fused.engine import tables
from mlp_fused.environment import distorted
from mlp_fused.kernels.language import WHY_NO_TRITON, triton

ROOT = Path(__file__).resolve().parent.parent
# The files of bench/ that affect times.
MEASURING = ("baselines.py", "copies.py", "fresh.py", "gemm.py", "measure.py", "network.py", "problem.py", "work.py")


def machine() -> dict[str, Any]:
    """Return names and versions; without a GPU, its entries are None.

    Results with different descriptions must not be mixed in one file.
    """
    description: dict[str, Any] = {
        "gpu": None,
        "driver": None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": None if WHY_NO_TRITON else triton.__version__,
        "python": platform.python_version(),
        "mlp_fused": mlp_fused.__version__,
        "source": source_digest(),
        "user_table": None,
        "distorted": distorted(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        description |= {
            "gpu": device.name,
            "driver": _driver(),
            "user_table": user_table_digest(device.name),
            "capability": f"{device.major}.{device.minor}",
            "gpu_memory_bytes": device.total_memory,
            "l2_bytes": device.L2_cache_size,
            "multiprocessors": device.multi_processor_count,
            "fp32_precision": torch.backends.cuda.matmul.fp32_precision,
        }
    return description


def source_digest() -> str:
    """Return a digest in twelve hex digits of the sources that affect times: package, kernels, tuned tiles, benches."""
    patterns = ("mlp_fused/*.py", "mlp_fused/[!k]*/*.py", "kernels/*.py", "kernels/tuned/*.json")
    paths = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    paths += [ROOT / "bench" / name for name in MEASURING]
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def user_table_digest(gpu: str) -> str | None:
    """Return a digest of the user's own table of measured tiles, in twelve hex digits; None if there is no table."""
    path = tables.user_path(gpu)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
