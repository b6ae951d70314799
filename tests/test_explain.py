"""`model.explain`: its byte counts, its reasons, and its errors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from kernel_runs import saved_bytes
from torch import nn

from mlp_fused import FusedMLP
from mlp_fused.kernels.devices import DEVICES


def test_explain_with_frozen_weights_and_under_autocast() -> None:
    """A kernel computes the gradients of biases alone. Under autocast, the input is saved as it is, in fp32."""
    model = FusedMLP(32, [16, 8])
    for child in model:
        if isinstance(child, nn.Linear):
            child.weight.requires_grad_(False)
    plan = model.explain(64, torch.bfloat16, "NVIDIA H200")
    assert any("wgrad" in step.kind or "recompute" in step.kind for run in plan.runs for step in run.kernels)
    assert model.requires_grad_().explain(64, torch.bfloat16, "NVIDIA H200").saved_bytes == 64 * 32 * 4


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_explain_counts_saved_bytes(activation: str) -> None:
    plan = FusedMLP(32, [48, 16, 8], activation_layer=activation, backend="triton").explain(64, device="NVIDIA H200")
    assert plan.path == "network"
    assert plan.saved_bytes == 64 * (32 + 48 + 16) * 4
    by_torch = FusedMLP(32, [48, 16, 8], activation_layer=activation).explain(64)
    assert by_torch.path == "reference"
    assert by_torch.reason == "the input is on the CPU"
    pre_activations = 64 * (48 + 16) * 4 if activation == "gelu" else 0
    assert by_torch.saved_bytes == plan.saved_bytes + pre_activations
    text = str(plan)
    for expected in (
        "NVIDIA H200",
        "0-2: 32 -> 48 -> 16 -> 8",
        "network wgrad",
        "GFLOP",
        "floor",
        "saved for backward 0.025 MB",
    ):
        assert expected in text
    assert plan.work.flops == 2 * 64 * (32 * 48 * 2 + 48 * 16 * 3 + 16 * 8 * 3)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_autocasts_copies_of_weights_are_saved_in_plain_torch(activation: str) -> None:
    model, x = FusedMLP(20, [30, 10], activation_layer=activation), torch.randn(7, 20)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.explain(7).saved_bytes
        assert saved_bytes(lambda: model(x), model.parameters()) == expected


def test_the_cast_of_the_input_is_a_step() -> None:
    plan = FusedMLP(1024, [4096, 1024]).explain(8192, torch.bfloat16, "NVIDIA H200")
    cast = plan.runs[0].kernels[0]
    assert (cast.kind, cast.label) == ("cast", "input")
    assert cast.work.bytes == 8192 * 1024 * (4 + 2)


def test_saved_bytes_in_plain_torch_are_the_same_every_time() -> None:
    """Below a frozen first layer, storages are freed early, and their ids are used again."""
    counts = set()
    for _ in range(20):
        model = FusedMLP(64, [64, 64, 16], backend="reference")
        model[0].requires_grad_(False)
        counts.add(model.explain(1000).saved_bytes)
    assert counts == {2 * 1000 * 64 * 4}


def test_explain_says_why_a_float32_network_is_not_one_kernel() -> None:
    """This rule applies only if the user chose neither the backend nor recompute."""
    plan = FusedMLP(32, [24, 16, 8]).explain(64, device="NVIDIA H200")
    reason = "one kernel for such a float32 network was not measured to be faster than torch"
    assert (plan.path, plan.reason) == ("layer", reason)
    assert FusedMLP(32, [24, 16, 8]).explain(64, torch.bfloat16, "NVIDIA H200").path == "network"
    assert FusedMLP(32, [24, 16, 8], recompute=True).explain(64, device="NVIDIA H200").path == "network"


def test_explain_names_modules_without_kernels_and_why() -> None:
    model = FusedMLP(32, [48, 8], nn.BatchNorm1d, nn.PReLU)
    text = str(model.explain(16, torch.bfloat16, "NVIDIA H100"))
    assert "1 BatchNorm1d: reference, because BatchNorm1d has no kernel" in text
    assert "2 PReLU: reference, because PReLU has no kernel" in text
    model[0].register_forward_hook(lambda *_: None)
    assert "0 Linear: reference, because it has hooks" in str(model.explain(16, device="NVIDIA H100"))
    hooked = FusedMLP(32, [48, 8])
    hooked[0].register_forward_hook(lambda *_: None)
    text = str(hooked.explain(16, device="NVIDIA H100"))
    assert "1 ReLU: reference, because it follows no Linear layer that it could be fused with" in text
    double = FusedMLP(4, [3]).double().explain(16, device="NVIDIA H100")
    assert double.path == "reference"
    assert "float64" in double.reason
    reference = FusedMLP(4, [3], backend="reference").explain(16, device="NVIDIA H100")
    assert reference.reason == 'the backend is "reference"'


@pytest.mark.parametrize(("rows", "text"), [(0, "0 rows, float32"), (1, "1 row, float32"), (2, "2 rows, float32")])
def test_explain_counts_rows_in_the_singular_and_the_plural(rows: int, text: str) -> None:
    assert str(FusedMLP(4, [3]).explain(rows)).startswith(text)


def test_explain_names_a_module_that_does_not_take_rows() -> None:
    convolutional = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    bilinear = FusedMLP.from_sequential(nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 2)))
    with pytest.raises(ValueError, match="Bilinear does not take an input of shape"):
        bilinear.explain(16)
    with pytest.raises(ValueError, match="Conv2d does not take an input of shape"):
        FusedMLP.from_sequential(convolutional).explain(4)


@pytest.mark.parametrize(
    ("short", "name"),
    [
        ("A100", "NVIDIA A100"),
        ("h100", "NVIDIA H100"),
        ("nvidia h200", "NVIDIA H200"),
        ("nvidia_b200", "NVIDIA B200"),
        ("MI300X", "AMD MI300X"),
        ("amd", "AMD MI300X"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("H100-SXM5", "NVIDIA H100"),
        ("AMD Instinct MI300X", "AMD MI300X"),
    ],
)
def test_explain_takes_short_names_of_gpus(short: str, name: str) -> None:
    model = FusedMLP(32, [16, 8])
    plan = model.explain(8, torch.bfloat16, short)
    assert plan.device == DEVICES[name]
    assert str(plan) == str(model.explain(8, torch.bfloat16, name))


@pytest.mark.parametrize(
    "name", ["A10", "H100 PCIe", "A100-SXM4-40GB", "GH200", "MI300A", "RTX 4090", "gpu", "sxm", "", 3.5], ids=str
)
def test_explain_lists_the_gpus_it_knows(name: object) -> None:
    needed = "it needs to be a torch device, such as cuda, or the name of a GPU to plan for (NVIDIA A100, NVIDIA H100, "
    with pytest.raises(
        ValueError, match=rf"^{re.escape(f'device is {name!r}; {needed}')}.*MI300X, or a short form such"
    ):
        FusedMLP(32, [16, 8]).explain(8, device=name)


def test_explain_says_which_gpus_a_name_may_mean() -> None:
    several = "NVIDIA A100, NVIDIA H100, NVIDIA H200, NVIDIA B200"
    with pytest.raises(ValueError, match=f"^device is 'Nvidia'; it needs to be one of: {several}$"):
        FusedMLP(32, [16, 8]).explain(8, device="Nvidia")


@pytest.mark.parametrize("dtype", [torch.int32, "bf16"], ids=str)
def test_explain_needs_a_floating_point_dtype(dtype: Any) -> None:
    with pytest.raises(
        TypeError, match=f"^dtype is {dtype!r}; it needs to be a floating-point dtype, such as torch.bf"
    ):
        FusedMLP(32, [16, 8]).explain(8, dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_explain_for_a_missing_gpu_lists_the_names_it_takes() -> None:
    with pytest.raises(ValueError, match=r"^device is 'cuda', and torch can use none here; .* cpu, or .*NVIDIA A100, "):
        FusedMLP(32, [16, 8]).explain(8, device="cuda")
    assert FusedMLP(32, [16, 8]).explain(8, device="cpu").path == "reference"


@pytest.mark.parametrize("rows", [2**40 + 1, 2**62, 10**30])
def test_more_rows_than_any_memory_holds_are_refused(rows: int) -> None:
    model = FusedMLP(4, [4, 2])
    for method in (model.explain, model.warmup):
        with pytest.raises(ValueError, match=rf"^batch_size is {rows}; it needs to be a number of rows, .*most 2\^40$"):
            method(rows)


def test_the_largest_number_of_rows_is_explained() -> None:
    assert FusedMLP(4, [4, 2]).explain(2**40, device="H200").rows == 2**40
