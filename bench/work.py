"""Compute the FLOPs and bytes of a phase, and the floor of its time."""

from __future__ import annotations

from itertools import pairwise

from bench.gemm import kernel_step
from bench.problem import GEMM_PHASES, Problem
from bench.rows import Floor
from mlp_fused.dtypes import DTYPES
from mlp_fused.engine.settings import float32_precision
from mlp_fused.explain import Work, work
from mlp_fused.kernels import devices
from mlp_fused.timing import Ceilings


def phase_work(problem: Problem, phase: str, device: str) -> Work:
    """Return the FLOPs and bytes of a phase on its path on a device. A step includes the bytes of the loss and of Adam.

    Adam reads each parameter, its gradient and two moments, and writes the parameter and the moments. The cross entropy
    reads the logits and writes their gradient. The FLOPs of both are not counted.
    """
    if phase == "lecture":
        n = problem.rows
        return Work(2 * n**3, 3 * n * n * DTYPES[problem.dtype].itemsize)
    if phase in GEMM_PHASES:
        return kernel_step(problem, phase).work
    gpu = devices.describe("cuda") if device == "cuda" else None
    precision = float32_precision() if problem.dtype == "fp32" else "ieee"
    parts = work(
        problem.rows, problem.widths, DTYPES[problem.dtype], problem.activation, device=gpu, precision=precision
    )
    if phase in ("forward", "copy"):
        return parts["inference"]
    if phase == "backward":
        return parts["backward"]
    both = parts["forward"] + parts["backward"]
    if phase == "training":
        return both
    widths, size = problem.widths, DTYPES[problem.dtype].itemsize
    parameters = sum(k * n + n for k, n in pairwise(widths))
    logits = 2 * problem.rows * widths[-1] * problem.cross_entropy
    return both + Work(0, (7 * parameters + logits) * size)


def against_floor(work: Work, ceilings: Ceilings, ms: float) -> Floor:
    """Return the floor of the work's time, and the rates reached if the work took `ms` milliseconds.

    The floor is max(FLOPs / (FLOP/s), bytes / (bytes/s)), with the rates in `ceilings`.
    """
    seconds = 1e-3 * ms
    floor = work.floor(ceilings.flops_per_second, ceilings.bytes_per_second)
    by_flops = work.flops / ceilings.flops_per_second >= work.bytes / ceilings.bytes_per_second
    return Floor(
        flops=work.flops,
        bytes=work.bytes,
        tflops=1e-12 * work.flops / seconds,
        gbps=1e-9 * work.bytes / seconds,
        seconds=floor,
        bound="compute" if by_flops else "memory",
        ratio=seconds / floor,
        ceilings=ceilings,
    )
