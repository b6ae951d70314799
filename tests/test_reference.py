"""The oracle: the reference against torch's own modules, bit for bit, and against numpy in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from cases import Case, make, oracle
from torch import nn

from mlp_fused import reference
from mlp_fused.engine.recognize import find

MODULES = (nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Tanh(), nn.Softplus(), nn.ELU(0.5), nn.Hardswish())


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_the_reference_is_torchs_modules_bit_for_bit(module: nn.Module) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        sequential = nn.Sequential(nn.Linear(9, 12), module, nn.Linear(12, 7), module, nn.Linear(7, 3)).to(dtype)
        linears = [child for child in sequential if isinstance(child, nn.Linear)]
        activations = [find(module), find(module), find(nn.Identity())]
        x = torch.randn(6, 9, dtype=dtype)
        y = reference.mlp(x, [l.weight for l in linears], [l.bias for l in linears], activations)  # noqa: E741
        expected = sequential(x)
        assert torch.equal(y, expected)
        parameters = list(sequential.parameters())
        dy = torch.randn_like(y)
        for ours, theirs in zip(torch.autograd.grad(y, parameters, dy), torch.autograd.grad(expected, parameters, dy)):
            assert torch.equal(ours, theirs)


NUMPY = {
    "identity": (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0) * 1.0),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda z: np.exp(-z) / (1 + np.exp(-z)) ** 2),
    "silu": (lambda z: z / (1 + np.exp(-z)), lambda z: (1 + np.exp(-z) * (1 + z)) / (1 + np.exp(-z)) ** 2),
    "softplus": (lambda z: np.log1p(np.exp(z)), lambda z: 1 / (1 + np.exp(-z))),
    "sine": (np.sin, np.cos),
    "squared_relu": (lambda z: np.maximum(z, 0) ** 2, lambda z: 2 * np.maximum(z, 0)),
}


@pytest.mark.parametrize("name", NUMPY)
@pytest.mark.parametrize("widths", [(5, 4), (6, 7, 3), (3, 8, 8, 2)], ids=str)
def test_the_oracle_is_the_chain_rule_in_numpy(name: str, widths: tuple[int, ...]) -> None:
    """Write out dZ_{l-1} = (dZ_l W_l) ⊙ a'(Z_{l-1}), dW_l = dZ_lᵀ H_{l-1}, db_l = Σ dZ_l."""
    case = Case(11, widths, torch.float64, name)
    data = make(case)
    a, da = NUMPY[name]
    weights = [weight.detach().numpy() for weight in data.weights]
    biases = [bias.detach().numpy() for bias in data.biases if bias is not None]
    hs, zs = [data.x.detach().numpy()], []
    for index, (weight, bias) in enumerate(zip(weights, biases)):
        zs.append(hs[-1] @ weight.T + bias)
        hs.append(zs[-1] if index + 1 == len(weights) else a(zs[-1]))
    expected = {"y": hs[-1]}
    dz = data.dy.numpy()
    for index in reversed(range(len(weights))):
        expected[f"W{index}"], expected[f"b{index}"] = dz.T @ hs[index], dz.sum(0)
        dh = dz @ weights[index]
        dz = dh * da(zs[index - 1]) if index else dh
    expected["x"] = dz
    truth = oracle(case, data).values
    assert truth.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(truth[key].numpy(), value, rtol=1e-9, atol=1e-11, err_msg=key)


def test_data_of_a_case_depends_on_the_seed() -> None:
    for first, second in itertools.pairwise(make(Case(), seed=seed).x for seed in range(3)):
        assert not torch.equal(first, second)
