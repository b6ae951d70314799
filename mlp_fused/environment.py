"""What a bug report needs: versions, GPUs, the path taken, the tuned tiles, our environment switches."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from . import FusedMLP, __version__
from .kernels import tables

__all__ = ["SWITCHES", "describe", "versions"]

SWITCHES = ("MLP_FUSED_BACKEND", "MLP_FUSED_DEBUG", "TRITON_INTERPRET", "CUDA_LAUNCH_BLOCKING")


def describe() -> str:
    """The report, one "name: value" a line. What cannot be found out is said so; nothing is raised."""
    entries = list(_entries())
    width = max(len(name) for name, _ in entries) + 1
    return "\n".join(f"{name + ':':<{width}} {value}" for name, value in entries)


def _entries() -> Iterator[tuple[str, str]]:
    yield "mlp_fused", __version__
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "torch", torch.__version__
    for package in ("triton", "numpy", "scikit-learn", "tqdm"):
        yield package, _version(package)
    yield "CUDA runtime", torch.version.cuda or "none"
    yield "HIP runtime", torch.version.hip or "none"
    yield "OS", platform.platform()
    yield "CPU", f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads for torch"
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    for index in gpus:
        gpu = torch.cuda.get_device_properties(index)
        kind = f"compute capability {gpu.major}.{gpu.minor}" if torch.version.hip is None else gpu.gcnArchName
        yield f"GPU {index}", f"{gpu.name}, {kind}, {gpu.total_memory / 2**30:.0f} GiB"
        yield f"tuned table {index}", _tuned_tables(gpu.name)
    if not gpus:
        yield "GPU", "none that torch can use"
        yield "tuned table", "none for this GPU: there is no GPU"
    yield "driver", _driver()
    yield 'backend "auto"', _path_taken("cuda" if gpus else "cpu")
    for switch in SWITCHES:
        yield switch, os.environ.get(switch, "not set")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """What a measurement depends on besides the GPU: as a measured table has it."""
    toolkit = {"hip": torch.version.hip} if torch.version.hip else {"cuda": torch.version.cuda or "none"}
    found = {
        "mlp_fused": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        **toolkit,
        "driver": _driver(),
    }
    return {name: " ".join(version.split()) for name, version in found.items()}  # a line each


def _tuned_tables(gpu: str) -> str:
    """The user's and the package's, in the order in which they are asked."""
    found = [str(path) for path in (tables.user_path(gpu), tables.packaged_path(gpu)) if os.path.isfile(path)]
    return ", then ".join(found) or "none for this GPU"


def _driver() -> str:
    """The version of the GPU's driver: as nvidia-smi has it, or Linux for an AMD GPU."""
    amdgpu = Path("/sys/module/amdgpu/version")
    try:
        if nvidia_smi := shutil.which("nvidia-smi"):
            query = [nvidia_smi, "--query-gpu=driver_version", "--format=csv,noheader"]
            done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
            return ", ".join(dict.fromkeys(done.stdout.split())) or "unknown"
        return amdgpu.read_text().strip() if amdgpu.is_file() else "none found"
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"


def _path_taken(device: str) -> str:
    """What `backend="auto"` does with a network of the usual kind on this machine."""
    try:
        plan = FusedMLP(64, [512, 512, 10], device=device).explain(64)
    except Exception as error:  # whatever is broken belongs into the report, which has to reach its end
        return f"failed: {type(error).__name__}: {error}"
    return f"the {plan.path} path: {plan.reason}"
