"""FusedMLP beside tiny-cuda-nn's FullyFusedMLP, in one process, on the narrow problems that both can run.

Both compute y = W_L relu(… relu(W_1 x)) with the same weights, without biases. tiny-cuda-nn runs through its PyTorch
binding, as its users call it: that takes x in float32, twice our bytes, and rounds it and the float32 parameters to
fp16 in every call; ours are fp16 from the start. Its JIT mode (version 2.0 and later) is left as it comes.

A row's extra_info is a `bench.rows.TinycudannRow`.

What is used of tiny-cuda-nn stands in github.com/NVlabs/tiny-cuda-nn: bindings/torch/tinycudann/modules.py (dtypes,
loss_scale, rows), src/fully_fused_mlp.cu (the matrices in `params`, fp16 sums), src/cpp_api.cu and
include/tiny-cuda-nn/encodings/identity.h (how x is padded).
"""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure import describe
from bench.network import Bench, release, synchronize
from bench.problem import Cell, Problem, cases
from bench.rows import OurSide, TheirSide, TinycudannRow, Verified, to_json
from bench.verify import compare
from mlp_fused import timing
from mlp_fused.agreement import BOUNDS as AGREEMENT
from mlp_fused.explain import work
from mlp_fused.kernels import devices
from mlp_fused.module import FusedMLP
from mlp_fused.timing import Timed

WIDTHS = (16, 32, 64, 128)  # of the hidden layers
ALIGNMENT = 16  # elements: input and output widths are padded to a multiple
ROWS = 256  # the binding pads x to a multiple

# Relative errors, of the output and of each gradient. tiny-cuda-nn rounds its sums to fp16 every 16 terms: simulated
# in torch with 8192 rows, that errs by up to 0.0012 in the output and 0.048 in gradients, most of it from relus that
# a rounded pre-activation turns over. Another matrix, or the same one in another order, errs by about 1.
BOUNDS = 2 * AGREEMENT["fp16"][0], 8 * AGREEMENT["fp16"][1]


def runs(problem: Problem) -> bool:
    """True if FullyFusedMLP runs a problem as it is: without padding rows, in fp16, hidden layers of one width."""
    hidden = set(problem.widths[1:-1])
    return (
        len(hidden) == 1
        and hidden <= set(WIDTHS)
        and problem.rows % ROWS == 0
        and (problem.dtype, problem.activation, problem.layout) == ("fp16", "relu", "contiguous")
    )


CASES = [
    (cell, device)
    for cell, device in cases("narrow")
    if device == "cuda" and cell.phase in ("forward", "training") and runs(cell.problem)
]


