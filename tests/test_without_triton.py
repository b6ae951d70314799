"""Without Triton, everything runs as plain torch, and errors say why the kernels cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh process, in which modules in `paths` come before the installed ones."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*paths, ROOT)))
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.alone
def test_everything_but_the_kernels_works_without_triton() -> None:
    """Run every test of triton_blocked.py without Triton and without the functions that only POSIX has."""
    code = (
        "import os, signal, sys; sys.modules['triton'] = None; import pytest, torch\n"
        "for name in ('fork', 'getpgid', 'killpg', 'nice', 'sched_getaffinity'): vars(os).pop(name, None)\n"
        "for name in ('SIGKILL', 'pthread_sigmask'): vars(signal).pop(name, None)\n"
        "file = 'tests/triton_blocked.py'\n"
        "sys.exit(pytest.main([file, '--noconftest', '-q', '-W', 'error', '-p', 'no:cacheprovider', '-p', 'no:xdist']))"
    )
    process = run(code)
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.alone
def test_the_import_is_silent_without_triton() -> None:
    """A CUDA build of torch prints a line where its counter of FLOPs finds no Triton."""
    process = run(
        "import sys; sys.modules['triton'] = None; import torch; torch.version.cuda = '13.0'; import mlp_fused"
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


@pytest.mark.alone
@pytest.mark.parametrize(
    ("package", "reason"),
    [
        ("raise ImportError('libtriton.so: undefined symbol')", "ImportError: libtriton.so: undefined symbol"),
        (
            "raise OSError('libcuda.so.1: cannot open shared object file')",
            "OSError: libcuda.so.1: cannot open shared object file",
        ),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("import triton._C", "ModuleNotFoundError: No module named 'triton._C'"),
        ("", "AttributeError: module 'triton' has no attribute '__version__'"),
        ("__version__ = '3.4.0'", "ImportError: its version is 3.4.0; the kernels need 3.5 or newer"),
    ],
    ids=["undefined symbol", "missing library", "two lines", "incomplete", "another package", "too old"],
)
def test_a_broken_triton_counts_as_none(package: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(package)
    code = (
        "import torch, mlp_fused, mlp_fused.environment\n"
        "model = mlp_fused.FusedMLP(4, [5, 3])\n"
        "model(torch.randn(2, 4)).sum().backward()\n"
        "print(next(line for line in mlp_fused.environment.describe().splitlines() if line.startswith('triton')))\n"
        "model.backend = 'triton'\n"
        "try: print(model.explain(8).reason)\n"
        "except RuntimeError as error: print(error)\n"  # torch's meta tensors tolerate only an ImportError
        "model(torch.randn(2, 4))"
    )
    process = run(code, tmp_path)
    why = f"Triton cannot be used: {reason}"
    in_environment, in_plan = process.stdout.splitlines()
    assert in_environment.split(maxsplit=1) == ["triton:", f"none ({why})"]
    assert in_plan in (why, f"torch itself fails on Linear: {why}")
    assert (
        process.stderr.splitlines()[-1]
        == f'RuntimeError: backend is "triton", but {why}; backend="auto" runs plain torch'
    )
    assert "Warning" not in process.stderr
