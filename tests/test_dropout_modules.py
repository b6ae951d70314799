"""Dropout modules that run in the kernels, and their description by `explain`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from mlp_fused import ACTIVATIONS, FusedMLP
from mlp_fused.engine.autograd import run_layers
from mlp_fused.engine.paths import UNMEASURED_DROPOUT, find_layers
from mlp_fused.kernels.devices import DEVICES
from mlp_fused.kernels.launch import count_launches, launched_by
from mlp_fused.kernels.network_tiles import is_dropout_measured
from mlp_fused.reference import Layer


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA A100"])
def test_explain_says_why_a_narrow_network_goes_layer_by_layer(device: str) -> None:
    """The reason is that the network kernel was not measured with Dropout. backend="triton" uses it all the same."""
    model = FusedMLP(64, [64, 64], dropout=0.1, dtype=torch.bfloat16)
    training, evaluation = (model.train(mode).explain(4096, device=device) for mode in (True, False))
    measured = is_dropout_measured((64,), torch.bfloat16, DEVICES[device])
    assert training.path == ("network" if measured else "layer")
    assert measured or training.reason == UNMEASURED_DROPOUT
    assert len(training.runs) == 1
    assert evaluation.path == "network"
    model.backend = "triton"
    assert model.train().explain(4096, device=device).path == "network"


def test_explain_counts_the_bytes_that_dropout_moves() -> None:
    """gelu saves z in any case and moves the same bytes. tanh writes z and its output, and recomputes the output.

    The seed of 8 bytes is written once, and read by a forward and a dgrad.
    """
    M, d = 4096, 512

    def moved(activation: str, p: float) -> int:
        model = FusedMLP(d, [d, d], activation_layer=activation, dropout=p, dtype=torch.bfloat16, backend="triton")
        model[-1].p = 0.0
        return model.explain(M, device="NVIDIA H200").work.bytes

    assert moved("gelu", 0.1) == moved("gelu", 0.0) + 3 * 8
    assert moved("relu", 0.1) == moved("relu", 0.0) + 3 * 8
    assert moved("tanh", 0.1) == moved("tanh", 0.0) + 3 * 8 + 2 * (2 * M * d)


class Mine(nn.Dropout):
    """A subclass, whose behaviour is unknown."""


def hooked() -> nn.Dropout:
    module = nn.Dropout(0.5)
    module.register_forward_hook(lambda module, args, output: output)
    return module


SEQUENCES: dict[str, tuple[list[Callable[[], nn.Module]], int]] = {  # the modules after Linear; the number of runs
    "Dropout": ([lambda: nn.Dropout(0.5)], 1),
    "in place": ([nn.ReLU, lambda: nn.Dropout(0.5, inplace=True)], 1),
    "activation, Dropout, Linear": ([nn.GELU, lambda: nn.Dropout(0.5), lambda: nn.Linear(32, 32)], 1),
    "Dropout, then an activation": ([lambda: nn.Dropout(0.5), nn.Tanh], 2),
    "Dropout twice": ([lambda: nn.Dropout(0.5), lambda: nn.Dropout(0.5)], 2),
    "Dropout and an idle one": ([lambda: nn.Dropout(0.5), lambda: nn.Dropout(0.0)], 1),
    "a hook": ([hooked], 2),
    "a subclass": ([lambda: Mine(0.5)], 2),
    "Dropout1d": ([lambda: nn.Dropout1d(0.5)], 2),
    "AlphaDropout": ([lambda: nn.AlphaDropout(0.5)], 2),
    "a norm between": ([lambda: nn.LayerNorm(32), lambda: nn.Dropout(0.5)], 3),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_kernels_take_only_plain_dropout(name: str, device: str) -> None:
    makers, runs = SEQUENCES[name]
    sequential = nn.Sequential(nn.Linear(32, 32), *(make() for make in makers)).to(device)
    model = FusedMLP.from_sequential(sequential, backend="triton")
    assert len(model.explain(5).runs) == runs
    x = torch.randn(200, 32, device=device)
    y = model(x)
    model.eval()
    torch.testing.assert_close(model(x), sequential(x), rtol=1e-4, atol=1e-4)
    if name not in ("AlphaDropout", "Dropout1d"):
        share = (y == 0).double().mean().item()
        relu = 0.5 if "place" in name else 0.0
        linears = sum(type(child) is nn.Linear for child in sequential)
        if linears == 1:
            dropped = 0.75 if name == "Dropout twice" else 0.5
            assert abs(share - (1 - (1 - dropped) * (1 - relu))) < 0.05


def test_dropout_before_any_linear_is_torchs(device: str) -> None:
    model = FusedMLP.from_sequential(nn.Sequential(nn.Dropout(0.5), nn.Linear(300, 5)), backend="triton").to(device)
    x = torch.randn(9, 300, device=device)
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, nn.Sequential(*model)(x), rtol=1e-4, atol=1e-4)


def test_annealing_the_probability_compiles_nothing() -> None:
    """The probability is an argument of the kernels at run time, not one of their constants."""
    launched = []
    x, weight = torch.randn(9, 300), torch.randn(300, 300)
    for p in (0.1, 0.25):
        layers = [Layer(weight, None, ACTIVATIONS["gelu"], p)] * 2
        with launched_by(lambda launch, tensors: launched.append(launch)):
            run_layers(x, [weight] * 2, [None] * 2, find_layers(x, layers, x.dtype, "auto"))
    assert len(launched) == 4
    assert all(launch.constants == launched[0].constants for launch in launched)
    assert [launch.scalars[:2] for launch in launched] == [(0.9, 0), (0.9, 1), (0.75, 0), (0.75, 1)]


def test_a_cpu_drops_as_torch_does() -> None:
    """Without the kernels the children run as modules, bit-identical to nn.Sequential."""
    model = FusedMLP(20, [31, 17], activation_layer="gelu", dropout=0.4)
    x = torch.randn(33, 20)
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    assert torch.equal(y, nn.Sequential(*model)(x))


def test_a_numpy_probability_is_fused(device: str) -> None:
    model = nn.Sequential(nn.Linear(8, 300), nn.ReLU(), nn.Dropout(np.float32(0.5)), nn.Linear(300, 3)).to(device)
    fused = FusedMLP.from_sequential(model, backend="triton")
    with count_launches() as launches:
        fused(torch.randn(4, 8, device=device))
    assert launches == {"layer_forward_kernel": 2}
