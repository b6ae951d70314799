"""Inputs that kernels cannot read are computed by the modules, as without kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import KINDS, fused_and_twin

from mlp_fused import FusedLinear, FusedMLP, linear_act

PARTS = [torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows)) for rows in (2, 3)]

INPUTS: dict[str, Callable[[], Tensor]] = {
    "strided nested": lambda: torch.nested.nested_tensor(PARTS, layout=torch.strided),
    "jagged nested": lambda: torch.nested.nested_tensor(PARTS, layout=torch.jagged),
    "zeros without memory": lambda: torch._efficientzerotensor(5, 4),
}

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")


def split_rows(output: Tensor) -> list[Tensor]:
    return list(output.unbind()) if output.is_nested else [output]


def assert_same_rows(ours: Tensor, theirs: Tensor) -> None:
    assert ours.is_nested == theirs.is_nested
    assert all(torch.equal(mine, other) for mine, other in zip(split_rows(ours), split_rows(theirs), strict=True))


@pytest.mark.parametrize("recompute", [None, True])  # with True, the CPU takes the code path of a GPU
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", INPUTS)
def test_modules_compute_inputs_that_kernels_cannot_read(name: str, kind: str, recompute: bool | None) -> None:
    model, twin = fused_and_twin(kind)
    for module in model.modules():
        if isinstance(module, FusedMLP | FusedLinear):
            module.recompute = recompute
    x = INPUTS[name]()
    assert_same_rows(model(x), twin(x))
    gradients: list[Any] = []
    for network in (model, twin):
        torch.cat([rows.square().sum().reshape(1) for rows in split_rows(network(x))]).sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", INPUTS)
def test_functions_compute_inputs_that_kernels_cannot_read(name: str) -> None:
    x, linear = INPUTS[name](), nn.Linear(4, 3)
    assert_same_rows(linear_act(x, linear.weight, linear.bias, "relu"), linear(x).relu())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("strided nested", "the input is a nested tensor"),
        ("jagged nested", "the input is a nested tensor"),
        ("zeros without memory", "the input stands for zeros and has no memory"),
    ],
)
def test_backend_triton_names_inputs_that_kernels_cannot_read(name: str, sentence: str, kind: str) -> None:
    model, _ = fused_and_twin(kind, "triton")
    with pytest.raises(RuntimeError, match=f'backend is "triton", but {sentence}'):
        model(INPUTS[name]())
