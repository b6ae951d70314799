"""The facts that a bug report needs: versions, GPUs, the path taken, the tuned tiles, our environment switches."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from . import __version__
from .engine import tables
from .kernels.language import WHY_NO_TRITON, triton
from .module import FusedMLP

__all__ = ["DISTORTING", "SWITCHES", "describe", "distorted", "versions"]

# Switches under which times mean nothing, and what they do.
DISTORTING = {
    "CUDA_LAUNCH_BLOCKING": "makes every launch wait for its kernel",
    "MLP_FUSED_DEBUG": "waits for each kernel and checks its results",
    "TRITON_INTERPRET": "runs the kernels in an interpreter",
}
SWITCHES = ("MLP_FUSED_BACKEND", "MLP_FUSED_FP32", *DISTORTING)


def distorted(kind: str = "cuda") -> str | None:
    """The reason why times on a kind of device mean nothing; or None.

    Without a GPU, the switches only affect kernels in the interpreter.
    """
    if kind != "cuda" and os.environ.get("MLP_FUSED_BACKEND") != "triton":
        return None
    for name, effect in DISTORTING.items():
        if _is_on(name):
            return f"{name} is set, which {effect}: unset it to measure"
    return None


def _is_on(switch: str) -> bool:
    return os.environ.get(switch, "0") not in ("", "0")


def describe() -> str:
    """The report, one "name: value" on each line. It raises nothing; a value that cannot be read says so."""
    entries = list(_entries())
    width = max(len(name) for name, _ in entries) + 1
    return "\n".join(f"{name + ':':<{width}} {value}" for name, value in entries)


def _entries() -> Iterator[tuple[str, str]]:
    yield "mlp_fused", __version__
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "torch", torch.__version__
    yield "triton", f"none ({WHY_NO_TRITON})" if WHY_NO_TRITON else triton.__version__
    for package in ("numpy", "scikit-learn", "tqdm"):
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
        yield f"memory {index}", _memory(index)
        yield f"processes {index}", _processes(index)
        yield f"tuned table {index}", _tuned_tables(gpu.name)
    if not gpus:
        yield "GPU", "none that torch can use"
        yield "tuned table", "none for this GPU: there is no GPU"
    yield "driver", _driver()
    yield 'backend "auto"', _path_taken("cuda" if gpus else "cpu")
    for switch in SWITCHES:
        effect = f" ({DISTORTING[switch]})" if switch in DISTORTING and _is_on(switch) else ""
        yield switch, os.environ.get(switch, "not set") + effect


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions(driver: str | None = None) -> dict[str, str]:
    """The versions on which a measurement depends, as they are in a measured table.

    `driver` is the version of the GPU's driver; by default that of this machine.
    """
    toolkit = {"hip": torch.version.hip} if torch.version.hip else {"cuda": torch.version.cuda or "none"}
    versions = {
        "mlp_fused": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": "none" if WHY_NO_TRITON else triton.__version__,
        **toolkit,
        "driver": _driver() if driver is None else driver,
    }
    return {name: " ".join(version.split()) for name, version in versions.items()}  # a line each


def _memory(gpu: int) -> str:
    """The free memory of a GPU, which counts the memory of all processes as used."""
    try:
        free, total = torch.cuda.mem_get_info(gpu)
    except RuntimeError as error:  # a GPU that is full or broken allows no context, which the query needs
        return f"unknown: {str(error).splitlines()[0]}"
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def _processes(gpu: int) -> str:
    """The processes that use memory of a GPU, as torch lists them."""
    tool, package = ("nvidia-smi", "pynvml") if torch.version.hip is None else ("amd-smi process", "amdsmi")
    if importlib.util.find_spec(package) is None:
        distribution = "nvidia-ml-py" if package == "pynvml" else package
        return f"{tool} lists those that hold memory (for a list here: pip install {distribution})"
    try:
        _, *lines = torch.cuda.list_gpu_processes(gpu).splitlines()
    except Exception as error:  # the driver's library has errors of its own
        return f"unknown: {type(error).__name__}: {error}; {tool} may list them"
    return "; ".join(" ".join(line.split()) for line in lines) or f"unknown; {tool} may list them"


def _tuned_tables(gpu: str) -> str:
    """The files of the user's table and of the package's, in the order in which they are read."""
    tables_here = [str(path) for path in (tables.user_path(gpu), tables.packaged_path(gpu)) if os.path.isfile(path)]
    return ", then ".join(tables_here) or "none for this GPU"


def _driver() -> str:
    """The version of the GPU's driver, from nvidia-smi, or from Linux for an AMD GPU."""
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
    """The path that `backend="auto"` takes for a network of the usual kind on this machine."""
    try:
        plan = FusedMLP(64, [512, 512, 10], device=device).explain(64)
    except Exception as error:  # any error belongs in the report, and must not end it
        return f"failed: {type(error).__name__}: {error}"
    return f"the {plan.path} path: {plan.reason}"
