"""Compare FusedMLP with tiny-cuda-nn's FullyFusedMLP, in one process, on the narrow problems that both can run.

Both compute y = W_L relu(… relu(W_1 x)) with the same weights, without biases. tiny-cuda-nn runs through its PyTorch
binding, as its users call it. The binding takes x and the parameters in float32 and converts them to fp16 in every
call, so it reads twice as many bytes of x as FusedMLP, whose tensors are in fp16. JIT fusion (version 2.0 and later)
has its default setting.

The extra_info of a row is a `bench.rows.TinycudannRow`.

Source: github.com/NVlabs/tiny-cuda-nn, bindings/torch/tinycudann/modules.py (dtypes, loss_scale, rows),
src/fully_fused_mlp.cu (the matrices in `params`, fp16 sums), src/cpp_api.cu and
include/tiny-cuda-nn/encodings/identity.h (the padding of x).
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

WIDTHS = (16, 32, 64, 128)  # the widths of hidden layers that FullyFusedMLP supports
ALIGNMENT = 16  # the binding pads input and output widths to a multiple of this
ROWS = 256  # the binding pads the rows of x to a multiple of this

# Bounds on the relative errors of the output and of each gradient. tiny-cuda-nn rounds its sums to fp16 every 16 terms.
# Simulated in PyTorch with 8192 rows, this gives errors of up to 0.0012 in the output and 0.048 in gradients, mostly
# because a rounded pre-activation can be on the other side of relu's kink. A wrong or transposed matrix would give an
# error of about 1.
BOUNDS = 2 * AGREEMENT["fp16"][0], 8 * AGREEMENT["fp16"][1]


def runs(problem: Problem) -> bool:
    """True if FullyFusedMLP can run a problem without padding rows: fp16, relu, and hidden layers of one width."""
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
    """Return a width rounded up to a multiple of ALIGNMENT."""
    return -(-width // ALIGNMENT) * ALIGNMENT


def pack(weights: Sequence[Tensor]) -> Tensor:
    """Concatenate W_1 … W_L, each (out, in), to the flat tensor `params`: padded, row-major, float32.

    The padding has to be zero, because tiny-cuda-nn pads x with ones.
    """
    flat = []
    for weight in weights:
        n, k = weight.shape
        flat.append(F.pad(weight.detach().float(), (0, padded(k) - k, 0, padded(n) - n)).flatten())
    return torch.cat(flat)


def unpack(params: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Return the matrices (out, in) in `params` or in its gradient, without the padding."""
    shapes = [(n, k) for k, n in pairwise(widths)]
    flat = params.split([padded(n) * padded(k) for n, k in shapes])
    return [matrix.view(padded(n), padded(k))[:n, :k] for matrix, (n, k) in zip(flat, shapes, strict=True)]


class Ours(Bench):
    """A problem computed by FusedMLP, without biases."""

    @cached_property
    def model(self) -> FusedMLP:
        release(self.device)
        torch.manual_seed(0)
        first, *rest = self.problem.widths
        return FusedMLP(
            first, rest, activation_layer=self.problem.activation, bias=False, device=self.device, dtype=self.dtype
        )


class Theirs(Bench):
    """The same problem computed by tiny-cuda-nn, with the same weights, inputs and dY.

    Raises:
        ValueError: the network of `tinycudann` has another number of parameters.
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
        # No loss scale, as in FusedMLP. Gradients are in fp16 and would overflow at 2^21 rows with the default of 128.
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
        """Return the relative errors of one call against FusedMLP, and the seconds of this first call.

        Raises:
            AssertionError: an error exceeds BOUNDS, or the output is not in fp16.
        """
        last = timed.sets - 1
        begin = time.perf_counter()
        y, *flat = timed(last)
        synchronize(self.device)
        seconds = time.perf_counter() - begin
        assert y.dtype == torch.float16, f"tinycudann computes in {y.dtype}; it needs to be built with fp16"
        results = [y, *(matrix for params in flat for matrix in unpack(params, self.problem.widths))]
        expected = self.ours.timed(self.ours.model, phase)(last)
        return compare(results, expected, BOUNDS, 1, "FusedMLP and tinycudann differ"), seconds


@lru_cache(maxsize=1)
def pair_for(problem: Problem, device: str, tinycudann: Any) -> tuple[Ours, Theirs]:
    """Return both sides of a problem. One pair is cached, because the grid has both phases of a problem in sequence."""
    ours = Ours(problem, device)
    return ours, Theirs(ours, tinycudann)


@dataclass(frozen=True)
class Pair:
    """The calls of both sides, each with its relative errors and the seconds of its first call."""

    ours: Timed
    theirs: Timed
    our_check: tuple[Verified, float]
    their_check: tuple[Verified, float]


def prepare(cell: Cell, device: str, tinycudann: Any) -> Pair:
    """Return both calls, verified: FusedMLP's against eager, tiny-cuda-nn's against FusedMLP.

    Raises:
        AssertionError: a result is wrong.
    """
    ours, theirs = pair_for(cell.problem, device, tinycudann)
    timed, their_timed = ours.timed(ours.model, cell.phase), theirs.timed(theirs.network, cell.phase)
    return Pair(timed, their_timed, ours.verify(timed, cell.phase), theirs.compare(their_timed, cell.phase))


def measure_both(cell: Cell, device: str, tinycudann: Any) -> tuple[Timed, TinycudannRow]:
    """Measure both sides. Return the call of FusedMLP, and the row."""
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
    """Import `tinycudann`. Skip the test if it is not installed, or does not load with this GPU and PyTorch."""
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
    """Compare the two sides. pytest-benchmark's own table shows single calls of FusedMLP by the host's clock."""
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
