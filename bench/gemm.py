"""One kernel of the layer path by itself, beside the bare matrix product inside it.

`Gemm(problem, phase, device)` has random operands of one layer (K, N) for M rows, and these functions of them:

    ours      the kernel with its tile
    matmul    torch's matrix product of the same operands alone, into memory that is there: cuBLAS
    eager     torch's whole way to the same tensors: the product, then what else the kernel does
    errors    of ours and of eager against float64

What is read anew for each batch (x, dz, what was saved) is rotated; the weight and the outputs are not.
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
from mlp_fused.engine.layer_path import layer_path
from mlp_fused.engine.layer_steps import parameters_of
from mlp_fused.engine.recognize import resolve
from mlp_fused.engine.schedule import Step
from mlp_fused.engine.settings import float32_precision
from mlp_fused.explain import meta_layers, schedules_of
from mlp_fused.kernels import devices, layer_tiles, tile_config
from mlp_fused.kernels.layer_backward import dgrad, wgrad
from mlp_fused.kernels.layer_forward import layer_forward
from mlp_fused.timing import Timed

GEMM_BASELINES = ("matmul", "eager")

FORWARDS: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda z: z, "relu": F.relu, "gelu": F.gelu}
# dz from dh and what was kept: the output of a relu, the pre-activation of a gelu.
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
    """The operands of one call: a (M, ·) and b of the product; `saved` and `bias` where the kernel reads one."""

    a: Tensor  # x, dz or dz
    b: Tensor  # weight, weight or h
    bias: Tensor | None = None
    saved: Tensor | None = None

    def double(self) -> Operands:
        optional = (None if t is None else t.double() for t in (self.bias, self.saved))
        return Operands(self.a.double(), self.b.double(), *optional)


def kernel_step(problem: Problem, phase: str) -> Step:
    """The kernel of a phase as mlp_fused.explain has it: its work, and the problem that its tile is chosen for."""
    dtype = DTYPES[problem.dtype]
    (k, n), activation, identity = problem.widths, resolve(problem.activation), resolve("identity")
    widths: tuple[int, ...] = (k, n)
    activations = [activation]
    if phase == "dgrad":  # into a layer below, of any width
        widths, activations = (1, k, n), [activation, identity]
    count, training = len(activations), phase != "layer_forward"
    precision = float32_precision() if dtype == torch.float32 else "ieee"
    layers = meta_layers(widths, activations, dtype, bias=True)
    path = layer_path(widths, tuple(activations), parameters_of(layers), dtype, precision, False, (0.0,) * count)
    passes = schedules_of(
        path,
        problem.rows,
        layers,
        devices.INTERPRETED_DEVICE,
        dtype=dtype,
        weights=[training] * count,
        biases=[training] * count,
    )
    kind = "forward" if phase.startswith("layer_forward") else phase
    return next(step for schedule in passes if schedule for step in schedule.steps if step.kind == kind)


class Gemm:
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
        """Torch's own setting for products in fp32."""
        assert self.plan.problem is not None
        return self.plan.problem.precision

    @cached_property
    def tile(self) -> tile_config.TileConfig:
        assert self.plan.problem is not None
        tensors = [t for t in (*self.operands[0], *self.outputs) if t is not None and t.dim() == 2]
        aligned = all(t.stride(0) * t.element_size() % 16 == 0 for t in tensors)
        problem, device = replace(self.plan.problem, aligned=aligned), devices.device_of(tensors[0])
        return tables.tile_for(problem, device) or layer_tiles.choose(problem, device)

    @cached_property
    def operands(self) -> list[Operands]:
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
            saved = saved if self.activation.keeps_preactivation else FORWARDS[self.problem.activation](saved)
            return Operands(random(rows, n), weight, saved=saved)
        bias = random(n) if first is None else first.bias
        return Operands(random(rows, k), weight, bias)

    @cached_property
    def outputs(self) -> tuple[Tensor, ...]:
        """The tensors that the kernel writes, the product's own first: h, z; dx, h; dW, db."""
        rows, (k, n) = self.problem.rows, self.problem.widths
        shapes: dict[str, list[tuple[int, ...]]] = {
            "layer_forward": [(rows, n)],
            "layer_forward_z": [(rows, n)] * 2,
            "dgrad": [(rows, k)] * (1 + self.activation.keeps_preactivation),
            "wgrad": [(n, k), (n,)],
        }
        # NaN: an entry that is never written is found
        return tuple(torch.full(shape, torch.nan, device=self.device, dtype=self.dtype) for shape in shapes[self.phase])

    @cached_property
    def product(self) -> Tensor:
        """The tensor that the bare product writes: none of `outputs`, so that neither verifies the other's result."""
        return torch.empty_like(self.outputs[0])

    def ours(self, i: int) -> tuple[Tensor, ...]:
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
        """The two matrices whose product it is."""
        if self.phase == "wgrad":
            return a.t(), b
        return (a, b) if self.phase == "dgrad" else (a, b.t())

    def matmul(self, i: int) -> Tensor:
        return torch.mm(*self._factors(self.operands[i].a, self.operands[i].b), out=self.product)

    def eager(self, i: int) -> tuple[Tensor, ...]:
        """The tensors of `outputs`, but for dgrad's h: torch has kept that since its forward."""
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
        """Eager's tensors for all of `outputs`."""
        found, saved = self.eager(i), self.operands[i].saved
        if len(found) < len(self.outputs) and saved is not None:
            return *found, FORWARDS[self.problem.activation](saved)
        return found

    def timed(self, name: str) -> Timed:
        """`name`: "ours", "matmul" or "eager"."""
        return Timed(getattr(self, name), sets=len(self.operands))

    def verify(self) -> Verified:
        """Relative errors of one call of the kernel against eager. Raises AssertionError as `compare` does."""
        found = self.ours(0)
        outputs = len(found) if self.phase.startswith("layer_forward") else 0
        return compare(found, self.expected(0), bounds_in_force(self.problem.dtype), outputs)

    def errors(self) -> dict[str, GemmErrors]:
        """Errors against float64, of ours and of eager: `norm`, ‖found - exact‖ / ‖exact‖, and `entry`, the largest
        |found - exact| / (|a| |b|), of the tensor that the product goes into.
        """
        operands = self.operands[0]
        exact = self._by_torch(operands.double())[0]
        left, right = self._factors(operands.a.double().abs_(), operands.b.double().abs_())
        scale = left @ right
        del left, right
        found = {"ours": self.ours(0)[0], "eager": self.eager(0)[0]}
        return {name: _errors(tensor, exact, scale) for name, tensor in found.items()}


def _errors(found: Tensor, exact: Tensor, scale: Tensor) -> GemmErrors:
    difference = (found.double() - exact).abs_()
    return GemmErrors((difference.norm() / exact.norm()).item(), difference.div_(scale).max().item())


@lru_cache(maxsize=1)
def gemm_for(problem: Problem, phase: str, device: str, kernels: Kernels = KERNELS) -> Gemm:
    """The one Gemm that is kept, between the measurement and what repeats it."""
    return Gemm(problem, phase, device, kernels)
