"""Measure first calls in a new process: `python -m bench.fresh first_touch|warmup`, `... lecture [--cpu] [--gpu]`.

It prints one line of JSON: seconds by name, by the host's clock, after a synchronization unless the name has
"returned". Names that end in _2 are second calls.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import Tensor, nn

from bench.problem import FRESH_PHASES, Problem
from mlp_fused.agreement import BOUNDS, relative_error
from mlp_fused.dtypes import DTYPES
from mlp_fused.environment import distorted
from mlp_fused.module import FusedMLP
from mlp_fused.transfer import first_touch as steps
from mlp_fused.transfer.first_touch import seconds


def network(problem: Problem, device: str) -> FusedMLP:
    """Make the network of a problem."""
    first, *rest = problem.widths
    return FusedMLP(first, rest, activation_layer=problem.activation, device=device, dtype=DTYPES[problem.dtype])


def warmup(model: FusedMLP, x: Tensor) -> dict[str, float]:
    """Measure `model.warmup(rows)`, then a forward and backward, twice.

    `warmup` compiles the kernels of a training step, or loads them from Triton's cache. If it prepared everything, the
    first forward and backward takes as long as the second.
    """
    parameters = list(model.parameters())
    times: dict[str, float] = {}
    times["warmup"], _ = seconds(lambda: model.warmup(len(x)))
    for suffix in ("", "_2"):
        times["training" + suffix], _ = seconds(lambda: torch.autograd.grad(model(x).sum(), parameters))
    return times


def first_touch(problem: Problem) -> dict[str, float]:
    """Measure the first calls of a process with a FusedMLP (see `mlp_fused.transfer.first_touch`), and verify them."""
    model = network(problem, "cpu")
    x = torch.randn(problem.rows, problem.widths[0], dtype=DTYPES[problem.dtype])
    times = steps.first_touch(model, [x])
    with torch.no_grad():
        children = nn.Sequential(*model)  # the same modules, computed by PyTorch
        check(model(x.cuda()), children(x.cuda()), BOUNDS[problem.dtype][0])
    return times


def lecture(n: int, *, cpu: bool, gpu: bool) -> dict[str, float]:
    """Measure an (n, n) fp32 product on the CPU, and the copy of its operands to the GPU and the product there.

    `product_returned` is the time until the call returns, which a clock without a synchronization would show.
    `product_device` is the time between events around it. `product` is the time until the result is there.
    """
    a, b = torch.randn(n, n), torch.randn(n, n)
    times: dict[str, float] = {}
    for suffix in ("", "_2") if cpu else ():
        times["cpu_product" + suffix], _ = seconds(lambda: a @ b)
    for suffix in ("", "_2") if gpu else ():
        times["copy" + suffix], (c, d) = seconds(lambda: (a.cuda(), b.cuda()))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin = time.perf_counter()
        start.record()
        product = c @ d
        end.record()
        times["product_returned" + suffix] = time.perf_counter() - begin
        torch.cuda.synchronize()
        times["product" + suffix] = time.perf_counter() - begin
        times["product_device" + suffix] = 1e-3 * start.elapsed_time(end)
        check(product[:8].cpu(), a[:8] @ b, BOUNDS["tf32"][0])  # the user's settings may allow tf32
        del c, d, product
    return times


def check(result: Tensor, expected: Tensor, bound: float) -> None:
    """Raise an AssertionError if the relative error exceeds the bound."""
    error = relative_error(result, expected)
    assert error <= bound, f"the relative error is {error}; it needs to be at most {bound}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=FRESH_PHASES)
    parser.add_argument("--cpu", action="store_true", help="the lecture's product on the CPU")
    parser.add_argument("--gpu", action="store_true", help="the lecture's copy and product on the GPU")
    parser.add_argument("--widths", type=int, nargs="+", default=[784, 512, 512, 10])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--activation", default="relu")
    options = parser.parse_args(arguments)
    on_gpu = options.gpu or options.what != "lecture"
    if on_gpu and (reason := distorted()) is not None:
        parser.error(reason)
    problem = Problem(tuple(options.widths), options.rows, options.dtype, options.activation)
    if options.what == "first_touch":
        times = first_touch(problem)
    elif options.what == "warmup":
        x = torch.randn(problem.rows, problem.widths[0], device="cuda", dtype=DTYPES[problem.dtype])
        times = warmup(network(problem, "cuda"), x)
    else:
        times = lecture(options.rows, cpu=options.cpu, gpu=options.gpu)
    print(json.dumps(times))


if __name__ == "__main__":
    main()
