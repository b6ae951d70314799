"""Measure one kernel of the layer path, and the bare matrix product of the same operands.

`Gemm(problem, phase, device)` has random operands of one layer, W (N, K) and M rows, and these methods:

    ours      the kernel with its tile
    matmul    PyTorch's matrix product alone, into allocated memory: cuBLAS
    eager     PyTorch's operations for the same results: the product, then the rest of the kernel's work
    errors    the errors of ours and of eager against float64

Calls cycle through several sets of x, dz and the saved tensor, which change with every batch. The weight and the
outputs are the same in all calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.problem import Problem
from bench.rows import GemmErrors, Verified
from bench.verify import bounds_in_force, compare
from mlp_fused import timing
from mlp_fused.dtypes import DTYPES
from mlp_fused.engine import tables
from mlp_fused.engine.paths import find_layers
from mlp_fused.engine.recognize import resolve
from mlp_fused.engine.schedule import Step
from mlp_fused.explain import make_schedules, meta_layers
from mlp_fused.kernels import devices, layer_tiles, tile_config
from mlp_fused.kernels.layer_backward import dgrad, wgrad
from mlp_fused.kernels.layer_forward import layer_forward
from mlp_fused.timing import Timed

GEMM_BASELINES = ("matmul", "eager")

FORWARDS: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda z: z, "relu": F.relu, "gelu": F.gelu}
# dz, from dh and the saved tensor: the output of a relu, the pre-activation of a gelu.
BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda dh, h: torch.ops.aten.threshold_backward(dh, h, 0),
    "gelu": lambda dh, z: torch.ops.aten.gelu_backward(dh, z),
}


class Kernels(NamedTuple):
    """The launchers of the layer path's kernels."""

    layer_forward: Callable[..., object]
    dgrad: Callable[..., object]
    wgrad: Callable[..., object]


KERNELS = Kernels(layer_forward, dgrad, wgrad)


class Operands(NamedTuple):
    """The operands of one call: a (M, ·) and b of the product, and bias and saved tensor if the kernel reads them."""

    a: Tensor  # x in layer_forward, dz in dgrad and wgrad
    b: Tensor  # the weight in layer_forward and dgrad, h in wgrad
    bias: Tensor | None = None
    saved: Tensor | None = None

    def double(self) -> Operands:
        """Return the operands in float64."""
        optional = (None if t is None else t.double() for t in (self.bias, self.saved))
        return Operands(self.a.double(), self.b.double(), *optional)


def kernel_step(problem: Problem, phase: str) -> Step:
    """Return the step of a phase's kernel in the schedule of mlp_fused: its work, and the problem of its tile."""
    dtype = DTYPES[problem.dtype]
    (k, n), activation, identity = problem.widths, resolve(problem.activation), resolve("identity")
    widths: tuple[int, ...] = (k, n)
    activations = [activation]
    if phase == "dgrad":  # add a layer below, of any width, whose activation dgrad differentiates
        widths, activations = (1, k, n), [activation, identity]
    x = torch.empty((problem.rows, widths[0]), dtype=dtype, device="meta")
    layers = meta_layers(widths, activations, dtype, training=phase != "layer_forward")
    path = find_layers(x, layers, dtype, "triton")
    forwards, backwards, _ = make_schedules(path, x, layers, devices.INTERPRETED_DEVICE)
    kind = "forward" if phase.startswith("layer_forward") else phase
    steps = (step for schedule in (*forwards, *backwards) for step in schedule.steps)
    return next(step for step in steps if step.kind == kind)