def padded(width: int) -> int:
    return -(-width // ALIGNMENT) * ALIGNMENT


def pack(weights: Sequence[Tensor]) -> Tensor:
    """W_1 … W_L, each (out, in), as `params`: one matrix after the other, padded, row-major, float32.

    The padding is zero. It has to be: tiny-cuda-nn pads x with ones.
    """
    flat = []
    for weight in weights:
        n, k = weight.shape
        flat.append(F.pad(weight.detach().float(), (0, padded(k) - k, 0, padded(n) - n)).flatten())
    return torch.cat(flat)


def unpack(params: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """The matrices (out, in) in `params` or in its gradient, without the padding."""
    shapes = [(n, k) for k, n in pairwise(widths)]
    flat = params.split([padded(n) * padded(k) for n, k in shapes])
    return [matrix.view(padded(n), padded(k))[:n, :k] for matrix, (n, k) in zip(flat, shapes, strict=True)]


class Ours(Bench):
    """A problem in FusedMLP, without biases."""

    @cached_property
    def model(self) -> FusedMLP:
        release(self.device)
        torch.manual_seed(0)
        first, *rest = self.problem.widths
        return FusedMLP(
            first, rest, activation_layer=self.problem.activation, bias=False, device=self.device, dtype=self.dtype
        )


class Theirs(Bench):
    """The same problem in tiny-cuda-nn: the same weights, inputs and dY.

    Raises ValueError where `tinycudann` has another number of parameters than the weights take.
    """

    def __init__(self, ours: Ours, tinycudann: Any) -> None:
        super().__init__(ours.problem, ours.device)
        self.ours = ours
        widths = ours.problem.widths
        config = {
            "otype": "FullyFusedMLP",
            "activation": "ReLU",
            "output_activation": "None",
            "n_neurons": widths[1],
            "n_hidden_layers": len(widths) - 2,
        }
        self.network: nn.Module = tinycudann.Network(widths[0], widths[-1], network_config=config)
        # Ours has none. Gradients are in fp16: with the default of 128, sums over 2^21 rows pass its largest number.
        self.network.loss_scale = 1.0
        [params] = self.parameters
        packed = pack(ours.parameters)
        if params.shape != packed.shape:
            raise ValueError(f"tinycudann has {params.numel()} parameters for {widths}, not {packed.numel()}")
        with torch.no_grad():
            params.copy_(packed)

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.network.parameters())

    @cached_property
    def inputs(self) -> list[Tensor]:
        return [x.float() for x in self.ours.inputs]

    @cached_property
    def gradients(self) -> list[Tensor]:
        return self.ours.gradients

    def compare(self, timed: Timed, phase: str) -> tuple[Verified, float]:
        """Relative errors of one call against ours, and the seconds of that first call.

        Raises AssertionError where one passes BOUNDS, or where the output is not in fp16.
        """
        last = timed.sets - 1
        begun = time.perf_counter()
        y, *flat = timed(last)
        synchronize(self.device)
        seconds = time.perf_counter() - begun
        assert y.dtype == torch.float16, f"tinycudann computes in {y.dtype}: it was built without fp16"
        found = [y, *(matrix for params in flat for matrix in unpack(params, self.problem.widths))]
        expected = self.ours.timed(self.ours.model, phase)(last)
        return compare(found, expected, BOUNDS, 1, "FusedMLP and tinycudann differ"), seconds


@lru_cache(maxsize=1)
def pair_for(problem: Problem, device: str, tinycudann: Any) -> tuple[Ours, Theirs]:
    """The one pair that is kept: both phases of a problem stand side by side in the grid."""
    ours = Ours(problem, device)
    return ours, Theirs(ours, tinycudann)


@dataclass(frozen=True)
class Pair:
    """Our function and theirs, each with its relative errors and the seconds of its first call."""

    ours: Timed
    theirs: Timed
    our_check: tuple[Verified, float]
    their_check: tuple[Verified, float]


def prepare(cell: Cell, device: str, tinycudann: Any) -> Pair:
    """Both functions, verified: ours against eager, theirs against ours.

    Raises AssertionError where one is wrong.
    """
    ours, theirs = pair_for(cell.problem, device, tinycudann)
    timed, their_timed = ours.timed(ours.model, cell.phase), theirs.timed(theirs.network, cell.phase)
    return Pair(timed, their_timed, ours.verify(timed, cell.phase), theirs.compare(their_timed, cell.phase))


def measure_both(cell: Cell, device: str, tinycudann: Any) -> tuple[Timed, TinycudannRow]:
    """Our function, and the row."""
    problem, phase = cell.problem, cell.phase
    ours, theirs = pair_for(problem, device, tinycudann)
    pair = prepare(cell, device, tinycudann)
    plan = ours.model.explain(problem.rows, ours.dtype)
    gpu = devices.describe("cuda") if device == "cuda" else None
    parts = work(problem.rows, problem.widths, ours.dtype, problem.activation, bias=False, device=gpu)
    needed = parts["inference"] if phase == "forward" else parts["forward"] + parts["backward"]
    our_time, their_time = timing.time_call(pair.ours, device), timing.time_call(pair.theirs, device)
    repeat_ms = timing.time_call(pair.ours, device).ms
    jit_fusion = bool(getattr(theirs.network, "jit_fusion", False))
    row = TinycudannRow(
        id=f"tinycudann-{problem}-{phase}",
        device=device,
        widths=problem.widths,
        rows=problem.rows,
        phase=phase,
        flops=needed.flops,
        bytes=needed.bytes,
        ours=OurSide(plan.path, plan.reason, *pair.our_check, timing=our_time, repeat_ms=repeat_ms),
        tinycudann=TheirSide(jit_fusion, *pair.their_check, timing=their_time),
        speedup=their_time.ms / our_time.ms,
        kernel_speedup=their_time.kernel_ms / our_time.kernel_ms,
    )
    return pair.ours, row


def load() -> Any:
    """Module `tinycudann`; skips the test where there is none, or none for this GPU and this torch."""
    try:
        return importlib.import_module("tinycudann")
    except ModuleNotFoundError as error:
        reason = f"tinycudann is not installed ({error})"
    except (ImportError, OSError) as error:
        reason = f"tinycudann does not load ({describe(error)})"
    return pytest.skip(reason)


@pytest.fixture
def tinycudann() -> Any:
    return load()


@pytest.mark.parametrize(("cell", "device"), CASES, ids=str)
def test_tinycudann(benchmark: Any, tinycudann: Any, cell: Cell, device: str) -> None:
    """pytest-benchmark shows the host's clock over single calls of ours, each waited for."""
    benchmark.group = "tinycudann"
    if benchmark.disabled:
        benchmark.pedantic(prepare, (cell, device, tinycudann))
        return
    timed, row = measure_both(cell, device, tinycudann)
    benchmark.extra_info.update(to_json(row))
    calls = itertools.count()

    def call() -> None:
        timed(next(calls))
        synchronize(device)

    benchmark.pedantic(call, rounds=20)
