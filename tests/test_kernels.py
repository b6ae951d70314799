"""The kernels against float64, over the one table of cases."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, check, gradients, make, oracle

from mlp_fused import reference
from mlp_fused.functional import Layer, run_layers
from mlp_fused.kernels.launch import count_launches


def ours(case: Case, data):
    layers = [Layer(*layer) for layer in zip(data.weights, data.biases, case.activations)]
    with count_launches() as launches:
        y = run_layers(data.x, layers, case.dtype)
        found = gradients(data, y)
    assert launches or case.rows == 0
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_forward_and_gradients(case: Case, device: str, poisoned: None) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    data = make(case, device)
    twin = data.to(case.dtype)
    torchs = gradients(twin, reference.mlp(twin.x, twin.weights, twin.biases, case.activations))
    check(case, oracle(case, data), ours(case, data), torchs)