class Gemm:
    """One kernel of the layer path with its operands. The module's docstring lists the methods."""

    def __init__(self, problem: Problem, phase: str, device: str, kernels: Kernels = KERNELS) -> None:
        self.problem = problem
        self.kernels = kernels
        self.phase = phase
        self.device = device
        self.dtype = DTYPES[problem.dtype]
        self.plan = kernel_step(problem, phase)
        self.activation = resolve(problem.activation)

    @property
    def precision(self) -> str:
        """The precision of fp32 products by PyTorch's setting."""
        assert self.plan.problem is not None
        return self.plan.problem.precision

    @cached_property
    def tile(self) -> tile_config.TileConfig:
        """The tile that mlp_fused chooses."""
        assert self.plan.problem is not None
        tensors = [t for t in (*self.operands[0], *self.outputs) if t is not None and t.dim() == 2]
        aligned = all(t.stride(0) * t.element_size() % 16 == 0 for t in tensors)
        problem, device = replace(self.plan.problem, aligned=aligned), devices.device_record(tensors[0])
        return tables.tile_for(problem, device) or layer_tiles.choose(problem, device)

    @cached_property
    def operands(self) -> list[Operands]:
        """The sets of operands, enough that they are read from memory, not from L2."""
        torch.manual_seed(0)
        first = self._operands()
        rotated = sum(t.nbytes for t in first if t is not None and t.shape[0] == self.problem.rows)
        sets = timing.rotation(rotated, timing.cache_bytes(self.device))
        return [first, *(self._operands(first) for _ in range(sets - 1))]

    def _operands(self, first: Operands | None = None) -> Operands:
        rows, (k, n) = self.problem.rows, self.problem.widths

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=self.device, dtype=self.dtype)

        if self.phase == "wgrad":
            return Operands(random(rows, n), random(rows, k))
        weight = random(n, k) / k**0.5 if first is None else first.b
        if self.phase == "dgrad":
            saved = random(rows, k)
            saved = saved if self.activation.saves_preactivation else FORWARDS[self.problem.activation](saved)
            return Operands(random(rows, n), weight, saved=saved)
        bias = random(n) if first is None else first.bias
        return Operands(random(rows, k), weight, bias)

    @cached_property
    def outputs(self) -> tuple[Tensor, ...]:
        """The tensors that the kernel writes: (h, z), (dx, h) or (dW, db). The first is the result of the product."""
        rows, (k, n) = self.problem.rows, self.problem.widths
        shapes: dict[str, list[tuple[int, ...]]] = {
            "layer_forward": [(rows, n)],
            "layer_forward_z": [(rows, n)] * 2,
            "dgrad": [(rows, k)] * (1 + self.activation.saves_preactivation),
            "wgrad": [(n, k), (n,)],
        }
        # They are filled with NaN, so that an entry which is never written is found.
        return tuple(torch.full(shape, torch.nan, device=self.device, dtype=self.dtype) for shape in shapes[self.phase])

    @cached_property
    def product(self) -> Tensor:
        """The output of the bare product. It is separate from `outputs`, so that it cannot hide a wrong kernel."""
        return torch.empty_like(self.outputs[0])

    def ours(self, i: int) -> tuple[Tensor, ...]:
        """Run the kernel on set i of the operands, and return `outputs`."""
        a, b, bias, saved = self.operands[i]
        second = self.outputs[1] if len(self.outputs) > 1 else None
        if self.phase == "wgrad":
            self.kernels.wgrad(a, b, self.outputs[0], second, self.precision, self.tile)
        elif self.phase == "dgrad":
            self.kernels.dgrad(a, b, saved, self.outputs[0], second, self.activation, self.precision, self.tile)
        else:
            self.kernels.layer_forward(a, b, bias, self.outputs[0], second, self.activation, self.precision, self.tile)
        return self.outputs

    def _factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two matrices of the product, transposed as needed."""
        if self.phase == "wgrad":
            return a.t(), b
        return (a, b) if self.phase == "dgrad" else (a, b.t())

    def matmul(self, i: int) -> Tensor:
        """Compute the bare product of set i by PyTorch."""
        return torch.mm(*self._factors(self.operands[i].a, self.operands[i].b), out=self.product)

    def eager(self, i: int) -> tuple[Tensor, ...]:
        """Compute the results of set i by PyTorch: `outputs`, without dgrad's h, which PyTorch saved in the forward."""
        return self._by_torch(self.operands[i])

    def _by_torch(self, operands: Operands) -> tuple[Tensor, ...]:
        a, b, bias, saved = operands
        left, right = self._factors(a, b)
        if self.phase == "wgrad":
            return left @ right, a.sum(0)
        if saved is not None:
            return (BACKWARDS[self.problem.activation](left @ right, saved),)
        assert bias is not None
        z = torch.addmm(bias, left, right)
        h = FORWARDS[self.problem.activation](z)
        return (h, z) if self.phase == "layer_forward_z" else (h,)

    def expected(self, i: int) -> tuple[Tensor, ...]:
        """Compute all of `outputs` of set i by PyTorch."""
        results, saved = self.eager(i), self.operands[i].saved
        if len(results) < len(self.outputs) and saved is not None:
            return *results, FORWARDS[self.problem.activation](saved)
        return results

    def timed(self, name: str) -> Timed:
        """Return the method "ours", "matmul" or "eager" as a call to time."""
        return Timed(getattr(self, name), sets=len(self.operands))

    def verify(self) -> Verified:
        """Return the relative errors of one call of the kernel against eager.

        Raises:
            AssertionError: an error exceeds its bound, as in `compare`.
        """
        results = self.ours(0)
        outputs = len(results) if self.phase.startswith("layer_forward") else 0
        return compare(results, self.expected(0), bounds_in_force(self.problem.dtype), outputs)

    def errors(self) -> dict[str, GemmErrors]:
        """Return the errors of ours and of eager against float64, in the first of `outputs`.

        `norm` is ‖result - exact‖ / ‖exact‖, and `entry` is the largest |result - exact| / (|a| |b|).
        """
        operands = self.operands[0]
        exact = self._by_torch(operands.double())[0]
        left, right = self._factors(operands.a.double().abs_(), operands.b.double().abs_())
        scale = left @ right
        del left, right
        results = {"ours": self.ours(0)[0], "eager": self.eager(0)[0]}
        return {name: _errors(result, exact, scale) for name, result in results.items()}


def _errors(result: Tensor, exact: Tensor, scale: Tensor) -> GemmErrors:
    difference = (result.double() - exact).abs_()
    return GemmErrors((difference.norm() / exact.norm()).item(), difference.div_(scale).max().item())


@lru_cache(maxsize=1)
def gemm_for(problem: Problem, phase: str, device: str, kernels: Kernels = KERNELS) -> Gemm:
    """Return the Gemm of a problem. One is cached, because the measurement and pytest-benchmark's rounds share it."""
    return Gemm(problem, phase, device, kernels)
