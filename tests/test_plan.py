"""Which tile and which path, decided without a GPU; FLOPs, bytes and floors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlp_fused import plan
from mlp_fused.kernels.configs import DEVICES, OUTPUT_TILES, Device, Problem, TileConfig, choose, device_slug

PROBLEMS = st.builds(
    Problem,
    st.sampled_from(["forward", "dgrad", "wgrad", "output_gradient"]),
    st.integers(1, 2**22),
    st.integers(1, 20000),
    st.integers(0, 2**22),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from(["ieee", "tf32"]),
)


@given(PROBLEMS, st.sampled_from(list(DEVICES.values())))
def test_a_tile_is_one_that_can_run(problem: Problem, device: Device) -> None:
    tile = choose(problem, device)
    sides = [tile.block_m, tile.block_n] + ([tile.block_k] if problem.kind != "output_gradient" else [])
    for side in sides:
        assert side >= 16
        assert side & (side - 1) == 0
    assert tile.shared_memory(problem.dtype.itemsize) <= device.shared_memory
    assert tile.block_m * tile.block_n <= OUTPUT_TILES[0][0] * OUTPUT_TILES[0][1]
    assert tile.split == 1 or problem.kind == "wgrad"
    assert tile.split * tile.block_k <= max(tile.block_k, problem.k)
    assert choose(problem, device) is tile


H200 = DEVICES["NVIDIA H200"]


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (Problem("forward", 8192, 4096, 4096, torch.bfloat16), TileConfig(128, 128, 64, 8, 8, 4)),
        (Problem("forward", 1024, 512, 784, torch.bfloat16), TileConfig(64, 32, 64, 8, 4, 4)),
        (Problem("forward", 3, 512, 784, torch.bfloat16), TileConfig(16, 32, 64, 8, 4, 4)),
        (Problem("forward", 8192, 4096, 4096, torch.float32, "tf32"), TileConfig(128, 128, 32, 8, 8, 4)),
        (Problem("dgrad", 8192, 4096, 4096, torch.float32), TileConfig(128, 128, 16, 8, 8, 4)),
        (Problem("wgrad", 512, 512, 65536, torch.bfloat16), TileConfig(128, 128, 64, 8, 8, 4, split=8)),
        (Problem("wgrad", 64, 64, 2**20, torch.bfloat16), TileConfig(64, 64, 64, 8, 4, 4, split=132)),
        (Problem("output_gradient", 1024, 10, 0, torch.bfloat16), TileConfig(256, 16)),
    ],
    ids=lambda value: str(value) if isinstance(value, TileConfig) else f"{value.kind} {value.m}x{value.n}x{value.k}",
)
def test_the_rule_on_a_hopper(problem: Problem, expected: TileConfig) -> None:
    assert choose(problem, H200) == expected


def test_the_file_name_of_a_device() -> None:
    assert device_slug("NVIDIA H200") == "nvidia_h200"
    assert device_slug("NVIDIA A100-SXM4-80GB") == "nvidia_a100_sxm4_80gb"
    assert device_slug("AMD Instinct MI300X (gfx942)") == "amd_instinct_mi300x_gfx942"


def test_work_counts_every_tensor_once() -> None:
    """784 -> 512 -> 10, gelu, bf16, counted by hand."""
    M, d0, d1, d2 = 64, 784, 512, 10
    work = plan.work(M, [d0, d1, d2], torch.bfloat16, "gelu")
    weights = d1 * d0 + d1 + d2 * d1 + d2
    layers = (M * d0 + M * d1) + (M * d1 + M * d2)
    assert work["inference"] == plan.Work(2 * M * (d0 * d1 + d1 * d2), 2 * (weights + layers))
    assert work["forward"] == plan.Work(work["inference"].flops, work["inference"].bytes + 2 * M * d1)
    dgrad = M * d2 + d2 * d1 + 3 * M * d1  # dz, W; dx, z, h again
    wgrad = (M * d2 + M * d1 + d2 * d1 + d2) + (M * d1 + M * d0 + d1 * d0 + d1)
    assert work["backward"] == plan.Work(2 * M * (d0 * d1 + 2 * d1 * d2), 2 * (dgrad + wgrad))


def test_a_floor_is_the_slower_of_two() -> None:
    assert plan.Work(100, 10).floor(flops_per_second=10, bytes_per_second=10) == 10
    assert plan.Work(10, 100).floor(flops_per_second=10, bytes_per_second=10) == 10
    assert plan.Work(1, 2) + plan.Work(3, 4) == plan.Work(4, 6)


def test_float32_precision_follows_every_switch_of_torch() -> None:
    matmul = torch.backends.cuda.matmul
    for switch, expected in (
        (lambda: setattr(matmul, "fp32_precision", "tf32"), "tf32"),
        (lambda: setattr(matmul, "fp32_precision", "ieee"), "ieee"),
        (lambda: setattr(matmul, "allow_tf32", True), "tf32"),
        (lambda: torch.set_float32_matmul_precision("highest"), "ieee"),
        (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
    ):
        switch()
        assert plan.float32_precision() == expected


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python, without the interpreter unless asked for."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET",)}
    return subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **environment}, capture_output=True, text=True, timeout=120
    )


def test_the_triton_backend_on_the_cpu_says_why_it_cannot() -> None:
    code = "import torch; from mlp_fused import FusedMLP; FusedMLP(4, [3], backend='triton')(torch.randn(2, 4))"
    found = run(code)
    assert found.returncode == 1
    sentence = found.stderr.strip().splitlines()[-1]
    assert sentence.startswith('RuntimeError: backend is "triton", but the input is on the CPU')
    assert "set TRITON_INTERPRET=1" in sentence


def test_the_environment_chooses_the_backend_and_debugging() -> None:
    counted = "import torch\nfrom mlp_fused import FusedMLP\nfrom mlp_fused.kernels.launch import count_launches\n"
    counted += "with count_launches() as c: y = FusedMLP(4, [3])(torch.randn(2, 4))\nprint(c)\n"
    found = run(counted, TRITON_INTERPRET="1", MLP_FUSED_BACKEND="triton")
    assert found.stdout.strip() == "{'network_forward_kernel': 1}", found.stderr
    wrong = run("import mlp_fused", MLP_FUSED_BACKEND="fast")
    assert "MLP_FUSED_BACKEND is 'fast'; it needs to be one of: auto, triton, reference" in wrong.stderr
    debugged = run(
        "import torch; from mlp_fused import FusedMLP; m = FusedMLP(4, [5, 3], backend='triton')\n"
        "m[3].weight.data[0, 0] = float('nan'); m(torch.randn(2, 4))",
        TRITON_INTERPRET="1",
        MLP_FUSED_DEBUG="1",
    )
    assert (
        "FloatingPointError: layer 1 (identity), forward: 2 of 6 elements of h are NaN or infinite" in debugged.stderr
    )


def test_without_triton_everything_works_on_the_reference_path_in_silence() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, mlp_fused\n"
        "y = mlp_fused.FusedMLP(4, [5, 3], activation_layer='gelu')(torch.randn(2, 4)); y.sum().backward()\n"
        "print(len(mlp_fused.ACTIVATIONS))\n"
        "mlp_fused.linear_act(torch.randn(2, 4), torch.randn(3, 4), backend='triton')"
    )
    found = run(code)
    assert found.stdout.strip().isdigit()
    assert (
        found.stderr.strip()
        .splitlines()[-1]
        .startswith('RuntimeError: backend is "triton", but Triton is not installed')
    )
    assert "Warning" not in found.stderr
