"""FusedMLP beside tiny-cuda-nn's FullyFusedMLP, in one process, on the narrow problems that both can run.

Both compute y = W_L relu(… relu(W_1 x)) with the same weights, without biases. tiny-cuda-nn runs through its PyTorch
binding, as its users call it: that takes x in float32, twice our bytes, and rounds it and the float32 parameters to
fp16 in every call; ours are fp16 from the start. Its JIT mode (version 2.0 and later) is left as it comes.

A row's extra_info:

    id, widths, rows, phase    phase is "forward" (no gradients) or "training" (and gradients of the parameters)
    flops, bytes               by `mlp_fused.plan.work`, of the path ours takes
    ours, tinycudann           ms, kernel_ms, quartiles, rounds, calls (see timing.py), verified, first_call_s
    tinycudann also            jit_fusion, whether its JIT mode was on
    ours also                  path, reason (from `explain`); repeat_ms, ms again after tiny-cuda-nn's: the noise
    speedup, kernel_speedup    tiny-cuda-nn's ms over ours, its kernel_ms over ours

What is used of tiny-cuda-nn stands in github.com/NVlabs/tiny-cuda-nn: bindings/torch/tinycudann/modules.py (dtypes,
loss_scale, rows), src/fully_fused_mlp.cu (the matrices in `params`, fp16 sums), src/cpp_api.cu and
include/tiny-cuda-nn/encodings/identity.h (how x is padded).
"""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import measure
from bench.measure import Bench, release, synchronize
from bench.problem import Cell, Problem, cases
from mlp_fused import FusedMLP, agreement, timing
from mlp_fused.kernels import configs
from mlp_fused.plan import work
from mlp_fused.timing import Timed

WIDTHS = (16, 32, 64, 128)  # of the hidden layers
ALIGNMENT = 16  # elements: input and output widths are padded to a multiple
ROWS = 256  # the binding pads x to a multiple

# Relative errors, of the output and of each gradient. tiny-cuda-nn rounds its sums to fp16 every 16 terms: simulated
# in torch with 8192 rows, that errs by up to 0.0012 in the output and 0.048 in gradients, most of it from relus that
# a rounded pre-activation turns over. Another matrix, or the same one in another order, errs by about 1.
BOUNDS = 2 * agreement.BOUNDS["fp16"][0], 8 * agreement.BOUNDS["fp16"][1]


def runs(problem: Problem) -> bool:
    """Whether FullyFusedMLP runs a problem as it is: without padding rows, in fp16, hidden layers of one width."""
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

    def compare(self, timed: Timed, phase: str) -> dict[str, Any]:
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
        errors = [agreement.relative_error(*pair) for pair in zip(found, expected, strict=True)]
        bounds = [BOUNDS[0], *[BOUNDS[1]] * len(errors[1:])]
        wrong = [(i, error) for i, (error, bound) in enumerate(zip(errors, bounds)) if not error <= bound]
        assert not wrong, f"FusedMLP and tinycudann differ (tensor, relative error): {wrong}, bounds {BOUNDS}"
        report = {"output": errors[0], "gradients": max(errors[1:], default=None), "bounds": list(BOUNDS)}
        return {"verified": report, "first_call_s": seconds}


@lru_cache(maxsize=1)
def pair_for(problem: Problem, device: str, tinycudann: Any) -> tuple[Ours, Theirs]:
    """The one pair that is kept: both phases of a problem stand side by side in the grid."""
    ours = Ours(problem, device)
    return ours, Theirs(ours, tinycudann)


def prepare(cell: Cell, device: str, tinycudann: Any) -> tuple[Timed, Timed, dict[str, Any]]:
    """Our function, theirs, and the row as far as it is known before timing; both verified, ours against eager.

    Raises AssertionError where one is wrong.
    """
    problem, phase = cell.problem, cell.phase
    ours, theirs = pair_for(problem, device, tinycudann)
    timed, their_timed = ours.timed(ours.model, phase), theirs.timed(theirs.network, phase)
    plan = ours.model.explain(problem.rows, ours.dtype)
    gpu = configs.describe("cuda") if device == "cuda" else None
    parts = work(problem.rows, problem.widths, ours.dtype, problem.activation, bias=False, device=gpu)
    needed = parts["inference"] if phase == "forward" else parts["forward"] + parts["backward"]
    row = {
        "id": f"tinycudann-{problem}-{phase}",
        "widths": list(problem.widths),
        "rows": problem.rows,
        "phase": phase,
        "flops": needed.flops,
        "bytes": needed.bytes,
        "ours": {"path": plan.path, "reason": plan.reason} | ours.verify(timed, phase),
        "tinycudann": {"jit_fusion": bool(getattr(theirs.network, "jit_fusion", False))}
        | theirs.compare(their_timed, phase),
    }
    return timed, their_timed, row


def measure_both(cell: Cell, device: str, tinycudann: Any) -> tuple[Timed, dict[str, Any]]:
    """Our function, and the whole row (see the top of this file)."""
    timed, their_timed, row = prepare(cell, device, tinycudann)
    ours = timing.time_call(timed, device)
    theirs = timing.time_call(their_timed, device)
    row["ours"] |= ours.as_dict() | {"repeat_ms": timing.time_call(timed, device).ms}
    row["tinycudann"] |= theirs.as_dict()
    row["speedup"] = theirs.ms / ours.ms
    row["kernel_speedup"] = theirs.kernel_ms / ours.kernel_ms
    return timed, row


def load() -> Any:
    """Module `tinycudann`; skips the test where there is none, or none for this GPU and this torch."""
    try:
        return importlib.import_module("tinycudann")
    except ModuleNotFoundError as error:
        reason = f"tinycudann is not installed ({error})"
    except (ImportError, OSError) as error:
        reason = f"tinycudann does not load ({measure.describe(error)})"
    return pytest.skip(reason)


@pytest.fixture
def tinycudann() -> Any:
    return load()


@pytest.mark.parametrize(("cell", "device"), CASES, ids=str)
def test_tinycudann(benchmark: Any, tinycudann: Any, cell: Cell, device: str) -> None:
    """What pytest-benchmark shows is the host's clock over single calls of ours, each waited for."""
    benchmark.group = "tinycudann"
    if benchmark.disabled:
        benchmark.pedantic(prepare, (cell, device, tinycudann))
        return
    timed, row = measure_both(cell, device, tinycudann)
    benchmark.extra_info.update(row)
    calls = itertools.count()

    def call() -> None:
        timed(next(calls))
        synchronize(device)

    benchmark.pedantic(call, rounds=20)
