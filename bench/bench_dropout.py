"""Dropout in the kernels, beside torch's own kernels for it, in bf16, p = 0.1.

wide     512 -> 512 -> 512 -> 512 -> 512 with gelu, layer by layer. For each element of a hidden layer, torch's Dropout
         reads a(z) and writes the output and a mask of one byte, 2 + 2 + 1 bytes. In the backward it reads the gradient
         of its output and the mask, and writes the gradient of its input, 2 + 1 + 2 bytes. The kernels move none of
         these. So a step over M rows and three such layers is expected to move 30 * 512 * M bytes less, 252 MB for
         16384 rows, and to save 3 * 512 * M bytes less for backward.
narrow   networks of four layers of one width over 2^20 rows: in one kernel, and layer by layer. "auto" takes
         one kernel at the widths in `network_tiles.DROPOUT_MEASURED`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.network import synchronize
from bench.rows import Verified
from bench.verify import bounds_in_force, compare
from mlp_fused import timing
from mlp_fused.engine.autograd import dropout_factors, dropped, run_layers
from mlp_fused.engine.paths import find_layers
from mlp_fused.engine.settings import Backend
from mlp_fused.kernels.activations import ACTIVATIONS, IDENTITY
from mlp_fused.kernels.dropout import Dropout, draw_seed
from mlp_fused.module import FusedMLP
from mlp_fused.reference import Layer

ROWS, WIDTH, LAYERS, P = 16384, 512, 4, 0.1
NARROW_ROWS = 2**20
SEED = 1


class Step:
    """A forward and backward of the fused network, and of its own children in torch."""

    def __init__(self, device: str, rows: int, width: int, activation: str = "gelu", backend: Backend = "auto") -> None:
        torch.manual_seed(0)
        options: dict[str, Any] = {"activation_layer": activation, "dropout": P, "backend": backend}
        self.model = FusedMLP(width, [width] * LAYERS, **options, device=device, dtype=torch.bfloat16)
        del self.model[-1]  # the Dropout after the last Linear
        self.activation = activation
        self.eager = nn.Sequential(*self.model)
        self.parameters = list(self.model.parameters())
        nbytes = 2 * rows * width
        sets = timing.rotation(2 * nbytes, timing.cache_bytes(device))
        self.xs, self.dys = (torch.randn(sets, rows, width, device=device, dtype=torch.bfloat16) for _ in range(2))

    def timed(self, forward: Callable[[Tensor], Tensor]) -> timing.Timed:
        def step(i: int) -> tuple[Tensor, ...]:
            y = forward(self.xs[i])
            return y.detach(), *torch.autograd.grad(y, self.parameters, self.dys[i])

        return timing.Timed(step, sets=len(self.xs))

    def by_layers(self, x: Tensor) -> Tensor:
        """The network layer by layer, with the products of torch where these are expected to be faster."""
        linears = [child for child in self.model if isinstance(child, nn.Linear)]
        hidden = ACTIVATIONS[self.activation]
        layers = [Layer(linear.weight, linear.bias, hidden, P) for linear in linears[:-1]]
        layers.append(Layer(linears[-1].weight, linears[-1].bias, IDENTITY))
        weights, biases, *_ = zip(*layers)
        return run_layers(x, weights, biases, find_layers(x, layers, x.dtype, "auto"))

    def on_the_same_mask(self, x: Tensor) -> Tensor:
        """Compute y by torch, with the masks that the kernels draw after `torch.manual_seed(SEED)`."""
        torch.manual_seed(SEED)
        seed = draw_seed(x.device)
        layer = 0
        for child in self.eager:
            if isinstance(child, nn.Dropout):
                rows, width = x.shape
                x = dropped(x, dropout_factors(seed, Dropout(1 - P, layer), rows, width, x.dtype))
                layer += 1
            else:
                x = child(x)
        return x

    def verify(self) -> Verified:
        """Relative errors of a step. Raises AssertionError as `compare` does."""
        torch.manual_seed(SEED)
        results = self.timed(self.model)(0)
        return compare(results, self.timed(self.on_the_same_mask)(0), bounds_in_force("bf16"), 1)


def measure(benchmark: Any, step: Step, others: dict[str, Callable[[Tensor], Tensor]]) -> None:
    """Write the times of FusedMLP and of `others` to `extra_info`, and the ratios of these to FusedMLP's."""
    benchmark.extra_info["verified"] = asdict(step.verify())
    ours = step.timed(step.model)
    if not benchmark.disabled:
        mine = timing.time_call(ours, "cuda")
        benchmark.extra_info["ours"] = mine.as_dict()
        for name, forward in others.items():
            other = timing.time_call(step.timed(forward), "cuda")
            benchmark.extra_info.update({name: other.as_dict(), f"ratio to {name}": other.ms / mine.ms})

    def call() -> None:
        ours(0)
        synchronize("cuda")

    benchmark.pedantic(call, rounds=10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available")
def test_dropout(benchmark: Any) -> None:
    """Measure a step of FusedMLP and of eager; `extra_info` has both times and their ratio."""
    step = Step("cuda", ROWS, WIDTH)
    assert step.model.explain(ROWS).path == "layer"
    measure(benchmark, step, {"eager": step.eager})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available")
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_dropout_in_a_narrow_network(benchmark: Any, width: int, activation: str) -> None:
    """Measure a step in one kernel, layer by layer, and of eager; `extra_info` has the times and their ratios."""
    step = Step("cuda", NARROW_ROWS, width, activation, "triton")
    assert step.model.explain(NARROW_ROWS).path == "network"
    measure(benchmark, step, {"layers": step.by_layers, "eager": step.eager})
