"""Dropout in the epilogues, beside torch's own kernels for it: 512 -> 512 -> 512 -> 512 -> 512 in bf16, p = 0.1.

Of each element of a hidden layer, torch's Dropout reads a(z) and writes the output and a mask of a byte, and in the
backward reads dh and the mask and writes the other dh: 2 + 2 + 1 and 2 + 1 + 2 bytes in bf16. Fused it moves none of
these. So a step over M rows and three such layers is expected to move 30 * 512 * M bytes less, 252 MB of 16384 rows,
and its backward to keep 3 * 512 * M bytes less.
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
from mlp_fused.engine.autograd import dropout_factors, dropped
from mlp_fused.kernels.dropout import Dropout, draw_seed
from mlp_fused.module import FusedMLP

ROWS, WIDTH, LAYERS, P = 16384, 512, 4, 0.1
SEED = 1


class Step:
    """A forward and backward of the fused network, and of its own children in torch."""

    def __init__(self, device: str, rows: int, width: int) -> None:
        torch.manual_seed(0)
        self.model = FusedMLP(
            width, [width] * LAYERS, activation_layer="gelu", dropout=P, device=device, dtype=torch.bfloat16
        )
        del self.model[-1]  # the one on the output
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

    def on_the_same_mask(self, x: Tensor) -> Tensor:
        """In torch, with what the kernels drop after `torch.manual_seed(SEED)`."""
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
        found = self.timed(self.model)(0)
        return compare(found, self.timed(self.on_the_same_mask)(0), bounds_in_force("bf16"), 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available")
def test_dropout(benchmark: Any) -> None:
    """`extra_info`: ms of FusedMLP and of eager, and eager's over FusedMLP's."""
    step = Step("cuda", ROWS, WIDTH)
    assert step.model.explain(ROWS).path == "layer"
    benchmark.extra_info["verified"] = asdict(step.verify())
    ours = step.timed(step.model)
    if not benchmark.disabled:
        mine, eager = (timing.time_call(each, "cuda") for each in (ours, step.timed(step.eager)))
        benchmark.extra_info.update(ours=mine.as_dict(), eager=eager.as_dict(), ratio=eager.ms / mine.ms)

    def call() -> None:
        ours(0)
        synchronize("cuda")

    benchmark.pedantic(call, rounds=10)
