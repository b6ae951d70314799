"""Wide fp32 networks whose operands are split into fp16 planes, beside eager PyTorch with the same setting for fp32.

ieee     full fp32: "fp16x3" beside cuBLAS's fp32
tf32     tf32 allowed: "fp16x1" beside cuBLAS's tf32
sure     "ieee", for the gradients of a classifier that is sure of most rows
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.network import synchronize
from bench.verify import bounds_in_force, compare
from mlp_fused import timing
from mlp_fused.module import FusedMLP

NETWORKS = {((1024, 4096, 1024), "gelu"): 8192, ((4096, 16384, 4096), "gelu"): 2048, ((512,) * 5, "relu"): 16384}
MARGIN = 28.0  # a sure classifier adds this to the logit of the label
WRONG = 20  # in every 20th row it does not, and is mostly wrong there


class Network:
    """A FusedMLP by planes, its own children in torch, and inputs and gradients that fill the cache twice."""

    def __init__(self, device: str, widths: tuple[int, ...], activation: str, rows: int, sure: bool) -> None:
        torch.manual_seed(0)
        first, *others = widths
        self.model = FusedMLP(first, others, activation_layer=activation, backend="triton", device=device)
        self.eager = nn.Sequential(*self.model)
        self.parameters = list(self.model.parameters())
        sets = timing.rotation(4 * rows * (first + others[-1]), timing.cache_bytes(device))
        self.xs = torch.randn(sets, rows, first, device=device)
        self.dys = torch.stack([gradient(rows, others[-1], device, sure) for _ in range(sets)])

    def forward(self, model: Callable[[Tensor], Tensor]) -> timing.Timed:
        def call(i: int) -> tuple[Tensor, ...]:
            with torch.inference_mode():
                return (model(self.xs[i]),)

        return timing.Timed(call, sets=len(self.xs))

    def training(self, model: Callable[[Tensor], Tensor]) -> timing.Timed:
        def call(i: int) -> tuple[Tensor, ...]:
            y = model(self.xs[i])
            return y.detach(), *torch.autograd.grad(y, self.parameters, self.dys[i])

        return timing.Timed(call, sets=len(self.xs))


def gradient(rows: int, classes: int, device: str, sure: bool) -> Tensor:
    """Return normal random numbers or, if `sure`, the gradient of a classifier that is sure of most rows."""
    logits = torch.randn(rows, classes, device=device)
    if not sure:
        return logits
    labels = torch.randint(classes, (rows,), device=device)
    margin = torch.full((rows, 1), MARGIN, device=device)
    margin[::WRONG] = 0
    one_hot = nn.functional.one_hot(labels, classes)
    return ((logits + margin * one_hot).softmax(1) - one_hot) / rows


@pytest.fixture
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """Set PyTorch's precision of fp32 products for the test: "ieee", or "tf32"."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = request.param
    yield request.param
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available")
@pytest.mark.parametrize("phase", ["forward", "training"])
@pytest.mark.parametrize(
    ("precision", "sure"), [("ieee", False), ("ieee", True), ("tf32", False)], indirect=["precision"]
)
@pytest.mark.parametrize(("widths", "activation"), NETWORKS, ids=str)
def test_planes(
    benchmark: Any, widths: tuple[int, ...], activation: str, precision: str, sure: bool, phase: str
) -> None:
    """Write the times of FusedMLP and of eager, their ratio and the relative errors to `extra_info`."""
    network = Network("cuda", widths, activation, NETWORKS[widths, activation], sure)
    timed = getattr(network, phase)
    ours, eager = timed(network.model), timed(network.eager)
    benchmark.extra_info["verified"] = asdict(compare(ours(0), eager(0), bounds_in_force("fp32"), 1))
    if not benchmark.disabled:
        mine, other = (timing.time_call(timed, "cuda") for timed in (ours, eager))
        benchmark.extra_info |= {"ours": mine.as_dict(), "eager": other.as_dict(), "ratio": other.ms / mine.ms}

    def call() -> None:
        ours(0)
        synchronize("cuda")

    benchmark.pedantic(call, rounds=10)
