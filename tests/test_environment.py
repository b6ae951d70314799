"""`mlp-fused env`: all facts for a bug report, even if some part is broken."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call

import mlp_fused
from mlp_fused import environment
from mlp_fused.engine import table_files


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The lines of `mlp-fused env`, by name."""
    assert call("env") == 0
    pairs = [line.split(":", 1) for line in capsys.readouterr().out.splitlines()]
    return {name: value.strip() for name, value in pairs}


@pytest.mark.usefixtures("no_gpu")
def test_env_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    monkeypatch.delenv("MLP_FUSED_DEBUG", raising=False)
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    actual = report(capsys)
    assert actual["mlp_fused"] == mlp_fused.__version__
    assert actual["Python"].startswith(platform.python_version())
    assert actual["torch"] == torch.__version__
    assert actual["numpy"] == np.__version__
    assert actual["OS"] == platform.platform()
    assert actual["CUDA runtime"] == (torch.version.cuda or "none")
    assert actual["HIP runtime"] == (torch.version.hip or "none")
    assert actual["GPU"] == "none that torch can use"
    assert actual["tuned table"].startswith("none for this GPU")
    assert actual["driver"]
    assert actual['backend "auto"'] == "the reference path: the input is on the CPU"
    assert actual["MLP_FUSED_DEBUG"] == "not set"
    assert actual["CUDA_LAUNCH_BLOCKING"] == "1 (makes every launch wait for its kernel)"
    assert actual["TRITON_INTERPRET"].startswith(os.environ.get("TRITON_INTERPRET", "not set"))
    assert "MLP_FUSED_BACKEND" in actual


@pytest.mark.usefixtures("no_gpu")
def test_env_completes_even_if_a_part_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nexit 9\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment, "FusedMLP", broken)
    monkeypatch.setattr(environment.metadata, "version", fail_to_find)
    actual = report(capsys)
    assert actual["tqdm"] == "not installed"
    assert actual["driver"].startswith("unknown: ")
    assert "exit status 9" in actual["driver"]
    assert actual['backend "auto"'] == "failed: RuntimeError: broken"


@pytest.mark.usefixtures("no_gpu")
def test_triton_may_come_from_another_distribution(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """triton-windows installs the module `triton` under another name, so the version is read from the module."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(environment.metadata, "version", fail_to_find)
    assert report(capsys)["triton"] == triton.__version__
    assert environment.versions()["triton"] == triton.__version__


def fail_to_find(package: str) -> str:
    raise environment.metadata.PackageNotFoundError(package)


def fake_memory_info(gpu: int) -> tuple[int, int]:
    if gpu:
        raise RuntimeError(
            "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
        )
    return 7 * 2**29, 1398 * 2**30 // 10


def test_env_lists_the_processes_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch lists them if it has the package for it."""
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda package: package)
    for torchs, ours in (
        (
            "GPU:0\nprocess     1234 uses   512.000 MB GPU memory\nprocess        7 uses     1.000 MB GPU memory",
            "process 1234 uses 512.000 MB GPU memory; process 7 uses 1.000 MB GPU memory",
        ),
        ("GPU:0\nno processes are running", "no processes are running"),
        ("cuda driver can't be loaded, is cuda enabled?", "unknown; nvidia-smi may list them"),
    ):
        monkeypatch.setattr(torch.cuda, "list_gpu_processes", lambda gpu, torchs=torchs: torchs)
        assert environment._processes(0) == ours

    def broken(gpu: int) -> str:
        raise ValueError("Not Supported")

    monkeypatch.setattr(torch.cuda, "list_gpu_processes", broken)
    assert environment._processes(0) == "unknown: ValueError: Not Supported; nvidia-smi may list them"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert environment._processes(0).endswith("amd-smi process may list them")


def test_env_with_gpus(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, table_folder: Path
) -> None:
    class Properties:
        major, minor, gcnArchName, total_memory = 9, 0, "gfx942", 141 * 2**30  # noqa: N815 (torch's name)

        def __init__(self, index: int) -> None:
            self.name = ["NVIDIA H200", "NVIDIA A100-SXM4-80GB"][index]

    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nprintf '570.86.15\\n570.86.15\\n'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fake_memory_info)
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda package: None)
    monkeypatch.setattr(torch.version, "hip", None)
    both = [tmp_path / "cache" / "mlp_fused" / "nvidia_h200.json", tmp_path / "tuned" / "nvidia_h200.json"]
    for path in both:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    monkeypatch.setattr(environment, "_path_taken", lambda device: f"asked about {device}")
    actual = report(capsys)
    assert actual["GPU 0"] == "NVIDIA H200, compute capability 9.0, 141 GiB"
    assert actual["tuned table 0"] == f"{both[0]}, then {both[1]}"
    assert actual["memory 0"] == "3.5 of 139.8 GiB free"
    assert actual["memory 1"] == "unknown: CUDA error: out of memory"
    assert actual["processes 0"] == (
        "nvidia-smi lists those that hold memory (for a list here: pip install nvidia-ml-py)"
    )
    assert actual["GPU 1"].startswith("NVIDIA A100-SXM4-80GB, ")
    assert actual["tuned table 1"] == "none for this GPU"
    assert actual["driver"] == "570.86.15"
    assert actual['backend "auto"'] == "asked about cuda"


def test_versions_are_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    actual = environment.versions("unknown: [Errno 2]\n no such file")
    assert actual["driver"] == "unknown: [Errno 2] no such file"
    assert set(actual) == {*table_files.VERSIONS, "cuda"}
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert set(environment.versions()) == {*table_files.VERSIONS, "hip"}
